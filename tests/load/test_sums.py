"""Runs before the real proxy, a real redis and a mock upstream: the sums agree, and planted lies turn the exit code.

The lies are those of a shim between the generator and the proxy.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fixtures_load import LONG, NOT_TRUSTED, load
from fixtures_proxy import Bench, bench_on

SUMS_DIFFER, FAILED = 4, 1
Lie = Callable[[str, bytes, bytes], bytes]  # path, request body, answer -> answer that the client gets


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


@contextmanager
def shim(proxy: str, lie: Lie) -> Iterator[str]:
    """Passes everything on and lets `lie` change answers."""
    address = proxy.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            connection = http.client.HTTPConnection(address, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = lie(self.path, body, answer.read())
            self.send_response(answer.status)
            for name in ("content-type", "cache-status"):
                if value := answer.headers.get(name):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_POST = forward  # noqa: N815 http.server's names

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Lies:
    """Each is a shim's `lie`."""

    def __init__(self) -> None:
        self.answers = 0
        self.metrics = self.pages = 0

    def truth(self, _: str, __: bytes, answer: bytes) -> bytes:
        return answer

    def drops_usage(self, path: str, _: bytes, answer: bytes) -> bytes:
        """One answer of many has no usage."""
        self.answers += path.endswith("completions")
        if path.endswith("completions") and self.answers == 7:
            return re.sub(rb'data: [^\n]*"usage":\{[^\n]*\n\n', b"", answer)
        return answer

    def adds_a_token(self, path: str, _: bytes, answer: bytes) -> bytes:
        self.answers += path.endswith("completions")
        if path.endswith("completions") and self.answers == 7:
            return re.sub(rb'"completion_tokens":(\d+)', lambda m: b'"completion_tokens":%d' % (int(m[1]) + 1), answer)
        return answer

    def loses_a_charge(self, path: str, _: bytes, answer: bytes) -> bytes:
        """The ledger lacks one request of the run."""
        if path != "/usage":
            return answer
        self.pages += 1
        page = json.loads(answer)
        page["total"]["requests"] = page["total"]["requests"] - (self.pages > 1)
        return json.dumps(page).encode()

    def resets_a_counter(self, path: str, _: bytes, answer: bytes) -> bytes:
        if path != "/metrics":
            return answer
        self.metrics += 1
        return answer if self.metrics == 1 else re.sub(rb"\nlab_proxy_requests_total\{[^\n]*", b"", answer)


def answers_from_a_store_of_its_own(bench: Bench) -> Lie:
    """Answers are those of a copy of the answer that the same body had; the proxy hears of none but the first."""
    stored: dict[bytes, bytes] = {}
    hidden = [0]

    def lie(path: str, body: bytes, answer: bytes) -> bytes:
        if path.endswith("completions"):
            hidden[0] += body in stored
            return stored.setdefault(body, answer)
        if path == "/metrics":  # as if the proxy had not got them
            return re.sub(rb'(lab_proxy_requests_total\{[^\n]*cache="hit"[^\n]*\} )([\d.]+)',
                          lambda m: m[1] + b"%.1f" % (float(m[2]) - hidden[0]), answer)  # fmt: skip
        return answer

    return lie


SMALL = {"users": 2, "requests": 24, "prompts": 8, "seconds": LONG, "max_tokens": 8, "prompt_words": 8}


def test_the_sums_of_client_proxy_and_ledger_agree(running: Bench, tmp_path: Path) -> None:
    run = load("caching", running.proxy.url, tmp_path, **SMALL)
    assert run.code in {0, NOT_TRUSTED}, run.output
    rows = {row["name"]: row for row in run.summary["sums"]["rows"]}
    assert rows["requests"]["values"] == {"client": 24, "proxy": 24}
    assert rows["requests charged"]["values"] == {"client": 24, "ledger": 24}
    tokens = rows["completion tokens: upstream"]["values"]
    assert tokens["client"] == tokens["proxy"] == tokens["ledger"] > 0
    assert rows["fetched once each"]["values"]["client"] == len({each["question"] for each in run.records})
    assert "the sums agree: client, ledger, proxy" in run.output


@pytest.mark.parametrize(
    ("name", "codes", "shown"),
    [
        ("truth", {0, NOT_TRUSTED}, "the sums agree"),
        ("drops_usage", {FAILED}, "answer without usage"),
        ("adds_a_token", {SUMS_DIFFER}, "completion tokens"),
        ("loses_a_charge", {SUMS_DIFFER}, "requests charged"),
        ("resets_a_counter", {SUMS_DIFFER}, "fell: proxy requests"),
        ("store", {SUMS_DIFFER}, "requests: hit"),
    ],
)
def test_a_planted_lie_turns_the_exit_code(
    running: Bench, tmp_path: Path, name: str, codes: set[int], shown: str
) -> None:
    running.chat()  # counters that are there before the run
    lie = answers_from_a_store_of_its_own(running) if name == "store" else getattr(Lies(), name)
    with shim(running.proxy.url, lie) as url:
        run = load("caching", url, tmp_path, **SMALL)
    assert run.code in codes, run.output
    assert any(shown in line for line in run.output.splitlines()), run.output
    if codes == {SUMS_DIFFER}:
        assert any(shown in line and "DIFFERS" in line for line in run.output.splitlines()), run.output


def test_a_stampede_costs_one_call_of_the_upstream(running: Bench, tmp_path: Path) -> None:
    """By the upstream's own count, by the proxy's, and in the report."""
    running.forget()
    running.control(delay=0.3)
    run = load("stampede", running.proxy.url, tmp_path, users=24, max_tokens=8, prompt_words=8, seconds=LONG)
    running.control(delay=0)
    assert run.code in {0, NOT_TRUSTED}, run.output
    assert running.calls(running.model)["total"] == 1
    rows = {row["name"]: row["values"] for row in run.summary["sums"]["rows"]}
    assert rows["calls of the model"] == {"client": 1, "proxy": 1, "model": None}
    states = run.summary["results"]["stampede"]["states"]
    assert states["miss"] == 1
    assert sum(states.values()) == 24


@pytest.mark.parametrize("name", ["abandoned", "slow", "embeddings", "tasks", "sessions"])
def test_every_workload_ends_with_equal_sums(running: Bench, tmp_path: Path, name: str) -> None:
    run = load(name, running.proxy.url, tmp_path, users=2, requests=12, max_tokens=8, prompt_words=8, seconds=LONG,
               language="both")  # fmt: skip
    assert run.code in {0, NOT_TRUSTED}, run.output
    result: dict[str, Any] = run.summary["results"][name]
    assert result["answers"] == 12
    assert result["abandoned"] == (6 if name == "abandoned" else 0)


def test_behind_a_gate_the_ledger_alone_is_compared(running: Bench, tmp_path: Path) -> None:
    """The address stands for several proxies: the counters of whichever answers are no sum."""
    run = load("throughput", running.proxy.url, tmp_path, users=2, requests=6, max_tokens=8, seconds=LONG,
               proxy_counters=False)  # fmt: skip
    assert run.code in {0, NOT_TRUSTED}, run.output
    assert "the sums agree: client, ledger" in run.output
    assert "client, ledger, proxy" not in run.output


def test_the_real_model_refuses_garbage_and_counts_as_the_client_does(
    proxy_url: str, model_url: str, tmp_path: Path
) -> None:
    """The whole lab: sums over client, proxy, ledger and model."""
    run = load("garbage", proxy_url, tmp_path, users=2, requests=22, max_tokens=8, prompt_words=8, seconds=LONG,
               model="tiny", model_urls=model_url)  # fmt: skip
    assert run.code in {0, NOT_TRUSTED}, run.output
    assert run.summary["results"]["garbage"]["refused"] == 11
    rows = {row["name"]: row["values"] for row in run.summary["sums"]["rows"]}
    assert rows["calls of the model"]["model"] == rows["calls of the model"]["proxy"] >= 11
    tokens = rows["completion tokens: upstream"]
    assert tokens["client"] == tokens["proxy"] == tokens["ledger"] == tokens["model"] > 0
