"""Training steps of two objectives on models of one size, in turn: batch, forward and backward pass, optimizer.

  python -m benchmarks.objectives                          masked diffusion beside next-token prediction
  python -m benchmarks.objectives objective=mlm size=distil

Keys, with their defaults:

  objective=diffusion   clm, mlm, diffusion, hybrid, prefix, fim
  size=small            small, distil (benchmarks/train.py)
  batch_size=8
  rounds=6              of both objectives; the first is not counted
  steps=8               of each in a round

The ratio is that of the time of a step of clm over one of the objective; larger is faster.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.pairs import spread
from benchmarks.results import verb
from benchmarks.train import SEED, SIZES, make_model, make_tokenizer, vocabulary_of


@dataclass
class Settings(Arguments):
    objective: Literal["clm", "mlm", "diffusion", "hybrid", "prefix", "fim"] = "diffusion"
    size: Literal["small", "distil"] = "small"
    batch_size: int = 8
    rounds: int = 6
    steps: int = 8


def compare(settings: Settings) -> dict[str, Any]:
    sides = {name: stepper(name, settings) for name in (settings.objective, "clm")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings.rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            losses[name] += [step() for _ in range(settings.steps)]
            seconds[name].append((time.perf_counter() - began) / settings.steps)
    ours, theirs = (taken[1:] for taken in seconds.values())
    learns = all(np.mean(values[-settings.steps :]) < np.mean(values[: settings.steps]) for values in losses.values())
    return {
        "unit": "s",
        "sides": {name: statistics.median(taken[1:]) for name, taken in seconds.items()},
        "result": spread([b / a for a, b in zip(ours, theirs, strict=True)]) if learns else None,
        "void": None if learns else f"an objective does not learn: {losses}",
        "losses": losses,
        "seconds": seconds,
    }


def stepper(name: str, settings: Settings) -> Callable[[], float]:
    """Returns a function that makes one training step of an objective, and returns its loss."""
    import torch

    from lmlab.data.datamodule import collate
    from lmlab.data.sampler import draws
    from lmlab.models.efficiency import fuse_activations
    from lmlab.models.loss import logits_chunk_size, score
    from lmlab.objectives.clm import CausalLM
    from lmlab.objectives.diffusion import MaskedDiffusion
    from lmlab.objectives.fim import FillInTheMiddle
    from lmlab.objectives.hybrid import HybridLM
    from lmlab.objectives.mlm import MaskedLM
    from lmlab.objectives.prefix import PrefixLM

    causal, positions = name not in ("mlm", "diffusion"), SIZES[settings.size][3]
    tokenizer = make_tokenizer(vocabulary_of(settings.size, causal))
    objective: Any = {
        "clm": CausalLM,
        "mlm": lambda: MaskedLM(tokenizer),
        "diffusion": lambda: MaskedDiffusion(tokenizer),
        "hybrid": lambda: HybridLM(tokenizer, validation_causal_share=1.0),
        "prefix": lambda: PrefixLM(validation_prefix_share=0.0),
        "fim": lambda: FillInTheMiddle(tokenizer, sentinels=("w1", "w2", "w3")),
    }[name]()
    # Skewed, so that there is something to learn.
    drawn = np.random.default_rng(SEED).random((256, positions)) ** 3
    blocks = [*(4 + (len(tokenizer) - 4) * drawn).astype(np.int32)]
    torch.manual_seed(SEED)
    model = make_model(tokenizer, settings.size, causal, positions).train()
    fuse_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    rows, numbers = logits_chunk_size(model, None, False), count()

    def step() -> float:
        first = next(numbers) * settings.batch_size
        batch = collate(blocks, draws(SEED, first, settings.batch_size, len(blocks)), objective, SEED, 1)
        inputs = batch.input_ids, batch.attention_mask, batch.positions, batch.targets
        nll = score(model, *inputs, rows, weights=batch.weights, prefix=batch.prefix).nll
        loss = nll.sum() / batch.divisor
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    verb("objectives", __doc__, Settings, compare)
