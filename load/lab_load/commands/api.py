"""HTTP API that starts, watches and stops one bounded run at a time. Each run is a process, so this one stays small.

| request | effect |
|---|---|
| GET /health | 200 |
| GET /workloads | the workloads, and the settings that a run may change |
| GET /runs | the finished runs, newest first, and the running one |
| POST /runs | start one: {"workload": "caching", "users": 8, "seconds": 30, …}; 409 while one runs |
| GET /runs/current | the running or the last run: state, progress lines, the end of its output |
| DELETE /runs/current | stop the run as Ctrl-C does: its report is written |
| GET /runs/NAME | summary.json |
| GET /runs/NAME/report.html and other FILES | the files |

With LOAD_ADMIN_KEY every request except /health needs `Authorization: Bearer`. Without it only callers on loopback are
answered; with LOAD_ALLOW_ANONYMOUS also others, if they use loopback's names, `load` or one of LOAD_ALLOWED_HOSTS.
Pages of other origins are refused.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from ..settings import Settings, complaint
from ..workloads.workload import WORKLOADS
from . import runs

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MOST_BODY = 64 * 1024
# Settings that a caller may change. Only the operator sets the target, the folder and the bounds.
CHANGEABLE = ("users", "seconds", "requests", "rate", "burstiness", "shape", "think_seconds", "warmup_seconds", "cache",
              "model", "prompt_words", "max_tokens", "prompts", "zipf_exponent", "prefix_groups", "ttl_seconds",
              "language", "seed", "salt")  # fmt: skip
FILES = {"report.html": "text/html; charset=utf-8", "summary.md": "text/markdown; charset=utf-8",
         "records.jsonl": "application/x-ndjson", "progress.jsonl": "application/x-ndjson"}  # fmt: skip
NAME = re.compile(r"[a-z]+(?:-[a-z]+)*-\d{8}-\d{6}")


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Runner:
    """Starts and stops runs, one at a time. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[str] | None = None
        self._asked: dict[str, Any] = {}
        self._began = 0.0
        self._output = ""
        self._name: str | None = None  # of the run's folder
        self._code: int | None = None

    def start(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Start a run with the requested settings. Raises ApiError: 400 for a wrong field, 409 while another run is
        going on."""
        workload = asked.get("workload")
        if workload not in WORKLOADS:
            raise ApiError(400, f"workload must be one of {', '.join(WORKLOADS)}")
        changed = {name: value for name, value in asked.items() if name != "workload"}
        if unknown := sorted(set(changed) - set(CHANGEABLE)):
            raise ApiError(400, f"{unknown[0]} is not a field; fields: {', '.join(CHANGEABLE)}")
        try:
            settings = Settings(**(self._settings.model_dump(exclude_unset=True) | changed))
            WORKLOADS[workload](replace(settings.workload_shape, requests=1))
        except ValidationError as error:
            raise ApiError(400, complaint(error)) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        with self._lock:
            if self._popen is not None and self._code is None:
                raise ApiError(409, "another run is going on: DELETE /runs/current stops it")
            try:
                popen = runs.start(workload, self._settings, **changed)
            except (OSError, ValueError) as error:
                raise ApiError(400, f"the run cannot be started: {error}") from None
            self._asked, self._began, self._output, self._code = asked, time.time(), "", None
            self._popen, self._name = popen, None
            threading.Thread(target=self._watch, args=(self._popen,), daemon=True).start()
        return self.current()

    def _watch(self, popen: subprocess.Popen[str]) -> None:
        assert popen.stdout is not None  # noqa: S101 start() gave it one
        for line in popen.stdout:
            if self._name is None and (found := re.search(NAME, line)):
                self._name = found[0]
            self._output = (self._output + line)[-20_000:]
        self._code = popen.wait()

    def current(self) -> dict[str, Any]:
        """The running or the last run. Raises ApiError 404 if none was started."""
        if self._popen is None:
            raise ApiError(404, "no run was started yet")
        progress = self._settings.runs_dir / self._name / "progress.jsonl" if self._name else None
        lines = progress.read_text("utf-8").splitlines() if progress and progress.exists() else []
        moments = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                moments.append(json.loads(line))
        return {"state": "running" if self._code is None else "ended", "code": self._code, "asked": self._asked,
                "began": self._began, "name": self._name, "progress": moments,
                "output": self._output}  # fmt: skip

    def stop(self) -> dict[str, Any]:
        """Ask the run to end. Raises ApiError 409 if none is going on."""
        if self._popen is None or self._code is not None:
            raise ApiError(409, "no run is going on")
        self._popen.send_signal(signal.SIGTERM)
        return self.current()

    def end(self) -> None:
        """Stop the run and wait for its report; called when the service ends."""
        if self._popen is not None and self._code is None:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(self._settings.drain_seconds + 10)
            self._popen.kill()


def finished(folder: Path) -> list[dict[str, Any]]:
    """The finished runs in a folder, newest first."""
    found = []
    for path in sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            result = json.loads(path.read_text("utf-8"))
            found.append({
                "name": result["name"], "started": result["started"], "users": result["users"], "loop": result["loop"],
                "trusted": result["trusted"], "sums_hold": result["sums"]["holds"],
                "workloads": {name: figures["workload"]["sha256"] for name, figures in result["results"].items()},
            })  # fmt: skip
        except (OSError, ValueError, KeyError):
            continue  # written by an earlier version
    return found


def handler(settings: Settings, runner: Runner) -> type[BaseHTTPRequestHandler]:
    """The request handler of this service."""
    pages: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("GET", "/workloads"): lambda _: {"workloads": list(WORKLOADS), "settings": list(CHANGEABLE)},
        ("GET", "/runs"): lambda _: {"runs": finished(settings.runs_dir)},
        ("POST", "/runs"): runner.start,
        ("GET", "/runs/current"): lambda _: runner.current(),
        ("DELETE", "/runs/current"): lambda _: runner.stop(),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *_: object) -> None:
            """Logs nothing: a page polls each second."""

        def answer(self) -> None:
            path = urlsplit(self.path).path
            try:
                if (self.command, path) == ("GET", "/health"):
                    self.close_connection = "content-length" in self.headers or "transfer-encoding" in self.headers
                    return self._send(200, b'{"status": "ok"}', "application/json")
                try:
                    self._guard()
                except ApiError:
                    self.close_connection = True  # its body is not read
                    raise
                body = self._body()
                if page := pages.get((self.command, path)):
                    return self._json(201 if self.command == "POST" else 200, page(body))
                self._file(path)
            except ApiError as error:
                self._json(error.status, {"error": {"message": str(error)}})

        def _guard(self) -> None:
            """Raises ApiError."""
            key = settings.admin_key
            origin, host = self.headers.get("origin"), self.headers.get("host", "")
            if origin and urlsplit(origin).netloc != host:
                raise ApiError(403, "pages of another origin are refused")
            if key is not None:
                given = self.headers.get("authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
                    raise ApiError(401, "send the key LOAD_ADMIN_KEY: Authorization: Bearer …")
                return
            if self.client_address[0] not in LOOPBACK and not settings.allow_anonymous:
                raise ApiError(403, "only callers on loopback are answered, because LOAD_ADMIN_KEY is not set")
            name = (urlsplit(f"//{host}").hostname or "").lower()
            allowed = LOOPBACK | {"load"} | set(settings.allowed_hosts)
            if name not in allowed and "*" not in allowed:
                raise ApiError(403, f"{name} is not one of this service's host names; LOAD_ALLOWED_HOSTS adds names")

        def _body(self) -> Any:
            """Raises ApiError."""
            if "transfer-encoding" in self.headers:
                self.close_connection = True
                raise ApiError(411, "send content-length")
            text = self.headers.get("content-length") or "0"
            if not text.isdecimal() or int(text) > MOST_BODY:
                self.close_connection = True
                raise ApiError(413, f"the body has more than {MOST_BODY} bytes")
            raw = self.rfile.read(int(text))
            if self.command != "POST":
                return None
            if self.headers.get_content_type() != "application/json":
                raise ApiError(415, "send application/json")  # an HTML form of another page cannot
            try:
                body = json.loads(raw)
            except ValueError:
                raise ApiError(400, "the body is not JSON") from None
            if not isinstance(body, dict):
                raise ApiError(400, "the body is not a JSON object")
            return body

        def _file(self, path: str) -> None:
            """Raises ApiError."""
            parts = path.strip("/").split("/")
            file = parts[2] if len(parts) == 3 else "summary.json"
            if parts[0] != "runs" or len(parts) not in {2, 3} or not NAME.fullmatch(parts[1]) or (
                len(parts) == 3 and file not in FILES
            ):  # fmt: skip
                raise ApiError(404, f"{self.command} {path[:200]} is not part of this API")
            try:
                content = (settings.runs_dir / parts[1] / file).read_bytes()
            except OSError:
                raise ApiError(404, f"run {parts[1]} does not exist or has no {file}") from None
            self._send(200, content, FILES.get(file, "application/json"))

        def _json(self, status: int, found: Any) -> None:
            self._send(status, json.dumps(found).encode(), "application/json")

        def _send(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.send_header("cache-control", "no-store")
            if self.close_connection:  # otherwise the client may use it again just as it ends
                self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(content)

    for method in ("GET", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)
    return Handler


def main(settings: Settings, arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C, then stop a run that is going on. Raises ValueError for a wrong setting."""
    if arguments:
        raise ValueError("api takes no arguments")
    if settings.admin_key is None and settings.web_host not in LOOPBACK and not settings.allow_anonymous:
        raise ValueError(
            f"LOAD_WEB_HOST={settings.web_host} is not loopback: set LOAD_ADMIN_KEY, or LOAD_ALLOW_ANONYMOUS=true "
            "where something else guards the port"
        )
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    runner = Runner(settings)
    server = ThreadingHTTPServer((settings.web_host, settings.api_port), handler(settings, runner))
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    sys.stdout.write(f"load: API at http://{settings.web_host}:{settings.api_port}\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        runner.end()
    return 0
