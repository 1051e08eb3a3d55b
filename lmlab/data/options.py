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
"""The builder of `datasets` that reads a file, by the file's suffix; `.gz` may follow."""


@dataclass(frozen=True, config={"strict": True})
class Preprocessing:
    """The choices that turn records into blocks."""

    block_size: Annotated[int, Ge(2)] = 128
    """Positions of a block."""
    join: str | None = None
    """Joins the texts of one record into one document; null makes each a document."""
    end_of_text: bool = True
    """Put the end-of-text token after each document."""
    special_tokens: bool = False
    """Let the tokenizer add its own special tokens to each document, and take one that a text
    spells out for the token, as the guide does. Otherwise text is text."""
    truncation: bool = False
    """Cut documents at the tokenizer's longest input, as the guide does."""
    drop_remainder_every: Annotated[int, Ge(1)] | None = None
    """Group so many documents at a time and drop what does not fill a block; null loses nothing."""
    test_size: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the records held out for validation where the source has no such split."""
    split_seed: int = 0
    """Decides which records are held out; apart from `seed`, so that seeds share one split."""
    max_records: Annotated[int, Ge(1)] | None = None
    """Use only so many of the training records."""
