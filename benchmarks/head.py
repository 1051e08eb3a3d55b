"""Head and loss, forward and backward, with the logits held in several ways, one after the other.

  python -m benchmarks.head                  all targets of 8 × 128 tokens, 50,257 tokens in the vocabulary
  python -m benchmarks.head rows=154         those of a masked batch

Keys, with their defaults:

  rows=1016             scored positions
  width=768             of a hidden state
  vocabulary=50257
  rounds=5              of all forms; the first is not counted

The ratio is that of lmlab's choice over holding all logits at once; larger is faster. Seconds of every
form are in the JSON and in the table below it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.arguments import Arguments
from benchmarks.pairs import spread
from benchmarks.results import verb
from lmlab.console import show_rows

CHUNKS = (64, 128, 256, 512)


@dataclass
class Settings(Arguments):
    rows: int = 1016
    width: int = 768
    vocabulary: int = 50257
    rounds: int = 5


def compare(settings: Settings) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from lmlab.models.chunked_loss import ChunkedNLL, chunk_of

    torch.manual_seed(0)
    hidden = torch.randn(settings.rows, settings.width, requires_grad=True)
    weight = (0.02 * torch.randn(settings.vocabulary, settings.width)).requires_grad_()
    targets = torch.randint(settings.vocabulary, (settings.rows,))

    def chunked(rows: int) -> Callable[[], Any]:
        return lambda: ChunkedNLL.apply(hidden, weight, None, targets, rows, True).sum()

    def by_torch(rows: int) -> Callable[[], Any]:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return lambda: F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)

    chosen = chunk_of(weight, on_gpu=False)
    forms = {
        "all at once": lambda: F.cross_entropy(F.linear(hidden, weight), targets, reduction="none").sum(),
        f"lmlab, {chosen} rows (its choice)": chunked(chosen),
        **{f"lmlab, {rows} rows": chunked(rows) for rows in CHUNKS},
        **{f"F.linear_cross_entropy, {rows} rows": by_torch(rows) for rows in (256, 512)},
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    losses = {}
    for _ in range(settings.rounds):
        for name, loss in forms.items():
            hidden.grad = weight.grad = None
            began = time.perf_counter()
            total = loss()
            total.backward()
            seconds[name].append(time.perf_counter() - began)
            losses[name] = float(total.detach())
    counted = {name: taken[1:] for name, taken in seconds.items()}
    medians = {name: statistics.median(taken) for name, taken in counted.items()}
    show_rows("Head and loss", ("", "seconds"), [(name, f"{median:.2f}") for name, median in medians.items()])
    whole, ours = list(counted.values())[:2]
    agree = max(losses.values()) - min(losses.values()) <= 1e-5 * max(losses.values())
    return {
        "unit": "s",
        "sides": dict(zip(("lmlab", "all at once"), (statistics.median(ours), statistics.median(whole)), strict=True)),
        "result": spread([a / b for a, b in zip(whole, ours, strict=True)]) if agree else None,
        "void": None if agree else f"the losses differ: {losses}",
        "losses": losses,
        "seconds": seconds,
        "medians": medians,
    }


if __name__ == "__main__":
    verb("head", __doc__, Settings, compare)
