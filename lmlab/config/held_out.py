"""Builds the rows of held-out text that validations and evaluations score."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config.schema import preprocessing
from lmlab.config.targets import build
from lmlab.errors import UserError
from lmlab.runs.choices import without_added

if TYPE_CHECKING:
    from lmlab.data.prepared import Prepared
    from lmlab.evaluation.scoring import HeldOut
    from lmlab.objectives import Objective

DRAWS = 16  # of the bound of each window, where neither the command nor the objective says how many


def build_held_out(cfg: DictConfig, data: "Prepared", objective: "Objective") -> "HeldOut":
    """Returns the rows in which held-out text is scored, with all that their metrics depend on but the model.

    The keys `context`, `score` and their like of evaluate.yaml choose the rows; in training they are blocks.

    Args:
        objective: that of the run; held-out text may be scored by another, see `held_out_objective`.

    Raises:
        UserError: there is nothing to score.
    """
    from lmlab.evaluation.certify import hold_out
    from lmlab.evaluation.windows import Context

    block = held_out_objective(cfg, objective)
    if block != cfg.objective:
        objective = build(block, "objective", tokenizer=data.tokenizer)
    score, seed = cfg.get("score") or getattr(objective, "score", "labels"), cfg.seed if "score" in cfg else 0
    pseudo = elbo = None
    if score == "pseudo":
        documents = data.validation
        # To some tokenizers no token goes on with a word, and the default of a suite is for all of them.
        within_word = cfg.within_word and ("suite" not in cfg or documents.continues(0, len(documents.tokens)).any())
        pseudo = {"within_word": bool(within_word), "sample": cfg.sample, "seed": cfg.seed if cfg.sample else None}
    if score == "elbo":
        elbo = {"draws": cfg.get("draws") or getattr(objective, "draws", DRAWS), "seed": seed}
    choices = preprocessing(cfg)
    return hold_out(
        data,
        objective,
        Context(cfg.get("context") or "blocks", choices.block_size, cfg.get("stride"), choices.document_attention),
        choices,
        # As in the certificates of lmlab 0.1.
        objective_config=without_added(OmegaConf.to_container(block)),  # type: ignore[arg-type]
        masks_seed=seed,  # in training the same for runs of all seeds
        pseudo=pseudo,
        elbo=elbo,
        score_end=cfg.get("score_end", True),
        units=cfg.get("units", "text"),
    )


def held_out_objective(cfg: DictConfig, objective: "Objective") -> DictConfig:
    """Returns the block of the objective by which held-out text is scored: `validation_x` stands in for `x`.

    A schedule that leads from `x` to `final_x`, such as `mask_schedule` of `mask_probability`, is replaced by its end.
    An objective that names a class as `held_out` leaves it to that.

    Args:
        objective: that of the run.
    """
    other = getattr(objective, "held_out", None)
    if other is not None:
        return OmegaConf.create({"_target_": f"{other.__module__}.{other.__qualname__}"})
    block: dict[str, Any] = OmegaConf.to_container(cfg.objective)  # type: ignore[assignment]
    block.pop("z_loss", None)  # which is of training alone
    for schedule in [key for key in block if key.endswith("_schedule")]:
        prefix = schedule.removesuffix("schedule")
        for name in [key for key in block if key.startswith(prefix) and f"final_{key}" in block]:
            end = block.pop(f"final_{name}")
            block[name] = block[name] if end is None else end
            block.pop(schedule, None)
    own = {key: value for key, value in block.items() if key.startswith("validation_")}
    instead = {key.removeprefix("validation_"): value for key, value in own.items() if value is not None}
    return OmegaConf.create({key: value for key, value in block.items() if key not in own} | instead)


def build_validation(cfg: DictConfig, data: "Prepared", objective: "Objective") -> "tuple[HeldOut, HeldOut | None]":
    """Returns what validations in training score and, where that is a part of the held-out documents, all of them."""
    from lmlab.data.blocks import group_documents
    from lmlab.data.sampler import draw_subset

    whole = build_held_out(cfg, data, objective)
    most = (cfg.get("validation") or {}).get("max_documents")
    if most is None or most >= len(data.validation):
        return whole, None
    documents = data.validation.select(draw_subset(cfg.preprocess.split_seed, most, len(data.validation)))
    bounds = group_documents(documents, preprocessing(cfg))
    if len(bounds) == 0:
        raise UserError(f"validation.max_documents={most}: those documents give no block. Raise it.")
    return build_held_out(cfg, replace(data, validation=documents, bounds=bounds), objective), whole
