"""Pushing runs to the Hugging Face hub by its real client, to a hub on this machine."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmlab.config import build, compose
from lmlab.evaluation import records
from lmlab.hub import split_revision
from lmlab.runs.directory import RunDirectory
from lmlab.sharing.card import build_card

from ..conftest import TINY, TINY_MLM, Refused, run_verb, stop_after
from ..hub_server import Failure, Hub, serving

TOKEN = "hf_writes"
PUSH = ("me/tiny", "--license", "apache-2.0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a series whose weights are those of the end, scaled."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_verb("train", *TINY, "trainer.val_check_interval=2", f"hydra.run.dir={run}")
    for step in (2, 4):
        shutil.copytree(run / "model", run / f"series/step-{step}")
        weights = run / f"series/step-{step}/model.safetensors"
        save_file({name: step * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    models = [{"step": step, "tokens": 64 * step, "path": f"step-{step}", "dtype": "float32"} for step in (2, 4)]
    (run / "series/index.json").write_text(json.dumps({"models": models}))
    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process's client talks to, without the client's pauses."""
    store = tmp_path / "store"
    store.mkdir()
    with serving({"model": {}}, store) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that this hub does not speak
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited, in place of waiting."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def content(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    """The files of a revision of the repository."""
    repository = hub.pushed["me/tiny"]
    return {path: file.read_bytes() for path, file in repository.commits[repository.at(revision)].items()}


def test_a_pushed_run(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """All files are there as they are; a second push sends nothing; any step is loaded by its name."""
    run_verb("push", run, *PUSH, "--series", "--private")
    assert hub.pushed["me/tiny"].private
    files = content(hub)
    for file in (run / "model").iterdir():
        assert files[file.name] == file.read_bytes()
    for name in (
        "config.yaml",
        "overrides.yaml",
        "manifest.json",
        "ledger.json",
        "certificate.json",
        "records.parquet",
    ):
        assert files[f"run/{name}"] == (run / name).read_bytes()
    assert files["curve.png"].startswith(b"\x89PNG")
    for step in (2, 4):
        at_step = content(hub, f"step-{step}")
        assert at_step["model.safetensors"] == (run / f"series/step-{step}/model.safetensors").read_bytes()
        assert {"tokenizer.json", "README.md"} <= at_step.keys()
        assert not [path for path in at_step if path.startswith("run/")]  # the evaluation is of other weights
    before = hub.uploads[:], hub.pushed["me/tiny"].messages[:]
    assert len(set(before[0])) == len(before[0])

    capsys.readouterr()
    run_verb("push", run, *PUSH, "--series")
    assert "nothing was sent" in capsys.readouterr().out
    assert (hub.uploads, hub.pushed["me/tiny"].messages) == before

    assert f"Bearer {TOKEN}" in hub.authorizations
    assert hub.store is not None
    for file in [*run.rglob("*"), *hub.store.iterdir()]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.long
def test_plain_transformers_give_the_perplexity_of_the_certificate(
    run: Path, hub: Hub, tmp_path: Path, evaluate: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_verb("push", run, *PUSH, "--series")
    model = AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path / "cache").eval()
    tokenizer = AutoTokenizer.from_pretrained("me/tiny", cache_dir=tmp_path / "cache")
    data = build.prepare_data(compose.read_config(run))
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    nll, targets = 0.0, 0
    for start, end in data.bounds:
        ids = torch.tensor(data.validation.tokens[start:end].astype("int64"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        targets += len(ids) - 1
    certificate = records.read(run).certificate
    assert targets == certificate["totals"]["tokens"]
    assert torch.tensor(nll / targets).exp().item() == pytest.approx(certificate["figures"]["perplexity"], rel=1e-6)

    # The same by a revision behind an @, in all that takes the name of a model.
    alike = ["data=sample", "preprocess.block_size=32"]
    certificates = [records.read(evaluate(name, *alike)).certificate for name in ("me/tiny", "me/tiny@step-4")]
    assert certificates[0]["weights_hash"] == certificate["weights_hash"] != certificates[1]["weights_hash"]
    assert certificates[1]["model"] == "me/tiny@step-4"
    run_verb("train", "model=pretrained", "model.name=me/tiny@step-4", *TINY[4:], f"hydra.run.dir={tmp_path / 'tuned'}")
    capsys.readouterr()
    run_verb("predict", "me/tiny@step-2", "It", "--greedy", "--max-new-tokens=2")
    assert capsys.readouterr().out.startswith("It")
    card = build_card(RunDirectory(tmp_path / "tuned"), "me/tuned", "mit")["README.md"].decode()
    assert metadata(card)["base_model"] == "me/tiny"
    assert "[me/tiny](https://huggingface.co/me/tiny), trained further" in card


@pytest.mark.parametrize(
    ("broken", "passed"),
    [
        (r"PUT /lfs/.*", 1),
        (r"POST .*/tag/.*", 1),
        pytest.param(r"PUT /lfs/.*", 3, marks=pytest.mark.long),
        pytest.param(r"POST .*/commit/main", 0, marks=pytest.mark.long),
        pytest.param(r"POST .*/commit/series", 1, marks=pytest.mark.longest),
        pytest.param(r"POST .*/batch", 1, marks=pytest.mark.longest),
    ],
)
def test_a_push_that_breaks_goes_on(
    broken: str, passed: int, run: Path, hub: Hub, refused: Refused, waits: list[float]
) -> None:
    """The connection is lost in the middle of an upload, until the push gives up."""
    hub.failures = [Failure(broken, 0, times=1000, passed=passed)]
    assert "Push again" in refused("push", run, *PUSH, "--series")
    for tag, commit in hub.pushed["me/tiny"].tags.items():  # what has a name is whole
        weights = hub.pushed["me/tiny"].commits[commit]["model.safetensors"].read_bytes()
        assert weights == (run / "series" / tag / "model.safetensors").read_bytes()
    assert "step-4" not in hub.pushed["me/tiny"].tags
    hub.failures.clear()
    run_verb("push", run, *PUSH, "--series")
    assert len(set(hub.uploads)) == len(hub.uploads)
    assert sorted(hub.pushed["me/tiny"].tags) == ["step-2", "step-4"]
    assert content(hub)["model.safetensors"] == (run / "model/model.safetensors").read_bytes()
    assert len(hub.pushed["me/tiny"].messages) == 4  # the initial one, main, and two steps


def test_answers_that_pass(run: Path, hub: Hub, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """What the hub asks to wait is waited, by the client and here; an answer that is lost makes no second commit."""
    hub.failures = [
        Failure("GET /api/whoami-v2", 429, headers={"Retry-After": "7"}),
        Failure("POST .*/preupload/main", 429, headers={"Retry-After": "40"}),
        Failure("POST /api/repos/create", 500),
        Failure("PUT .*", 0),
        Failure("POST .*/commit/main", -1),
    ]
    run_verb("push", run, *PUSH)
    assert {7, 41} <= set(waits)
    assert "asks to wait 40 seconds" in capsys.readouterr().err
    assert hub.pushed["me/tiny"].messages == ["initial commit", f"Run {RunDirectory(run).read_manifest()['run_id']}"]
    assert len(set(hub.uploads)) == len(hub.uploads)
    assert not any(failure.times for failure in hub.failures)


@pytest.mark.parametrize(
    ("words", "token", "failure", "says"),
    [
        (PUSH, "", None, "no token"),
        (PUSH, "hf_unknown", None, "does not know the token"),
        (PUSH, "hf_reads", None, "may only read"),
        (PUSH, "hf_yours", None, "who may not write to me/tiny"),
        (("me/tiny",), TOKEN, None, "licence"),
        (("me/tiny", "--license", " "), TOKEN, None, "licence"),
        (("me/tiny", "--license", "apache-3.0"), TOKEN, None, "the licence apache-3.0"),
        (("tiny", "--license", "mit"), TOKEN, None, "OWNER/NAME"),
        (("me/ti ny", "--license", "mit"), TOKEN, None, "can't be a repository"),
        (("me/other", "--license", "mit"), TOKEN, None, "holds another run, 1234"),
        (("me/theirs", "--license", "mit"), TOKEN, None, "no run of lmlab's"),
        (("me/public", "--license", "mit", "--private"), TOKEN, None, "is public already"),
        (PUSH, TOKEN, Failure("POST /api/repos/create", 403, 9), "may not write"),
        (PUSH, TOKEN, Failure("GET .*whoami.*", 503, 99), "failed (503)"),
        (PUSH, TOKEN, Failure("GET .*whoami.*", 0, 99), "Push again"),
        (PUSH, TOKEN, Failure("GET .*whoami.*", 429, 1, {"Retry-After": "3600"}), "3600 seconds"),
        (PUSH, TOKEN, Failure("GET .*whoami.*", 429, 99), "no more requests"),
    ],
)
def test_refused(
    words: tuple[str, ...],
    token: str,
    failure: Failure | None,
    says: str,
    run: Path,
    hub: Hub,
    refused: Refused,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each in one to three lines, and nothing comes of it on the hub."""
    for name, path, text in (("other", "run/manifest.json", '{"run_id": "1234"}'), ("theirs", "model.bin", "weights")):
        (tmp_path / name / path).parent.mkdir(parents=True)
        (tmp_path / name / path).write_text(text)
    (tmp_path / "public").mkdir()
    hub.repositories["model"] = {f"me/{name}": tmp_path / name for name in ("other", "theirs", "public")}
    monkeypatch.setenv("HF_TOKEN", token)
    hub.failures = [failure] if failure else []
    assert says in refused("push", run, *words)
    assert not hub.pushed
    assert not hub.uploads


def test_a_hub_that_is_away(
    run: Path, hub: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # another library sends, to a service that is not there
    assert "Push again" in refused("push", run, *PUSH)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in refused("push", run, *PUSH)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("push", run, *PUSH)


def test_a_run_that_has_not_finished(run: Path, hub: Hub, refused: Refused, tmp_path: Path) -> None:
    """What it has is said, with what to do."""
    stopped = tmp_path / "stopped"
    stop_after(run, 2, stopped)
    failure = {"state": "stopped", "cause": "SIGTERM", "message": "Stopped by SIGTERM.", "time": "2026-01-01T00:00:00"}
    (stopped / "failure.json").write_text(json.dumps(failure))
    shown = refused("push", stopped, *PUSH)
    assert "was stopped at step" in shown
    assert "a checkpoint of step 2; a model to push is exported at its end" in shown
    assert f"python -m lmlab.resume {stopped}" in shown
    code = (
        "import sys; from lmlab.runs.directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).lock(): print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, stopped], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "is going on" in refused("push", stopped, *PUSH)
        other.communicate("\n")
    assert "no run" in refused("push", tmp_path, *PUSH)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(whole / "series")
    assert "no series" in refused("push", whole, *PUSH, "--series")
    shutil.rmtree(whole / "model")
    assert "no exported model" in refused("push", whole, *PUSH)
    assert not hub.pushed


@pytest.mark.long
def test_a_run_that_pushes_at_its_end(
    hub: Hub, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    def words(name: str, *more: str) -> list[str]:
        return [*TINY, "trainer.max_steps=1", f"logger.push=me/{name}", f"hydra.run.dir={tmp_path / name}", *more]

    assert "logger.push_license" in refused("train", *words("tiny"))
    assert "callbacks.series" in refused("train", *words("tiny", "logger.push_license=mit", "logger.push_series=true"))
    assert "OWNER/NAME" in refused("train", *words("tiny", "logger.push_license=mit", "logger.push=tiny"))
    assert not (tmp_path / "tiny").exists()
    assert not hub.pushed
    run_verb("train", *words("tiny", "logger.push_license=mit", "logger.push_private=true"))
    assert "Pushed run" in capsys.readouterr().out
    assert hub.pushed["me/tiny"].private
    assert content(hub)["model.safetensors"] == (tmp_path / "tiny/model/model.safetensors").read_bytes()
    again = [*words("tiny", "logger.push_license=mit"), f"hydra.run.dir={tmp_path / 'again'}"]
    assert "holds another run" in refused("train", *again)
    # Who repeats a run pushes nothing to where it came from.
    run_verb("resume", tmp_path / "tiny", "--fresh", "--into", tmp_path / "fresh")
    assert len(hub.pushed["me/tiny"].messages) == 2

    hub.failures = [Failure("POST .*/commit/main", 503, 99)]
    shown = refused("train", *words("late", "logger.push_license=mit"))
    assert "the run is finished" in shown
    hub.failures.clear()
    repeat = re.search(r"python -m lmlab.push (.*)", shown)
    assert repeat is not None
    run_verb("push", *repeat[1].split())
    assert hub.pushed["me/late"].messages[1:] == [f"Run {RunDirectory(tmp_path / 'late').read_manifest()['run_id']}"]


def test_a_revision_behind_an_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    """A path is taken as it is, and two revisions have to be one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@home").mkdir()
    for name, revision, meant in (
        ("me/tiny@step-2", None, ("me/tiny", "step-2")),
        ("me/tiny@refs/pr/1", None, ("me/tiny", "refs/pr/1")),
        ("me/tiny@step-2", "step-2", ("me/tiny", "step-2")),
        ("me/tiny", "main", ("me/tiny", "main")),
        ("run@home", None, ("run@home", None)),
        ("./gone@home", None, ("./gone@home", None)),
    ):
        assert split_revision(name, revision) == meant
    assert "contradict" in refused("predict", "me/tiny@step-2", "It", "--revision=main")
    assert "ID@REVISION" in refused("predict", "me/tiny@", "It")


def metadata(card: str) -> dict:
    """The metadata of a card."""
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("words", "name", "pipeline", "auto_class", "says"),
    [
        (TINY_MLM, "masked_perplexity", "fill-mask", "AutoModelForMaskedLM", "It is not the perplexity of the text"),
        pytest.param(
            [*TINY_MLM, "objective=diffusion", "objective.draws=2"],
            "bound_perplexity",
            "fill-mask",
            "AutoModelForMaskedLM",
            "is an upper bound",
            marks=pytest.mark.long,
        ),
    ],
    ids=["masked", "bound"],
)
def test_card(
    words: list[str], name: str, pipeline: str, auto_class: str, says: str, train: Callable[..., Path]
) -> None:
    """A metric goes by the name that it has in the certificate, and the card says what it is."""
    path = train(*words)
    card = build_card(RunDirectory(path), "me/masked", "mit")["README.md"].decode()
    certificate = records.read(path).certificate
    about = metadata(card)
    (results,) = about["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in results["metrics"]}[name] == certificate["figures"][name]
    assert "perplexity" not in [metric["type"] for metric in results["metrics"]]
    assert (about["license"], about["pipeline_tag"], about["library_name"]) == ("mit", pipeline, "transformers")
    assert f'{auto_class}.from_pretrained("me/masked")' in card
    assert says in card
    assert f"{certificate['figures'][name]:,.4f}" in card
    ledger = json.loads((path / "ledger.json").read_text())
    assert f"| tokens | {ledger['train']['tokens']:,} | {ledger['validation']['tokens']:,} |" in card
