"""The choices of data preparation. A config is checked by them without importing torch or transformers."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from lmlab.errors import UserError

BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""The builder of `datasets` that reads a file, by the file's suffix; one of `COMPRESSED` may follow."""
COMPRESSED = (".gz", ".zst")
"""The suffixes of compressed files."""


@dataclass(frozen=True, config={"strict": True})
class Preprocessing:
    """The choices that turn records into blocks."""

    block_size: Annotated[int, Ge(2)] = 128
    """The number of positions of a block."""
    join: str | None = None
    """The string that joins the texts of a record into one document; null makes each text a document."""
    end_of_text: bool = True
    """True to put the end-of-text token after each document."""
    special_tokens: bool = False
    """True to let the tokenizer add its special tokens to each document, and to read one that a text spells out as the
    token, as the guide does. Otherwise it is read as text."""
    truncation: bool = False
    """True to cut documents at the tokenizer's longest input, as the guide does."""
    packing: Literal["concatenated", "best_fit"] = "concatenated"
    """The way in which training documents get into blocks: laid end to end and cut, or by best-fit packing, which cuts
    only those that are longer than a block."""
    drop_remainder_every: Annotated[int, Ge(1)] | None = None
    """The number of documents in a group, at whose end tokens that fill no block are dropped; null drops none."""
    document_attention: bool = False
    """True to let each document of a block attend to itself only, with positions that begin anew; false lets a position
    see what stands before it (or around it) in the block, as the guide does."""
    test_size: Annotated[float, Gt(0), Lt(1)] = 0.1
    """The share of the records that is held out for validation if the source has no such split."""
    split_by: Literal["hash", "shuffle"] = "shuffle"
    """The way in which records are chosen to be held out. By hash, each record's own text decides, so that more data
    moves none of the others, and equal records are held out together; by shuffle they are drawn as by
    `train_test_split`, and exactly the share is."""
    split_seed: int = 0
    """The seed that decides which records are held out; it is not `seed`, so that runs of all seeds share one split."""
    max_test_bytes: Annotated[int, Ge(1)] | None = None
    """The number of UTF-8 bytes of held-out text to score at most: records of the share beyond it are neither trained
    on nor scored. null scores all of the share."""
    max_records: Annotated[int, Ge(1)] | None = None
    """The number of training records to use; null uses all."""
    decontaminate: Literal["report", "drop"] | None = None
    """The treatment of training documents that occur a second time in the held-out text, the training text or the
    benchmarks: null does not look for them, report counts them in the ledger, drop leaves them out as well."""
    similarity: Annotated[float, Gt(0), Le(1)] = 0.8
    """The Jaccard similarity from which on two documents count as near-duplicates; Lee et al. (2022) take 0.8."""
    benchmarks: str | list[str] | None = None
    """The files of test sets, by path or glob, whose items `decontaminate` looks for in the training documents."""

    def __post_init__(self) -> None:
        if self.packing == "best_fit" and self.drop_remainder_every is not None:
            raise UserError(
                "preprocess.packing=best_fit drops no token, and preprocess.drop_remainder_every="
                f"{self.drop_remainder_every} is there to drop some.\n"
                "Leave one of the two out: preprocess.drop_remainder_every=null, or preprocess.packing=concatenated."
            )


@dataclass(frozen=True, config={"strict": True})
class Share:
    """The share of a source in a mixture, by the keys of its block."""

    weight: Annotated[float, Ge(0)] | None = None
    """The source's share of the training tokens, relative to the weights of the others."""
    final_weight: Annotated[float, Ge(0)] | None = None
    """The same at the end of training; null keeps `weight`."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The number of times that the source is read in an epoch of the mixture, in place of a weight."""
