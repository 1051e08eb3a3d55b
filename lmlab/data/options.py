"""The choices of data preparation. A config is checked by them without importing torch or transformers."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic.dataclasses import dataclass

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
    drop_remainder_every: Annotated[int, Ge(1)] | None = None
    """The number of documents in a group, at whose end tokens that fill no block are dropped; null drops none."""
    test_size: Annotated[float, Gt(0), Lt(1)] = 0.1
    """The share of the records that is held out for validation if the source has no such split."""
    split_seed: int = 0
    """The seed that decides which records are held out; it is not `seed`, so that runs of all seeds share one split."""
    max_records: Annotated[int, Ge(1)] | None = None
    """The number of training records to use; null uses all."""
