"""A directory of prepared data, made in shards (preparation.py), and read by `data=prepared`.

    preparation.json               what the directory is of: it is written first, and other preparations are refused
    held_out                       the numbers of the records that are held out by hash
    tokenizer/
    train-00000-of-00064/          a shard: `write_split` of a part of the records, whole or not there
      train.tokens train.lengths train.counts.json
      train.contained              the held-out documents that occur in its text
      train.duplicates.json        the counts of the documents that occur again, where it was asked for them
      checksums.json
    validation-00000-of-00064/     held-out text with domains is `validation.DOMAIN` instead, here and below
    validation/                    the held-out shards in one
    marks/                         which training documents occur again: N.npy those of a shard, train.npy all
    index.json                     written last: the checksums of all files that are read

A shard depends on nothing but its records, their marks and the tokenizer, so that any process makes any of them, at any
time. The marks need the signatures of all documents (duplicates.py), which are made in shards too, and joined.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmlab.console import command, counted
from lmlab.data.digests import digest, digests_of
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import FORMAT, Prepared, Tokenized, decisive_choices, held_out_beforehand, read_prepared
from lmlab.data.tokenizers import content_hash
from lmlab.errors import UserError
from lmlab.io import read_json, write_json

CHECKSUMS = "checksums.json"


def read_index(folder: Path) -> dict[str, Any] | None:
    """Returns the index of a directory; None where it is not there yet, or is damaged."""
    try:
        index = read_json(folder / "index.json")
    except (UserError, OSError):
        return None
    return index if "checksums" in index else None


def name_of_domain(domain: str) -> str:
    """Returns the name of the split of a domain; "" is held-out text without domains."""
    return f"validation.{domain}".rstrip(".")


def contained_in(held_out: str) -> str:
    """Returns the name of the file, in a shard of training text, of the documents of a held-out split that it has."""
    return f"{held_out.replace('validation', 'train', 1)}.contained"


def shard_name(name: str, number: int, count: int) -> str:
    """Returns the name of the folder of a shard."""
    return f"{name}-{number:05}-of-{count:05}"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of the files in a folder."""
    write_json(folder / CHECKSUMS, {file.name: digest(file) for file in sorted(folder.iterdir())})


def damaged(folder: Path) -> str | None:
    """Returns the name of a file in a folder that is not what it was when its checksum was written; None if all are."""
    try:
        checksums = read_json(folder / CHECKSUMS)
    except (UserError, OSError):
        return CHECKSUMS
    wrong = (name for name, checksum in checksums.items() if not holds(folder / name, checksum))
    return next(wrong, None)


def holds(file: Path, checksum: str) -> bool:
    """Returns whether a file is there and has a checksum."""
    return file.is_file() and digest(file) == checksum


class PreparedDirectory(Tokenized):
    """A directory that was prepared, with all its files as they were written."""

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path, self.index = path, index

    def prepared(
        self, names: Sequence[str], choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path, words: bool
    ) -> Prepared:
        path, index = self.path, self.index
        needed = {key: v for key, v in decisive_choices(choices).items() if key not in held_out_beforehand(choices)}
        here = {f"preprocess.{key}": value for key, value in needed.items()}
        other = {key: index.get(key) for key, value in here.items() if index.get(key) != value}
        if other:
            there = command(*(f"{key}={json.dumps(value)}" for key, value in other.items()))
            raise UserError(
                f"data.path={path} was prepared by other choices, which its text can't be freed of.\n"
                f"To take them, add to the command: {there}"
            )
        if content_hash(tokenizer) != index["tokenizer_hash"]:
            raise UserError(
                f"data.path={path} was prepared by another tokenizer than this one.\n"
                "To take the one that it has, leave tokenizer=… out; else prepare the text anew."
            )
        if words and not index["whole words"] and tokenizer.is_fast:
            raise UserError(
                f"data.path={path} was prepared without the words that objective.whole_word=true needs.\n"
                "Prepare it into another directory, with that in the command."
            )
        train = [path / name for name in index["train"]] if "train" in names else []
        found = index["documents_in_training"]
        contained = found if isinstance(found, dict) else {"": found}  # of a directory from before there were domains
        domains = {domain: path / name_of_domain(domain) for domain in contained}
        data = read_prepared(train, domains, choices, tokenizer, index["data"], contained if train else {})
        if train:
            data.ledger["train"] = replace(data.ledger["train"], **index.get("duplicates", {}))
        return data


def load_prepared(path: str) -> PreparedDirectory:
    """Loads a directory that `python -m lmlab.prepare` made.

    The checksums of its files are compared at the first start, and again when a file has changed since.

    Args:
        path: the directory.

    Raises:
        UserError: there is no such directory, it is not finished, or a file in it is damaged; names the command that
            mends it.
    """
    folder = Path(path).expanduser()
    plan = folder / "preparation.json"
    if not plan.is_file():
        raise UserError(f"data.path={path} is no directory that python -m lmlab.prepare made. Name one.")
    begun, index = read_json(plan), read_index(folder)
    if begun.get("format") != FORMAT:
        raise UserError(f"data.path={path} was prepared by another version of lmlab. Prepare it anew, elsewhere.")
    words = [f"output={path}" if word.startswith("output=") else word for word in shlex.split(begun["command"])]
    finish = command(*words)
    if index is None:
        state = "has a damaged index" if (folder / "index.json").exists() else "is half prepared"
        raise UserError(f"data.path={path} {state}. To finish it: {finish}")
    files = [folder / name for name in index["checksums"]]
    missing = [file for file in [folder / "tokenizer", *files] if not file.exists()]
    if not missing:
        found = digests_of(files, folder / "verified.json")
        expected = index["checksums"].values()
        missing = [file for file, one, other in zip(files, found, expected, strict=True) if one != other]
    if missing:
        more = f" (and {counted(len(missing) - 1, 'more file')})" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]} is not what it was when it was written: it is missing or damaged{more}.\n"
            f"To make it anew, and no other shard: {finish}"
        )
    return PreparedDirectory(folder, index)
