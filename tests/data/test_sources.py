"""Local files of every kind, directories laid out like the hub's, and the corpus that ships with lmlab."""

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lmlab.data import blocks, digests, json_files, sources
from lmlab.data.compressed import open_zst, zstd
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import prepare, prepare_validation
from lmlab.data.sources import SAMPLE, Corpus, load_files, load_hub, load_sample
from lmlab.data.texts import flatten
from lmlab.data.tokenizers import char
from lmlab.errors import UserError

TEXTS = ['a "quoted" word, a comma', "two\nlines", "é, e\u0301, 👩‍🚀, 你好", "  spaces  ", "last\n"]


def texts(corpus: Corpus) -> list[str]:
    return [text for texts in flatten(corpus.train, corpus.text) for text in texts]


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict]) -> bytes:
    return json.dumps(rows).encode()


def as_csv(rows: list[dict]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def packed(name: str, content: bytes) -> bytes:
    """As a file of this name holds it; zst in several frames, as those leave it that write with several threads."""
    if name.endswith(".zst"):
        half = len(content) // 2
        return zst_frame(content[:half]) + zst_frame(content[half:])
    return gzip.compress(content) if name.endswith(".gz") else content


def zst_frame(content: bytes) -> bytes:
    stream = io.BytesIO()
    with open_zst(stream, "wb") as written:
        written.write(content)
    return stream.getvalue()


def as_parquet(rows: list[dict]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


# --- Kinds of files ---


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_jsonl),
        ("a.jsonl.gz", as_jsonl),
        ("a.jsonl.zst", as_jsonl),
        ("a.json", as_json),
        ("a.json.gz", as_json),
        ("a.json.zst", as_json),
        ("a.csv", as_csv),
        ("a.csv.gz", as_csv),
        ("a.csv.zst", as_csv),
        ("a.parquet", as_parquet),  # compressed as it is
    ],
)
def test_records(name: str, write: Callable[[list[dict]], bytes], tmp_path: Path) -> None:
    """Each kind holds the same texts, whatever the column they are in is called."""
    content = write([{"number": i, "body": text} for i, text in enumerate(TEXTS)])
    (tmp_path / name).write_bytes(packed(name, content))
    corpus = load_files(str(tmp_path / name), text="body")
    assert texts(corpus) == TEXTS
    assert corpus.train["number"][:] == list(range(len(TEXTS)))
    assert corpus.validation is None


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_in_an_object(name: str, indent: int | None, tmp_path: Path) -> None:
    """The one list of records in an object is what such a file holds, unless the object is a record itself."""
    rows = [{"body": text, "number": "7", "tags": [{"a": 1}]} for text in TEXTS]
    both = [{"version": "1.1", "counts": [1, 2], "empty": [], "data": part} for part in (rows, rows[:2])]
    record = {"title": "t", "answers": [{"body": text} for text in TEXTS]}
    for folder, content in zip(("a", "b", "c"), (*both, record), strict=True):
        (tmp_path / folder).mkdir()
        packed = json.dumps(content, indent=indent).encode() + b"\n\n"
        (tmp_path / folder / name).write_bytes(gzip.compress(packed) if name.endswith(".gz") else packed)
    corpus = load_files(f"{tmp_path}/[ab]/{name}", text="body", validation=f"{tmp_path}/c/{name}")
    assert corpus.train[:]["body"] == TEXTS + TEXTS[:2]
    assert texts(corpus) == TEXTS + TEXTS[:2]
    for column in ("number", "tags"):
        assert corpus.train[column][0] == rows[0][column]
    assert load_files(f"{tmp_path}/c/{name}", text="answers.body").train["title"][:] == ["t"]


@pytest.mark.parametrize(
    "content", [json.dumps(TEXTS), json.dumps(TEXTS, indent=1), as_jsonl([{"text": "a"}]).decode()]
)
def test_json_of_texts_or_lines(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert texts(load_files(str(tmp_path / "a.json"))) == (TEXTS if content.startswith("[") else ["a"])


@pytest.mark.parametrize(
    ("name", "content", "given", "wanted"),
    [
        ("a.csv", "id;text\n1;words, more\n", None, "words, more"),
        ("a.csv.gz", "id;text\n1;words, more\n", None, "words, more"),
        ("a.csv", 'id\ttext\n1\t"words\n; more"\n', None, "words\n; more"),
        ("a.tsv", "text\tlength, in words\nwords, more\t2\n", None, "words, more"),
        ("a.csv", "a|text\nx|words; more\n", None, "words; more"),
        # By its name the column of the text is known, also where more columns could be made.
        ("a.csv", '"text";"a, b, c"\n"words, more";1\n', None, "words, more"),
        ("a.csv", "text,a;b;c\nwords; more,1\n", None, "words; more"),
        ("a.csv", "text\nwords\n", None, "words"),
        ("a.csv", "a;text\n1;words, more\n", ";", "words, more"),
        ("a.csv", "a\ttext\n1\twords, more\n", "\\t", "words, more"),
        ("a.csv", "a~text\n1~words, more\n", "~", "words, more"),
        ("a.tsv", "a,text\n1,words\n", ",", "words"),
    ],
)
def test_delimiter(
    name: str, content: str, given: str | None, wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    with caplog.at_level("INFO", "lmlab"):
        corpus = load_files(str(tmp_path / name), delimiter=given)
    assert texts(corpus) == [wanted]
    # It is said where it is not what one would think.
    comma = content.startswith("text,") or content == "text\nwords\n"
    assert ("divides the columns (data.delimiter)" in caplog.text) == (given is None and not comma)


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.TXT", "a.txt.gz", "a.TXT.zst"])
@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ("file", ["one\ntwo é\n\nthree\n\n\n  four"]),
        ("line", ["one", "two é", "", "three", "", "", "  four"]),
        ("paragraph", ["one\ntwo é", "three", "\n  four"]),
    ],
)
def test_plain_text(name: str, document: str, wanted: list[str], tmp_path: Path) -> None:
    content = "one\ntwo é\n\nthree\n\n\n  four".encode()
    (tmp_path / name).write_bytes(packed(name, content))
    assert texts(load_files(str(tmp_path / name), document=document)) == wanted


@pytest.mark.parametrize("nested", [{"text": ["a", "b"]}, [{"text": "a"}, {"text": "b"}]])
def test_nested_text(nested: dict | list, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"answers": nested}]))
    assert texts(load_files(str(tmp_path / "a.jsonl"), text="answers.text")) == ["a", "b"]


POSTS = [
    {"title": "A", "body": "one", "lang": "en", "year": 2020, "meta": {"by": "x"}, "tags": ["p", "q"]},
    {"title": "B", "body": None, "lang": "de", "year": 2021, "meta": {"by": "y"}, "tags": []},
    {"title": "C", "body": "", "lang": "en", "year": 2021, "meta": {"by": "z"}, "tags": ["r"]},
]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{title}\\n\\n{body}", ["A\n\none", "C\n\n"]),  # as it is typed in a shell
        ("{title}\n\n{body}", ["A\n\none", "C\n\n"]),
        ("{{{meta.by}}}: {title}{title}", ["{x}: AA", "{y}: BB", "{z}: CC"]),
    ],
)
def test_joined_fields(text: str, wanted: list[str], tmp_path: Path) -> None:
    """A template gives a text of each record that has all of its fields; an empty one is there, a null is not."""
    for name, write in (("a.jsonl", as_jsonl), ("a.json", as_json), ("a.parquet", as_parquet)):
        (tmp_path / name).write_bytes(write(POSTS))
        corpus = load_files(str(tmp_path / name), text=text)
        assert texts(corpus) == wanted
        assert len(corpus.train) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{titel}: {body}", 'no text at titel. Did you mean "title".  *Texts are at: body, lang, meta.by, tags, title'),
        ("{title}: {year}", "no text at year. Texts are at: body"),
        ("{title}: {meta}", "no text at meta."),
        ("{title}: {tags}", "tags is a list in a record, .*\nName it alone: data.text=tags"),
        ("{title}: {body", "expected '}' before end of string. Write a field as {title}"),
        ("{}: {body}", "between braces stands the path of a text"),
        ("{{title}}", "a template without a field"),
    ],
)
def test_wrong_templates(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(POSTS))
    with pytest.raises(UserError, match=message):
        texts(load_files(str(tmp_path / "a.jsonl"), text=text))


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", as_jsonl), ("a.csv", as_csv), ("a.parquet", as_parquet)])
def test_filter_of_files(name: str, write: Callable[[list[dict]], bytes], tmp_path: Path) -> None:
    """As of the hub; both splits are filtered, and the prepared data is kept apart."""
    (tmp_path / name).write_bytes(write(POSTS))
    (tmp_path / f"held_{name}").write_bytes(write(POSTS[::-1]))
    kept = [
        (None, "ABC"),
        ({"lang": "en"}, "AC"),
        ({"lang": ["de", "fr"]}, "B"),
        ({"lang": "en", "year": [2021, 2022]}, "C"),
    ]
    made = set()
    for filter, titles in kept:
        corpus = load_files(f"{tmp_path}/{name}", "title", f"{tmp_path}/held_{name}", filter=filter)
        assert corpus.train["title"][:] == [*titles]
        assert corpus.validation[""]["title"][:] == [*titles[::-1]]
        made.add(corpus.fingerprint)
    assert len(made) == len(kept)
    with pytest.raises(UserError, match='"language", which is not there'):
        _ = load_files(f"{tmp_path}/{name}", "title", filter={"language": "en"}).train
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="plain text files have none"):
        load_files(f"{tmp_path}/a.txt", filter={"lang": "en"})


# --- Which files ---


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Globs are sorted, several patterns keep their order, `**` goes down, and a name may look like a glob."""
    for name in ("b1.txt", "b0.txt", "a.txt", "deep/er/c.txt", "d[1].txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(load_files(f"{tmp_path}/b*.txt")) == ["b0.txt", "b1.txt"]
    assert texts(load_files([f"{tmp_path}/b?.txt", f"{tmp_path}/a.txt"])) == ["b0.txt", "b1.txt", "a.txt"]
    assert texts(load_files(f"{tmp_path}/**/c.txt")) == ["deep/er/c.txt"]
    assert texts(load_files(f"{tmp_path}/d[1].txt")) == ["d[1].txt"]
    monkeypatch.chdir(tmp_path)
    assert texts(load_files("b*.txt")) == ["b0.txt", "b1.txt"]


def test_validation_files(tmp_path: Path) -> None:
    for name in ("train0", "train1", "held0", "held1"):
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = load_files(f"{tmp_path}/train*.txt", validation=[f"{tmp_path}/held*.txt"])
    assert corpus.train["text"][:] == ["train0", "train1"]
    assert corpus.validation is not None
    assert corpus.validation[""]["text"][:] == ["held0", "held1"]


@pytest.mark.parametrize(
    ("train", "document", "message"),
    [
        ("nothing.txt", "file", "data.train=.*nothing.txt: no such file"),
        ("*.nothing", "file", "no file matches it"),
        ("a.[ct]*", "file", "the data files end in .csv, .txt. Name files of one kind."),
        ("*", "file", "a.md: files that end in .md are not read. Those that are: .txt, "),
        ("a.txt", "lines", 'data.document is one of .*, not "lines". Did you mean "line"?'),
    ],
)
def test_wrong_files(train: str, document: str, message: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "a.md"):
        (tmp_path / name).write_text("a")
    with pytest.raises(UserError, match=message):
        load_files(f"{tmp_path}/{train}", document=document)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nna\xefve\n", "a.txt, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": }\n', "a.jsonl, line 2: malformed JSON .*\nFix that line"),
        ("a.json", b'[{"text": "fine"},\n]', "a.json, line 2: malformed JSON"),
        ("a.txt.gz", gzip.compress(b"whole" * 100, mtime=0)[:-20], "a.txt.gz: not a whole gzip file"),
        ("a.jsonl.zst", zst_frame(as_jsonl(POSTS))[:-5], "a.jsonl.zst: not a whole zst file"),
        ("a.json.zst", zst_frame(as_json(POSTS))[:-5], "a.json.zst: not a whole zst file"),
        ("a.csv.zst", b"text\nwords\n", "a.csv.zst: not a whole zst file"),
        ("a.json", b'[{"text": "fine"}, {"text": "na\xefve"}]', "a.json, line 1: not UTF-8"),
        ("a.json", b'[{"text": "fine"}', "a.json, line 1: malformed JSON .Expecting ']' at column 18"),
        ("a.json", b'{"data": [{"text": "fine"}\n, {"text" "a"}]}', "a.json, line 2: malformed JSON .* at column 11"),
        ("a.json", b'[{"text": "fine"}] [', "a.json, line 1: malformed JSON .Extra data at column 20"),
        ("a.json", b"[]", "a.json: no record"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_files(str(tmp_path / name))


def test_long_windows(tmp_path: Path) -> None:
    """Large dumps are written by `zstd --long=31`, which zstd itself reads only when told to."""
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.compression_level: 1}
    written = zstd.ZstdCompressor(options=options)
    content = as_jsonl([{"text": text} for text in TEXTS])
    (tmp_path / "a.jsonl.zst").write_bytes(written.compress(content) + written.flush())
    assert texts(load_files(str(tmp_path / "a.jsonl.zst"))) == TEXTS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@example(values=[0.0, 1e30, -1e-7], indent=None, ascii=True, chunk=1)
@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_stream(values: list, indent: int | None, ascii: bool, chunk: int) -> None:
    """Wherever what was read ends, the values are those of Python's reader, and so are the texts they stand in."""
    content = json.dumps({"a": 1, "b": values, "c": {"d": []}}, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        source = json_files.JSONStream(Path("a.json"), io.StringIO(content))
        found = list(json_files.items_at(source, "b"))
    assert [value for value, _ in found] == values
    assert [json.loads(text) for _, text in found] == values
    assert source.next_sign() == ""


@pytest.mark.parametrize("wrap", ["[%s]", '{"version": [1, 2], "data": [%s]}'])
def test_json_of_any_size(wrap: str, tmp_path: Path) -> None:
    """A list is read in a stream, also if it is the one line of its file."""
    record = json.dumps({"text": "some words " * 1000})

    def peak(records: int) -> int:
        file, copy = tmp_path / f"{records}.json", tmp_path / f"{records}.jsonl"
        file.write_text(wrap % ", ".join([record] * records))
        tracemalloc.start()
        assert json_files.unwrap_json(file, "text", copy) == copy
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert copy.read_text() == f"{record}\n" * records
        return peak

    peak(10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", 2**15)
        assert peak(400) < 1.2 * peak(100)


# --- The fingerprint of files ---


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    """Another path and time leave it; another content, document, order or part makes another."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first")
    two.write_text("second")
    moved = tmp_path / "elsewhere" / "renamed.txt"
    moved.parent.mkdir()
    shutil.copy(one, moved)
    os.utime(moved, (1, 1))
    first = load_files(str(one)).fingerprint
    assert load_files(str(moved)).fingerprint == first

    others = [
        load_files(str(two)),
        load_files(str(one), document="line"),
        load_files([str(one), str(two)]),
        load_files([str(two), str(one)]),
        load_files(str(one), validation=str(two)),
        load_files(str(two), validation=str(one)),
    ]
    assert len({first, *(corpus.fingerprint for corpus in others)}) == 7

    table = tmp_path / "a.csv"
    table.write_text("text;b,text\nx;c,d\n")
    read = [load_files(str(table), delimiter=delimiter) for delimiter in (",", ";", None)]
    assert [texts(corpus) for corpus in read] == [["d"], ["x"], ["d"]]
    assert read[2].fingerprint == read[0].fingerprint != read[1].fingerprint


def test_changed_file(tmp_path: Path) -> None:
    """A file that is written anew is read anew."""
    file = tmp_path / "a.txt"
    file.write_text("before")
    before = load_files(str(file))
    file.write_text("afterw")
    os.utime(file, (2, 2))
    after = load_files(str(file))
    assert (texts(before), texts(after)) == (["before"], ["afterw"])
    assert before.fingerprint != after.fingerprint


# --- What is remembered of files ---


def test_domains_that_are_none(tmp_path: Path) -> None:
    """A name that is none, no text, the text of another one, or an empty one: the error names the domain."""
    files = [tmp_path / f"{name}.txt" for name in ("train", "news", "empty")]
    for file, text in zip(files, ("some text", "other text", "\n" * 3), strict=True):
        file.write_text(text)
    train, news, empty = map(str, files)

    def said(**domains: str | None) -> str:
        with pytest.raises(UserError) as error:
            prepare(
                load_files(train, validation=domains, document="line"), Preprocessing(), char, {"k": 1}, tmp_path / "c"
            )
        return str(error.value)

    assert "data.validation={} names no domain" in said()
    assert '"a b" names no domain' in said(**{"a b": news})
    assert "data.validation.law=null names no text" in said(news=news, law=None)
    assert "data.validation.news=" in (shown := said(news=news, law=news))
    assert "the same content: it would be scored twice" in shown
    assert "the validation.law split gives no token" in said(news=news, law=empty)


def never(*args: object) -> None:
    raise AssertionError("read again")


@pytest.fixture
def memos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """The memos of this test; files need not be at rest for one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(digests, "AT_REST", 0)
    return lambda: list((tmp_path / "datasets").glob("lmlab-*.json"))


def blocks_from(train: str, place: Path) -> list[list[int]]:
    """The training blocks of files, from the cache in `place` if they are there."""
    corpus = load_files(train, document="line")
    data = prepare(corpus, Preprocessing(block_size=8), char, {"kind": "char"}, place)
    return [block.tolist() for block in data.train]


def test_second_start(memos: Callable[[], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads no data file, no record, and tokenizes nothing; an evaluation neither."""
    file, place = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("".join(f"line {i}\n" for i in range(50)))
    first = blocks_from(str(file), place)
    assert len(memos()) == 1
    with monkeypatch.context() as patched:
        for module, name in ((sources, "digest"), (sources, "read_files"), (blocks, "tokenize")):
            patched.setattr(module, name, never)
        assert blocks_from(str(file), place) == first
        tokenizer = AutoTokenizer.from_pretrained(next(place.glob("tokenizer-*[!k]")))
        corpus = load_files(str(file), document="line")
        assert len(prepare_validation(corpus, Preprocessing(block_size=8), tokenizer, place).validation) == 5
    # Other choices need the records, and find them.
    assert texts(load_files(str(file), document="line"))[:2] == ["line 0", "line 1"]


def test_a_file_that_changed_is_noticed(memos: Callable[[], list[Path]], tmp_path: Path) -> None:
    """Written over in place: the same size, the same inode, and the time of modification set back."""
    file, place = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("".join(f"line {i}\n" for i in range(50)))
    before, about = blocks_from(str(file), place), file.stat()
    old = load_files(str(file), document="line")
    with file.open("r+") as stream:
        stream.write("Line")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    again = file.stat()
    assert [(x.st_size, x.st_mtime_ns, x.st_ino) for x in (about, again)] == [
        (about.st_size, about.st_mtime_ns, about.st_ino)
    ] * 2
    assert blocks_from(str(file), place) != before
    assert load_files(str(file), document="line").fingerprint != old.fingerprint
    # Nor are its new records ever taken for the old ones.
    with pytest.raises(UserError, match="has changed since"):
        _ = old.train


@pytest.mark.parametrize(
    "content", [None, "", "null", "[]", "{}", "\xff", '{"files": [[1, 2, 3, 4]], "digests": ["a"]}']
)
def test_a_memo_that_is_none(content: str | None, memos: Callable[[], list[Path]], tmp_path: Path) -> None:
    """Half-written, of another form, or with a digest that is another's: the file is read."""
    file = tmp_path / "a.txt"
    file.write_text("words")
    wanted = load_files(str(file)).fingerprint
    (memo,) = memos()
    whole = memo.read_bytes()
    memo.write_bytes(whole[: len(whole) // 2] if content is None else content.encode("latin1"))
    assert load_files(str(file)).fingerprint == wanted
    assert memo.read_bytes() == whole
    memo.write_text(memo.read_text().replace(hashlib.sha256(b"words").hexdigest(), hashlib.sha256(b"x").hexdigest()))
    assert load_files(str(file)).fingerprint == wanted


def test_no_memo(memos: Callable[[], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with a fault, of one that changed just now, or where none can be written; and no harm in that."""
    file = tmp_path / "a.jsonl"
    file.write_text("{")
    with pytest.raises(UserError):
        load_files(str(file))
    assert memos() == []
    file.write_text('{"text": "a"}')
    monkeypatch.setattr(digests, "AT_REST", 60)
    assert texts(load_files(str(file))) == ["a"]
    assert memos() == []
    monkeypatch.setattr(digests, "AT_REST", 0)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(digests, "write_text", refuse)
    assert texts(load_files(str(file))) == ["a"]
    assert memos() == []


# --- Hub layout ---


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data set of two splits."""
    for split, count in (("train", 9), ("validation", 4)):
        rows = [{"text": f"{split}{i}", "subreddit": "abc"[i % 3], "score": i % 2} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_bytes(as_jsonl(rows))
    return tmp_path


def numbers(corpus: Corpus) -> list[int]:
    return [int(text.removeprefix("train")) for text in texts(corpus)]


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"subreddit": "a"}, [0, 3, 6]),
        ({"subreddit": ["a", "c"]}, [0, 2, 3, 5, 6, 8]),
        ({"subreddit": ["a", "c"], "score": 1}, [3, 5]),
        ({"subreddit": "d"}, []),
    ],
)
def test_filter(directory: Path, wanted: dict | None, kept: list[int]) -> None:
    assert numbers(load_hub(str(directory), "text", filter=wanted)) == kept


def test_filter_of_both_splits(directory: Path) -> None:
    corpus = load_hub(str(directory), "text", validation="validation", filter={"subreddit": "a"})
    assert numbers(corpus) == [0, 3, 6]
    assert corpus.validation is not None
    assert corpus.validation[""]["text"][:] == ["validation0", "validation3"]


def test_filter_of_no_column(directory: Path) -> None:
    with pytest.raises(UserError, match=r'"subredit".* Did you mean "subreddit"'):
        load_hub(str(directory), "text", filter={"subredit": "a"})


def test_slices(directory: Path) -> None:
    """Splits are sliced before they are filtered, as by the guide's `[:5000]`."""
    corpus = load_hub(str(directory), "text", train="train[:5]", validation="validation[50%:]")
    assert numbers(corpus) == [0, 1, 2, 3, 4]
    assert corpus.validation is not None
    assert corpus.validation[""]["text"][:] == ["validation2", "validation3"]
    assert numbers(load_hub(str(directory), "text", train="train[4:]", filter={"subreddit": "a"})) == [6]
    with pytest.raises(UserError, match='Unknown split "test"'):
        load_hub(str(directory), "text", train="test")


def test_hub_fingerprint(directory: Path) -> None:
    """The same for the same request; its own for each split, slice and filter."""
    made = [
        load_hub(str(directory), "text", **options).fingerprint  # type: ignore[arg-type]
        for options in (
            {},
            {"train": "train[:5]"},
            {"train": "validation"},
            {"validation": "validation"},
            {"filter": {"subreddit": "a"}},
            {"filter": {"subreddit": ["a", "b"]}},
        )
    ]
    assert len(set(made)) == len(made)
    assert load_hub(str(directory), "text").fingerprint == made[0]


# --- The sample ---


def test_sample() -> None:
    """Enough of it to learn from, in the guide's schema, and nothing empty or twice."""
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    assert len(rows) >= 120
    nested = ("answers", "title_urls", "selftext_urls", "answers_urls")
    for row in rows:
        assert set(row) == {"q_id", "title", "selftext", "document", "subreddit", *nested}
        assert all(isinstance(row[key], str) for key in row if key not in nested)
        answers = row["answers"]
        assert {key: {type(value) for value in values} for key, values in answers.items()} == {
            "a_id": {str},
            "text": {str},
            "score": {int},
        }
        assert len(answers["a_id"]) == len(answers["text"]) == len(answers["score"])
        assert all(set(row[key]) == {"url"} and isinstance(row[key]["url"], list) for key in nested[1:])
        assert row["subreddit"] == "askscience"
        assert row["q_id"].strip()
        assert row["title"].strip()
        assert all(text.strip() for text in answers["text"])
    answers = [answer for row in rows for answer in row["answers"]["text"]]
    assert len(answers) / len(rows) >= 2
    assert sum(len(text.split()) for text in answers) >= 20_000
    for unique in ([row["q_id"] for row in rows], [row["title"] for row in rows], answers):
        assert len(set(unique)) == len(unique)
    ids = [a_id for row in rows for a_id in row["answers"]["a_id"]]
    assert len(set(ids)) == len(ids)


def test_load_sample() -> None:
    """Flattened, it has the guide's columns."""
    corpus = load_sample()
    assert set(corpus.train.flatten().column_names) == {
        *("q_id", "title", "selftext", "document", "subreddit"),
        *("answers.a_id", "answers.text", "answers.score"),
        *("title_urls.url", "selftext_urls.url", "answers_urls.url"),
    }
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    assert texts(corpus) == [text for row in rows for text in row["answers"]["text"]]
    assert texts(load_sample("title")) == [row["title"] for row in rows]
    assert corpus.fingerprint == load_sample().fingerprint


def test_content_counts_where_path_and_time_are_the_same(tmp_path: Path) -> None:
    """A copy that keeps the time (`cp -p`, `rsync -t`) is still other data."""
    file = tmp_path / "a.txt"
    for content in ("one", "two"):
        file.write_text(content)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert load_files(str(file)).train["text"][:] == [content]


def test_csv_text_that_pandas_takes_for_missing_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nNA\nnull\nwords\n")
    assert load_files(str(tmp_path / "a.csv")).train["text"][:] == ["NA", "null", "words"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert load_files(str(tmp_path / "a.txt")).train["text"][:] == ["words"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    assert len(load_files([str(tmp_path / "a.txt"), str(tmp_path / "a*.txt")]).train) == 1
