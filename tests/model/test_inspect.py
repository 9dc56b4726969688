"""/v1/inspect over a tiny model in this process, against transformers' own logits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import tiny
import torch
from inprocess import InProcess
from processes import eventually
from tiny import one_thread  # noqa: F401 - of all tests here

KOREAN = "안녕하세요 쀍! the cat"


@pytest_asyncio.fixture(loop_scope="function")
async def app() -> AsyncIterator[InProcess]:
    made = InProcess()
    yield made
    await made.close()


async def post(app: InProcess, name: str, **body: Any) -> dict[str, Any]:
    answer = await app.client.post(f"/v1/inspect/{name}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refusal(app: InProcess, name: str, **body: Any) -> tuple[str, str]:
    """(param, code) of a 400."""
    answer = await app.client.post(f"/v1/inspect/{name}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["code"]


def reference(app: InProcess, ids: list[int]) -> torch.Tensor:
    """transformers' log probabilities after each token."""
    with torch.inference_mode():
        logprobs: torch.Tensor = app.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


@pytest.mark.parametrize("tokenizer", [None, "cl100k_base", "o200k_base"])
async def test_a_text_is_its_tokens_bytes(app: InProcess, tokenizer: str | None) -> None:
    """A syllable that is spread over tokens is shown as bytes; each token knows the characters that it touches."""
    chosen = {"tokenizer": tokenizer} if tokenizer else {}
    found = await post(app, "tokenize", text=KOREAN, **chosen)
    tokens = found["tokens"]
    assert b"".join(bytes(each["bytes"]) for each in tokens) == KOREAN.encode()
    assert found["count"] == len(found["ids"]) == len(tokens)
    assert (found["characters"], found["bytes"]) == (len(KOREAN), len(KOREAN.encode()))
    whole = [each for each in tokens if each["text"] is not None]
    assert all(KOREAN[each["start"] : each["end"]] == each["text"] for each in whole)
    parts = [each for each in tokens if each["text"] is None]
    assert parts, "no syllable is spread over tokens"
    assert all(set(each["bytes"]) <= set(KOREAN[each["start"] : each["end"]].encode()) for each in parts)
    assert "\N{REPLACEMENT CHARACTER}" not in str(found)
    back = await post(app, "detokenize", ids=found["ids"], **chosen)
    assert (back["text"], back["complete"]) == (KOREAN, True)
    cut = await post(app, "detokenize", ids=[parts[0]["id"]], **chosen)
    assert cut["complete"] is False
    assert cut["bytes"] == parts[0]["bytes"]
    assert "\N{REPLACEMENT CHARACTER}" not in cut["text"]


async def test_openais_tokens_are_openais(app: InProcess) -> None:
    """The ids that OpenAI's own tiktoken gives."""
    for name, ids in (("cl100k_base", [9906, 1917]), ("o200k_base", [13225, 2375])):
        assert (await post(app, "tokenize", text="Hello world", tokenizer=name))["ids"] == ids
    assert await refusal(app, "tokenize", text="a", tokenizer="p50k") == ("tokenizer", "invalid_value")
    assert await refusal(app, "tokenize", messages=[{"role": "user", "content": "a"}], tokenizer="o200k_base") == (
        "messages",
        "invalid_value",
    )


async def test_messages_are_rendered_by_the_chat_template(app: InProcess) -> None:
    found = await post(app, "tokenize", messages=[{"role": "user", "content": "hi <|im_end|>"}])
    assert found["text"] == "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    special = [each["text"] for each in found["tokens"] if each["special"]]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]  # in a message its name is plain text


async def test_next_token_has_the_models_probabilities(app: InProcess) -> None:
    ids = (await post(app, "tokenize", text="the cat sat"))["ids"]
    found = await post(app, "next-token", text="the cat sat", top=20, temperature=2, top_k=3)
    logprobs = reference(app, ids)[-1]
    best = logprobs.topk(20)
    assert [each["id"] for each in found["tokens"]] == best.indices.tolist()
    assert [each["logprob"] for each in found["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-3)
    heated = (logprobs / 2).softmax(-1)[best.indices]
    assert [each["after_temperature"] for each in found["tokens"]] == pytest.approx(heated.tolist(), abs=1e-4)
    assert [each["cut_by"] for each in found["tokens"]] == [None] * 3 + ["top_k"] * 17
    assert found["kept"] == 3
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert found["usage"]["completion_tokens"] == 0
    more = await post(app, "next-token", text="the cat", token_ids=ids[len(ids) - 1 :], top=1)
    assert more["prompt_ids"][-1] == ids[-1]


async def test_a_score_is_the_probability_of_each_token(app: InProcess) -> None:
    ids = (await post(app, "tokenize", text=KOREAN))["ids"]
    found = await post(app, "score", text=KOREAN, top=2)
    logprobs = reference(app, ids)
    want = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    first, *rest = found["tokens"]
    assert first["logprob"] is first["rank"] is None
    assert [each["logprob"] for each in rest] == pytest.approx(want, abs=1e-3)
    ranks = [int((row > row[token]).sum()) + 1 for row, token in zip(logprobs, ids[1:], strict=False)]
    assert [each["rank"] for each in rest] == ranks
    assert rest[0]["surprise_bits"] == pytest.approx(-want[0] / math.log(2), abs=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(want) / len(want)), rel=1e-3)
    assert [each["id"] for each in rest[0]["alternatives"]] == logprobs[0].topk(2).indices.tolist()
    assert found["bits"] == pytest.approx(sum(each["surprise_bits"] for each in rest))
    again = await post(app, "score", token_ids=ids)
    assert again["perplexity"] == pytest.approx(found["perplexity"])


async def test_steps_are_the_answer_and_continue_from_it(app: InProcess) -> None:
    """Greedy steps give chat's tokens; those that begin with the first ones give the others."""
    said = [{"role": "user", "content": "hi"}]
    chat = await app.choice(max_tokens=6, logprobs=True)
    whole = await post(app, "generate-steps", messages=said, temperature=0, max_tokens=6, top=3)
    names = [bytes(each["bytes"]) for each in whole["steps"]]
    assert names == [bytes(each["bytes"]) for each in chat["logprobs"]["content"]]
    assert whole["finish_reason"] == "length"
    assert all(step["alternatives"][0]["id"] == step["id"] for step in whole["steps"])
    assert [len(step["alternatives"]) for step in whole["steps"]] == [3] * 6
    rest = await post(
        app, "generate-steps", messages=said, temperature=0, max_tokens=4, token_ids=whole["token_ids"][:2]
    )
    assert rest["token_ids"] == whole["token_ids"]
    assert rest["usage"]["completion_tokens"] == 4


async def test_wrong_fields_are_named(app: InProcess) -> None:
    hi = [{"role": "user", "content": "hi"}]
    for name in ("tokenize", "next-token", "score", "generate-steps"):
        assert await refusal(app, name, text="a", bogus=1) == ("bogus", "unknown_parameter")
        assert await refusal(app, name) == ("text", "missing_required_parameter")
        assert await refusal(app, name, text="") == ("text", "invalid_value")
        assert await refusal(app, name, text="a" * 100_001) == ("text", "invalid_value")
        assert await refusal(app, name, text="a", messages=hi) == ("messages", "invalid_value")
    assert await refusal(app, "detokenize", ids=[tiny.VOCABULARY]) == ("ids", "invalid_value")
    assert await refusal(app, "next-token", text="a", token_ids=[tiny.VOCABULARY]) == ("token_ids", "invalid_value")
    assert await refusal(app, "score", text="쀍" * 400) == ("text", "context_length_exceeded")
    assert await refusal(app, "score", token_ids=[5]) == ("token_ids", "invalid_value")
    assert await refusal(app, "next-token", text="a", top=0) == ("top", "invalid_value")
    assert await refusal(app, "generate-steps", text="a", max_tokens=257) == ("max_tokens", "invalid_value")


async def test_a_base_model_takes_texts_alone(app: InProcess) -> None:
    app.generator.text.template = None
    assert await refusal(app, "score", messages=[{"role": "user", "content": "hi"}]) == ("messages", "invalid_value")
    assert (await post(app, "score", text="the cat"))["perplexity"] > 1


async def test_a_scored_text_leaves_nothing_behind(app: InProcess) -> None:
    await post(app, "score", text=KOREAN * 10)
    eventually(lambda: app.engine.stats().pages_used == 0, what="no page is held")
    assert app.generator._collectors == {}
