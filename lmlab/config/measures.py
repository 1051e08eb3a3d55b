"""Builds the function by which an evaluation measures a model: the nll of held-out text, or a suite."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lmlab.config.build import check_padding
from lmlab.config.held_out import DRAWS, build_held_out
from lmlab.config.schema import uses_gpu

if TYPE_CHECKING:
    import lightning as L
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmlab.data.prepared import Prepared
    from lmlab.objectives import Objective


def build_measure(
    cfg: DictConfig, data: "Prepared | None", objective: "Objective", tokenizer: "PreTrainedTokenizerBase"
) -> Callable[..., None]:
    """Returns the function that measures a model as a config says, and writes what the evaluation came to.

    It is called with the model and a directory, and by name with the trainer and the `facts` of the certificate.

    Args:
        data: the text of the evaluation; None for a suite that has its own.
    """
    from lmlab.data.pairs import read_pairs
    from lmlab.evaluation.certify import certify
    from lmlab.evaluation.suites import generation, harness, memorization, minimal_pairs
    from lmlab.models.chunked_loss import logits_chunk_size

    suite, batch_size = cfg.get("suite"), cfg.batch_size
    if suite == harness.NAME:
        settings = {key: cfg[key] for key in ("tasks", "task_path", "shots", "limit", "seed", "within_word")}
        settings["tasks"] = [cfg.tasks] if isinstance(cfg.tasks, str) else [*cfg.tasks]
        settings["score"] = cfg.score if objective.bidirectional else None
        settings["draws"] = cfg.draws or getattr(objective, "draws", DRAWS)
        return without_rows(harness.measure, cfg, tokenizer, settings)
    assert data is not None
    if suite == generation.NAME:
        settings = {key: cfg[key] for key in generation.SETTINGS}
        return without_rows(partial(generation.measure, documents=data.validation), cfg, tokenizer, settings)
    held_out, options = build_held_out(cfg, data, objective), dict[str, Any]()
    if suite == minimal_pairs.NAME:
        pairs = read_pairs(cfg.pairs, cfg.phenomenon)
        minimal_pairs.check(pairs, held_out)
        options["write"] = partial(minimal_pairs.write, pairs=pairs)
    elif suite == memorization.NAME:
        settings = {key: cfg[key] for key in ("prefix", "continuation", "min_k")}
        memorization.check(held_out, settings)
        options["write"] = partial(memorization.write, held_out=held_out, settings=settings)
        options["keeps_tokens"] = True

    def score(model: "PreTrainedModel", path: Path, trainer: "L.Trainer", facts: dict[str, Any]) -> None:
        check_padding(model, held_out.rows.lengths, batch_size)
        certify(
            model,
            held_out,
            path,
            trainer=trainer,
            batch_size=batch_size,
            num_workers=cfg.num_workers,
            chunk_size=logits_chunk_size(model, cfg.logits_chunk_size, uses_gpu(cfg.trainer)),
            surprisal=tokenizer if cfg.surprisal else None,
            calibration=cfg.calibration,
            facts=facts,
            **options,
        )

    return score


def without_rows(
    measure: Callable[..., None], cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", settings: dict[str, Any]
) -> Callable[..., None]:
    """Returns what `build_measure` does for a suite that scores no rows of held-out text.

    Args:
        measure: the function of the suite.
        settings: the values by which it measures.
    """
    from lmlab.data.tokenizers import content_hash
    from lmlab.evaluation.certify import precision_of

    def measure_model(model: "PreTrainedModel", path: Path, trainer: "L.Trainer", facts: dict[str, Any]) -> None:
        facts = facts | {"tokenizer_hash": content_hash(tokenizer), "precision": precision_of(trainer)}
        measure(model, tokenizer, path, trainer=trainer, batch_size=cfg.batch_size, settings=settings, facts=facts)

    return measure_model
