"""The sides of a comparison: evaluations that can be compared, grouped by configuration.

A *side* is one evaluation, or the evaluations of several runs that differ in their seed only. If documents are few,
stretches of them are paired in place of documents (data/documents.py).

Shapes: D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.errors import UserError, nearest
from lmlab.evaluation.metrics import BOUND, EXACT
from lmlab.evaluation.records import Records, is_bound
from lmlab.evaluation.suites.certificates import read
from lmlab.runs.choices import as_typed, config_choices
from lmlab.runs.directory import RunDirectory

OF_MASKS = ("objective", "masks_seed", "pseudo", "elbo")
"""The entries of a policy that say which tokens are hidden and scored; where all are scored, they need not agree."""
OF_MASKED_ANSWERS = ("score", "within_word", "draws", "tasks", "task_path")
"""The settings of a suite that need not agree: how a masked model scores, and names of what is compared by content."""
DEFAULTS = {"document_attention": False, "score_end": True}
"""The values of entries that a policy names only where they are others."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an evaluation, or those of several seeds."""

    name: str
    runs: list[Records]
    exact: bool = True
    """False if the bits per byte are an upper bound by the metric's definition, whatever the tokenizer can spell."""

    @cached_property
    def sums(self) -> np.ndarray:
        """[D, 2]: the `Records.terms` of each document, bits and bytes, as means over the runs."""
        means: np.ndarray = np.mean([run.terms for run in self.runs], axis=0)
        return means

    @cached_property
    def ratios(self) -> np.ndarray:
        """[runs]: their ratio over all documents, bits per byte, of each run."""
        return np.array([ratio(run.terms.sum(axis=0)) for run in self.runs])

    def of_domain(self, domain: str) -> "Side":
        """Returns the side with the text of one domain only."""
        return replace(self, runs=[run.of_domain(domain) for run in self.runs])

    @property
    def bound(self) -> bool:
        """True if the bits per byte are an upper bound of what they would be exactly."""
        return any(is_bound(run.certificate) for run in self.runs)


def read_evaluations(paths: Sequence[Path]) -> list[Records]:
    """Reads the evaluations in directories; a directory without one stands for all those under it.

    Raises:
        UserError: a directory holds no evaluation, one is named twice, or there is only one.
    """
    found: list[Path] = []
    for path in paths:
        certificate = RunDirectory(path).certificate
        under = [path] if certificate.is_file() else sorted(file.parent for file in path.rglob(certificate.name))
        if not under:
            raise UserError(
                f"{path} holds no evaluation (no {certificate.name}).\n"
                "A run writes one at its end; for any other model: python -m lmlab.evaluate model=…"
            )
        found += under
    twice = next((path for i, path in enumerate(found) if path.resolve() in map(Path.resolve, found[:i])), None)
    if twice:
        raise UserError(f"{twice} is named twice.")
    if len(found) < 2:
        raise UserError(f"{found[0]} is the only evaluation. Name at least two directories.")
    return [read(path) for path in found]


def align(runs: Sequence[Records]) -> list[Records]:
    """Returns evaluations of one text with rows of one kind: whole documents, unless all of them have stretches."""
    return [*runs] if len({len(run.table) for run in runs}) == 1 else [run.by_document() for run in runs]


def row_unit(runs: Sequence[Records]) -> str:
    """Returns the name of the rows that are paired: "stretches" if any is a part of a document, or else "documents"."""
    return "stretches" if any(run.table["stretch"].to_numpy().any() for run in runs) else "documents"


def check_comparable(runs: Sequence[Records]) -> None:
    """Refuses evaluations whose metrics do not mean the same.

    Exact metrics of a text and upper bounds of them are compared, whatever objectives they are of: in each, every
    token is scored.

    Raises:
        UserError: they differ in the metric, the text, the policy, or the tokens that were drawn.
    """
    first = runs[0]
    same = "Evaluate both in the same way: python -m lmlab.evaluate model=… data=… context=…"
    for other in runs[1:]:
        one, two = first.certificate, other.certificate
        both = f"{first.path} and {other.path} can't be compared:"
        suites = [certificate.get("suite") for certificate in (one, two)]
        if suites[0] != suites[1]:
            measures = " and ".join(f"suite={name}" if name else "the nll of held-out text" for name in suites)
            raise UserError(f"{both} {measures} are not the same measure.\nName evaluations of one of them.")
        if suites[0]:
            if one["data_hash"] != two["data_hash"]:
                raise UserError(
                    f"{both} what they measured is not the same: other pairs, text or examples, or other groups of "
                    f"them.\nEvaluate both on the same: python -m lmlab.evaluate model=… suite={suites[0]} …"
                )
            settings = [certificate.get("settings", {}) for certificate in (one, two)]
            for key in [key for key in settings[0] if key not in OF_MASKED_ANSWERS]:
                here, there = (values.get(key) for values in settings)
                if here != there:
                    raise UserError(f"{both} {key} is {as_typed(here)} in one and {as_typed(there)} in the other.")
            if one["figure"] != two["figure"]:
                raise UserError(f"{both} {one['figure']} is not {two['figure']}.")
            if not len(first.table):
                raise UserError(f"{both} no example has a score of its own. Their metrics are in a report.")
            continue
        figures = {one["figure"], two["figure"]}
        whole = figures <= {EXACT, BOUND}  # every token of the text is scored
        mixed = len(figures) > 1
        if mixed and not whole:
            context = one["policy"]["context"]
            bound = (
                f", or a bound of\nthe masked one: python -m lmlab.evaluate RUN score=elbo context={context}"
                if "masked_perplexity" in figures and figures & {EXACT, BOUND}
                else "."
            )
            raise UserError(
                f"{both} {one['figure']} is not {two['figure']}.\n"
                f"Models of different objectives predict other tokens, or from other text. Compare those of one{bound}"
            )
        if one["data_hash"] != two["data_hash"]:
            names = {*first.table["document"].to_pylist()}
            shared = len(names & {*other.table["document"].to_pylist()})
            raise UserError(
                f"{both} they were evaluated on other text; {shared or 'no'} of {len(names)} documents "
                f"{'is' if shared == 1 else 'are'} in both.\n{same}"
            )
        free = [*OF_MASKS] if whole else []
        if mixed:
            free.append("stride")  # a model that sees both sides has no overlapping windows
        for key in [key for key in one["policy"] | two["policy"] if key not in free]:
            here, there = ((DEFAULTS | certificate["policy"]).get(key) for certificate in (one, two))
            if here != there:
                hint = same.replace("context=…", "context=document") if key == "document_attention" else same
                raise UserError(f"{both} {key} is {as_typed(here)} in one and {as_typed(there)} in the other.\n{hint}")
        # A causal model is not scored on the first token of a document, which is more text in some tokenizers.
        differs = mixed or one["tokenizer_hash"] != two["tokenizer_hash"]
        if one["policy"].get("document_attention") and differs and EXACT in figures:
            raise UserError(
                f"{both} with document attention the first token of each document is not scored, which is not the "
                "same text in both.\nEvaluate both document by document: python -m lmlab.evaluate RUN context=document"
            )
        # The tokens that are masked, or sampled, are drawn one by one.
        drawn = one["policy"]["masks_seed"] is not None or (one["policy"]["pseudo"] or {}).get("sample")
        if drawn and not whole and one["tokenizer_hash"] != two["tokenizer_hash"]:
            raise UserError(
                f"{both} their tokenizers differ, so other parts of the text were scored.\n"
                "score=pseudo without a sample scores every token, and compares across tokenizers."
            )


def run_choices(run: Records) -> dict[str, Any]:
    """Returns the choices of the evaluated run by dotted keys; for any other model, its name and hash."""
    trained, precision = run.certificate["run"], {"evaluated in": run.certificate["precision"]}
    if trained is None:
        return {"model": run.certificate["model"], "weights": run.certificate["weights_hash"]} | precision
    return config_choices(trained["config"]) | precision


def shared_draw(one: Records, other: Records) -> str | None:
    """Returns what makes two runs of one configuration a single draw: "weights", "seed", or None for two draws."""
    if one.certificate["weights_hash"] == other.certificate["weights_hash"]:
        return "weights"
    trained = [run.certificate["run"] for run in (one, other)]
    seeds = [run["config"].get("seed") for run in trained if run]
    return "seed" if len(seeds) == 2 and seeds[0] == seeds[1] is not None else None


def make_sides(runs: Sequence[Records]) -> list[Side]:
    """Takes runs that differ in their seed only together as one side, unless that would leave a single side.

    Raises:
        UserError: a side would count the same weights, or the same seed, twice.
    """
    groups: dict[str, list[Records]] = {}
    for run in runs:
        groups.setdefault(repr(sorted((run_choices(run) | {"seed": None}).items())), []).append(run)
    together = list(groups.values()) if len(groups) > 1 else [[run] for run in runs]
    for group in together:
        for one, other in combinations(group, 2):
            same = shared_draw(one, other)
            if same:
                raise UserError(
                    f"{one.path} and {other.path} are evaluations of the same {same}: as runs of several seeds "
                    "they would count twice.\nLeave one of them out."
                )
    keys = differing_choices([Side("", group) for group in together])
    names = [", ".join(f"{key}={as_typed(values[i])}" for key, values in keys.items()) for i, _ in enumerate(together)]
    if not 0 < len(keys) <= 3 or len(set(names)) < len(names):  # too long, or they differ in machinery alone
        names = [f"{group[0].path}{f' and {len(group) - 1} more' if len(group) > 1 else ''}" for group in together]
    exact = [group[0].certificate["figure"] != BOUND for group in together]
    return [Side(*side) for side in zip(names, together, exact, strict=True)]


def differing_choices(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Returns the keys in which the sides' choices differ, with the value of each side; None if it lacks the key."""
    choices = [run_choices(side.runs[0]) for side in sides]
    keys = dict.fromkeys(key for side in choices for key in side)
    if any(len(side.runs) > 1 for side in sides):
        keys.pop("seed", None)
    values = {key: [side.get(key) for side in choices] for key in keys}
    return {key: of_sides for key, of_sides in values.items() if any(value != of_sides[0] for value in of_sides)}


def find_side(sides: Sequence[Side], name: str) -> int:
    """Returns the index of the side with this number of its row, from 1, or this name in the table.

    Raises:
        UserError: there is none.
    """
    names = [side.name for side in sides]
    if name.isdecimal() and 1 <= int(name) <= len(sides):
        return int(name) - 1
    if name in names:
        return names.index(name)
    raise UserError(
        f"--against {name}: there is no such row.{nearest(name, names)}\n"
        f"Rows are 1 to {len(sides)}, as the table shows them without --against."
    )


def ratio(sums: np.ndarray) -> np.ndarray:
    """Returns bits per byte [...] from sums of bits and bytes [..., 2]."""
    bits: np.ndarray = sums[..., 0] / sums[..., 1]
    return bits
