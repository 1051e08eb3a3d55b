"""Training steps of two objectives on models of one size, in turn: batch, forward and backward pass, optimizer.

  python -m benchmarks.objectives                          masked diffusion beside next-token prediction
  python -m benchmarks.objectives objective=mlm size=distil
  python -m benchmarks.objectives objective=electra        beside a generator and a discriminator, each trained alone
  python -m benchmarks.objectives objective=mlm documents=40    without document attention, and with it

Keys, with their defaults:

  objective=diffusion   clm, mlm, diffusion, hybrid, prefix, fim, electra
  size=small            small, distil (benchmarks/train.py)
  batch_size=8
  rounds=6              of both objectives; the first is not counted
  steps=8               of each in a round
  documents=0           mean length of the documents of preprocess.document_attention; 0: without it

The ratio is that of the time of a step of clm, or of both steps of ELECTRA's models alone, or of the same objective
without document attention, over one of the objective; larger is faster.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.pairs import spread
from benchmarks.results import verb
from benchmarks.train import SEED, SIZES, make_model, make_tokenizer, vocabulary_of


@dataclass
class Settings(Arguments):
    objective: Literal["clm", "mlm", "diffusion", "hybrid", "prefix", "fim", "electra"] = "diffusion"
    size: Literal["small", "distil"] = "small"
    batch_size: int = 8
    rounds: int = 6
    steps: int = 8
    documents: int = 0


def compare(settings: Settings) -> dict[str, Any]:
    name = settings.objective
    sides = {
        f"{name}, documents apart" if settings.documents else name: stepper(name, settings, settings.documents > 0)
    }
    if settings.documents:
        sides[name] = stepper(name, settings)
    elif name == "electra":
        alone = [stepper(half, settings) for half in ("generator", "discriminator")]
        sides["its models alone"] = lambda: sum(step() for step in alone)
    else:
        sides["clm"] = stepper("clm", settings)
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


def stepper(name: str, settings: Settings, apart: bool = False) -> Callable[[], float]:
    """Returns a function that makes one training step of an objective, and returns its loss.

    Args:
        apart: True for documents that do not see one another.
    """
    import torch

    from lmlab.data.blocks import Blocks
    from lmlab.data.datamodule import collate
    from lmlab.data.preprocess import Slices
    from lmlab.data.sampler import draws
    from lmlab.data.tokens import DocumentEdges, FlatFile, FlatFiles
    from lmlab.models.chunked_loss import logits_chunk_size
    from lmlab.models.efficiency import fuse_activations
    from lmlab.models.loading import from_scratch
    from lmlab.models.loss import score
    from lmlab.objectives.clm import CausalLM
    from lmlab.objectives.diffusion import MaskedDiffusion
    from lmlab.objectives.electra import ReplacedTokenDetection
    from lmlab.objectives.fim import FillInTheMiddle
    from lmlab.objectives.hybrid import HybridLM
    from lmlab.objectives.mlm import MaskedLM
    from lmlab.objectives.prefix import PrefixLM

    detects = name in ("electra", "generator", "discriminator")
    causal, positions = not detects and name not in ("mlm", "diffusion"), SIZES[settings.size][3]
    tokenizer = make_tokenizer(vocabulary_of(settings.size, causal))
    made = {
        "clm": CausalLM,
        "mlm": lambda: MaskedLM(tokenizer),
        "diffusion": lambda: MaskedDiffusion(tokenizer),
        "hybrid": lambda: HybridLM(tokenizer, validation_causal_share=1.0),
        "prefix": lambda: PrefixLM(validation_prefix_share=0.0),
        "fim": lambda: FillInTheMiddle(tokenizer, sentinels=("w1", "w2", "w3")),
    }
    objective: Any = ReplacedTokenDetection(tokenizer) if detects else made[name]()
    # Skewed, so that there is something to learn.
    random = np.random.default_rng(SEED)
    ids = (4 + (len(tokenizer) - 4) * random.random(256 * positions) ** 3).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:  # whose files stay mapped
        ids.tofile(Path(folder) / "tokens")
        lengths = 1 + random.geometric(1 / max(2, settings.documents), len(ids))  # more than there are tokens
        lengths.astype(np.int64).tofile(Path(folder) / "lengths")
        edges = DocumentEdges(FlatFiles(FlatFile(Path(folder) / "lengths", "int64"))) if apart else None
        blocks = Blocks(FlatFiles(FlatFile(Path(folder) / "tokens")), Slices(len(ids), positions), document_edges=edges)
    torch.manual_seed(SEED)
    if detects:
        layers, width, heads, *_ = SIZES[settings.size]
        config = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        config |= {"embedding_size": width, "intermediate_size": 4 * width}
        smaller = {"hidden_size": width // 2, "num_attention_heads": heads // 2, "intermediate_size": 2 * width}
        pair: Any = from_scratch(tokenizer, objective.auto_class, "electra", config, smaller)
        model = pair if name == "electra" else getattr(pair, name)
    else:
        model = make_model(tokenizer, settings.size, causal, positions)
    model.train()
    fuse_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    rows = None if name == "discriminator" else logits_chunk_size(model, None, False)
    numbers = count()

    def loss_of(batch: Any) -> torch.Tensor:
        inputs = batch.input_ids, batch.attention_mask
        if name == "electra":
            scores = objective.losses(model, batch, rows)
            return scores.loss.sum() / batch.divisor + scores.auxiliary
        if name == "discriminator":  # half of the hidden tokens are other ones, whatever they are
            labels = torch.zeros(len(batch.positions)).index_fill(0, batch.hidden[::2], 1.0)
            logits = model(*inputs).logits.flatten()[batch.positions]
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        if name == "generator":
            chosen = batch.positions[batch.hidden], batch.targets[batch.hidden]
            return score(model, *inputs, *chosen, rows).nll.sum() / len(batch.hidden)
        scored = batch.positions, batch.targets, rows
        masks = {"prefix": batch.prefix, "document_positions": batch.document_positions}
        return score(model, *inputs, *scored, weights=batch.weights, **masks).nll.sum() / batch.divisor

    def step() -> float:
        first = next(numbers) * settings.batch_size
        batch = collate(blocks, draws(SEED, first, settings.batch_size, len(blocks)), objective, SEED, 1)
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    verb("objectives", __doc__, Settings, compare)
