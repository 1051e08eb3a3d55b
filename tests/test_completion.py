"""Completion in real shells: what is installed by one line of their start file offers what Hydra knows."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .conftest import HOME

PYTHON = Path(sys.executable).parent
# What is typed, what is offered, and what is not.
CASES = [
    ("train optim=ad", ["optim=adamw"], []),
    (
        "train objective=",
        [f"objective={name}" for name in ("clm", "diffusion", "fim", "hybrid", "mlm", "prefix")],
        ["optim"],
    ),
    ("train trainer.max_", ["trainer.max_epochs=", "trainer.max_steps="], ["trainer.devices="]),
    (
        "train -m objective=mlm optim.lr=1,2 objective.repl",
        ["objective.replace_mask=", "objective.replace_random="],
        [],
    ),
    ("train experiment=eli5_c", ["experiment=eli5_clm"], ["experiment=eli5_mlm"]),
    ("preview callbacks=", ["callbacks=default", "callbacks=early_stopping"], []),
    ("evaluate sco", ["score="], []),
    ("evaluate score=", ["score=labels", "score=pseudo"], []),
    ("evaluate context=s", ["context=sliding"], ["context=blocks"]),
    ("evaluate check=", ["check=true", "check=false"], []),
    ("train compile=t", ["compile=true"], ["compile=false"]),
    ("train trainer.precision=bf", ["trainer.precision=bf16-mixed", "trainer.precision=bf16-true"], []),
    ("evaluate outputs/run data=sample sco", ["score="], []),
    ("evaluate -m model=outputs/a,outputs/b sco", ["score="], []),
]
# How a command may be written.
FORMS = ["python -m lmlab.train", "python -m lmlab train", "lmlab train"]
FORMS += [f"CUDA_VISIBLE_DEVICES=0 A= {form}" for form in FORMS]


@cache
def scripts() -> Path:
    """A folder with the console script, which an installation from long ago may lack."""
    folder = Path(HOME) / "scripts"
    folder.mkdir()
    (folder / "lmlab").write_text(f"#!{sys.executable}\nfrom lmlab.__main__ import main\nmain()\n")
    (folder / "lmlab").chmod(0o755)
    return folder


def bash(line: str) -> list[str]:
    """The words that bash would leave on the line: it completes what lies behind the last = alone."""
    script = f"""
eval "$(python -m lmlab.train -sc install=bash)"
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
_lmlab
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    word = line.rpartition(" ")[2]
    before, is_value, _ = word.rpartition("=")
    return [f"{before}={said}" if is_value else said for said in shell("bash", "--norc", "-c", script) if said]


def fish(line: str) -> list[str]:
    script = f"python -m lmlab.train -sc install=fish | source; complete --do-complete {line!r}"
    return [said.partition("\t")[0] for said in shell("fish", "--no-config", "-c", script)]


def zsh(line: str) -> list[str]:
    """zsh completes in a function of its line editor alone; there, `compadd` tells what it is given."""
    script = """
autoload -Uz compinit && compinit -D
eval "$(python -m lmlab.train -sc install=zsh)"
compadd() { while [[ $1 != -- ]]; do shift; done; shift; print -l -- "$@"; return 0 }
words=(${=LINE}) CURRENT=$#words PREFIX=$words[-1]
_lmlab
"""
    return shell("zsh", "-f", "-c", script, LINE=line)


def shell(*command: str, **variables: str) -> list[str]:
    """The lines that a shell prints, with this Python in front on its path."""
    env = os.environ | {"PATH": f"{scripts()}:{PYTHON}:{os.environ['PATH']}", "TERM": "xterm"} | variables
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


SHELLS = [
    pytest.param(
        call, marks=pytest.mark.skipif(not shutil.which(call.__name__), reason=f"{call.__name__} is not installed")
    )
    for call in (bash, zsh, fish)
]


@pytest.mark.parametrize("complete", SHELLS)
@pytest.mark.parametrize(("line", "offered", "others"), CASES)
def test_candidates(complete: Callable[[str], list[str]], line: str, offered: list[str], others: list[str]) -> None:
    found = complete(f"python -m lmlab.{line}")
    assert set(offered) <= set(found)
    word = line.rpartition(" ")[2]
    assert all(said.startswith(word) for said in found)
    assert not set(others) & set(found)


@pytest.mark.parametrize("complete", SHELLS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(complete: Callable[[str], list[str]], form: str) -> None:
    assert complete(f"{form} optim=ad") == ["optim=adamw"]


@pytest.mark.parametrize("complete", SHELLS)
def test_commands(complete: Callable[[str], list[str]]) -> None:
    assert "train" in [word.strip() for word in complete("lmlab tra")]
    assert "doctor" in [word.strip() for word in complete("A=1 lmlab d")]


@pytest.mark.parametrize(
    ("command", "install"),
    [
        (["bash", "--norc", "-i"], 'eval "$(python -m lmlab.train -sc install=bash)"'),
        (["zsh", "-f", "-i"], 'eval "$(python -m lmlab.train -sc install=zsh)"'),
        (["fish", "--no-config", "-i"], "python -m lmlab.train -sc install=fish | source"),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_tab_key(tmp_path: Path, command: list[str], install: str) -> None:
    """Typed on a terminal: the line is installed, the key pressed, and the completed command run."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    typed = Typed(command, tmp_path)
    try:
        typed.send("echo rea''dy\n", "ready")
        typed.send(f"{install}; echo instal''led\n", "installed")
        typed.send("A=1 python -m lmlab.train optim=ad\t", "adamw", "adamw")
        typed.send(" optim.eps=1 --cfg job\n", "_target_: lmlab.optim.AdamW")
        typed.send("lmlab trai\t optim=ad\t", "train", "adamw")
    finally:
        typed.end()


class Typed:
    """A shell on a terminal of its own."""

    def __init__(self, command: list[str], home: Path):
        env = os.environ | {"PATH": f"{scripts()}:{PYTHON}:{os.environ['PATH']}", "HOME": str(home), "TERM": "xterm"}
        env |= {"XDG_CONFIG_HOME": str(home), "XDG_DATA_HOME": str(home), "HISTFILE": ""}
        self.said = ""
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(home)
            os.execvpe(command[0], command, env)

    def send(self, text: str, *awaited: str) -> None:
        """Type, and wait until each of `awaited` is on the terminal since."""
        seen = len(self.said)
        os.write(self.terminal, text.encode())
        until = time.monotonic() + 30
        while not all(word in self.said[seen:] for word in awaited):
            assert time.monotonic() < until, self.said
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.said += os.read(self.terminal, 65536).decode(errors="replace")

    def end(self) -> None:
        os.close(self.terminal)  # which hangs it up
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_other_commands_are_left_alone() -> None:
    """Nothing is offered for what is no verb of lmlab, and nothing is printed on the way."""
    assert bash("python -m http.ser") == []
    assert bash("python -m lmlab.train optim=nothing_like_it") == []


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_install_needs_no_hydra(name: str) -> None:
    """A start file is read at each new shell: what it prints is the script alone, and whole."""
    command = [sys.executable, "-m", "lmlab.train", "-sc", f"install={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    script = Path(__file__).parent.parent / "lmlab" / "config" / f"completion.{name}"
    assert done.stdout == script.read_text()
