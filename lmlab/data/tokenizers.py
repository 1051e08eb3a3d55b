"""Tokenizers: pretrained ones, and two kinds that are trained on the training split.

A function that a config names as a tokenizer returns one of Hugging Face's; where it trains one, it takes the training
texts as `texts`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmlab.errors import UserError
from lmlab.hub import from_hub, split_revision
from lmlab.models.formats import load_tokenizer
from lmlab.objectives import sentinel

END, PAD, MASK, UNKNOWN = "<|endoftext|>", "<pad>", "<mask>", "<unk>"


def pretrained(name: str | None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by hub id, ID@REVISION, directory, or `.gguf` file."""
    if name is None:
        raise UserError("tokenizer=pretrained needs a name here: add tokenizer.name=ID_OR_DIRECTORY to the command.")
    name, revision = split_revision(name, revision)
    with from_hub("tokenizer", name, "model.name or tokenizer.name"):
        return load_tokenizer(name, revision)


def bpe(
    texts: Iterable[str], vocab_size: int = 2000, extra_tokens: Sequence[str] | int | None = None
) -> PreTrainedTokenizerBase:
    """Trains byte-level BPE (Radford et al. 2019, section 2.2), which spells any text: nothing is unknown.

    Args:
        vocab_size: the number of tokens, special ones included; fewer if the texts give no more merges.
        extra_tokens: more special tokens, on top of these: text has the same ids as without them. A number stands for
            so many sentinels of T5.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    if vocab_size < least:
        raise UserError(f"tokenizer.vocab_size must be at least {least} (256 bytes and 3 special tokens).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The mask takes the space before it, as words carry theirs: "a <mask> galaxy".
    mask = AddedToken(MASK, lstrip=True, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, mask_token=mask
    )
    return with_extra_tokens(made, extra_tokens or [])


def char(texts: Iterable[str], extra_tokens: Sequence[str] | int | None = None) -> PreTrainedTokenizerBase:
    """Makes a tokenizer with one id per character of the texts; any other character is the unknown token.

    Args:
        extra_tokens: special tokens besides, as of `bpe`.
    """
    alphabet = sorted({character for text in texts for character in text})
    special = [END, PAD, MASK, UNKNOWN]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        unk_token=UNKNOWN,
    )
    return with_extra_tokens(made, extra_tokens or [])


def with_extra_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | AddedToken] | int
) -> PreTrainedTokenizerBase:
    """Adds special tokens behind all others of a tokenizer, and returns it.

    Args:
        tokens: their names; a number stands for so many sentinels.

    Raises:
        UserError: one is empty, or a token already, which would be another one then.
    """
    known = tokenizer.get_vocab()
    if isinstance(tokens, int):
        # Each takes the space before it, as the mask does: it stands for tokens that carry theirs.
        tokens = [AddedToken(sentinel(number), lstrip=True, special=True) for number in range(tokens)]
    for token in map(str, tokens):
        if not token or token in known:
            raise UserError(f'tokenizer.extra_tokens: "{token}" is {"a token already" if token else "no token"}.')
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokens]})
    return tokenizer


def encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: bool = False,
    located: bool = False,
    truncation: bool = False,
) -> Iterator[tuple[list[int], Any]]:
    """Yields the ids of each text and, where the tokenizer is a fast one, its `tokenizers.Encoding`.

    Args:
        special_tokens: True to add the tokenizer's special tokens, and to read one that a text spells out as the token.
        located: True if the encoding has to know where in the text each token lies.
        truncation: True to cut at the tokenizer's longest input.
    """
    if calls_rust_alone(tokenizer) and not truncation:
        # The call below does the same, and makes Python objects of masks, type ids and offsets for each token.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not special_tokens
        call = backend.encode_batch if located else backend.encode_batch_fast
        for encoding in call(texts, add_special_tokens=special_tokens):
            yield encoding.ids, encoding
    else:
        called = tokenizer(
            texts,
            add_special_tokens=special_tokens,
            split_special_tokens=not special_tokens,
            truncation=truncation,
            verbose=False,
        )
        yield from zip(called["input_ids"], called.encodings or [None] * len(texts), strict=True)


def calls_rust_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether calling a tokenizer only calls the Rust library; the tokenizers of a few models do more."""
    kind = type(tokenizer)
    return (
        tokenizer.is_fast
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that ends a text: the end-of-sequence token, or else the separator."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "the tokenizer has no end-of-text token to put between documents.\n"
        "Set preprocess.end_of_text=false to run documents together."
    )


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the tokens for text that a tokenizer can't spell, by their ids.

    The model of a fast tokenizer may have one that its wrapper in transformers does not name.
    """
    ids = {tokenizer.unk_token_id}
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        ids |= {model.get("unk_id"), tokenizer.backend_tokenizer.token_to_id(model.get("unk_token") or "")}
    return {token: tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None}


def content_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides a tokenizer's output; its name and path do not count."""
    if tokenizer.is_fast:
        # Padding and truncation are set by the last call made, not by the tokenizer.
        model = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        with TemporaryDirectory() as folder:
            files = sorted(Path(name) for name in tokenizer.save_vocabulary(folder))
            model = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    longest = [tokenizer.model_max_length, tokenizer.truncation_side]
    content = json.dumps([model, special, longest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def smallest_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the type in which the ids of a tokenizer are kept in files: 2 bytes where all of them fit, else 4."""
    return "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "int32"
