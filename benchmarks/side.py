"""One side of a comparison: a process that works when it is told to, and waits otherwise.

Orders come as lines of JSON on its standard input, replies go out on what was its standard
output; whatever else it prints goes to its log.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """The orders that this process gets from the comparison that started it, and its replies."""

    def __init__(self) -> None:
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.steps = 0  # of all turns so far
        self.dropouts: list[tuple[Any, float]] = []

    def ready(self) -> None:
        """Replies that everything is imported; memory that is taken from here on is the work's own."""
        import torch

        self.imported = memory("VmRSS")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.reply(threads=torch.get_num_threads(), device=device)

    def reply(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self.replies, flush=True)

    def order(self) -> dict[str, Any]:
        """Waits for the next order and returns it; the last one ends the process."""
        order = json.loads(sys.stdin.readline() or "null")
        if order is None:
            os._exit(1)  # the comparison is gone
        if "end" in order:
            self.reply(**peak(), imported=self.imported)
            os._exit(0)
        return order

    def start(self, model: Any, prepare: Callable[[int, int], None] = lambda first, count: None) -> None:
        """Waits for an order to train, and starts the clock.

        `prepare` makes the batches of the turn (the first one's number, how many) before it starts.
        """
        order = self.order()
        self.set_dropout(model, order["dropout"])
        self.left, self.losses = order["steps"], []
        prepare(self.steps, self.left)
        synchronize()
        self.began = time.perf_counter()

    def step(self, loss: Any) -> bool:
        """Counts a step; returns True if the turn is over, and another is to be waited for."""
        self.losses.append(loss)
        self.left -= 1
        self.steps += 1
        if self.left:
            return False
        synchronize()
        self.reply(seconds=time.perf_counter() - self.began, losses=[float(loss) for loss in self.losses])
        return True

    def set_dropout(self, model: Any, on: bool) -> None:
        """Turns dropout on or off: two sides draw different numbers, so their losses can agree only without it."""
        import torch

        if not self.dropouts:
            self.dropouts = [(m, m.p) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        for module, p in self.dropouts:
            module.p = p if on else 0.0


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> dict[str, Any]:
    """Returns the most memory held at once, in bytes: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated(), "of": "gpu"}
    # Not ru_maxrss: a child inherits its parent's.
    return {"peak": memory("VmHWM"), "of": "process"}


def memory(name: str) -> int:
    """Returns a number of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    verb, name, settings, folder = sys.argv[1:]
    importlib.import_module(f"benchmarks.{verb}").serve(name, json.loads(settings), folder, Turns())


if __name__ == "__main__":
    main()
