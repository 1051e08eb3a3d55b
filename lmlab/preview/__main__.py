"""`python -m lmlab.preview [overrides]`: show what `lmlab.train` would do with them, and what that would cost.

Takes what train takes; `--help` says more.
"""

import os
import sys

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmlab.config import compose, schema
from lmlab.config.explain import explain
from lmlab.distributed import slurm
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import UserError, first_line, shown_plainly
from lmlab.preview.plan import Plan, annotated_yaml, plan_command, show_config


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
            plan = plan_command(given)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RuntimeError) as error:
            raise UserError(explain(error, "train")) from error
        if given.cfg:
            print(annotated_yaml(plan))
        else:
            preview(plan)


def preview(plan: Plan) -> None:
    """Prints what differs from the default, the data, the first batch, and the memory and time of a short run."""
    cfg, submitted = plan.cfg, plan.launcher["_target_"] == slurm.SLURM
    schema.check_run(cfg, here=False)
    for_gpus = schema.uses_gpu(cfg.trainer) or (submitted and cfg.trainer.accelerator == "auto")
    missing = ""  # why nothing is measured
    try:  # one device of this machine stands for those of the nodes
        one = {"devices": 1, "num_nodes": 1} if submitted else {}
        schema.check_devices(OmegaConf.create({**cfg.trainer, **one}))
    except UserError as error:
        if not for_gpus:
            raise
        missing = first_line(error)

    from lmlab.config import build, changes, models
    from lmlab.config.held_out import build_validation
    from lmlab.config.short_run import SHORT, Measurement, measure, steps_of_hours
    from lmlab.console import console, counted
    from lmlab.data.mixture import with_draws
    from lmlab.preview import batch, estimate, job, memory
    from lmlab.preview.groups import show_groups
    from lmlab.runs.ledger import show_ledger

    show_config(plan)
    data = build.prepare_data(cfg)
    objective = models.build_objective(cfg, data.tokenizer)
    models.check_example(cfg, data, objective)
    assert data.train is not None
    held_out, whole = build_validation(cfg, data, objective)
    hours, measured, steps_of_budget = (cfg.get("budget") or {}).get("hours"), None, None
    if hours is not None:
        if missing:
            raise UserError(f"budget.hours={hours:g} can't be worked out here. {missing}")
        changes.fit_to_machine(cfg)
        measured = measure(cfg, SHORT)
        steps_of_budget = steps_of_hours(cfg, data, measured, hours, len(held_out), len(whole or ()))
        print(f"Budget: {hours:g} hours at the speed of a short run: {counted(steps_of_budget, 'step')}.")
    steps, interval, budget = build.training_length(cfg, data, steps=steps_of_budget)
    if budget:
        print(f"Budget: {budget}: {counted(steps, 'step')}.")
    show_groups(cfg, data.tokenizer, objective.auto_class)
    show_ledger(with_draws(data.ledger, data.train, schema.batch_sizes(cfg).before(steps)))
    first = batch.first_batch(cfg, data, objective, steps, held_out.pad_id)
    batch.show_samples(first, data.tokenizer, objective.target_shift, console())

    if for_gpus:
        memory.show_memory(cfg, data.tokenizer, objective.auto_class, first)
    changes.fit_to_machine(cfg)
    if missing:
        print(f"Nothing was measured. {missing}")
    measured = measured or (Measurement() if missing else measure(cfg, steps))
    seconds = None
    if measured.parameters:
        estimate.show_measured(cfg, measured)
        estimate.show_series(cfg, measured, steps)
    if measured.steps:
        if submitted and cfg.trainer.accelerator == "auto" and not schema.uses_gpu(cfg.trainer):
            print("Measured without a GPU, as this machine has none; a node may have some.")
        seconds = estimate.show_estimate(plan, measured, steps, interval, len(held_out), len(whole or ()))
    if submitted:
        job.show_job(plan, measured, seconds)
    if measured.out_of_memory:
        part = "a step" if measured.parameters else "the model"
        raise UserError(f"{part} does not fit here. {measured.out_of_memory}")


if __name__ == "__main__":
    main()
