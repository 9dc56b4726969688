"""/v1/tasks in this process: classifier and reader against transformers' own output, the chat model's confined answers,
and the queue that all encoders share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import tiny_encoders
import torch
from inprocess import InProcess
from lab_model.encoders.classifier import Classifier
from lab_model.encoders.embedder import Embedder
from lab_model.encoders.queue import BATCH_TOKENS, EncoderQueue
from lab_model.errors import CatalogueError
from lab_model.models import classifier, encoder
from lab_model.models.catalogue import AppArgs, Entry
from lab_model.models.kinds import Loaded
from lab_model.models.sources import Source
from served import TINY
from tiny import one_thread  # noqa: F401 - of all tests here

TEXTS = ["the cat sat on the mat", "bad dog", "a very good hat and a small dog ate"]
CONTEXT = "The cat sat on the mat. A big dog ate the hat, and the small cat was not good."


def load(folder: Path, kind: Any, model: str = "e", **more: Any) -> Loaded:
    entry = Entry(id=model, kind=kind, source=f"file:{folder}", dtype="float32")
    args = AppArgs(entry=entry, log_pipe=folder / "log", metrics_dir=folder, **more)
    loader = encoder if kind == "embedding" else classifier
    return loader.load(args, Source(str(folder)), torch.device("cpu"))


def app_of(folder: Path, kind: Any, model: str = "e") -> httpx2.AsyncClient:
    loaded = load(folder, kind, model)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(loaded.app), base_url="http://localhost", timeout=60)


async def post(client: httpx2.AsyncClient, task: str, inputs: Any, **more: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/tasks/{task}", json={"inputs": inputs, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refusal(client: httpx2.AsyncClient, task: str, inputs: Any, **more: Any) -> tuple[int, str, str]:
    answer = await client.post(f"/v1/tasks/{task}", json={"inputs": inputs, **more})
    return answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
async def test_a_classifier_gives_its_labels_and_their_probabilities(tmp_path: Path, architecture: str) -> None:
    async with app_of(tiny_encoders.write(tmp_path, "classifier", architecture), "classifier") as client:
        found = await post(client, "sentiment-analysis", TEXTS)
        assert found["method"] == "classifier"
        reference, tokenizer = tiny_encoders.model("classifier", architecture), tiny_encoders.tokenizer()
        for text, result in zip(TEXTS, found["results"], strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            want = reference(input_ids=ids).logits[0].detach().softmax(-1)
            assert {each["label"] for each in result} == {"bad", "fair", "good"}
            scores = {each["label"]: each["score"] for each in result}
            assert [scores[name] for name in ("bad", "fair", "good")] == pytest.approx(want.tolist(), abs=1e-5)
            assert result == sorted(result, key=lambda each: -each["score"])
        counts = found["usage"]["per_input_tokens"]
        assert counts == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
        assert found["usage"]["prompt_tokens"] == sum(counts)
        (best,) = await _one(client, TEXTS[0])
        assert best["label"] == found["results"][0][0]["label"]
        assert await refusal(client, "sentiment-analysis", "the " * 80) == (400, "inputs", "context_length_exceeded")
        assert (await client.post("/v1/embeddings", json={"model": "e", "input": "a"})).status_code == 404


async def _one(client: httpx2.AsyncClient, text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await post(client, "sentiment-analysis", text, parameters={"top_k": 1}))["results"][
        0
    ]
    return found


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
async def test_a_reader_finds_the_best_span(tmp_path: Path, architecture: str) -> None:
    """As a search over all pairs of transformers' own start and end scores does."""
    async with app_of(tiny_encoders.write(tmp_path, "reader", architecture), "reader") as client:
        asked = {"question": "where is the cat ?", "context": CONTEXT}
        found = await post(
            client, "question-answering", asked,
            parameters={"handle_impossible_answer": False, "max_answer_tokens": 4},
        )  # fmt: skip
        (result,) = found["results"]
        reference, tokenizer = tiny_encoders.model("reader", architecture), tiny_encoders.tokenizer()
        encoded = tokenizer(
            asked["question"], asked["context"], return_offsets_mapping=True, return_token_type_ids=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        more = {"token_type_ids": torch.tensor([encoded["token_type_ids"]])} if architecture == "bert" else {}
        output = reference(input_ids=ids, **more)
        inside = [place for place, part in enumerate(encoded.sequence_ids(0)) if part == 1]
        allowed = torch.full((ids.shape[1],), float("-inf"))
        allowed[[0, *inside]] = 0
        starts = (output.start_logits[0].detach() + allowed).softmax(-1)
        ends = (output.end_logits[0].detach() + allowed).softmax(-1)
        score, first, last = max((float(starts[a] * ends[b]), a, b) for a in inside for b in inside if 0 <= b - a < 4)
        offsets = encoded["offset_mapping"]
        assert (result["start"], result["end"]) == (offsets[first][0], offsets[last][1])
        assert result["answer"] == CONTEXT[result["start"] : result["end"]]
        assert result["score"] == pytest.approx(score, rel=1e-4)
        assert result["abstain_score"] == pytest.approx(float(starts[0] * ends[0]), rel=1e-4)
        # A text of several windows, and an answer that may be empty.
        many = await post(client, "question-answering", [asked | {"context": CONTEXT * 20}, asked])
        for each, context in zip(many["results"], (CONTEXT * 20, CONTEXT), strict=True):
            assert each["answer"] == context[each["start"] : each["end"]]
            assert bool(each["answer"]) == (each["score"] >= each["abstain_score"])
        wrong = asked | {"question": "what " * 50}
        assert await refusal(client, "question-answering", wrong) == (
            400, "inputs[0].question", "context_length_exceeded",
        )  # fmt: skip


async def test_an_embedding_model_names_the_nearest_labels(tmp_path: Path) -> None:
    """Texts and labels by their vectors; without the model of the probe's training there is no sentiment."""
    async with app_of(tiny_encoders.write(tmp_path, "embedding"), "embedding") as client:
        labels = ["cat", "good dog", "hat"]
        found = await post(client, "zero-shot-classification", TEXTS, parameters={"candidate_labels": labels})
        vectors = {}
        for text in [*TEXTS, *(f"This text is about {label}." for label in labels)]:
            data = (await client.post("/v1/embeddings", json={"model": "e", "input": text})).json()["data"]
            vectors[text] = torch.tensor(data[0]["embedding"])
        for text, result in zip(TEXTS, found["results"], strict=True):
            cosines = {label: float(vectors[text] @ vectors[f"This text is about {label}."]) for label in labels}
            assert [each["label"] for each in result] == sorted(labels, key=lambda label: -cosines[label])
            assert sum(each["score"] for each in result) == pytest.approx(1)
        alone = {"candidate_labels": labels, "multi_label": True, "hypothesis_template": "{} !"}
        many = (await post(client, "zero-shot-classification", TEXTS[0], parameters=alone))["results"][0]
        assert all(0 <= each["score"] <= 1 for each in many)
        assert (await refusal(client, "sentiment-analysis", "a"))[:2] == (400, "model")


async def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    async with app_of(tiny_encoders.write(tmp_path, "embedding"), "embedding") as client:
        shot = "zero-shot-classification"

        async def labels(*given: Any, **more: Any) -> tuple[int, str, str]:
            return await refusal(client, shot, "a", parameters={"candidate_labels": list(given), **more})

        assert await labels("x" * 10_000) == (400, "parameters.candidate_labels[0]", "invalid_value")
        assert await labels() == (400, "parameters.candidate_labels", "invalid_value")
        assert await labels("a", "a") == (400, "parameters.candidate_labels", "invalid_value")
        assert await labels(" ") == (400, "parameters.candidate_labels[0]", "invalid_value")
        assert await labels(*map(str, range(101))) == (400, "parameters.candidate_labels", "invalid_value")
        assert await labels("a", bogus=1) == (400, "parameters.bogus", "unknown_parameter")
        assert await labels("a", hypothesis_template="no place") == (
            400, "parameters.hypothesis_template", "invalid_value",
        )  # fmt: skip
        assert (await refusal(client, shot, "a"))[:2] == (400, "parameters")
        many = {"parameters": {"candidate_labels": ["a"]}}
        assert await refusal(client, shot, ["a"] * 10_000, **many) == (400, "inputs", "invalid_value")
        assert await refusal(client, shot, ["a", ""], **many) == (400, "inputs[1]", "invalid_value")
        assert await refusal(client, shot, "", **many) == (400, "inputs", "invalid_value")
        assert await refusal(client, shot, "a", colour=1, **many) == (400, "colour", "unknown_parameter")


async def test_weights_without_a_head_are_refused(tmp_path: Path) -> None:
    folder = tiny_encoders.write(tmp_path, "embedding")
    with pytest.raises(CatalogueError, match="no head for kind reader"):
        app_of(folder, "reader")


# ---- the chat model


@pytest_asyncio.fixture(loop_scope="function")
async def app() -> AsyncIterator[InProcess]:
    made = InProcess()
    yield made
    await made.close()


async def test_the_chat_models_answer_is_a_part_of_the_context(app: InProcess) -> None:
    """Whatever the weights: a tiny random model answers with words of the text, in Korean too."""
    contexts = ["the cat sat on the mat, and the dog ate.", "안녕하세요 세계. 고양이는 작다."]
    found = await post(
        app.client, "question-answering", [{"question": "who?", "context": context} for context in contexts],
        parameters={"handle_impossible_answer": False},
    )  # fmt: skip
    for result, context in zip(found["results"], contexts, strict=True):
        assert result["answer"] == context[result["start"] : result["end"]]
        assert 0 <= result["score"] <= 1
    abstaining = await post(app.client, "question-answering", {"question": "who?", "context": contexts[0]})
    (result,) = abstaining["results"]
    assert (result["answer"] == "") == (result["score"] < result["abstain_score"])
    long = {"question": "who?", "context": "cat " * 5000}
    assert await refusal(app.client, "question-answering", [long]) == (
        400, "inputs[0].context", "context_length_exceeded",
    )  # fmt: skip
    longer = {"question": "who?", "context": "a" * 100_000}
    assert (await refusal(app.client, "question-answering", longer))[:2] == (400, "inputs.context")
    assert (await refusal(app.client, "question-answering", {"question": "who?"}))[:2] == (400, "inputs.context")
    empty = {"question": "", "context": "a"}
    assert (await refusal(app.client, "question-answering", empty))[:2] == (400, "inputs.question")
    several = [{"question": "who?", "context": "a"}] * 65
    assert (await refusal(app.client, "question-answering", several))[:2] == (400, "inputs")


async def test_text_generation_continues_the_text(app: InProcess) -> None:
    whole = (await app.complete(prompt="the cat", max_tokens=8)).json()["choices"][0]["text"]
    found = await post(app.client, "text-generation", ["the cat", "a dog"], parameters={"max_new_tokens": 8})
    assert found["results"][0] == {"generated_text": "the cat" + whole}
    assert found["model"] == TINY
    assert sum(found["usage"]["per_input_completion_tokens"]) == found["usage"]["completion_tokens"]
    bare = {"max_new_tokens": 8, "return_full_text": False}
    assert (await post(app.client, "text-generation", "the cat", parameters=bare))["results"] == [
        {"generated_text": whole}
    ]
    assert await refusal(app.client, "text-generation", ["a"] * 65) == (400, "inputs", "invalid_value")
    longest = {"max_new_tokens": 5000}
    assert await refusal(app.client, "text-generation", "a", parameters=longest) == (
        400, "inputs[0]", "context_length_exceeded",
    )  # fmt: skip


# ---- the queue


class Recorder:
    """An encoder that waits before its first forward until it is let go. forwards: the rows of each."""

    context = 64

    def __init__(self) -> None:
        self.forwards: list[list[Sequence[int]]] = []
        self.go, self.begun = threading.Event(), threading.Event()

    def forward(self, rows: Sequence[Sequence[int]]) -> list[int]:
        self.forwards.append(list(rows))
        self.begun.set()
        assert self.go.wait(60)
        return [row[0] for row in rows]


async def test_requests_share_forwards_and_a_long_list_keeps_nobody_waiting() -> None:
    made = Recorder()
    queue = EncoderQueue(made, 10)

    async def ask(rows: list[list[int]]) -> list[Any]:
        with queue.submit(rows) as job:
            return await job.outputs

    long = asyncio.create_task(ask([[number] * 64 for number in range(40)]))
    assert await asyncio.to_thread(made.begun.wait, 60)
    singles = [asyncio.create_task(ask([[100 + number] * 4])) for number in range(8)]
    await asyncio.sleep(0)
    made.go.set()
    assert [await each for each in singles] == [[100 + number] for number in range(8)]
    assert await long == list(range(40))
    assert all(max(map(len, rows)) * len(rows) <= BATCH_TOKENS for rows in made.forwards)
    assert [row[0] for row in made.forwards[1]][:8] == [100 + number for number in range(8)]


async def test_a_fault_of_a_forward_ends_its_requests_alone() -> None:
    made = Recorder()
    made.go.set()
    queue = EncoderQueue(made, 10)
    with queue.submit([[]]) as job, pytest.raises(IndexError):
        await job.outputs
    with queue.submit([[5]]) as job:
        assert await job.outputs == [5]
        await job.ended.wait()
        assert job.used() == (1, 0, 0)


async def test_a_request_without_rows_ends_and_a_fault_spares_those_that_wait() -> None:
    made = Recorder()
    queue = EncoderQueue(made, 10)

    async def ask(rows: list[list[int]]) -> list[Any]:
        with queue.submit(rows) as job:
            return await job.outputs

    first = asyncio.create_task(ask([[1] * 64]))
    assert await asyncio.to_thread(made.begun.wait, 60)
    # The second forward is full of rows whose first number is missing; the next request waits behind it.
    failing = asyncio.create_task(ask([[]] * (BATCH_TOKENS + 1)))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(ask([[7] * 64]))
    empty = asyncio.create_task(ask([]))
    await asyncio.sleep(0)
    made.go.set()
    assert (await first, await empty, await waiting) == ([1], [], [7])
    with pytest.raises(IndexError):
        await failing


@pytest.mark.parametrize("kind", ["embedding", "classifier"])
async def test_a_forward_that_hangs_fails_its_requests_and_the_encoder(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running and the waiting request get a 503; a later one too, and the replica counts as dead."""
    begun, go = threading.Event(), threading.Event()

    def hang(_: object, __: object) -> None:
        begun.set()
        assert go.wait(60)

    folder = tiny_encoders.write(tmp_path, kind)
    loaded = load(folder, kind, step_timeout_seconds=0.3)
    monkeypatch.setattr(Embedder if kind == "embedding" else Classifier, "forward", hang)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(loaded.app), base_url="http://localhost") as client:

        async def ask() -> tuple[int, str]:
            path, inputs = ("embeddings", "input") if kind == "embedding" else ("tasks/sentiment-analysis", "inputs")
            answer = await client.post(f"/v1/{path}", json={"model": "e", inputs: "cat"}, timeout=60)
            return answer.status_code, answer.json()["error"]["message"]

        assert loaded.is_alive()
        running = asyncio.create_task(ask())
        assert await asyncio.to_thread(begun.wait, 60)
        waiting = asyncio.create_task(ask())
        status, message = await running
        assert (status, "did not end within 0.3 s" in message) == (503, True)
        assert (await waiting)[0] == 503
        assert not loaded.is_alive()
        status, message = await ask()
        assert (status, "hangs" in message) == (503, True)
        go.set()
