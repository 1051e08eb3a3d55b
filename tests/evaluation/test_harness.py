"""Tasks of lm-evaluation-harness, with data in local files: causal models as by its own class, masked ones by hand."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmlab.errors import UserError
from lmlab.evaluation.suites import certificates, harness
from lmlab.reporting.suites import suites_table

from .test_closed_form import Table
from .test_scoring import model_for, tokenizer_named

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lmlab[eval]'")

from lmlab.evaluation.suites import harness_models  # noqa: E402

SETTINGS = {"task_path": None, "shots": None, "limit": None, "seed": 0, "within_word": False, "draws": 4}
QUESTIONS = [
    ("The cat sat on the", ["mat", "cat", "the mat"], 0),
    ("the mat", ["sat", "cat on"], 1),
    ("on", ["the cat", "mat mat mat"], 0),
]


def write_tasks(folder: Path) -> None:
    """A task of each kind, with the data of all in one file."""
    folder.mkdir()
    rows = [{"q": q, "choices": choices, "answer": answer, "text": q} for q, choices, answer in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
    choice += "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    (folder / "choose.yaml").write_text(f"task: choose_here\n{data}{choice}")
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    rolling += "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    (folder / "roll.yaml").write_text(f"task: roll_here\n{data}{rolling}")
    likely = "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: ' {{choices[answer]}}'\nmetric_list:\n"
    likely += "- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n- {metric: acc}\n"
    (folder / "continue.yaml").write_text(f"task: continue_here\n{data}fewshot_split: test\n{likely}")
    (folder / "broken.yaml").write_text(
        f"task: broken_here\n{data.replace('test_split: test', 'test_split: x')}{choice}"
    )
    until = "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{text}}'\n"
    until += "generation_kwargs: {max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    (folder / "write.yaml").write_text(f"task: write_here\n{data}{until}")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("harness") / "tasks"
    write_tasks(folder)
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        # It reads thousands of files each time that it is made.
        patch.setattr("lm_eval.tasks.TaskManager", cache(TaskManager))
        yield SETTINGS | {"task_path": str(folder)}


def measured(model: Any, tokenizer: Any, path: Path, settings: dict[str, Any]) -> Any:
    import lightning as L

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    facts = {"tokenizer_hash": "", "weights_hash": "", "precision": "32-true", "model": "m", "run": None}
    harness.measure(model, tokenizer, path, trainer=trainer, batch_size=3, settings=settings, facts=facts)
    return certificates.read(path)


@pytest.mark.long
def test_a_causal_model_answers_as_the_harness_has_it(tasks: dict[str, Any], tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer, model = tokenizer_named("bpe"), model_for("bpe", "gpt2")
    names = ["choose_here", "continue_here", "roll_here", "write_here"]
    settings = tasks | {"tasks": names, "score": None, "shots": 1, "seed": 1234}
    found = measured(model, tokenizer, tmp_path / "out", settings)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(model, tokenizer=tokenizer, max_length=64, backend="causal"),
        tasks=names,
        task_manager=TaskManager(include_path=tasks["task_path"]),
        num_fewshot=1,
        bootstrap_iters=0,
    )
    for task, values in theirs["results"].items():
        for name, value in values.items():
            if "stderr" not in name and not isinstance(value, str):
                assert found.certificate["results"][task][name] == pytest.approx(value, rel=1e-5)
    of_choose = found.of_domain("choose_here").table
    assert of_choose["metric"].to_pylist() == ["acc_norm"] * 3
    assert of_choose["score"].to_pylist() == [each["acc_norm"] for each in theirs["samples"]["choose_here"]]
    assert found.domains == ["choose_here", "continue_here", "write_here"]  # a perplexity is no mean over examples
    assert {*found.of_domain("continue_here").table["metric"].to_pylist()} == {"acc"}
    reported = suites_table({"out": found}, [])
    reported = {*zip(reported["group"], reported["rows"], reported["metric"], strict=True)}
    assert {("roll_here", 3, "bits_per_byte"), ("write_here", 3, "exact_match")} <= reported


@pytest.mark.parametrize("within_word", [False, True])
@torch.no_grad()
def test_a_masked_model_answers_token_by_token(within_word: bool) -> None:
    """By transformers' own logits, a token hidden at a time, or the rest of its word too."""
    tokenizer, model = tokenizer_named("wordpiece"), model_for("wordpiece", "bert")
    lm = harness_models.MaskedRequests(model, tokenizer, batch_size=3, within_word=within_word)
    requests = [("The cat", " sat café"), ("", "the cats"), ("on ", "mat")]
    found = lm.loglikelihood([SimpleNamespace(args=request) for request in requests])  # type: ignore[arg-type]
    for (question, answer), (value, greedy) in zip(requests, found, strict=True):
        encoded, before = (
            tokenizer(question + answer),
            len(tokenizer(question.rstrip(), add_special_tokens=False).input_ids),
        )
        ids, words, total, right = torch.tensor(encoded["input_ids"]), encoded.word_ids(), 0.0, True
        for i in range(1 + before, len(ids) - 1):
            rest = [j for j in range(i, len(ids)) if j == i or (within_word and words[j] == words[i])]
            hidden = ids.clone()
            hidden[rest] = tokenizer.mask_token_id
            logits = model(hidden[None]).logits[0, i].double()
            total += float(logits.log_softmax(-1)[ids[i]])
            right = right and int(logits.argmax()) == int(ids[i])
        assert (value, greedy) == (pytest.approx(total, rel=1e-5), right)
    (whole,) = lm.loglikelihood_rolling([SimpleNamespace(args=("the cats",))])  # type: ignore[list-item]
    assert whole == pytest.approx(found[1][0])


def test_a_long_text_is_seen_in_parts() -> None:
    tokenizer, model = tokenizer_named("wordpiece"), model_for("wordpiece", "bert")
    lm = harness_models.MaskedRequests(model, tokenizer, within_word=False)
    ids = lm.tok_encode("the cat sat on " * 30)
    whole = lm.loglikelihood_rolling([SimpleNamespace(args=("the cat sat on " * 30,))])  # type: ignore[list-item]
    parts = [ids[start : start + lm.room] for start in range(0, len(ids), lm.room)]
    assert len(parts) > 1
    answers = [harness_models.Answer([], part, np.zeros(len(part), bool)) for part in parts]
    assert whole[0] == pytest.approx(sum(value for value, _ in lm.answer(answers)))


def test_the_bound_of_a_uniform_model() -> None:
    tokenizer = tokenizer_named("wordpiece")
    model = Table(torch.full((len(tokenizer), len(tokenizer)), 1 / len(tokenizer)))
    lm = harness_models.MaskedRequests(model, tokenizer, score="elbo", draws=5)
    ((value, _),) = lm.loglikelihood([SimpleNamespace(args=("The cat", " sat on the mat"))])  # type: ignore[list-item]
    assert value == pytest.approx(-4 * np.log(len(tokenizer)))


@pytest.mark.long
def test_a_masked_model_in_tasks(tasks: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, model = tokenizer_named("wordpiece"), model_for("wordpiece", "bert")
    settings = tasks | {"tasks": ["choose_here", "roll_here"], "score": "pseudo"}
    found = measured(model, tokenizer, tmp_path / "out", settings)
    scores = []
    for question, choices, answer in QUESTIONS:
        lm = harness_models.masked(model, tokenizer, 7, settings)
        values = lm.loglikelihood([SimpleNamespace(args=(question, f" {choice}")) for choice in choices])  # type: ignore[misc]
        scores.append(float(np.argmax([value for value, _ in values]) == answer))
    assert found.certificate["results"]["choose_here"]["acc,none"] == pytest.approx(np.mean(scores))
    assert "bits_per_byte,none" in found.certificate["results"]["roll_here"]
    with pytest.raises(UserError, match="tasks=write_here asks the model to write"):
        measured(model, tokenizer, tmp_path / "none", settings | {"tasks": ["write_here"]})
    with pytest.raises(UserError, match=r"has no such task.*choose_here"):
        measured(model, tokenizer, tmp_path / "none", settings | {"tasks": ["chose_here"]})
    with pytest.raises(UserError, match=r"could not run them \(KeyError: 'x'\)"):
        measured(model, tokenizer, tmp_path / "none", settings | {"tasks": ["broken_here"]})
    assert not (tmp_path / "none").exists()
