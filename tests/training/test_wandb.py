"""Runs in W&B: its own client against a backend on this machine, and offline runs read back by that client."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.conftest import TINY, TINY_MLM, Refused, metrics
from tests.wandb_server import Backend, serving

ROOT = Path(__file__).parents[2]
SHORT = [*(override for override in TINY if override != "logger=file"), "callbacks.samples.count=3"]
SHORT += ["trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a user whom W&B does not know."""
    place = str(tmp_path_factory.mktemp("home"))
    names = ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    return dict.fromkeys(names, place) | {"NETRC": f"{place}/netrc", "HF_HOME": os.environ["HF_HOME"]}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with serving() as server:
        yield server
        assert not server.faults


def verb(name: str, *arguments: object, env: dict[str, str], cwd: Path) -> str:
    """What `python -m lmlab.<name>` prints in a process of its own."""
    command = [sys.executable, "-m", f"lmlab.{name}", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def online(backend: Backend, home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that W&B was told of while it ran. Its learning rate is so high that the last weights are not the best."""
    place = tmp_path_factory.mktemp("online")
    said = ["name=a name", "group=all", "tags=[x,y]", "notes=of mine", "log_model=true", "project=p"]
    overrides = [
        *(f"logger.wandb.{item}" for item in said),
        "optim.lr=1.0",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
    ]
    out = verb("train", *SHORT, *overrides, "hydra.run.dir=run", env=home | backend.environment, cwd=place)
    assert "Traceback" not in out
    assert f"W&B: {backend.url}/me/p/runs/" in out
    return place / "run"


def run_id(run: Path) -> str:
    return json.loads((run / "manifest.json").read_text())["run_id"]


def same_rows(history: list[dict[str, Any]], run: Path, tables: bool = True) -> None:
    """Each row of metrics.jsonl once, under its number, with a table of its samples where it is a validation's."""
    rows = metrics(run)
    assert [row["_step"] for row in history] == list(range(len(rows)))
    for row, line in zip(history, rows, strict=True):
        figures = {name: value for name, value in line.items() if name not in ("step", "time")}
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-9)
        assert row["trainer/global_step"] == line["step"]
        assert not tables or ("samples" in row) == ("val/loss" in line)
        if "samples" in row:
            assert row["samples"]["nrows"] == sum(sample["step"] == line["step"] for sample in samples(run))


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def same_samples(backend: Backend, run: Path) -> None:
    """Each sample once in the tables of the history, and all of them in the summary's."""
    known = backend.runs[run_id(run)]
    found = []
    for of in [*(row["samples"] for row in known.history if "samples" in row), known.summary["samples"]]:
        table = json.loads(backend.files[f"{known.name}/{of['path']}"])
        assert table["columns"] == ["step", "text", "said"]
        found.append(table["data"])
    *each, whole = found
    assert [row for rows in each for row in rows] == whole == [list(sample.values()) for sample in samples(run)]


@pytest.mark.long
def test_a_run_is_known_as_the_config_says(online: Path, backend: Backend) -> None:
    run = backend.runs[run_id(online)]
    names = ("displayName", "groupName", "jobType", "tags", "notes", "project")
    assert [run.facts[name] for name in names] == ["a name", "all", "train", ["x", "y"], "of mine", "p"]
    assert run.exit_code == 0
    config = OmegaConf.to_container(OmegaConf.load(online / "config.yaml"))
    assert {key: run.config[key] for key in config} == config
    assert run.config["optim"]["lr"] == 1.0  # a number, which W&B can compare


@pytest.mark.long
def test_rows_and_tables(online: Path, backend: Backend) -> None:
    same_rows(backend.runs[run_id(online)].history, online)
    same_samples(backend, online)
    assert {sample["step"] for sample in samples(online)} == {0, 2, 4, 6}


@pytest.mark.long
def test_the_summary_holds_the_best_and_the_result(online: Path, backend: Backend) -> None:
    summary = backend.runs[run_id(online)].summary
    result = json.loads((online / "summary.json").read_text())
    losses = [row["val/loss"] for row in metrics(online) if "val/loss" in row]
    assert losses[-1] > 1.01 * min(losses[1:])  # else this would say nothing
    assert {name: summary[name] for name in result} == pytest.approx(result)
    assert result["val/loss"] == min(losses[1:])
    assert {"steps", "tokens", "seconds", "val/bits_per_byte", "val/perplexity_before"} <= summary.keys()
    trained = [row for row in metrics(online) if "train/loss" in row]
    assert summary["train/loss"]["min"] == pytest.approx(min(row["train/loss"] for row in trained))
    speeds = [row["perf/tokens_per_s"] for row in trained]
    assert summary["perf/tokens_per_s"]["mean"] == pytest.approx(sum(speeds) / len(speeds))
    assert summary["optim/lr"] == 1.0


@pytest.mark.long
def test_curves_are_drawn_against_tokens(online: Path, backend: Backend) -> None:
    defined = json.loads(backend.runs[run_id(online)].facts["config"])["_wandb"]["value"]["m"]
    assert all("2" not in metric for metric in defined)  # globs
    axis = next(number for number, metric in enumerate(defined, 1) if metric["1"] == "data/tokens_seen")
    assert {metric.get("5") for metric in defined if metric["1"] != "data/tokens_seen"} == {axis}
    assert {"val/loss", "train/perplexity", "perf/step_ms"} <= {metric["1"] for metric in defined}


@pytest.mark.long
def test_artifacts_say_what_came_of_what(online: Path, backend: Backend) -> None:
    identity = run_id(online)
    kinds = {
        a["artifactTypeName"]: (f"artifact{n}", a)
        for n, a in enumerate(backend.artifacts)
        if a["artifactTypeName"] != "run_table"
    }
    assert set(kinds) == {"dataset", "certificate", "model"}
    assert backend.used == [(identity, kinds["dataset"][0])]
    assert kinds["certificate"][1]["runName"] == kinds["model"][1]["runName"] == identity
    manifest = json.loads((online / "manifest.json").read_text())
    metadata = {kind: json.loads(artifact["metadata"]) for kind, (_, artifact) in kinds.items()}
    for name in ("data_fingerprint", "tokenizer_hash"):
        assert {facts[name] for facts in metadata.values()} == {manifest[name]}
    assert metadata["dataset"]["ledger"] == json.loads((online / "ledger.json").read_text())
    assert metadata["model"]["val/loss"] == json.loads((online / "summary.json").read_text())["val/loss"]
    uploaded = {place.partition("/")[2] for place in backend.files if place.startswith(kinds["model"][0])}
    assert uploaded >= {"model.safetensors", "config.json", "tokenizer.json"}
    for name in ("certificate.json", "records.parquet"):
        assert backend.files[f"{kinds['certificate'][0]}/{name}"] == (online / name).read_bytes()
    assert {p for p in backend.files if p.startswith(kinds["dataset"][0])} == {
        f"{kinds['dataset'][0]}/{n}" for n in ("data.json", "manifest")
    }


@pytest.mark.long
def test_code_and_machine_are_kept(online: Path, backend: Backend) -> None:
    run = backend.runs[run_id(online)]
    git = json.loads((online / "manifest.json").read_text())["git"]
    if git is None:
        pytest.skip("lmlab lies in no checkout here")
    assert run.facts["commit"] == git["commit"]
    events = [json.loads(line) for line in run.files["wandb-events.jsonl"]]
    assert any(name.startswith("system.") for event in events for name in event)
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "HEAD", "--quiet"], check=False).returncode
    assert bool(changed) == (f"{run_id(online)}/diff.patch" in backend.files)


@pytest.mark.long
def test_a_resumed_run_goes_on_with_its_curve(online: Path, backend: Backend, home: dict[str, str]) -> None:
    out = verb("resume", "run", "trainer.max_steps=8", env=home | backend.environment, cwd=online.parent)
    assert "Traceback" not in out
    assert len(backend.runs) == 1
    same_rows(backend.runs[run_id(online)].history, online)
    same_samples(backend, online)
    assert backend.runs[run_id(online)].summary["steps"] == 8


@pytest.mark.longest
def test_a_service_that_dies_costs_nothing(home: dict[str, str], tmp_path: Path) -> None:
    """It answers no more from the first row on; the run ends in its time and says what to do, which then works."""
    with serving() as server:
        ended = Ended(server)
        overrides = [*SHORT, "logger.wandb.patience=2", "hydra.run.dir=run"]
        with ended.after("file_stream"):
            out = verb("train", *overrides, env=home | server.environment, cwd=tmp_path)
        run = tmp_path / "run"
        assert "Traceback" not in out
        assert {row["step"] for row in metrics(run)} == set(range(7))
        assert (run / "summary.json").is_file()
        assert (run / "certificate.json").is_file()
        (command,) = re.findall(r"To send it: (wandb sync .*)", out)
        assert len(server.runs[run_id(run)].history) < len(metrics(run))
        server.out_of_order = False
        sync = [str(Path(sys.executable).with_name("wandb")), *shlex.split(command)[1:]]
        subprocess.run(sync, env=os.environ | home | server.environment, check=True, cwd=tmp_path, capture_output=True)
        same_rows(server.runs[run_id(run)].history, run, tables=False)


class Ended:
    """Puts a backend out of order when it was first asked for something."""

    def __init__(self, server: Backend):
        self.server = server

    def after(self, what: str) -> "Ended":
        answer = self.server.answer

        def answer_and_die(url: str, body: bytes, authorization: str) -> tuple[int, Any]:
            answered = answer(url, body, authorization)
            if what in url:
                self.server.out_of_order = True
            return answered

        self.server.answer = answer_and_die  # type: ignore[method-assign]
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        del self.server.answer


@pytest.mark.long
def test_a_bad_key_leaves_the_run_offline(home: dict[str, str], tmp_path: Path) -> None:
    with serving() as server:
        out = verb(
            "train",
            *SHORT,
            "hydra.run.dir=run",
            env=home | server.environment | {"WANDB_API_KEY": "f" * 40},
            cwd=tmp_path,
        )
        assert out.count("W&B could not be reached") == 1
        assert "error 401" in out
        assert "Traceback" not in out
        assert not server.runs
        (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
        assert f"To upload: wandb sync {folder}" in out
        # What W&B's own client reads in it, the backend then has.
        sync = [str(Path(sys.executable).with_name("wandb")), "sync", str(folder)]
        subprocess.run(sync, env=os.environ | home | server.environment, check=True, cwd=tmp_path, capture_output=True)
        identity = run_id(tmp_path / "run")
        same_rows(server.runs[identity].history, tmp_path / "run")
        same_samples(server, tmp_path / "run")
        kinds = [artifact["artifactTypeName"] for artifact in server.artifacts]
        assert sorted(set(kinds)) == ["certificate", "dataset", "run_table"]
        assert server.used == [(identity, f"artifact{kinds.index('dataset')}")]
        assert not server.faults


@pytest.mark.longest
def test_no_service_at_the_start(home: dict[str, str], tmp_path: Path) -> None:
    with serving() as server:
        nobody = server.environment
    out = verb("train", *SHORT, "hydra.run.dir=run", env=home | nobody, cwd=tmp_path)
    assert out.count("W&B could not be reached") == 1
    assert "To upload: wandb sync" in out
    assert "Traceback" not in out
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.long
def test_each_run_of_a_multirun_is_one(home: dict[str, str], tmp_path: Path) -> None:
    with serving() as server:
        verb("train", "-m", "seed=1,2", *SHORT, "hydra.sweep.dir=sweep", env=home | server.environment, cwd=tmp_path)
        runs = [tmp_path / "sweep" / number for number in "01"]
        assert set(server.runs) == {run_id(run) for run in runs}
        assert len({server.runs[run_id(run)].facts["groupName"] for run in runs}) == 1
        assert len({server.runs[run_id(run)].facts["displayName"] for run in runs}) == 2
        for run in runs:
            same_rows(server.runs[run_id(run)].history, run)


@pytest.mark.longest
def test_two_processes_are_one_run(home: dict[str, str], tmp_path: Path) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    with serving() as server:
        verb("train", *SHORT, *two, "hydra.run.dir=run", env=home | server.environment, cwd=tmp_path)
        (run,) = server.runs.values()
        assert run.name == run_id(tmp_path / "run")
        same_rows(run.history, tmp_path / "run")
        assert {sample["step"] for sample in samples(tmp_path / "run")} == {0, 2, 4, 6}


@pytest.mark.parametrize(
    "name", [pytest.param("lr.yaml", marks=pytest.mark.long), pytest.param("lr_mlm.yaml", marks=pytest.mark.longest)]
)
def test_what_the_agent_of_a_sweep_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B's agent makes the command of the sweep file's template; its run has the id that the agent knows it by."""
    from wandb import wandb_agent

    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb" / name).read_text())
    monkeypatch.chdir(tmp_path)
    given = {"WANDB_SWEEP_ID": "swp", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": "", "WANDB_MODE": "offline"}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    masked = sweep["parameters"].get("objective", {}).get("value") == "mlm"
    tiny = [override for override in (TINY_MLM if masked else TINY) if override != "logger=file"]
    chosen: dict[str, Any] = {key: yaml.safe_load(value) for key, value in (item.split("=") for item in tiny)}
    for key, allowed in sweep["parameters"].items():
        chosen[key] = allowed.get("value", allowed.get("values", [allowed.get("min")])[0])
    agent = object.__new__(wandb_agent.Agent)  # without the service that would tell it what to run
    vars(agent).update(_in_jupyter=False, _function=None, _forward_signals=False, _run_processes={})
    agent._sweep_command = sweep["command"]
    args = {key: {"value": value} for key, value in chosen.items()}
    agent._command_run({"type": "run", "run_id": "1a2b3c4d", "program": sweep["program"], "args": args})
    assert agent._run_processes["1a2b3c4d"].wait() == 0
    run = tmp_path / "outputs" / "swp" / "1a2b3c4d"
    assert run_id(run) == "1a2b3c4d"
    config = OmegaConf.load(run / "config.yaml")
    assert config.optim.lr == chosen["optim.lr"]
    assert [folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")] == ["1a2b3c4d"]
    assert sweep["metric"]["name"] in metrics(run)[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [("against=token", 'Did you mean "tokens"?'), ("patience=0", "it has to be a number, more than 0")],
)
def test_what_is_refused(override: str, says: str, refused: Refused, tmp_path: Path) -> None:
    assert says in refused("train", *SHORT, f"logger.wandb.{override}", f"hydra.run.dir={tmp_path / 'run'}")
