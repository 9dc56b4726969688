"""The route examples of docs/api.md work: the proxy's own reader reads each, and its client sends a request to a mock.

The mock answers at the documented path; the errors are those that each API documents.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import yaml
from fixtures_proxy import control_client, mock
from lab_proxy.errors import ProxyError
from lab_proxy.settings import Settings
from lab_proxy.telemetry.metrics import Metrics
from lab_proxy.upstreams.client import UpstreamClient, UpstreamFault, UpstreamRequest
from lab_proxy.upstreams.routes import Routes
from processes import Process
from test_docs import DOCUMENTS

KEY = "key-of-the-example"
SECTION = DOCUMENTS["docs/api.md"].partition("## Upstreams and routes")[2].partition("### Errors of upstreams")[0]
EXAMPLES = dict(re.findall(r"^### (.+?)\n.*?^```yaml\n(.*?)^```", SECTION, re.S | re.M))

# Example -> a model name of its route, where its API listens, and an error as the API documents it: status, body, and
# status and code of what the caller gets.
KEYLESS = {"Ollama", "Docker Model Runner", "TGI"}
APIS: dict[str, tuple[str, str, tuple[int, Any, int, str | None]]] = {
    "OpenAI": (
        "gpt-4o-mini",
        "https://api.openai.com/v1",
        (429, {"error": {"message": "Rate limit reached", "type": "requests", "param": None,
                         "code": "rate_limit_exceeded"}}, 429, "rate_limit_exceeded"),
    ),
    "Azure OpenAI": (
        "my-deployment",
        "https://YOUR-RESOURCE.openai.azure.com/openai/v1",
        (404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}},
         404, "DeploymentNotFound"),
    ),
    "Ollama": (
        "llama3.2",
        "http://127.0.0.1:11434/v1",
        (404, {"error": {"message": 'model "llama3.2" not found, try pulling it first', "type": "not_found_error",
                         "param": None, "code": None}}, 404, None),
    ),
    "Docker Model Runner": (
        "ai/smollm2",
        "http://127.0.0.1:12434/engines/v1",
        (404, "model not found\n", 502, "upstream_error"),
    ),
    "vLLM": (
        "Qwen/Qwen3-0.6B",
        "http://127.0.0.1:8001/v1",
        (401, {"error": "Unauthorized"}, 502, "upstream_key_refused"),
    ),
    "TGI": (
        "tgi",
        "http://127.0.0.1:3000/v1",
        (429, {"error": "Model is overloaded", "error_type": "overloaded"}, 429, "upstream_rate_limited"),
    ),
    "LiteLLM": (
        "claude-sonnet",
        "http://127.0.0.1:4000/v1",
        (400, {"error": {"message": "Budget has been exceeded!", "type": "budget_exceeded", "param": None,
                         "code": "400"}}, 400, "400"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with mock(tmp_path_factory.mktemp("routes")) as started:
        yield started


def test_every_example_is_tried() -> None:
    assert set(EXAMPLES) == set(APIS)


@pytest.mark.parametrize("name", APIS)
async def test_a_route_example_reaches_its_api(name: str, upstream: Process, tmp_path: Path) -> None:
    """Address, path, key and model arrive as the API documents them; its error reaches the caller in OpenAI's form."""
    model, address, (status, body, expected_status, expected_code) = APIS[name]
    # 1. The example, with the mock in place of its address, and a key in its key file.
    example = yaml.safe_load(EXAMPLES[name])
    (own,) = [row for row in example["upstreams"].values() if row["kind"] == "openai"]
    assert own["base_url"] == address
    own["base_url"] = upstream.url + urlsplit(address).path
    assert own.get("keyless", False) is (name in KEYLESS)
    if name not in KEYLESS:
        assert own["api_key_file"].startswith("secrets/")  # git ignores that folder
        (tmp_path / "key").write_text(KEY + "\n")
        own["api_key_file"] = str(tmp_path / "key")
    (tmp_path / "routes.yaml").write_text(yaml.safe_dump(example))
    settings = Settings(routes_file=tmp_path / "routes.yaml", model_url="http://127.0.0.1:9", upstream_retries=0)
    listed = {"smollm2-135m-instruct": {"kind": "chat", "revision": "r1"}}
    routes = Routes(settings)
    assert routes.resolve("smollm2-135m-instruct", listed).config.kind == "model"
    target = routes.resolve(model, listed)
    # 2. A request, and an error.
    metrics = cast("Metrics", SimpleNamespace(count=lambda *_: None))
    client = UpstreamClient(target.config, settings, metrics)
    request = b'{"model": "%s", "messages": [{"role": "user", "content": "Hi"}]}' % target.model.encode()
    asked = UpstreamRequest(
        "/v1/chat/completions", "id", False, time.perf_counter() + 30, lambda _: request, lambda _: None
    )
    try:
        reply = await client.send(asked, target)
        raw, answer = await reply.json()
        reply.close()
        arrived = control_client().get(f"{upstream.url}/calls").json()["last"]
        control_client().post(f"{upstream.url}/control", json={"script": [{"status": status, "body": body}]})
        with pytest.raises(UpstreamFault) as caught:
            await client.send(asked, target)
    finally:
        await client.stop()
    # 3. What arrived there, and what comes back.
    assert arrived["path"] == f"{urlsplit(address).path}/chat/completions"
    assert arrived["headers"].get("authorization") == (None if name in KEYLESS else f"Bearer {KEY}")
    assert arrived["body"]["model"] == model
    assert answer["choices"][0]["message"]["content"], raw
    error: ProxyError = caught.value.error
    assert error.status == expected_status
    envelope = yaml.safe_load(error.body())["error"]  # JSON is YAML
    assert envelope["code"] == expected_code
    assert envelope["message"]
