"""Evaluates a model on held-out text: lays out the rows to score, scores them, and writes records and certificate."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from transformers import PreTrainedModel

from lmlab.data.datamodule import HeldOutData
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared
from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.evaluation.metrics import BOUND
from lmlab.evaluation.rows import ElboRows, PseudoRows, WindowRows, check_targets
from lmlab.evaluation.scoring import HeldOut, Scorer
from lmlab.evaluation.windows import Context, windows
from lmlab.objectives import Objective


def hold_out(
    data: Prepared,
    objective: Objective,
    context: Context,
    choices: Preprocessing,
    *,
    objective_config: dict[str, Any] | None = None,
    masks_seed: int = 0,
    pseudo: dict[str, Any] | None = None,
    elbo: dict[str, int] | None = None,
    units: str = "text",
) -> HeldOut:
    """Returns the rows in which held-out text is scored, with all that their metrics depend on but the model.

    Args:
        data: the prepared data, with the held-out documents.
        context: the rule that says what the model sees at once.
        choices: the choices by which the data was prepared.
        objective_config: the objective's class (`_target_`) and arguments, for the certificate; by default the class.
        masks_seed: the seed of the masks of a masked objective.
        pseudo: the arguments of `PseudoRows`, to make a row for each token (pseudo-perplexity) and not for each window.
        elbo: the `draws` and the `seed` of `ElboRows`, to score the bound of a masked model in any order instead.
        units: the key of `metrics.WORDS` that says what counts as a word.

    Raises:
        UserError: there is nothing to score.
    """
    tokenizer, documents = data.tokenizer, data.validation
    check_targets(objective, documents, context.block_size)
    within_word = pseudo is not None and pseudo["within_word"]
    whole_word = pseudo is None and elbo is None and getattr(objective, "whole_word", False)
    if (within_word or whole_word) and not documents.continues(0, len(documents.tokens)).any():
        raise UserError(
            f"{'within_word' if within_word else 'objective.whole_word'}=true would change nothing: to this tokenizer "
            "no token goes on with the word before it.\nLeave it out."
        )
    shown = windows(context, documents, data.bounds, objective, tokenizer)
    rows: WindowRows | PseudoRows | ElboRows
    if elbo is not None:
        rows = ElboRows(documents, shown, tokenizer.mask_token_id, **elbo)
    elif pseudo is None:
        rows = WindowRows(documents, shown, objective, masks_seed)
    else:
        # An unknown token stands for text, and is scored.
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        rows = PseudoRows(documents, shown, tokenizer.mask_token_id, sorted(special), **pseudo)
    if not any(len(rows.row(i).tokens) for i in range(len(rows))):
        raise UserError("there is nothing to score: the text has no token that this context lets the model predict.")
    target = {"_target_": f"{type(objective).__module__}.{type(objective).__qualname__}"}
    policy = {
        "context": context.name,
        "block_size": context.block_size,
        "stride": None if objective.bidirectional or context.name == "blocks" else context.step,
        "drop_remainder_every": choices.drop_remainder_every if context.name == "blocks" else None,
        **{key: getattr(choices, key) for key in ("end_of_text", "special_tokens", "truncation")},
        "objective": None if pseudo or elbo else objective_config or target,
        "masks_seed": masks_seed if objective.bidirectional and not (pseudo or elbo) else None,
        "pseudo": pseudo,
        **({"elbo": elbo} if elbo else {}),
        **({"document_attention": True} if shown.document_attention else {}),
    }
    facts = {
        "figure": BOUND if elbo else "pseudo_perplexity" if pseudo else objective.metric,
        "policy": policy,
        "units": units,
        "data_hash": documents.hash,
        "tokenizer_hash": data.tokenizer_hash,
    }
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return HeldOut(rows, next(token for token in pad_ids if token is not None), facts)


def certify(
    model: PreTrainedModel,
    held_out: HeldOut,
    path: Path,
    *,
    trainer: L.Trainer | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    chunk_size: int | None = None,
    facts: Mapping[str, Any] | None = None,
    write: Callable[..., None] = records.write,
) -> None:
    """Scores held-out text and writes its records and certificate into a directory; `records.read` reads them.

    Args:
        model: the model, in float32 or the dtype in which it is to be measured.
        path: the path of the directory, which is made.
        trainer: the trainer, which decides devices and precision; by default the CPU and float32.
        batch_size: the number of rows of a batch of one rank; it changes no metric.
        num_workers: the number of processes that make batches, for each rank.
        chunk_size: the number of scored positions whose logits are in memory at once; None for all.
        facts: further entries of the certificate; by default the name and the hash of the model.
        write: the function that writes them, with the parameters of `records.write`; a suite has one of its own.

    Raises:
        UserError: the model gives a target no finite nll.
    """
    if trainer is None:
        silence_lightning()
        trainer = L.Trainer(
            accelerator="cpu",
            plugins=[LightningEnvironment()],  # else Lightning looks for SLURM
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    if facts is None:
        facts = {"model": model.name_or_path, "run": None, "weights_hash": records.weights_hash(model.state_dict())}
    scorer = Scorer(model, held_out.sums(), chunk_size, held_out.losses)
    trainer.validate(scorer, HeldOutData(held_out, batch_size, num_workers), verbose=False)
    if not np.isfinite(scorer.result[0]).all():
        raise UserError(
            "the model gives targets no finite nll: its weights have diverged, "
            f"or trainer.precision={trainer.precision} is too narrow for them."
        )
    if trainer.is_global_zero:
        path.mkdir(parents=True, exist_ok=True)
        facts = {**held_out.facts, **facts, "precision": precision_of(trainer)}
        write(path, held_out.documents, *scorer.result, facts)


def silence_lightning() -> None:
    """Silences the greetings, hints and warnings of Lightning."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def precision_of(trainer: L.Trainer) -> str:
    """Returns the precision in which a trainer computes, as a certificate names it."""
    products = torch.get_float32_matmul_precision()
    return trainer.precision if products == "highest" else f"{trainer.precision}, float32 products {products}"
