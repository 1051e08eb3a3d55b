"""No file that lmlab writes holds a secret, and whoever needs one has it all the same."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lmlab import secrets
from lmlab.config.files import CONF
from lmlab.runs import status
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import MARK
from lmlab.sweeps.points import read_sweep
from tests.conftest import TINY, Refused, run_verb

SHORT = [word for word in TINY if word != "logger=file"]
PLANTED = [f"planted-{number}-of-ten" for number in range(10)]
ROUTES = [
    f"+hydra.job.env_set.ANYTHING={PLANTED[0]}",
    f"+hydra.job={{env_set: {{MORE: {PLANTED[1]}}}}}",
    f"+callbacks.keeper={{_target_: keeper.Keeper, api_key: {PLANTED[2]}, "
    f"nested: {{list: [1, {{password: '{PLANTED[3]}'}}]}}}}",
    f"+callbacks.keeper.url=https://me:{PLANTED[4]}@host/there",
    f'++callbacks.keeper.query="https://host/there?token={PLANTED[5]}&page=2"',
    f"+callbacks.keeper.credentials=[{PLANTED[6]}, {PLANTED[7]}]",
    f"+callbacks.keeper.lines='export HF_TOKEN={PLANTED[8]}'",
    f"+callbacks.keeper.dbPassword={PLANTED[9]}",
]
SECRETS = (
    "key api_key apiKey APIKey token HF_TOKEN x.hub-token access_token password dbPassword db.passwd secret "
    "client_secret aws_secret_access_key credentials credential apikey accesstoken auth API_KEY_2 x.secret_key "
    "hf_tokens secret_value keys aws_access_key_id key_value bearer credentials_json token_list db.pwd pwds apiKeys "
    "image_api_key cache_key_secret passphrases"
)
OTHERS = (
    "bos_token eos_token pad_token mask_token unk_token cls_token sep_token special_tokens num_key_value_heads "
    "max_new_tokens data/tokens_seen tokenizer tokens_per_s keyboard monkey sort_key secretary passwords.count "
    "model.config.pad_token pad_token_id eos_token_id additional_special_tokens num_tokens past_key_values token_type "
    "token_type_ids text_keys tokenize_function secretary_name"
)
KEEPER = """
import json, os
from lightning.pytorch.callbacks import Callback

class Keeper(Callback):
    def __init__(self, fails=False, **given):
        self.given, self.fails = given, fails

    def on_train_start(self, trainer, module):
        with open(os.environ["KEPT"], "a") as file:
            print(json.dumps(self.given), file=file)
        if self.fails:
            raise RuntimeError(f"the service does not know {self.given['api_key']}")
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict]]:
    """Makes the callback importable; returns what each process that ran it had of its arguments."""
    (tmp_path / "keeper.py").write_text(KEEPER)
    monkeypatch.setenv("KEPT", f"{tmp_path}/kept")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("keeper", None)
    importlib.invalidate_caches()

    def read() -> list[dict]:
        lines = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines()]
        (tmp_path / "kept").unlink()
        return lines

    return read


def holding(folder: Path, *words: str) -> set[str]:
    """The files of a folder, however deep, that hold one of some words."""
    assert any(folder.rglob("*"))
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)) for file in found if any(w.encode() in file.read_bytes() for w in words)}


@pytest.mark.parametrize("key", SECRETS.split())
def test_names_of_secrets(key: str) -> None:
    assert secrets.redacted({key: "hunter2"}) == {key: MARK}
    assert secrets.redacted({"a": [{key: "hunter2"}]}) == {"a": [{key: MARK}]}
    assert secrets.redacted_command([f"+a.{key}=hunter2"]) == [f"+a.{key}={MARK}"]
    assert secrets.redacted({key: None}) == {key: None}
    assert secrets.redacted({key: ""}) == {key: ""}
    assert secrets.redacted_command([f"{key}=${{oc.env:MY_KEY}}"]) == [f"{key}=${{oc.env:MY_KEY}}"]
    assert secrets.redacted_command([f"{key}=${{oc.env:MY_KEY,hunter2}}"]) == [f"{key}={MARK}"]


@pytest.mark.parametrize("key", OTHERS.split())
def test_names_of_others(key: str) -> None:
    assert secrets.redacted({key: "<s>"}) == {key: "<s>"}
    assert secrets.redacted_command([f"{key}=some"]) == [f"{key}=some"]


def test_numbers_under_a_key_are_secrets_where_it_is_a_password() -> None:
    assert secrets.redacted({"password": 123, "token": 4}) == {"password": MARK, "token": 4}
    assert secrets.redacted_command(["a.password=123", "a.token=4"]) == [f"a.password={MARK}", "a.token=4"]


def test_nothing_that_ships_looks_like_a_secret() -> None:
    for file in [*CONF.rglob("*.yaml"), *(CONF.parent / "sweeps").rglob("*.yaml")]:
        config = OmegaConf.to_container(OmegaConf.load(file))
        if file.name != "slurm.yaml":
            assert secrets.redacted(config) == config, file


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("a=postgresql://user:pw@host/db", f"a=postgresql://user:{MARK}@host/db"),
        ("a=postgresql+psycopg2://user:p/w@ss@host:5432/db", f"a=postgresql+psycopg2://user:{MARK}@host:5432/db"),
        ("a=postgresql://user:some pw@host/db", f"a=postgresql://user:{MARK}@host/db"),
        ("a='host=h password=pw'", f"a='host=h password={MARK}'"),
        ('a=\'{"api_key": "p, w"}\'', f'a=\'{{"api_key": "{MARK}"}}\''),
        ("a='https://h/x?page=1&access_token=pw#top'", f"a='https://h/x?page=1&access_token={MARK}#top'"),
        ("a=https://h/x?token\\=pw", f"a=https://h/x?token\\={MARK}"),
        ("a=https://pw@github.com/x", f"a=https://{MARK}@github.com/x"),
        ("a=[https://u:pw@h/1,https://u:pw@h/2]", f"a=[https://u:{MARK}@h/1,https://u:{MARK}@h/2]"),
        ("a=postgresql://u:${oc.env:PW}@h/db", None),
        ("a=http://localhost:8080/@scope", None),
        ("a=ssh://git@github.com/x", None),
        ("a=sqlite:////somewhere/study.db", None),
        ("hydra.job.env_set={A: pw,N: 4}", f"hydra.job.env_set={{A: {MARK},N: 4}}"),
        ("+hydra={job: {env_set: {A: pw}}}", f"+hydra={{job: {{env_set: {{A: {MARK}}}}}}}"),
        ("hydra.launcher.setup=[module load x,'export A=pw']", f"hydra.launcher.setup=[{MARK},'{MARK}']"),
        ("~a.api_key=pw", f"~a.api_key={MARK}"),
        ("--api-key=pw", f"--api-key={MARK}"),
        ("a='key=4 is text, and HF_TOKEN=pw is not'", f"a='key=4 is text, and HF_TOKEN={MARK} is not'"),
        ("a={_target_: b.C, api_key: pw", f"a={{_target_: b.C,api_key: {MARK}"),
        ("a={b: {c: 1, api_key: pw}", f"a={{b: {{c: 1,api_key: {MARK}}}"),
        ("a={api_key: pw}}", f"a={{api_key: {MARK}}}}}"),
        ("a.tokens=choice(1,2)", None),
        ("a.token=choice(pw,pw)", f"a.token={MARK},{MARK}"),
        (
            "a={n: choice(1, 2), url: 'x://u:p(w)@h', token: [1,pw]}",
            f"a={{n: choice(1,2),url: 'x://u:{MARK}@h',token: [1,{MARK}]}}",
        ),
        ("a=x://u:p(w)@h", f"a=x://u:{MARK}@h"),
        ("a={b:{c:1,token:pw}}", f"a={{b: {{c: 1,token: {MARK}}}}}"),
        ("a.api_key={pw", f"a.api_key={MARK}"),
        ("a.api_key={pw}", f"a.api_key={{{MARK}}}"),
        ("a.api_key=p(w", f"a.api_key={MARK}"),
        ("a.keys=[pw,pw", f"a.keys={MARK}"),
        ("a.tokens=[pw,4]", f"a.tokens=[{MARK},4]"),
        ("a='Authorization: Bearer pw'", f"a='Authorization: Bearer {MARK}'"),
        ('a=\'{"Authorization": "Basic pw"}\'', f'a=\'{{"Authorization": "{MARK}"}}\''),
        ("a='curl -H \"X-Api-Key: pw\" x'", f"a='curl -H \"X-Api-Key: {MARK}\" x'"),
        ("a='run --password pw --max-new-tokens some'", f"a='run --password {MARK} --max-new-tokens some'"),
        ("a='Server=x;Pwd=pw;'", f"a='Server=x;Pwd={MARK};'"),
        ("a='Account=x;AccountKey=pw;'", f"a='Account=x;AccountKey={MARK};'"),
        ("a='password: pw'", f"a='password: {MARK}'"),
        ("a=u:pw@h", f"a=u:{MARK}@h"),
        ("/there/https:/u:pw@h/x", f"/there/https:/u:{MARK}@h/x"),
        ("a=mailto:me@x.org", None),
        ("a=image:1.2@sha256:12ab", None),
        ("a='sorted(rows, key=len), tokens=512, bearer of news'", None),
        ("a='eos_token: </s>, token_type_ids=token_type_ids'", None),
        ("a.token={_target_: b.C,every: pw}", None),
        ("a={}", None),
        ("optim.lr=tag(log, interval(1e-4,1e-2))", None),
        ("some text, with = in it", None),
    ],
)
def test_words_of_a_command(word: str, shown: str | None) -> None:
    assert secrets.redacted_command([word]) == [shown or word]
    assert secrets.redacted_command([shown or word]) == [shown or word]


def test_a_word_behind_an_option() -> None:
    words = ["--password", "pw", "--api-key", "pw", "--max-new-tokens", "4", "--token", "--json", "x"]
    shown = ["--password", MARK, "--api-key", MARK, "--max-new-tokens", "4", "--token", "--json", "x"]
    assert secrets.redacted_command(words) == shown


def test_a_word_and_the_config_it_makes_are_redacted_alike() -> None:
    word = """+a={api_key: 'x, "y": {z} [', n: [{token: x-y}, 'plain, {text}'], url: "a://u:p,w@h", deep: {}, m: 1.5}"""
    made, shown = (
        OverridesParser.create().parse_override(w).value() for w in (word, *secrets.redacted_command([word]))
    )
    assert shown == secrets.redacted(made)
    assert made["n"] == [{"token": "x-y"}, "plain, {text}"]
    assert shown["n"] == [{"token": MARK}, "plain, {text}"]


def test_messages() -> None:
    assert secrets.redacted_text("the study a://u:pw@h/d: key 'x'") == f"the study a://u:{MARK}@h/d: key 'x'"
    secrets.redacted({"api_key": "of-this-very-test"})
    assert secrets.redacted_text("what is of-this-very-test?") == f"what is {MARK}?"
    assert secrets.redacted_text("a.api_key=pw is none") == f"a.api_key={MARK} is none"
    assert secrets.redacted_text(f"a.api_key={MARK}: is none") == f"a.api_key={MARK}: is none"
    others = "mask token: <mask>, KEY=VALUE, add a.api_key=… to it, http://a.b:80 and me@x, logits_chunk_size='1'"
    assert secrets.redacted_text(others) == others


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", ["+callbacks.x={_target_: mycb.CB, api_key: SEKRET0040"]),
        ("train", ['+callbacks.x.api_key=SEKRET004"1']),
        ("train", ["+callbacks.x.api_key=SEK'RET"]),
        ("train", ["+callbacks.x={_target_:", "mycb.CB,", "api_key:", "SEKRET}"]),
        ("train", ["+callbacks.x={api_key:", "SEKRET}"]),
        ("train", ["+callbacks.x.api_key=", "SEKRET"]),
        ("train", ["+callbacks.x.api_key", "=", "SEKRET"]),
        ("train", ["+callbacks.x.api_key", "SEKRET"]),
        ("train", ["+callbacks.x.api_key=first", "SEKRET!"]),
        ("train", ["+hydra.job.env_set.FOO=SEK,RET0045"]),
        ("train", ["+hydra.job.env_set.FOO=[SEKRET0047]"]),
        ("train", ["trainer.api_key=SEKRET"]),
        ("train", ["+trainer.max_steps.api_key=SEKRET"]),
        ("train", ["trainer.max_steps=https://a:SEKRET@x/"]),
        ("train", ["trainer.devices=https://a:SEKRET@x/"]),
        ("train", ["data.train=https://a:SEKRET@x/"]),
        ("train", ["data=https://a:SEKRET@x/"]),
        ("preview", ['+callbacks.x.api_key=SEKRET004"1']),
        ("evaluate", ["https://a:SEKRET@host/x"]),
        ("predict", ["https://a:SEKRET@host/x", "a text"]),
        ("resume", ["https://a:SEKRET@host/x"]),
        ("report", ["https://a:SEKRET@host/x"]),
        ("sweep", ["resume", "https://a:SEKRET@host/x"]),
    ],
)
def test_no_error_shows_one(refused: Refused, verb: str, words: list[str]) -> None:
    said = refused(verb, *words)
    assert not re.search("SEK|RET", said), said


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize(
    ("launcher", "devices"),
    [
        pytest.param([], 1, marks=pytest.mark.longest, id="alone"),
        pytest.param([], 2, marks=pytest.mark.long, id="ranks"),
        pytest.param(TORCHRUN, 2, marks=pytest.mark.longest, id="torchrun"),
    ],
)
def test_ranks_have_what_no_file_holds(
    launcher: list[str],
    devices: int,
    kept: Callable[[], list[dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted by every route, in a run that W&B follows, and in a report on it."""
    run, wide = tmp_path / "run", ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"]
    command = [sys.executable, *launcher, "-m", "lmlab.train", *SHORT, *wide, *ROUTES, f"hydra.run.dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    given = {
        "api_key": PLANTED[2],
        "nested": {"list": [1, {"password": PLANTED[3]}]},
        "url": f"https://me:{PLANTED[4]}@host/there",
        "query": f"https://host/there?token={PLANTED[5]}&page=2",
        "credentials": [PLANTED[6], PLANTED[7]],
        "lines": f"export HF_TOKEN={PLANTED[8]}",
        "dbPassword": PLANTED[9],
    }
    assert kept() == [given] * devices
    assert not holding(run, *PLANTED)
    expected = {"manifest.json", "certificate.json", "config.yaml", "overrides.yaml"}
    assert expected <= holding(run, MARK)
    assert any(name.endswith(".wandb") for name in holding(run, MARK))
    if devices > 1:
        return
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lmlab.report", f"a.api_key={PLANTED[0]}"])
    run_verb("report", run, "--out", tmp_path / "study")
    assert not holding(tmp_path / "study", *PLANTED)
    assert "report.html" in holding(tmp_path / "study", "callbacks.keeper.dbPassword=***secret***")


@pytest.mark.long
def test_going_on_takes_a_secret_again(
    train: Callable[..., Path],
    kept: Callable[[], list[dict]],
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = [f"+callbacks.keeper={{_target_: keeper.Keeper, api_key: {PLANTED[0]}}}"]
    run = train(*TINY, *keeper)
    again = [*TINY, *keeper, f"hydra.run.dir={run}"]
    said = refused("resume", run, "trainer.max_steps=6", "trust=keeper")
    assert "callbacks.keeper.api_key held a secret" in said
    assert "add callbacks.keeper.api_key=… to the command" in said
    assert "callbacks.keeper.api_key=…" in refused("resume", run, "--fresh", "--into", tmp_path / "b", "trust=keeper")
    assert not (tmp_path / "b").exists()
    run_verb("resume", run, "trainer.max_steps=6", "callbacks.keeper.api_key=another-one", "trust=keeper")
    monkeypatch.setenv("OF_TEST", "the-third")
    words = ["callbacks.keeper.api_key=${oc.env:OF_TEST}", "--into", tmp_path / "b", "trust=keeper"]
    run_verb("resume", run, "--fresh", *words)
    run_verb("train", *again, "trainer.max_steps=8")
    assert [given["api_key"] for given in kept()] == [PLANTED[0], "another-one", "the-third", PLANTED[0]]
    assert not holding(run, PLANTED[0], "another-one")
    assert not holding(tmp_path / "b", "another-one", "the-third")
    # What stands for a secret is never taken for one.
    shown = json.loads((run / "manifest.json").read_text())["command"]
    assert "callbacks.keeper" in refused("train", *TINY, *secrets.redacted_command(keeper)), shown


@pytest.mark.long
def test_a_secret_that_makes_the_experiment_may_be_another(
    train: Callable[..., Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same directory; and an evaluation of the run is given it by +KEY."""
    code = "from lmlab.data import sources\ndef load(text, token=None):\n    return sources.load_sample(text)\n"
    (tmp_path / "behind_a_door.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    data = ["data._target_=behind_a_door.load"]
    run = train(*TINY, *data, f"+data.token={PLANTED[0]}")
    train(*TINY, *data, "+data.token=another-one", "trainer.max_steps=6")
    said = refused("evaluate", f"model={run}", "trust=behind_a_door", f"hydra.run.dir={tmp_path}/e")
    assert "data.token held a secret" in said
    assert "+data.token=…" in said
    words = [f"model={run}", "trust=behind_a_door", f"+data.token={PLANTED[0]}", f"hydra.run.dir={tmp_path}/e"]
    run_verb("evaluate", *words)
    assert not holding(tmp_path / "e", PLANTED[0])
    assert not holding(run, PLANTED[0], "another-one")


def test_what_ends_a_run_is_kept_without_it(
    train: Callable[..., Path], kept: Callable[[], list[dict]], tmp_path: Path
) -> None:
    keeper = f"+callbacks.keeper={{_target_: keeper.Keeper, api_key: {PLANTED[0]}, fails: true}}"
    with pytest.raises(RuntimeError, match=PLANTED[0]):
        train(*TINY, keeper)
    run = RunDirectory(tmp_path / "run")
    assert status.read_status(run).message == f"RuntimeError: the service does not know {MARK}"
    assert not holding(run.path, PLANTED[0])


@pytest.mark.long
def test_a_search_by_a_database_with_a_password(
    kept: Callable[[], list[dict]], tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs report to the study, and no file has what it takes to reach it."""
    storage = f"sqlite+pysqlite:///file:{tmp_path}/study.db?uri=true&token={PLANTED[0]}"
    folder = tmp_path / "search"
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "optim.lr=1e-3,3e-3"]
    words += [*TINY, f'hydra.sweeper.storage="{storage}"', f"hydra.sweep.dir={folder}"]
    words += [f"+callbacks.keeper={{_target_: keeper.Keeper, api_key: {PLANTED[1]}}}"]
    run_verb("train", *words)
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(storage=storage, study_name=study.study_name).trials
    assert [len(trial.intermediate_values) for trial in trials] == [1]
    assert not holding(folder, *PLANTED)
    assert not re.search("|".join(PLANTED), capsys.readouterr().out)
    again = ["resume", folder, "hydra.sweeper.n_trials=2"]
    said = refused("sweep", *again)
    assert "hydra.sweeper.storage, callbacks.keeper held a secret" in said
    more = [f'hydra.sweeper.storage="{storage}"', f"callbacks.keeper.api_key={PLANTED[2]}"]
    run_verb("sweep", *again, *more)
    trials = optuna.load_study(storage=storage, study_name=study.study_name).trials
    assert [len(trial.intermediate_values) for trial in trials] == [1, 1]
    assert [given["api_key"] for given in kept()] == [PLANTED[1], PLANTED[2]]
    assert not holding(folder, *PLANTED)
    run_verb("train", *words, "hydra.sweeper.n_trials=2")  # the command itself, again
    nowhere = f"hydra.sweeper.storage=postgresql://me:{PLANTED[3]}@host/db"
    assert PLANTED[3] not in refused("train", *words, nowhere, f"hydra.sweep.dir={tmp_path}/other")


def test_a_secret_is_not_swept_over(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    said = refused("train", "-m", *TINY, "+callbacks.keeper.api_key=a,b", f"hydra.sweep.dir={folder}")
    assert "callbacks.keeper.api_key is a secret" in said
    assert not read_sweep(folder)
