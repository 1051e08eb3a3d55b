"""The recipes of conf/experiment/ that train from random weights take steps, on stand-ins for their data and sizes."""

import json
from pathlib import Path

import pytest

from lmlab.config.files import CONF
from lmlab.data.tokenizers import bpe

from .conftest import metrics, run_verb

SMALL = {
    "fineweb_edu": ["model.config.n_embd=16", "model.config.n_layer=1", "model.config.n_head=2"],
    "qwen_small": ["head_dim=8"],
    "one_gpu_day": ["head_dim=8"],
    "modern_encoder": [],
    "babylm_strict_small": [],
    "babylm_strict_small_mlm": [],
}
WIDTH = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with two splits of 40 rows, and a tokenizer with a mask."""
    folder: Path = tmp_path_factory.mktemp("hub")
    rows = [{"text": f"Row {number} of a text about rows, of which there are forty."} for number in range(40)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bpe([row["text"] for row in rows], 300).save_pretrained(folder / "tokenizer")
    return folder


def test_all_recipes_are_tested() -> None:
    assert {path.stem for path in (CONF / "experiment").glob("*.yaml")} == {*SMALL, "eli5_clm", "eli5_mlm"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("fineweb_edu", "modern_encoder") else pytest.mark.longest)
        for name in SMALL
    ],
)
def test_recipe_takes_steps(name: str, stand_in: Path, tmp_path: Path) -> None:
    sizes = SMALL[name] if name == "fineweb_edu" else [f"model.config.{size}" for size in (*WIDTH, *SMALL[name])]
    if "llama" in (CONF / "experiment" / f"{name}.yaml").read_text() or "head_dim=8" in SMALL[name]:
        sizes.append("model.config.num_key_value_heads=2")
    babylm = name.startswith("babylm")
    run_verb(
        "train",
        f"experiment={name}",
        f"data.path={stand_in}",
        *(["tokenizer.vocab_size=300"] if babylm else ["data.name=null", f"tokenizer.name={stand_in / 'tokenizer'}"]),
        *([] if babylm else ["preprocess.test_size=0.4"]),
        *sizes,
        "preprocess.block_size=16",
        "trainer=cpu",
        "trainer.max_steps=2",
        "trainer.accumulate_grad_batches=1",
        "batch_size=2",
        "callbacks.samples.count=0",
        "logger=file",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert "val/loss" in metrics(tmp_path / "run")[-1]
