"""Token files that other tools wrote, read as they are: of Megatron, nanoGPT and llm.c.

| tool | file | documents |
|---|---|---|
| Megatron-LM | `x.bin`, with `x.idx` beside it | those of the `.idx` |
| llm.c | `x.bin` of uint16 or uint32, after a header of 256 int32 | each ends with the end-of-text token |
| nanoGPT | `x.bin` of uint16 | each ends with the end-of-text token |

(Megatron-LM, `megatron/core/datasets/indexed_dataset.py`; llm.c, `dev/data/data_common.py`; nanoGPT,
`data/openwebtext/prepare.py`.)

Training tokens are not copied. Held-out documents are decoded, and encoded again: where this gives the tokens of the
file, each of them stands for a known part of the text, as in text that lmlab has tokenized itself. If it does not in
one document, as where a tokenizer loses capital letters, nobody knows how many bytes the tokens stand for: then there
is the perplexity per token, which the tokens alone decide, and no metric per byte or per word.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmlab.data.blocks import Blocks, added_up, cut_blocks, read_counts, read_edges
from lmlab.data.digests import digests_of
from lmlab.data.documents import UNKNOWN, document_spans, open_index, read_lengths, running_sums, write_stretches
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import FORMAT, Prepared, Tokenized, decisive_choices, held_out_beforehand, read_prepared
from lmlab.data.preprocess import DOCUMENTS_PER_CALL
from lmlab.data.sources import find_files, fingerprint, refuse_copies
from lmlab.data.texts import batches, utf8
from lmlab.data.tokenizers import content_hash, encode, end_of_text_id, unknown_tokens
from lmlab.data.tokens import FlatFile, FlatFiles
from lmlab.errors import UserError
from lmlab.io import write_json, write_once

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""The types of tokens, by their codes in an `.idx`."""
LLMC_DTYPES = {20240520: "uint16", 20240801: "uint32"}
"""The types of tokens of llm.c, by the number that a file begins with."""
LLMC_HEADER = 256 * 4  # bytes
FEW = 64
"""The number of tokens up to which any tokens are taken to be meant."""
AT_ONCE = 2**24
"""The number of tokens that are looked at together."""


class TokenFile(NamedTuple):
    """A file of tokens, and where its documents are."""

    tokens: FlatFile
    documents: list[int] | None
    """The number of tokens of each document, of Megatron; None where an end-of-text token ends each."""


def open_tokens(path: Path) -> TokenFile:
    """Reads how a token file is written.

    Raises:
        UserError: it is none, it is cut short, or its header disagrees with it.
    """
    size, index = path.stat().st_size, path.with_suffix(".idx")
    if path.suffix == ".idx":
        raise UserError(f"{path} is the index of a token file: name the .bin beside it.")
    if index.is_file():
        lengths, dtype = read_megatron(index)
        tokens = int(lengths.sum())
        if tokens * np.dtype(dtype).itemsize != size:
            raise UserError(
                f"{index} is of {tokens:,} tokens of type {dtype}, and {path} holds {size:,} bytes: "
                "the two do not belong together, or one is cut short."
            )
        return TokenFile(FlatFile(path, dtype), lengths.tolist())
    with path.open("rb") as stream:
        head = stream.read(LLMC_HEADER)
    magic, _, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    # Two tokens of a nanoGPT file could happen to be the number: then the count after it is not that of its tokens.
    if magic in LLMC_DTYPES and len(head) == LLMC_HEADER and not any(head[40:]):
        file = FlatFile(path, LLMC_DTYPES[magic], LLMC_HEADER)
        if count * np.dtype(file.dtype).itemsize != size - LLMC_HEADER:
            raise UserError(
                f"{path}: the header says {count:,} tokens of type {file.dtype}, and {size - LLMC_HEADER:,} bytes "
                "follow it: the file is cut short, or damaged."
            )
        return TokenFile(file, None)
    if size % 2:
        raise UserError(
            f"{path}: an odd number of bytes ({size:,}), and no header: it is no file of 2-byte tokens, or cut short."
        )
    return TokenFile(FlatFile(path, "uint16"), None)


def read_megatron(index: Path) -> tuple[np.ndarray, str]:
    """Reads the `.idx` of Megatron: the tokens of each document [documents], and their type."""
    content = index.read_bytes()
    if not content.startswith(MEGATRON) or len(content) < 34:
        raise UserError(f"{index} is no index of Megatron: it does not begin as one does. Name other token files.")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34])
    if version != 1 or code not in MEGATRON_DTYPES or len(content) != 34 + 12 * sequences + 8 * documents:
        raise UserError(f"{index} is damaged, or of another version of Megatron than those that are read (1).")
    lengths = np.frombuffer(content, "<i4", sequences, 34).astype(np.int64)
    dtype = MEGATRON_DTYPES[code]
    pointers = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
    if not np.array_equal(pointers, running_sums(lengths)[:-1] * np.dtype(dtype).itemsize):
        raise UserError(f"{index}: its sequences do not follow on one another in the .bin, which is not read.")
    edges = np.frombuffer(content, "<i8", documents, 34 + 12 * sequences)
    return np.diff(running_sums(lengths)[edges]), dtype


class TokenFiles(Tokenized):
    """Token files of others, of training and of held-out text."""

    def __init__(self, files: dict[str, list[TokenFile]]):
        self.files = files

    def prepared(
        self,
        names: Sequence[str],
        choices: Preprocessing,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        words: bool,
    ) -> Prepared:
        default = decisive_choices(Preprocessing()) | held_out_beforehand(choices)
        changed = [key for key, value in decisive_choices(choices).items() if value != default[key]]
        if changed:
            raise UserError(
                f"preprocess.{changed[0]} changes nothing in token files, which are read as they are. Leave it out, or "
                "take preprocess=lossless."
            )
        if words:
            raise UserError("objective.whole_word=true needs text: token files do not say where words begin.")
        if "train" in names and "train" not in self.files:
            raise UserError("data.train has to be given: add data.train=… to the command.")
        from datasets import config

        files = [file.tokens.path for of_part in self.files.values() for file in of_part]
        memo = f"lmlab-{fingerprint('tokens', [str(file.absolute()) for file in files])}.json"
        digests = dict(zip(files, digests_of(files, Path(config.HF_DATASETS_CACHE) / memo), strict=True))
        refuse_copies({part: [file.tokens.path for file in self.files[part]] for part in self.files}, digests)
        hashed, end = content_hash(tokenizer), end_of_text_id(tokenizer)
        surveys: dict[str, list[Path]] = {}
        for name in names:
            for file in self.files[name]:
                key = fingerprint(FORMAT, name, digests[file.tokens.path], file.tokens.dtype, file.documents, end)
                found = write_once(cache / f"ids-{key}", partial(survey, name=name, file=file, end=end))
                check_ids(file, int((found / "highest").read_text()), tokenizer)
                surveys.setdefault(name, []).append(found)
        key = fingerprint(FORMAT, "held-out tokens", [found.name for found in surveys["validation"]], hashed)
        write = partial(
            write_held_out, files=self.files["validation"], surveys=surveys["validation"], tokenizer=tokenizer, end=end
        )
        folder = write_once(cache / f"tokens-{key}", write)
        source = fingerprint(
            "tokens", {part: [digests[f.tokens.path] for f in self.files[part]] for part in self.files}
        )
        data = read_prepared([], {"": folder}, choices, tokenizer, source, {})
        if "train" not in names:
            return data
        bounds, piece_edges, ledger = cut_blocks(surveys["train"], "train", choices)
        tokens = FlatFiles(*(file.tokens for file in self.files["train"]))
        document_edges = read_edges(surveys["train"], "train", choices)
        blocks = Blocks(tokens, bounds, piece_edges, document_edges=document_edges)
        return replace(data, train=blocks, ledger={"train": ledger, **data.ledger})


def load_tokens(train: str | Sequence[str] | None = None, validation: str | Sequence[str] | None = None) -> TokenFiles:
    """Loads token files of Megatron, nanoGPT or llm.c, which `tokenizer` has to have written.

    Args:
        train: a path or glob of `.bin` files, or a list of them; None if only `validation` is needed.
        validation: the same; it has to be given, as nothing is held out of token files.
    """
    if validation is None:
        raise UserError("data.validation has to be given: nothing is held out of token files. Add data.validation=…")
    named = {"train": train, "validation": validation}
    files = {part: find_files(patterns, f"data.{part}") for part, patterns in named.items() if patterns is not None}
    return TokenFiles({part: [open_tokens(file) for file in of_part] for part, of_part in files.items()})


def check_ids(file: TokenFile, highest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a file with an id that the tokenizer does not have."""
    known = max(tokenizer.get_vocab().values())
    if highest > known:
        raise UserError(
            f"{file.tokens.path} holds the id {highest}, read as {file.tokens.dtype}, and the tokenizer has 0 to "
            f"{known}.\nThe file was written by another tokenizer, or as another type. Name its own: tokenizer.name=…"
        )


def survey(folder: Path, name: str, file: TokenFile, end: int) -> None:
    """Looks at all tokens of a file once, and writes their highest id, and the lengths and the counts of documents."""
    tokens, edges, highest, seconds = file.tokens.read(), [np.zeros(1, np.int64)], 0, 0
    for start in range(0, len(tokens), AT_ONCE):
        part = tokens[start : start + AT_ONCE]
        highest, seconds = max(highest, int(part.max())), max(seconds, int(part[1::2].max(initial=0)))
        edges.append(start + np.flatnonzero(part == end) + 1)
    if file.tokens.dtype == "uint16" and len(tokens) > FEW and seconds < 4 <= highest:
        raise UserError(
            f"{file.tokens.path}: every second token is below 4, as in a file of 4-byte tokens, which is read "
            "only with a header.\nWrite the tokens as uint16, or as llm.c or Megatron does."
        )
    if file.documents is None:
        lengths = np.diff(np.concatenate(edges), append=len(tokens))
        lengths = lengths if lengths[-1] else lengths[:-1]  # unless tokens follow the last end of a text
    else:
        lengths = np.array(file.documents, np.int64)
    counts = {"records": len(lengths), "records_without_text": 0, "documents": len(lengths)}
    counts |= {"tokens": len(tokens), "tokens_truncated": 0}
    lengths.tofile(folder / f"{name}.lengths")
    (folder / "highest").write_text(str(highest))
    write_json(folder / f"{name}.counts.json", counts)


def write_held_out(
    folder: Path, files: Sequence[TokenFile], surveys: Sequence[Path], tokenizer: PreTrainedTokenizerBase, end: int
) -> None:
    """Writes held-out documents as `write_split` does, with the text that each token stands for.

    Where not all of it can be known, no token stands for any.
    """
    counts = added_up(read_counts(found, "validation") for found in surveys)
    spelled = write_documents(folder, files, surveys, tokenizer, end, exact=True)
    if spelled is None:
        write_documents(folder, files, surveys, tokenizer, end, exact=False)
    write_stretches(folder, "validation")
    write_json(folder / "validation.counts.json", counts | (spelled or {}))


def write_documents(
    folder: Path,
    files: Sequence[TokenFile],
    surveys: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    exact: bool,
) -> dict[str, int] | None:
    """Writes tokens, spans, lengths and index of held-out documents.

    Args:
        exact: False to write spans of nothing.

    Returns:
        the bytes and unknown tokens of the documents; None as soon as one does not give its tokens when it is decoded
        and encoded again.
    """
    counts, unknown = dict.fromkeys(("bytes", "unknown_tokens", "unknown_bytes"), 0), unknown_tokens(tokenizer)
    with ExitStack() as opened:
        tokens, all_spans, lengths = (
            opened.enter_context((folder / f"validation.{kind}").open("wb")) for kind in ("tokens", "spans", "lengths")
        )
        add_to_index = opened.enter_context(open_index(folder / "validation.documents.parquet"))
        for batch in batches(documents_of(files, surveys), DOCUMENTS_PER_CALL, AT_ONCE):
            own = [ids[:-1] if ids[-1:] == [end] else ids for ids in batch]
            texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in own]
            encoded = encode(texts, tokenizer, located=True)
            for ids, body, text, (again, encoding) in zip(batch, own, texts, encoded, strict=True):
                spans = np.zeros((len(ids), 5), np.int32)
                if exact and [*again] != body:
                    return None
                if exact:
                    ending = ids[len(body) :]
                    spans = document_spans(
                        text, body, encoding, ending=ending, ends={end}, unknown=unknown, lost=0, left=False
                    )
                tokens.write(np.array(ids, np.int32).tobytes())
                all_spans.write(spans.tobytes())
                lengths.write(np.int64(len(ids)).tobytes())
                add_to_index(text, exact)
                counts["bytes"] += len(utf8(text))
                counts["unknown_tokens"] += int((spans[:, UNKNOWN] > 0).sum())
                counts["unknown_bytes"] += int(spans[:, UNKNOWN].sum())
    return counts


def documents_of(files: Sequence[TokenFile], surveys: Sequence[Path]) -> Iterator[list[int]]:
    """Yields the ids of each document."""
    for file, found in zip(files, surveys, strict=True):
        tokens = file.tokens.read()
        for first, last in pairwise(running_sums(read_lengths(found, "validation"))):
            yield tokens[first:last].tolist()
