"""Mixtures: several sources whose blocks are drawn in given shares.

Which source gives each sample of a run is a pure function of the sample's number. Let source s have the share p of the
samples: its k-th sample falls due at the time (k + φ)/p, where φ is a number of its own below 1, and the samples of all
sources come in the order in which they fall due (stride scheduling, Waldspurger and Weihl 1995).

    shares 3/4 and 1/4     a a a b a a a b a a a b …

So at any time each source has given its share to within a sample or so, in each batch as in the whole run. Each source
has epochs of its own, and an order of its own in each.

Shapes: S sources, K times at which shares change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Gt, Le
from torch.utils.data import Dataset as TorchDataset

from lmlab.data.blocks import Blocks, Ledger, group_documents
from lmlab.data.documents import join_domains, running_sums
from lmlab.data.options import Preprocessing, Share
from lmlab.data.sampler import LISTED, ROUNDS, Draw, epoch_order, order_keys, permute
from lmlab.data.sources import Corpus, fingerprint
from lmlab.errors import UserError

if TYPE_CHECKING:
    from lmlab.data.prepared import Prepared, Tokenized

STAGES = 256
"""The number of equal stages in which shares go from `weight` to `final_weight`."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Mixture:
    """Several sources, and the share of each."""

    corpora: "dict[str, Corpus | Tokenized]"
    shares: dict[str, Share]
    temperature: float
    anneal: float


def mix(
    sources: dict[str, Any],
    corpora: "Mapping[str, Corpus | Tokenized]",
    temperature: Annotated[float, Gt(0)] = 1.0,
    anneal: Annotated[float, Gt(0), Le(1)] = 1.0,
) -> Mixture:
    """Makes a mixture of sources.

    Args:
        sources: the block of each source by its name: that of a data set, with the keys of `Share`. Held-out text of
            each source is a domain of that name. Without weights, each source gets the share of its size.
        corpora: what these blocks load.
        temperature: without weights, a source of n tokens gets a share in proportion to n^(1/temperature): above 1
            small sources get more than their size (Conneau et al. 2020, section 3.1).
        anneal: the share of the run, at its end, over which weights go from `weight` to `final_weight`.

    Raises:
        UserError: the shares do not fit together.
    """
    shares = {name: Share(**share_of(source)) for name, source in sources.items()}
    if not shares:
        raise UserError(
            "data.sources={} names no source: '{web: {train: web.txt}, books: {train: books.txt}}' names two."
        )
    for key in ("weight", "epochs"):
        given = [name for name, share in shares.items() if getattr(share, key) is not None]
        lacking = [name for name in shares if name not in given]
        if given and lacking:
            raise UserError(
                f"data.sources.{lacking[0]} has no {key}, and {given[0]} has. Give all sources one, or none."
            )
        if given and key == "epochs" and any(share.weight is not None for share in shares.values()):
            raise UserError("data.sources: weight and epochs both say how much a source gives. Leave out one of them.")
        if given and temperature != 1:
            raise UserError(f"data.temperature is for sources without {key}: leave one of the two out.")
    for name, share in shares.items():
        for key, value in asdict(share).items():
            if value == math.inf:
                raise UserError(f"data.sources.{name}.{key}={value} is no number to mix by. Give it a finite one.")
        if share.final_weight is not None and share.weight is None:
            raise UserError(
                f"data.sources.{name}.final_weight needs data.sources.{name}.weight, which it goes on from."
            )
    for key, weights in (
        ("weight", [s.weight for s in shares.values()]),
        ("final_weight", [*map(last, shares.values())]),
    ):
        if weights[0] is not None and not sum(filter(None, weights)):
            raise UserError(f"data.sources: the sources have the {key} 0 together. Give one of them more.")
    return Mixture(dict(corpora), shares, temperature, anneal)


def share_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a source's block that say its share."""
    return {key: source[key] for key in Share.__dataclass_fields__ if key in source}


def last(share: Share) -> float | None:
    """Returns the weight of a source at the end of training."""
    return share.weight if share.final_weight is None else share.final_weight


@dataclass(frozen=True, eq=False)
class MixedBlocks(TorchDataset[np.ndarray]):
    """The blocks of several sources, numbered end to end: those of the first source come first."""

    sources: dict[str, Blocks]
    mixture: Mixture

    def __post_init__(self) -> None:
        sizes = np.array([len(blocks) for blocks in self.sources.values()])
        object.__setattr__(self, "edges", running_sums(sizes))

    edges: np.ndarray = None  # type: ignore[assignment]
    """[S + 1] int64: source s has the blocks edges[s] … edges[s + 1] - 1."""

    def __len__(self) -> int:
        return int(self.edges[-1])

    def find(self, index: int) -> tuple[Blocks, int]:
        """Returns the source of a block, and the block's number there."""
        source = int(np.searchsorted(self.edges, index, side="right")) - 1
        return [*self.sources.values()][source], index - int(self.edges[source])

    def __getitem__(self, index: int) -> np.ndarray:
        blocks, number = self.find(index)
        return blocks[number]

    def continues(self, index: int) -> np.ndarray | None:
        """Returns `Blocks.continues` of a block."""
        blocks, number = self.find(index)
        return blocks.continues(number)

    def documents(self, index: int) -> np.ndarray | None:
        """Returns `Blocks.documents` of a block."""
        blocks, number = self.find(index)
        return blocks.documents(number)

    @property
    def lengths(self) -> np.ndarray:
        """The lengths that blocks have, each once."""
        return np.unique(np.concatenate([blocks.lengths for blocks in self.sources.values()]))

    @property
    def tokens(self) -> np.ndarray:
        """[S]: the tokens of the blocks of each source."""
        return np.array([blocks.kept for blocks in self.sources.values()])

    @property
    def epoch(self) -> int:
        """The number of samples of an epoch: all blocks once, or each source `epochs` times."""
        epochs = np.array([share.epochs or 1.0 for share in self.mixture.shares.values()])
        return max(1, round(float(epochs @ np.diff(self.edges))))

    def order(self, samples: int) -> "MixedOrder":
        """Returns the order in which a run of so many samples draws the blocks."""
        sizes, tokens = np.diff(self.edges), self.tokens
        shares = self.mixture.shares.values()
        if None not in (weights := [share.weight for share in shares]):
            first, final = np.array(weights, float), np.array([*map(last, shares)], float)
        elif None not in (epochs := [share.epochs for share in shares]):
            first = final = np.array(epochs, float) * tokens
        else:
            first = final = tokens ** (1 / self.mixture.temperature)
        # The shares are of tokens, and a source may have blocks that are not full.
        rates = np.stack([first / first.sum(), final / final.sum()]) * sizes / tokens
        rates /= rates.sum(1, keepdims=True)
        changes = [0.0, samples * (1 - self.mixture.anneal), float(samples)]
        if (rates[0] == rates[1]).all():
            return MixedOrder(tuple(sizes.tolist()), np.zeros(1), rates[:1])
        stages = (np.arange(STAGES) + 0.5)[:, None] / STAGES
        starts = np.linspace(changes[1], changes[2], STAGES + 1)
        between = rates[0] + stages * (rates[1] - rates[0])
        return MixedOrder(
            tuple(sizes.tolist()), np.append(0.0, starts), np.concatenate([rates[:1], between, rates[1:]])
        )


def with_draws(ledger: Mapping[str, Ledger], blocks: Any, samples: int) -> dict[str, Ledger]:
    """Returns a ledger that also says what a run of so many samples draws from each source of a mixture.

    Tokens are counted by the mean length of a source's blocks, of which all but the last are of one length by default.
    """
    if not isinstance(blocks, MixedBlocks):
        return dict(ledger)
    drawn, sizes = blocks.order(samples).counts(samples), np.diff(blocks.edges)
    tokens = drawn * blocks.tokens / sizes
    of_run: dict[str, dict[str, Any]] = {
        f"train/{name}": {
            "samples_drawn": int(drawn[s]),
            "share_of_tokens": round(float(tokens[s] / tokens.sum()), 6),
            "epochs_read": round(float(drawn[s] / sizes[s]), 6),
        }
        for s, name in enumerate(blocks.sources)
    }
    return {split: replace(counts, **of_run.get(split, {})) for split, counts in ledger.items()}


def order_of(blocks: Any, samples: int) -> "int | MixedOrder":
    """Returns the order in which a run of so many samples draws blocks: of one source it is known by their number."""
    return blocks.order(samples) if isinstance(blocks, MixedBlocks) else len(blocks)


class MixedOrder:
    """The order of the samples of a run that draws from several sources."""

    def __init__(self, sizes: Sequence[int], starts: np.ndarray, rates: np.ndarray):
        """Adds up the shares.

        Args:
            sizes: [S] the blocks of each source.
            starts: [K] the number of the sample from which on the sources have the shares `rates`; the first is 0.
            rates: [K, S] the share of the samples that each source gives.
        """
        self.sizes = np.array(sizes)
        self.blocks = running_sums(self.sizes)
        self.times = np.append(starts, starts[-1] + 2.0**50)
        due = np.cumsum(np.diff(self.times)[:, None] * rates, axis=0)
        self.due = np.concatenate([np.zeros((1, len(sizes))), due])
        """[K + 1, S]: the samples of each source that are due at `times`."""
        self.phases = (GOLDEN * np.arange(1, len(sizes) + 1)) % 1

    def sources(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of `count` samples from `first` on, and the number of each among its source's: [count]."""
        _, source, number, before = self.events(first, count)
        return source[first - before :][:count], number[first - before :][:count]

    def counts(self, samples: int) -> np.ndarray:
        """Returns the number of each source's among the first samples: [S] int64."""
        _, source, number, before = self.events(samples, 0)
        counts = np.array([number[source == s].min() for s in range(len(self.sizes))])
        return counts + np.bincount(source[: samples - before], minlength=len(self.sizes))

    def events(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Returns the samples around `first` … `first + count - 1`, in order: their times, sources and numbers.

        At any time t, no source has given one sample more or less than is due, so t and the number of samples before
        differ by the number of sources at most. What is looked at is all between two times that are that far outside.
        The last value is how many samples there are before the first one returned.
        """
        some = len(self.sizes) + 1
        times, sources, numbers, before = [], [], [], 0
        for s in range(len(self.sizes)):
            low, high = np.interp([first - some, first + count + some], self.times, self.due[:, s])
            number = np.arange(max(0, math.floor(low) - 1), math.floor(high) + 2)
            before += int(number[0])
            times.append(np.interp(number + self.phases[s], self.due[:, s], self.times))
            sources.append(np.full(len(number), s))
            numbers.append(number)
        time, source, number = map(np.concatenate, (times, sources, numbers))
        order = np.lexsort([source, time])
        return time[order], source[order], number[order], before

    def draws(self, seed: int, first: int, count: int) -> list[Draw]:
        """Returns the samples `first` … `first + count - 1` of a run."""
        source, number = self.sources(first, count)
        epochs, positions = np.divmod(number, self.sizes[source])
        blocks, sizes, keys = positions, self.sizes[source], np.zeros((ROUNDS, count), np.uint64)
        for s, epoch in {*zip(source.tolist(), epochs.tolist(), strict=True)}:
            own = (source == s) & (epochs == epoch)
            # Sources of one size have orders of their own.
            of_source = (seed + s * 0x9E3779B97F4A7C15) % 2**64
            if self.sizes[s] <= LISTED:
                blocks[own] = epoch_order(of_source, epoch, int(self.sizes[s]))[positions[own]]
            else:
                keys[:, own] = order_keys(of_source, epoch)[:, None]
        large = sizes > LISTED  # all at once, as each call takes a tenth of a millisecond
        blocks[large] = permute(positions[large], sizes[large], keys[:, large])
        blocks += self.blocks[source]
        return [
            Draw(block, epoch, first + i)
            for i, (block, epoch) in enumerate(zip(blocks.tolist(), epochs.tolist(), strict=True))
        ]


def join_sources(mixture: Mixture, prepared: "Mapping[str, Prepared]", choices: Preprocessing) -> "Prepared":
    """Returns the data of several sources as that of one: the held-out text of each is a domain of its name."""
    documents = join_domains(
        {
            f"{name}/{domain}".rstrip("/"): part
            for name, data in prepared.items()
            for domain, part in data.validation.by_domain.items()
        }
    )
    ledger = {
        key.replace(split, f"{split}/{name}"): counts
        for split in ("train", "validation")
        for name, data in prepared.items()
        for key, counts in data.ledger.items()
        if key.startswith(split)
    }
    kept = {name: [data.data_fingerprint, text_of(mixture.corpora[name])] for name, data in prepared.items()}
    shares = {name: asdict(share) for name, share in mixture.shares.items()}
    blocks = {name: data.train for name, data in prepared.items() if isinstance(data.train, Blocks)}
    return replace(
        next(iter(prepared.values())),
        train=MixedBlocks(blocks, mixture) if blocks else None,
        validation=documents,
        bounds=group_documents(documents, choices),
        ledger=ledger,
        data_fingerprint=fingerprint("mixture", kept, shares, mixture.temperature, mixture.anneal),
    )


def text_of(corpus: "Corpus | Tokenized") -> str | None:
    """Returns the path of the text in the records of a source; None of one that is tokenized already."""
    return corpus.text if isinstance(corpus, Corpus) else None
