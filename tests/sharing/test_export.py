"""Exported models, read as their readers do; and models in GGUF files, trained and measured as any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmlab.data.tokenizers import bpe, char
from lmlab.data.tokenizers import pretrained as read_tokenizer
from lmlab.errors import UserError
from lmlab.models.loading import auto_class_of, from_scratch, pretrained
from lmlab.sharing import check
from lmlab.sharing import gguf as to_gguf
from lmlab.sharing import onnx as to_onnx
from tests.conftest import TINY, Refused, run_verb

BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "bart": {"d_model": 32, "max_position_embeddings": 80}
    | {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in BART.items()},
}
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
GROUPED = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 80}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe(check.sample_texts(), 300)


def make(
    tokenizer: PreTrainedTokenizerBase, architecture: str, task: str = "CausalLM", **config: Any
) -> PreTrainedModel:
    """A model whose weights are large enough for a wrong one to show, norms and biases included."""
    torch.manual_seed(0)
    model = from_scratch(tokenizer, f"AutoModelFor{task}", architecture, SIZES.get(architecture, SIZE) | config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ids_and_mask(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random ids, with padding behind all rows but the first."""
    ids, mask = np.random.default_rng(0).integers(3, 300, (batch, length)), np.ones((batch, length), np.int64)
    mask[1:, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.long
def test_onnx_of_a_decoder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the command; onnxruntime gives the logits of batches of other shapes than those it was traced with."""
    model = make(tokenizer, "gpt2")
    folder = saved(model, tokenizer, tmp_path / "model")
    out = tmp_path / "new" / "onnx"
    run_verb("export", folder, "onnx", "--output", out)
    assert "model.onnx gives the model's logits on ten texts: the largest difference is" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [one.shape for one in session.get_inputs()] == 2 * [["batch", "sequence"]]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    for batch, length in ((1, 1), (1, 64), (3, 7)):
        inputs = ids_and_mask(batch, length)
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.detach().numpy()
        (logits,) = session.run(None, inputs)
        seen = inputs["attention_mask"] == 1
        np.testing.assert_allclose(logits[seen], expected[seen], atol=1e-5)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert AutoTokenizer.from_pretrained(out)("one text").input_ids == tokenizer("one text").input_ids


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        pytest.param("llama", "CausalLM", marks=pytest.mark.longest),
        pytest.param("roberta", "MaskedLM", marks=pytest.mark.longest),
        pytest.param("modernbert", "MaskedLM", marks=pytest.mark.long),
        pytest.param("bart", "Seq2SeqLM", marks=pytest.mark.longest),
    ],
)
def test_onnx(architecture: str, task: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert to_onnx.write(make(tokenizer, architecture, task), tokenizer, tmp_path / "onnx") < 1e-5


@pytest.mark.long
def test_what_can_not_be_traced_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(tokenizer, "gpt2")

    def by_length(input_ids: torch.Tensor, **unused: Any) -> Any:
        raise ValueError(f"one path for each of {input_ids.shape[1]} tokens")

    model.forward = by_length
    with pytest.raises(UserError, match=r"can't write gpt2 as ONNX: .*\nIt can write bart, bert, gpt2, llama"):
        to_onnx.write(model, tokenizer, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", {}),
        ("llama", {**GROUPED, "tie_word_embeddings": True}),
        ("llama", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
        ("qwen2", GROUPED),
        ("qwen3", GROUPED | {"head_dim": 8}),
    ],
)
def test_gguf(architecture: str, config: dict, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What transformers reads is the model and its tokenizer; lmlab's own loading makes a model that saves."""
    model = make(tokenizer, architecture, **config)
    assert to_gguf.write(model, tokenizer, tmp_path / "gguf") < 1e-6
    path = tmp_path / "gguf" / "model.gguf"
    read = pretrained("AutoModelForCausalLM", str(path))
    assert auto_class_of(read.config, "x") == "AutoModelForCausalLM"
    read.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "A text, in 2024.\n\n  Ünïcode<|endoftext|>"
    assert theirs(text).input_ids == tokenizer(text).input_ids
    assert (theirs.eos_token, theirs.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_gguf_has_llamas_rotary_pairs_side_by_side(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Rows 0 and D / 2 of a head, which transformers turns together, are rows 0 and 1 in llama.cpp."""
    model = make(tokenizer, "llama", **GROUPED)
    to_gguf.write(model, tokenizer, tmp_path / "gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    ours = model.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    np.testing.assert_array_equal(
        tensors["blk.1.attn_k.weight"], ours[[0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]]
    )


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("gpt2", {"activation_function": "relu"}, "its logits differ by up to"),
        ("gpt2", {"n_inner": 48}, "weights of other sizes"),
        ("llama", {"attention_bias": True}, "its logits differ by up to"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=linear"),
        ("mistral", GROUPED, "MistralForCausalLM can't be .* these architectures can: gpt2, llama, qwen2, qwen3"),
        ("modernbert", {"task": "MaskedLM"}, "ModernBertForMaskedLM can't be"),
    ],
)
def test_gguf_of_what_it_can_not_hold_is_refused(
    architecture: str, config: dict, says: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        to_gguf.write(make(tokenizer, architecture, **config), tokenizer, tmp_path / "gguf")


def test_gguf_of_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    of_bytes = bpe(["a"], 259)
    with pytest.raises(UserError, match="the tokenizer has no merges"):
        to_gguf.write(make(of_bytes, "gpt2"), of_bytes, tmp_path / "gguf")


def test_a_tokenizer_that_gguf_can_not_hold(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, refused: Refused
) -> None:
    """Nothing of an export that is refused stays, not even a folder."""
    letters = char(check.sample_texts())
    folder = saved(make(letters, "gpt2"), letters, tmp_path / "model")
    assert "only byte-level BPE can" in refused("export", folder, "gguf", "--output", tmp_path / "new" / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def file(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 as a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    to_gguf.write(make(tokenizer, "gpt2"), tokenizer, folder / "gguf")
    return folder / "gguf" / "model.gguf"


def test_a_gguf_file_is_a_model_as_any_other(
    file: Path, train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It is trained (by nothing that shows in float32), measured, and writes; the run exports Hugging Face's form."""
    few = [word for word in TINY if not word.startswith(("model.", "tokenizer."))]
    run = train(*few, "model=pretrained", f"model.name={file}", "trainer.max_steps=2", "optim.lr=1e-30")
    exported = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, n_positions=64).state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in original.items())
    measured = evaluate(f"model={file}", "data=sample", "preprocess.block_size=32")
    totals = [json.loads((folder / "certificate.json").read_text())["totals"] for folder in (measured, run)]
    assert totals[0] == totals[1]
    capsys.readouterr()
    run_verb("predict", file, "Light is", "--greedy", "--max-new-tokens", 5)
    run_verb("predict", run, "Light is", "--greedy", "--max-new-tokens", 5)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda whole: whole[:-5000], "it is damaged, or holds what transformers does not read"),
        (lambda whole: whole[:300], "it is damaged, or holds what transformers does not read"),
        (lambda whole: whole.replace(b"gpt2", b"gpt9"), "GGUF model with architecture gpt9 is not supported"),
        (lambda whole: whole.replace(b"ffn_up.weight", b"ffn_no.weight"), "is damaged: it holds no weights for"),
        (lambda whole: b"{}", "is no GGUF file"),
        (lambda whole: b"", "is no GGUF file"),
    ],
)
def test_a_file_that_can_not_be_read(content: Callable[[bytes], bytes], says: str, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match=says) as error:
        pretrained("AutoModelForCausalLM", str(damaged))
    assert len(str(error.value).splitlines()) <= 2


def test_a_tokenizer_that_can_not_be_read(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"could not load tokenizer .* it is damaged"):
        read_tokenizer(str(damaged))


def test_what_is_missing_is_named(
    file: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file, no folder to write to, one that is in use, and packages that are not installed."""
    assert 'model "none.gguf": no such file' in refused("predict", "none.gguf", "a")
    assert "is no run: name a folder for the export by --output DIR" in refused("export", file, "onnx")
    assert "is there already" in refused("export", file, "onnx", "--output", file.parent)
    assert "invalid choice: 'tflite'" in refused("export", file, "tflite")
    monkeypatch.setattr("lmlab.errors.find_spec", lambda name: None)
    for words in (["predict", file, "a"], ["export", file, "gguf", "--output", tmp_path / "new"]):
        assert "pip install 'lmlab[gguf]'" in refused(*words)
    said = refused("export", file, "onnx", "--output", tmp_path / "new")
    assert said == (
        "error: an export to ONNX takes onnx and onnxscript and onnxruntime, which are not installed:\n"
        "pip install 'lmlab[onnx]'\n"
    )
    assert not (tmp_path / "new").exists()
