"""The preparation of a directory of data in shards (shards.py), which several processes or jobs make together."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmlab.data.blocks import added_up, check_counts, read_counts, write_split
from lmlab.data.decontaminate import benchmark_items, duplicates_in, refuse_nothing, training_texts
from lmlab.data.digests import digest
from lmlab.data.documents import FEW, INDEX, write_stretches
from lmlab.data.duplicates import SIGNED, Benchmark, mark_signed, sign_documents
from lmlab.data.options import Preprocessing
from lmlab.data.overlap import KnownDocuments
from lmlab.data.prepared import FORMAT, Tokenized, decisive_choices, tokenizer_texts
from lmlab.data.preprocess import Parts, Source, join_texts, split
from lmlab.data.shards import CHECKSUMS, contained_in, damaged, name_of_domain, read_index, shard_name, write_checksums
from lmlab.data.sources import Corpus, fingerprint
from lmlab.data.texts import flatten, sort_by_file
from lmlab.data.tokenizers import content_hash
from lmlab.distributed import launch
from lmlab.errors import UserError
from lmlab.io import locked, read_json, replaced, write_beside, write_json, write_once

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py


@dataclass
class Preparation:
    """The preparation of a source in a directory, which any number of processes do together."""

    folder: Path
    corpus: Corpus
    choices: Preprocessing
    make_tokenizer: Callable[[Iterable[str]], PreTrainedTokenizerBase]
    tokenizer_key: Any
    """The settings of a tokenizer that is learned from the texts; None for another."""
    words: bool
    """True to keep which tokens of the training text continue a word."""
    shards: int
    """The number of shards of each split; fewer where there are fewer records."""
    command: str
    """The command that goes on with it."""

    def begin(self) -> None:
        """Makes the directory, or goes on in it.

        Raises:
            UserError: it holds something else, or a preparation of other data.
        """
        if isinstance(self.corpus, Tokenized):
            raise UserError("this data is tokenized already: train from it as it is.")
        file, (_, of_items) = self.folder / "preparation.json", benchmark_items(self.choices)
        if not file.is_file():
            if self.folder.is_dir() and any(path.name[0] != "." for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty, and holds no preparation. Choose another by output=DIR.")
            next(flatten(self.splits["train"], self.corpus.text))  # what is wrong with the data is said at once
        learned = self.tokenizer_key is not None
        plan = {
            "format": FORMAT,
            "data": self.corpus.fingerprint,
            "data.text": self.corpus.text,
            "tokenizer": self.tokenizer_key if learned else content_hash(self.make_tokenizer([])),
            "whole words": self.words,
            "shards": self.shards,
            "preprocess.decontaminate": self.choices.decontaminate,
            **({"preprocess.similarity": self.choices.similarity} if self.choices.decontaminate else {}),
            **({"preprocess.benchmarks": of_items} if of_items else {}),
            **{f"preprocess.{key}": value for key, value in decisive_choices(self.choices).items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            if file.is_file():
                earlier = read_json(file)
                other = [key for key, value in plan.items() if earlier.get(key) != value]
                if other:
                    raise UserError(
                        f"{self.folder} holds another preparation: its {' and '.join(other[:3])} "
                        f"{'is' if len(other) == 1 else 'are'} not of this command.\n"
                        f"Choose another directory by output=DIR, or finish that one: {earlier.get('command')}"
                    )
            else:
                write_json(file, plan | {"command": self.command})
                if self.parts.drawn is not None:
                    write_beside(self.drawn, self.parts.drawn.tofile)

    @cached_property
    def parts(self) -> Parts:
        """The records of each split.

        Which are held out by hash is found once, as all texts have to be read for it.
        """
        drawn = np.fromfile(self.drawn, np.int64) if self.drawn.is_file() else None
        return split(self.corpus, self.choices, drawn)

    @property
    def drawn(self) -> Path:
        """The file with the numbers of the records that are held out by hash."""
        return self.folder / "held_out"

    @cached_property
    def splits(self) -> "dict[str, Dataset]":
        """The records of each split by its name, those of held-out text first."""
        assert self.parts.train is not None
        held_out = {name_of_domain(domain): records for domain, records in self.parts.validation.items()}
        return {**held_out, "train": self.parts.train}

    def part(self, name: str, number: int, count: int) -> "Dataset":
        """Returns the records of a shard."""
        records = self.splits[name]
        return records.select(range(len(records) * number // count, len(records) * (number + 1) // count))

    def sign(self, name: str, number: int, count: int) -> str | None:
        """Writes the signatures of the documents of a shard, unless they are there, or the marks that they are for.

        Returns:
            what was done, in words; None if nothing had to be.
        """
        path = self.folder / f"signatures-{shard_name(name, number, count)}"
        with locked(self.folder / f".{path.name}.lock"):
            if path.exists() or (self.folder / "marks").exists():
                return None
            replaced(path, lambda folder: self.write_signatures(folder, self.part(name, number, count)))
        return f"{path.name}: {(path / 'items').stat().st_size:,} documents"

    def write_signatures(self, folder: Path, records: "Dataset") -> None:
        """Writes the signatures of the documents in records into a folder, which it makes."""
        folder.mkdir()
        sign_documents(folder, self.documents(records), self.benchmark)

    @cached_property
    def benchmark(self) -> Benchmark:
        """The items to look for in the training text."""
        return Benchmark(benchmark_items(self.choices)[0]())

    @cached_property
    def marks(self) -> Path | None:
        """The folder with the marks of the training documents, which the first process that needs it makes.

        None if `preprocess.decontaminate` does not ask for them.
        """
        if self.choices.decontaminate is None:
            return None

        def write(folder: Path) -> None:
            counts: dict[str, list[int]] = {name: [] for name in self.splits}
            for shard in self.all_shards():
                self.sign(*shard)  # those that no other process has made
                signed = self.folder / f"signatures-{shard_name(*shard)}"
                for kind in SIGNED:
                    with (signed / kind).open("rb") as stream, (folder / kind).open("ab") as joined:
                        shutil.copyfileobj(stream, joined, 2**22)
                counts[shard[0]].append((signed / "items").stat().st_size)
            training = counts.pop("train")
            marks = mark_signed(folder, sum(map(sum, counts.values())), training, self.choices.similarity)
            for name, of_shard in [*enumerate(marks), ("train", np.concatenate(marks))]:
                np.save(folder / f"{name}.npy", of_shard)
            refuse_nothing(of_shard, "", self.choices)

        folder = write_once(self.folder / "marks", write)
        for left in self.folder.glob("signatures-*"):
            shutil.rmtree(left, ignore_errors=True)
        return folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, of which the first process that needs it writes a copy into the directory."""

        def write(folder: Path) -> None:
            source = Source(self.corpus, lambda: self.parts, self.marks and self.marks / "train.npy")
            texts = [] if self.tokenizer_key is None else tokenizer_texts(source, self.choices)
            self.make_tokenizer(texts).save_pretrained(folder)

        return AutoTokenizer.from_pretrained(write_once(self.folder / "tokenizer", write))

    @cached_property
    def known(self) -> dict[str, KnownDocuments]:
        """The held-out documents of each split, to be found in the training text."""
        return {name: KnownDocuments(self.documents(self.splits[name])) for name in self.splits if name != "train"}

    def documents(self, records: "Dataset") -> Iterator[str]:
        """Yields the documents of records."""
        return join_texts(flatten(records, self.corpus.text), self.choices.join)

    def all_shards(self) -> list[tuple[str, int, int]]:
        """Returns the split of each shard, its number, and the number of shards of the split."""
        count = {name: min(self.shards, len(records)) for name, records in self.splits.items()}
        return [(name, number, count[name]) for name in self.splits for number in range(count[name])]

    def make(self, name: str, number: int, count: int) -> str | None:
        """Makes a shard, unless it is there and has its checksums.

        Returns:
            what was done, in words; None if nothing had to be.
        """
        path = self.folder / shard_name(name, number, count)
        with locked(self.folder / f".{path.name}.lock"):
            wrong = damaged(path) if path.exists() else None
            if path.exists() and wrong is None:
                return None
            replaced(path, lambda folder: self.write(folder, name, number, count))
        found = read_counts(path, "train" if name == "train" else "validation")
        again = f", as {wrong} had another checksum than when it was written" if wrong else ""
        return f"{path.name}: {found['documents']:,} documents, {found['tokens']:,} tokens{again}"

    def write(self, folder: Path, name: str, number: int, count: int) -> None:
        """Writes a shard into a folder, which it makes."""
        folder.mkdir()
        records, choices, tokenizer = self.part(name, number, count), self.choices, self.tokenizer
        if name != "train":
            unused = self.parts.unused if number == 0 else 0
            records, order = sort_by_file(records)
            texts = flatten(records, self.corpus.text)
            write_split(folder, "validation", texts, tokenizer, choices, order, unused=unused)
        else:
            source = Source(self.corpus, lambda: Parts(records, {}), self.marks and self.marks / f"{number}.npy")
            words = self.words and tokenizer.is_fast
            write_split(folder, name, training_texts(source, choices), tokenizer, choices, words=words)
            for held_out, known in self.known.items():
                found = known.contained(join_texts(training_texts(source, choices), choices.join))
                found.tofile(folder / contained_in(held_out))
            if source.marks is not None:
                write_json(folder / "train.duplicates.json", duplicates_in(source, choices, tokenizer))
        write_checksums(folder)

    def merge(self, changed: bool) -> bool:
        """Makes the index once all shards are there; whoever comes first does it.

        Args:
            changed: make it anew.

        Returns:
            True if there is an index now.
        """
        shards = {name: [shard_name(*shard) for shard in self.all_shards() if shard[0] == name] for name in self.splits}
        folders = {name: [self.folder / shard for shard in shards[name]] for name in shards}
        if not all(folder.is_dir() for name in shards for folder in folders[name]):
            return False
        index, held_out = self.folder / "index.json", [name for name in shards if name != "train"]
        with locked(self.folder / ".lock"):
            joined = [self.folder / name for name in held_out]
            kept = read_index(self.folder) is not None and (self.folder / "tokenizer").is_dir()
            if kept and not changed and all(each.is_dir() and damaged(each) is None for each in joined):
                return True
            in_training = {}
            for name in held_out:
                check_counts(name, added_up(read_counts(folder, "validation") for folder in folders[name]))
                replaced(self.folder / name, partial(join_held_out, shards=folders[name]))
                found = [np.fromfile(folder / contained_in(name), np.uint64) for folder in folders["train"]]
                counts = np.unique(np.concatenate(found).reshape(-1, 2), axis=0)[:, 1]
                in_training[name.partition(".")[2]] = int(counts.sum())
            check_counts("train", added_up(read_counts(folder, "train") for folder in folders["train"]))
            checksums = {
                f"{folder}/{file}": checksum
                for folder in (*held_out, *shards["train"])
                for file, checksum in read_json(self.folder / folder / CHECKSUMS).items()
            }
            content = {
                "train": shards["train"],
                "documents_in_training": in_training,
                "tokenizer_hash": content_hash(self.tokenizer),
                "checksums": checksums,
            }
            if self.marks is not None:
                content["duplicates"] = added_up(
                    read_json(folder / "train.duplicates.json") for folder in folders["train"]
                )
                if self.choices.decontaminate == "drop":  # the same text gives other blocks
                    content["data"] = fingerprint(self.corpus.fingerprint, digest(self.marks / "train.npy"))
            write_json(index, read_json(self.folder / "preparation.json") | content)
            for left in self.folder.glob(".*-of-*.lock"):
                left.unlink(missing_ok=True)
        return True


def join_held_out(folder: Path, shards: Sequence[Path]) -> None:
    """Writes the held-out documents of several shards into a folder, as if they had been prepared as one."""
    folder.mkdir()
    for kind in ("tokens", "spans", "lengths"):
        with (folder / f"validation.{kind}").open("wb") as stream:
            for shard in shards:
                with (shard / f"validation.{kind}").open("rb") as part:
                    shutil.copyfileobj(part, stream, 2**22)
    counts = added_up(read_counts(shard, "validation") for shard in shards)
    with pq.ParquetWriter(folder / "validation.documents.parquet", INDEX) as writer:
        for shard in shards:
            with pq.ParquetFile(shard / "validation.documents.parquet") as file:
                for batch in file.iter_batches():
                    if counts["documents"] >= FEW:  # a shard of fewer could not know
                        none: list[list[Any]] = [[]] * len(batch)
                        batch = batch.from_pydict({**batch.to_pydict(), "cuts": none, "starts": none}, schema=INDEX)
                    writer.write_batch(batch)
    write_json(folder / "validation.counts.json", counts | {"dtype": "int32"})
    write_stretches(folder, "validation")
    write_checksums(folder)


# --- Several processes ---


WORKER: list[Callable[[], Preparation]] = []
"""A function that returns the preparation of this process, where another one has started it."""


@contextmanager
def workers(processes: int, again: Callable[[], Preparation]) -> Iterator[ProcessPoolExecutor | None]:
    """Starts the processes that make shards, which import what they need while this one reads the records.

    Yields None where this process is the only one. Those that are left at the end are killed.

    Args:
        again: a function that makes the same preparation in a new process.
    """
    if processes == 1:
        yield None
        return
    os.environ["LMLAB_PARENT"] = str(os.getpid())
    # Of semaphores that a process which is killed leaves, Python's tracker of them warns, after it has removed them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    # The tokenizer has threads of its own: those of all processes together are as many as there are cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin_worker, (again,))
    try:
        for _ in range(processes):
            pool.submit(os.getpid)  # a process is started by its first task
        yield pool
    except (UserError, OSError):
        pool.shutdown(cancel_futures=True)  # the shards that others have begun are kept
        raise
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def make_shards(
    preparation: Preparation, step: str, shards: Sequence[tuple[str, int, int]], pool: ProcessPoolExecutor | None
) -> Iterator[str | None]:
    """Makes shards by the processes of a pool, or else by this one, and yields for each what was done.

    Args:
        step: the method that makes one: `sign` or `make`.

    Raises:
        UserError: a process was killed.
    """
    if pool is None:
        yield from (getattr(preparation, step)(*shard) for shard in shards)
        return
    if step == "make":
        preparation.marks, preparation.tokenizer  # noqa: B018  they would wait for the one that makes it
    try:
        for done in as_completed([pool.submit(make_in_worker, step, *shard) for shard in shards]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the preparation was killed, as the system does when memory runs out.\n"
            f"What is done is kept. To go on: {preparation.command}"
        ) from error


def begin_worker(again: Callable[[], Preparation]) -> None:
    """Begins the work of a process that makes shards: it is ready once its imports are done."""
    launch.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the process that started this one
    import datasets  # noqa: F401

    WORKER[:] = [cache(again)]


def make_in_worker(step: str, name: str, number: int, count: int) -> str | None:
    """Makes a shard in a process of its own, which makes the preparation for its first one."""
    done: str | None = getattr(WORKER[0](), step)(name, number, count)
    return done
