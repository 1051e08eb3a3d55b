"""Tasks of lm-evaluation-harness (`lmlab[eval]`), answered by causal and masked models alike.

The harness loads the tasks, makes the prompts and counts the answers; harness_models.py has the models. A row of the
records is an example of a task, with the first metric of the task that is a mean over examples and better if higher, or
its length-normalized accuracy (`acc_norm`) where it has that. All metrics of the harness are in the certificate, as it
gives them.
"""

import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lmlab.console import counted
from lmlab.errors import UserError, check_installed, first_line, nearest, out_of_memory
from lmlab.evaluation.suites.suite import SuiteRecords, by_group, pseudo_text, write_suite
from lmlab.hub import go_offline_if_cut_off

if TYPE_CHECKING:  # a comparison and a report need not wait for torch
    import lightning as L
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "lm_eval"
SCORE = "task_score"
COLUMNS = {
    "task": pa.string(),
    "example": pa.int64(),  # its number in the task
    "example_hash": pa.string(),  # of its content, by the harness
    "metric": pa.string(),
    "score": pa.float64(),
}
PREFERRED = "acc_norm"
BOOTSTRAP = 1000
"""The bootstrap samples of a standard error that has no formula."""


class TaskRecords(SuiteRecords):
    """An evaluation by tasks of the harness that was read from its directory, a row for each example."""

    suite, rows, group, groups, measure = NAME, "examples", "task", "tasks", "score"
    schema = pa.schema([pa.field(name, kind, False) for name, kind in COLUMNS.items()], {"lmlab_tasks": "1"})


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    path: Path,
    *,
    trainer: "L.Trainer",
    batch_size: int,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Lets a model answer tasks, and writes records and certificate into a directory. Every rank calls this.

    Args:
        batch_size: the requests of a batch; of a masked model the rows, each with one hidden token.
        settings: `tasks`, `task_path`, `shots`, `limit` and `seed`; of a masked model also `score`, `within_word` and
            `draws`.
        facts: further entries of the certificate.

    Raises:
        UserError: the harness is not installed; a task is unknown, can't be loaded, or asks for text from a model that
            only scores answers.
    """
    from lmlab.evaluation.suites.ranks import on_each_rank

    check_installed(f"suite={NAME}", "eval", "lm_eval", "accelerate")
    os.environ["DISABLE_MULTIPROC"] = "1"  # a process that it forks to bootstrap would wait for torch's threads forever
    for name in ("lm_eval", "lm-eval", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import lm_eval

    from lmlab.evaluation.suites import harness_models
    from lmlab.models.torch_module import TorchModule

    shown = trainer.is_global_zero and sys.stderr.isatty()  # the harness's own progress
    with nullcontext() if shown else redirect_stderr(StringIO()):
        tasks = load_tasks(settings)
    masked = settings.get("score") is not None
    if masked or isinstance(model, TorchModule):  # it takes no padding before a question, as the harness has it
        refuse_writing(tasks["tasks"], "a masked model" if masked else "a torch module")
    answers = harness_models.masked if masked else harness_models.causal

    def evaluate(placed: "PreTrainedModel") -> Any:
        lm = answers(placed, tokenizer, batch_size, settings)
        shows = nullcontext() if shown else redirect_stderr(StringIO())
        with task_errors(settings), shows, redirect_stdout(StringIO()):
            return lm_eval.evaluate(lm, tasks, settings["limit"], bootstrap_iters=BOOTSTRAP)

    found = on_each_rank(trainer, model, evaluate)
    if not trainer.is_global_zero:
        return
    table = table_of(found["samples"], tasks["tasks"])
    own = {
        "figure": SCORE,
        "data_hash": data_hash(table),
        "policy": {"pseudo": {"within_word": settings["within_word"]} if settings.get("score") == "pseudo" else None},
        "settings": dict(settings),
        "results": numbers_of(found["results"] | found.get("groups", {})),
        "task_versions": {name: str(version) for name, version in found["versions"].items()},
        "examples_before": found["n-shot"],
        "lm_eval": lm_eval.__version__,
    }
    write_suite(path, TaskRecords, table, {**facts, **own}, figures_and_totals)


def load_tasks(settings: Mapping[str, Any]) -> Any:
    """Returns the tasks of an evaluation as the harness's `evaluate` takes them, with their data.

    Raises:
        UserError: there is no task of a name, its data can't be loaded, or there is no directory `task_path`.
    """
    from lm_eval.tasks import TaskManager

    path = settings["task_path"]
    if path is not None and not Path(path).is_dir():
        raise UserError(f"task_path={path}: there is no such directory.")
    tasks, names = TaskManager(include_path=path), list[str]()
    for name in settings["tasks"]:
        names += (found := tasks.match_tasks([name]))  # a name may be a pattern, such as blimp_*
        if not found:
            raise UserError(
                f"tasks={name}: lm-evaluation-harness has no such task.{nearest(name, tasks.all_tasks)}\n"
                "It lists them by: lm_eval ls tasks. Tasks of your own: task_path=DIRECTORY"
            )
    random.seed(0)  # these two as the harness has them, for tasks that draw
    np.random.seed(1234)
    with task_errors(settings, Exception):  # what is wrong in the file of a task may raise anything
        loaded = tasks.load(names)
    for task in loaded["tasks"].values():
        own, given = task.get_config("num_fewshot"), settings["shots"]
        if own is None or (given is not None and own != 0):  # a task without examples has none, as the harness has it
            task.set_config(key="num_fewshot", value=given or 0)
        task.set_fewshot_seed(seed=settings["seed"])
    return loaded


def refuse_writing(tasks: Mapping[str, Any], kind: str) -> None:
    """Refuses tasks in which a model that only scores answers would have to write.

    Args:
        kind: what the model is, for the message.

    Raises:
        UserError: there is one.
    """
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise UserError(
                f"tasks={name} asks the model to write, which {kind} does not: it scores answers that are given.\n"
                "Leave that task out."
            )


@contextmanager
def task_errors(settings: Mapping[str, Any], *more: type[Exception]) -> Iterator[None]:
    """Turns what the harness raises inside about its tasks and their data into a `UserError`.

    Args:
        more: further classes of errors that it raises about them.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    go_offline_if_cut_off()
    try:
        yield
    except (OSError, ValueError, HTTPError, DatasetsError, ModuleNotFoundError, *more) as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        names = ",".join(settings["tasks"])
        raise UserError(
            f"tasks=[{names}]: lm-evaluation-harness could not run them "
            f"({type(error).__name__}: {first_line(error)}).\n"
            "Their data comes from the Hugging Face hub, or from where the files of task_path=DIRECTORY say."
        ) from error


def table_of(samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Any]) -> pa.Table:
    """Returns the records of what the harness logged, by task; of several filters of the answers the first counts.

    Args:
        tasks: the harness's objects, which say of each metric how it is made of those of the examples.
    """
    from lm_eval.api.metrics import mean

    rows = []
    for task, examples in samples.items():
        kept = [example for example in examples if example["filter"] == examples[0]["filter"]]
        means = {name for name, made in tasks[task].aggregation().items() if made is mean}
        better = tasks[task].higher_is_better()
        names = [name for name in kept[0]["metrics"] if name in means and better.get(name) is not False]
        names = [name for name in names if isinstance(kept[0][name], Real)]
        if not names:
            continue
        metric = PREFERRED if PREFERRED in names else names[0]
        for example in kept:
            row = {"task": task, "example": example["doc_id"], "example_hash": example["doc_hash"], "metric": metric}
            rows.append(row | {"score": float(example[metric])})
    return pa.Table.from_pylist(rows, TaskRecords.schema)


def data_hash(table: pa.Table) -> str:
    """Returns a hash of the examples of records and of what is measured of them."""
    from lmlab.data.sources import fingerprint

    return fingerprint("tasks", table.select(["task", "example", "example_hash", "metric"]).to_pydict())


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the metrics and standard errors of each task, by the names that the harness gives them."""
    return {
        task: {name: float(value) for name, value in values.items() if isinstance(value, Real)}
        for task, values in results.items()
    }


def figures_and_totals(table: pa.Table, _: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a certificate that follow from its records: `figures`, `totals`, and both by task."""

    def of(rows: pa.Table) -> dict[str, dict[str, Any]]:
        score = rows["score"].to_numpy()
        figures = {SCORE: math.fsum(score) / len(score) if len(score) else None}
        return {"figures": figures, "totals": {"examples": len(score)}}

    return by_group(table, TaskRecords, of)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate, by the names of the tasks, and on how they were asked."""
    settings, lines = certificate["settings"], {}
    for task, values in certificate["results"].items():
        texts = []
        for key, value in values.items():
            name, _, answers = key.partition(",")
            error = values.get(f"{name}_stderr,{answers}")
            if not name.endswith("_stderr") and name != "sample_len":
                shown = f"{name} {value:.4f}" if answers in ("", "none") else f"{name} ({answers}) {value:.4f}"
                texts.append(shown + ("" if error is None or math.isnan(error) else f" ± {error:.4f}"))
        lines[task] = ", ".join(texts)
    shots = sorted({*certificate["examples_before"].values()})
    lines["examples before"] = ", ".join(map(str, shots))
    lines["examples"] = f"{counted(certificate['totals']['examples'], 'example')} with a score of their own"
    if settings.get("score") == "pseudo":
        lines["score"] = pseudo_text(settings["within_word"])
    elif settings.get("score"):
        lines["score"] = f"a bound of the nll, from {settings['draws']} random masks of each answer"
    lines["lm-evaluation-harness"] = certificate["lm_eval"]
    return lines
