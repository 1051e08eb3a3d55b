"""Minimal pairs, against minicons (Misra 2022), with the same score of each sentence.

  python -m benchmarks.minimal_pairs                        a causal model
  python -m benchmarks.minimal_pairs objective=mlm          a masked one, by its within-word pseudo-log-likelihood

A turn of either side reads the file of pairs and scores all of its sentences; lmlab also writes its records.
minicons is to be installed besides (pip install minicons), and takes the sentences in the order of the file.

Keys, with their defaults:

  objective=clm         clm, mlm
  model=                an exported model; without one, random weights of a size and a tokenizer of the embedded corpus
  size=small            tiny, small, distil, gpt2
  batch_size=64         rows at once
  count=500             pairs: sentences of the embedded corpus, and the same with two words exchanged
  pairs=3               turns of each side
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import Arguments
from benchmarks.pairs import Side, agreement, outcome, take_turns, workplace
from benchmarks.results import verb
from benchmarks.side import Turns, synchronize
from benchmarks.train import make_model
from lmlab.errors import UserError

POSITIONS = 256
TOLERANCE = 1e-5


@dataclass
class Settings(Arguments):
    objective: Literal["clm", "mlm"] = "clm"
    model: str = ""
    size: Literal["tiny", "small", "distil", "gpt2"] = "small"
    batch_size: int = 64
    count: int = 500
    pairs: int = 3

    @property
    def causal(self) -> bool:
        return self.objective == "clm"


def compare(settings: Settings) -> dict[str, Any]:
    with workplace() as folder:
        make(folder, settings)
        with (
            Side("minimal_pairs", "lmlab", settings, folder) as ours,
            Side("minimal_pairs", "minicons", settings, folder) as theirs,
        ):
            nll = {side.name: side.turn()["losses"] for side in (ours, theirs)}
            pairs = take_turns((ours, theirs), settings.pairs, (settings.count, settings.count))
            memory = {side.name: side.end() for side in (ours, theirs)}
    agreed = agreement(nll, TOLERANCE)
    agreed["losses"] = {name: values[:10] for name, values in nll.items()}  # nll of the first sentences, in nats
    return outcome(pairs, agreed, memory) | ours.facts | {"unit": "pairs/s"}


def make(folder: Path, settings: Settings) -> None:
    """Writes the pairs and, unless one is given, a model with its tokenizer."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from lmlab.data.sources import load_sample
    from lmlab.data.texts import flatten
    from lmlab.data.tokenizers import bpe

    disable_progress_bar()
    corpus = load_sample()
    assert corpus.train is not None
    texts = [text for of_record in flatten(corpus.train, corpus.text) for text in of_record]
    sentences = dict.fromkeys(sentence for text in texts for sentence in re.split(r"(?<=[.?!])\s+", text))
    lines = []
    for sentence in sentences:
        words = sentence.split()
        middle = len(words) // 2
        if 6 <= len(words) <= 40 and words[middle] != words[middle - 1]:
            bad = [*words[: middle - 1], words[middle], words[middle - 1], *words[middle + 1 :]]
            lines += [" ".join(bad), " ".join(words)]
    if len(lines) < 2 * settings.count:
        raise UserError(f"count={settings.count}: the embedded corpus gives {len(lines) // 2} pairs at most.")
    (folder / "pairs.txt").write_text("\n".join(lines[: 2 * settings.count]) + "\n")
    if not settings.model:
        tokenizer = bpe(texts, vocab_size=2000)
        tokenizer.save_pretrained(folder / "model")
        torch.manual_seed(0)
        make_model(tokenizer, settings.size, settings.causal, POSITIONS).save_pretrained(folder / "model")


# --- the sides, each in a process of its own


def serve(name: str, values: dict[str, Any], folder: str, turns: Turns) -> None:
    settings = Settings(**values)
    once = (lmlab_side if name == "lmlab" else minicons_side)(settings, Path(folder), turns)
    while True:
        turns.order()
        synchronize()
        began = time.perf_counter()
        nll = once()
        synchronize()
        turns.reply(seconds=time.perf_counter() - began, losses=nll)


def load(settings: Settings, folder: Path) -> tuple[Any, Any]:
    """Returns the model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    kind = AutoModelForCausalLM if settings.causal else AutoModelForMaskedLM
    path = settings.model or folder / "model"
    return kind.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def lmlab_side(settings: Settings, folder: Path, turns: Turns) -> Callable[[], list[float]]:
    """Returns what `python -m lmlab.evaluate suite=minimal_pairs` does once its model is loaded."""
    from lmlab.data.options import Preprocessing
    from lmlab.data.pairs import load_pairs, read_pairs
    from lmlab.data.prepared import prepare_validation
    from lmlab.evaluation.certify import certify, hold_out
    from lmlab.evaluation.suites import minimal_pairs
    from lmlab.evaluation.windows import Context
    from lmlab.objectives.clm import CausalLM
    from lmlab.objectives.mlm import MaskedLM

    turns.ready()
    model, tokenizer = load(settings, folder)
    objective: Any = CausalLM() if settings.causal else MaskedLM(tokenizer)
    pseudo = None if settings.causal else {"within_word": True, "sample": None, "seed": None}
    choices = Preprocessing(block_size=POSITIONS, end_of_text=False)
    file, out = str(folder / "pairs.txt"), folder / "records"
    turn = iter(range(10**6))

    def once() -> list[float]:
        pairs, cache = read_pairs(file), folder / f"cache-{next(turn)}"
        data = prepare_validation(load_pairs(file), choices, tokenizer, cache)
        held_out = hold_out(data, objective, Context("document", POSITIONS), choices, pseudo=pseudo)
        minimal_pairs.check(pairs, held_out)
        write = partial(minimal_pairs.write, pairs=pairs)
        certify(model, held_out, out, batch_size=settings.batch_size, write=write)
        rows = minimal_pairs.read(out).table.select(["nll_bad", "nll_good"]).to_pylist()
        return [nll for row in rows for nll in row.values()]

    return once


def minicons_side(settings: Settings, folder: Path, turns: Turns) -> Callable[[], list[float]]:
    """Returns minicons' sums of log-probabilities, sentence by sentence."""
    try:
        from minicons.scorer import IncrementalLMScorer, MaskedLMScorer
    except ImportError as error:
        raise UserError("minicons is not installed: pip install minicons") from error

    turns.ready()
    model, tokenizer = load(settings, folder)
    if settings.causal:
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        scorer: Any = IncrementalLMScorer(model, tokenizer=tokenizer)
        options: dict[str, Any] = {"bos_token": True}
    else:
        if tokenizer.cls_token is None:  # minicons puts around a sentence what the tokenizer does, lmlab what it has
            from tokenizers.processors import TemplateProcessing

            end, number = tokenizer.eos_token, tokenizer.eos_token_id
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end} $A {end}", None, [(end, number)])
            tokenizer.add_special_tokens({"cls_token": end, "sep_token": end})
        if not hasattr(tokenizer, "batch_encode_plus"):  # which minicons calls, and transformers 5 has no more
            tokenizer.batch_encode_plus = tokenizer.__call__
        scorer, options = MaskedLMScorer(model, tokenizer=tokenizer), {"PLL_metric": "within_word_l2r"}

    def once() -> list[float]:
        lines = (folder / "pairs.txt").read_text().splitlines()
        size = settings.batch_size
        return [
            -value
            for start in range(0, len(lines), size)
            for value in scorer.sequence_score(
                lines[start : start + size], reduction=lambda scores: scores.sum().item(), **options
            )
        ]

    return once


if __name__ == "__main__":
    verb("minimal_pairs", __doc__, Settings, compare)
