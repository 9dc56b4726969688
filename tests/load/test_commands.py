"""Commands made of several runs, and the API that starts one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_load import begin, finish
from fixtures_proxy import Bench, bench_on
from lab_load.commands.calibrate import mock, times
from lab_load.commands.faults import recovery
from lab_load.commands.knee import Step, rises, stop_reason
from lab_load.reports.compare import bootstrap, differences
from lab_load.settings import Settings
from processes import SHOWN_ON_FAILURE, Process, eventually, free_port, process, python


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


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
    assert http.post("/runs", json=asked, headers={"origin": "https://elsewhere.example"}).status_code == 403
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
    run = finish(begin("api", "http://127.0.0.1:1", tmp_path, web_host="0.0.0.0"), tmp_path)
    assert run.code == 2
    assert "LOAD_ADMIN_KEY" in run.output
