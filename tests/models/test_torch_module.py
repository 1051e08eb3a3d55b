"""Plain torch modules: what they are refused for, that they are scored exactly, and all commands on a run of one."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.train import make_tokenizer
from lmlab.config import build
from lmlab.config.compose import read_config
from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.models.checks import check_model, max_positions
from lmlab.models.chunked_loss import logits_chunk_size
from lmlab.models.efficiency import check_sharding, checkpoint_activations, choose_attention, compile_layers
from lmlab.models.loss import score
from lmlab.models.probe import probe
from lmlab.models.torch_module import TorchModule, wrap
from lmlab.objectives.clm import CausalLM

from ..conftest import TINY, Refused, blocks_of, losses, run_verb, stop_after

CLASS, TOKENS = "AutoModelForCausalLM", 50


class LSTM(nn.Module):
    """An LSTM language model, whose logits subclasses make in other ways."""

    def __init__(self, vocabulary: int = TOKENS, width: int = 16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor) -> Any:
        return self.logits(self.lstm(self.embed(ids))[0])

    def logits(self, hidden: Tensor) -> Any:
        return self.head(hidden)


class Tied(LSTM):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Capped(LSTM):
    def logits(self, hidden: Tensor) -> Tensor:
        return 3 * torch.tanh(self.head(hidden) / 3)


class BiasLater(LSTM):
    """Equal to its head's output as long as the bias is zero."""

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).add_(self.bias)


class Flattened(LSTM):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


class ByEmbedding(LSTM):
    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed.weight.t()


class PositionBias(LSTM):
    """A zero for each position, by their number: other ones if rows are taken out before it, once it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.of_position = nn.Parameter(torch.zeros(64, 1))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return logits + self.of_position[: logits.shape[1]]


class Looks(LSTM):
    """Sees ahead by way of a projection that starts with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)
        nn.init.zeros_(self.out.weight)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.out(hidden.mean(1, keepdim=True)))


class Layered(nn.Module):
    """Has layers, and reads no more positions than it has."""

    def __init__(self) -> None:
        super().__init__()
        self.max_positions = 12
        self.embed, self.positions = nn.Embedding(TOKENS, 16), nn.Embedding(12, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3))
        self.head = nn.Linear(16, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def held(module: Any) -> TorchModule:
    return wrap(module, make_tokenizer(TOKENS), CLASS)


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(
    ("module", "head", "projects"),
    [
        (LSTM, "module.head", True),
        (Tied, "module.head", True),
        (Capped, "module.head", False),
        (BiasLater, "module.head", False),
        (Flattened, None, False),
        (ByEmbedding, None, False),
        (PositionBias, None, False),
    ],
)
def test_loss_and_gradients_are_the_modules_own(
    module: type[LSTM], head: str | None, projects: bool, rows: int | None
) -> None:
    torch.manual_seed(0)
    model = held(module())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (model.head, probe(model).projects, model.embedding) == (head, projects, "module.embed")
    assert not probe(model).sees_ahead
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # a probe leaves no trace
    with torch.no_grad():  # as training may make them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    ids = torch.randint(TOKENS, (3, 10), generator=torch.Generator().manual_seed(1))
    positions, targets = torch.tensor([1, 5, 9, 20, 28]), torch.tensor([7, 8, 9, 10, 11])
    expected = F.cross_entropy(model.module(ids).flatten(0, 1)[positions], targets, reduction="none")
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    seen: list[int] = []
    model.module.head.register_forward_hook(lambda m, args, out: seen.append(out.numel() // TOKENS))
    if rows is not None and not projects:
        with pytest.raises(UserError, match="more to its logits than project"):
            logits_chunk_size(model, rows, on_gpu=False)
        rows = None
    nll = score(model, ids, None, positions, targets, rows).nll
    nll.sum().backward()
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    if head:
        assert sum(seen) == (len(positions) if rows is None else 0)


def returning(change: Callable[[Tensor], Any]) -> nn.Module:
    module = LSTM()
    module.logits = lambda hidden: change(module.head(hidden))  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (returning(lambda logits: (logits[:, -1:], None)), ["a tuple of a tensor [2, 1, 50], None", "no loss"]),
        (returning(lambda logits: logits[:, -1]), ["a tensor [2, 50] for ids [2, 4]", "here [2, 4, V]"]),
        (returning(lambda logits: logits.transpose(0, 1)), ["a tensor [4, 2, 50] for ids [2, 4]"]),
        (returning(lambda logits: {"logits": logits}), ["a dict"]),
        (returning(lambda logits: logits[..., :40]), ["logits [2, 4, 40]", "has 50 tokens", "[2, 4, 50]"]),
        (LSTM(40), ["can't read ids [2, 4] from 0 to 49", "IndexError"]),
        (nn.LSTM(4, 4), ["can't read ids [2, 4]", "forward(input_ids [B, T]) has to return logits [B, T, V]"]),
        (7, ["returns a int", "nn.Module"]),
    ],
)
def test_what_returns_something_else_is_refused(module: Any, says: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        held(module)
    assert len(str(refused.value).splitlines()) <= 2
    for words in says:
        assert words in str(refused.value)


def test_a_module_that_sees_ahead_is_refused_before_its_weights_show_it() -> None:
    model = held(Looks())
    with pytest.raises(UserError, match=r"sees the tokens it should predict.*\n.*objective=mlm"):
        check_model(model, make_tokenizer(TOKENS), 8, CausalLM())
    assert not model.module.out.weight.any()


def test_a_block_has_to_fit() -> None:
    tokenizer, model = make_tokenizer(TOKENS), held(Layered())
    check_model(model, tokenizer, 12, CausalLM())
    assert max_positions(model) == 12
    with pytest.raises(UserError, match="block_size=13 is more than the 12"):
        check_model(model, tokenizer, 13, CausalLM())
    module = Layered()
    del module.max_positions
    model = held(module)
    with pytest.raises(UserError, match=r"can't read ids \[1, 13\].*\n.*preprocess.block_size"):
        check_model(model, tokenizer, 13, CausalLM())


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_layers_have_the_same_gradients(selective: bool) -> None:
    model, ids = held(Layered()), torch.arange(20).view(2, 10)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        model.train()(ids).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, calls = gradients(), [0]
    inner = model.module.layers[0][0]
    inner.register_forward_hook(lambda *args: calls.append(1))
    checkpoint_activations(model, selective)
    for one, other in zip(gradients(), expected, strict=True):
        assert torch.equal(one, other)
    assert sum(calls) == 2  # once more in the backward pass


def test_what_a_module_without_layers_cannot_do_is_refused() -> None:
    model = held(LSTM())
    with pytest.raises(UserError, match="ModuleList"):
        compile_layers(model)
    with pytest.raises(UserError, match="ModuleList"):
        check_sharding(model)
    with pytest.raises(UserError, match="activation_checkpointing"):
        checkpoint_activations(model)
    with pytest.raises(UserError, match="attention=eager: a torch module has no choice"):
        choose_attention(model, "eager")


THEIRS = '''
import torch
from torch import nn


class MyLM(nn.Module):
    def __init__(self, tokenizer, width: int = 16, both: bool = False, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.Embedding(len(tokenizer), width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=both)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear((1 + both) * width, len(tokenizer))

    def forward(self, input_ids):
        return self.head(self.drop(self.lstm(self.embed(input_ids))[0]))


class Deep(MyLM):
    """Has layers, and its head in common with the embedding."""

    def __init__(self, tokenizer, width: int = 16, dropout: float = 0.1):
        super().__init__(tokenizer, width, dropout=dropout)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(2))
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return self.head(self.drop(hidden))


class Attends(MyLM):
    """Takes a mask, and reads each token and the mean of all."""

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head(hidden + (weights * hidden).sum(1, keepdim=True))
'''
FEW = [*(word for word in TINY if not word.startswith("model.")), "callbacks.samples.count=1"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the repository, with a module and a file of conf/model."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "their_lab.py").write_text(THEIRS)
    (folder / "mine" / "model").mkdir(parents=True)
    (folder / "mine" / "model" / "lstm.yaml").write_text("_target_: their_lab.MyLM\nwidth: 24\n")
    return folder


@pytest.fixture
def their_lab(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(theirs))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(theirs), *sys.path]))  # of processes that are started
    import their_lab

    return their_lab


@pytest.fixture(scope="module")
def whole(theirs: Path) -> Path:
    """A run of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(theirs))
        words = ["--config-dir", theirs / "mine", "model=lstm", *FEW, "trainer.val_check_interval=2"]
        words += ["trainer.log_every_n_steps=1", "callbacks.series=3"]
        run_verb("train", *words, f"hydra.run.dir={theirs / 'run'}")
    return theirs / "run"


def own(lab: ModuleType, run: Path, **arguments: Any) -> tuple[Any, Any]:
    """The module with the exported weights, loaded without lmlab, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    module = lab.MyLM(tokenizer, **arguments).eval()
    module.load_state_dict(load_file(run / "model" / "model.safetensors"))
    return module, tokenizer


@torch.no_grad()
def test_perplexity_is_that_of_a_loop_over_the_logits(whole: Path, their_lab: ModuleType) -> None:
    module, _ = own(their_lab, whole, width=24)
    nll, targets = 0.0, 0
    for block in blocks_of(build.prepare_data(read_config(whole)), "validation"):
        ids = torch.from_numpy(block.astype("int64"))
        log_probabilities = module(ids[None])[0].double().log_softmax(-1)
        for position in range(len(ids) - 1):
            nll -= float(log_probabilities[position, ids[position + 1]])
            targets += 1
    assert records.read(whole).certificate["totals"]["tokens"] == targets
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val/perplexity"] == pytest.approx(math.exp(nll / targets), rel=1e-6)


def test_a_run_resumes_to_the_same_bits(whole: Path, their_lab: ModuleType, refused: Refused, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    stop_after(whole, 2, stopped)
    assert "trust=their_lab" in refused("resume", stopped)
    run_verb("resume", stopped, "trust=their_lab")
    assert losses(stopped) == losses(whole)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    (first, *_), (*_, last) = (sorted((run / "series").glob("step-*/model.safetensors")) for run in (stopped, whole))
    assert load_file(first).keys() == one.keys()
    assert not torch.equal(load_file(first)["head.weight"], one["head.weight"])
    assert all(torch.equal(load_file(last)[name], one[name]) for name in one)


@pytest.mark.long
def test_its_export_is_evaluated_where_its_code_is_trusted(
    whole: Path,
    theirs: Path,
    their_lab: ModuleType,
    evaluate: Callable[..., Path],
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in ([whole], [whole / "model", "data=sample"], [whole, "trust=other"]):
        assert "model.module._target_=their_lab.MyLM" in refused("evaluate", *words)
    trained = records.read(whole).certificate
    for words in ([whole, "trust=their_lab"], [whole, "--config-dir", theirs / "mine", "batch_size=3"]):
        certificate = records.read(evaluation := evaluate(*words)).certificate
        assert certificate["weights_hash"] == trained["weights_hash"]
        assert certificate["totals"]["nll"] == pytest.approx(trained["totals"]["nll"], rel=1e-6)
    series = evaluate(whole, "trust=their_lab", "series=true")
    assert records.read(series / "step-4").certificate["weights_hash"] == trained["weights_hash"]
    capsys.readouterr()
    run_verb("compare", whole, evaluation)
    assert "+0.0000" in capsys.readouterr().out
    run_verb("report", whole, "--out", evaluation / "report")
    assert (evaluation / "report" / "report.html").is_file()


@pytest.mark.longest
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_the_same_run_on_two_ranks(
    trainer: str, theirs: Path, their_lab: ModuleType, train: Callable[..., Path], evaluate: Callable[..., Path]
) -> None:
    common = ["--config-dir", str(theirs / "mine"), "model=lstm", "model._target_=their_lab.Deep", "+model.dropout=0.0"]
    common += [*FEW, "trainer.gradient_clip_val=0.1", "trainer.log_every_n_steps=1"]
    two = ["trainer.accelerator=cpu", "trainer.devices=2", f"trainer={trainer}"]
    runs = [train(*common, *more, run_dir=theirs / f"{trainer}{len(more)}") for more in ([], two)]
    expected, found = map(losses, runs)
    assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in expected], rel=1e-5)
    assert expected[-1][2] < expected[0][2]
    again = records.read(evaluate(runs[1], "trust=their_lab", "check=true", *two)).certificate
    trained = records.read(runs[1]).certificate
    assert again["weights_hash"] == trained["weights_hash"]
    assert again["totals"]["nll"] == pytest.approx(trained["totals"]["nll"], rel=1e-6)


def test_a_run_before_its_end_is_read_too(
    whole: Path, their_lab: ModuleType, refused: Refused, evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    stop_after(whole, 2, tmp_path / "stopped")
    assert "their_lab" in refused("predict", tmp_path / "stopped", "a")
    run_verb("predict", tmp_path / "stopped", "a", "--trust", "their_lab")
    evaluate(tmp_path / "stopped", "trust=their_lab")


def test_it_continues_texts(
    whole: Path, their_lab: ModuleType, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--trust their_lab" in refused("predict", whole, "The cell")
    module, tokenizer = own(their_lab, whole, width=24)
    ids = tokenizer("The cell").input_ids
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    options = ["--trust", "their_lab", "--greedy", "--max-new-tokens", 6]
    for name in (whole, whole / "model"):
        run_verb("predict", name, "The cell", *options)
        assert capsys.readouterr().out.strip("\n") == tokenizer.decode(ids, skip_special_tokens=True).strip("\n")
    sampled = ["--trust", "their_lab", "--top-k", 20, "--top-p", 0.9, "--temperature", 2.0, "--max-new-tokens", 6]
    said = set()
    for seed in (0, 0, 1):
        run_verb("predict", whole, "The cell", *sampled, "--seed", seed)
        said.add(capsys.readouterr().out)
    assert len(said) == 2


@pytest.mark.long
def test_training_goes_on_from_its_export(
    whole: Path, their_lab: ModuleType, train: Callable[..., Path], refused: Refused, tmp_path: Path
) -> None:
    """At another dropout, which the export then names."""
    words = [word for word in FEW if not word.startswith("tokenizer.")]
    words += ["model=pretrained", f"model.name={whole}/model"]
    said = refused("train", *words, f"hydra.run.dir={tmp_path / 'refused'}")
    assert "+model.module._target_=their_lab.MyLM +model.module.width=24" in said
    words += ["+model.module._target_=their_lab.MyLM", "+model.module.width=24", "+model.module.dropout=0.5"]
    run = train(*words)
    before = json.loads((whole / "summary.json").read_text())["val/loss"]
    assert losses(run)[0] == (0, "val/loss", pytest.approx(before, rel=1e-6))
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["module"] == {"_target_": "their_lab.MyLM", "width": 24, "dropout": 0.5}
    other = f"hydra.run.dir={tmp_path / 'other'}"
    assert "a torch module has none" in refused("train", *words, "+model.config.vocab_size=7", other)
    words[-2] = "+model.module.width=25"
    assert "are not those of their_lab.MyLM" in refused("train", *words, other)


def test_an_export_cannot_name_other_code(whole: Path, their_lab: ModuleType, refused: Refused, tmp_path: Path) -> None:
    """What its config.json says is as little to be trusted as the config of a run."""
    received = tmp_path / "received"
    shutil.copytree(whole / "model", received)
    config = json.loads((received / "config.json").read_text())
    config["module"] = {"_target_": "os.system", "command": f"touch {tmp_path}/SEEN"}
    (received / "config.json").write_text(json.dumps(config))
    assert "os.system" in refused("evaluate", received, "data=sample", "trust=their_lab")
    assert "os.system" in refused("predict", received, "a", "--trust", "their_lab")
    assert "os.system" in refused("train", "model=pretrained", f"model.name={received}")
    config["module"] = {"_target_": "their_lab.MyLM", "inner": {"_target_": "os.system", "command": "true"}}
    (received / "config.json").write_text(json.dumps(config))
    assert "os.system" in refused("predict", received, "a", "--trust", "their_lab")
    assert not (tmp_path / "SEEN").exists()


@pytest.mark.long
@pytest.mark.parametrize(("target", "more"), [("MyLM", ["+model.both=true"]), ("Attends", [])])
def test_a_masked_one(
    target: str,
    more: list[str],
    theirs: Path,
    their_lab: ModuleType,
    train: Callable[..., Path],
    evaluate: Callable[..., Path],
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a parameter for the mask, padding would change what a bidirectional module says of a row."""
    words = ["--config-dir", str(theirs / "mine"), "objective=mlm", "model=lstm", *FEW, *more]
    words += [f"model._target_=their_lab.{target}"]
    if target == "MyLM":
        assert "padding changes" in refused("train", *words)
        words += ["preprocess.drop_remainder_every=1000"]
    run = train(*words)
    certificate = records.read(evaluate(run, "trust=their_lab", "batch_size=3")).certificate
    assert certificate["totals"]["nll"] == pytest.approx(records.read(run).certificate["totals"]["nll"], rel=1e-6)
    assert "masked_perplexity" in certificate["figures"]
    capsys.readouterr()
    run_verb("predict", run, "The <mask> cell", "--trust", "their_lab", "--top-k", 2)
    assert len(capsys.readouterr().out.splitlines()) == 2
    clm = [word for word in words if word != "objective=mlm" and "drop_remainder" not in word]
    assert "sees the tokens" in refused("train", *clm)


@pytest.mark.long
def test_preview_measures_it(theirs: Path, their_lab: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run_verb("preview", "--config-dir", theirs / "mine", "model=lstm", *FEW)
    assert "parameters" in capsys.readouterr().out


def test_the_config_of_a_run_names_it(whole: Path) -> None:
    assert OmegaConf.load(whole / "config.yaml").model == {"_target_": "their_lab.MyLM", "width": 24}
