"""Memorization and generation, against models that are known by hand, greedy decoding, and transformers' sampling."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from lmlab.data.tokenizers import char
from lmlab.errors import UserError
from lmlab.evaluation.certify import certify
from lmlab.evaluation.metrics import wilson
from lmlab.evaluation.suites import certificates, generation, memorization
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from .test_closed_form import Table
from .test_scoring import held_out_of, model_for, prepared, tokenizer_named

SETTINGS = {"prefix": 2, "continuation": 3, "min_k": 0.5}
WRITING = {"prefix": 4, "continuation": 6, "prompts": 5, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 1}


def gpt2(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(GPT2Config(n_positions=32, bos_token_id=end, eos_token_id=end, **size)).eval()


def memorized(
    model: Any,
    texts: list[str],
    tokenizer: Any,
    path: Path,
    objective: Any = None,
    settings: Any = SETTINGS,
    **keys: Any,
) -> Any:
    data = prepared(texts, tokenizer, path / "cache", 16)
    held_out = held_out_of(data, objective or CausalLM(), 16, context="document", **keys)
    memorization.check(held_out, settings)

    def write(*args: Any, **options: Any) -> None:
        memorization.write(*args, held_out=held_out, settings=settings, **options)

    certify(model, held_out, path / "out", keeps_tokens=True, write=write)
    return certificates.read(path / "out")


# --- Memorization ---


def test_what_greedy_decoding_continues(tmp_path: Path) -> None:
    """After a goes b, then c, then a: as long as a document goes on so, it is continued verbatim."""
    tokenizer = char(["abcx"])
    table = torch.full((len(tokenizer), len(tokenizer)), 0.01)
    for here, then in ("ab", "bc", "ca"):
        table[tokenizer.convert_tokens_to_ids(here), tokenizer.convert_tokens_to_ids(then)] = 0.5
    table /= table.sum(1, keepdim=True)
    texts = ["abcabc", "abcax", "xabca", "ab", "abcabcabcabcabcabcabcabcabcx"]
    found = memorized(Table(table), texts, tokenizer, tmp_path)
    assert found.table["continued"].to_pylist() == [4, 2, 3, 0, 14]  # the last as far as 16 positions show
    assert found.table["long_enough"].to_pylist() == [True, True, True, False, True]
    assert found.table["score"].to_pylist() == [1, 0, 1, 0, 1]
    figures = found.certificate["figures"]
    assert (figures["verbatim_share"], figures["continued_tokens"]) == (3 / 4, (4 + 2 + 3 + 14) / 4)
    assert (figures["verbatim_share_low"], figures["verbatim_share_high"]) == wilson(3, 4)
    # Half of the tokens of each document, the least probable ones, by hand; the end of the text is none of them.
    for text, nll in zip(texts, found.table["min_k_nll"].to_pylist(), strict=True):
        ids = [tokenizer.bos_token_id or tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        costs = sorted((-float(table[a, b].log()) for a, b in pairwise(ids)), reverse=True)
        assert nll == pytest.approx(np.mean(costs[: len(text) // 2]))
    assert found.terms.sum(0).tolist() == [3, 4]


def test_it_is_what_a_model_generates(tmp_path: Path) -> None:
    """Held against the tokens that transformers' greedy `generate` writes after the prefix."""
    tokenizer = char(["abc "])
    model, texts = gpt2(tokenizer).double(), list[str]()
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def greedy(prompt: str, count: int) -> str:
        ids = torch.tensor([[opening, *tokenizer(prompt, add_special_tokens=False).input_ids]])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
        return tokenizer.decode(out[0, ids.shape[1] :])

    for prompt in ("ab", "c ", "ba", "cc", "a "):
        written = greedy(prompt, 6)
        texts += [prompt + written, prompt + written[:2] + "abc", prompt + "b" * 5]
    texts = [text for text in texts if "<" not in text]
    assert len(texts) > 5
    found = memorized(model, texts, tokenizer, tmp_path)
    for text, continued in zip(texts, found.table["continued"].to_pylist(), strict=True):
        same = [a == b for a, b in zip(text[2:], greedy(text[:2], len(text) - 2), strict=False)]
        assert continued == (len(same) if all(same) else same.index(False))
    assert len({*found.table["continued"].to_pylist()}) > 1


def test_a_masked_model_has_no_continuation(tmp_path: Path) -> None:
    tokenizer, model = tokenizer_named("wordpiece"), model_for("wordpiece", "bert")
    found = memorized(model, ["the cat sat", "mat"], tokenizer, tmp_path, MaskedLM(tokenizer), score="pseudo")
    assert found.certificate["figure"] == "min_k_nll"
    assert found.certificate["figures"] == {"min_k_nll": pytest.approx(np.mean(found.table["min_k_nll"]))}
    assert found.terms[:, 1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "keys", "said"),
    [
        ({"prefix": 9}, {}, "no document has the 9 tokens of the prefix and 3 more: the longest has 11."),
        ({"prefix": 8}, {"block": 8}, "have 11 tokens together, and the model sees 8 at once"),
    ],
)
def test_what_can_not_be_measured(settings: Any, keys: Any, said: str, tmp_path: Path) -> None:
    tokenizer, size = char(["abc"]), keys.get("block", 16)
    data = prepared(["abcabcabcab", "a"], tokenizer, tmp_path, size)
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        memorization.check(held_out_of(data, CausalLM(), size, context="document"), SETTINGS | settings)


def test_auroc() -> None:
    random = np.random.default_rng(0)
    lower, higher = random.integers(0, 9, 40), random.integers(2, 12, 30)
    pairs = [(a < b) + (a == b) / 2 for a in lower for b in higher]
    assert memorization.auroc(lower, higher) == pytest.approx(np.mean(pairs))


# --- Generation ---


def written(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, **settings: Any) -> Any:
    numbered = [*enumerate(prompts)]
    return generation.continued(
        model, numbered, tokenizer=tokenizer, batch_size=batch_size, settings=WRITING | settings
    )


def test_no_batch_size_changes_what_is_written() -> None:
    tokenizer = char(["abc "])
    model = gpt2(tokenizer).double()
    prompts = np.random.default_rng(0).integers(0, len(tokenizer), (7, 4)).tolist()
    alone = written(model, tokenizer, prompts, 1)
    for batch_size in (3, 8):
        assert written(model, tokenizer, prompts, batch_size) == alone
    assert written(model, tokenizer, prompts, 8, seed=2) != alone
    greedy = written(model, tokenizer, prompts, 8, temperature=0)
    assert written(model, tokenizer, prompts, 8, top_k=1) == greedy
    ids = torch.tensor(prompts[:1])
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    end = tokenizer.eos_token_id
    tokens = out[0, 4:].tolist()
    assert greedy[0] == ((tokens[: tokens.index(end)], True) if end in tokens else (tokens, False))


def test_nothing_that_comes_with_a_model_changes_what_is_written() -> None:
    tokenizer = char(["abc "])
    model, other = gpt2(tokenizer), gpt2(tokenizer)
    other.generation_config.update(repetition_penalty=9.0, do_sample=True, num_beams=2)
    prompts = [[2, 3, 4, 2]] * 3
    assert written(other, tokenizer, prompts, 3) == written(model, tokenizer, prompts, 3)


def test_a_token_is_drawn_with_its_probability() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    numbers = range(4000)
    noisy = generation.add_noise(torch.zeros(4000, 5), scores.repeat(4000, 1), seed=3, numbers=numbers, prefix=4)
    drawn = np.bincount(noisy.argmax(1).numpy(), minlength=4) / 4000
    expected = scores[0].softmax(0).numpy()
    # Six standard deviations of a share.
    assert np.all(np.abs(drawn - expected) < 6 * np.sqrt(expected * (1 - expected) / 4000))


def test_distinct_and_repetition() -> None:
    assert generation.distinct(["a b a b", "a b"], 1) == 2 / 6
    assert generation.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert generation.distinct(["a", ""], 2) is None
    assert generation.repetition("a b c d a b c d a b c d") == 1 - 4 / 9
    assert generation.repetition("a b c") == 0.0


def test_records_of_what_is_written(tmp_path: Path) -> None:
    """The texts of documents that are long enough, each beside its reference; the certificate follows from them."""
    import lightning as L

    tokenizer = char(["abc "])
    model, texts = gpt2(tokenizer), ["abcab cab", "ab", "c c c c c c c c", "bbbb cc aa bb", "aaaa"]
    data = prepared(texts, tokenizer, tmp_path, 16)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    facts = {"tokenizer_hash": "", "weights_hash": "", "precision": "32-true", "model": "m", "run": None}
    generation.measure(
        model,
        tokenizer,
        tmp_path / "out",
        documents=data.validation,
        trainer=trainer,
        batch_size=2,
        settings=WRITING | {"mauve": None},
        facts=facts,
    )
    found = certificates.read(tmp_path / "out")
    rows = found.table.to_pylist()
    assert [row["prompt"] + row["reference"] for row in rows] == [text[:10] for text in texts if len(text) > 4]
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompt = [opening, *tokenizer(rows[0]["prompt"], add_special_tokens=False).input_ids]
    ((first, _),) = written(model, tokenizer, [prompt], 1)
    assert tokenizer.decode(first, skip_special_tokens=True) == rows[0]["text"]
    assert all(row["tokens"] <= 6 and (row["ended"] or row["tokens"] == 6) for row in rows)
    figures = found.certificate["figures"]
    assert figures["distinct_1"] == generation.distinct([row["text"] for row in rows], 1)
    assert figures["reference_distinct_1"] == generation.distinct([row["reference"] for row in rows], 1)
    with pytest.raises(UserError, match="the model 32 positions"):
        generation.check(model, WRITING | {"continuation": 30, "mauve": None})
    with pytest.raises(UserError, match="is for causal models"):
        generation.check(model_for("wordpiece", "bert"), WRITING | {"mauve": None})
