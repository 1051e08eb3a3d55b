"""The number of optimizer steps that a budget of tokens, computation or hours pays for."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lmlab.config.models import build_objective, make_model, model_without_weights
from lmlab.config.schema import batch_sizes, warmup
from lmlab.config.targets import build
from lmlab.errors import UserError
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import override_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmlab.data.prepared import Prepared


STEPS = "budget_steps"
"""The entry of the manifest that says how many steps `budget.hours` came to."""


def budget_of(cfg: DictConfig) -> tuple[str, float] | None:
    """Returns the key of the budget of a run, and its value; None if the run has none.

    Raises:
        UserError: there are several budgets, or a number of steps beside one.
    """
    block = cfg.get("budget")
    if not isinstance(block, DictConfig):  # null, or a value that the check of all keys refuses
        return None
    given = {str(key): value for key, value in block.items() if value is not None}
    lengths = [f"budget.{key}" for key in given]
    if cfg.trainer.max_steps not in (None, -1):
        lengths.append("trainer.max_steps")
    if given and len(lengths) > 1:
        raise UserError(
            f"{lengths[0]} and {lengths[1]} are two lengths of one run: leave one of them out, or set it to null."
        )
    if "flops" in given and warmup(cfg, "block_warmup"):
        raise UserError("budget.flops is for blocks of one length: use budget.tokens, or leave block_warmup out.")
    return next(iter(given.items()), None)


def check_lengths(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses a budget beside another length of the run.

    Args:
        overrides: those of the command. They tell a number of epochs that was asked for from the default one.

    Raises:
        UserError: there is another length.
    """
    budget = budget_of(cfg)
    if budget and cfg.trainer.max_epochs is not None and "trainer.max_epochs" in map(override_key, overrides):
        raise UserError(
            f"budget.{budget[0]} and trainer.max_epochs are two lengths of one run: leave one of them out, "
            "or set it to null."
        )


def steps_of_budget(
    cfg: DictConfig, data: "Prepared", model: "PreTrainedModel | None" = None
) -> tuple[int, str] | None:
    """Returns the steps that the budget of a run pays for, and a text on how they are counted; None without a budget.

    The steps of `budget.hours` were measured when the run began, and are read from its manifest. For the other budgets
    a step has `batch_size` blocks of `block_size` tokens, or fewer while batches grow. The computation is that of
    forward and backward passes, as `lmlab.models.flops.Flops` counts it, with as many targets in each block as in the
    first one of training.

    Args:
        model: the model of the run, if it has been made; what the run freezes is frozen.

    Raises:
        UserError: as of `budget_of`; or the computation of the model is not counted.
    """
    budget = budget_of(cfg)
    if budget is None:
        return None
    key, value = budget
    sizes, block_size = batch_sizes(cfg), cfg.preprocess.block_size
    tokens = cfg.batch_size * block_size
    if key == "hours":
        return RunDirectory(cfg.run_dir).read_manifest()[STEPS], f"{value:g} hours at the speed of a short run"
    if key == "tokens":
        steps = sizes.steps_for(math.ceil(value / block_size))
        return steps, f"{value:,.0f} tokens in steps of {tokens:,}"

    from lmlab.models.flops import Flops
    from lmlab.models.memory import count_parameters
    from lmlab.objectives import make_example
    from lmlab.optim import Scheduled

    objective = build_objective(cfg, data.tokenizer)
    made = {"tokenizer": data.tokenizer, "auto_class": objective.auto_class}
    if key == "tokens_per_parameter":
        model = model or model_without_weights(cfg, **made) or make_model(cfg, **made, empty=False)
        parameters, _ = count_parameters(model)
        steps = sizes.steps_for(math.ceil(value * parameters / block_size))
        return steps, f"{value:g} tokens for each of {parameters:,} parameters, in steps of {tokens:,} tokens"
    if model is None:
        model, optimizer = make_model(cfg, **made, empty=False), build(cfg.optim, "optim")
        if isinstance(optimizer, Scheduled):
            optimizer.freeze(model)
    flops = Flops.from_model(model)  # which tries the model out, and so needs its weights
    if flops is None:
        raise UserError(
            f"budget.flops: the computation of {model.config.model_type} is not counted. Use budget.tokens."
        )
    assert data.train is not None
    given: dict[str, Any] = {"continues": data.train.continues(0), "documents": data.train.documents(0)}
    example = make_example(objective, data.train[0], (cfg.seed, 0, 0), progress=0.0, **given)
    targets = round(tokens * len(example.targets) / len(example.inputs))
    per_step = flops.step(tokens, targets, block_size)
    steps = sizes.steps_for(math.ceil(value / per_step * cfg.batch_size))
    return steps, f"{value:.3g} FLOPs in steps of {per_step:.3g}"
