"""`python -m lmlab.prepare output=DIR [overrides]`: prepare the data of a run once, for many.

Takes the overrides of lmlab.train; `--help` lists them.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lmlab import secrets
from lmlab.config import build, compose, schema
from lmlab.console import command
from lmlab.distributed import slurm
from lmlab.errors import UNWRITABLE, UserError, stopped_with


def prepare_job(cfg: DictConfig) -> None:
    """Prepares the shards that are this process's to make, and the index if all shards are there then."""
    cfg = compose.freeze(cfg)
    schema.check_keys(cfg, "prepare")
    words = secrets.redacted_command(HydraConfig.get().overrides.task)
    go_on = command("python", "-m", "lmlab.prepare", *words)
    try:
        with stopped_with(f"What is done is kept. To go on: {go_on}"):
            prepare_directory(OmegaConf.to_container(cfg), go_on)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"output={cfg.output} can't be written: {error.strerror}. The shards that are done are kept.\n"
            f"Once it can, go on: {go_on}"
        ) from error


def prepare_directory(values: dict[str, Any], go_on: str) -> None:
    """Prepares the directory of a config, as far as it is for this task of a job array to do.

    Args:
        values: the config in plain values.
        go_on: the command that goes on with it.
    """
    from lmlab.data.preparation import make_shards, workers
    from lmlab.data.shards import load_prepared
    from lmlab.runs.ledger import show_ledger

    again = partial(build.preparation, values, go_on)
    changed = False
    with workers(values["processes"], again) as pool:
        preparation = again()
        preparation.begin()
        shards, (task, tasks) = preparation.all_shards(), slurm.array_task()
        mine = shards[task::tasks]
        for step in ["sign"] * bool(preparation.choices.decontaminate) + ["make"]:
            for number, done in enumerate(make_shards(preparation, step, mine, pool), 1):
                changed = changed or done is not None
                if done is not None:
                    print(f"{number}/{len(mine)}  {done}", flush=True)
    if not preparation.merge(changed):
        print("The index is made by the task that ends last. If none did: give the command again without the array.")
        return
    data = load_prepared(str(preparation.folder)).prepared(
        ("train", "validation"),
        preparation.choices,
        preparation.tokenizer,
        Path(values["cache_dir"]),
        preparation.words,
    )
    show_ledger(data.ledger)
    print(f"To train: {command('python', '-m', 'lmlab.train', 'data=prepared', f'data.path={preparation.folder}')}")


def main() -> None:
    if "-m" in sys.argv or "--multirun" in sys.argv:
        sys.exit("error: -m is for sweeps. One command prepares one directory.")
    compose.run_command(prepare_job, "prepare")


if __name__ == "__main__":
    main()
