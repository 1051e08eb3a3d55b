"""A W&B backend on this machine: as much of its protocol as its own client needs for runs, artifacts and pages."""

import base64
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

KEY = "0123456789" * 4
STREAM = re.compile(r"/files/(?P<entity>[^/]+)/(?P<project>[^/]+)/(?P<run>[^/]+)/file_stream")
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|\.\.\.|[_A-Za-z]\w*|[{}()\[\]:!$@=,|&-]|[\d.]+')

Selection = dict[str, Any]
"""What a GraphQL query asks for: (field's name, what is asked for within it), by the name it is to have."""


@dataclass
class Run:
    """A run as far as the backend knows it."""

    name: str
    project: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """The last value of each variable of `UpsertBucket`: config, groupName, tags, sweep and so on."""
    lines: list[str] = field(default_factory=list)
    """The lines of its history."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """The lines of other files that it streams: summary, events, output."""
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.files.get("wandb-summary.json") or ["{}"])[-1])

    @property
    def config(self) -> dict[str, Any]:
        return {key: value["value"] for key, value in json.loads(self.facts["config"]).items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Backend"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path).path
        with self.server.lock:
            self.server.requests.append(f"{self.command} {url}")
            status, answer = self.server.answer(url, body, self.headers.get("Authorization", ""))
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """The backend keeps its own list of requests."""


class Backend(ThreadingHTTPServer):
    """A server that keeps what clients with the key send."""

    daemon_threads = True

    def __init__(self, key: str = KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.key, self.lock = key, Lock()
        self.out_of_order = False
        """Whether every request is answered by 500."""
        self.faults: list[BaseException | None] = []
        self.project = "lmlab"
        """The name of a project that is there already."""
        self.requests: list[str] = []
        self.operations: list[str] = []
        """Names of the GraphQL operations asked for."""
        self.runs: dict[str, Run] = {}
        self.artifacts: list[dict[str, Any]] = []
        """Variables of `CreateArtifact`, in the order of their ids `artifact0`, `artifact1`, …"""
        self.used: list[tuple[str, str]] = []
        """Pairs of a run and the id of an artifact that it used."""
        self.views: list[dict[str, Any]] = []
        """Variables of workspaces and reports that were made."""
        self.files: dict[str, bytes] = {}
        """The content of uploaded files, by their paths."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has ended leaves its connections open; anything else is a fault of this backend."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.faults.append(error)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a client that talks to this backend."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key, "WANDB_MODE": "online"}

    def answer(self, url: str, body: bytes, authorization: str) -> tuple[int, Any]:
        """Returns the status and the content of the answer to a request."""
        if self.out_of_order:
            return 500, {"error": "out of order"}
        if url.startswith("/upload/"):
            self.files[unquote(url.removeprefix("/upload/"))] = body
            return 200, {}
        if url.startswith("/sdk/otel/"):  # how the client itself fares
            return 200, {}
        given = base64.b64decode(authorization.removeprefix("Basic ") or b"").decode().partition(":")[2]
        if given != self.key:
            return 401, {"errors": [{"message": "user is not logged in"}]}
        stream = STREAM.fullmatch(url)
        if stream:
            self.stream(stream["run"], json.loads(body))
            return 200, {}
        if url == "/graphql":
            asked = json.loads(body)
            query, variables = asked["query"], asked.get("variables") or {}
            return 200, {"data": self.object(parsed(query), self.resolve(query, variables))}
        return 404, {}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, chunk in sent.get("files", {}).items():
            lines = run.lines if file == "wandb-history.jsonl" else run.files.setdefault(file, [])
            lines[chunk["offset"] :] = chunk["content"]
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def resolve(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Carries out a GraphQL operation, and returns the values of the fields that it may ask for, by their names."""
        operation = next(iter(re.findall(r"(?:query|mutation)\s+(\w+)", query)), "")
        self.operations.append(operation)
        known: dict[str, Any] = {
            "entity": {"name": "me"},
            "viewer": {"id": "me", "entity": "me", "username": "me", "email": "me@here", "teams": {"edges": []}},
            "project": {"id": "project", "name": variables.get("project") or variables.get("projectName") or "lmlab"},
            "max_cli_version": None,
        }
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Run(variables["name"]))
            known["inserted"] = not run.facts
            run.project = variables.get("project") or run.project
            run.facts |= {name: value for name, value in variables.items() if value is not None}
            known["bucket"] = self.bucket(run)
        elif operation == "RunResumeStatus":
            found = self.runs.get(variables["name"])
            known["model"] = {"bucket": self.bucket(found) if found else None}
        elif operation == "CreateArtifact":
            given = variables.get("input", variables)
            self.artifacts.append(given)
            known["artifact"] = {"id": f"artifact{len(self.artifacts) - 1}", "state": "PENDING"}
            known["artifactSequence"] = {"id": "sequence", "latestArtifact": None}
        elif operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            place = f"{variables.get('artifactID', variables.get('artifactManifestID'))}/manifest"
            known["artifactManifest"] = {"id": place, "file": self.upload(place)}
        elif operation == "CreateArtifactFiles":
            wanted = variables["input"]["artifactFiles"]
            nodes = [
                {**self.upload(f"{f['artifactID']}/{f['name']}"), "artifact": {"id": f["artifactID"]}} for f in wanted
            ]
            known["files"] = {"edges": [{"node": node} for node in nodes]}
        elif operation == "CreateRunFiles":
            known["files"] = [{"name": n, **self.upload(f"{variables['run']}/{n}")} for n in variables["files"]]
        elif operation == "UseArtifact":
            given = variables.get("input", variables)
            self.used.append((given["runName"], given["artifactID"]))
        elif operation in ("UpsertView2", "upsertView"):
            self.views.append(variables)
            kept = ("name", "displayName", "description", "type", "spec")
            project = {"id": "project", "name": variables["projectName"], "entityName": variables["entityName"]}
            known["view"] = {"id": f"view{len(self.views)}", "project": project, "updatedAt": "2020-01-01T00:00:00Z"}
            known["view"] |= {name: variables.get(name) for name in kept}
        elif operation == "GetProjects":
            node = {"__typename": "Project", "name": self.project, "entityName": "me", "user": None}
            node |= {"id": "project", "createdAt": "2020-01-01T00:00:00Z", "isBenchmark": False}
            page = {"__typename": "PageInfo", "hasNextPage": False, "endCursor": None}
            known["models"] = {"edges": [{"node": node}], "pageInfo": page}
        elif operation == "ProjectInternalId":
            known["internalId"] = "1"
        elif operation == "ServerFeaturesQuery":
            known["features"] = []
        elif operation == "ArtifactType":  # of the artifacts of that name, before one is made
            known["artifact"] = None
        elif operation == "CommitArtifact":
            known["artifact"] = {"id": variables["artifactID"], "digest": "x"}
        return known

    def upload(self, place: str) -> dict[str, Any]:
        to = {"storagePath": place, "uploadUrl": f"{self.url}/upload/{place}", "uploadHeaders": []}
        return {**to, "uploadMultipartUrls": None}

    def bucket(self, run: Run) -> dict[str, Any]:
        """Returns a run as the client is told of it."""
        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.facts.get("displayName") or run.name,
            "config": run.facts.get("config", "{}"),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.lines),
            "historyTail": json.dumps(run.lines[-1:]),
            "eventsLineCount": len(run.files.get("wandb-events.jsonl", [])),
            "eventsTail": json.dumps(run.files.get("wandb-events.jsonl", [])[-1:]),
            "logLineCount": len(run.files.get("output.log", [])),
            "wandbConfig": json.dumps({"t": run.config["_wandb"]["t"]}),  # the client's sign that a run has begun
            "tags": run.facts.get("tags"),
            "sweepName": run.facts.get("sweep"),
            "project": {"id": "project", "name": run.project, "entity": {"name": "me"}},
        }

    def object(self, asked: Selection, known: dict[str, Any], value: Any = None) -> Any:
        """Returns the fields asked for: those of `value`, or else the `known` ones of that name."""
        if isinstance(value, list):
            return [self.object(asked, known, item) for item in value]
        answer = {}
        for shown, (name, within) in asked.items():
            has = isinstance(value, dict) and name in value
            found = value[name] if has else known.get(name)
            missing = found is None and (has or name in known)
            answer[shown] = found if not within or missing else self.object(within, known, found)
        return answer


def parsed(query: str) -> Selection:
    """Returns the fields that the operation of a GraphQL document asks for, with those of its fragments."""
    tokens = TOKENS.findall(re.sub(r"#.*", "", query))
    fragments: dict[str, Selection] = {}
    place = 0

    def skip(opening: str, closing: str) -> None:
        nonlocal place
        depth = 0
        while True:
            depth += (tokens[place] == opening) - (tokens[place] == closing)
            place += 1
            if not depth:
                return

    def selection() -> Selection:
        nonlocal place
        found: Selection = {}
        place += 1
        while tokens[place] != "}":
            if tokens[place] == "...":
                if tokens[place + 1] in ("on", "{"):
                    place += 1 if tokens[place + 1] == "{" else 3
                    found |= selection()
                else:
                    found[f"...{tokens[place + 1]}"] = None
                    place += 2
                continue
            shown = name = tokens[place]
            place += 1
            if tokens[place] == ":":
                name = tokens[place + 1]
                place += 2
            if tokens[place] == "(":
                skip("(", ")")
            while tokens[place] == "@":
                place += 2
                if tokens[place] == "(":
                    skip("(", ")")
            found[shown] = (name, selection() if tokens[place] == "{" else {})
        place += 1
        return found

    operation: Selection = {}
    while place < len(tokens):
        kind, name = tokens[place], tokens[place + 1] if place + 1 < len(tokens) else ""
        if kind != "{":
            while tokens[place] != "{":
                if tokens[place] == "(":
                    skip("(", ")")
                else:
                    place += 1
        found = selection()
        if kind == "fragment":
            fragments[name] = found
        else:
            operation |= found

    def filled(asked: Selection) -> Selection:
        whole: Selection = {}
        for shown, entry in asked.items():
            if entry is None:
                whole |= filled(fragments[shown.removeprefix("...")])
            else:
                whole[shown] = (entry[0], filled(entry[1]))
        return whole

    return filled(operation)


@contextmanager
def serving(key: str = KEY) -> Iterator[Backend]:
    """Runs a backend, which answers at its `url` inside the block and at no time after it."""
    with Backend(key) as backend:
        Thread(target=backend.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield backend
        finally:
            backend.shutdown()
