"""The load measures what the server does: real Locust processes before servers whose answers and cache are known.

Times are tested where the clock is handed in (`read_stream`) and where they are data (`summary`), never by waiting.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import statistics
import subprocess
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from lab_load import summary
from lab_load.answer import Answer, cache_state, read_stream
from lab_load.prompts import Zipf, question
from lab_load.settings import Settings, complaint
from lab_load.summary import spread
from lab_load.target import Target
from lab_load.trial import Trial
from processes import SHOWN_ON_FAILURE, eventually, free_port, process, python
from pydantic import ValidationError

MODEL = "stand-in"
LONG = 3600  # seconds of a run that ends when the test has seen enough


@dataclass
class Server:
    """Streams of `tokens` tokens; a cache where `caches`. With `failures` each request fails, in their order."""

    tokens: int = 4
    caches: bool = False
    failures: tuple[str, ...] = ()
    port: int = 0
    asked: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # question -> its failure
    keys: set[str | None] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


# Failure -> its kind in the summary.
FAILURES = {
    "500": "status 500: server_error",
    "redirect": "status 307: unknown",
    "429": "status 429: rate_limit_error",
    "reset": "stream broke off: HTTPParseError",
    "no-done": "stream without [DONE]",
    "error-event": "error in the stream: server_error",
    "empty": "answer without content",
    "json": "answer that is no stream",
    "junk": "event that is not JSON",
}
SILENCES = {"stall": "timeout", "hang": "timeout"}  # after the first token, and from the start; neither ends
REFUSALS = {"500": (500, "server_error"), "429": (429, "rate_limit_error"), "redirect": (307, None)}


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 0

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            listed = {"object": "list", "data": [{"id": MODEL, "kind": "chat"}]} if known else {}
            self.whole(200 if known else 404, listed)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][0]["content"]
            with server.lock:
                failure = server.failures[len(server.asked) % len(server.failures)] if server.failures else ""
                server.asked.append(text)
                server.failed[text] = failure
            server.keys.add(self.headers.get("authorization"))
            if failure in REFUSALS:
                status, kind = REFUSALS[failure]
                return self.whole(status, {"error": {"type": kind, "message": text}} if kind else {})
            if failure == "json":
                return self.whole(200, {"choices": []})
            if failure == "hang":
                return self.silence()
            return self.stream(text, failure)

        def stream(self, text: str, failure: str) -> None:
            hit = server.caches and text in server.stored
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            if server.caches:
                self.send_header("cache-status", "llm-lab; hit; ttl=9" if hit else "llm-lab; fwd=miss; stored")
            self.end_headers()
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for _ in range(0 if failure == "empty" else server.tokens):
                self.event({"choices": [{"delta": {"content": "x"}}]})
                if failure == "stall":
                    return self.silence()
                if failure == "reset":
                    self.close_connection = True
                    return None
                if failure == "error-event":
                    self.event({"error": {"type": "server_error", "message": text}})
                if failure == "junk":
                    self.chunk(b"data: {not json\n\n")
            used = {"prompt_tokens": 7, "completion_tokens": server.tokens, "total_tokens": 7 + server.tokens}
            server.stored.add(text)
            self.event({"choices": [], "usage": used})
            if failure != "no-done":
                self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
            return None

        def silence(self) -> None:
            server.closing.wait()
            self.close_connection = True

        def whole(self, status: int, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            if status == 307:
                self.send_header("location", "http://127.0.0.1:9/elsewhere")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def event(self, said: dict[str, Any]) -> None:
            self.chunk(b"data: " + json.dumps(said).encode() + b"\n\n")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    return Handler


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what some tests are about: no traceback."""


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts stand-ins, ends them."""
    running: list[tuple[Server, Quiet]] = []

    def start(**how: Any) -> Server:
        server = Server(**how)
        http = Quiet(("127.0.0.1", 0), handler(server))
        running.append((server, http))
        server.port = http.server_address[1]
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server, http in running:
        server.closing.set()
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


def finish(popen: subprocess.Popen[str], folder: Path, enough: Callable[[], bool] | None = None) -> Run:
    """The whole run; with `enough` it is told to end, as Docker does, as soon as that is true."""
    try:
        if enough:
            eventually(lambda: enough() or popen.poll() is not None, what="enough of a run")
            popen.send_signal(signal.SIGTERM)
        output, _ = popen.communicate(timeout=60)
    finally:
        popen.kill()
    return Run(popen.returncode, output, next(folder.glob("*-*"), folder))


def load(what: str, host: str, folder: Path, **settings: object) -> Run:
    return finish(begin(what, host, folder, **settings), folder)


def load_until(enough: Callable[[], bool], what: str, host: str, folder: Path, **settings: object) -> Run:
    return finish(begin(what, host, folder, seconds=LONG, **settings), folder, enough)


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LOAD_")]:
        monkeypatch.delenv(name)


# -- times and rates


def test_times_are_those_of_the_events_with_content() -> None:
    """TTFT is the first token's time, not the headers', the role's or the end's. Every line comes a second after the
    last."""
    token = b'data: {"choices":[{"delta":{"content":"x"}}]}\n'
    lines = [
        b": still here\n",
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n',
        b"\n",
        token,
        b"\n",
        token,
        token,
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n',
        b"data: [DONE]\n",
        b"\n",
    ]
    now = 100.0

    def readline() -> bytes:
        nonlocal now
        now += 1
        return lines.pop(0) if lines else b""

    answer = Answer("throughput", 1, began=now - 10)
    read_stream(answer, readline, lambda: now)
    assert answer.ttft == 10 + 4
    assert answer.gaps == [2, 1]
    assert answer.seconds == 10 + 11
    assert answer.tokens_per_second == 8 / 3
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 9)


def trial(**more: Any) -> Trial:
    settings = Settings(**{"host": "http://127.0.0.1:1"} | more)
    return Trial("run", settings, Target(settings.host, MODEL))


def answered(began: float, ended: float, *events: float, **more: Any) -> Answer:
    tokens = len(events)
    made = Answer("throughput", 1, began, ended, array("d", events), prompt_tokens=7, completion_tokens=tokens)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_the_rate_is_what_users_received_while_all_were_there() -> None:
    """Neither while they started nor while the last answers drained; an answer across an edge counts by its part."""
    run = trial()
    run.began, run.full, run.stopped = 0, 10, 20
    before = answered(1, 8, 2, 4, 6, 8)
    into = answered(8, 12, 9, 9.5, 11, 12)
    inside = answered(12, 18, 14, 15, 16, 18)
    across = answered(18, 22, 19, 21, 21.5, 22)
    failed = answered(13, 14, error="timeout")
    result = summary.throughput(run, [before, into, inside, across, failed])
    assert result["window_seconds"] == 10
    assert result["output_tokens_per_second"] == (2 + 4 + 1) / 10
    assert result["answers_per_second"] == 2 / 10
    metrics = result["metrics"]
    assert metrics["ttft_seconds"] == spread([2, 1]), "those that began with all users there"
    assert metrics["inter_token_seconds"] == spread([1, 1, 2, 2, 0.5, 0.5])
    assert metrics["end_to_end_seconds"] == spread([6, 4])
    assert metrics["tokens_per_second"] == spread([3 / 4, 3 / 3])


def test_times_of_hits_and_misses_are_kept_apart() -> None:
    run = trial(prompts=10)
    answers = [answered(0, 9, 5, number=1, cache="miss"), answered(10, 12, 11, number=1, cache="hit"),
               answered(20, 29, 26, number=2, cache="miss"), answered(30, 33, 32, number=2, cache="hit"),
               answered(40, 41, number=3, error="timeout")]  # fmt: skip
    result = summary.caching(run, answers)
    assert result["states"] == {"miss": 2, "hit": 2}
    assert (result["draws"], result["distinct"], result["missed_again"]) == (4, 2, 0)
    assert result["metrics"]["hit"]["ttft_seconds"] == spread([1, 2])
    assert result["metrics"]["miss"]["ttft_seconds"] == spread([5, 6])


# -- whole runs


def test_a_run_leaves_its_figures_and_what_ran_but_not_the_key(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question another one, every answer counted once: in the summary, Locust's tables and the files."""
    server = serve()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # the load goes to its target directly
    run = load_until(lambda: len(server.asked) > 30, "throughput", server.url, tmp_path, users=3, spawn_rate=100,
                     api_key="sk-very-secret", seed=7)  # fmt: skip
    assert run.code == 0, run.output
    told = run.summary
    result = told["results"]["throughput"]
    assert result["errors"] == {}
    assert result["cache"] == {"none": result["answers"]}
    # An unfinished request may have been stopped before it reached the server.
    assert len(set(server.asked)) == len(server.asked)
    assert result["answers"] <= len(server.asked) <= result["answers"] + told["unfinished"]
    metrics = result["metrics"]
    assert metrics["completion_tokens"]["p50"] == server.tokens
    rows = {row["Type"] or row["Name"]: row for row in run.rows("locust_stats.csv")}
    assert {"POST", "TTFT", "ITL", "tok/s"} < set(rows)
    assert rows["Aggregated"]["Request Count"] == rows["POST"]["Request Count"] == str(result["answers"])
    assert rows["TTFT"]["Request Count"] == str(result["answers"])
    answers = run.rows("answers.csv")
    assert len(answers) == result["answers"]
    milliseconds = [float(row["ttft_seconds"]) * 1000 for row in answers]
    assert min(milliseconds) * 0.9 - 1 <= int(rows["TTFT"]["50%"]) <= max(milliseconds) * 1.1 + 1
    assert {row["metric"] for row in run.rows("summary.csv")} == set(metrics)
    assert "<html" in (run.folder / "report.html").read_text()[:500].lower()
    assert "coordinated omission" in run.output

    assert server.keys == {"Bearer sk-very-secret"}
    assert told["target"]["host"] == server.url
    assert told["target"]["model"] == MODEL
    assert told["users"] == 3
    assert told["settings"]["seed"] == 7
    assert all(text.startswith(f"{told['settings']['salt']}-") for text in server.asked)
    assert told["generator"]["versions"]["locust"]
    assert told["generator"]["machine"]["cores"] >= 1
    assert "sk-very-secret" not in run.output + "".join(file.read_text() for file in run.folder.iterdir())


def test_hit_ratio_is_measured_beside_the_expected_one(serve: Any, tmp_path: Path) -> None:
    """One user, a perfect cache: exactly the hits of these draws, and about those of theory."""
    server = serve(caches=True)
    run = load_until(lambda: len(server.asked) > 200, "caching", server.url, tmp_path, users=1, prompts=40,
                     zipf_exponent=1, seed=5)  # fmt: skip
    assert run.code == 0, run.output
    result = run.summary["results"]["caching"]
    ratio = result["hit_ratio"]
    assert result["draws"] > 200
    assert ratio["measured"] == ratio["these_draws"]
    assert abs(ratio["measured"] - ratio["expected"]) <= 4 * ratio["expected_deviation"]
    assert result["missed_again"] == 0
    assert result["states"]["miss"] == result["distinct"] == len(server.stored)
    for state in ("hit", "miss"):
        assert result["metrics"][state]["ttft_seconds"]["count"] == result["states"][state]
    drawn = [int(row["question"]) for row in run.rows("answers.csv")]
    zipf = Zipf(40, 1, seed=5)
    assert drawn == [zipf.draw() for _ in drawn], "the seed alone decides what is asked, and in which order"


def test_each_run_has_a_salt_of_its_own_unless_one_is_set() -> None:
    """So that the cache is cold for it."""
    assert trial().salt != trial().salt
    assert trial(salt="again").text(3) == trial(salt="again").text(3) != trial().text(3)


@dataclass
class Failed:
    """A run against a server that fails: the run, and what was counted for each of the failures."""

    run: Run
    server: Server
    users: int

    def errors(self, failure: str) -> list[dict[str, str]]:
        """The rows of answers.csv whose question the server failed in this way."""
        settings = self.run.summary["settings"]
        texts = {
            number: question(settings["seed"], settings["salt"], int(number), settings["prompt_words"])
            for number in (row["question"] for row in self.run.rows("answers.csv"))
        }
        rows = self.run.rows("answers.csv")
        return [row for row in rows if self.server.failed[texts[row["question"]]] == failure]


@pytest.fixture(scope="module")
def failed(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Failed]:
    """Two runs side by side, in each a user for each failure and more: those that an answer ends, and silences."""
    begun = []
    for failures, timeout in ((FAILURES, 120), (SILENCES, 0.3)):
        server, folder, users = serve(failures=tuple(failures)), tmp_path_factory.mktemp("failed"), len(failures)
        popen = begin("throughput", server.url, folder, users=users, spawn_rate=100, seconds=LONG,
                      answer_timeout_seconds=timeout)  # fmt: skip
        begun.append((failures, server, folder, users, popen))
    found: dict[str, Failed] = {}
    for failures, server, folder, users, popen in begun:
        # Whoever asks again has failed before.
        run = finish(popen, folder, lambda server=server, users=users: len(server.asked) > users)
        found |= dict.fromkeys(failures, Failed(run, server, users))
    return found


@pytest.mark.parametrize(("failure", "kind"), (FAILURES | SILENCES).items())
def test_a_failing_server_is_a_failing_run(failed: dict[str, Failed], failure: str, kind: str) -> None:
    """Exit code 1, and the kind of failure, in summary, CSV and on the screen."""
    run = failed[failure].run
    assert run.code == 1, run.output
    result = run.summary["results"]["throughput"]
    assert {row["error"] for row in failed[failure].errors(failure)} == {kind}
    assert set(result["errors"]) == set((SILENCES if failure in SILENCES else FAILURES).values())
    assert result["answers"] == 0
    assert f"{result['errors'][kind]} × {kind}" in run.output
    assert any(kind in row["Error"] for row in run.rows("locust_failures.csv"))


def test_a_token_is_taken_as_it_comes(failed: dict[str, Failed]) -> None:
    """Of an answer that falls silent the first token has its time: nothing on the way waits for more of it."""
    assert all(row["ttft_seconds"] for row in failed["stall"].errors("stall"))
    assert not any(row["ttft_seconds"] for row in failed["hang"].errors("hang"))


def test_a_user_that_failed_pauses(failed: dict[str, Failed]) -> None:
    """A second at least between two questions of a user, whatever the length of the run."""
    each = failed["500"]
    assert len(each.server.asked) <= each.users * (each.run.summary["seconds"] + 1)


def test_no_cache_is_no_caching_run(serve: Any, tmp_path: Path) -> None:
    """It ends by itself when its time is over."""
    run = load("caching", serve().url, tmp_path, users=1, seconds=1)
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
def test_a_wrong_setting_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LOAD_{variable.upper()}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert f"LOAD_{variable.upper()}" in complaint(caught.value)


def test_a_wrong_setting_stops_the_start(tmp_path: Path) -> None:
    run = load("throughput", "http://127.0.0.1:1", tmp_path, users=257)
    assert run.code == 2
    assert run.output.startswith("load: LOAD_USERS=257 ")
    assert "Traceback" not in run.output


def test_the_web_page_starts_bounded_runs_of_its_own_target_only(serve: Any, tmp_path: Path) -> None:
    server = serve(caches=True)
    port = free_port()
    env = {
        "LOAD_HOST": server.url,
        "LOAD_PORT": str(port),
        "LOAD_RUNS_DIR": str(tmp_path / "runs"),
        "LOAD_MAX_USERS": "9",
    }
    argv = python("lab_load", "web")
    with (
        process("load", argv, port=port, log_dir=tmp_path, env=env, ready="/") as page,
        httpx2.Client(event_hooks=SHOWN_ON_FAILURE, timeout=60) as http,
    ):
        form = {"user_count": "2", "spawn_rate": "10", "run_time": "1s", "host": server.url, "user_classes": "Caching"}

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
        eventually(lambda: list((tmp_path / "runs").glob("caching-*/report.html")), what="the run's report")
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
