"""Evaluates a model on held-out text: lays out the rows to score, scores them, and writes records and certificate."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.data.datamodule import HeldOutData
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared
from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.evaluation.calibration import calibrate
from lmlab.evaluation.metrics import BOUND
from lmlab.evaluation.rows import ElboRows, PseudoRows, WindowRows, check_targets
from lmlab.evaluation.scoring import HeldOut, Scorer
from lmlab.evaluation.surprisal import CORRECTION, words_of
from lmlab.evaluation.token_scores import TokenScores, white_space
from lmlab.evaluation.windows import STRIDES, Context, windows
from lmlab.io import write_beside
from lmlab.models.hashing import weights_hash
from lmlab.objectives import Objective
from lmlab.runs.directory import RunDirectory


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
    score_end: bool = True,
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
        score_end: False to leave the end-of-text token after each document out of the targets.
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
    if not (score_end or documents.ends(np.arange(len(documents.tokens))).any()):
        raise UserError(
            "score_end=false would change nothing: no document has an end-of-text token after it "
            "(preprocess.end_of_text=false).\nLeave it out."
        )
    shown = windows(context, documents, data.bounds, objective, tokenizer, score_end)
    rows: WindowRows | PseudoRows | ElboRows
    if elbo is not None:
        rows = ElboRows(documents, shown, tokenizer.mask_token_id, **elbo, score_end=score_end)
    elif pseudo is None:
        rows = WindowRows(documents, shown, objective, masks_seed, score_end)
    else:
        # An unknown token stands for text, and is scored.
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        rows = PseudoRows(documents, shown, tokenizer.mask_token_id, sorted(special), **pseudo, score_end=score_end)
    if not any(len(rows.row(i).tokens) for i in range(len(rows))):
        raise UserError("there is nothing to score: the text has no token that this context lets the model predict.")
    target = {"_target_": f"{type(objective).__module__}.{type(objective).__qualname__}"}
    policy = {
        "context": context.name,
        "block_size": context.block_size,
        "stride": None if objective.bidirectional or context.name not in STRIDES else context.step,
        "drop_remainder_every": choices.drop_remainder_every if context.name == "blocks" else None,
        **{key: getattr(choices, key) for key in ("end_of_text", "special_tokens", "truncation")},
        "objective": None if pseudo or elbo else objective_config or target,
        "masks_seed": masks_seed if objective.bidirectional and not (pseudo or elbo) else None,
        "pseudo": pseudo,
        **({"elbo": elbo} if elbo else {}),
        **({"document_attention": True} if shown.document_attention else {}),
        **({} if score_end else {"score_end": False}),
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
    surprisal: PreTrainedTokenizerBase | None = None,
    calibration: bool = False,
    keeps_tokens: bool = False,
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
        surprisal: the tokenizer, to write the surprisal of each word too; None does without.
        calibration: whether the certificate is to say how confidence and accuracy of the predictions go together.
        keeps_tokens: whether `write` has a parameter `scores` too, for what `TokenScores` computes.
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
        facts = {"model": model.name_or_path, "run": None, "weights_hash": weights_hash(model.state_dict())}
    documents, token_scores = held_out.documents, None
    if surprisal is not None or calibration or keeps_tokens:
        space = None if surprisal is None else white_space(surprisal)
        token_scores = TokenScores(len(documents.tokens), space and torch.from_numpy(space.boundaries))
    scorer = Scorer(model, held_out.sums(), chunk_size, held_out.losses, token_scores)
    trainer.validate(scorer, HeldOutData(held_out, batch_size, num_workers), verbose=False)
    if not np.isfinite(scorer.result[0]).all():
        raise UserError(
            "the model gives targets no finite nll: its weights have diverged, "
            f"or trainer.precision={trainer.precision} is too narrow for them."
        )
    if trainer.is_global_zero:
        path.mkdir(parents=True, exist_ok=True)
        facts = {**held_out.facts, **facts, "precision": precision_of(trainer)}
        if calibration:
            facts["calibration"] = calibrate(scorer.of_tokens, documents.tokens)
        if surprisal is not None and space is not None:
            words = words_of(documents, scorer.of_tokens, surprisal, space, held_out.causal)
            write_beside(RunDirectory(path).words, lambda beside: pq.write_table(words, beside))
            count = len(words) - words["text"].to_pylist().count("")  # which ends of documents are
            facts["surprisal"] = {"words": count, "correction": CORRECTION if held_out.causal else None}
        write(path, documents, *scorer.result, facts, **({"scores": scorer.of_tokens} if keeps_tokens else {}))


def silence_lightning() -> None:
    """Silences the greetings, hints and warnings of Lightning."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def precision_of(trainer: L.Trainer) -> str:
    """Returns the precision in which a trainer computes, as a certificate names it."""
    products = torch.get_float32_matmul_precision()
    return trainer.precision if products == "highest" else f"{trainer.precision}, float32 products {products}"
