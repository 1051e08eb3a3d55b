"""Loading from the Hugging Face hub, through its real clients, from a hub on this machine.

Each command is a process of its own: the clients read their settings when they are imported.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

import lmlab
from lmlab.config.files import CONF
from lmlab.data.sources import SAMPLE
from lmlab.data.tokenizers import bpe
from lmlab.models.loading import from_scratch

from .conftest import metrics
from .hub_server import Failure, Hub, Repositories, serving

Command = Callable[..., subprocess.CompletedProcess[str]]

GUIDE_DATA = OmegaConf.load(CONF / "data/eli5.yaml").path
GUIDE_MODEL = OmegaConf.load(CONF / "model/distilroberta.yaml").name
SHORT = ["lmlab.train", "preprocess.block_size=32", "trainer.max_steps=2", "logger=file"]
ELI5 = [
    "data=hub",
    "data.path=me/tiny-eli5",
    "data.text=answers.text",
    "data.train='train[:40]'",
    "data.filter={subreddit: askscience}",
]
RECORDS = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()[:48]]
for record in RECORDS[::3]:
    record["subreddit"] = "explainlikeimfive"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Repositories:
    """Stand-ins for a data set, two models and an adapter of the hub, under ids of ours and the guide's."""
    root = tmp_path_factory.mktemp("repositories")
    data, gpt2, roberta, lora = root / "eli5", root / "gpt2", root / "roberta", root / "lora"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    tokenizer = bpe((text for record in RECORDS for text in record["answers"]["text"]), 400)
    # Less than an answer has, and no multiple of the block size: the guide's truncation and drops show.
    tokenizer.model_max_length = 60
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 66}
    model = from_scratch(tokenizer, "AutoModelForCausalLM", "gpt2", sizes)
    model.save_pretrained(gpt2)
    peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).save_pretrained(lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/tiny-gpt2"}))
    from_scratch(tokenizer, "AutoModelForMaskedLM", "roberta", sizes | {"intermediate_size": 32}).save_pretrained(
        roberta
    )
    tokenizer.save_pretrained(gpt2)
    tokenizer.save_pretrained(roberta)
    return {
        "dataset": {"me/tiny-eli5": data, GUIDE_DATA: data},
        "model": {"me/tiny-gpt2": gpt2, "me/tiny-lora": lora, "me/tiny-roberta": roberta, GUIDE_MODEL: roberta},
    }


@pytest.fixture
def hub(repositories: Repositories) -> Iterator[Hub]:
    with serving(repositories) as hub:
        yield hub


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `python -m …` with caches of this test's own, and a hub at `endpoint`."""

    def run(endpoint: str, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        env = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "LMLAB_CACHE": str(tmp_path / "lmlab"),
            "NO_PROXY": "127.0.0.1",
            # Threads of a tiny model only wait for one another where the machine has other work.
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(lmlab.__file__).parents[1]),
        }
        return subprocess.run(
            [sys.executable, "-m", *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def closed_port() -> int:
    """A port of this machine at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def fetched(hub: Hub) -> set[str]:
    """The files that the hub gave out, as `ID/FILE` of a model and `datasets/ID/FILE` of a data set."""
    given = [request.removeprefix("GET /") for request in hub.requests if request.startswith("GET ")]
    return {re.sub("/resolve/[^/]+", "", url) for url in given if "/resolve/" in url}


def ledger(run: Path) -> dict[str, dict[str, int]]:
    return json.loads((run / "ledger.json").read_text())


def vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def assert_plain(done: subprocess.CompletedProcess[str], *named: str) -> None:
    """The command failed in a way that its reader can mend: few lines, which name these things."""
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert 1 <= len(lines) <= 3, done.stderr
    assert lines[0].startswith("error: ")
    for name in named:
        assert name in done.stderr
    # Nor in what goes to the screen or the log besides.
    assert "Traceback" not in done.stdout
    assert "Retrying" not in done.stdout


STREAMED = """
import json, sys
from lmlab.data.sources import load_hub
corpus = load_hub("me/posts", "{title}: {body}", keep_raw=False, **json.loads(sys.argv[1]))
print(json.dumps([corpus.fingerprint, corpus.train.column_names, corpus.train["body"][:]]))
"""


@pytest.mark.parametrize(
    "kind", [pytest.param("jsonl", marks=pytest.mark.longest), pytest.param("parquet", marks=pytest.mark.long)]
)
def test_stream(kind: str, tmp_path: Path) -> None:
    """A hub that is busy, and a line that breaks: each record comes once, no raw file stays, a commit needs no hub."""
    rows = [{"title": f"t{i}", "body": f"{i} " + "words " * 40, "lang": "de" if i % 3 else "en"} for i in range(3000)]
    data, home = tmp_path / "posts", tmp_path / "huggingface"
    data.mkdir()
    if kind == "jsonl":
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "train.parquet", row_group_size=500)

    def load(endpoint: str, **options: object) -> tuple[str, list[str], list[str]]:
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(lmlab.__file__).parents[1])}
        words = [sys.executable, "-c", STREAMED, json.dumps(options)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    file = "GET /datasets/me/posts/resolve/.*/train.*"
    with serving({"dataset": {"me/posts": data}}) as hub:
        hub.failures = [
            Failure("GET /api/datasets/me/posts", 429, headers={"Retry-After": "1"}),
            Failure("GET /api/datasets/me/posts/revision/.*", 429, headers={"Retry-After": "1"}),
            Failure(file, 429, headers={"Retry-After": "1"}, passed=1),
            Failure(file, -2),
        ]
        began = time.monotonic()
        made, columns, bodies = load(hub.endpoint, filter={"lang": "en"})
        assert time.monotonic() - began > 3  # it waited as it was told
        assert bodies == [row["body"] for row in rows[::3]]
        assert columns == ["title", "body"]
        assert [failure.times for failure in hub.failures] == [0, 0, 0, 0]
        assert load(hub.endpoint, train="train[2990:2998]")[2] == [row["body"] for row in rows[2990:2998]]
        commit = hub.commit("dataset", "me/posts")
        again = len(hub.requests)
        assert load(hub.endpoint, filter={"lang": "en"}, revision=commit) == [made, columns, bodies]
        assert hub.requests[again:] == []
    assert not [*home.rglob(f"train.{kind}")]
    assert len([*home.rglob("lmlab-*/train.arrow")]) == 2


@pytest.mark.longest
def test_causal_run_from_the_hub_and_again_from_its_cache(
    repositories: Repositories, command: Command, tmp_path: Path
) -> None:
    words = [*SHORT, *ELI5, "model=pretrained", "model.name=me/tiny-gpt2"]
    first, again = tmp_path / "first", tmp_path / "again"
    with serving(repositories) as hub:
        done = command(hub.endpoint, *words, f"hydra.run.dir={first}")
        assert done.returncode == 0, done.stderr
    assert fetched(hub) >= {
        "datasets/me/tiny-eli5/train.jsonl",
        "me/tiny-gpt2/config.json",
        "me/tiny-gpt2/tokenizer.json",
        "me/tiny-gpt2/model.safetensors",
    }
    kept = [record for record in RECORDS[:40] if record["subreddit"] == "askscience"]
    documents = sum(counts["documents"] for counts in ledger(first).values())
    assert documents == sum(len(record["answers"]["text"]) for record in kept)
    assert (first / "model/model.safetensors").is_file()
    assert vocabulary(first / "model") == vocabulary(repositories["model"]["me/tiny-gpt2"])
    # What the clients say of each request is not for the reader of a run.
    assert "HTTP Request" not in done.stdout + done.stderr

    # Nobody answers at the endpoint now.
    done = command(hub.endpoint, *words, f"hydra.run.dir={again}", offline=True)
    assert done.returncode == 0, done.stderr
    assert (again / "model/model.safetensors").is_file()
    assert ledger(again) == ledger(first)
    assert metrics(again)[0]["val/loss"] == metrics(first)[0]["val/loss"]


@pytest.mark.longest
def test_masked_run_at_a_revision(hub: Hub, command: Command, tmp_path: Path) -> None:
    commit = hub.commit("model", "me/tiny-roberta")
    model = ["objective=mlm", "model=pretrained", "model.name=me/tiny-roberta", f"model.revision={commit}"]
    done = command(hub.endpoint, *SHORT, *ELI5, *model, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert fetched(hub) >= {"me/tiny-roberta/tokenizer.json", "me/tiny-roberta/model.safetensors"}
    assert not [request for request in hub.requests if "tiny-roberta" in request and "/main" in request]
    exported = json.loads((tmp_path / "run/model/config.json").read_text())
    assert exported["architectures"] == ["RobertaForMaskedLM"]


@pytest.mark.long
def test_the_guides_masked_experiment(hub: Hub, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(hub.endpoint, *SHORT, "experiment=eli5_mlm", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert fetched(hub) >= {f"datasets/{GUIDE_DATA}/train.jsonl", f"{GUIDE_MODEL}/model.safetensors"}
    assert (run / "model/model.safetensors").is_file()
    # One document a record, and of the records only those of r/askscience.
    assert sum(counts["documents"] for counts in ledger(run).values()) == 32
    for counts in ledger(run).values():
        assert counts["tokens_truncated"] > 0
        assert counts["tokens_dropped"] > 0
        assert counts["tokens"] == 32 * counts["blocks"] + counts["tokens_dropped"] + counts["tokens_truncated"]


@pytest.mark.long
def test_predict_with_an_adapter_of_the_hub(hub: Hub, command: Command) -> None:
    done = command(hub.endpoint, "lmlab.predict", "me/tiny-lora", "hello", "--max-new-tokens=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello")
    assert {"me/tiny-lora/adapter_model.safetensors", "me/tiny-gpt2/model.safetensors"} <= set(fetched(hub))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["data=hub", "data.path=me/absent"], marks=pytest.mark.long),
        pytest.param(["model=pretrained", "model.name=me/absent"], marks=pytest.mark.longest),
    ],
    ids=["data", "model"],
)
def test_hub_out_of_reach(words: list[str], command: Command, closed_port: int) -> None:
    endpoint, began = f"http://127.0.0.1:{closed_port}", time.monotonic()
    done = command(endpoint, *SHORT, *words)
    assert time.monotonic() - began < 60
    assert_plain(done, '"me/absent"', endpoint, "local directory", "HF_HUB_OFFLINE=1")


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [[*SHORT, "data=hub", "data.path=me/absent"], ["lmlab.predict", "me/absent", "hello"]],
    ids=["data", "model"],
)
def test_unknown_id(words: list[str], hub: Hub, command: Command) -> None:
    assert_plain(command(hub.endpoint, *words), '"me/absent"', hub.endpoint)
