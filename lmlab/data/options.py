"""What can be chosen of data. A config is checked by it without importing torch or transformers."""

from dataclasses import dataclass

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
"""The builder of `datasets` that reads a file, by the file's suffix; `.gz` may follow."""


@dataclass(frozen=True)
class Preprocessing:
    """The choices that turn records into blocks."""

    block_size: int = 128
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
    drop_remainder_every: int | None = None
    """Group so many documents at a time and drop what does not fill a block; null loses nothing."""
    test_size: float = 0.1
    """Share of the records held out for validation where the source has no such split."""
    split_seed: int = 0
    """Decides which records are held out; apart from `seed`, so that seeds share one split."""
    max_records: int | None = None
    """Use only so many of the training records."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(f"preprocess.block_size must be at least 2, not {self.block_size}.")
        if not 0 < self.test_size < 1:
            raise UserError(f"preprocess.test_size is a share between 0 and 1, not {self.test_size}.")
        for key in ("drop_remainder_every", "max_records"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise UserError(f"preprocess.{key} is at least 1, or null for no limit, not {count}.")
