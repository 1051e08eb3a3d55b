"""A Hugging Face hub on this machine: as much of its protocol as its own clients need to load from it."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[str, dict[str, Path]]
"""Directories by kind, `model` or `dataset`, and id, such as `me/tiny-gpt2`."""

FILE = re.compile(r"/(?:(?P<kind>dataset)s/)?(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<id>.+?)"
    r"(?:/(?P<call>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


class Missing(Exception):  # noqa: N818
    """What is asked for is not here; carries the hub's own word for it."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Hub"

    def do_GET(self) -> None:
        url = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {url}")
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        try:
            headers, body = self.server.answer(url, form.get("paths", []))
            status = 200
        except Missing as missing:
            code, *commit = missing.args
            headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit[0]} if commit else {})
            status, body = 404, b""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """The hub keeps its own list of requests."""


class Hub(ThreadingHTTPServer):
    """Serves directories as repositories, each with one commit, which is the branch `main`."""

    def __init__(self, repositories: Repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        """What was asked for, as `METHOD /path`, without the query."""

    def commit(self, kind: str, name: str) -> str:
        """The commit of a repository: a hash of its files."""
        files = self.files(kind, name)
        return hashlib.sha1("".join(f"{path} {oid(file)}" for path, file in files.items()).encode()).hexdigest()

    def files(self, kind: str, name: str) -> dict[str, Path]:
        if name not in self.repositories[kind]:
            raise Missing("RepoNotFound")
        root = self.repositories[kind][name]
        return {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}

    def answer(self, url: str, paths: list[str]) -> tuple[dict[str, str], bytes]:
        """Headers and body for a URL; `paths` are those asked about in the body of a `paths-info` request."""
        asked = API.fullmatch(url) or FILE.fullmatch(url)
        if asked is None:
            raise Missing("EntryNotFound")
        parts = {part: unquote(text) for part, text in asked.groupdict(default="").items()}
        kind, name = parts["kind"] or "model", parts["id"]
        files, commit = self.files(kind, name), self.commit(kind, name)
        if parts["revision"] not in ("", "main", commit):
            raise Missing("RevisionNotFound")
        if asked.re is FILE:
            if parts["path"] not in files:
                raise Missing("EntryNotFound", commit)
            file = files[parts["path"]]
            return {"X-Repo-Commit": commit, "ETag": f'"{oid(file)}"'}, file.read_bytes()
        if parts["call"] == "tree":
            found: Any = entries(files, parts["path"])
            if parts["path"] and not found:
                raise Missing("EntryNotFound", commit)
        elif parts["call"] == "paths-info":
            found = [entry for entry in entries(files) if entry["path"] in paths]
        else:
            found = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return {"Content-Type": "application/json"}, json.dumps(found).encode()


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def entries(files: dict[str, Path], folder: str = "") -> list[dict[str, Any]]:
    """All files and folders below a folder, as the hub lists them."""
    listed = [
        {"type": "file", "path": path, "size": file.stat().st_size, "oid": oid(file)} for path, file in files.items()
    ]
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    listed += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    return [entry for entry in listed if entry["path"].startswith(f"{folder}/" if folder else "")]


@contextmanager
def serving(repositories: Repositories) -> Iterator[Hub]:
    """A hub that answers at its `endpoint` within the block, and at no time after it."""
    with Hub(repositories) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
