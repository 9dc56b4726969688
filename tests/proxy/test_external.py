"""The proxy in a cluster: before an existing OpenAI-compatible server (vLLM), and without a shared folder for files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fixtures_proxy import CHAT_MODEL, Bench, events, new, second, state
from test_upstream import routes_file

ROUTES = {"upstreams": {"model": {"kind": "model", "native": False}}, "routes": [{"upstream": "model"}], "aliases": [],
          "auto": None}  # fmt: skip


@pytest.fixture(scope="module")
def external(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("external")
    settings = {"routes_file": str(routes_file(folder, **ROUTES)), "files_enabled": "false"}
    with second(running, folder, **settings) as started:
        yield started


def test_its_models_are_listed_and_answer(bench: Bench, external: Bench) -> None:
    """One path for all models, nothing that only the lab's model service knows, hits as with any upstream."""
    listed = [model["id"] for model in external.http.get("/v1/models").json()["data"]]
    assert CHAT_MODEL in listed
    text = new()
    first, again = (external.chat(text, model=CHAT_MODEL) for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    assert (state(first), state(again)) == ("miss stored", "hit")
    last = bench.calls(bench.model)["last"]
    assert last["path"] == "/v1/chat/completions"
    assert not {"x-call-id", "x-request-timeout-ms"} & set(last["headers"])


def test_its_streams_are_complete(external: Bench) -> None:
    answer = external.chat(model=CHAT_MODEL, stream=True)
    assert events(answer)[-1] == "[DONE]"


def test_its_list_of_models_stands_for_readiness(external: Bench) -> None:
    assert external.http.get("/ready").json()["model"] == "up"
    assert {"id": CHAT_MODEL, "state": "ready"} in external.http.get("/status").json()["model"]["models"]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/files/file-1", "/v1/batches", "/v1/batches/batch-1"])
def test_files_and_batches_are_refused_by_name(external: Bench, path: str) -> None:
    answer = external.http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "files_disabled")
    assert "PROXY_FILES_ENABLED" in answer.json()["error"]["message"]
