"""The model's ASGI application over a tiny engine, without Ray: for faults, full queues and what needs many answers."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
import tiny
from lab_model.api import chat as api_chat
from lab_model.api.app import create_app
from lab_model.api.generator import EngineClient
from lab_model.engine.scheduler import Scheduler
from lab_model.models.kinds import KINDS
from lab_model.runners.transformers import TransformersRunner
from lab_model.text.grammar import TokenGrammar
from lab_model.text.tokenizer import ModelTokenizer
from served import TINY

END = 0  # the tiny tokenizer's end of text


class InProcess:
    """One tiny model whose limits the test chooses."""

    def __init__(
        self, kind: str = "chat", *, text: ModelTokenizer | None = None, context: int = tiny.CONTEXT, **limits: int
    ) -> None:
        self.model = tiny.model()
        runner = TransformersRunner(self.model)
        runner.context = context  # rotary positions know no end
        self.generator = EngineClient(
            name=TINY,
            kind=kind,
            revision="r",
            text=text or ModelTokenizer.of(tiny.tokenizer()),
            default_max_tokens=1000,
        )
        self.engine = Scheduler(runner, self.generator.deliver, **limits)
        self.generator.attach(self.engine, frozenset({END}))
        self.engine.start()
        self.app = create_app(self.generator, KINDS["chat"].paths, max_body_bytes=1_000_000)
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.app), base_url="http://localhost", timeout=60
        )

    async def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        """A chat request, greedy unless told otherwise."""
        body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "temperature": 0} | fields
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def complete(self, **fields: Any) -> httpx2.Response:
        body = {"model": TINY, "prompt": "the cat", "temperature": 0, "max_tokens": 20} | fields
        return await self.client.post("/v1/completions", json=body)

    async def choice(self, **fields: Any) -> dict[str, Any]:
        """The one choice of a chat answer."""
        answer = await self.ask(**fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["choices"][0]
        return found

    async def chunks(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a chat stream, which must be whole."""
        return events(await self.ask(stream=True, **fields))

    async def close(self) -> None:
        self.engine.close()
        await self.client.aclose()


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def says(monkeypatch: pytest.MonkeyPatch, app: InProcess, text: str) -> None:
    """From now on the model answers with this text, in tokens of its own choice: a grammar that allows nothing else."""

    async def puppet(*_: Any) -> TokenGrammar:
        return app.generator.grammars.make(f"%llguidance {{}}\nstart: {json.dumps(text)}")

    monkeypatch.setattr(api_chat, "grammar_of", puppet)
