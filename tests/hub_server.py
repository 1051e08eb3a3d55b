"""A Hugging Face hub on this machine: as much of its protocol as its own clients need to load from it and to push."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[str, dict[str, Path]]
"""Directories by kind, `model` or `dataset`, and id, such as `me/tiny-gpt2`."""
Files = dict[str, Path]
"""Where the content of each file of a commit lies."""

FILE = re.compile(r"/(?:(?P<kind>dataset)s/)?(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<id>.+?)"
    r"(?:/(?P<call>revision|tree|paths-info|preupload|commit|branch|tag)/(?P<revision>[^/]+)(?:/(?P<path>.+))?"
    r"|/(?P<refs>refs))?"
)
BATCH = re.compile(r"/(?P<id>.+)\.git/info/lfs/objects/batch")
LARGE = (".safetensors", ".parquet", ".png")
"""Endings of files whose content is sent apart from the commit that names it."""
LICENSES = ("apache-2.0", "mit", "other")
TOKENS = {"hf_writes": ("me", "write"), "hf_reads": ("me", "read"), "hf_yours": ("you", "write")}
"""Tokens that the hub knows: whose each is, and what it may do."""


class Refused(Exception):  # noqa: N818
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", commit: str = "", body: Any = None):
        self.status, self.body = status, b"" if body is None else json.dumps(body).encode()
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Content-Type": "application/json"}
        self.headers = {name: value for name, value in headers.items() if value}


def missing(code: str, commit: str = "") -> Refused:
    """What is asked for is not here; the code is the hub's own word for it."""
    return Refused(404, code, commit)


@dataclass
class Failure:
    """What goes wrong with requests whose `METHOD /path` matches, in place of an answer."""

    pattern: str
    status: int
    """Of the answer; 0 reads half of what is sent, and drops the line; -1 answers as ever, and drops the answer; -2
    sends half of it before it drops the line."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    """Requests that are answered as ever before it."""


@dataclass
class Repository:
    """A repository that was pushed to."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: Files, message: str) -> str:
        made = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[made] = files
        self.branches[branch] = made
        self.messages.append(message)
        return made

    def at(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise missing("RevisionNotFound")
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes out as a whole: its body does not wait for the other side to confirm its head
    server: "Hub"

    def handle_request(self) -> None:
        url = urlsplit(self.path).path
        asked = f"{self.command} {url}"
        length = int(self.headers.get("Content-Length", 0))
        failure = self.server.failure(asked)
        if failure is not None and failure.status == 0:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        with self.server.lock:
            self.server.requests.append(asked)
            self.server.authorizations.add(self.headers.get("Authorization"))
            try:
                if failure is not None and failure.status > 0:
                    raise Refused(failure.status)
                headers, content = self.server.answer(self.command, url, body, self.headers.get("Authorization"))
                status, headers, content = part_of(content, headers, self.headers.get("Range"))
            except Refused as refused:
                status, headers, content = refused.status, refused.headers, refused.body
        if failure is not None:
            headers = headers | failure.headers
            if failure.status == -1:
                self.close_connection = True
                return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if failure is not None and failure.status == -2:
            self.close_connection = True
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """The hub keeps its own list of requests."""


class Hub(ThreadingHTTPServer):
    """Serves directories as repositories, each with one commit, which is the branch `main`; and takes others."""

    def __init__(self, repositories: Repositories, store: Path | None = None):
        """Args: `store`: the folder for the contents of what is pushed; None takes no push."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.store = store
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        """What was asked for, as `METHOD /path`, without the query."""
        self.authorizations = set[str | None]()
        """What the requests said of who asks."""
        self.pushed: dict[str, Repository] = {}
        self.failures: list[Failure] = []
        self.uploads: list[str] = []
        """The sha256 of each content that was sent, once for each time."""
        self.lock = Lock()

    def failure(self, asked: str) -> Failure | None:
        """The failure that is due for a request."""
        with self.lock:
            for failure in self.failures:
                if failure.times and re.fullmatch(failure.pattern, asked):
                    if failure.passed:
                        failure.passed -= 1
                        return None
                    failure.times -= 1
                    return failure
        return None

    def commit(self, kind: str, name: str, revision: str = "main") -> str:
        """The commit of a repository; of a directory a hash of its files."""
        if name in self.pushed:
            return self.pushed[name].at(revision)
        root = self.repositories.get(kind, {}).get(name)
        if root is None:
            raise missing("RepoNotFound")
        files = files_of(root)
        made = hashlib.sha1("".join(f"{path} {oid(file)}" for path, file in files.items()).encode()).hexdigest()
        if revision not in ("", "main", made):
            raise missing("RevisionNotFound")
        return made

    def files(self, kind: str, name: str, commit: str) -> Files:
        if name in self.pushed:
            return self.pushed[name].commits[commit]
        return files_of(self.repositories[kind][name])

    def answer(self, method: str, url: str, body: bytes, authorization: str | None) -> tuple[dict[str, str], bytes]:
        """Headers and body for a request."""
        if url == "/":
            return {}, b""
        if url.startswith("/lfs/"):  # where contents are kept, which asks for no token
            self.keep(body)
            self.uploads.append(url.removeprefix("/lfs/"))
            return {}, b""
        user = self.user(authorization)
        if url == "/api/whoami-v2":
            if user is None:
                raise Refused(401)
            return as_json({"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}})
        if url == "/api/validate-yaml":
            return as_json(validated(json.loads(body)["content"]))
        if url == "/api/repos/create":
            return as_json(self.create(json.loads(body), user))
        asked = BATCH.fullmatch(url)
        if asked is not None:
            self.check_writes(asked["id"], user)
            return as_json(self.batch(json.loads(body)))
        asked = API.fullmatch(url) or FILE.fullmatch(url)
        if asked is None:
            raise missing("EntryNotFound")
        parts = {part: unquote(text) for part, text in asked.groupdict(default="").items()}
        kind, name, call = parts["kind"] or "model", parts["id"], parts.get("call")
        if call in ("preupload", "commit", "branch", "tag"):
            self.check_writes(name, user)
            return as_json(self.change(method, call, name, parts["revision"], body))
        if name in self.pushed and self.pushed[name].private and user is None:
            raise Refused(401, "RepoNotFound")
        commit = self.commit(kind, name, parts["revision"] or "main")
        files = self.files(kind, name, commit)
        if asked.re is FILE:
            if parts["path"] not in files:
                raise missing("EntryNotFound", commit)
            file = files[parts["path"]]
            return {"X-Repo-Commit": commit, "ETag": f'"{oid(file)}"'}, file.read_bytes()
        if call == "tree":
            found: Any = entries(files, parts["path"])
            if parts["path"] and not found:
                raise missing("EntryNotFound", commit)
        elif call == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            found = [entry for entry in entries(files) if entry["path"] in paths]
        elif parts["refs"]:
            found = {
                key: [{"name": ref, "ref": ref, "targetCommit": target} for ref, target in refs.items()]
                for key, refs in (("branches", self.pushed[name].branches), ("tags", self.pushed[name].tags))
            } | {"converts": []}
        else:
            private = name in self.pushed and self.pushed[name].private
            siblings = [{"rfilename": path} for path in files]
            found = {"id": name, "sha": commit, "private": private, "siblings": siblings}
        return as_json(found)

    def user(self, authorization: str | None) -> tuple[str, str] | None:
        """Whose token came with a request, and what it may do; None where none came."""
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401)
        return TOKENS[token]

    def check_writes(self, name: str, user: tuple[str, str] | None) -> None:
        if user is None:
            raise Refused(401)
        if user != (name.partition("/")[0], "write"):
            raise Refused(403)
        if name not in self.pushed:
            raise missing("RepoNotFound")

    def keep(self, content: bytes) -> Path:
        assert self.store is not None
        path = self.store / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path

    def create(self, asked: dict[str, Any], user: tuple[str, str] | None) -> Any:
        if user is None:
            raise Refused(401)
        if user != (asked["organization"], "write"):
            raise Refused(403)
        name = f"{asked['organization']}/{asked['name']}"
        made = {"url": f"{self.endpoint}/{name}", "id": name}
        if name in self.pushed:
            raise Refused(409, body=made | {"error": "You already created this model repo"})
        self.pushed[name] = Repository(asked.get("visibility") == "private")
        self.pushed[name].add("main", {".gitattributes": self.keep(b"*.safetensors filter=lfs\n")}, "initial commit")
        return made

    def batch(self, asked: dict[str, Any]) -> Any:
        """Where each content is to be sent; nowhere if it is here."""
        assert self.store is not None
        there = {path.name for path in self.store.iterdir()}
        objects = [
            one if one["oid"] in there else one | {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def change(self, method: str, call: str, name: str, revision: str, body: bytes) -> Any:
        """What changes a repository, or asks what is going to."""
        repository = self.pushed[name]
        if call == "preupload":
            files = repository.commits[repository.at(revision)]
            return {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": content_oid(one["path"], files[one["path"]]) if one["path"] in files else None,
                    }
                    for one in json.loads(body)["files"]
                ]
            }
        if call == "commit":
            return self.take(repository, name, revision, [json.loads(line) for line in body.splitlines()])
        refs = repository.branches if call == "branch" else repository.tags
        asked = json.loads(body or b"{}")
        if method == "DELETE":
            refs.pop(revision)
            return {}
        ref = revision if call == "branch" else asked["tag"]
        if ref in refs:
            raise Refused(409)
        refs[ref] = repository.at(asked.get("startingPoint") or "main" if call == "branch" else revision)
        return {}

    def take(self, repository: Repository, name: str, branch: str, lines: list[dict[str, Any]]) -> Any:
        """Makes a commit."""
        assert self.store is not None
        if branch not in repository.branches:
            raise missing("RevisionNotFound")
        files, message = dict(repository.commits[repository.at(branch)]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = self.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.store / value["oid"]
                if not files[value["path"]].is_file():
                    raise Refused(400, body={"error": f"{value['path']} was not sent"})
            else:
                assert line["key"] == "deletedFile"
                files.pop(value["path"])
        made = repository.add(branch, files, message)
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{made}", "commitOid": made}


def part_of(content: bytes, headers: dict[str, str], asked: str | None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer, of which a request may ask for a range of bytes."""
    if asked is None:
        return 200, headers, content
    first, last = asked.removeprefix("bytes=").split("-")
    if int(first) >= len(content):
        return 416, {}, b""
    part = content[int(first) : int(last) + 1 if last else None]
    return 206, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}, part


def as_json(content: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(content).encode()


def validated(card: str) -> Any:
    """What the hub says of the metadata of a card."""
    license = re.search(r"^license: (.*)$", card, re.MULTILINE)
    if license is None or license[1] not in LICENSES:
        named = license[1] if license else "none"
        raise Refused(400, body={"errors": [{"message": f'"license" can\'t be {named}'}], "warnings": []})
    return {"errors": [], "warnings": []}


def files_of(root: Path) -> Files:
    return {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}


def oid(file: Path) -> str:
    """The hash of a file as git has it."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_oid(path: str, file: Path) -> str:
    """The hash by which a client tells whether a file has changed."""
    return sha256(file) if path.endswith(LARGE) else oid(file)


def entries(files: Files, folder: str = "") -> list[dict[str, Any]]:
    """All files and folders below a folder, as the hub lists them."""
    listed = []
    for path, file in files.items():
        size = file.stat().st_size
        large = {"lfs": {"oid": sha256(file), "size": size, "pointerSize": 134}} if path.endswith(LARGE) else {}
        listed.append({"type": "file", "path": path, "size": size, "oid": oid(file), **large})
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    listed += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    return [entry for entry in listed if entry["path"].startswith(f"{folder}/" if folder else "")]


@contextmanager
def serving(repositories: Repositories, store: Path | None = None) -> Iterator[Hub]:
    """A hub that answers at its `endpoint` within the block, and at no time after it."""
    with Hub(repositories, store) as hub:
        Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
