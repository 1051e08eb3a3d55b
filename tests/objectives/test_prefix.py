"""A prefix that is seen in both directions, against a loop in plain torch, and which decoders can have one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmlab.data.datamodule import Batch, collate
from lmlab.data.sampler import EVALUATION, Draw
from lmlab.errors import UserError
from lmlab.evaluation.scoring import Scorer
from lmlab.models.checks import check_prefixes
from lmlab.models.probe import prefix_mask
from lmlab.objectives import Example, check_shapes
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.prefix import PrefixLM

from ..conftest import TINY
from ..evaluation.test_scoring import HARD, held_out_of, model_for, prepared, tokenizer_named
from ..models.test_scored import config_of
from .reference import agrees, decoder, logits_of

IDS = np.random.default_rng(0).integers(90, size=64, dtype=np.int32)


def drawn(*shares: float) -> PrefixLM:
    return PrefixLM(*shares, validation_prefix_share=0.0)


def loss_of_step(model: PreTrainedModel, samples: list[tuple[np.ndarray, Example]]) -> Tensor:
    """The mean nll of all tokens after the prefixes."""
    nll = []
    for ids, example in samples:
        prefix = example.prefix
        np.testing.assert_array_equal(example.inputs, ids)
        logits = logits_of(model, ids, lambda i, j, prefix=prefix: j <= i or j < prefix)  # type: ignore[misc]
        after = torch.arange(max(1, prefix), len(ids))
        nll.append(F.cross_entropy(logits[after - 1], torch.from_numpy(ids.astype(np.int64))[after], reduction="none"))
    return torch.cat(nll).mean()


@pytest.mark.parametrize(("architecture", "attention", "rows"), [("gpt2", "eager", 100), ("llama", "sdpa", None)])
def test_training_agrees_with_a_plain_loop(architecture: str, attention: str, rows: int | None, tmp_path: Path) -> None:
    _, examples = agrees(drawn(), decoder(architecture, attention), loss_of_step, rows, tmp_path)
    assert len({example.prefix for example in examples}) > 2  # none, and those of blocks of several lengths


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5)])
def test_lengths_are_drawn_alike(least: float, most: float) -> None:
    """Each in the range as often (chi-squared, within 5 standard deviations); all that follows is a target."""
    objective = drawn(least, most)
    examples = [objective(IDS, (0, 0, sample)) for sample in range(2000)]
    lengths = np.array([example.prefix for example in examples])
    for example in examples:
        check_shapes(objective, example, len(IDS))
        np.testing.assert_array_equal(example.positions, np.arange(max(0, example.prefix - 1), 63))
        np.testing.assert_array_equal(example.targets, IDS[example.positions + 1])
    possible = np.arange(64 * least, max(64 * most, 64 * least + 1))
    counts = np.array([(lengths == length).sum() for length in possible])
    assert counts.sum() == len(lengths)
    expected, freedom = len(lengths) / len(possible), len(possible) - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) <= 5 * (2 * freedom) ** 0.5


def test_pure_function_of_the_key() -> None:
    keys = [(seed, epoch, sample) for seed in (0, 5) for epoch in (0, 3, EVALUATION) for sample in range(20)]
    first = [drawn()(IDS, key).prefix for key in keys]
    assert [drawn()(IDS.copy(), key).prefix for key in reversed(keys)] == first[::-1]
    assert len({tuple(first[i : i + 20]) for i in range(0, len(first), 20)}) == 6


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_texts(length: int) -> None:
    for sample in range(20):
        example = drawn()(IDS[:length], (0, 0, sample))
        check_shapes(drawn(), example, length)
        assert len(example.targets) == length - max(1, example.prefix)


def test_no_mask_is_made_for_a_batch_without_prefixes() -> None:
    blocks = [IDS, IDS[:9]]
    draws = [Draw(0, 0), Draw(1, 0)]
    made: list[Batch] = [
        collate(blocks, draws, PrefixLM(prefix_share=share), 0, 92)  # type: ignore[arg-type]
        for share in (0.0, 0.5)
    ]
    assert made[0].prefix is None
    assert made[1].prefix is not None
    assert made[1].prefix.tolist() == [32, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask(dtype: torch.dtype) -> None:
    prefix, lengths = torch.tensor([0, 2, 5, 3]), [5, 4, 5, 3]
    padding = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    mask = prefix_mask(prefix, padding, 5, dtype)
    assert (mask.shape, mask.dtype) == ((4, 1, 5, 5), dtype)
    for row, length in enumerate(lengths):
        for i in range(5):
            for j in range(5):
                seen = (j <= i or j < prefix[row]) and j < length
                assert mask[row, 0, i, j] == (0 if seen else torch.finfo(dtype).min)
    torch.testing.assert_close(prefix_mask(prefix[:1], None, 5, dtype), mask[:1])


def test_held_out_text_is_scored_as_a_causal_model_is(
    train: Callable[..., Path], evaluate: Callable[..., Path]
) -> None:
    """The perplexity of a run is that of its weights under objective=clm, to the last bit."""
    run = train("objective=prefix", *TINY)
    causal = evaluate(run, "objective=clm")
    ours, theirs = (json.loads((path / "certificate.json").read_text()) for path in (run, causal))
    assert [found["policy"]["objective"]["_target_"].rpartition(".")[2] for found in (ours, theirs)] == [
        "PrefixLM",
        "CausalLM",
    ]
    assert ours["figure"] == theirs["figure"] == "perplexity"
    assert ours["totals"] == theirs["totals"]
    assert ours["figures"] == theirs["figures"]


@torch.no_grad()
def test_held_out_text_with_a_prefix(tmp_path: Path) -> None:
    """Half of each window is given, and the rest of it is scored."""
    tokens, model, objective = tokenizer_named("bpe"), model_for("bpe", "gpt2"), PrefixLM(prefix_share=0.5)
    assert objective.metric == "prefix_perplexity"
    held_out = held_out_of(prepared(HARD, tokens, tmp_path, 16), objective, 16, context="blocks")
    text = held_out.documents.tokens
    expected = []
    for start in range(0, len(text), 16):
        ids = text[start : start + 16]
        prefix = len(ids) // 2
        logits = logits_of(model, ids, lambda i, j, prefix=prefix: j <= i or j < prefix)  # type: ignore[misc]
        after = torch.arange(max(1, prefix), len(ids))
        expected.append(F.cross_entropy(logits[after - 1], torch.tensor(ids).long()[after], reduction="none"))
    # Rows of several lengths, so that there is padding; all are full but the last.
    batch = held_out[list(range(len(held_out)))]
    assert batch.attention_mask is not None
    torch.testing.assert_close(Scorer(model, 1).score(batch).nll, torch.cat(expected), rtol=1e-5, atol=1e-6)


class SeesAll(CausalLM):
    """Copies the next token, which it sees."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        return super().__call__(ids, key, first)._replace(prefix=len(ids))


def test_the_last_token_is_an_input_where_positions_before_it_see_it(tmp_path: Path) -> None:
    """A causal model's last token is a target alone."""
    data = prepared(HARD, tokenizer_named("bpe"), tmp_path, 16)
    causal, other = (held_out_of(data, objective, 16).rows for objective in (CausalLM(), SeesAll()))
    assert (len(causal.row(0).inputs), causal.row(0).prefix) == (15, 0)
    assert (len(other.row(0).inputs), other.row(0).prefix) == (16, 16)
    np.testing.assert_array_equal(other.row(0).targets, causal.row(0).targets)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"validation_prefix_share": None}, "Set objective.validation_prefix_share=0"),
        ({"min_prefix_share": 0.6, "max_prefix_share": 0.5}, "min_prefix_share=0.6 is more than"),
    ],
)
def test_senseless_shares(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PrefixLM(**({"validation_prefix_share": 0.0} | choices))


@pytest.mark.parametrize("prefix", [-1, 65])
def test_a_prefix_beyond_the_text_is_refused(prefix: int) -> None:
    with pytest.raises(UserError, match=f"returns a prefix of {prefix}, and 0 to 64 was expected"):
        check_shapes(drawn(), drawn()(IDS, (0, 0, 0))._replace(prefix=prefix), len(IDS))


WINDOW = {"sliding_window": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "settings", "said"),
    [
        ("gpt2", {}, None),
        ("llama", {}, None),
        ("qwen3", {}, None),
        ("gpt_neox", {}, None),
        ("olmo2", {}, None),
        ("mistral", WINDOW | {"sliding_window": None}, None),
        ("mistral", WINDOW, "fewer than preprocess.block_size=32 positions"),
        ("gemma2", WINDOW, "fewer than preprocess.block_size=32 positions"),
        ("opt", {}, "opt takes no mask"),
        ("bloom", {}, "bloom takes no mask"),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, "gpt_neo takes no mask"),
    ],
)
def test_decoders(architecture: str, settings: dict[str, Any], said: str | None) -> None:
    """Those that do not attend as they are told are found before a run begins."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture, **settings)).eval()
    if said is None:
        check_prefixes(model, 32)
    else:
        with pytest.raises(UserError, match=said):
            check_prefixes(model, 32)


def test_a_window_of_a_whole_block_is_none() -> None:
    torch.manual_seed(0)
    check_prefixes(AutoModelForCausalLM.from_config(config_of("mistral", **WINDOW)).eval(), 8)
