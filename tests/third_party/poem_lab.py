"""An objective, a model and a source of somebody who uses lmlab and changes nothing in it."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from lmlab.data.sources import Corpus, fingerprint
from lmlab.objectives import Example


class Kept:
    """Next-token prediction of a random share of the tokens, of which later ones weigh more."""

    metric = "kept_ppl"
    auto_class = "AutoModelForCausalLM"
    bidirectional = False
    target_shift = 1

    def __init__(self, keep: float = 0.5):
        self.keep = keep

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> Example:
        seed, epoch, sample = key
        stream = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 2, sample])
        positions = np.flatnonzero(np.random.Generator(stream).random(len(ids) - 1) < self.keep)
        return Example(ids, positions, ids[positions + 1], (positions + 1) / len(ids), len(ids))

    def sample(self, model: Any, tokenizer: Any, ids: list[int]) -> tuple[str, str]:
        text = tokenizer.decode(ids[:8])
        best = int(model(torch.tensor([ids[:8]])).logits[0, -1].argmax())
        return text, text + tokenizer.decode([best])


class Lopsided(Kept):
    """A weight for each token, where only some are targets."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> Example:
        return super().__call__(ids, key)._replace(weights=np.ones(len(ids)))


class LopsidedInTraining(Lopsided):
    """The same, where held-out text is scored by an objective that is right."""

    held_out = Kept


class Longer(Kept):
    """Inputs of one token more than the text."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> Example:
        return super().__call__(ids, key)._replace(inputs=np.append(ids, 0))


class Lists(Kept):
    """Lists, where arrays are to be."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> Any:
        return ids, list(range(len(ids) - 1)), list(ids[1:])


class LSTM(nn.Module):
    """An LSTM language model."""

    def __init__(self, tokenizer: Any, width: int = 16):
        super().__init__()
        self.embed = nn.Embedding(len(tokenizer), width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, len(tokenizer))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(input_ids))[0])
        return logits


def load_poems(file: str, text: str = "poem") -> Corpus:
    """One poem per line."""
    with open(file, encoding="utf-8") as lines:
        poems = [{"poem": line} for line in lines]
    return Corpus(Dataset.from_list(poems), None, text, fingerprint("poems", poems))
