"""Span corruption: the paper's figure, its shares, and training and scoring against transformers' own T5."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from lmlab.data.sampler import EVALUATION
from lmlab.data.tokenizers import bpe, with_extra_tokens
from lmlab.errors import UserError
from lmlab.evaluation.scoring import Scorer
from lmlab.models import generation
from lmlab.models.checks import check_model
from lmlab.models.efficiency import layers
from lmlab.models.loading import auto_class_of, from_scratch
from lmlab.models.loss import score
from lmlab.models.probe import probe
from lmlab.models.torch_module import wrap
from lmlab.objectives import Example, check_shapes
from lmlab.objectives.span import SpanCorruption

from ..conftest import Refused, losses, metrics, run_verb, stop_after
from ..evaluation.test_scoring import HARD, LEARNED, held_out_of, prepared
from .reference import agrees, tokenizer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
    "bart": {"d_model": 32, "dropout": 0.0, "max_position_embeddings": 64}
    | {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 64))}
    | {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
TINY_SPAN = [
    "objective=span",
    "objective.sentinels=8",
    *(f"model.config.{key}" for key in ("d_model=32", "d_kv=16", "d_ff=32", "num_layers=1", "num_heads=2")),
    "tokenizer.vocab_size=300",
    "preprocess.block_size=32",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "logger=file",
]
IDS = np.random.default_rng(0).integers(90, size=64, dtype=np.int32)


def with_sentinels(number: int = 30) -> PreTrainedTokenizerFast:
    made = with_extra_tokens(tokenizer(), number)
    assert isinstance(made, PreTrainedTokenizerFast)
    return made


def small(architecture: str, tokens: Any = None) -> PreTrainedModel:
    torch.manual_seed(0)
    return from_scratch(
        tokens or with_sentinels(), "AutoModelForSeq2SeqLM", architecture, ARCHITECTURES[architecture]
    ).eval()


def corrupted(ids: np.ndarray, hidden: list[bool], sentinels: list[int]) -> tuple[list[int], list[int]]:
    """What is left of a text, and the spans that are hidden in it, token by token as in the paper's Figure 2."""
    left, right = list[int](), sentinels.copy()
    spans, inside = list[int](), False
    for token, hide in zip(ids.tolist(), hidden, strict=True):
        if hide and not inside:
            left.append(right[0])
            spans.append(right.pop(0))
        (spans if hide else left).append(token)
        inside = hide
    return left, [*spans, right[0]]


@pytest.mark.parametrize("length", [2, 3, 10, 64])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.9, 8.0)])
def test_examples_are_those_of_the_papers_figure(length: int, density: float, mean: float) -> None:
    tokens = with_sentinels(40)
    objective, known = SpanCorruption(tokens, density, mean), tokens.get_vocab()
    names = [known[f"<extra_id_{i}>"] for i in range(40)]
    for sample in range(50):
        example = objective(IDS[:length], (0, 0, sample))
        check_shapes(objective, example, length)
        assert example.tokens is not None
        assert example.decoder_inputs is not None
        hidden = np.isin(np.arange(length), example.tokens).tolist()
        inputs, targets = corrupted(IDS[:length], hidden, names)
        assert example.inputs.tolist() == inputs
        assert example.targets.tolist() == targets
        assert example.decoder_inputs.tolist() == [tokens.pad_token_id, *targets[:-1]]
        assert example.positions.tolist() == [*range(len(targets))]
        of_text = example.tokens >= 0
        assert (IDS[example.tokens[of_text]] == example.targets[of_text]).all()
        assert set(example.targets[~of_text].tolist()) < set(names)
        # T5's counts: as many tokens as the share says, in as many spans as their mean length says.
        noise = min(max(round(length * density), 1), length - 1)
        assert sum(hidden) == noise
        spans = sum(hide and not before for before, hide in pairwise([False, *hidden]))
        assert spans == min(max(round(noise / mean), 1), length - noise + 1)


def test_the_text_comes_back() -> None:
    """From inputs and targets alone."""
    tokens = with_sentinels()
    objective, first = SpanCorruption(tokens), tokens.get_vocab()["<extra_id_0>"]
    for sample in range(100):
        example = objective(IDS, (1, 2, sample))
        spans, read = dict[int, list[int]](), list[int]()
        for token in example.targets.tolist():
            if token >= first:
                read = spans.setdefault(token, [])
            else:
                read.append(token)
        back = [token for place in example.inputs.tolist() for token in spans.get(place, [place])]
        assert back == IDS.tolist()


def test_each_token_is_hidden_as_often() -> None:
    """But that spans do not reach over the ends of a text; and spans of all lengths occur."""
    objective = SpanCorruption(with_sentinels(), 0.25, 4.0)
    counts, lengths = np.zeros(64), list[int]()
    for sample in range(3000):
        example = objective(IDS, (0, 0, sample))
        assert example.tokens is not None
        counts[example.tokens[example.tokens >= 0]] += 1
        ends = np.flatnonzero(example.tokens < 0)
        lengths += (np.diff(ends) - 1).tolist()
    assert counts.sum() == 3000 * 16
    assert np.mean(lengths) == 4.0
    assert {*range(1, 14)} == {*lengths}  # 16 tokens in 4 spans
    # 4 of the 49 places around 48 kept tokens have a span, so the first token is hidden with 4 / 49.
    ends = counts[[0, -1]] / 3000
    assert abs(ends - 4 / 49).max() < 4 * (4 / 49 / 3000) ** 0.5
    # The share of a token in the middle is higher than 0.25 by what the ends lack.
    assert abs(counts[16:48].mean() / 3000 - 0.26) < 0.01


def test_pure_function_of_the_key() -> None:
    objective = SpanCorruption(with_sentinels())
    keys = [(seed, epoch, sample) for seed in (0, 5) for epoch in (0, 3, EVALUATION) for sample in range(10)]
    first = [objective(IDS, key).inputs.tolist() for key in keys]
    assert [objective(IDS.copy(), key).inputs.tolist() for key in reversed(keys)] == first[::-1]
    assert len({tuple(inputs) for inputs in first}) == len(keys)


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_is_hidden_of_a_single_token(length: int) -> None:
    example = SpanCorruption(with_sentinels())(IDS[:length], (0, 0, 0))
    assert example.inputs.tolist() == IDS[:length].tolist()
    assert len(example.targets) == 0
    assert example.decoder_inputs is not None
    assert len(example.decoder_inputs) == 1  # a decoder can't read nothing


def own_loss(model: PreTrainedModel, examples: list[Example], reduction: str = "mean") -> torch.Tensor:
    """transformers' own loss of the targets given the inputs, which are padded here; the mean, or the nll of each."""
    width, most = max(len(e.inputs) for e in examples), max(len(e.targets) for e in examples)
    ids = torch.full((len(examples), width), 92)
    mask, labels = torch.zeros_like(ids), torch.full((len(examples), most), -100)
    for row, example in enumerate(examples):
        ids[row, : len(example.inputs)] = torch.from_numpy(example.inputs.astype(np.int64))
        mask[row, : len(example.inputs)] = 1
        labels[row, : len(example.targets)] = torch.from_numpy(example.targets.astype(np.int64))
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    if reduction == "mean":
        loss: torch.Tensor = output.loss
        return loss
    nll = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
    return nll[labels.flatten() != -100]


@pytest.mark.parametrize(("architecture", "rows"), [("t5", None), ("t5", 50), ("bart", None)])
def test_training_agrees_with_a_plain_loop(architecture: str, rows: int | None, tmp_path: Path) -> None:
    tokens, model = with_sentinels(), small(architecture)
    assert model.config.decoder_start_token_id == tokens.pad_token_id

    def loss_of_step(reference: PreTrainedModel, samples: list[tuple[np.ndarray, Example]]) -> torch.Tensor:
        return own_loss(reference, [example for _, example in samples])

    expected, examples = agrees(SpanCorruption(tokens, 0.3), model, loss_of_step, rows, tmp_path)
    assert len({len(example.inputs) for example in examples}) > 1  # so that some rows were padded
    assert expected[-1] < 0.9 * expected[0]


@torch.no_grad()
@pytest.mark.parametrize("context", ["blocks", "document"])
def test_held_out_text_is_scored_by_the_models_own_loss(context: str, tmp_path: Path) -> None:
    """Each window is one text; nll, targets, bytes and words per stretch are those of its targets."""
    tokens = bpe(LEARNED, 290, 30)
    model, objective = small("t5", tokens), SpanCorruption(tokens, 0.4, 2.0)
    held_out = held_out_of(prepared(HARD, tokens, tmp_path, 16), objective, 16, context=context)
    documents, windows = held_out.documents, held_out.rows.windows
    sums, ours = held_out.sums(), Scorer(model, held_out.sums())
    numbers = [*range(len(held_out))]
    for some in (numbers[::2], numbers[1::2], []):  # a rank without a row scores nothing
        batch = held_out[some]
        sums.update(ours.score(batch).nll, batch)
    nll, counts = sums.compute()
    expected, targets, bytes_ = np.zeros(len(documents.names)), np.zeros(len(nll)), np.zeros(len(nll))
    for number in numbers:
        start, end = int(windows.starts[number]), int(windows.ends[number])
        example = objective(documents.tokens[start:end], (0, EVALUATION, number))
        if not len(example.targets):
            continue
        framed = [tokens.eos_token_id] if context == "document" else []
        # Its `bos` token stands before a piece too.
        inputs = np.array([*framed, *example.inputs, *framed])
        each = own_loss(model, [example._replace(inputs=inputs)], "none").numpy()
        assert example.tokens is not None
        for i, token in enumerate(example.tokens):
            beside = token if token >= 0 else example.tokens[i + 1] if i + 1 < len(each) else example.tokens[i - 1]
            stretch = documents.stretch_of(np.array([start + beside]))[0]
            expected[stretch] += each[i]
            targets[stretch] += 1
            bytes_[stretch] += documents.counts(np.array([start + token]))[0, 1] if token >= 0 else 0
    np.testing.assert_allclose(nll[:, 0].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(counts[:, 0], targets)
    np.testing.assert_array_equal(counts[:, 1], bytes_)
    assert counts[:, 1].sum() > 0


def test_targets_that_are_not_the_texts_are_refused(tmp_path: Path) -> None:
    class Wrong(SpanCorruption):
        """Says of each target that it is the first token of the text."""

        def __call__(self, *arguments: Any) -> Example:
            example = super().__call__(*arguments)
            assert example.tokens is not None
            return example._replace(tokens=np.minimum(example.tokens, 0))

    tokens = bpe(LEARNED, 290, 30)
    with pytest.raises(UserError, match="token 0 of the block is another"):
        held_out_of(prepared(HARD, tokens, tmp_path, 16), Wrong(tokens), 16, context="blocks")


def test_decoders_that_do_not_fit() -> None:
    """58 of 64 tokens are hidden, in 7 spans: with the sentinels, but for the last one, and the start token 66."""
    tokens = with_sentinels(80)
    with pytest.raises(UserError, match=r"reads 66 tokens of a block of preprocess.block_size=64.* 64 positions"):
        check_model(small("bart", tokens), tokens, 64, SpanCorruption(tokens, 0.9, 1.0))


def test_an_objective_that_gives_the_decoder_nothing() -> None:
    class Silent(SpanCorruption):
        """Leaves the decoder out."""

        def __call__(self, ids: np.ndarray, *more: Any) -> Example:
            return Example(ids, np.arange(len(ids)), ids)

    with pytest.raises(UserError, match="returns no decoder_inputs"):
        check_model(small("t5"), with_sentinels(), 64, Silent(with_sentinels()))


def test_a_torch_module_is_no_encoder_decoder() -> None:
    with pytest.raises(UserError, match="no torch module"):
        wrap(torch.nn.Embedding(94, 94), tokenizer(), SpanCorruption.auto_class)


def test_encoder_and_decoder_are_probed() -> None:
    model = small("t5")
    assert probe(model).backbone == "decoder"
    assert not probe(model).sees_ahead
    assert probe(model).needs_mask
    assert layers(model) == [*model.encoder.block, *model.decoder.block]
    ids = torch.from_numpy(IDS[None].astype(np.int64))
    positions, targets = torch.tensor([2, 5]), torch.tensor([3, 4])
    own = torch.nn.functional.cross_entropy(
        model(input_ids=ids, decoder_input_ids=ids[:, :7]).logits[0, positions], targets, reduction="none"
    )
    nll = score(model, ids, None, positions, targets, decoder_ids=ids[:, :7]).nll
    torch.testing.assert_close(nll, own)


def test_spans_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = bpe(LEARNED, 290, 5)
    model, known = small("t5", tokens), tokens.get_vocab()
    shown = list[str]()

    def write(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shown.append(tokens.decode(ids[0]))
        assert options["eos_token_id"] == [known["<extra_id_2>"], tokens.eos_token_id]
        said = "<extra_id_0> cat sat<extra_id_1> mat<extra_id_2>"
        return torch.tensor([[tokens.pad_token_id, *tokens(said).input_ids]])

    monkeypatch.setattr(model, "generate", write)
    for prompt in ("The <extra_id_0> on the <extra_id_1>.", "The <mask> on the [MASK]."):
        assert generation.infill(model, tokens, prompt, 0) == ["The cat sat on the mat."]
    assert shown[0] == shown[1]
    for prompt in ("The cat", "<mask> and <extra_id_0>", "<mask>" * 5):
        with pytest.raises(UserError):
            generation.infill(model, tokens, prompt, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("span") / "run"
    run_verb("train", *TINY_SPAN, f"hydra.run.dir={folder}")
    return folder


def test_run(run: Path, evaluate: Callable[..., Path], capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    """It is evaluated to the same totals from its directory and from its exported model, and fills in spans."""
    assert "val/span_perplexity" in metrics(run)[0]
    assert "<extra_id_0>" in json.loads((run / "samples.jsonl").read_text().splitlines()[0])["text"]
    trained = json.loads((run / "certificate.json").read_text())
    assert trained["figure"] == "span_perplexity"
    assert auto_class_of(AutoConfig.from_pretrained(run / "model"), "") == "AutoModelForSeq2SeqLM"
    of_run, exported = evaluate(run), evaluate(run / "model", "data=sample", "preprocess.block_size=32")
    for evaluation in (of_run, exported):
        assert json.loads((evaluation / "certificate.json").read_text())["totals"] == trained["totals"]
    for place in (run, run / "model"):
        capsys.readouterr()
        run_verb("predict", place, "The cat <extra_id_0> on the mat.", "--greedy", "--max-new-tokens", "5")
        said = capsys.readouterr().out
        assert said.startswith("The cat")
        assert said.endswith(" on the mat.\n")
    assert "score=pseudo" in refused("evaluate", run, "score=pseudo")


def test_run_that_goes_on(run: Path, tmp_path: Path) -> None:
    """After two steps and a kill it has the losses of one that was not stopped."""
    stop_after(run, 2, tmp_path / "stopped")
    run_verb("train", *TINY_SPAN, f"hydra.run.dir={tmp_path / 'stopped'}")
    assert losses(tmp_path / "stopped") == losses(run)
