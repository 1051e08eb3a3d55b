"""The models that answer the requests of lm-evaluation-harness, which has none of its own for masked ones.

A causal model is the harness's `HFLM`, so that its answers are those of `lm_eval --model hf`. For a masked model the
log-likelihood of an answer is its pseudo-log-likelihood (Salazar et al. 2020), or a bound of it, given the question.
Each rank of a trainer answers its share of the requests.

Shapes: B rows of a batch, T positions, N hidden tokens of the batch.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.data.datamodule import padded
from lmlab.data.documents import continued, numbered
from lmlab.errors import UserError
from lmlab.evaluation.suites.ranks import shared_out
from lmlab.evaluation.windows import special_ids
from lmlab.models import generation
from lmlab.models.checks import max_positions
from lmlab.models.loss import score

LONGEST = 2048
"""The positions of a model that does not say how many it has, as the harness takes them."""


class CausalRequests(HFLM):  # type: ignore[misc]
    """The harness's model, whose requests are shared out over the ranks."""

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        answer = super()._loglikelihood_tokens
        return shared_out(requests, lambda some: answer(some, disable_tqdm, override_bs) if some else [])

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        answer = super().generate_until
        return shared_out(requests, lambda some: answer(some, disable_tqdm) if some else [])


class Answer(NamedTuple):
    """An answer to score, after its question."""

    question: list[int]
    answer: list[int]
    continues: np.ndarray
    """[tokens of the answer] bool: whether each continues the word of the token before it."""


class Hidden(NamedTuple):
    """A row of a batch: an answer with tokens of it hidden."""

    answer: int
    """The number of the answer."""
    inputs: np.ndarray
    """[T] ids."""
    positions: np.ndarray
    """[n] the positions of the tokens that are scored."""
    targets: np.ndarray
    """[n] these tokens."""
    factor: float
    """The factor of their nll."""


@register_model("lmlab-masked")
class MaskedRequests(TemplateLM):  # type: ignore[misc]
    """A masked model in the harness, which can be given by its name there too: `lm_eval.simple_evaluate("lmlab-masked",
    model_args={"pretrained": DIRECTORY}, …)` once this module is imported."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        score: str = "pseudo",
        within_word: bool = True,
        draws: int = 16,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Takes a model.

        Args:
            pretrained: the model, or its directory or hub id.
            tokenizer: that of a model.
            batch_size: the rows of a batch, each with one hidden token, or several under a bound.
            score: pseudo, or elbo for a bound: random tokens of the answer are hidden, `draws` times.
            within_word: hide the rest of a token's word with it (Kauf and Ivanova 2023), of pseudo.
            seed: of the random masks.
            max_batch_size: not used; the harness hands it to all its models.
            device: of a model that is loaded here.
        """
        super().__init__()
        if isinstance(pretrained, str):
            pretrained, tokenizer = generation.load(pretrained)
            pretrained.to(device or "cpu")
        assert tokenizer is not None
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token, so that no token of an answer can be hidden.")
        self.model, self.tokenizer, self.rows_at_once = pretrained, tokenizer, batch_size
        self.score, self.within_word, self.draws, self.seed = score, within_word, draws, seed
        head, tail = special_ids(tokenizer, "cls", "bos", "eos"), special_ids(tokenizer, "sep", "eos")
        self.head, self.tail = head[:1], tail[:1]
        self.room = (max_positions(pretrained) or LONGEST) - len(self.head) - len(self.tail)

    @property
    def eot_token_id(self) -> int:
        return int(self.tail[0])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        return ids

    def continues(self, text: str, count: int) -> np.ndarray:
        """Returns which of the last `count` tokens of a text continue the word of the token before them."""
        if not self.within_word or not self.tokenizer.is_fast:
            return np.zeros(count, bool)
        words = self.tokenizer(text, add_special_tokens=False, verbose=False).word_ids()
        return continued(numbered(words))[len(words) - count :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each answer, and whether each of its tokens is the most probable one."""
        answers = []
        for question, answer in (request.args for request in requests):
            text = question.rstrip()  # spaces before an answer belong to it, as the harness has it
            before, answer = (self.tok_encode(text), question[len(text) :] + answer)
            whole = self.tok_encode(text + answer)
            tokens = whole[len(before) :][-self.room :]
            kept = before[max(0, len(before) - self.room + len(tokens)) :]
            answers.append(Answer(kept, tokens, self.continues(text + answer, len(tokens))))
        return shared_out(answers, self.answer)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, of which the model sees a part at once that it has room for."""
        parts, texts = list[Answer](), list[int]()
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            continues = self.continues(text, len(ids))
            for start in range(0, len(ids), self.room):
                part = slice(start, start + self.room)
                parts.append(Answer([], ids[part], continues[part]))
                texts.append(number)
        found = np.zeros(len(requests))
        np.add.at(found, texts, [nll for nll, _ in shared_out(parts, self.answer)])
        return found.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise UserError("a masked model scores answers that are given, and does not write any.")

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood needs the texts, to see where words end")

    @torch.no_grad()
    def answer(self, answers: Sequence[Answer]) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each answer, and whether all its hidden tokens are the most probable ones."""
        make = self.pseudo_rows if self.score == "pseudo" else self.bound_rows
        rows = [row for number, answer in enumerate(answers) for row in make(number, answer)]
        rows.sort(key=lambda row: -len(row.inputs))
        nll, hits = np.zeros(len(answers)), np.ones(len(answers), bool)
        for first in range(0, len(rows), self.rows_at_once):
            batch = rows[first : first + self.rows_at_once]
            of_rows, right = self.score_rows(batch)
            numbers = np.repeat([row.answer for row in batch], [len(row.targets) for row in batch])
            np.add.at(nll, numbers, of_rows)
            np.logical_and.at(hits, numbers, right)
        return [(-float(value), bool(right)) for value, right in zip(nll, hits, strict=True)]

    def pseudo_rows(self, number: int, answer: Answer) -> list[Hidden]:
        """Returns a row for each token of an answer, in which it is hidden."""
        rows, first = [], len(self.head) + len(answer.question)
        for i in range(len(answer.answer)):
            last = i + 1
            while last < len(answer.answer) and answer.continues[last]:
                last += 1
            rows.append(self.hide(number, answer, [*range(first + i, first + last)], [first + i], 1.0))
        return rows

    def bound_rows(self, number: int, answer: Answer) -> list[Hidden]:
        """Returns rows in which random tokens of an answer are hidden, whose nll is a bound in the mean.

        The number of hidden tokens is uniform, and each of them stands for all (Uria et al. 2014; Nie et al. 2025,
        equation 6). The masks are a function of the seed and of the tokens.
        """
        count, first = len(answer.answer), len(self.head) + len(answer.question)
        random = np.random.default_rng([self.seed, *answer.question, *answer.answer])
        rows = []
        for draw in range(self.draws if count else 0):
            hidden = 1 + int((draw + random.random()) * count / self.draws)  # spread evenly over the draws
            chosen = (first + np.sort(random.permutation(count)[:hidden])).tolist()
            rows.append(self.hide(number, answer, chosen, chosen, count / hidden / self.draws))
        return rows

    def hide(self, number: int, answer: Answer, hidden: list[int], scored: list[int], factor: float) -> Hidden:
        """Returns the row of an answer with the tokens at some positions hidden, of which some are scored."""
        ids = np.array([*self.head, *answer.question, *answer.answer, *self.tail])
        targets = ids[scored]
        ids[hidden] = self.tokenizer.mask_token_id
        return Hidden(number, ids, np.array(scored), targets, factor)

    def score_rows(self, rows: Sequence[Hidden]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the nll of the scored tokens of rows, times the factors, [N] float64; and which are the most probable
        ones."""
        pad_ids = (self.tokenizer.pad_token_id, *self.tail, 0)
        ids, mask = padded([row.inputs for row in rows], next(token for token in pad_ids if token is not None))
        positions = np.concatenate([i * ids.shape[1] + row.positions for i, row in enumerate(rows)])
        device, best = self.model.device, list[torch.Tensor]()
        targets = torch.from_numpy(np.concatenate([row.targets for row in rows])).to(device)
        nll = score(
            self.model,
            torch.from_numpy(ids).to(device),
            None if mask.all() else torch.from_numpy(mask).to(device),
            torch.from_numpy(positions).to(device),
            targets,
            observe=lambda _, logits: best.append(logits.argmax(1)),
        ).nll
        factors = np.repeat([row.factor for row in rows], [len(row.targets) for row in rows])
        return nll.double().cpu().numpy() * factors, (torch.cat(best) == targets).cpu().numpy()


def causal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, settings: Mapping[str, Any]
) -> CausalRequests:
    """Returns a causal model as the harness takes it; it may add a padding token to a copy of the tokenizer."""
    longest = max_positions(model) or LONGEST
    return CausalRequests(
        model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=longest
    )


def masked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, settings: Mapping[str, Any]
) -> MaskedRequests:
    """Returns a masked model as the harness takes it."""
    choices = {name: settings[name] for name in ("score", "within_word", "draws", "seed")}
    return MaskedRequests(model, tokenizer, batch_size, **choices)
