"""`python -m lmlab.preview [overrides]`: what `lmlab.train` would do with them, and what that would cost.

Takes what train takes; `--help` says more.
"""

import os
import sys

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmlab.config import compose, schema, targets
from lmlab.config.explain import explain
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import UserError, shown_plainly
from lmlab.preview import planning
from lmlab.preview.planning import Planned
from lmlab.sweeps import parameters


def main() -> None:
    with shown_plainly("debug=true" in sys.argv), SIGNALS.heeded():
        if "--help" in sys.argv or "-h" in sys.argv:
            print(compose.help_text("preview"))
            return
        os.environ["HYDRA_FULL_ERROR"] = "1"  # as in compose.run_command
        given = compose.read_command()
        part = given.cfg and (given.cfg != "job" or given.package or given.resolve)
        if given.shell_completion or given.info or given.hydra_help or part:  # for Hydra alone
            compose.run_command(lambda cfg: None, "train")
            return
        try:
            plan = planning.planned(given)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RuntimeError) as error:
            raise UserError(explain(error, "train")) from error
        if given.cfg:
            print(planning.marked(plan))
        else:
            preview(plan)


def preview(plan: Planned) -> None:
    """Show all there is to know before the run."""
    cfg, launcher = plan.cfg, plan.launcher
    submitted = launcher is None or launcher["_target_"] == parameters.SLURM
    schema.check_run(cfg, here=not submitted)  # a node is another machine
    here = of_this_machine(cfg) if submitted else cfg
    schema.check_devices(here.trainer)

    from lmlab.config import build
    from lmlab.console import console
    from lmlab.preview import batch, cost, showing
    from lmlab.preview.measuring import measure
    from lmlab.runs.ledger import show_ledger

    showing.show_config(plan)

    data = build.prepare_data(cfg)
    objective = targets.build(cfg.objective, "objective", tokenizer=data.tokenizer)
    assert data.train is not None
    steps, interval = schema.training_steps(cfg.trainer, len(data.train), cfg.batch_size)
    show_ledger(data.ledger)
    held_out, whole = build.build_validation(cfg, data, objective)
    first = batch.first_batch(cfg, data, objective, steps, held_out.pad_id)
    batch.show_samples(first, data.tokenizer, objective.causal, console())

    elsewhere = here.trainer.accelerator != cfg.trainer.accelerator
    found = measure(cfg, steps, interval) if not elsewhere else {}
    total = None
    if elsewhere:
        print("Nothing was measured: the run is for GPUs, and this machine has none. Give the command on a node.")
    if "parts" in found:
        showing.show_parts(found)
    if "steps" in found and "validation" in found:
        showing.show_measured(cfg, found, first)
        if submitted and cfg.trainer.accelerator == "auto" and not schema.uses_gpu(cfg.trainer):
            print("Measured without a GPU, as this machine has none; a node may have some.")
        parts = cost.terms(cfg, found, steps, interval, len(held_out), 0 if whole is None else len(whole))
        total = sum(term.seconds for term in parts)
        showing.show_estimate(plan, parts, total)
    if submitted:
        showing.show_job(plan, found, total)
    if "out_of_memory" in found:
        where = "a step" if "parts" in found else "the model"
        raise UserError(f"{where} does not fit here. {found['out_of_memory']}")


def of_this_machine(cfg: DictConfig) -> DictConfig:
    """The config of a run on other machines, as far as one device of this one can check it."""
    import torch

    here = OmegaConf.merge(cfg, {"trainer": {"devices": 1, "num_nodes": 1}})
    assert isinstance(here, DictConfig)
    here.batch_size = max(1, cfg.batch_size // schema.world(cfg.trainer))
    if schema.uses_gpu(cfg.trainer) and not torch.cuda.is_available():
        here.trainer.accelerator, here.trainer.precision = "cpu", "32-true"
    return here


if __name__ == "__main__":
    main()
