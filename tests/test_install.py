"""The wheel, installed where there is no checkout, has all it needs."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_config_and_corpus_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"lmlab/{verb}.txt" for verb in ("train", "evaluate")} <= {*names}
    assert "lmlab/data/sample/askscience.jsonl" in names
    assert not [name for name in names if name.startswith(("tests", "sweeps"))]
    packed = {name.removeprefix("lmlab/") for name in names if name.startswith(("lmlab/conf/", "lmlab/sweep_files/"))}
    files = [path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert packed == {path.relative_to(ROOT).as_posix().replace("sweeps/", "sweep_files/", 1) for path in files}


@pytest.mark.long
def test_installed_wheel_trains_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    """A clean environment: the wheel itself, and the dependencies that are here already."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next(place.glob("lib/*/site-packages"))
    # Only the folder of the dependencies, not the .pth of an editable lmlab that lies in it.
    (site / "dependencies.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tiny = ["model.config.n_embd=32", "tokenizer.vocab_size=300", "trainer.max_steps=2", "logger=file"]
    command = [python, "-m", "lmlab.train", *tiny, "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    where = [python, "-c", "from lmlab.config.files import CONF; print(CONF)"]
    conf = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert conf.strip() == str(site / "lmlab" / "conf")
