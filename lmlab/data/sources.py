"""Sources of records (guide, "Load ELI5 dataset").

A source is a function that returns a `Corpus`. A new hub or file data set needs only a YAML file; an odd source is one
more function here, or anywhere importable.
"""

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from lmlab.data import formats, json_files
from lmlab.data.compressed import read_long_windows, suffix_of
from lmlab.data.digests import digest, file_version, read_memo, write_memo
from lmlab.data.filters import check_filter, filter_records
from lmlab.data.hub_stream import commit_of, read_stream
from lmlab.data.texts import columns_in, flatten, paths_in, text_paths
from lmlab.errors import UNWRITABLE, UserError, causes, first_line, nearest, reading
from lmlab.hub import from_hub

if TYPE_CHECKING:
    # Imported where it is needed, as it takes a second: a run whose data is in the cache does without.
    import datasets

    Records: TypeAlias = datasets.Dataset | Callable[[], datasets.Dataset]

LOG = logging.getLogger(__name__)
SAMPLE = Path(__file__).parent / "sample" / "askscience.jsonl"
SAMPLE_BY = {"file": "document", "line": "line", "paragraph": "paragraph"}


class Corpus:
    """The records of a source, the dotted path of the text in them, and a hash of where they came from.

    Args:
        train: the training records, or a function that returns them: it is called only if the data prepared from them
            is not in the cache. None if there are only records to evaluate on.
        validation: the held-out records likewise, or those of each of several domains by its name; None if a share of
            `train` is to be held out.
        text: the dotted path of the text in a record, such as `answers.text`, or a template, see `flatten`.
        fingerprint: a hash of the records, which keys the cache.
        plain: whether the records are cut from plain text files, as `data.document` says.
    """

    def __init__(
        self,
        train: "Records | None",
        validation: "Records | Mapping[str, Records] | None",
        text: str,
        fingerprint: str,
        plain: bool = False,
    ):
        given = validation if isinstance(validation, Mapping) else {} if validation is None else {"": validation}
        self.parts, self.text, self.fingerprint, self.plain = (train, given), text, fingerprint, plain
        self.domains = tuple(given) or ("",)
        """The names of the parts of the held-out text; of text without domains "" alone."""

    @cached_property
    def train(self) -> "datasets.Dataset | None":
        """The training records."""
        return self.parts[0]() if callable(self.parts[0]) else self.parts[0]

    @cached_property
    def validation(self) -> "dict[str, datasets.Dataset] | None":
        """The held-out records of each domain, if the source has some."""
        return {name: part() if callable(part) else part for name, part in self.parts[1].items()} or None


def fingerprint(*parts: Any) -> str:
    """Returns a hash of plain values: equal for equal content, on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load_sample(text: str = "answers.text") -> Corpus:
    """Loads the corpus that ships with lmlab, in the ELI5 schema."""
    content = SAMPLE.read_bytes()

    def records() -> "datasets.Dataset":
        import datasets

        return datasets.Dataset.from_list([json.loads(line) for line in content.splitlines()])

    return Corpus(records, None, text, fingerprint("sample", hashlib.sha256(content).hexdigest()))


def load_texts(texts: Sequence[str]) -> Corpus:
    """Makes a corpus of held-out texts, each of them a document."""
    import datasets

    records = datasets.Dataset.from_dict({"text": list(texts)})
    return Corpus(None, records, "text", fingerprint("texts", list(texts)))


# --- The hub ---


def load_hub(
    path: str,
    text: str = "text",
    name: str | None = None,
    revision: str | None = None,
    train: str = "train",
    validation: str | dict[str, str] | None = None,
    filter: dict[str, Any] | None = None,
    keep_raw: bool = True,
) -> Corpus:
    r"""Loads a data set of the Hugging Face hub, or a local directory laid out like one.

    Args:
        path: hub id, such as `dany0407/eli5_category`, or a directory.
        text: dotted path of the text in a record, or a template such as `{title}\n\n{body}`, see `flatten`.
        name: the data set's configuration (subset), if it has several.
        revision: branch, tag or commit; only with a commit can a metric be repeated.
        train: split or slice of it, such as `train[:5000]`; in a shell `'data.train="train[:5000]"'`.
        validation: the same, or that of each of several domains by its name; without it a share of `train` is held
            out.
        filter: the value, or the list of values, of each named column; other records are left out.
        keep_raw: False to read the files of the hub in a stream, and keep the texts of the records alone.
    """
    import datasets

    datasets.disable_progress_bars()
    held_out = by_domain(validation)
    if not keep_raw and not Path(path).is_dir():
        commit = commit_of(path, revision)
        named = {"train": train, **{f"validation.{name}".rstrip("."): split for name, split in held_out.items()}}
        source = fingerprint("hub stream", path, name, commit, named, text, filter)
        kept = Path(datasets.config.HF_DATASETS_CACHE) / f"lmlab-{source}"
        read = cache(lambda: read_stream(path, name, commit, named, text, filter or {}, kept))
        own, *others = [partial(lambda part: read()[part], part) for part in named]
        return Corpus(own, dict(zip(held_out, others, strict=True)), text, source)
    splits = [train, *held_out.values()]
    with from_hub("data set", path, "data.path"):
        loaded = datasets.load_dataset(path, name, split=splits, revision=revision)
    # Offline, `datasets` takes whichever commit it cached last; its cache names the commit in its folders.
    pinned = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else ""
    if not Path(path).is_dir() and pinned not in str(loaded[0].cache_files):
        raise UserError(f'data set "{path}" is not cached at data.revision={revision}, and the hub did not answer.')
    for part in loaded:
        check_filter(filter or {}, part.column_names)
    # The cache fingerprint of a builder names the repository's commit and files.
    source = fingerprint("hub", [part._fingerprint for part in loaded], filter, *(name for name in held_out if name))
    own, *others = [partial(filter_records, part, filter or {}) for part in loaded]
    return Corpus(own, dict(zip(held_out, others, strict=True)), text, source)


def by_domain(validation: Any) -> dict[str, Any]:
    """Returns what `data.validation` names for each domain; where it names no domain, under "".

    Raises:
        UserError: the name of a domain is none.
    """
    given = validation if isinstance(validation, Mapping) else {} if validation is None else {"": validation}
    for name, value in given.items() if isinstance(validation, Mapping) else ():
        if not re.fullmatch(r"\w+", str(name), re.ASCII):
            raise UserError(f'data.validation: "{name}" names no domain. A name is made of letters, digits and _.')
        if value is None:
            raise UserError(f"data.validation.{name}=null names no text. Name some, or leave the domain out.")
    if isinstance(validation, Mapping) and not given:
        raise UserError("data.validation={} names no domain: '{news: news.txt, law: law.txt}' names two.")
    return {str(name): value for name, value in given.items()}


# --- Files ---


def load_files(
    train: str | Sequence[str] | None = None,
    text: str = "text",
    validation: str | Sequence[str] | dict[str, Any] | None = None,
    document: str = "file",
    delimiter: str | None = None,
    filter: dict[str, Any] | None = None,
) -> Corpus:
    """Loads local files: txt, jsonl, json, csv, tsv, each also compressed (`.gz`, `.zst`), and parquet.

    Line ends of plain text files become single line feeds. A json file is a list of records or of texts, or an object
    with one list of records in it, whatever its name.

    Args:
        train: a path or glob, or a list of them; None if only `validation` is needed.
        text: dotted path of the text in a record, or a template, see `flatten`; plain text files have only `text`.
        validation: the same as `train`, or the files of each of several domains, by its name; without it a share of
            `train` is held out.
        document: the part of a plain text file that is one document: `file`, `line` or `paragraph` (separated by a
            blank line).
        delimiter: the character between the columns of a csv file; None for the one by which its first line has the
            column of the text.
        filter: as for `load_hub`; plain text files have no column.
    """
    import datasets

    if document not in SAMPLE_BY:
        raise UserError(
            f'data.document is one of {", ".join(SAMPLE_BY)}, not "{document}".{nearest(document, SAMPLE_BY)}'
        )
    held_out = {f"validation.{name}".rstrip("."): value for name, value in by_domain(validation).items()}
    named = {"train": train, **held_out}
    files = {part: find_files(patterns, f"data.{part}") for part, patterns in named.items() if patterns is not None}
    if not files:
        raise UserError("no file is named: add data.train=… or data.validation=… to the command.")
    everything = [file for part in files.values() for file in part]
    builder = formats.builder_for(everything)
    kind = [builder, document]
    options: dict[str, Any] = {}
    if filter and builder == "text":
        raise UserError("data.filter names columns, and plain text files have none. Leave it out.")
    if builder == "text":
        options = {"sample_by": SAMPLE_BY[document], "encoding": "utf-8-sig"}
    elif builder == "csv":
        options = {"sep": formats.delimiter_of(everything, text, delimiter), "na_filter": False}  # "NA" is a text
        kind += [options["sep"]] if options["sep"] != "," else []
    before = [file_version(file) for file in everything]
    paths = {part: [str(file.absolute()) for file in of_part] for part, of_part in files.items()}
    memo = Path(datasets.config.HF_DATASETS_CACHE) / f"lmlab-{fingerprint(*kind, paths)}.json"
    known = read_memo(memo, before)
    digests = dict(zip(everything, known or [digest(file) for file in everything], strict=True))
    refuse_copies(files, digests)
    source = fingerprint("files", *kind, {part: [digests[file] for file in of_part] for part, of_part in files.items()})

    @cache
    def read() -> "dict[str, datasets.Dataset]":
        if delimiter is None and options.get("sep", ",") != ",":
            LOG.info("%s: %s divides the columns (data.delimiter).", everything[0], formats.DELIMITERS[options["sep"]])
        loaded = read_files(builder, files, text, source, options)
        for file, version in zip(everything, before, strict=True):
            if file_version(file) != version:
                raise UserError(f"{file} has changed since this began. Start again.")
        return loaded

    if known is None:
        read()  # so that a fault in a file shows here
        write_memo(memo, before, list(digests.values()))

    def records_of(part: str) -> "datasets.Dataset":
        check_filter(filter or {}, read()[part].column_names)
        return filter_records(read()[part], filter or {})

    records = {part: partial(records_of, part) for part in files}
    domains = {part.partition(".")[2]: records[part] for part in files if part != "train"}
    kept = fingerprint(source, filter) if filter else source
    return Corpus(records.get("train"), domains, text, kept, plain=builder == "text")


def load_items(patterns: str | Sequence[str]) -> tuple[Callable[[], Iterator[str]], str]:
    """Returns a function that reads all texts in the records of test sets, and a hash of their files.

    A line of a plain text file is a text.
    """
    corpus = load_files([str(file) for file in find_files(patterns, "preprocess.benchmarks")], "", document="line")

    def texts() -> Iterator[str]:
        assert corpus.train is not None
        for path in dict.fromkeys(text_paths("", corpus.train.features)):
            yield from chain.from_iterable(flatten(corpus.train, path))

    return texts, corpus.fingerprint


def read_files(
    builder: str, files: dict[str, list[Path]], text: str, source: str, options: dict[str, Any]
) -> "dict[str, datasets.Dataset]":
    """Reads the records of each part from its files.

    Args:
        source: a hash of the files, which names their folder in the cache of `datasets`.
        options: the options of the builder.
    """
    import datasets

    datasets.disable_progress_bars()
    # The cache of `datasets` is keyed by path and time, which a copy can keep; this folder is named by content.
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / f"lmlab-{source}"
    read = {file: file for part in files.values() for file in part}
    read_long_windows()
    if builder != "parquet":
        for number, file in enumerate(read):
            formats.check_encoding(file)
            if suffix_of(file) == ".json":
                read[file] = json_files.unwrap_json(file, text, cache_dir / f"{number}.jsonl")
    paths = {part: [glob.escape(str(read[file])) for file in of_part] for part, of_part in files.items()}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `check_files` reports what is wrong with a file
    try:
        loaded: dict[str, datasets.Dataset] = datasets.load_dataset(
            builder, data_files=paths, cache_dir=str(cache_dir), **options
        )
        for records in loaded.values():
            for cached in records.cache_files:
                # Not by its mapping: all of the file would count as memory of this process.
                with pa.OSFile(cached["filename"]) as stream:
                    for batch in pa.ipc.open_stream(stream):
                        batch.validate(full=True)  # Arrow reads JSON that is not UTF-8 without an error
    except (datasets.exceptions.DatasetGenerationError, *formats.UNREADABLE) as error:
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.errno in UNWRITABLE:  # the cache could not be written
                raise cause from None
        formats.check_files(read, builder, text, options)
        *_, deepest = causes(error)
        raise UserError(f"the data files could not be read together: {first_line(deepest)}") from error
    features = next(iter(loaded.values())).features
    # Newer versions of `datasets` read a column of strings and numbers as one of any values.
    if builder == "json" and columns_in(text) & {*features} and not {*paths_in(text)} <= {*text_paths("", features)}:
        json_files.check_kinds(read, text)
    return loaded


def find_files(patterns: str | Sequence[str], key: str) -> list[Path]:
    """Returns the files that paths or globs name, those of each glob sorted, and no file twice.

    Args:
        key: the config key that names them.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, Sequence) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise UserError(f"{key} is a path, a glob, or a list of them, not {patterns}.")
    found: dict[Path, None] = {}
    for pattern in map(os.path.expanduser, given):
        with reading(pattern):
            if Path(pattern).is_dir():
                raise UserError(f"{key}={pattern}: a directory. Name the files in it, such as {pattern}/*.txt")
            # A file name may contain the special characters of a glob.
            matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f'{key}={pattern}: no such file, and no file matches it in "{Path.cwd()}".')
        found |= dict.fromkeys(files)
    if not any(file.stat().st_size for file in found):
        raise UserError(f"the data set is empty: {key}={patterns} holds no byte. Name a file with text in it.")
    return [*found]


def refuse_copies(files: Mapping[str, list[Path]], digests: Mapping[Path, str]) -> None:
    """Refuses a validation file that has the content of a training file, or of a file of another domain."""
    nothing = hashlib.sha256().hexdigest()
    seen: dict[str, tuple[str, Path]] = {}
    for part, of_part in files.items():
        copies = [(file, *seen[digests[file]]) for file in of_part if seen.get(digests[file], (part,))[0] != part]
        if copies:
            file, other, original = copies[0]
            more = f" (and {len(copies) - 1} more)" if len(copies) > 1 else ""
            both = f"data.{other}={original} and data.{part}={file} have the same content{more}"
            if other != "train":
                raise UserError(f"{both}: it would be scored twice.\nLeave one of them out.")
            raise UserError(
                f"{both}: it would be trained on.\n"
                "Name others. Of text, a share is held out where data.validation is left out."
            )
        seen |= {digests[file]: (part, file) for file in of_part if digests[file] != nothing}
