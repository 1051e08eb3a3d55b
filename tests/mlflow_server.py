"""A stand-in for MLflow's tracking server: the requests of its REST protocol that a run makes, for one run."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Server:
    """Has at most one experiment with at most one run."""

    def __init__(self) -> None:
        self.url = ""
        self.run: dict[str, Any] = {}
        self.fault: tuple[int, str] | None = None
        """The status and the message of all answers, for a server that is in trouble."""

    def points(self, name: str) -> list[tuple[int, float]]:
        """The steps and values of a metric, in the order in which they came."""
        return [(point["step"], point["value"]) for point in self.run["metrics"] if point["key"] == name]

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.fault:
            return self.fault[0], {"error_code": "INTERNAL_ERROR", "message": self.fault[1]}
        match path.removeprefix("/api/2.0/mlflow/"):
            case "experiments/get-by-name":
                return 200, {"experiment": {"experiment_id": "1", "name": "lmlab", "lifecycle_stage": "active"}}
            case "runs/search":
                known = self.run and self.run["tags"]["lmlab.run_id"] in asked["filter"]
                return 200, {"runs": [self.described()] if known else []}
            case "runs/create":
                tags = {tag["key"]: tag["value"] for tag in asked["tags"]}
                self.run = {"status": "RUNNING", "tags": tags, "params": {}, "metrics": []}
                return 200, {"run": self.described()}
            case "runs/update":
                self.run["status"] = asked["status"]
                return 200, {"run_info": self.described()["info"]}
            case "runs/get":
                return 200, {"run": self.described()}
            case "runs/log-batch":
                for point in asked.get("metrics", []):
                    self.run["metrics"].append(point | {"step": int(point.get("step", 0))})
                self.run["params"] |= {one["key"]: one["value"] for one in asked.get("params", [])}
                return 200, {}
            case "metrics/get-history":
                return 200, {"metrics": [point for point in self.run["metrics"] if point["key"] == asked["metric_key"]]}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}

    def described(self) -> dict[str, Any]:
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": self.run["status"]}
        params = [{"key": key, "value": value} for key, value in self.run["params"].items()]
        latest = {point["key"]: point for point in self.run["metrics"]}
        return {"info": info, "data": {"params": params, "metrics": [*latest.values()]}}


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a port of its own until the end of the block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            self.reply({name: values[0] for name, values in query.items()})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, asked: dict[str, Any]) -> None:
            status, answer = server.answer(urlsplit(self.path).path, asked)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
