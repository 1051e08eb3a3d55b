"""The tokens of a split: written into files, counted in a ledger, and cut into blocks when they are read.

They lie in one flat file, those of training as uint16 where the vocabulary allows it, held-out ones as int32; a
document is a length, a block a pair of bounds in it. Blocks are cut when they are asked for, so every block size shares
one file. Held-out documents also keep which text each token stands for (documents.py).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from lmlab.data.documents import UNKNOWN, Documents, open_index, read_lengths, reorder, write_stretches
from lmlab.data.options import Preprocessing
from lmlab.data.packing import pack_documents
from lmlab.data.preprocess import Bounds, Slices, group_texts, lengths_of, tokenize
from lmlab.data.texts import utf8
from lmlab.data.tokenizers import smallest_dtype
from lmlab.data.tokens import DocumentEdges, FlatFile, FlatFiles
from lmlab.errors import UserError

DOUBTFUL = 0.01
"""The share of records without a text, or of held-out documents in the training text, that is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The counts of one split: where every record, document, byte and token of it went."""

    records: int
    records_unused: int = 0
    """The number of records that were drawn to be held out and are not, as `Preprocessing.max_test_bytes` are reached:
    they are neither trained on nor scored."""
    records_without_text: int
    """The number of records whose text is null or missing, or whose list of texts is empty; an empty text is a text."""
    documents: int
    documents_in_training: int | None = None
    """The number of held-out documents of 32 bytes or more that are equal to a training document or a part of one
    (overlap.py). None for the training split itself, and if the training text is not read."""
    documents_equal_to_held_out: int | None = None
    """The number of training documents that are equal to a held-out one (duplicates.py). This and the next six are None
    where `preprocess.decontaminate` does not ask for them; under `drop` they are in no other count."""
    documents_near_held_out: int | None = None
    """The number of those that are near-duplicates of a held-out one."""
    documents_with_test_items: int | None = None
    """The number of those others that contain an item of a benchmark."""
    documents_repeated: int | None = None
    """The number of those others that are equal to an earlier training document."""
    documents_nearly_repeated: int | None = None
    """The number of those others that are near-duplicates of an earlier one."""
    duplicate_bytes: int | None = None
    """The number of UTF-8 bytes of these five kinds together."""
    duplicate_tokens: int | None = None
    """The number of their tokens."""
    bytes: int | None = None
    """The number of UTF-8 bytes of the documents; as the unknown ones None where it can't be told from their tokens."""
    tokens: int
    """The number of tokens of the documents before any is dropped, with special and end-of-text tokens."""
    blocks: int
    documents_cut: int | None = None
    """The number of documents that lie in more than one block. This and the next are None but for best-fit packing."""
    share_of_positions_filled: float | None = None
    """The share of the positions of all blocks that hold a token."""
    tokens_dropped: int
    """The number of tokens that fill no block, see `group_texts`."""
    tokens_truncated: int
    unknown_tokens: int | None = None
    """The number of tokens that do not spell all of the text that they stand for."""
    unknown_bytes: int | None = None
    """The number of UTF-8 bytes that they do not spell."""
    samples_drawn: int | None = None
    """The number of blocks that the run draws from a source of a mixture; None for data that is no mixture."""
    share_of_tokens: float | None = None
    """The source's share of the tokens of all blocks that the run draws."""
    epochs_read: float | None = None
    """The number of times that the run reads the source."""

    def doubts(self, split: str) -> Iterator[str]:
        """Yields the reasons to doubt a metric on this split, a line each."""
        if self.records_unused > DOUBTFUL * self.records:
            yield (
                f"{self.records_unused:,} records are neither trained on nor scored: {self.records:,} of those held "
                "out reach preprocess.max_test_bytes. Lower preprocess.test_size to train on more."
            )
        if self.records_without_text > DOUBTFUL * self.records:
            yield (
                f"{self.records_without_text:,} of the {self.records:,} {split} records have no text at data.text: "
                "it is null or missing, or an empty list."
            )
        if self.bytes is None and split == "validation":
            yield (
                f"the tokens of the {split} documents do not come back when they are decoded and encoded again: how "
                "many bytes they stand for is not known, and there is no metric per byte or per word."
            )
        if (self.documents_in_training or 0) > DOUBTFUL * self.documents:
            yield (
                f"{self.documents_in_training:,} of the {self.documents:,} {split} documents occur whole in the "
                "training text, which flatters the metric. Leave them out of one of the two."
            )


@dataclass(frozen=True, eq=False)
class Blocks(TorchDataset[np.ndarray]):
    """The blocks of one split: item i is an int32 array [T], T being at most the block size."""

    tokens: FlatFiles
    """The ids of all tokens."""
    bounds: Bounds
    """The first token of each block and the one past its last; where blocks were packed, those of each piece."""
    piece_edges: np.ndarray | None = None
    """[blocks + 1] int64: block b has the pieces piece_edges[b] … piece_edges[b + 1] - 1; None where blocks were not
    packed, and each is one piece."""
    continued: FlatFiles | None = None
    """Whether each token continues the word of the token before it; None if they were prepared without."""
    document_edges: DocumentEdges | None = None
    """The edges of the documents, where these do not see one another; else None."""

    def __len__(self) -> int:
        return len(self.bounds) if self.piece_edges is None else len(self.piece_edges) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(self.tokens, index).astype(np.int32)

    def pieces(self, index: int) -> np.ndarray:
        """Returns the first token of each piece of a block and the one past its last: [pieces, 2] int64."""
        if self.piece_edges is None:
            return np.array([self.bounds[index]])
        block = range(len(self))[index]
        return np.asarray(self.bounds)[self.piece_edges[block] : self.piece_edges[block + 1]]

    def read(self, files: FlatFiles, index: int) -> np.ndarray:
        """Returns the part of `files`, which have a number for each token, that belongs to a block: [T]."""
        return np.concatenate([files.part(start, end) for start, end in self.pieces(index).tolist()])

    @property
    def lengths(self) -> np.ndarray:
        """The lengths that blocks have, each once."""
        if self.piece_edges is None:
            return lengths_of(self.bounds)
        return np.unique(np.add.reduceat(np.diff(self.bounds)[:, 0], self.piece_edges[:-1]))

    @property
    def kept(self) -> int:
        """The number of tokens of all blocks."""
        return self.bounds.tokens if isinstance(self.bounds, Slices) else int(np.diff(self.bounds).sum())

    def continues(self, index: int) -> np.ndarray | None:
        """Returns `continued` of the tokens of a block."""
        return None if self.continued is None else self.read(self.continued, index)

    def documents(self, index: int) -> np.ndarray | None:
        """Returns the number of tokens of each document in a block; None where documents see one another."""
        if self.document_edges is None:
            return None
        if self.piece_edges is not None:  # each piece is of a document of its own
            return np.diff(self.pieces(index))[:, 0]
        return self.document_edges.within(*self.bounds[index])


def write_split(
    folder: Path,
    name: str,
    records: Iterable[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    choices: Preprocessing,
    order: np.ndarray | None = None,
    words: bool = False,
    unused: int = 0,
) -> None:
    """Writes the tokens, lengths and counts of one split as files; of the held-out one also its documents' spans.

    Args:
        order: [records] the number of each record in the split; None if they come in the order of the split.
        words: True to write also which tokens continue a word.
        unused: the number of records that are left out of all splits.
    """
    held_out = name == "validation"
    names = ("records", "records_without_text", "documents", "bytes", "tokens", "tokens_truncated")
    counts = dict.fromkeys((*names, "unknown_tokens", "unknown_bytes"), 0)
    documents_of_record: list[int] = []

    def count_records() -> Iterator[list[str]]:
        for texts in records:
            counts["records"] += 1
            counts["records_without_text"] += not texts
            if order is not None:
                documents_of_record.append(len(texts) if choices.join is None else 1)
            yield texts

    dtype = "int32" if held_out else smallest_dtype(tokenizer)
    with ExitStack() as files:
        kinds = ["tokens", "lengths"] + ["spans"] * held_out + ["continued"] * words
        streams = {kind: files.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in kinds}
        if held_out:
            add_to_index = files.enter_context(open_index(folder / f"{name}.documents.parquet"))
        for document in tokenize(count_records(), tokenizer, choices, held_out, words):
            streams["tokens"].write(document.ids.astype(dtype).tobytes())
            streams["lengths"].write(np.int64(len(document.ids)).tobytes())
            if document.continues is not None:
                streams["continued"].write(document.continues.tobytes())
            counts["documents"] += 1
            counts["bytes"] += len(utf8(document.text))
            counts["tokens"] += len(document.ids) + document.lost
            counts["tokens_truncated"] += document.lost
            if document.spans is not None:
                counts["unknown_tokens"] += int((document.spans[:, UNKNOWN] > 0).sum())
                counts["unknown_bytes"] += int(document.spans[:, UNKNOWN].sum())
                if held_out:
                    streams["spans"].write(document.spans.tobytes())
                    add_to_index(document.text, document.lost == 0)
    if order is not None:
        reorder(folder, name, np.argsort(np.repeat(order, documents_of_record), kind="stable"))
    if held_out:
        write_stretches(folder, name)
    (folder / f"{name}.counts.json").write_text(json.dumps({**counts, "records_unused": unused, "dtype": dtype}))


def check_counts(name: str, counts: Mapping[str, Any]) -> None:
    """Refuses the counts of a split in which there is no text, or no token in any."""
    if counts["records_without_text"] == counts["records"]:
        raise UserError(
            f"none of the {counts['records']:,} {name} records has a text: it is null or missing, or an empty list.\n"
            "Name where the text is by data.text=…"
        )
    if counts["tokens"] == counts["tokens_truncated"]:
        texts = counts["documents"]
        raise UserError(f"the {name} split gives no token: its {texts} texts are empty (check data.text).")


def read_counts(folder: Path, name: str) -> dict[str, Any]:
    """Returns the counts of a split that `write_split` wrote: those of its ledger, and the `dtype` of its tokens."""
    counts: dict[str, Any] = json.loads((folder / f"{name}.counts.json").read_text())
    return counts


def added_up(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the sums of the counts of one split or of its parts, for its ledger."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update({key: value for key, value in part.items() if key != "dtype"})
    return dict(total)


def cut_blocks(folders: Sequence[Path], name: str, choices: Preprocessing) -> tuple[Bounds, np.ndarray | None, Ledger]:
    """Returns the `bounds` and `piece_edges` of a split's blocks, see `Blocks`, and its ledger.

    Only training text is packed.

    Args:
        folders: those of `write_split`, whose tokens follow on one another.
    """
    counts = added_up(read_counts(folder, name) for folder in folders)
    tokens = counts["tokens"] - counts["tokens_truncated"]
    best_fit = choices.packing == "best_fit" and name == "train"
    # Where no token is dropped and no document is kept whole, blocks don't depend on where documents end: the lengths
    # of a large corpus stay unread.
    one = choices.drop_remainder_every is None and not best_fit
    lengths = np.concatenate([[tokens]] if one else [read_lengths(folder, name) for folder in folders])
    size, piece_edges = choices.block_size, None
    bounds: Bounds
    if best_fit:
        bounds, piece_edges = pack_documents(lengths, size)
    else:
        bounds = group_texts(lengths, size, choices.drop_remainder_every)
    if len(bounds) == 0:
        raise UserError(
            f"the {name} split gives no block: {tokens} tokens, none fills preprocess.block_size={size}.\n"
            "Lower the block size, or set preprocess.drop_remainder_every=null to keep short blocks."
        )
    kept = bounds.tokens if isinstance(bounds, Slices) else int(np.diff(bounds).sum())
    ledger = Ledger(blocks=len(bounds), tokens_dropped=tokens - kept, **counts)
    if piece_edges is not None:
        blocks, cut = len(piece_edges) - 1, int((lengths > size).sum())
        filled = round(kept / (blocks * size), 6)
        ledger = replace(ledger, blocks=blocks, documents_cut=cut, share_of_positions_filled=filled)
    return bounds, piece_edges, ledger


def group_documents(documents: Documents, choices: Preprocessing) -> Bounds:
    """Returns the bounds of the blocks of held-out documents; no block has text of two domains."""
    if not documents.domains:
        return group_texts(documents.lengths, choices.block_size, choices.drop_remainder_every)
    bounds = []
    for first, stop in documents.domains.values():
        lengths = documents.lengths[first:stop]
        own = group_texts(lengths, choices.block_size, choices.drop_remainder_every)
        bounds.append(documents.edges[first] + np.asarray(own))
    return np.concatenate(bounds)


def read_blocks(
    folders: Sequence[Path], name: str, bounds: Bounds, piece_edges: np.ndarray | None, choices: Preprocessing
) -> Blocks:
    """Returns the blocks of a split whose tokens `write_split` wrote into folders, in which they follow on."""
    tokens = (FlatFile(folder / f"{name}.tokens", read_counts(folder, name)["dtype"]) for folder in folders)
    words = [FlatFile(folder / f"{name}.continued", "bool") for folder in folders]
    continued = FlatFiles(*words) if words[0].path.is_file() else None
    return Blocks(FlatFiles(*tokens), bounds, piece_edges, continued, read_edges(folders, name, choices))


def read_edges(folders: Sequence[Path], name: str, choices: Preprocessing) -> DocumentEdges | None:
    """Returns the edges of the documents of a split, where they do not see one another; else None."""
    if not choices.document_attention:
        return None
    return DocumentEdges(FlatFiles(*(FlatFile(folder / f"{name}.lengths", "int64") for folder in folders)))
