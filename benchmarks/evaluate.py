"""Scoring of held-out text, against the forward pass of training; sliding windows, against blocks.

  python -m benchmarks.evaluate                            scoring in blocks over a plain forward in training mode
  python -m benchmarks.evaluate peer=blocks stride=16      sliding windows over blocks

Keys, with their defaults:

  peer=forward          forward: tokens/s of scoring over those of the forward pass with dropout and gradients on;
                        blocks: what sliding may cost, block/stride times the cost of blocks, over what it does
  stride=0              tokens between two windows, of peer=blocks; 0: half a block
  size=small            tiny, small, distil, gpt2
  precision=32-true     32-true, bf16-mixed
  batch_size=8          windows at once
  block_size=0          positions of a block; 0: by size
  blocks=256            of text
  pairs=5               turns of each side; one passes over the text once
  lmlab.KEY=VALUE       any override of `python -m lmlab.evaluate`, for lmlab
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import Arguments
from benchmarks.pairs import Side, agreement, outcome, take_turns, workplace
from benchmarks.results import verb
from benchmarks.side import Turns, synchronize
from benchmarks.train import TOLERANCE, Sized, load, make


@dataclass
class Settings(Sized, Arguments):
    peer: Literal["forward", "blocks"] = "forward"
    stride: int = 0
    size: Literal["tiny", "small", "distil", "gpt2"] = "small"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    batch_size: int = 8
    block_size: int = 0
    blocks: int = 256
    pairs: int = 5
    lmlab: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.stride or self.positions // 2


def compare(settings: Settings) -> dict[str, Any]:
    sliding = settings.peer == "blocks"
    names = ("sliding", "blocks") if sliding else ("blocks", "forward")
    with workplace() as folder:
        make(folder, settings.size, True, settings.positions, blocks=settings.blocks)
        with (
            Side("evaluate", names[0], settings, folder) as ours,
            Side("evaluate", names[1], settings, folder) as theirs,
        ):
            losses = {side.name: side.turn(dropout=False)["losses"] for side in (ours, theirs)}
            for side in (ours, theirs):
                side.turn(dropout=True)
            tokens = settings.blocks * settings.positions
            # Of sliding, the work is what it may cost.
            work = (tokens * settings.positions / settings.step if sliding else tokens, tokens)
            pairs = take_turns((ours, theirs), settings.pairs, work, dropout=True)
            memory = {side.name: side.end() for side in (ours, theirs)}
    if sliding:  # in windows that overlap tokens have other contexts, so other losses
        agreed: dict[str, Any] = {"void": None, "losses": losses, "agreement": None}
    else:
        agreed = agreement(losses, TOLERANCE[settings.precision])
    return outcome(pairs, agreed, memory) | ours.facts


# --- the sides, each in a process of its own


def serve(name: str, values: dict[str, Any], folder: str, turns: Turns) -> None:
    settings = Settings(**values)
    if name == "forward":
        forward_side(settings, Path(folder), turns)
    else:
        scoring_side(settings, Path(folder), turns, name)


def scoring_side(settings: Settings, folder: Path, turns: Turns, context: str) -> None:
    """Runs `python -m lmlab.evaluate` as it is, but that it passes over the text once per turn."""
    import lightning as L
    import torch

    import lmlab.evaluation.scoring  # noqa: F401 (as an evaluation does)
    from lmlab.evaluate import main

    turns.ready()
    validate = L.Trainer.validate

    def again_and_again(trainer: L.Trainer, scorer: Any, data: Any, **options: Any) -> None:
        def once() -> float:
            validate(trainer, scorer, data, **options)
            nll, units = scorer.result
            return float(nll[:, 0].sum() / units[:, 0].sum())

        in_turns(turns, once)

    L.Trainer.validate = again_and_again  # type: ignore[method-assign]
    sys.argv = [
        "lmlab.evaluate",
        f"model={folder}/model",
        f"tokenizer.name={folder}/tokenizer",
        "data=files",
        f"data.validation={folder}/train.txt",
        "data.document=line",
        f"preprocess.block_size={settings.positions}",
        "preprocess.end_of_text=false",
        f"batch_size={settings.batch_size}",
        f"trainer={'gpu' if torch.cuda.is_available() else 'cpu'}",
        f"trainer.precision={settings.precision}",
        f"context={context}",
        *([f"stride={settings.step}"] if context == "sliding" else []),
        f"hydra.run.dir={folder}/{context}",
        *settings.lmlab,
    ]
    main()


def forward_side(settings: Settings, folder: Path, turns: Turns) -> None:
    """Runs the forward half of a plain training loop, over the same text."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoTokenizer

    turns.ready()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder, causal=True).to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    lines = (folder / "train.txt").read_text().splitlines()
    batches = torch.tensor(tokenizer(lines)["input_ids"]).split(settings.batch_size)
    half = torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16-mixed")

    def once() -> float:
        nll, targets = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            ids = batch.to(device)
            with half:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            nll += loss.detach().cpu()
            targets += ids[:, 1:].numel()
        return float(nll / targets)

    in_turns(turns, once, model)


def in_turns(turns: Turns, once: Callable[[], float], model: Any = None) -> None:
    """Passes over the text at each order, and replies how long it took and the mean nll."""
    while True:
        order = turns.order()
        if model is not None:
            turns.set_dropout(model, order["dropout"])
        synchronize()
        began = time.perf_counter()
        nll = once()
        synchronize()
        turns.reply(seconds=time.perf_counter() - began, losses=[nll])


if __name__ == "__main__":
    from lmlab.config.explain import known_keys

    verb("evaluate", __doc__, Settings, compare, lmlab_keys=lambda: known_keys("evaluate"))
