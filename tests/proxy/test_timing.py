"""GET /v1/requests/{id}/timing and GET /v1/prices: phases that follow each other, for their own tenant alone."""

import threading
from typing import Any

import pytest
from fixtures_proxy import CHAT_MODEL, Bench, new
from lab_proxy.telemetry.record import RequestRecord, UpstreamCall
from lab_proxy.telemetry.timing import KEPT, Timings, phases, with_model
from processes import eventually

CHAT = {"model": "gpt-mock", "messages": [{"role": "user", "content": "timing"}], "temperature": 0}


def timing(bench: Bench, id_: str) -> Any:
    answer = bench.http.get(f"/v1/requests/{id_}/timing")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_miss_and_a_hit_have_the_phases_they_went_through(bench: Bench) -> None:
    seen = []
    for stream in (True, True, False):
        answer = bench.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert answer.status_code == 200, answer.text
        seen.append(timing(bench, answer.headers["x-request-id"]))
    names = [[phase["name"] for phase in each["phases"]] for each in seen]
    assert names[0] == ["guards", "plan", "redis", "first_token", "decode"]
    assert names[1][-1] == names[2][-1] == "send"
    assert [each["cache"] for each in seen] == ["miss", "hit", "hit"]
    for each in seen:  # without gaps, from the start to the end
        at = 0.0
        for phase in each["phases"]:
            assert phase["start_ms"] == pytest.approx(at, abs=0.01)
            at += phase["ms"]
        assert at == pytest.approx(each["total_ms"], abs=0.01)


def test_unknown_requests_and_paths_are_not_found(bench: Bench) -> None:
    for path in ("/v1/requests/none/timing", "/v1/requests/", "/v1/requests/a/b", "/v1/requests/timing"):
        answer = bench.http.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


def test_a_tenant_sees_its_own_and_the_oldest_are_forgotten() -> None:
    timings = Timings()
    timings.end("r", RequestRecord(tenant="a"), 200, 0.5)
    assert timings.find("a", "r")
    assert timings.find("b", "r") is None
    for number in range(KEPT):
        timings.end(f"r{number}", RequestRecord(tenant="a"), 200, 0.5)
    assert timings.find("a", "r") is None
    assert timings.find("a", "r0")


def test_marks_that_run_backwards_do_not_overlap() -> None:
    """A follower's marks may come before its leader's."""
    record = RequestRecord(
        began_at=1.0, read_at=2.0, planned_at=1.5, looked_up_at=9.0, calls=[UpstreamCall("m", "m", 0.0)], ttft=0.1
    )
    found = phases(record, 200, 2.0)["phases"]
    assert [(each["start_ms"], each["ms"]) for each in found] == [
        (0, 1000), (1000, 0), (1000, 1000), (2000, 0), (2000, 0)
    ]  # fmt: skip


REPORTED = {
    "state": "ended",
    "phases": [{"name": name, "start_ms": 0, "ms": ms} for name, ms in (("queue", 3.0), ("prefill", 5), ("decode", 8))],
}


def test_the_models_own_phases_stand_in_place_of_the_upstreams() -> None:
    """What they leave of the call is the network's; together they are as long as before, and end with the request."""
    record = RequestRecord(began_at=1.0, read_at=1.001, calls=[UpstreamCall("model", "m", 0.0)])
    timing = phases(record, 200, 0.021)
    found = with_model(timing, REPORTED)["phases"]
    assert [(each["name"], each["start_ms"], each["ms"]) for each in found] == [
        ("guards", 0, 1), ("network", 1, 4), ("queue", 5, 3), ("prefill", 8, 5), ("decode", 13, 8)
    ]  # fmt: skip
    longer = with_model(phases(record, 200, 0.011), REPORTED)["phases"]
    assert [each["ms"] for each in longer] == [1, 0, 3, 5, 2], "no phase passes the end"
    record.ttft = 0.012  # a stream: until the first token, and then the proxy's own decode
    found = with_model(phases(record, 200, 0.021), REPORTED)["phases"]
    assert [(each["name"], each["start_ms"], each["ms"]) for each in found] == [
        ("guards", 0, 1), ("network", 1, 3), ("queue", 4, 3), ("prefill", 7, 5), ("decode", 12, 9)
    ]  # fmt: skip
    for odd in (None, [], {"phases": []}, {"phases": [{"name": 1, "ms": 2}]}, {"phases": [{"name": "a", "ms": -1}]}):
        assert with_model(timing, odd) == timing
    hit = phases(RequestRecord(began_at=1.0, read_at=1.001), 200, 0.002)
    assert with_model(hit, REPORTED) == hit


def test_a_request_is_found_while_it_runs_and_after_its_end(bench: Bench) -> None:
    """With the phase that the model service is in; then with all of them, and nothing is left running."""
    id_ = new().replace(" ", "-")
    bench.control(closed=True, timing={"state": "queue", "phases": [{"name": "queue", "start_ms": 0, "ms": 0.0}]})
    body = CHAT | {"model": CHAT_MODEL, "messages": [{"role": "user", "content": new()}], "stream": True}
    headers = {"x-request-id": id_}
    asked = threading.Thread(target=bench.http.post, args=("/v1/chat/completions",),
                             kwargs={"json": body, "headers": headers})  # fmt: skip
    asked.start()
    try:
        eventually(lambda: bench.http.get(f"/v1/requests/{id_}/timing").status_code == 200, what="it runs")
        eventually(lambda: timing(bench, id_)["phases"][-1]["name"] == "queue", what="the model has it")
        assert timing(bench, id_)["status"] is None
    finally:
        bench.control(closed=False, timing=REPORTED)
        asked.join()
    eventually(lambda: timing(bench, id_)["status"] == 200, what="it has ended")
    names = [each["name"] for each in timing(bench, id_)["phases"]]
    assert names == ["guards", "plan", "redis", "network", "queue", "prefill", "decode"]


def test_prices_have_a_source_and_a_date(bench: Bench) -> None:
    body = bench.http.get("/v1/prices").json()
    assert body["unit"] == "USD per million tokens"
    openai = next(each for each in body["upstreams"] if each["upstream"] == "openai")
    assert openai["source"].startswith("https://")
    assert len(openai["checked"]) == 10
    assert openai["models"]["gpt-4o"] == {"input": 2.5, "cached": 1.25, "output": 10.0}
