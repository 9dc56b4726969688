"""The load measures what the server does: real Locust processes before servers whose answers and cache are known.

Times are tested where the clock is handed in (`read_stream`) and where they are data (`summary`), never by waiting.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import statistics
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_load import LONG, NOT_TRUSTED, Run, begin, finish, load, load_until
from lab_load.measures.counters import Counters
from lab_load.measures.histogram import Times
from lab_load.measures.prefix import SharedPrefix, expected_cached
from lab_load.measures.record import AnswerError, Record, cache_state, read_stream
from lab_load.measures.sums import Expected, compare
from lab_load.measures.trial import Target, Trial, make_workloads
from lab_load.measures.trust import Conduct, reasons
from lab_load.reports import html, summary
from lab_load.settings import Settings, complaint
from lab_load.shape import Shape
from lab_load.workloads.arrivals import arrivals
from lab_load.workloads.prompts import Zipf, question
from lab_load.workloads.workload import WORKLOADS
from processes import SHOWN_ON_FAILURE, eventually, free_port, process, python
from pydantic import ValidationError

MODEL = "stand-in"


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
    "json": "answer is not a stream",
    "junk": "event is not JSON",
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
                time.sleep(0.003)  # a server that takes no time has the generator at its own limit
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

    record = Record("throughput", 0, 1, intended=now - 10, started=now - 9)
    read_stream(record, readline, lambda: now)
    assert record.lag == 1
    assert record.ttft == 10 + 4
    assert record.gaps == [2, 1]
    assert record.seconds == 10 + 7, "to the last content, not to [DONE]"
    assert record.tpot == 3 / 8
    assert (record.prompt_tokens, record.completion_tokens) == (7, 9)


def chunks(*deltas: dict[str, str]) -> list[bytes]:
    lines = [b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n" for delta in deltas]
    usage = {"prompt_tokens": 1, "completion_tokens": len(deltas)}
    return [*lines, b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n", b"data: [DONE]\n"]


def read(lines: list[bytes], **more: Any) -> Record:
    """A stream whose lines come a second apart, sent at 0."""
    clock = iter(range(1, 100))
    record = Record("throughput", 0, 1, intended=0, started=0)
    read_stream(record, lambda: lines.pop(0) if lines else b"", lambda: next(clock), **more)
    return record


def test_reasoning_starts_ttft_but_not_the_visible_text() -> None:
    role, thought, word = {"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "x"}
    record = read(chunks(role, thought, word))
    assert (record.ttft, record.visible) == (2, 3)


def test_more_events_than_tokens_is_a_failure() -> None:
    """A token that somebody on the way added has no place in the usage."""
    lines = chunks({"content": "x"}, {"content": "y"})
    with pytest.raises(AnswerError, match="more events"):
        read([lines[0], *lines])


def test_an_abandoned_stream_ends_at_its_event() -> None:
    record = read(chunks({"content": "x"}, {"content": "y"}, {"content": "z"}), stop_after=2)
    assert (record.abandoned, len(record.events)) == (True, 2)


def trial(name: str = "throughput", **more: Any) -> Trial:
    settings = Settings(**{"host": "http://127.0.0.1:1", "requests": 50} | more)
    return Trial("run", settings, Target(settings.host, MODEL), make_workloads([name], settings))


def record(began: float, ended: float, *events: float, **more: Any) -> Record:
    made = Record("throughput", 0, 1, began, began, ended, array("d", events), status=200, prompt_tokens=7,
                  completion_tokens=len(events))  # fmt: skip
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_the_rate_is_what_users_received_while_all_were_there() -> None:
    """Neither while they started nor while the last answers drained; an answer across an edge counts by its part."""
    run = trial()
    run.began, run.full, run.stopped = 0, 10, 20
    before = record(1, 8, 2, 4, 6, 8)
    into = record(8, 12, 9, 9.5, 11, 12)
    inside = record(12, 18, 14, 15, 16, 18)
    across = record(18, 22, 19, 21, 21.5, 22)
    failed = record(13, 14, error="timeout", status=0)
    run.records, run.sent = [before, into, inside, across, failed], 5
    figures = summary.summarize(run, compare(run.records, 0, Counters(), Expected()))["results"]["throughput"]
    assert figures["window_seconds"] == 10
    assert figures["output_tokens_per_second"] == (2 + 4 + 1) / 10
    assert figures["requests_per_second"] == 2 / 10
    metrics = figures["metrics"]
    assert (metrics["ttft_seconds"]["count"], metrics["ttft_seconds"]["mean"]) == (2, 1.5)
    assert metrics["inter_token_seconds"]["count"] == 6
    assert metrics["end_to_end_seconds"]["count"] == 3, "the failed one is in it"
    assert metrics["end_to_end_seconds"]["mean"] == pytest.approx((6 + 4 + 1) / 3)
    assert metrics["tpot_seconds"]["mean"] == pytest.approx((4 / 3 + 3 / 3) / 2)


def test_times_of_hits_misses_and_followers_are_kept_apart() -> None:
    run = trial("caching", prompts=10)
    run.began, run.full, run.stopped = 0, 0, 50
    run.records = [record(0, 9, 5, cache="miss", scenario="caching"),
                   record(10, 12, 11, cache="hit", scenario="caching"),
                   record(30, 33, 32, cache="hit", scenario="caching"),
                   record(35, 38, 38, cache="collapsed", scenario="caching")]  # fmt: skip
    figures = summary.summarize(run, compare(run.records, 0, Counters(), Expected()))["results"]["caching"]
    assert figures["states"] == {"collapsed": 1, "hit": 2, "miss": 1}
    first = {group: metrics["ttft_seconds"]["mean"] for group, metrics in figures["by_cache"].items()}
    assert first == {"hit": 1.5, "miss": 5, "collapsed": 3}
    assert figures["hit_ratio"]["measured"] == 2 / 4
    assert figures["hit_ratio"]["with_collapsed"] == 3 / 4


def test_a_percentile_needs_its_samples() -> None:
    """p95 of 200, p99 of 1,000; a histogram of several processes is the sum of theirs."""
    few, many = Times([1.0] * 199), Times(k / 1000 for k in range(1, 1001))
    assert (few.percentile("p50"), few.percentile("p95")) == (pytest.approx(1, rel=1e-3), None)
    assert many.percentile("p99") == pytest.approx(0.99, rel=2e-3)
    merged = Times.merge([few.figures()["histogram"], many.figures()["histogram"]])
    assert merged.count == 1199
    assert merged.percentile("p99") == pytest.approx(1, rel=2e-3)


# -- sums and trust


COUNTED = {"requests": 3.0, "requests.hit": 1.0, "requests.miss": 2.0, "upstream_calls": 2.0,
           "prompt_tokens.upstream": 14.0, "completion_tokens.upstream": 4.0, "prompt_tokens.cache": 7.0,
           "completion_tokens.cache": 2.0}  # fmt: skip
CHARGED = {"requests": 3.0, "upstream_calls": 2.0, "prompt_tokens": 14.0, "completion_tokens": 4.0, "hits": 1.0,
           "hit_prompt_tokens": 7.0, "hit_completion_tokens": 2.0, "collapsed": 0.0, "collapsed_prompt_tokens": 0.0,
           "collapsed_completion_tokens": 0.0}  # fmt: skip
COMPUTED = {"requests": 2.0, "prompt_tokens": 14.0, "completion_tokens": 4.0}


def counted(**changed: Any) -> Counters:
    made = Counters(dict(COUNTED), dict(COMPUTED), dict(CHARGED), 0.0, 0.0)
    for name, value in changed.items():
        if isinstance(value, dict):
            getattr(made, name).update(value)
        else:
            setattr(made, name, value)
    return made


THREE = [record(0, 2, 1, 2, cache="miss"), record(3, 5, 4, 5, cache="miss", question=2),
         record(6, 8, 7, 8, cache="hit")]  # fmt: skip


def test_equal_sums_hold() -> None:
    table = compare(THREE, 0, counted(), Expected(once=True, fetches=2, hits=(1 / 3, 0.01)))
    assert table.holds, [row for row in table.rows if not row.holds]


@pytest.mark.parametrize(
    ("lie", "expected", "row"),
    [
        (counted(ledger={"completion_tokens": 3.0}), Expected(), "completion tokens: upstream"),
        (counted(ledger={"requests": 2.0}), Expected(), "requests charged"),
        (counted(model={"completion_tokens": 5.0}), Expected(), "completion tokens: upstream"),
        (counted(model={"requests": 3.0}), Expected(), "calls of the model"),
        (counted(proxy={"requests": 2.0}), Expected(), "requests"),
        (counted(proxy={"requests.hit": 2.0}), Expected(), "requests: hit"),
        (counted(proxy={"upstream_calls": -5.0}), Expected(), "fell: proxy upstream_calls"),
        (counted(in_flight=1.0), Expected(), "in flight at the end"),
        (counted(running=1.0), Expected(), "in flight at the end"),
        (counted(), Expected(cold=True), "answers from the cache (a cold run)"),
        (counted(), Expected(once=True, fetches=1), "fetched once each"),
        (counted(), Expected(hits=(0.5, 0.01)), "hit ratio, collapsed ones included"),
    ],
)
def test_each_unequal_sum_is_found(lie: Counters, expected: Expected, row: str) -> None:
    table = compare(THREE, 0, lie, expected)
    assert row in [each.name for each in table.rows if not each.holds]


def test_a_request_of_unknown_outcome_widens_the_sums_by_one() -> None:
    """A timeout may have been counted by the proxy or not; two more requests than the client's are a difference."""
    lost = record(9, 10, error="timeout", status=0)
    for extra, holds in ((0.0, True), (1.0, True), (2.0, False)):
        table = compare([*THREE, lost], 0, counted(proxy={"requests": 3.0 + extra}), Expected())
        assert next(each for each in table.rows if each.name == "requests").holds is holds


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"cpu_percent": 81.0}, "81 % of a core"),
        ({"lag": 0.011}, "11.0 ms late"),
        ({"all_spawned": False, "users_most": 240}, "only 240 of 256 users"),
        ({"answers": 0}, "no answer"),
    ],
)
def test_a_generator_at_its_limit_cannot_be_trusted(changed: dict[str, Any], reason: str) -> None:
    fine: dict[str, Any] = {"users_wanted": 256, "users_most": 256, "all_spawned": True, "cpu_percent": 79.0,
                            "lag": 0.009, "answers": 5}  # fmt: skip
    assert reasons(Conduct(**fine)) == []
    (found,) = reasons(Conduct(**fine | changed))
    assert reason in found


# -- prefix cache and replicas


def test_cached_tokens_are_expected_between_what_must_and_what_may_be_shared() -> None:
    """Of each group and replica: a request after another one's first token must find the prefix, one after another
    one's start may. A prefix is shared in whole pages."""
    shared = SharedPrefix({0: 70, 1: 31}, page=32)  # 64 tokens of group 0 are whole pages, none of group 1
    first = record(0, 4, 2, 4, number=0, replica="a")
    beside = record(1, 4, 3, 4, number=2, replica="a")  # started before any first token
    after = record(3, 6, 5, 6, number=4, replica="a")
    elsewhere = record(4, 7, 6, 7, number=6, replica="b")  # the first at its replica
    hit = record(5, 6, 6, number=8, replica="", cache="hit")  # of the response cache: the model computed nothing
    failed = record(6, 7, number=10, replica="a", error="timeout")
    other = record(7, 9, 8, 9, number=1, replica="a")
    everything = [first, beside, after, elsewhere, hit, failed, other]
    assert expected_cached(everything, shared, lambda each: each.number % 2) == (64, 128)


def test_a_prefix_run_shows_its_cached_tokens_beside_the_expected_ones() -> None:
    run = trial("prefix", prefix_groups=2)
    run.began, run.full, run.stopped = 0, 0, 50
    run.shared = SharedPrefix({0: 70, 1: 70}, page=32)
    run.records = [record(at, at + 2, at + 1, at + 2, scenario="prefix", number=at, cached_tokens=64 * (at > 3),
                          replica="b" if at % 4 == 1 else "a") for at in range(0, 16, 4)]  # fmt: skip
    result = summary.summarize(run, compare(run.records, 0, Counters(), Expected()))
    assert result["results"]["prefix"]["prefix"] == {
        "cached_tokens": 192, "expected_least": 192, "expected_most": 192,
    }  # fmt: skip
    assert "192 prompt tokens from the prefix cache, expected 192 to 192\n" in summary.markdown(result)
    run.records[3].cached_tokens = 0
    result = summary.summarize(run, compare(run.records, 0, Counters(), Expected()))
    assert "128 prompt tokens from the prefix cache, expected 192 to 192: fewer" in summary.markdown(result)


def test_answers_are_counted_by_replica_in_the_summary_and_each_second(tmp_path: Path) -> None:
    """Hits come from no replica."""
    run = trial()
    now = time.perf_counter()
    run.began, run.full, run.stopped = now - 9, now - 9, now
    replicas = ["a", "b", "a", ""]
    run.records = [record(now - 5, now - 0.1, now - 1, now - 0.1, replica=each) for each in replicas]
    result = summary.summarize(run, compare(run.records, 0, Counters(), Expected()))
    assert result["results"]["throughput"]["replicas"] == {"a": 2, "b": 1}
    assert "answers by replica: a 2, b 1" in summary.markdown(result)
    moments = [summary.moment(run, Counters()) for _ in range(2)]
    assert moments[0]["replicas"] == {"a": 2, "b": 1}
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(each) + "\n" for each in moments))
    assert "Answers of each replica of the model: a ends at 2 /s; b ends at 1 /s" in html.page(result, tmp_path)


# -- whole runs


def test_a_run_leaves_its_figures_and_what_ran_but_not_the_key(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question another one, every answer counted once: in the summary, Locust's tables and the files."""
    server = serve()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # the load goes to its target directly
    run = load_until(lambda: len(server.asked) > 30, "throughput", server.url, tmp_path, users=3, spawn_rate=100,
                     api_key="sk-very-secret", seed=7)  # fmt: skip
    assert run.code in {0, NOT_TRUSTED}, run.output  # on a busy machine the generator may be at its limit
    told = run.summary
    result = told["results"]["throughput"]
    assert result["errors"] == {}
    assert result["states"] == {"none": result["answers"]}
    # An unfinished request may have been stopped before it reached the server.
    assert len(set(server.asked)) == len(server.asked)
    assert result["answers"] <= len(server.asked) <= result["answers"] + told["unfinished"]
    rows = {row["Type"] or row["Name"]: row for row in run.rows("locust_stats.csv")}
    assert {"POST", "TTFT"} < set(rows)
    assert rows["Aggregated"]["Request Count"] == rows["POST"]["Request Count"] == str(result["answers"])
    records = run.records
    assert len(records) == result["answers"]
    assert {each["completion_tokens"] for each in records} == {server.tokens}
    assert (run.folder / "report.html").read_text().startswith("<!doctype html>")
    assert "coordinated omission" in run.output
    workload = (run.folder / "workload-throughput.jsonl").read_bytes()
    assert hashlib.sha256(workload).hexdigest() == result["workload"]["sha256"]
    assert result["workload"]["sha256"] in run.output

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
    """One user, a perfect cache: exactly the hits of these draws, and about those of theory. The run ends when the
    workload is used up."""
    server = serve(caches=True)
    run = load(
        "caching", server.url, tmp_path, users=1, prompts=40, zipf_exponent=1, seed=5, requests=200, seconds=LONG
    )
    assert run.code in {0, NOT_TRUSTED}, run.output
    result = run.summary["results"]["caching"]
    ratio = result["hit_ratio"]
    assert result["answers"] == 200
    assert ratio["measured"] == ratio["perfect"] == 1 - len(server.stored) / 200
    assert abs(ratio["measured"] - ratio["expected"]) <= 4 * ratio["expected_deviation"]
    for state in ("hit", "miss"):
        assert result["by_cache"][state]["ttft_seconds"]["count"] <= result["states"][state]
    zipf = Zipf(40, 1, seed=5)
    assert [each["question"] for each in run.records] == [zipf.draw() for _ in range(200)], "the seed alone decides"


def test_several_processes_share_the_workload_and_merge_their_records(serve: Any, tmp_path: Path) -> None:
    server = serve(caches=True)
    run = load("throughput", server.url, tmp_path, users=2, processes=2, requests=60, seconds=LONG)
    assert run.code in {0, NOT_TRUSTED}, run.output
    assert sorted(each["number"] for each in run.records) == list(range(60)), "each request by one process"
    assert len(set(server.asked)) == len(server.asked) == 60
    assert run.summary["unfinished"] == 0


def test_workers_elsewhere_send_what_the_master_says(serve: Any, tmp_path: Path) -> None:
    """The page's run goes to the workers with its settings and its one salt; each request is sent by one of them, and
    the master reports all records."""
    server, port, own = serve(caches=True), free_port(), free_port()
    env = {"LOAD_HOST": server.url, "LOAD_PORT": str(port), "LOAD_RUNS_DIR": str(tmp_path / "runs"),
           "LOAD_WORKERS": "2", "LOAD_MASTER_PORT": str(own)}  # fmt: skip
    with (
        process("load", python("lab_load", "web"), port=port, log_dir=tmp_path, env=env, ready="/") as page,
        httpx2.Client(event_hooks=SHOWN_ON_FAILURE, timeout=60, base_url=page.url) as http,
    ):
        workers = [begin("worker", server.url, tmp_path, master_host="127.0.0.1", master_port=own) for _ in range(2)]
        try:
            eventually(lambda: len(http.get("/stats/requests").json().get("workers", [])) == 2, what="both workers")
            form = {"user_count": "2", "spawn_rate": "10", "run_time": "1h", "host": server.url}
            asked = {"user_classes": "Throughput", "prompt_words": "7", "max_tokens": "3"}
            assert http.post("/swarm", data=form | asked).json()["success"]
            eventually(lambda: len(server.asked) >= 40, what="enough requests")
            http.get("/stop")
            eventually(lambda: list((tmp_path / "runs").glob("throughput-*/report.html")), what="the run's report")
        finally:
            for worker in workers:
                worker.terminate()
                worker.communicate(timeout=60)
    run = Run(0, "", next((tmp_path / "runs").glob("*-*")))
    told = run.summary
    assert (told["users"], told["generator"]["processes"], told["settings"]["prompt_words"]) == (2, 2, 7)
    assert len(run.records) + told["unfinished"] == len(server.asked)
    numbers = [each["number"] for each in run.records]
    assert len(set(numbers)) == len(numbers), "each request by one worker"
    assert {number % 2 for number in numbers} == {0, 1}, "both sent"
    assert {text.partition("-")[0] for text in server.asked} == {told["settings"]["salt"]}


def test_times_of_another_machine_become_the_masters() -> None:
    """By the difference of both clocks; latencies stay. Two readings of one clock change nothing."""
    theirs = record(100.0, 102.0, 100.5, 101.0)
    for shift, began in ((60.0, 160.0), (-0.0005, 100.0)):
        merged = trial()
        merged.merge("w", {"records": [theirs.to_wire()], "sent": 3, "cpu": 5.0, "clock": 1000.0 + shift}, 1000.0)
        (one,) = merged.records
        assert one.started == one.intended == began
        assert (one.ttft, one.gaps, one.seconds) == (theirs.ttft, theirs.gaps, theirs.seconds)
        assert (merged.sent, merged.cpu_most) == (3, 5.0)


def test_an_open_loop_counts_from_the_intended_start(serve: Any, tmp_path: Path) -> None:
    """All requests of the schedule are sent, answers or none, and lag is the difference of both starts."""
    server = serve(tokens=1)
    run = load("throughput", server.url, tmp_path, rate=40, seconds=2, seed=3)
    times = arrivals(40, 2, shape="constant", burstiness=1, seed=3)
    assert run.code in {0, NOT_TRUSTED}, run.output
    records = run.records
    assert run.summary["loop"] == "open"
    assert len(server.asked) == len(records) + run.summary["unfinished"]
    assert len(records) == len(times)
    began = records[0]["intended"] - times[0]
    assert [each["intended"] - began for each in records] == pytest.approx(times[: len(records)], abs=1e-4)
    assert all(each["ttft"] >= each["first_event"] - each["started"] for each in records)


def test_users_that_were_never_all_there_are_a_reason_and_no_figure(serve: Any, tmp_path: Path) -> None:
    run = load("throughput", serve(tokens=1).url, tmp_path, users=64, spawn_rate=8, seconds=2, think_seconds=1)
    assert run.code == NOT_TRUSTED, run.output
    assert "of 64 users were started" in run.output
    assert "TTFT)" not in run.output
    assert run.summary["trusted"] is False
    assert 0 < run.summary["users"] < 64


def test_each_run_has_a_salt_of_its_own_unless_one_is_set() -> None:
    """So that the cache is cold for it."""
    assert trial().salt != trial().salt
    assert trial(salt="again").salt == "again"
    item = trial().workloads["throughput"].items[3]
    assert item.payload("a", MODEL) != item.payload("b", MODEL)


@dataclass
class Failed:
    """A run against a server that fails: the run, and what was counted for each of the failures."""

    run: Run
    server: Server
    users: int

    def errors(self, failure: str) -> list[dict[str, Any]]:
        """The records whose question the server failed in this way."""
        settings = self.run.summary["settings"]
        texts = {
            each["question"]: question(settings["seed"], settings["salt"], each["question"], settings["prompt_words"])
            for each in self.run.records
        }
        return [each for each in self.run.records if self.server.failed[texts[each["question"]]] == failure]


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
    assert result["metrics"]["end_to_end_seconds"]["count"] == result["steady"], "failures have their time, too"
    assert f"{result['errors'][kind]} × {kind}" in run.output
    assert any(kind in row["Error"] for row in run.rows("locust_failures.csv"))


def test_a_token_is_taken_as_it_comes(failed: dict[str, Failed]) -> None:
    """Of an answer that falls silent the first token has its time: nothing on the way waits for more of it."""
    assert all(row["first_event"] for row in failed["stall"].errors("stall"))
    assert not any(row["first_event"] for row in failed["hang"].errors("hang"))


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


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_is_its_seed(name: str) -> None:
    """Same numbers, same SHA-256; another seed, another one. Korean and English differ."""
    shape = Shape(requests=12, ttl_seconds=5)
    made = WORKLOADS[name](shape)
    assert made.sha256 == WORKLOADS[name](shape).sha256
    assert made.sha256 != WORKLOADS[name](replace(shape, seed=2)).sha256
    assert made.sha256 != WORKLOADS[name](replace(shape, language="both")).sha256
    assert [item.number for item in made.items] == list(range(len(made.items)))


def test_expected_hit_ratios_with_a_ttl_and_a_capacity_are_those_of_a_simulated_cache() -> None:
    zipf, draws, rate, ttl, capacity = Zipf(60, 0.9, seed=2), 40_000, 10.0, 4.0, 12
    gaps = random.Random(4)
    now, hits, stored = 0.0, 0, dict[int, float]()
    recent: list[int] = []
    kept = 0
    for _ in range(draws):
        now += gaps.expovariate(rate)
        drawn = zipf.draw()
        if now < stored.get(drawn, -1.0):
            hits += 1
        else:
            stored[drawn] = now + ttl
        if drawn in recent:
            kept += 1
            recent.remove(drawn)
        recent = [*recent, drawn][-capacity:]
    assert zipf.ttl_hit_ratio(rate, ttl) == pytest.approx(hits / draws, abs=0.02)
    assert zipf.lru_hit_ratio(capacity) == pytest.approx(kept / draws, abs=0.02)


@pytest.mark.parametrize("shape", ["constant", "ramp", "spike", "diurnal"])
def test_arrivals_keep_their_rate_and_shape(shape: str) -> None:
    """Number within four standard deviations; even gaps where burstiness is 0; the spike is in the middle."""
    mean = {"constant": 1.0, "ramp": 0.5, "spike": 1.3, "diurnal": 1.0}[shape]
    times = arrivals(20, 200, shape=shape, burstiness=1, seed=1)
    assert times == sorted(times)
    assert abs(len(times) - 4000 * mean) < 4 * math.sqrt(4000 * mean)
    if shape == "spike":
        assert sum(90 <= each < 110 for each in times) > 4 * sum(60 <= each < 80 for each in times) * 0.8
    if shape == "constant":
        even = arrivals(20, 5, shape=shape, burstiness=0, seed=1)
        assert [b - a for a, b in itertools.pairwise(even)] == pytest.approx([0.05] * (len(even) - 1))
        bursty = arrivals(20, 200, shape=shape, burstiness=4, seed=1)
        deviation = statistics.pvariance([b - a for a, b in itertools.pairwise(bursty)]) * 400
        assert 3 < deviation < 5, "squared coefficient of variation"


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
