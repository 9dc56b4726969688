"""One trace over ui, proxy and model: their real processes, the ui's own client, and a collector that decodes OTLP."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from collector import Collector, attributes
from fixtures_proxy import PATIENT_MS, new
from lab_model.settings import Settings as ModelSettings
from lab_proxy.settings import Settings as ProxySettings
from lab_ui.proxy import Proxy, Reply
from lab_ui.settings import Settings
from processes import Process, eventually, free_port, process, python
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from served import EMBEDDING, TINY


@pytest.fixture(scope="module")
def traced(
    collector: Collector, model_process: Process, redis: Process, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """The ui's client before a proxy and the model service, all with traces on."""
    folder, port = tmp_path_factory.mktemp("traced"), free_port()
    env = {
        "PROXY_PORT": str(port),
        "PROXY_MODEL_URL": model_process.url,
        "PROXY_REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
        "PROXY_CACHE_SECRET_FILE": str(folder / "cache-secret"),
        "PROXY_REDIS_TIMEOUT_MS": PATIENT_MS,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
    }
    with process("proxy", python("lab_proxy"), port=port, log_dir=folder, env=env, ready="/ready") as started:
        client = Proxy(Settings(proxy_url=started.url, otlp_endpoint=collector.url))
        try:
            yield client
        finally:
            client.close()


def trace_of(collector: Collector, request_id: str) -> bytes:
    """The trace of the proxy's span with this request id."""
    found: list[bytes] = []

    def arrived() -> bool:
        found[:] = [
            span.trace_id for span in collector.of("proxy") if attributes(span).get("lab.request_id") == request_id
        ]
        return bool(found)

    eventually(arrived, what=f"the proxy's span of {request_id}")
    return found[0]


def chat(client: Proxy, text: str) -> Any:
    answer = client.ask(
        {"model": TINY, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
    )
    assert answer.wait(60)
    assert answer.fault is None, answer.fault
    return answer


def test_an_answer_is_one_trace_from_the_ui_to_the_decode(traced: Proxy, collector: Collector) -> None:
    """Each span is below the one that caused it, and says what it knows; a hit ends at the proxy."""
    text = new()
    answer = chat(traced, text)
    trace = trace_of(collector, answer.request_id)
    eventually(lambda: collector.of("ui", trace) and len(collector.of("model", trace)) == 4, what="all spans")
    (ui,) = collector.of("ui", trace)
    request, call = collector.of("proxy", trace)
    model = next(span for span in collector.of("model", trace) if span.parent_span_id == call.span_id)
    phases = {span.name: span for span in collector.of("model", trace) if span.parent_span_id == model.span_id}
    # 1. Who is below whom.
    assert (ui.parent_span_id, request.parent_span_id, call.parent_span_id) == (b"", ui.span_id, request.span_id)
    assert set(phases) == {"queue", "prefill", "decode"}
    # 2. What they say.
    assert attributes(ui)["http.response.status_code"] == 200
    told, below = attributes(request), attributes(model)
    assert (told["lab.cache"], told["gen_ai.request.model"], attributes(call)["lab.outcome"]) == ("miss", TINY, "ok")
    assert below["gen_ai.request.model"] == TINY
    assert below["lab.request_id"] == told["lab.request_id"] == answer.request_id
    for tokens in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"):
        assert told[tokens] == below[tokens] > 0
    # 3. The phases follow each other within the request.
    times = [getattr(phases[name], f"{end}_time_unix_nano") for name in phases for end in ("start", "end")]
    assert sorted(times) == [
        getattr(phases[name], f"{end}_time_unix_nano")
        for name in ("queue", "prefill", "decode")
        for end in ("start", "end")
    ]
    assert model.start_time_unix_nano <= times[0]
    assert text not in str(collector.spans)
    # 4. The same again: nobody asks the model.
    hit = chat(traced, text)
    assert hit.cache == "hit"
    again = trace_of(collector, hit.request_id)
    assert again != trace
    eventually(lambda: collector.of("ui", again), what="the ui's span of the hit")
    assert (len(collector.of("proxy", again)), collector.of("model", again)) == (1, [])


def test_other_calls_of_the_ui_are_traced_too(traced: Proxy, collector: Collector) -> None:
    """Vectors need no engine: their span has no phases. A refusal is a failed span of the ui."""
    reply = traced.call("POST", "/v1/embeddings", body={"model": EMBEDDING, "input": new()})
    assert isinstance(reply, Reply), reply
    trace = trace_of(collector, reply.request_id)
    eventually(lambda: collector.of("model", trace), what="the model's span")
    assert [span.name for span in collector.of("model", trace)] == [f"embeddings {EMBEDDING}"]
    refused = traced.call("POST", "/v1/embeddings", body={"model": "no-such-model", "input": "x"})
    assert not isinstance(refused, Reply)
    eventually(
        lambda: "unknown_model" in [attributes(span).get("error.type") for span in collector.of("ui")],
        what="the refused call's span",
    )


@pytest.mark.parametrize("settings", [Settings, ProxySettings, ModelSettings], ids=["ui", "proxy", "model"])
def test_the_endpoint_is_the_services_own_or_the_standard_one(
    settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without both there are no traces; a wrong one is refused by its variable."""
    own, standard = f"{settings.model_config['env_prefix']}OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    for given, found in (
        ({}, None),
        ({standard: ""}, None),
        ({standard: "http://a:4318/"}, "http://a:4318"),
        ({standard: "http://a:4318", own: "http://b:4318"}, "http://b:4318"),
    ):
        for name in (own, standard):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert settings().otlp_endpoint == found  # type: ignore[attr-defined]
    for name in (own, standard):
        monkeypatch.setenv(name, "collector:4318")
        with pytest.raises(ValidationError) as refused:
            settings()
        (error,) = refused.value.errors()
        assert error["loc"] == ("otlp_endpoint",)
        assert "http:// or https://" in error["msg"]


@pytest.mark.parametrize("settings", [Settings, ModelSettings], ids=["ui", "model"])
def test_missing_packages_stop_the_start_with_the_command(
    settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ValidationError, match=r"pip install 'lab-(ui|model)\[otel\]'"):
        settings(otlp_endpoint="http://a:4318")
