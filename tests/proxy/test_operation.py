"""The proxy in operation: files that change, an end that callers hardly notice, metrics and spans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from collector import attributes, collecting
from fixtures_proxy import CHAT_MODEL, UPSTREAM_KEY, Bench, events, eventually, new, second, state
from lab_proxy import reload, tasks
from lab_proxy.http.pages.health import HealthPages
from processes import eventually_async
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from test_upstream import PACKAGED, routes_file

PRICES = PACKAGED.parents[1].joinpath("ledger/prices.yaml").read_text()


def alias(name: str) -> dict[str, Any]:
    return {"aliases": [{"name": name, "model": CHAT_MODEL}]}


def number(page: str, start: str) -> float:
    """The sum of the samples whose line begins with `start`."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(start))


# ---- files that change


@dataclass
class Filed:
    """A proxy whose routes, prices and key come from files that tests change."""

    bench: Bench
    folder: Path

    def routes(self, **changes: Any) -> None:
        routes_file(self.folder, **changes)

    def report(self, name: str = "routes") -> dict[str, Any]:
        told: dict[str, Any] = self.bench.http.get("/status").json()["proxy"]["files"][name]
        return told

    def hang_up(self) -> None:
        """Have all files read again, now."""
        before = self.report("prices")["generation"]
        self.bench.proxy.popen.send_signal(signal.SIGHUP)
        eventually(lambda: self.report("prices")["generation"] > before)


@pytest.fixture(scope="module")
def filing(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filed]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "key").write_text("sk-old\n")
    (folder / "prices.yaml").write_text(PRICES)
    with second(
        running,
        folder,
        paid="",
        openai_api_key_file=str(folder / "key"),
        openai_base_url=f"{running.paid.url}/v1",
        prices_file=str(folder / "prices.yaml"),
        routes_file=str(routes_file(folder)),
        workers="2",
    ) as started:
        yield Filed(started, folder)


@pytest.fixture
def filed(filing: Filed) -> Filed:
    """In use: a routes file with the alias `one`, and the packaged prices."""
    filing.routes(**alias("one"))
    (filing.folder / "prices.yaml").write_text(PRICES)
    filing.hang_up()
    assert not [name for name in ("routes", "prices") if "trouble" in filing.report(name)]
    filing.bench.forget()
    return filing


def test_a_changed_routes_file_is_in_use(filed: Filed) -> None:
    """Without a signal; what was decided about the same bytes before is decided anew."""
    text, other = new(), filed.bench
    assert other.chat(text, model="one").status_code == 200
    assert state(other.chat(text, model="one")) == "hit"
    before = filed.report()["generation"]
    filed.routes(**alias("two"))
    eventually(lambda: other.chat(text, model="two").status_code == 200)
    assert other.chat(text, model="one").status_code == 404
    assert filed.report()["generation"] > before
    assert "trouble" not in filed.report()


def test_a_removed_setting_is_named_at_the_start(filed: Filed) -> None:
    """One line of the log says that it is ignored, and what to use instead."""
    told = [line for line in filed.bench.proxy.log.read_text().splitlines() if "PROXY_WORKERS" in line]
    assert len(told) == 1
    assert "was removed, it is ignored" in told[0]
    assert "compose.scale.yaml" in told[0]


def test_sighup_reads_the_files_again(filed: Filed) -> None:
    """A key that was rotated in its file counts from then on; the process lives."""
    other, key = filed.bench, filed.folder / "key"
    assert other.chat().status_code == 200
    assert other.calls()["last"]["headers"]["authorization"] == "Bearer sk-old"
    before = key.stat()
    key.write_text("sk-new\n")
    os.utime(key, ns=(before.st_atime_ns, before.st_mtime_ns))  # looks as it did: only the signal tells
    filed.hang_up()
    assert other.chat().status_code == 200
    assert other.calls()["last"]["headers"]["authorization"] == "Bearer sk-new"
    log = other.proxy.log.read_text()
    assert "reloaded" in log
    assert "sk-new" not in log


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("prices", PRICES.replace("input: 0", "input: 5.0.0", 1)),
        ("prices", PRICES.replace("input: 0", "input: .inf", 1)),
        ("prices", PRICES + "# 2026-99-99\nwhen: 2026-99-99\n"),
        ("routes", "defaults: {openai: {/v1/embeddings: {user: 2026-01-01}}}"),
        ("routes", "defaults: {openai: {/v1/embeddings: {user: {1: 2}}}}"),
        ("routes", "defaults: {openai: {/v1/embeddings: {user: .nan}}}"),
        ("routes", "[" * 5000),
    ],
)
def test_whatever_a_file_holds_the_watcher_lives(filed: Filed, name: str, wrong: str) -> None:
    """A wrong value keeps the old file in use and is named on /status; a right file later is taken."""
    file = filed.folder / f"{name}.yaml"
    if wrong.startswith("defaults"):
        filed.routes(**yaml.safe_load(wrong))
    else:
        file.write_text(wrong)
    eventually(lambda: filed.report(name).get("trouble", "").startswith(f"PROXY_{name.upper()}_FILE"))
    assert filed.bench.chat(model="one").status_code == 200
    file.write_text(PRICES) if name == "prices" else filed.routes(**alias("two"))
    eventually(lambda: "trouble" not in filed.report(name))


@pytest.mark.parametrize("wrong", ["upstreams: [", "upstreams: {}\nroutes: []\n", "", None])
def test_a_wrong_file_keeps_the_old_one_and_says_so(filed: Filed, wrong: str | None) -> None:
    """In the log, on /status and in a metric. When it is mended it is in use, and the trouble is gone."""
    other, file = filed.bench, filed.folder / "routes.yaml"
    before = filed.report()["generation"]
    if wrong is None:
        file.unlink()
    else:
        file.write_text(wrong)
    filed.hang_up()
    assert filed.report()["trouble"].startswith("PROXY_ROUTES_FILE")
    assert filed.report()["generation"] == before
    page = other.http.get("/metrics").text
    assert number(page, 'lab_proxy_reload_failing{file="routes"}') == 1
    assert number(page, 'lab_proxy_reloads_total{file="routes",outcome="refused"}') >= 1
    assert "its previous content stays in use" in other.proxy.log.read_text()
    assert other.chat(model="one").status_code == 200
    filed.routes(**alias("two"))
    filed.hang_up()
    assert "trouble" not in filed.report()
    assert number(other.http.get("/metrics").text, 'lab_proxy_reload_failing{file="routes"}') == 0
    assert other.chat(model="two").status_code == 200


def test_a_wrong_file_is_noticed_and_refused_once(filed: Filed) -> None:
    """Not every second: the look that finds the price table wrong has nothing to say of the routes. Both are noticed
    when they are mended."""
    line = 'lab_proxy_reloads_total{file="routes",outcome="refused"}'
    before = number(filed.bench.http.get("/metrics").text, line)
    (filed.folder / "routes.yaml").unlink()
    eventually(lambda: "trouble" in filed.report())
    (filed.folder / "prices.yaml").write_text("prices: 3")
    eventually(lambda: "trouble" in filed.report("prices"))
    assert number(filed.bench.http.get("/metrics").text, line) == before + 1
    filed.routes()
    (filed.folder / "prices.yaml").write_text(PRICES)
    eventually(lambda: not any("trouble" in filed.report(name) for name in ("routes", "prices")))


class Text:
    """A file whose content counts, for a Reloader alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = path.read_text()

    def files(self) -> list[Path]:
        return [self.path]

    def reload(self) -> None:
        self.content = self.path.read_text()


class Watches:
    """Counts the watchers that have begun; the first `failing` of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int = 0) -> None:
        self.begun, self._failing, self._watch = 0, failing, reload.awatch
        monkeypatch.setattr(reload, "awatch", self.begin)

    def begin(self, *folders: Path, **settings: Any) -> AsyncGenerator[Any, None]:
        self.begun += 1
        if self.begun <= self._failing:
            raise OSError("no more watches")
        return self._watch(*folders, **settings)


@contextlib.asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Text]:
    text = Text(path)
    watching = reload.Reloader({"routes": text})
    await watching.start()
    try:
        yield text
    finally:
        await watching.stop()


async def test_a_configmap_that_changes_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes replaces the link `..data` beside the file, which is a link through it; then it deletes the folder of
    before. Seen more than once, and by events alone."""
    monkeypatch.setattr(reload, "LOOK_MS", 10**9)

    def swap(content: str) -> None:
        folder = tmp_path / f"..{content}"
        folder.mkdir()
        (folder / "routes.yaml").write_text(content)
        before = (tmp_path / "..data").resolve()
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        if before.name.startswith("..") and before.name != "..data":
            shutil.rmtree(before)

    swap("first")
    (tmp_path / "routes.yaml").symlink_to("..data/routes.yaml")
    watching = Watches(monkeypatch)
    async with watched(tmp_path / "routes.yaml") as text:
        for turn, content in enumerate(("second", "third"), 1):
            await eventually_async(lambda turn=turn: watching.begun >= turn)
            swap(content)
            await eventually_async(lambda content=content: text.content == content)


async def test_a_watcher_that_fails_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and what changed meanwhile is in use."""
    monkeypatch.setattr(tasks, "FIRST_PAUSE", 0.0)
    watching = Watches(monkeypatch, failing=2)
    (tmp_path / "routes.yaml").write_text("first")
    async with watched(tmp_path / "routes.yaml") as text:
        await eventually_async(lambda: watching.begun == 3)
        (tmp_path / "routes.yaml").write_text("the second")
        await eventually_async(lambda: text.content == "the second")
    told = [record.getMessage() for record in caplog.records]
    assert [text.startswith("task watch failed: OSError") for text in told[:2]] == [True, True]


async def test_a_task_that_fails_starts_again_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as failing until it has run for a while, and each failure counts."""
    monkeypatch.setattr(tasks, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(tasks, "STEADY_SECONDS", 0.0)
    steady, began = asyncio.Event(), []

    async def work() -> None:
        began.append(dict(tasks.failing))
        if len(began) < 3:
            raise ValueError("as asked")
        await steady.wait()

    task = tasks.supervise("a test", work)
    await eventually_async(lambda: len(began) == 3)
    assert [each.get("a test") for each in began] == [None, "ValueError", "ValueError"]
    assert tasks.failures.pop("a test") == 2
    await eventually_async(lambda: "a test" not in tasks.failing)
    await tasks.end(task)
    assert task.cancelled()


async def test_a_failing_task_degrades_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """/ready says degraded and names the task; the metrics count its failures."""

    class Up:
        enabled = up = True
        draining, in_flight = False, 0
        sent = b""

        async def ready(self) -> dict[str, Any]:
            return {"state": "up"}

        async def send(self, body: bytes, headers: Any, status: int = 200) -> None:
            self.sent = body

        def breaker_states(self) -> dict[str, bool]:
            return {}

    monkeypatch.setitem(tasks.failing, "keys", "KeyError")
    monkeypatch.setitem(tasks.failures, "keys", 3)
    up: Any = Up()
    pages = HealthPages(up, up, up, metrics=up, traffic=up, files=up)
    await pages.pages()["GET", "/ready"](up, up)
    assert json.loads(up.sent) == {"status": "degraded", "model": "up", "redis": "up", "failing_tasks": ["keys"]}
    assert pages.gauges()["task_failures"]["keys",] == 3.0


def test_requests_in_flight_keep_their_table(filed: Filed, bench: Bench) -> None:
    """A stream goes on although its upstream is no longer in the file; the next request is told so."""
    table = yaml.safe_load(PACKAGED.read_text())
    table["upstreams"]["extra"] = {"kind": "openai", "base_url": f"{bench.paid.url}/v1", "keyless": True}
    table["routes"].append({"upstream": "extra", "match": ["extra-*"]})
    filed.routes(**table)
    filed.hang_up()
    bench.control(bench.paid, held=True)
    with ThreadPoolExecutor() as callers:
        asking = callers.submit(filed.bench.chat, model="extra-mock", stream=True)
        eventually(lambda: bench.calls()["total"] == 1)
        filed.routes()
        filed.hang_up()
        assert filed.bench.chat(model="extra-mock").status_code == 404
        assert not asking.done()
        bench.control(bench.paid, held=False)
        assert events(asking.result())[-1] == "[DONE]"


# ---- the end


def test_sigterm_lets_answers_end(bench: Bench, tmp_path: Path) -> None:
    """While a stream ends: new work gets 503 and `connection: close`, an idle connection is closed, pages for those who
    watch go on answering. The stream ends with [DONE], the process with 0."""
    with second(bench, tmp_path) as other, socket.create_connection(("127.0.0.1", other.proxy.port), 60) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += idle.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        bench.control(bench.paid, held=True)
        with ThreadPoolExecutor() as callers:
            asking = callers.submit(other.chat, stream=True)
            eventually(lambda: bench.calls()["total"] == 1)
            os.killpg(other.proxy.popen.pid, signal.SIGTERM)
            assert idle.recv(1000) == b""
            refused = httpx2.post(f"{other.proxy.url}/v1/chat/completions", json={})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            for path, status in (("/v1/models", 503), ("/ready", 503), ("/health", 200), ("/metrics", 200)):
                page = httpx2.get(other.proxy.url + path)
                assert page.status_code == status
                assert page.headers["connection"] == "close"
                assert path != "/ready" or page.json()["status"] == "draining"
                assert path != "/metrics" or "lab_proxy_draining 1.0" in page.text
            bench.control(bench.paid, held=False)
            assert events(asking.result())[-1] == "[DONE]"
        assert other.proxy.popen.wait(60) == 0


def test_sigterm_ends_within_its_bound(bench: Bench, tmp_path: Path) -> None:
    """A stream that does not end is cut when PROXY_DRAIN_TIMEOUT_SECONDS are over, upstream too; a collector of spans
    that is away holds up neither requests nor the end."""
    asked = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with (
        second(bench, tmp_path, drain_timeout_seconds="0", otlp_endpoint="http://127.0.0.1:9") as other,
        socket.create_connection(("127.0.0.1", other.proxy.port), timeout=60) as caller,
    ):
        text = new()
        assert other.chat(text).status_code == 200
        caller.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert caller.recv(12) == b"HTTP/1.1 200"
        assert (bench.calls()["total"], bench.calls()["left"]) == (2, 0)
        os.killpg(other.proxy.popen.pid, signal.SIGTERM)
        assert other.proxy.popen.wait(60) == 0
        eventually(lambda: bench.calls()["left"] == 1)
        log = other.proxy.log.read_text()
        assert "cut off after PROXY_DRAIN_TIMEOUT_SECONDS" in log
        assert text not in log


# ---- metrics


def test_metrics_tell_of_times_and_states(bench: Bench) -> None:
    """The upstream's time apart from the proxy's own; redis, breakers, the end, and the files that are in use."""
    labels = f'{{cache="miss",model="{CHAT_MODEL}",route="/v1/chat/completions"}}'

    def count() -> float:
        return number(bench.http.get("/metrics").text, f"lab_proxy_request_seconds_count{labels}")

    before = count()
    bench.control(delay=0.05)
    answer = bench.chat(model=CHAT_MODEL)
    assert answer.status_code == 200
    eventually(lambda: count() == before + 1)
    page = bench.http.get("/metrics").text
    whole, upstream, own = (
        number(page, f"lab_proxy_{name}_seconds_sum{labels}") for name in ("request", "upstream", "overhead")
    )
    assert upstream > 0.05
    assert own > 0
    assert own == pytest.approx(whole - upstream)
    assert "lab_proxy_redis_up 1.0" in page
    assert f'lab_proxy_breaker_open{{upstream="model/{CHAT_MODEL}"}} 0.0' in page
    assert "lab_proxy_draining 0.0" in page
    assert 'lab_proxy_generation{file="routes"} 1.0' in page


def test_metrics_tell_of_cost(bench: Bench) -> None:
    """What upstream calls cost, by model; a hit costs nothing."""
    labels = '{model="gpt-4o-mini",upstream="openai"}'

    def cost() -> float:
        return number(bench.http.get("/metrics").text, f"lab_proxy_cost_usd_total{labels}")

    before, text = cost(), new()
    used = bench.chat(text, model="gpt-4o-mini").json()["usage"]
    assert bench.chat(text, model="gpt-4o-mini").headers["cache-status"].startswith("llm-lab; hit")
    paid = (0.15 * used["prompt_tokens"] + 0.6 * used["completion_tokens"]) / 1e6
    assert cost() - before == pytest.approx(paid)


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
    assert found[0].value > 0


# ---- spans


def test_spans_tell_of_a_request_and_its_calls(bench: Bench, tmp_path: Path) -> None:
    """GenAI attributes; a retry is a span of its own below the request's; nothing that was asked, answered or a key."""
    secret = new()
    with collecting() as collector:
        with second(bench, tmp_path, otlp_endpoint=collector.url) as other:
            bench.control(bench.paid, script=[503])
            request_id = other.chat(secret).headers["x-request-id"]
            other.chat(secret)
            other.chat(model="gpt-mock-401")
        eventually(lambda: len(collector.spans) == 6)  # at the end, at the latest, all are sent
        spans = collector.of("proxy")
        roots = [span for span in spans if not span.parent_span_id]
        miss, hit, refused = sorted(roots, key=lambda span: span.start_time_unix_nano)
        told = attributes(miss)
        assert miss.name == "chat gpt-mock"
        assert told["gen_ai.operation.name"] == "chat"
        assert told["gen_ai.provider.name"] == "openai"
        assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "gpt-mock"
        assert told["gen_ai.usage.input_tokens"] == 2
        assert told["gen_ai.usage.output_tokens"] > 0
        assert told["lab.request_id"] == request_id
        below = [attributes(span) for span in spans if span.parent_span_id == miss.span_id]
        assert sorted(each["lab.outcome"] for each in below) == ["failed", "ok"]
        assert (attributes(hit)["lab.cache"], [s for s in spans if s.parent_span_id == hit.span_id]) == ("hit", [])
        assert attributes(refused)["error.type"] == "upstream_key_refused"
        everything = str(spans)
        for hidden in (secret, UPSTREAM_KEY, "You said"):
            assert hidden not in everything


def test_a_trace_goes_through_to_the_model_and_to_no_paid_upstream(bench: Bench, tmp_path: Path) -> None:
    """The caller's traceparent is continued: the model's is that of the call's span. A malformed one is ignored."""
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collecting() as collector:
        with second(bench, tmp_path, otlp_endpoint=collector.url) as other:
            for header in (f"00-{trace}-{caller}-01", f"00-{'0' * 32}-{caller}-01"):
                other.chat(model=CHAT_MODEL, headers={"traceparent": header})
            other.chat(headers={"traceparent": f"00-{trace}-{caller}-01"})
            assert "traceparent" not in bench.calls(bench.paid)["last"]["headers"]
            _, malformed, span, _ = bench.calls(bench.model)["last"]["headers"]["traceparent"].split("-")
        eventually(lambda: len(collector.spans) == 6)
        spans = collector.of("proxy")
    assert {each.trace_id.hex() for each in spans} == {trace, malformed}
    assert malformed != trace
    (call,) = [each for each in spans if each.span_id.hex() == span]
    assert call.trace_id.hex() == malformed
    assert [each.parent_span_id.hex() for each in spans].count(caller) == 2
