"""Builds the objective, the model and the teacher that a checked config names."""

import json
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config.compose import without_secrets
from lmlab.config.schema import preprocessing, shards
from lmlab.config.targets import build, takes
from lmlab.distributed import ranks
from lmlab.errors import UserError
from lmlab.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmlab.data.prepared import Prepared
    from lmlab.models.teacher import Teacher
    from lmlab.objectives import Objective

PRETRAINED = "lmlab.models.loading.pretrained"
LONGEST = 1024  # tokens of a block, where neither the command nor a run says how many


def build_objective(cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase") -> "Objective":
    """Returns the objective of a config.

    Raises:
        UserError: it lacks a member of `Objective`.
    """
    from lmlab.objectives import Objective

    objective: Objective = build(cfg.objective, "objective", tokenizer=tokenizer)
    required = [name for name in Objective.__annotations__ if not hasattr(Objective, name)]
    missing = [name for name in (*required, "sample") if not hasattr(objective, name)]
    if missing:
        raise UserError(
            f"objective._target_={cfg.objective._target_}: its objects have no {' and no '.join(missing)}.\n"
            "What an objective has is in lmlab/objectives/__init__.py; one may derive from those of lmlab."
        )
    return objective


def check_example(cfg: DictConfig, data: "Prepared", objective: "Objective") -> None:
    """Refuses an objective that makes no example of the first training block, of tokens of its tokenizer.

    Held-out text, which another objective may score, is checked where it is prepared.
    """
    from lmlab.objectives import make_example

    assert data.train is not None
    given: dict[str, Any] = {"continues": data.train.continues(0), "documents": data.train.documents(0)}
    example = make_example(objective, data.train[0], (cfg.seed, 0, 0), progress=0.0, **given)
    highest, tokens = max([*example.inputs, *example.targets]), len(data.tokenizer)
    if highest >= tokens:
        raise UserError(
            f"{type(objective).__name__} returns the id {highest}, and the tokenizer has 0 to {tokens - 1}.\n"
            "More special tokens of a trained tokenizer: tokenizer.extra_tokens=…"
        )


def build_model_of_rank(cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase") -> "tuple[Objective, PreTrainedModel]":
    """Returns the objective and the model of a config on each rank.

    Where the model is to be sharded, rank 0 alone has its weights, and sends each rank its shards of them
    (`models.efficiency.shard`): main memory holds them once. The probe needs weights too, so rank 0 sends the others
    its result.
    """
    from lmlab.models.probe import PROBES, Probe, probe

    if shards(cfg.trainer) == 1:
        return build_model(cfg, tokenizer)
    objective, model = build_model(cfg, tokenizer, empty=bool(ranks.rank()))
    PROBES[model] = Probe(**json.loads(ranks.from_rank_zero("probe", lambda: json.dumps(probe(model)._asdict()))))
    return objective, model


def build_model(
    cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", empty: bool = False
) -> "tuple[Objective, PreTrainedModel]":
    """Returns the objective and the model of a config, checked against the tokenizer.

    A block size that the config leaves open becomes the longest that the model takes.

    Args:
        empty: leave the weights out, and what is checked with them. A target without a parameter `empty` makes its
            weights all the same.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from lmlab.models import efficiency
    from lmlab.models.checks import check_model, max_positions
    from lmlab.models.probe import DOCUMENT_ATTENTION, PORTABLE

    # What a run has to say, it says itself.
    disable_progress_bar()
    set_verbosity_error()
    objective = build_objective(cfg, tokenizer)
    if getattr(objective, "prefixes", False) and cfg.attention not in (None, *PORTABLE):
        raise UserError(
            f"attention={cfg.attention} takes no mask that lets a position see a prefix, as this objective needs.\n"
            "Use attention=sdpa or attention=eager."
        )
    if within_documents(cfg) and cfg.attention not in (None, *DOCUMENT_ATTENTION):
        raise UserError(
            f"attention={cfg.attention} takes no mask that keeps documents apart, as "
            f"preprocess.document_attention=true needs.\nUse attention={', '.join(DOCUMENT_ATTENTION)}."
        )
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, tokenizer=tokenizer, auto_class=objective.auto_class, empty=empty)
    if cfg.preprocess.block_size is None:
        cfg.preprocess.block_size = min(max_positions(model) or LONGEST, LONGEST)
    if not empty:
        check_model(model, tokenizer, cfg.preprocess.block_size, objective, within_documents(cfg))
    efficiency.fuse_activations(model)
    if cfg.attention is not None:
        efficiency.choose_attention(model, cfg.attention)
    if cfg.get("activation_checkpointing"):
        efficiency.checkpoint_activations(model, cfg.activation_checkpointing == "selective")
    if cfg.get("compile"):
        efficiency.compile_layers(model)
    return objective, model


def within_documents(cfg: DictConfig) -> bool:
    """Returns whether a model of a config is shown blocks whose documents do not see one another."""
    return preprocessing(cfg).document_attention and cfg.get("context") in (None, "blocks")


def make_model(cfg: DictConfig, **given: Any) -> "PreTrainedModel":
    """Returns what the block `model` makes, with the adapter of the config; a plain torch module as a `TorchModule`.

    The config of a `TorchModule` records the block that made it, by which its export is loaded again.

    Args:
        given: more arguments: tokenizer, auto_class and empty.
    """
    from transformers import PreTrainedModel

    from lmlab.models.torch_module import TorchModule, wrap

    block = cfg.model
    exported = block.get("module") if block.get("_target_") == PRETRAINED else None
    made_by = block if exported is None else exported
    if exported is not None:
        given["module"] = build(exported, "model.module", **given)
        block = OmegaConf.masked_copy(block, [str(key) for key in block if key != "module"])
    model = build(block, "model", **given)
    if not isinstance(model, PreTrainedModel):
        model = wrap(model, given["tokenizer"], given["auto_class"])
    if isinstance(model, TorchModule):
        model.config.module = OmegaConf.to_container(without_secrets(made_by))
    return with_adapter(cfg, model, given["auto_class"])


def with_adapter(cfg: DictConfig, model: "PreTrainedModel", auto_class: str) -> "PreTrainedModel":
    """Adds the adapter of a config, if it has one, to a model that its block `model` has made; returns the model."""
    if "adapter" not in cfg:
        return model
    given = {"base": cfg.model.get("name"), "revision": cfg.model.get("revision"), "auto_class": auto_class}
    adapted: PreTrainedModel = build(cfg.adapter, "adapter", model=model, seed=cfg.seed, **given)
    return adapted


def build_teacher(cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", objective: "Objective") -> "Teacher | None":
    """Returns the teacher of a run, on each rank a whole one; None where it learns from the text alone.

    Raises:
        UserError: the config names no model, or one that can't teach this student.
    """
    if "distill" not in cfg:
        return None
    if getattr(objective, "losses", None) is not None:
        raise UserError(
            f"{type(objective).__name__} has losses of its own, into which a teacher does not come: leave +distill out."
        )
    block, run = cfg.distill.copy(), RunDirectory(cfg.distill.model)
    if run.has_config():
        if not run.model.is_dir():
            raise UserError(
                f"distill.model={block.model} holds no model: it is an evaluation, or a run that has not ended.\n"
                "Name a run that has, an exported directory, or a hub id."
            )
        block.model = str(run.model)
    given = {"tokenizer": tokenizer, "objective": objective, "block_size": cfg.preprocess.block_size}
    teacher: Teacher = build(block, "distill", **given, document_attention=within_documents(cfg))
    return teacher


def model_without_weights(
    cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", auto_class: str
) -> "PreTrainedModel | None":
    """Returns the model of a config on torch's meta device; None if its target makes no models without weights.

    Raises:
        UserError: no model can be made of the config.
    """
    from transformers.utils.logging import set_verbosity_error

    if "empty" not in takes(cfg.model, "model") or "module" in cfg.model:
        return None
    set_verbosity_error()
    model: PreTrainedModel = build(cfg.model, "model", tokenizer=tokenizer, auto_class=auto_class, empty=True)
    return with_adapter(cfg, model, auto_class)
