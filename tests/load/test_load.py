"""The load measures what the server does: real Locust processes against servers whose timing and cache are known."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_proxy import mock
from lab_load.answer import cache_state
from lab_load.prompts import Zipf, question
from lab_load.summary import spread
from processes import free_port, process, python

MODEL = "stand-in"


@dataclass
class Server:
    """Headers and the role at once, the first token after `first` s, the others `gap` s apart; a cache where asked."""

    first: float
    gap: float
    tokens: int
    caches: bool = False
    port: int = 0
    asked: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def answer_seconds(self) -> float:
        return self.first + (self.tokens - 1) * self.gap


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 0

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            body = json.dumps({"object": "list", "data": [{"id": MODEL, "kind": "chat"}]} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][0]["content"]
            hit = server.caches and text in server.stored
            server.asked.append(text)
            server.keys.add(self.headers.get("authorization"))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            if server.caches:
                self.send_header("cache-status", "llm-lab; hit; ttl=9" if hit else "llm-lab; fwd=miss; stored")
            self.end_headers()
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for place in range(server.tokens):
                if not hit:
                    time.sleep(server.gap if place else server.first)
                self.event({"choices": [{"delta": {"content": "x"}}]})
            used = {"prompt_tokens": 7, "completion_tokens": server.tokens, "total_tokens": 7 + server.tokens}
            server.stored.add(text)
            self.event({"choices": [], "usage": used})
            self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def event(self, said: dict[str, Any]) -> None:
            self.chunk(b"data: " + json.dumps(said).encode() + b"\n\n")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    return Handler


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts stand-ins, ends them."""
    running: list[ThreadingHTTPServer] = []

    def start(**how: Any) -> Server:
        server = Server(**how)
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
        http.daemon_threads = True
        running.append(http)
        server.port = http.server_address[1]
        threading.Thread(target=http.serve_forever, daemon=True).start()
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


@dataclass
class Run:
    code: int
    output: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


def begin(what: str, host: str, folder: Path, **settings: object) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LOAD_", "LOCUST_"))}
    wanted = {f"LOAD_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.Popen(
        python("lab_load", what), env=own | {"LOAD_HOST": host, "LOAD_RUNS_DIR": str(folder)} | wanted,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def finish(popen: subprocess.Popen[str], folder: Path) -> Run:
    try:
        output, _ = popen.communicate(timeout=60)
    finally:
        popen.kill()
    return Run(popen.returncode, output, next(folder.glob("*-*"), folder))


def load(what: str, host: str, folder: Path, **settings: object) -> Run:
    return finish(begin(what, host, folder, **settings), folder)


def test_times_and_rates_are_those_of_the_server(serve: Any, tmp_path: Path) -> None:
    """TTFT is the first token's time, not the headers', the role's or the end's; the rate is what users received."""
    server = serve(first=0.4, gap=0.05, tokens=20)
    run = load("throughput", server.url, tmp_path, users=3, spawn_rate=100, seconds=7)
    assert run.code == 0, run.output
    result = run.summary["results"]["throughput"]
    metrics = result["metrics"]
    assert server.first <= metrics["ttft_seconds"]["p50"] < server.first + 0.1
    assert server.gap * 0.9 < metrics["inter_token_seconds"]["p50"] < server.gap * 1.2
    assert server.answer_seconds <= metrics["end_to_end_seconds"]["p50"] < server.answer_seconds + 0.25
    assert 1 / server.gap * 0.8 < metrics["tokens_per_second"]["p50"] <= 1 / server.gap * 1.02
    rate = 3 * server.tokens / server.answer_seconds
    assert rate * 0.8 < result["output_tokens_per_second"] < rate * 1.15
    assert result["errors"] == {}
    assert result["cache"] == {"none": result["answers"]}

    assert len(set(server.asked)) == len(server.asked) == result["answers"] + run.summary["unfinished"]
    rows = {row["Type"] or row["Name"]: row for row in run.rows("locust_stats.csv")}
    assert {"POST", "TTFT", "ITL", "tok/s"} < set(rows)
    assert rows["Aggregated"]["Request Count"] == rows["POST"]["Request Count"] == str(result["answers"])
    assert int(rows["TTFT"]["50%"]) == pytest.approx(metrics["ttft_seconds"]["p50"] * 1000, rel=0.05)
    assert len(run.rows("answers.csv")) == result["answers"]
    assert {row["metric"] for row in run.rows("summary.csv")} == set(metrics)
    assert "<html" in (run.folder / "report.html").read_text()[:500].lower()
    assert "coordinated omission" in run.output


def test_a_summary_says_what_ran_against_what_but_not_the_key(serve: Any, tmp_path: Path) -> None:
    server = serve(first=0, gap=0.01, tokens=3)
    run = load("throughput", server.url, tmp_path, users=1, seconds=1, api_key="sk-very-secret", seed=7)
    assert run.code == 0, run.output
    assert server.keys == {"Bearer sk-very-secret"}
    said = run.summary
    assert said["target"]["host"] == server.url
    assert said["target"]["model"] == MODEL
    assert said["settings"]["seed"] == 7
    assert said["settings"]["salt"]
    assert said["generator"]["versions"]["locust"]
    assert said["generator"]["machine"]["cores"] >= 1
    assert "sk-very-secret" not in run.output + "".join(file.read_text() for file in run.folder.iterdir())


def test_hit_ratio_is_measured_beside_the_expected_one(serve: Any, tmp_path: Path) -> None:
    """One user, a perfect cache: exactly the hits of these draws, and about those of theory. Hits and misses apart."""
    server = serve(first=0.03, gap=0.005, tokens=4, caches=True)
    settings: dict[str, object] = {"users": 1, "seconds": 10, "prompts": 40, "zipf_exponent": 1, "think_seconds": 0.002}
    run = load("caching", server.url, tmp_path, **settings)
    assert run.code == 0, run.output
    result = run.summary["results"]["caching"]
    ratio = result["hit_ratio"]
    assert result["draws"] > 200
    assert ratio["measured"] == ratio["these_draws"]
    assert abs(ratio["measured"] - ratio["expected"]) <= 4 * ratio["expected_deviation"]
    assert result["missed_again"] == 0
    hit, miss = result["metrics"]["hit"], result["metrics"]["miss"]
    assert hit["ttft_seconds"]["p50"] < 0.02 < miss["ttft_seconds"]["p50"] < 0.08
    assert hit["ttft_seconds"]["count"] == result["states"]["hit"]

    # The same seed asks the same questions in the same order; another salt, so that the cache is cold for them.
    again = tmp_path / "again"
    second = load("caching", server.url, again, **settings)
    drawn, redrawn = ([row["question"] for row in each.rows("answers.csv")][:200] for each in (run, second))
    assert drawn == redrawn
    assert second.summary["results"]["caching"]["states"]["miss"] > 20


FAILURES = {
    "500": "status 500: server_error",
    "redirect": "status 307: unknown",
    "429": "status 429: rate_limit_error",
    "reset": "stream broke off: HTTPParseError",
    "no-done": "stream without [DONE]",
    "error-event": "error in the stream: server_error",
    "stall": "timeout",
    "hang": "timeout",
    "empty": "answer without content",
    "json": "answer that is no stream",
    "junk": "event that is not JSON",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All at once: each of them mostly waits."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in FAILURES}
    with mock(tmp_path_factory.mktemp("mock")) as server:
        begun = {
            mode: begin("throughput", server.url, folder, model=f"gpt-mock-{mode}", users=1, seconds=4,
                        answer_timeout_seconds=1 if kind == "timeout" else 10, drain_seconds=2)
            for (mode, kind), folder in zip(FAILURES.items(), folders.values(), strict=True)
        }  # fmt: skip
        yield {mode: finish(popen, folders[mode]) for mode, popen in begun.items()}


@pytest.mark.parametrize(("mode", "kind"), FAILURES.items())
def test_a_failing_server_is_a_failing_run(failed: dict[str, Run], mode: str, kind: str) -> None:
    """Exit code 1, and the kind of failure, in summary, CSV and on the screen."""
    run = failed[mode]
    assert run.code == 1, run.output
    errors = run.summary["results"]["throughput"]["errors"]
    assert set(errors) == {kind}
    assert run.summary["results"]["throughput"]["answers"] == 0
    assert sum(errors.values()) <= 6, "a user that failed pauses"
    assert f"× {kind}" in run.output
    assert any(kind in row["Error"] for row in run.rows("locust_failures.csv"))


def test_no_cache_is_no_caching_run(serve: Any, tmp_path: Path) -> None:
    run = load("caching", serve(first=0, gap=0, tokens=2).url, tmp_path, users=1, seconds=1)
    assert run.code == 1
    assert "answer without Cache-Status" in run.output


def test_without_a_lab_it_says_what_to_do(tmp_path: Path) -> None:
    run = load("throughput", f"http://127.0.0.1:{free_port()}", tmp_path)
    assert run.code == 3
    assert "make lab" in run.output
    assert "LOAD_HOST" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("variable", "value"),
    [("users", "no"), ("users", "0"), ("users", "257"), ("seconds", "9999"), ("salt", "a b"), ("zipf_exponent", "-1")],
)
def test_a_wrong_setting_is_named(variable: str, value: str, tmp_path: Path) -> None:
    run = load("throughput", "http://127.0.0.1:1", tmp_path, **{variable: value})
    assert run.code == 2
    assert f"LOAD_{variable.upper()}" in run.output
    assert "Traceback" not in run.output


def test_the_web_page_starts_bounded_runs_of_its_own_target_only(serve: Any, tmp_path: Path) -> None:
    server = serve(first=0.02, gap=0.005, tokens=4, caches=True)
    port = free_port()
    env = {
        "LOAD_HOST": server.url,
        "LOAD_PORT": str(port),
        "LOAD_RUNS_DIR": str(tmp_path / "runs"),
        "LOAD_MAX_USERS": "9",
    }
    argv = python("lab_load", "web")
    with process("load", argv, port=port, log_dir=tmp_path, env=env, ready="/") as page, httpx2.Client() as http:
        form = {"user_count": "2", "spawn_rate": "10", "run_time": "2s", "host": server.url, "user_classes": "Caching"}

        def swarm(headers: dict[str, str] | None = None, **changed: str) -> httpx2.Response:
            return http.post(f"{page.url}/swarm", data=form | changed, headers=headers or {})

        assert swarm({"origin": "https://elsewhere.example"}).status_code == 403
        assert swarm({"host": "rebound.example"}).status_code == 403
        for changed, said in {
            ("user_count", "10"): "LOAD_MAX_USERS=9",
            ("run_time", "2h"): "LOAD_MAX_SECONDS",
            ("host", "http://elsewhere.example"): "LOAD_HOST",
            ("prompts", "0"): "LOAD_PROMPTS",
            ("seed", "x"): "LOAD_SEED",
        }.items():
            answer = swarm(**dict([changed])).json()
            assert answer["success"] is False
            assert said in answer["message"]
        assert server.asked == []

        started = swarm(prompts="5", seed="3").json()
        assert started["success"], started
        deadline = time.monotonic() + 20
        while not list((tmp_path / "runs").glob("caching-*/report.html")):
            assert time.monotonic() < deadline, page.tail()
            time.sleep(0.1)
        summary = json.loads(next((tmp_path / "runs").glob("*/summary.json")).read_text())
        assert list(summary["results"]) == ["caching"]
        assert summary["settings"]["prompts"] == 5
        assert summary["users"] == 2
        assert summary["results"]["caching"]["failed"] == 0


def test_zipf_draws_follow_the_law() -> None:
    """Chi-square over 50 questions, 20,000 draws: 49 degrees of freedom, a value over 94 has p < 10^-4."""
    zipf, draws = Zipf(50, 1.1, seed=3), 20_000
    drawn = Counter(zipf.draw() for _ in range(draws))
    assert set(drawn) <= set(range(1, 51))
    assert math.fsum(zipf.probabilities) == pytest.approx(1)
    assert zipf.probabilities[0] / zipf.probabilities[9] == pytest.approx(10**1.1)
    squared = sum((drawn[k] - draws * p) ** 2 / (draws * p) for k, p in enumerate(zipf.probabilities, 1))
    assert squared < 94


@pytest.mark.parametrize(
    ("prompts", "exponent", "draws"), [(100, 1.0, 300), (30, 0.0, 60), (10, 3.0, 200), (1, 1.0, 9)]
)
def test_expected_hits_are_those_of_a_simulated_cache(prompts: int, exponent: float, draws: int) -> None:
    """Mean within four standard errors of 400 simulations; the deviation given is an upper bound of theirs."""
    expected, deviation = Zipf(prompts, exponent, seed=0).expected_hits(draws)
    hits = []
    for seed in range(400):
        zipf = Zipf(prompts, exponent, seed)
        hits.append(draws - len({zipf.draw() for _ in range(draws)}))
    seen = statistics.pstdev(hits)
    assert abs(statistics.fmean(hits) - expected) <= 4 * max(seen, 0.01) / math.sqrt(len(hits))
    assert seen <= deviation * 1.1


def test_questions_are_reproducible_and_distinct() -> None:
    made = [question(1, "s", number, 12) for number in range(500)]
    assert made == [question(1, "s", number, 12) for number in range(500)]
    assert len(set(made)) == 500
    assert question(1, "other", 4, 12).split("-", 1)[1] == made[4].split("-", 1)[1]
    assert len(made[0].split()) == 12 + 3


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert spread(values) == {"count": 100, "mean": 50.5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert spread([3.0]) == {"count": 1, "mean": 3, "p50": 3, "p95": 3, "p99": 3, "max": 3}
    assert spread([]) == {"count": 0}


@pytest.mark.parametrize(
    ("header", "state"),
    [
        (None, "none"),
        ('llm-lab; hit; ttl=41; key="a"', "hit"),
        ("llm-lab; hit; ttl=-12", "hit"),
        ("llm-lab; fwd=miss; stored", "miss"),
        ("llm-lab; fwd=miss; collapsed", "collapsed"),
        ("llm-lab; fwd=bypass; detail=sampled", "bypass: sampled"),
        ("llm-lab; fwd=miss; detail=too-large", "miss"),
        ("llm-lab; fwd=stale; fwd-status=503", "stale"),
    ],
)
def test_cache_status_in_a_word(header: str | None, state: str) -> None:
    assert cache_state(header) == state
