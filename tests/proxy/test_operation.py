"""The proxy in operation: files that change, several workers, an end that callers hardly notice, metrics and spans."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from fixtures_proxy import CHAT_MODEL, UPSTREAM_KEY, Bench, events, eventually, new, second, state
from lab_proxy.reload import LOOK_SECONDS, Reloader
from lab_proxy.telemetry.metrics import SHARE_SECONDS, Metrics
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from test_upstream import PACKAGED, routes_file

NOTICED = LOOK_SECONDS + 1.5  # seconds until a changed file is in use


def alias(name: str) -> dict[str, Any]:
    return {"aliases": [{"name": name, "model": CHAT_MODEL}]}


def number(page: str, start: str) -> float:
    """The sum of the samples whose line begins with `start`."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(start))


# ---- files that change


def test_a_changed_routes_file_is_in_use_within_seconds(bench: Bench, tmp_path: Path) -> None:
    """By its time, without a signal; what was decided about the same bytes before is decided anew."""
    file = routes_file(tmp_path, **alias("one"))
    with second(bench, tmp_path, routes_file=str(file)) as other:
        text = new()
        assert other.chat(text, model="one").status_code == 200
        assert state(other.chat(text, model="one")) == "hit"
        routes_file(tmp_path, **alias("two"))
        eventually(lambda: other.chat(text, model="two").status_code == 200, NOTICED)
        assert other.chat(text, model="one").status_code == 404
        told = other.http.get("/status").json()["proxy"]["files"]["routes"]
        assert told["generation"] == 2
        assert "trouble" not in told


def test_sighup_reads_the_files_again(bench: Bench, tmp_path: Path) -> None:
    """A key that was rotated in its file counts from then on; the process lives."""
    key = tmp_path / "key"
    key.write_text("sk-old")
    base = f"{bench.paid.url}/v1"
    with second(bench, tmp_path, paid="", openai_api_key_file=str(key), openai_base_url=base) as other:
        assert other.chat().status_code == 200
        assert bench.calls()["last"]["headers"]["authorization"] == "Bearer sk-old"
        before = key.stat()
        key.write_text("sk-new")
        os.utime(key, ns=(before.st_atime_ns, before.st_mtime_ns))  # looks as it did: only the signal tells
        other.proxy.popen.send_signal(signal.SIGHUP)
        eventually(lambda: "read anew" in other.proxy.log.read_text(), 2)
        assert other.chat().status_code == 200
        assert bench.calls()["last"]["headers"]["authorization"] == "Bearer sk-new"
        assert "sk-new" not in other.proxy.log.read_text()


@pytest.mark.parametrize("wrong", ["upstreams: [", "upstreams: {}\nroutes: []\n", "", None])
def test_a_wrong_file_keeps_the_old_one_and_says_so(bench: Bench, tmp_path: Path, wrong: str | None) -> None:
    """In the log, on /status and in a metric; when it is mended it is in use, and the trouble is gone."""
    file = routes_file(tmp_path, **alias("one"))
    with second(bench, tmp_path, routes_file=str(file)) as other:
        if wrong is None:
            file.unlink()
        else:
            file.write_text(wrong)
        files = lambda: other.http.get("/status").json()["proxy"]["files"]["routes"]  # noqa: E731 - asked twice
        eventually(lambda: "trouble" in files(), NOTICED)
        assert files()["trouble"].startswith("PROXY_ROUTES_FILE")
        assert files()["generation"] == 1
        assert 'lab_proxy_reload_failing{file="routes"} 1.0' in other.http.get("/metrics").text
        assert "the one before it stays in use" in other.proxy.log.read_text()
        assert other.chat(model="one").status_code == 200
        routes_file(tmp_path, **alias("two"))
        eventually(lambda: "trouble" not in files(), NOTICED)
        assert other.chat(model="two").status_code == 200
        page = other.http.get("/metrics").text
        assert 'lab_proxy_reload_failing{file="routes"} 0.0' in page
        assert 'lab_proxy_reloads_total{file="routes",outcome="refused"} 1.0' in page


def test_requests_in_flight_keep_their_table(bench: Bench, tmp_path: Path) -> None:
    """A stream goes on although its upstream is no longer in the file; the next request is told so."""
    table = yaml.safe_load(PACKAGED.read_text())
    table["upstreams"]["extra"] = {"kind": "openai", "base_url": f"{bench.paid.url}/v1", "keyless": True}
    table["routes"].append({"upstream": "extra", "match": ["extra-*"]})
    with second(bench, tmp_path, routes_file=str(routes_file(tmp_path, **table))) as other:
        got: list[httpx2.Response] = []
        bench.control(bench.paid, held=True)
        asking = threading.Thread(target=lambda: got.append(other.chat(model="extra-mock-slow", stream=True)))
        asking.start()
        eventually(lambda: bench.calls()["total"] == 1, 10)
        routes_file(tmp_path)
        other.proxy.popen.send_signal(signal.SIGHUP)
        with httpx2.Client(base_url=other.proxy.url) as http:
            beside = Bench(other.proxy, bench.paid, bench.model, bench.redis, http)
            eventually(lambda: beside.chat(model="extra-mock").status_code == 404, 2)
        assert asking.is_alive()
        bench.control(bench.paid, held=False)
        asking.join(10)
        assert events(got[0])[-1] == "[DONE]"


def test_prices_are_read_anew(bench: Bench, tmp_path: Path) -> None:
    """The price table is watched like the routes."""
    packaged = PACKAGED.with_name("prices.yaml").read_text()
    file = tmp_path / "prices.yaml"
    file.write_text(packaged)
    with second(bench, tmp_path, prices_file=str(file)) as other:
        file.write_text(packaged + "\n# seen\n")
        files = lambda: other.http.get("/status").json()["proxy"]["files"]["prices"]  # noqa: E731 - asked twice
        eventually(lambda: files()["generation"] == 2, NOTICED)
        file.write_text("prices: 3")
        eventually(lambda: "trouble" in files(), NOTICED)


async def test_what_fails_to_read_is_not_read_twice(tmp_path: Path) -> None:
    """A file that stays wrong is complained of once, not every second."""
    file = tmp_path / "file"
    file.write_text("1")
    read: list[str] = []

    class Reader:
        def files(self) -> list[Path]:
            return [file]

        def reload(self) -> None:
            read.append(file.read_text())
            if read[-1] != "1":
                raise ValueError("no good")

    watch = Reloader({"reader": Reader()}, Metrics())
    file.write_text("22")
    watch._look()
    watch._look()
    assert read == ["22"]
    file.write_text("1")
    watch._look()
    assert read == ["22", "1"]
    assert "trouble" not in watch.report()["reader"]


# ---- workers


@contextlib.contextmanager
def workers(bench: Bench, tmp_path: Path, count: int = 2, **settings: str) -> Iterator[Bench]:
    with second(bench, tmp_path, workers=str(count), **settings) as other:
        eventually(lambda: len(listening(other)) == count, 10)
        yield other


def listening(bench: Bench) -> list[psutil.Process]:
    """The workers that listen on the proxy's port."""
    found = []
    for child in psutil.Process(bench.proxy.popen.pid).children():
        with contextlib.suppress(psutil.Error):
            at = [each for each in child.net_connections() if each.status == "LISTEN"]
            found += [child] if any(each.laddr.port == bench.proxy.port for each in at) else []
    return found


def apart(bench: Bench, path: str = "/health") -> httpx2.Response:
    """An answer over a connection of its own: any worker may give it."""
    return httpx2.get(bench.proxy.url + path)


def test_workers_share_a_port_a_cache_and_their_numbers(bench: Bench, tmp_path: Path) -> None:
    """What one stored is another's hit; /metrics and /status of any of them tell of all."""
    with workers(bench, tmp_path) as other:
        text = new()
        body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
        for _ in range(24):
            with httpx2.Client(base_url=other.proxy.url) as http:
                assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert bench.calls()["total"] == 1
        line = 'lab_proxy_requests_total{cache="hit",model="gpt-mock",route="/v1/chat/completions"'
        eventually(lambda: number(apart(other, "/metrics").text, line) == 23, 3)
        time.sleep(2 * SHARE_SECONDS)  # one has told of all: the others may still have what they last read of it
        for _ in range(6):
            assert number(apart(other, "/metrics").text, line) == 23
            assert apart(other, "/status").json()["cache"]["hits"] == 23
        eventually(lambda: min(child.cpu_times().user for child in listening(other)) > 0, 2)


def test_a_worker_that_dies_is_replaced(bench: Bench, tmp_path: Path) -> None:
    """The others go on, a new one comes, and what the dead one had counted stays counted."""
    with workers(bench, tmp_path) as other:
        for _ in range(12):
            apart(other)
        line = 'lab_proxy_requests_total{cache="",model="",route="/health"'
        eventually(lambda: number(apart(other, "/metrics").text, line) >= 12, 3)
        time.sleep(2 * SHARE_SECONDS)  # the one that told of all may be the one that ends, and not have shared it yet
        before = listening(other)
        before[0].kill()
        eventually(lambda: len(listening(other)) == 2 and before[0] not in listening(other), 10)
        assert "died with -9" in other.proxy.log.read_text()
        assert number(apart(other, "/metrics").text, line) >= 12
        for _ in range(12):
            assert apart(other).status_code == 200


def test_workers_end_together(bench: Bench, tmp_path: Path) -> None:
    """SIGTERM to the parent: streams of all end with [DONE], then it ends with 0 and leaves nothing behind."""
    with workers(bench, tmp_path) as other:
        got: list[httpx2.Response] = []
        body = {"model": "gpt-mock-slow", "messages": [{"role": "user", "content": "x"}], "stream": True}

        def ask() -> None:
            got.append(httpx2.post(f"{other.proxy.url}/v1/chat/completions", json=body, timeout=20))

        asking = [threading.Thread(target=ask) for _ in range(6)]
        for each in asking:
            each.start()
        eventually(lambda: bench.calls()["total"] == 6, 5)
        left = listening(other)
        other.proxy.popen.send_signal(signal.SIGTERM)
        for each in asking:
            each.join(10)
        assert [events(answer)[-1] for answer in got] == ["[DONE]"] * 6
        assert other.proxy.popen.wait(10) == 0
        assert not any(child.is_running() for child in left)


def test_sighup_reaches_every_worker(bench: Bench, tmp_path: Path) -> None:
    file = routes_file(tmp_path, **alias("one"))
    with workers(bench, tmp_path, routes_file=str(file)) as other:
        other.proxy.popen.send_signal(signal.SIGHUP)
        eventually(lambda: other.proxy.log.read_text().count("routes: read anew") == 2, 3)


def test_workers_do_not_outlive_their_parent(bench: Bench, tmp_path: Path) -> None:
    with workers(bench, tmp_path) as other:
        left = listening(other)
        other.proxy.popen.kill()
        eventually(lambda: not any(child.is_running() for child in left), 10)


def test_a_worker_that_hangs_is_killed(bench: Bench, tmp_path: Path) -> None:
    """Beyond the drain's bound and a grace the parent waits for nobody, and its exit code says so."""
    with workers(bench, tmp_path, drain_timeout_seconds="0") as other:
        stopped = listening(other)[0]
        stopped.suspend()
        other.proxy.popen.send_signal(signal.SIGTERM)
        assert other.proxy.popen.wait(15) == 1
        assert not stopped.is_running()


# ---- the end


def test_drain_closes_idle_connections_and_refuses_late_work(bench: Bench, tmp_path: Path) -> None:
    """While a stream ends: an idle connection is closed, a new one gets 503 and `connection: close`, pages for those
    who watch go on answering."""
    with second(bench, tmp_path) as other, socket.create_connection(("127.0.0.1", other.proxy.port), 5) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += idle.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        got: list[httpx2.Response] = []
        bench.control(bench.paid, held=True)
        asking = threading.Thread(target=lambda: got.append(other.chat(model="gpt-mock-slow", stream=True)))
        asking.start()
        eventually(lambda: bench.calls()["total"] == 1, 10)
        other.proxy.popen.send_signal(signal.SIGTERM)
        idle.settimeout(2)
        assert idle.recv(1000) == b""
        for path, status in (("/v1/models", 503), ("/ready", 503), ("/health", 200), ("/metrics", 200)):
            page = httpx2.get(other.proxy.url + path)
            assert page.status_code == status
            assert page.headers["connection"] == "close"
        assert "lab_proxy_draining 1.0" in httpx2.get(f"{other.proxy.url}/metrics").text
        bench.control(bench.paid, held=False)
        asking.join(10)
        assert events(got[0])[-1] == "[DONE]"
        assert other.proxy.popen.wait(5) == 0


# ---- metrics


def test_metrics_tell_of_times_and_states(bench: Bench) -> None:
    """The upstream's time apart from the proxy's own; redis, breakers, the end, and the files that are in use."""
    bench.control(delay=0.2)
    answer = bench.chat(model=CHAT_MODEL)
    assert answer.status_code == 200
    bench.control(delay=0)
    page = bench.http.get("/metrics").text
    labels = f'{{cache="miss",model="{CHAT_MODEL}",route="/v1/chat/completions"}}'
    count = number(page, f"lab_proxy_upstream_seconds_count{labels}")
    assert count >= 1
    assert number(page, f"lab_proxy_upstream_seconds_sum{labels}") >= 0.2
    own = number(page, f"lab_proxy_overhead_seconds_sum{labels}")
    assert 0 < own < 0.2 * count
    assert "lab_proxy_redis_up 1.0" in page
    assert f'lab_proxy_breaker_open{{upstream="model/{CHAT_MODEL}"}} 0.0' in page
    assert "lab_proxy_draining 0.0" in page
    assert 'lab_proxy_generation{file="routes"} 1.0' in page


def test_exemplars_carry_request_ids(bench: Bench) -> None:
    """For who accepts OpenMetrics: each bucket names the request that fell into it last."""
    answer = bench.chat(headers={"x-request-id": "exemplary-1"})
    assert answer.status_code == 200
    plain = bench.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "exemplary-1" not in plain.text
    page = bench.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    found = [
        sample.exemplar
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels["request_id"] == "exemplary-1"
    ]
    assert found
    assert 0 < found[0].value < 5


def test_numbers_of_several_processes_add_up(tmp_path: Path) -> None:
    """Counters and histograms are summed, also those of a process that ended; its gauges go with it."""
    each = [Metrics(tmp_path) for _ in range(3)]
    for place, metrics in enumerate(each):
        metrics._name = f"{place}.json"
        metrics.count("upstream_calls", "openai", "ok", by=place + 1)
        metrics.time("redis", "read", seconds=0.01)
        metrics.watch(lambda place=place: {"breaker_open": {("openai",): float(place == 2)}})  # type: ignore[misc]
        metrics.share(ended=place == 2)
    (tmp_path / "half.json").write_bytes(b'{"counts": ')
    page = each[0].page()[0].decode()
    assert 'lab_proxy_upstream_calls_total{outcome="ok",upstream="openai"} 6.0' in page
    assert 'lab_proxy_redis_seconds_count{operation="read"} 3.0' in page
    assert 'lab_proxy_breaker_open{upstream="openai"} 0.0' in page
    assert not list(tmp_path.glob(".*"))


# ---- spans


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP/HTTP receiver: its URL, and the spans that came in."""
    got: list[Any] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
            asked = ExportTraceServiceRequest.FromString(raw)
            for resource in asked.resource_spans:
                got.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_spans_tell_of_a_request_and_its_calls(bench: Bench, tmp_path: Path) -> None:
    """GenAI attributes; a retry is a span of its own below the request's; nothing that was asked, answered or a key."""
    secret = new()
    with collector() as (url, spans):
        with second(bench, tmp_path, otlp_endpoint=url) as other:
            bench.control(bench.paid, script=[503])
            request_id = other.chat(secret).headers["x-request-id"]
            other.chat(secret)
            other.chat(model="gpt-mock-401")
        eventually(lambda: len(spans) == 6, 5)  # at the end, at the latest, all are sent
        roots = [span for span in spans if not span.parent_span_id]
        miss, hit, refused = sorted(roots, key=lambda span: span.start_time_unix_nano)
        told = said(miss)
        assert miss.name == "chat gpt-mock"
        assert told["gen_ai.operation.name"] == "chat"
        assert told["gen_ai.provider.name"] == "openai"
        assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "gpt-mock"
        assert told["gen_ai.usage.input_tokens"] == 2
        assert told["gen_ai.usage.output_tokens"] > 0
        assert told["lab.request_id"] == request_id
        below = [said(span) for span in spans if span.parent_span_id == miss.span_id]
        assert sorted(each["lab.outcome"] for each in below) == ["failed", "ok"]
        assert (said(hit)["lab.cache"], [s for s in spans if s.parent_span_id == hit.span_id]) == ("hit", [])
        assert said(refused)["error.type"] == "upstream_key_refused"
        everything = str(spans)
        for hidden in (secret, UPSTREAM_KEY, "You said"):
            assert hidden not in everything


def test_a_collector_that_is_away_costs_nothing(bench: Bench, tmp_path: Path) -> None:
    with second(bench, tmp_path, otlp_endpoint="http://127.0.0.1:9") as other:
        assert other.chat().status_code == 200
        started = time.perf_counter()
        other.proxy.popen.send_signal(signal.SIGTERM)
        assert other.proxy.popen.wait(20) == 0
        assert time.perf_counter() - started < 15
        assert not re.search(r"question [0-9a-f]{8}", other.proxy.log.read_text())
