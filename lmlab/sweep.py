"""`python -m lmlab.sweep status|resume DIR`: show the runs of a sweep and why some failed, or run the rest of it."""

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
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import override_key, redacted_keys_of_command
from lmlab.sweeps.outcome import resume_command, show
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
    p.add_argument("action", choices=("status", "resume"))
    p.add_argument("folder", type=Path, metavar="DIR", help="directory of a sweep")
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="with resume: changes to how, or how far, the runs go"
    )
    return p


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        given = parser().parse_intermixed_args()
        folder = given.folder.resolve()
        points = read_points(folder)
        if not read_sweep(folder):
            raise UserError(f"{given.folder} holds no sweep (no {SWEEP_FILE}). Name the directory of one: multirun/…")
        if given.action == "status":
            if given.overrides:
                raise UserError(f"{given.overrides[0]}: status takes a directory alone.")
            statuses = show(points)
            # A sweep that is going on comes to the others by itself.
            if not RunDirectory(folder).held() and any(s.name not in (*status.ENDED, "running") for s in statuses):
                print(f"To run what has not come to its end: {resume_command(folder)}")
        else:
            resume(folder, given.overrides)


def resume(folder: Path, overrides: list[str]) -> None:
    """Runs the command of a sweep again in its working directory, with overrides added.

    Points that have finished are left as they are; of a search, so many more trials are run as the command asks for.
    """
    content, points = read_sweep(folder), read_points(folder)
    given = {override_key(word) for word in overrides} | {"hydra.sweep.dir"}
    # Another launcher has keys of its own.
    dropped = ("hydra.launcher.",) if "hydra/launcher" in given else ()
    arguments = [word for word in content["arguments"] if not word.startswith(dropped)]
    arguments = [word for word in arguments if override_key(word) not in given]
    lost = redacted_keys_of_command(arguments)
    if lost and not overrides and is_complete(content, points):
        show(points)
        again = " ".join(f"{key}=…" for key in lost)
        print(f"All runs have ended. To go on nevertheless, give the secrets again, which are not kept: {again}")
        return
    # A key that the command added, with a + before it, is added again with another value.
    signs = {override_key(word): word[: word.index(override_key(word))] for word in content["arguments"]}
    overrides = [signs.get(word.partition("=")[0], "") + word for word in overrides]
    if Path(content.get("directory", "")).is_dir():
        os.chdir(content["directory"])  # relative paths in the command are relative to it
    from lmlab import train

    sys.argv[1:] = [*arguments, *overrides, f"hydra.sweep.dir={json.dumps(str(folder))}"]
    train.main()


def is_complete(content: Mapping[str, Any], points: Sequence[Point]) -> bool:
    """Returns whether all points of a sweep have ended, as far as can be told without its secrets.

    Args:
        content: of the file of the sweep.
    """
    from lmlab.config.compose import read_config

    if content.get("kind") != "grid" and len(points) < content.get("trials", math.inf):
        return False
    if not points or any(status.read_status(point.run).name not in status.ENDED for point in points):
        return False
    # A command that makes the runs longer may have been interrupted before it came to all of them.
    last = dict(word.lstrip("+").split("=", 1) for word in content["shared"])
    trainers = [read_config(point.run.path).trainer for point in points]
    lengths = ("max_steps", "max_epochs")
    return all(str(cfg[name]) == last.get(f"trainer.{name}", str(cfg[name])) for cfg in trainers for name in lengths)


if __name__ == "__main__":
    main()
