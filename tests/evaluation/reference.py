"""What an evaluation should come to, from the definitions alone: a loop over tokens in float64.

No batches, no padding, no windows as arrays: each target gets the context that its policy
promises, and one forward pass. Nothing of lmlab is imported here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

EVALUATION = 2**63  # the epoch that keys evaluation's masks


@dataclass(frozen=True)
class Token:
    """One token, and the text that it stands for."""

    id: int
    document: int
    bytes: int = 0
    words: int = 0
    pretoken: int | None = None
    ends_text: bool = False
    lines: int = 0
    unspelled: int = 0
    """Bytes."""
    scored: bool = True


@dataclass
class Sums:
    """Of one document."""

    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    ends: int = 0
    lines: int = 0
    unknown_tokens: int = 0
    unknown_bytes: int = 0

    def add(self, token: Token, nll: float) -> None:
        if not token.scored:
            return
        self.nll += nll
        self.tokens += 1
        self.bytes += token.bytes
        self.words += token.words
        self.ends += token.ends_text
        self.lines += token.lines
        self.unknown_tokens += token.unspelled > 0
        self.unknown_bytes += token.unspelled

    @property
    def counts(self) -> list[int]:
        counts = [self.tokens, self.bytes, self.words, self.ends, self.lines]
        return [*counts, self.unknown_tokens, self.unknown_bytes]


def tokenized(texts: Sequence[str], tokenizer: Any, end_of_text: bool = True) -> list[list[Token]]:
    """The tokens of each text: every character has one owner, and an end-of-text token follows the last."""
    documents = []
    for number, text in enumerate(texts):
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids, pretokens = encoded["input_ids"], encoded.word_ids()
        owner: list[int] = []
        for index, (_, end) in enumerate(encoded["offset_mapping"]):
            owner += [index] * (end - len(owner))
        owner += [len(ids) - 1] * (len(text) - len(owner))
        # A character that no token reaches, or that one reaches which is the unknown token, and not the text's own.
        spelled = {
            place
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
            if token != tokenizer.unk_token_id or text[start:end] == tokenizer.unk_token
            for place in range(start, end)
        }
        unknown = {
            owner[place]
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
            if token == tokenizer.unk_token_id
            for place in range(start, end)
            if place not in spelled
        }
        # Where str.split() finds each word, left to right.
        begins, place = [], 0
        for word in text.split():
            place = text.index(word, place)
            begins.append(place)
            place += len(word)
        tokens = [
            Token(
                token,
                number,
                sum(len(text[c].encode()) for c in range(len(text)) if owner[c] == index),
                sum(owner[c] == index for c in begins),
                pretokens[index],
                lines=sum(text[c] == "\n" and owner[c] == index for c in range(len(text))),
                unspelled=sum(
                    len(character.encode())
                    for place, character in enumerate(text)
                    if owner[place] == index and (index in unknown or not (place in spelled or character.isspace()))
                ),
            )
            for index, token in enumerate(ids)
        ]
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if tokens and end_of_text:
            tokens.append(Token(end, number, ends_text=True, lines=int(not text.endswith("\n"))))
        elif text.strip() and end_of_text:  # nothing of it has a token
            size, lines = len(text.encode()), text.count("\n") + (not text.endswith("\n"))
            tokens.append(Token(end, number, size, len(text.split()), None, True, lines, unspelled=size))
        documents.append(tokens)
    return documents


def without_ends(documents: list[list[Token]]) -> list[list[Token]]:
    """The same tokens, of which those that end a document are context alone."""
    return [[replace(token, scored=not token.ends_text) for token in tokens] for tokens in documents]


def first_of(tokenizer: Any, *names: str) -> list[int]:
    """The id of the first of these special tokens that there is."""
    found = [getattr(tokenizer, f"{name}_token_id") for name in names]
    return [token for token in found if token is not None][:1]


@lru_cache(maxsize=64)
@torch.no_grad()
def logits_of(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """[T, V] of one row, on its own."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float64
    return logits


@cache
def nll_of(model: Any, ids: tuple[int, ...], position: int, target: int) -> float:
    """Of one token at one position of one row."""
    logits = logits_of(model, ids)[position]
    return float(torch.logsumexp(logits, 0) - logits[target])


def causal(
    model: Any, tokenizer: Any, documents: list[list[Token]], context: str, block_size: int, stride: int | None = None
) -> list[Sums]:
    """Each token from the tokens before it."""
    sums = [Sums() for _ in documents]
    flat = [token for tokens in documents for token in tokens]
    step = stride or block_size // 2

    def score(target: Token, before: Sequence[int]) -> None:
        assert 1 <= len(before) <= block_size
        sums[target.document].add(target, nll_of(model, tuple(before), -1, target.id))

    if context in ("blocks", "apart"):
        for place, target in enumerate(flat):
            begin = place - place % block_size
            while context == "apart" and flat[begin].document != target.document:
                begin += 1
            if place > begin:
                score(target, [token.id for token in flat[begin:place]])
        return sums
    head = first_of(tokenizer, "bos", "eos")
    for text in [flat] if context == "sliding" else documents:
        given = [] if text and [text[0].id] == head else head
        ids = given + [token.id for token in text]
        for place, target in enumerate(text, start=len(given)):
            begin = 0
            while place > begin + block_size:
                begin += step
            if place > 0:
                score(target, ids[begin:place])
    return sums


def pieces(
    tokenizer: Any, documents: list[list[Token]], context: str, block_size: int
) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """Rows of a masked model: ids before, (document, place in it) of each token, ids after."""
    if context in ("blocks", "apart"):
        flat = [(number, place) for number, tokens in enumerate(documents) for place in range(len(tokens))]
        blocks = [flat[begin : begin + block_size] for begin in range(0, len(flat), block_size)]
        if context == "apart":  # what is in a row of its own sees nothing else
            blocks = [[*part] for block in blocks for _, part in groupby(block, key=lambda token: token[0])]
        return [([], block, []) for block in blocks]
    head, tail = first_of(tokenizer, "cls", "bos", "eos"), first_of(tokenizer, "sep", "eos")
    room = block_size - len(head) - len(tail)
    rows = []
    for number, tokens in enumerate(documents):
        own = [(number, place) for place, token in enumerate(tokens) if not token.ends_text]
        rows += [(head, own[begin : begin + room], tail) for begin in range(0, len(own), room)]
    return rows


def labelled(
    model: Any,
    tokenizer: Any,
    documents: list[list[Token]],
    context: str,
    block_size: int,
    objective: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]],
    seed: int,
) -> list[Sums]:
    """The positions that the objective masks in each document, the whole of it at once."""
    sums = [Sums() for _ in documents]
    shown: list[list[int]] = []
    chosen: list[set[int]] = []
    for number, tokens in enumerate(documents):
        ids = np.array([token.id for token in tokens], np.int32)
        inputs, positions, *_ = objective(ids, (seed, EVALUATION, number), 0)
        shown.append(inputs.tolist())
        chosen.append(set(positions.tolist()))
    for head, row, tail in pieces(tokenizer, documents, context, block_size):
        ids = [*head, *(shown[number][place] for number, place in row), *tail]
        assert len(ids) <= block_size
        for position, (number, place) in enumerate(row, start=len(head)):
            if place in chosen[number]:
                target = documents[number][place]
                sums[number].add(target, nll_of(model, tuple(ids), position, target.id))
    return sums


def pseudo(
    model: Any,
    tokenizer: Any,
    documents: list[list[Token]],
    context: str,
    block_size: int,
    within_word: bool = False,
    only: set[tuple[int, int]] | None = None,
) -> list[Sums]:
    """Each token that is not special (an unknown one is not) hidden in turn; `only` these (document, place)."""
    sums = [Sums() for _ in documents]
    for head, row, tail in pieces(tokenizer, documents, context, block_size):
        tokens = [documents[number][place] for number, place in row]
        for index, target in enumerate(tokens):
            special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
            if target.id in special or (only is not None and row[index] not in only):
                continue
            ids = [token.id for token in tokens]
            ids[index] = tokenizer.mask_token_id
            for later in range(index + 1, len(tokens)) if within_word else ():
                if (tokens[later].document, tokens[later].pretoken) != (target.document, target.pretoken):
                    break
                ids[later] = tokenizer.mask_token_id
            nll = nll_of(model, (*head, *ids, *tail), len(head) + index, target.id)
            sums[target.document].add(target, nll)
    return sums
