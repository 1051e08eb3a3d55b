"""`python -m lmlab.resume RUN_DIR [overrides]`: go on with a run, or run its experiment again."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lmlab.config import build, changes, compose, schema, trust
from lmlab.config.attempt import attempt
from lmlab.config.compose import config_of
from lmlab.config.rank import on_rank_zero
from lmlab.console import command
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, shown_plainly
from lmlab.io import from_here, rows
from lmlab.runs import lifecycle
from lmlab.runs.directory import RunDirectory
from lmlab.runs.manifest import environment, version_changes
from lmlab.secrets import redacted_command
from lmlab.train import train, train_rank

EXAMPLES = """\
  python -m lmlab.resume outputs/2026-01-31/12-00-00                           where it stopped
  python -m lmlab.resume outputs/2026-01-31/12-00-00 trainer.max_steps=2000    longer
  python -m lmlab.resume outputs/2026-01-31/12-00-00 trainer=ddp trainer.devices=2
  python -m lmlab.resume outputs/2026-01-31/12-00-00 --fresh                   again from the start, in a new directory
"""


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        "python -m lmlab.resume",
        description="Go on with a run where it stopped, or run its experiment again.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of a run")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes to how, or how far, it goes; trust=PACKAGE lets code run that is not lmlab's",
    )
    p.add_argument("--fresh", action="store_true", help="run it again from the start, and compare")
    p.add_argument("--into", type=Path, metavar="DIR", help="directory of the run that --fresh begins")
    p.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="folder with more options of the groups")
    return p


@on_rank_zero(others=train_rank)
def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        given = parser().parse_intermixed_args()
        run = RunDirectory(given.run.resolve())
        if not run.begun():
            raise UserError(f"{given.run} is no run: there is no manifest in it. Name a run's directory.")
        kept = config_of(run)
        trusted, overrides = trust.split(given.overrides, given.config_dir)
        if given.fresh:
            again(run, kept, given, overrides, trusted)
        elif given.into:
            raise UserError("--into is for --fresh: a run goes on in its own directory.")
        else:
            cfg = changes.apply_overrides(kept, run.path, overrides, given.config_dir)
            trust.check_trusted(cfg, trusted)
            compose.check_secrets(cfg)
            if run.finished():
                changes.check(cfg, kept, run)
                if not changes.lengthens(cfg, kept, run):
                    raise UserError(lifecycle.finished(run))
            attempt(train, cfg, overrides)


def again(
    run: RunDirectory, kept: DictConfig, given: argparse.Namespace, overrides: list[str], trusted: Sequence[str]
) -> None:
    """Run the experiment of a manifest in a new directory; say what differs, before and after."""
    place = (given.into or Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S}").resolve()
    if RunDirectory(place).begun():
        raise UserError(f"{place} holds a run or an evaluation already. Choose another directory: --into DIR")
    cfg = changes.apply_overrides(kept, place, overrides, given.config_dir)
    trust.check_trusted(cfg, trusted)
    compose.check_secrets(cfg)
    schema.check_run(cfg)
    then = run.read_manifest()
    words = command("python", "-m", "lmlab.resume", from_here(run.path), "--fresh")
    with changes.hint_at_locations(words, changes.location_overrides(cfg, kept)):
        data = build.prepare_data(cfg)
    prepared = data.identity
    differ = version_changes(then, environment())
    differ += [f"{name.replace('_', ' ')}: not what it was" for name in prepared if then.get(name) != prepared[name]]
    differ += [
        f"length: it was made another at step {a['step']}" for a in then.get("went_on", ()) if "length_before" in a
    ]
    if overrides:
        differ.append(f"config: {command(*redacted_command(overrides))}")
    for line in differ:
        print(f"differs from {from_here(run.path)}: {line}")
    if not differ:
        print(f"Code, versions, data and tokenizer are those of {from_here(run.path)}.")
    repeats = {"run_id": then["run_id"], "path": str(run.path), "differs": differ}
    attempt(train, cfg, overrides, repeats=repeats)
    print(compared(curve(run), curve(RunDirectory(place))))


def curve(run: RunDirectory) -> dict[tuple[int, str], float]:
    """The losses of a run, by step and name."""
    names = ("train/loss", "val/loss")
    return {(row["step"], name): row[name] for row in rows(run.metrics) for name in names if name in row}


def compared(then: dict[Any, float], now: dict[Any, float]) -> str:
    """How two loss curves agree, where both have a point."""
    both = sorted(then.keys() & now.keys())
    wrong = [at for at in both if then[at] != now[at]]
    if not both:
        return "The loss curves have no step in common."
    if not wrong:
        return f"The loss curve is the same, bit for bit: {len(both)} points, to step {both[-1][0]}."
    step, name = wrong[0]
    most = max(abs(now[at] / then[at] - 1) for at in wrong)
    return (
        f"The loss curves differ from step {step} on: {name} {now[wrong[0]]:.10g} here, {then[wrong[0]]:.10g} there; "
        f"by {most:.1e} at most (relative)."
    )


if __name__ == "__main__":
    main()
