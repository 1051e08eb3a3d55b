"""Generation: how varied, repetitive and long the texts are that a causal model writes, and how close to people's.

Each of `prompts` documents is continued from its first `prefix` tokens on, and measured beside the document itself:

- distinct-n: different n-grams of words of all continuations, over all of them (Li et al. 2016, "A Diversity-Promoting
  Objective Function for Neural Conversation Models");
- repetition-n: the share of a continuation's n-grams that it has had before, averaged (seq-rep-n, Welleck et al. 2020,
  "Neural Text Generation with Unlikelihood Training");
- MAUVE: how close the distributions of both kinds of texts are (Pillutla et al. 2021), by its authors' library.

A token is sampled by adding Gumbel noise to the logits and taking the largest, which gives each token its probability
(Gumbel 1954; Maddison et al. 2014). The noise is a function of the seed, the number of the prompt among those that are
drawn, and the step, so neither the batch size nor the number of devices changes what is drawn. All prompts have the
same length, so that none is padded; each begins with the token that opens a text, if the tokenizer has one.

Shapes: B prompts of a batch, P positions of a prompt, V vocabulary.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lmlab.console import counted
from lmlab.data.documents import Documents
from lmlab.data.sampler import draw_subset
from lmlab.errors import UserError, check_installed
from lmlab.evaluation.suites.suite import SuiteRecords, by_group, text_lengths, write_suite
from lmlab.hub import from_hub

if TYPE_CHECKING:  # a comparison and a report need not wait for torch
    import lightning as L
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "generation"
SETTINGS = ("prompts", "prefix", "continuation", "temperature", "top_k", "top_p", "seed", "mauve")
"""The keys of the config that decide what is written and how it is measured."""
DISTINCT = (1, 2, 3)
"""The n of distinct-n."""
REPETITION = 4
"""The n of repetition-n."""
COLUMNS = {
    "document": pa.string(),  # a name made from its text
    "domain": pa.string(),
    "prompt": pa.string(),
    "text": pa.string(),  # what the model wrote
    "reference": pa.string(),  # as many tokens of the document
    "tokens": pa.int64(),  # that the model wrote, an end of text left out
    "ended": pa.bool_(),  # the model ended the text
    "score": pa.float64(),  # repetition-n of the text
    "reference_score": pa.float64(),  # and of the reference
}


class GenerationRecords(SuiteRecords):
    """An evaluation of generated texts that was read from its directory, a row for each."""

    suite, rows, group, groups, measure, better = NAME, "texts", "domain", "domains", "repetition", "more repetitive"
    schema = pa.schema([pa.field(name, kind, False) for name, kind in COLUMNS.items()], {"lmlab_generation": "1"})


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    path: Path,
    *,
    documents: Documents,
    trainer: "L.Trainer",
    batch_size: int,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Lets a model continue documents, and writes records and certificate into a directory. Every rank calls this.

    Args:
        settings: the values of `SETTINGS`.
        facts: further entries of the certificate.

    Raises:
        UserError: the model writes no text, or has no positions for so much; no document is long enough.
    """
    from lmlab.data.sources import fingerprint
    from lmlab.evaluation.suites.ranks import on_each_rank, shared_out
    from lmlab.evaluation.windows import is_one_of, special_ids

    check(model, settings)
    chosen = choose(documents, settings)
    opening = special_ids(tokenizer, "bos", "eos")
    # A document may begin with such a token already.
    starts = documents.edges[chosen] + is_one_of(opening, documents.tokens, documents.edges[chosen])
    ends = documents.edges[chosen] + text_lengths(documents)[chosen]
    sequences = [documents.tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    prefix = settings["prefix"]
    prompts = [(number, [*opening[:1], *sequence[:prefix]]) for number, sequence in enumerate(sequences)]
    write_some = partial(continued, tokenizer=tokenizer, batch_size=batch_size, settings=settings)
    written = on_each_rank(trainer, model, lambda placed: shared_out(prompts, lambda some: write_some(placed, some)))
    if not trainer.is_global_zero:
        return
    firsts = np.flatnonzero(documents.parts.to_numpy() == 0)[chosen]
    names, domains = (column.take(firsts).to_pylist() for column in (documents.names, documents.domain_names))
    rows = []
    for number, sequence in enumerate(sequences):
        tokens, ended = written[number]
        reference = sequence[prefix : prefix + settings["continuation"]]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (sequence[:prefix], tokens, reference)]
        prompt, text, known = texts
        row = {"document": names[number], "domain": domains[number], "prompt": prompt, "text": text}
        row |= {"reference": known, "tokens": len(tokens), "ended": ended}
        rows.append(row | {"score": repetition(text), "reference_score": repetition(known)})
    own = {"figure": f"distinct_{DISTINCT[1]}", "settings": dict(settings)}
    own["data_hash"] = fingerprint("texts", documents.hash, names)
    own["policy"] = {"continues": "left to right"}
    if settings["mauve"]:
        own["mauve"] = mauve(rows, settings)
    table = pa.Table.from_pylist(rows, GenerationRecords.schema)
    write_suite(path, GenerationRecords, table, {**facts, **own}, figures_and_totals)


def check(model: "PreTrainedModel", settings: Mapping[str, Any]) -> None:
    """Refuses a model that does not continue texts, or one that has no positions for so many tokens."""
    from lmlab.models.checks import max_positions
    from lmlab.models.generation import way_of_writing

    if way_of_writing(model) != "generate" or not model.can_generate():
        raise UserError(f"suite={NAME} is for causal models, which continue a text; {type(model).__name__} does not.")
    longest, needed = max_positions(model), settings["prefix"] + settings["continuation"]
    if longest is not None and needed > longest:
        raise UserError(
            f"prefix and continuation have {needed} tokens together, and the model {longest} positions.\n"
            "Lower prefix=… or continuation=…"
        )
    if settings["mauve"]:
        check_featurizer(settings["mauve"])


def check_featurizer(name: str) -> None:
    """Refuses a model by which MAUVE can't be measured, before anything is written."""
    from transformers import AutoConfig

    check_installed("mauve=…", "mauve", "mauve")
    if not any(kind in name for kind in ("gpt2", "bert")):
        raise UserError(f'mauve={name}: its library takes models with "gpt2" or "bert" in their name, and no other.')
    with from_hub("model", name, "mauve"):
        AutoConfig.from_pretrained(name)


def choose(documents: Documents, settings: Mapping[str, Any]) -> np.ndarray:
    """Returns the numbers of the documents whose beginnings are prompts, ascending, drawn by the seed.

    Raises:
        UserError: none has a token after the prefix.
    """
    lengths = text_lengths(documents)
    long_enough = np.flatnonzero(lengths > settings["prefix"])
    if not len(long_enough):
        raise UserError(
            f"no document has more than the {settings['prefix']} tokens of a prompt: the longest has "
            f"{int(lengths.max())}.\nLower prefix=…, or name other text by data=…"
        )
    chosen: np.ndarray = long_enough[draw_subset(settings["seed"], settings["prompts"], len(long_enough))]
    return chosen


def continued(
    model: "PreTrainedModel",
    prompts: Sequence[tuple[int, list[int]]],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    settings: Mapping[str, Any],
) -> list[tuple[list[int], bool]]:
    """Returns for each prompt the tokens that a model goes on with, and whether it ended the text.

    Args:
        prompts: the number of each, from which its noise is made, and its ids, of one length.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    pad = ends[0] if ends else 0
    # In place of the model's own, whose choices, such as a penalty on repetition, `generate` would add.
    model.generation_config = GenerationConfig(
        max_new_tokens=settings["continuation"],
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=model.generation_config.use_cache,
    )
    found: list[tuple[list[int], bool]] = []
    for first in range(0, len(prompts), batch_size):
        numbers, ids = zip(*prompts[first : first + batch_size], strict=True)
        processors = LogitsProcessorList()
        if settings["temperature"]:
            processors.append(TemperatureLogitsWarper(float(settings["temperature"])))
            processors += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
            processors += [TopPLogitsWarper(float(settings["top_p"]))] if settings["top_p"] else []
            processors.append(partial(add_noise, seed=settings["seed"], numbers=numbers, prefix=len(ids[0])))
        batch = torch.tensor(ids, device=model.device)
        with torch.no_grad():
            out = model.generate(batch, attention_mask=torch.ones_like(batch), logits_processor=processors)
        for sequence in out[:, batch.shape[1] :].tolist():
            length = next((i for i, token in enumerate(sequence) if token in ends), len(sequence))
            found.append((sequence[:length], length < len(sequence)))
    return found


def add_noise(ids: Any, scores: Any, *, seed: int, numbers: Sequence[int], prefix: int) -> Any:
    """Adds Gumbel noise to the logits of the next token [B, V], a function of the seed, the prompt and the step.

    Args:
        ids: [B, T] the prompts and what was written so far.
        numbers: [B] the number of each prompt.
        prefix: the tokens of a prompt.
    """
    step = ids.shape[1] - prefix
    noise = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, step]))).gumbel(size=scores.shape[1])
        for number in numbers
    ]
    return scores.double() + scores.new_tensor(np.stack(noise), dtype=scores.double().dtype)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams of the words of a text, which stand between white space."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Returns the different n-grams of texts over all of them; None if there are none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def repetition(text: str) -> float:
    """Returns the share of a text's n-grams that it has had before; 0 if it has none."""
    found = ngrams(text, REPETITION)
    return 1 - len(set(found)) / len(found) if found else 0.0


def mauve(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns MAUVE of the continued prompts and the documents, with all that it depends on."""
    import mauve as library
    import torch

    people, models = ([row["prompt"] + row[key] for row in rows] for key in ("reference", "text"))
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # its progress
    with quiet, from_hub("model", settings["mauve"], "mauve"):
        found = library.compute_mauve(
            p_text=people,
            q_text=models,
            featurize_model_name=settings["mauve"],
            device_id=0 if torch.cuda.is_available() else -1,
            max_text_length=settings["prefix"] + settings["continuation"],
            seed=settings["seed"],
            verbose=False,
        )
    version = getattr(library, "__version__", None)
    return {"mauve": float(found.mauve), "model": settings["mauve"], "texts": len(rows), "version": version}


def figures_and_totals(table: pa.Table, _: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a certificate that follow from its records: `figures`, `totals`, and both by domain."""

    def of(rows: pa.Table) -> dict[str, dict[str, Any]]:
        texts, known = rows["text"].to_pylist(), rows["reference"].to_pylist()
        tokens = rows["tokens"].to_numpy()
        figures = {f"distinct_{n}": distinct(texts, n) for n in DISTINCT}
        figures |= {f"reference_distinct_{n}": distinct(known, n) for n in DISTINCT}
        for name, column in (("", "score"), ("reference_", "reference_score")):
            figures[f"{name}repetition_{REPETITION}"] = math.fsum(rows[column].to_numpy()) / len(rows)
        figures |= {"tokens_per_text": float(tokens.mean()), "ended_share": float(np.mean(rows["ended"].to_numpy()))}
        return {"figures": figures, "totals": {"texts": len(rows), "tokens": int(tokens.sum())}}

    return by_group(table, GenerationRecords, of)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate and on how it was written, by titles."""
    figures, settings = certificate["figures"], certificate["settings"]
    lines = {}
    for name in (*(f"distinct_{n}" for n in DISTINCT), f"repetition_{REPETITION}"):
        value, known = (figures[key] for key in (name, f"reference_{name}"))
        shown = ["none" if each is None else f"{each:.4f}" for each in (value, known)]
        lines[name.replace("_", "-")] = f"{shown[0]}, of the documents {shown[1]}"
    lines["length"] = f"{figures['tokens_per_text']:.1f} tokens, {100 * figures['ended_share']:.1f} % ended"
    if "mauve" in certificate:
        lines["MAUVE"] = f"{certificate['mauve']['mauve']:.4f}, by {certificate['mauve']['model']}"
    choices = {name.replace("_", "-"): settings[name] for name in ("temperature", "top_k", "top_p")}
    sampled = [f"{name} {value:g}" for name, value in choices.items() if value]
    how = ", ".join(sampled) if settings["temperature"] else "the most probable token"
    lines["written"] = f"{how}, seed {settings['seed']}"
    texts = counted(certificate["totals"]["texts"], "text")
    tokens = f"{settings['continuation']} tokens, each after {settings['prefix']} of a document"
    lines["texts"] = f"{texts} of at most {tokens}"
    return lines
