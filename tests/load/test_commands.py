"""Commands made of several runs, and the API that starts one."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import httpx2
import pytest
from fixtures_load import begin, finish
from fixtures_proxy import Bench, bench_on
from lab_load.__main__ import main
from lab_load.commands import faults, runs, table
from lab_load.commands.calibrate import mock, times
from lab_load.commands.faults import Container, recovery, service_of
from lab_load.commands.knee import Step, rises, stop_reason
from lab_load.generator.target import TargetError, examine
from lab_load.measures.histogram import Times
from lab_load.measures.sums import Sum
from lab_load.reports.compare import bootstrap, differences
from lab_load.settings import Settings
from processes import SHOWN_ON_FAILURE, Process, eventually, free_port, process, python


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


# -- what a command says of what it cannot do


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["nothing"], (2, "there is no workload or command nothing: throughput, ")),
        (["throughput", "5"], (2, "throughput takes no arguments")),
        (["calibrate", "many"], (2, "the number of requests of each kind of stream, not many")),
        (["table", "soon"], (2, "a whole number, not soon")),
        (["compare", "", ""], (2, "at least one run on each side")),
        (["compare", "a", "b"], (2, "a is not the folder of a finished run")),
        (["report"], (2, "contains no finished run")),
        (["faults"], (2, "no lab is running here")),
        (["faults", "redis=1"], (3, "nothing answers at http://127.0.0.1:1")),
        (["knee"], (3, "nothing answers at http://127.0.0.1:1")),
        (["table", "1"], (3, "nothing answers at http://127.0.0.1:1")),
    ],
)
def test_a_command_that_cannot_run_says_why_in_a_line(
    arguments: list[str],
    end: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOAD_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("LOAD_RUNS_DIR", str(tmp_path))
    code, shown = end
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("load: ")
    assert shown in line


def test_a_refused_key_is_named(tmp_path: Path) -> None:
    """By the API, which refuses a key as the proxy does."""
    port = free_port()
    env = {"LOAD_API_PORT": str(port), "LOAD_ADMIN_KEY": "sk-admin", "LOAD_RUNS_DIR": str(tmp_path)}
    with (
        process("api", python("lab_load", "api"), port=port, log_dir=tmp_path, env=env) as refusing,
        pytest.raises(TargetError, match=r"does not accept the key \(status 401\): LOAD_API_KEY"),
    ):
        examine(Settings(host=refusing.url, api_key="sk-wrong"))


# -- comparison


def values(mean: float, seed: int, count: int = 200) -> dict[int, float]:
    """Times of the same requests: each has a length of its own, each run some noise."""
    noise = random.Random(seed)
    return {number: mean * (1 + number % 7) + noise.gauss(0, 0.01) for number in range(count)}


def test_a_slower_group_is_found_and_an_equal_one_is_undecided() -> None:
    a, b = [values(1.0, seed) for seed in (1, 2, 3)], [values(1.0, seed) for seed in (4, 5, 6)]
    slower = [values(1.02, seed) for seed in (7, 8, 9)]
    numbers = list(range(200))
    assert bootstrap("e2e", a, b, numbers).verdict == "undecided"
    assert bootstrap("e2e", a, slower, numbers).verdict == "B is slower"
    assert bootstrap("e2e", slower, a, numbers).verdict == "B is faster"
    assert bootstrap("e2e", a[:1], slower[:1], numbers).verdict == "undecided: 1 of 3 runs on each side"


def a_run(folder: Path, sha: str, seconds: float) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"results": {"throughput": {"workload": {"sha256": sha}}}}))
    record = {"steady": True, "error": "", "abandoned": False, "ttft": seconds, "e2e": seconds, "tpot": None}
    (folder / "records.jsonl").write_text("".join(json.dumps(record | {"number": n}) + "\n" for n in range(20)))
    return folder


def test_runs_of_different_workloads_are_not_compared(tmp_path: Path) -> None:
    a, b, other = a_run(tmp_path / "a", "1", 1), a_run(tmp_path / "b", "1", 2), a_run(tmp_path / "c", "2", 2)
    assert [each.median for each in differences([a], [b])] == [1, 1]
    with pytest.raises(ValueError, match="SHA-256"):
        differences([a], [other])
    with pytest.raises(ValueError, match="not the folder of a finished run"):
        differences([a], [tmp_path])


# -- the knee


def test_a_growing_queue_is_a_significant_slope() -> None:
    noise = random.Random(1)
    flat = [(x / 10, 1 + noise.gauss(0, 0.2)) for x in range(200)]
    grows = [(x, y + 0.1 * x) for x, y in flat]
    assert not rises(flat)
    assert rises(grows)
    assert not rises([(x, y + 0.001 * x) for x, y in flat]), "significant or not, it does not matter"


def test_the_search_stops_where_goodput_falls_or_ttft_rises() -> None:
    fine = Step(1, 1, 0.1, rising=False, trusted=True, failed=0)
    assert stop_reason([fine]) == ""
    assert "goodput fell" in stop_reason([fine, Step(2, 0.8, 0.1, rising=False, trusted=True, failed=0)])
    assert "TTFT rises" in stop_reason([fine, Step(2, 2, 0.1, rising=True, trusted=True, failed=0)])
    assert "generator" in stop_reason([Step(1, 1, 0.1, rising=False, trusted=False, failed=0)])


def test_recovery_is_from_the_first_failure_to_the_success_after_the_last() -> None:
    def record(started: float, error: str = "") -> dict[str, Any]:
        return {"started": started, "ended": started + 1, "error": error}

    assert recovery([record(0), record(1)]) == (0, True)
    assert recovery([record(0), record(2, "x"), record(3), record(4, "x"), record(7)]) == (6, True)
    assert recovery([record(0), record(2, "x")])[1] is False


# -- faults


def test_a_restarted_proxy_does_not_look_like_a_lost_charge(tmp_path: Path) -> None:
    """Its counters begin again at 0; the ledger lacks nothing. Less in the ledger than at the client is a loss."""
    (tmp_path / "records.jsonl").write_text(json.dumps({"started": 0, "ended": 1, "error": ""}) + "\n")
    figures = {"answers": 3, "failed": 1, "errors": {"reset": 1}}
    for ledger, holds in ((21, True), (20, False)):
        reset = {"client": 21.0, "proxy": -7.0, "ledger": ledger}
        rows = [Sum("prompt tokens: upstream", reset, 21, math.inf), Sum("requests", {"client": 3, "proxy": -3}, 3, 4)]
        written = json.loads(json.dumps({"rows": [row.as_dict() for row in rows]}, allow_nan=False))
        done = runs.Run(1, "", {"results": {"caching": figures}, "sums": written}, tmp_path)
        assert faults.outcome("proxy restarted", done).ledger_holds is holds


@pytest.mark.parametrize("argument", ["redis", "redis=", "redis=container:", "redis=x", "ui=3", "model=docker:3"])
def test_a_service_is_a_process_or_a_container(argument: str) -> None:
    assert service_of("redis=12") == ("redis", faults.Process(12))
    assert service_of("model=container:0af") == ("model", Container("0af"))
    with pytest.raises(ValueError, match="faults takes redis, proxy, model"):
        service_of(argument)


def test_a_fault_of_a_container_is_what_docker_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in docker's place writes down its arguments and lists two replicas; the one of the model under load is
    found."""
    title = "ray::ServeReplica:{0}:{0}"
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\necho "$1 $2" >>{tmp_path}/asked\n[ "$1" = exec ] && [ $# -eq 5 ] || exit 0\n'
        f'echo "7 python -m lab_model"; echo "8 {title.format("all-minilm")}"; echo "9 {title.format("smollm2")}"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    container = Container("0af")
    container.pause(0)
    container.restart()
    assert container.replica("smollm2") == 9
    assert container.replica("llama") is None
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["pause 0af", "unpause 0af", "restart 0af", "exec 0af", "exec 0af"]
    (tmp_path / "docker").write_text("#!/bin/sh\necho 'No such container: 0af' >&2; exit 1\n")
    with pytest.raises(ValueError, match="docker restart: No such container: 0af"):
        container.restart()


def test_a_paused_process_goes_on(tmp_path: Path) -> None:
    """Also where the pause itself is interrupted."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
        with pytest.raises(ValueError, match="length"):
            faults.Process(popen.pid).pause(-1)
        popen.communicate(b"\n", timeout=60)
    assert popen.returncode == 0


def test_redis_paused_under_load_fails_no_request_and_loses_no_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole fault: the run, the pause in it, and the ledger afterwards."""
    monkeypatch.setattr(faults, "BEFORE_SECONDS", 3)  # Locust has started by then
    monkeypatch.setattr(faults, "PAUSE_SECONDS", 1)
    monkeypatch.setattr(faults, "LEAST_SECONDS", 1)
    for name, value in {"USERS": "2", "MAX_TOKENS": "4", "PROMPT_WORDS": "4", "THINK_SECONDS": "0.2"}.items():
        monkeypatch.setenv(f"LOAD_{name}", value)
    with bench_on(tmp_path, short_timeouts=False) as bench:
        settings = Settings(host=bench.proxy.url, runs_dir=tmp_path / "runs", seconds=6)
        assert faults.main(settings, [f"redis={bench.redis.popen.pid}"]) == 0
    (found,) = json.loads((tmp_path / "runs/faults.json").read_text())
    assert (found["failed"], found["ledger_holds"]) == (0, True)
    assert found["answers"] > 0


# -- the table


def test_the_table_leaves_a_picture_and_markdown_for_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eighteen runs, whose figures are given here: cache on and off in turns. One that cannot be trusted has none."""
    asked: list[dict[str, Any]] = []

    def run(_workload: str, _settings: Settings, **changed: Any) -> runs.Run:
        asked.append(changed)
        cache, trusted = changed["cache"], (changed["cache"], changed["zipf_exponent"]) != (False, 1.2)
        times = {"ttft_seconds": Times([0.001 if cache else 0.2]).figures()}
        figures = {
            "requests_per_second": 30 if cache else 4, "output_tokens_per_second": 100.0,
            "hit_ratio": {"with_collapsed": 0.75, "expected": 0.7}, "by_cache": {"hit" if cache else "other": times},
            "metrics": times | {"end_to_end_seconds": {"mean": 0.5}},
        }  # fmt: skip
        result = {
            "target": {"model": "smollm2"},
            "trusted": trusted,
            "reasons": ["too busy"],
            "results": {"caching": figures},
        }
        return runs.Run(0 if trusted else 5, "", result, tmp_path)

    monkeypatch.setattr(runs, "run", run)
    assert table.main(Settings(runs_dir=tmp_path), ["2"]) == 5
    assert [each["cache"] for each in asked] == [True, False] * 9
    assert {each["seed"] for each in asked} == {1, 2, 3}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| 0.6 | on | 30.00 (30.00–30.00) | 100.00 (100.00–100.00) | 0.750 | 0.700 | 1.0 | – | 500 |" in lines
    assert "| 0.6 | off | 4.00 (4.00–4.00) | 100.00 (100.00–100.00) | – | – | – | 200.1 | 500 |" in lines
    assert "| 1.2 | off | not trusted | – | – | – | – | – | – |" in lines
    picture = ET.parse(tmp_path / "table.svg").getroot()  # noqa: S314 our own
    assert "s = 0.9: cache off 4, cache on 30; s = 1.2: cache on 30" in picture.attrib["aria-label"]
    assert "run 6 of 18: s = 1.2, cache off: not trusted: too busy, exit code 5" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a whole number, not soon"):
        table.main(Settings(runs_dir=tmp_path), ["soon"])


# -- calibration


@pytest.mark.parametrize("kind", ["role", "split", "reset"])
def test_the_generator_sees_what_the_mock_sent(kind: str, tmp_path: Path) -> None:
    """No time is asserted: TTFT is of the event that the mock wrote down as the first, which a frame sent at once with
    the role, or an event cut inside a character, would hide."""
    lines, problem = times(Settings(runs_dir=tmp_path), kind, 6)
    assert problem == ""
    known = {line.metric: line for line in lines}
    if kind != "reset":
        assert set(known) == {"ttft", "e2e", "tpot"}
        # The role comes 50 ms before the first token: a clock that it stopped would be behind the mock's.
        assert all(line.measured >= line.known * 0.97 for line in lines if line.metric != "tpot")


def test_the_mock_is_a_server_of_models() -> None:
    with mock() as url:
        assert "plain" in [model["id"] for model in httpx2.get(f"{url}/v1/models").json()["data"]]


# -- the API


@pytest.fixture(scope="module")
def api(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder, port = tmp_path_factory.mktemp("api"), free_port()
    env = {"LOAD_HOST": running.proxy.url, "LOAD_API_PORT": str(port), "LOAD_RUNS_DIR": str(folder / "runs"),
           "LOAD_MAX_USERS": "9"}  # fmt: skip
    with process("api", python("lab_load", "api"), port=port, log_dir=folder, env=env) as started:
        yield started


@pytest.fixture
def http(api: Process) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api.url, timeout=60, event_hooks=SHOWN_ON_FAILURE) as client:
        yield client


def test_the_api_starts_one_run_and_shows_its_result(http: httpx2.Client) -> None:
    asked = {"workload": "throughput", "users": 2, "requests": 12, "seconds": 60, "max_tokens": 4, "prompt_words": 4}
    started = http.post("/runs", json=asked)
    assert started.status_code == 201, started.text
    assert http.post("/runs", json=asked).status_code == 409
    eventually(lambda: http.get("/runs/current").json()["state"] == "ended", what="the end of the run")
    current = http.get("/runs/current").json()
    assert current["code"] in {0, 5}, current["output"]
    summary = http.get(f"/runs/{current['name']}").json()
    assert summary["results"]["throughput"]["answers"] == 12
    assert http.get(f"/runs/{current['name']}/report.html").text.startswith("<!doctype html>")
    assert [run["name"] for run in http.get("/runs").json()["runs"]] == [current["name"]]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"workload": "nothing"}, "workload"),
        ({"workload": "caching", "users": 10}, "LOAD_MAX_USERS=9"),
        ({"workload": "caching", "host": "http://elsewhere.example"}, "host"),
        ({"workload": "caching", "seconds": "x"}, "LOAD_SECONDS"),
        ({"workload": "herd"}, "LOAD_TTL_SECONDS"),
    ],
)
def test_a_wrong_field_is_named(http: httpx2.Client, body: dict[str, Any], named: str) -> None:
    answer = http.post("/runs", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_strangers_start_nothing(http: httpx2.Client) -> None:
    asked = {"workload": "throughput"}
    foreign = http.post("/runs", json=asked, headers={"origin": "https://elsewhere.example"})
    assert (foreign.status_code, foreign.headers["connection"]) == (403, "close")
    assert http.post("/runs", json=asked, headers={"host": "rebound.example"}).status_code == 403
    assert http.post("/runs", content=b"workload=throughput", headers={"content-type": "text/plain"}).status_code == 415
    assert http.delete("/runs/current").status_code == 409
    assert http.get("/runs/../../etc/passwd").status_code == 404
    assert http.get("/health").status_code == 200


def test_the_admin_key_is_needed_where_one_is_set(tmp_path: Path) -> None:
    port = free_port()
    env = {"LOAD_API_PORT": str(port), "LOAD_ADMIN_KEY": "sk-admin", "LOAD_RUNS_DIR": str(tmp_path / "runs")}
    with process("api", python("lab_load", "api"), port=port, log_dir=tmp_path, env=env) as started:
        assert httpx2.get(f"{started.url}/runs").status_code == 401
        assert httpx2.get(f"{started.url}/runs", headers={"authorization": "Bearer sk-admin"}).json() == {"runs": []}


def test_the_api_listens_elsewhere_only_with_a_key(tmp_path: Path) -> None:
    """An empty key file, as compose.yaml gives where there is no key, is no key."""
    empty = tmp_path / "empty"
    empty.touch()
    elsewhere: dict[str, Any] = {"web_host": "0.0.0.0", "admin_key_file": empty}
    run = finish(begin("api", "http://127.0.0.1:1", tmp_path, **elsewhere), tmp_path)
    assert run.code == 2
    assert "LOAD_ADMIN_KEY" in run.output
    assert "LOAD_ALLOW_ANONYMOUS" in run.output


def test_anonymous_callers_from_elsewhere_use_a_name_that_is_allowed(tmp_path: Path) -> None:
    """As in compose.yaml: the service listens on all addresses, the ui calls it `load`. Foreign origins and rebound
    names are refused as on loopback."""
    port = free_port()
    env = {"LOAD_API_PORT": str(port), "LOAD_WEB_HOST": "0.0.0.0", "LOAD_ALLOW_ANONYMOUS": "true",
           "LOAD_ALLOWED_HOSTS": "lab.example", "LOAD_RUNS_DIR": str(tmp_path / "runs")}  # fmt: skip
    with process("api", python("lab_load", "api"), port=port, log_dir=tmp_path, env=env) as started:
        # Whoever calls by an address of this machine's network is not on loopback.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
            found.connect(("192.0.2.1", 9))  # sends nothing: it chooses the address that would be used
            address = found.getsockname()[0]
        for url in (started.url, f"http://{address}:{port}"):
            for host, status in {"load": 200, "lab.example": 200, "rebound.example": 403}.items():
                assert httpx2.get(f"{url}/runs", headers={"host": f"{host}:{port}"}).status_code == status
            foreign = {"host": "load", "origin": "https://elsewhere.example"}
            assert httpx2.get(f"{url}/runs", headers=foreign).status_code == 403


def test_a_key_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sk-admin\n")
    key = Settings(admin_key_file=tmp_path / "key").admin_key
    assert key is not None
    assert key.get_secret_value() == "sk-admin"
    monkeypatch.setenv("LOAD_ADMIN_KEY", "sk-other")
    with pytest.raises(ValueError, match="keep one"):
        Settings(admin_key_file=tmp_path / "key")
    monkeypatch.delenv("LOAD_ADMIN_KEY")
    with pytest.raises(ValueError, match="LOAD_ADMIN_KEY_FILE cannot be read"):
        Settings(admin_key_file=tmp_path / "none")
