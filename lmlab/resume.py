"""`python -m lmlab.resume RUN_DIR [overrides]`: go on with a run, or run its experiment again."""

import argparse
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, changes, compose, cooldown, schema, trust
from lmlab.config.attempt import attempt
from lmlab.config.budget import STEPS
from lmlab.config.rank import on_rank_zero
from lmlab.console import command
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, shown_plainly
from lmlab.io import from_here, rows
from lmlab.runs.directory import RunDirectory
from lmlab.runs.manifest import environment, version_changes
from lmlab.secrets import redacted_command
from lmlab.sweeps.outcome import resume_command
from lmlab.sweeps.points import SWEEP_FILE
from lmlab.train import train, train_rank

EXAMPLES = """\
  python -m lmlab.resume outputs/2026-01-31/12-00-00                           where it stopped
  python -m lmlab.resume outputs/2026-01-31/12-00-00 trainer.max_steps=2000    longer
  python -m lmlab.resume outputs/2026-01-31/12-00-00 trainer=ddp trainer.devices=2
  python -m lmlab.resume outputs/2026-01-31/12-00-00 --fresh                   again from the start, in a new directory
  python -m lmlab.resume outputs/2026-01-31/12-00-00 --cooldown 500            with a decaying rate, in a new directory
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
    p.add_argument(
        "--cooldown",
        type=int,
        metavar="STEPS",
        help="go on in a new directory, for so many steps over which the learning rate decays",
    )
    p.add_argument("--step", type=int, metavar="N", help="the step that --cooldown goes on from (the last checkpoint)")
    p.add_argument("--into", type=Path, metavar="DIR", help="directory of the run that --fresh or --cooldown begins")
    p.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="folder with more options of the groups")
    return p


@on_rank_zero(others=train_rank)
def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        given = parser().parse_intermixed_args()
        run = RunDirectory(given.run.resolve())
        if (run.path / SWEEP_FILE).is_file():
            raise UserError(f"{given.run} is a sweep. To go on with it: {resume_command(run.path)}")
        if not run.begun():
            raise UserError(f"{given.run} is no run: there is no manifest in it. Name a run's directory.")
        check_options(given)
        begins = given.fresh or given.cooldown is not None
        directory = run.path
        if begins:
            directory = (given.into or Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S}").resolve()
            if RunDirectory(directory).begun():
                raise UserError(f"{directory} holds a run or an evaluation already. Choose another: --into DIR")
        previous = compose.config_of(run)
        trusted, overrides = trust.split(given.overrides, given.config_dir)
        cfg = changes.apply_overrides(previous, directory, overrides, given.config_dir)
        trust.check_trusted(cfg, trusted)
        compose.check_secrets(cfg)
        named = any(word.lstrip("+").startswith("logger.push=") for word in overrides)
        if begins and OmegaConf.select(cfg, "logger.push") and not named:
            cfg.logger.push = None  # whose repository holds the other run
        if given.fresh:
            repeat(run, cfg, previous, overrides)
            return
        if given.cooldown is not None:
            cfg = cooldown.begin(run, previous, cfg, given.cooldown, given.step, overrides)
            print(f"The cooldown of {given.run} is in {from_here(Path(cfg.run_dir))}.")
        attempt(train, cfg, overrides)


def check_options(given: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if given.fresh and given.cooldown is not None:
        raise UserError("--fresh begins again, and --cooldown goes on: leave one of them out.")
    if given.into and not given.fresh and given.cooldown is None:
        raise UserError("--into is for --fresh and --cooldown: a run goes on in its own directory.")
    if given.step is not None and given.cooldown is None:
        raise UserError("--step is for --cooldown: a run goes on from its last checkpoint.")
    if given.cooldown is not None and given.cooldown < 1:
        raise UserError(f"--cooldown {given.cooldown}: it has to be a number of steps, 1 or more.")


def repeat(run: RunDirectory, cfg: DictConfig, previous: DictConfig, overrides: list[str]) -> None:
    """Runs an experiment again in the directory of `cfg`; prints what differs from `run` before, and in the end."""
    schema.check_run(cfg)
    manifest, path = run.read_manifest(), from_here(run.path)
    again = command("python", "-m", "lmlab.resume", path, "--fresh")
    with changes.hint_at_locations(again, changes.location_overrides(cfg, previous)):
        identity = build.prepare_data(cfg).identity
    differences = version_changes(manifest, environment())
    differences += [
        f"{key.replace('_', ' ')}: changed" for key, value in identity.items() if manifest.get(key) != value
    ]
    lengthened = [one["step"] for one in manifest.get("went_on", ()) if "length_before" in one]
    differences += [f"length: changed at step {step}" for step in lengthened]
    if overrides:
        differences.append(f"config: {command(*redacted_command(overrides))}")
    for line in differences:
        print(f"differs from {path}: {line}")
    if not differences:
        print(f"Code, versions, data and tokenizer are those of {path}.")
    repeats = {"run_id": manifest["run_id"], "path": str(run.path), "differs": differences}
    # As many steps as before, where the same hours are asked for, so that the curves can be compared.
    same_hours = STEPS in manifest and cfg.budget.hours == previous.budget.hours
    hours = {STEPS: manifest[STEPS]} if same_hours else {}
    attempt(train, cfg, overrides, repeats=repeats, **hours)
    print(compare_curves(loss_curve(run), loss_curve(RunDirectory(cfg.run_dir))))


def loss_curve(run: RunDirectory) -> dict[tuple[int, str], float]:
    """Returns the training and validation losses of a run by step and name."""
    names = ("train/loss", "val/loss")
    return {(row["step"], name): row[name] for row in rows(run.metrics) for name in names if name in row}


def compare_curves(then: dict[tuple[int, str], float], now: dict[tuple[int, str], float]) -> str:
    """Says how two loss curves agree at the points that both have."""
    both = sorted(then.keys() & now.keys())
    differing = [point for point in both if then[point] != now[point]]
    if not [step for step, _ in both if step > 0]:
        return "The loss curves have no step in common, after the validation before training."
    if not differing:
        return f"The loss curve is the same, bit for bit: {len(both)} points, to step {both[-1][0]}."
    step, name = differing[0]
    largest = max(abs(now[point] / then[point] - 1) for point in differing)
    return (
        f"The loss curves differ from step {step} on: {name} {now[step, name]:.10g} here, {then[step, name]:.10g} "
        f"there; by {largest:.1e} at most (relative)."
    )


if __name__ == "__main__":
    main()
