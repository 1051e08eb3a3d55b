"""`python -m lmlab.sweep status|resume DIR`: what ran of a sweep, what failed and why; and the rest of it."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, shown_plainly
from lmlab.runs import status
from lmlab.secrets import override_key, redacted_keys_of_command
from lmlab.sweeps.outcome import show
from lmlab.sweeps.points import SWEEP_FILE, Point, read_points, read_sweep

EXAMPLES = """\
  python -m lmlab.sweep status multirun/2026-01-31/12-00-00
  python -m lmlab.sweep resume multirun/2026-01-31/12-00-00
  python -m lmlab.sweep resume multirun/2026-01-31/12-00-00 hydra/launcher=slurm      on a cluster
  python -m lmlab.sweep resume multirun/2026-01-31/12-00-00 hydra.sweeper.n_trials=50 a longer search
"""


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        "python -m lmlab.sweep",
        description="Show where a sweep stands, or run what has not come to its end.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("what", choices=("status", "resume"))
    p.add_argument("folder", type=Path, metavar="DIR", help="directory of a sweep")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of resume: changes to how, or how far, runs go")
    return p


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        given = parser().parse_intermixed_args()
        folder = given.folder.resolve()
        points = read_points(folder)
        if not read_sweep(folder):
            raise UserError(f"{given.folder} holds no sweep (no {SWEEP_FILE}). Name the directory of one: multirun/…")
        if given.what == "status":
            if given.overrides:
                raise UserError(f"{given.overrides[0]}: status takes a directory alone.")
            show(points)
        else:
            resume(folder, given.overrides)


def resume(folder: Path, overrides: list[str]) -> None:
    """Give the command of a sweep again, where it was given, with overrides added."""
    facts, points = read_sweep(folder), read_points(folder)
    names = {override_key(word) for word in overrides} | {"hydra.sweep.dir"}
    # Another launcher has keys of its own.
    gone = ("hydra.launcher.",) if "hydra/launcher" in names else ()
    words = [word for word in facts["arguments"] if not word.startswith(gone)]
    kept = [word for word in words if override_key(word) not in names]
    lost = redacted_keys_of_command(kept)
    if lost and not overrides and complete(facts, points):
        show(points)
        given = " ".join(f"{key}=…" for key in lost)
        print(f"All have come to their end. To go on nevertheless, give the secrets again, which are not kept: {given}")
        return
    # Another value of a key that was added is added too.
    before = {override_key(word): word[: word.index(override_key(word))] for word in words}
    overrides = [before.get(word.partition("=")[0], "") + word for word in overrides]
    if Path(facts.get("directory", "")).is_dir():
        os.chdir(facts["directory"])  # relative paths in it are of there
    from lmlab import train

    sys.argv[1:] = [*kept, *overrides, f"hydra.sweep.dir={json.dumps(str(folder))}"]
    train.main()


def complete(facts: Mapping[str, Any], points: Sequence[Point]) -> bool:
    """Whether all points of a sweep have come to their end, as far as can be told without its secrets."""
    from lmlab.config.compose import read_config

    if facts.get("kind") != "grid" and len(points) < facts.get("trials", math.inf):
        return False
    if not points or any(status.read_status(point.run).name not in status.ENDED for point in points):
        return False
    # A command that makes them longer may have been interrupted before it came to all.
    last = dict(word.lstrip("+").split("=", 1) for word in facts["shared"])
    configs = [read_config(point.run.path).trainer for point in points]
    names = ("max_steps", "max_epochs")
    return all(str(cfg[name]) == last.get(f"trainer.{name}", str(cfg[name])) for cfg in configs for name in names)


if __name__ == "__main__":
    main()
