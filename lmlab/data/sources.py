"""Where records come from (guide, "Load ELI5 dataset").

A source is a function that returns a `Corpus`. A new hub or file data set needs only a
YAML file; an odd source is one more function here, or anywhere importable.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lmlab.errors import UserError, disk_full, first_line, from_hub, nearest
from lmlab.runs.files import write_text

if TYPE_CHECKING:
    # Imported where it is needed: a run that finds its data prepared need not wait a second for it.
    import datasets

SAMPLE = Path(__file__).parent / "sample" / "askscience.jsonl"
BUILDERS = {".txt": "text", ".text": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SAMPLE_BY = {"file": "document", "line": "line", "paragraph": "paragraph"}
# What reading a file that is damaged, or of another kind than its name says, may raise.
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, StopIteration)


class Corpus:
    """Records, the dotted path of the text in them, and a hash of where they came from."""

    def __init__(
        self,
        train: "datasets.Dataset | Callable[[], datasets.Dataset] | None",
        validation: "datasets.Dataset | Callable[[], datasets.Dataset] | None",
        text: str,
        fingerprint: str,
    ):
        """`train` is None where there is only something to evaluate on.

        A function is called for its records only if what is prepared of them is not in the cache.
        """
        self.given = {"train": train, "validation": validation}
        self.text, self.fingerprint = text, fingerprint

    @cached_property
    def train(self) -> "datasets.Dataset | None":
        return self.records("train")

    @cached_property
    def validation(self) -> "datasets.Dataset | None":
        return self.records("validation")

    def records(self, part: str) -> "datasets.Dataset | None":
        given = self.given[part]
        return given() if callable(given) else given


def fingerprint(*parts: Any) -> str:
    """A hash of plain values: equal for equal content, on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load_sample(text: str = "answers.text") -> Corpus:
    """The corpus that ships with lmlab, in the ELI5 schema."""
    content = SAMPLE.read_bytes()

    def records() -> "datasets.Dataset":
        import datasets

        return datasets.Dataset.from_list([json.loads(line) for line in content.splitlines()])

    return Corpus(records, None, text, fingerprint("sample", hashlib.sha256(content).hexdigest()))


def load_hub(
    path: str,
    text: str,
    name: str | None = None,
    revision: str | None = None,
    train: str = "train",
    validation: str | None = None,
    filter: dict[str, Any] | None = None,
) -> Corpus:
    """A data set of the Hugging Face hub, or a local directory laid out like one.

    Args:
        path: hub id, such as `dany0407/eli5_category`, or a directory.
        text: dotted path of the text in a record.
        name: the configuration, where the data set has several.
        revision: branch, tag or commit; give a commit for a figure to be repeated.
        train: split or slice of it, such as `train[:5000]`; in a shell `'data.train="train[:5000]"'`.
        validation: the same; without it a share of `train` is held out.
        filter: keep the records whose column has this value, or one of these values.
    """
    import datasets

    datasets.disable_progress_bars()  # what a run has to say, it says itself
    splits = [train] if validation is None else [train, validation]
    with from_hub(f'data set "{path}"', "data.path"):
        loaded = datasets.load_dataset(path, name, split=splits, revision=revision)
    # Offline, `datasets` takes whichever commit it cached last; its cache names the commit in its folders.
    pinned = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else ""
    if not Path(path).is_dir() and pinned not in str(loaded[0].cache_files):
        raise UserError(f'data set "{path}" is not cached at data.revision={revision}, and the hub did not answer.')
    # The cache fingerprint of a builder names the repository's commit and files.
    source = fingerprint("hub", [part._fingerprint for part in loaded], filter)
    for part in loaded:
        for column in filter or {}:
            if column not in part.column_names:
                raise UserError(
                    f'data.filter names the column "{column}", which is not there.'
                    f"{nearest(column, part.column_names)} Columns: {', '.join(part.column_names)}."
                )
    kept = [partial(select, part, filter or {}) for part in loaded]
    return Corpus(kept[0], kept[1] if validation else None, text, source)


def select(records: "datasets.Dataset", wanted: dict[str, Any]) -> "datasets.Dataset":
    """The records whose columns hold the wanted value, or one of the wanted values."""
    for column, value in wanted.items():
        values = value if isinstance(value, list) else [value]
        records = records.select([i for i, found in enumerate(records[column]) if found in values])
    return records


def load_files(
    train: str | Sequence[str] | None = None,
    text: str = "text",
    validation: str | Sequence[str] | None = None,
    document: str = "file",
) -> Corpus:
    """Local files: txt, jsonl, json, csv, each also gzipped (`.gz`), and parquet.

    Line ends of plain text files become single line feeds.

    Args:
        train: a path or glob, or a list of them; may be left out where only `validation` is of use.
        text: dotted path of the text in a record; plain text files have only `text`.
        validation: the same as `train`; without it a share of `train` is held out.
        document: what one document of a plain text file is: `file`, `line` or
            `paragraph` (separated by a blank line).
    """
    import datasets

    if document not in SAMPLE_BY:
        raise UserError(
            f'data.document is one of {", ".join(SAMPLE_BY)}, not "{document}".{nearest(document, SAMPLE_BY)}'
        )
    named = {"train": train, "validation": validation}
    files = {part: find(patterns, part) for part, patterns in named.items() if patterns is not None}
    if not files:
        raise UserError("no file is named: add data.train=… or data.validation=… to the command.")
    both = sorted(set(files.get("train", [])) & set(files.get("validation", [])))
    if both:
        raise UserError(f"{both[0]} is named by data.train and by data.validation: it would be trained on.")
    everything = [file for part in files.values() for file in part]
    builder = builder_for(everything)
    options: dict[str, Any] = {}
    if builder == "text":
        options = {"sample_by": SAMPLE_BY[document], "encoding": "utf-8-sig"}
    elif builder == "csv":
        options = {"na_filter": False}  # "NA" is a text, no missing value
    seen = [identity(file) for file in everything]
    places = {part: [str(file.absolute()) for file in found] for part, found in files.items()}
    memo = Path(datasets.config.HF_DATASETS_CACHE) / f"lmlab-{fingerprint(builder, document, places)}.json"
    known = remembered(memo, seen)
    digests = dict(zip(everything, known or [digest(file) for file in everything], strict=True))
    contents = {part: [digests[file] for file in found] for part, found in files.items()}
    source = fingerprint("files", builder, document, contents)

    @cache
    def read() -> "dict[str, datasets.Dataset]":
        loaded = read_files(builder, files, source, options)
        for file, before in zip(everything, seen, strict=True):
            if identity(file) != before:
                raise UserError(f"{file} has changed since this began. Start again.")
        return loaded

    if known is None:
        read()  # so that a fault in a file shows here, and the first time
        remember(memo, seen, list(digests.values()))
    records = {part: partial(lambda part: read()[part], part) for part in files}
    return Corpus(records.get("train"), records.get("validation"), text, source)


def read_files(
    builder: str, files: dict[str, list[Path]], source: str, options: dict[str, Any]
) -> "dict[str, datasets.Dataset]":
    """The records of files, of which `source` is a hash."""
    import datasets

    datasets.disable_progress_bars()
    names = {part: [glob.escape(str(file)) for file in found] for part, found in files.items()}
    # Where `datasets` keeps what it read, by content: its own key is path and time, which a copy can keep.
    cache_dir = str(Path(datasets.config.HF_DATASETS_CACHE) / f"lmlab-{source}")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong with a file is said below, once
    try:
        loaded = datasets.load_dataset(builder, data_files=names, cache_dir=cache_dir, **options)
        for records in loaded.values():
            for kept in records.cache_files:
                # Not by its mapping: all of the file would count as memory of this process.
                with pa.OSFile(kept["filename"]) as stream:
                    for batch in pa.ipc.open_stream(stream):
                        batch.validate(full=True)  # Arrow reads JSON that is no UTF-8 without a word
    except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
        if disk_full(error):
            raise
        everything = [file for part in files.values() for file in part]
        raise UserError(fault(everything, builder) or reason(deepest(error))) from error
    return loaded


# What was learned of files is kept, so that the next start need not read them. A file is taken for
# the one it was if size, times, and inode are: what git and ccache trust. A program can set the
# time of modification back, but not that of change (ctime). Both are as fine as the clock of the
# file system, so what changed just now could change again unseen (git's "racily clean" entries):
# nothing is kept of a file that was not at rest. What remains is a clock set back, that of a file
# server far behind ours, and a write to the raw disk.
AT_REST = 2.0  # seconds since the last change; FAT's times, the coarsest, are 2 s apart


def identity(file: Path) -> list[int]:
    """What tells, without reading it, whether a file is as it was."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def remembered(memo: Path, seen: list[list[int]]) -> list[str] | None:
    """The digests of files that were read without a fault, if they are as they were then."""
    # A memo that is missing, half or none at all is as good as none.
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(memo.read_text())
        if content["files"] == seen and content["check"] == fingerprint(seen, content["digests"]):
            return content["digests"]
    return None


def remember(memo: Path, seen: list[list[int]], digests: list[str]) -> None:
    """Keep them for the next start, if none of the files changed just before they were read."""
    last = max(max(modified, changed) for _, modified, changed, _ in seen)
    if time.time() - last / 1e9 >= AT_REST:
        with suppress(OSError):  # It only saves time.
            write_text(memo, json.dumps({"files": seen, "digests": digests, "check": fingerprint(seen, digests)}))


def find(patterns: str | Sequence[str], part: str) -> list[Path]:
    """The files that paths or globs name, in sorted order."""
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, Sequence) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise UserError(f"data.{part} is a path, a glob, or a list of them, not {patterns}.")
    found: list[Path] = []
    for pattern in map(os.path.expanduser, given):
        if Path(pattern).is_dir():
            raise UserError(f"data.{part}={pattern}: a directory. Name the files in it, such as {pattern}/*.txt")
        # A file's own name may hold the signs of a glob.
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f'data.{part}={pattern}: no such file, and no file matches it in "{Path.cwd()}".')
        found += [file for file in files if file not in found]
    if not any(file.stat().st_size for file in found):
        raise UserError(f"the data set is empty: data.{part}={patterns} holds no byte. Name a file with text in it.")
    return found


def ending(file: Path) -> str:
    """`.txt` of `a.txt` and of `A.TXT.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def builder_for(files: list[Path]) -> str:
    """The reader for these files, by their ending."""
    endings = {ending(file) for file in files}
    unknown = endings - BUILDERS.keys()
    if unknown or len({BUILDERS[ending] for ending in endings}) > 1:
        raise UserError(
            f"data files end in {', '.join(sorted(endings - {''})) or 'nothing'}; "
            f"they must all be of one kind: {', '.join(BUILDERS)} (or these with .gz)."
        )
    return BUILDERS[endings.pop()]


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fault(files: list[Path], builder: str) -> str | None:
    """The first fault in the files, in words: where one is no UTF-8, malformed or damaged."""
    import datasets

    for file in files:
        number = 1
        try:
            if builder != "parquet":
                with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                    for number, line in enumerate(stream, 1):
                        text = line.decode("utf-8").rstrip()
                        if ending(file) == ".jsonl" and text and not isinstance(json.loads(text), dict):
                            return f"{file}, line {number}: not a JSON object, as each line of a .jsonl file is."
                    if ending(file) == ".json":
                        number = 1
                        stream.seek(0)
                        json.loads(stream.read())
            # What is still wrong shows when the file is read alone.
            datasets.load_dataset(builder, data_files=glob.escape(str(file)))
        except UnicodeDecodeError as error:
            return (
                f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line).\n"
                "Convert it first, such as by iconv -f latin1 -t utf-8."
            )
        except json.JSONDecodeError as error:
            return (
                f"{file}, line {number + error.lineno - 1}: malformed JSON ({error.msg} at column {error.colno}).\n"
                "Mend that line, or leave the file out."
            )
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            return f"{file}: not a whole gzip file ({error}). Get it again, or leave it out."
        except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
            return f"{file}: {reason(deepest(error))} Mend it, or leave it out."
    return None


def deepest(error: BaseException) -> BaseException:
    """The error that an error came from."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def reason(error: BaseException) -> str:
    """Why files could not be read, in words."""
    import datasets

    if isinstance(error, datasets.table.CastError):
        here, there = (", ".join(sorted(names)) for names in (error.table_column_names, error.requested_column_names))
        return f"the data files differ in their columns: {here} in one, {there} in another. Name files of one form."
    return "no record." if isinstance(error, StopIteration) else f"could not be read: {first_line(error).rstrip('.!')}."
