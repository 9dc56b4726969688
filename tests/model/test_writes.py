"""What streams write and when: a token of one among many waits for its fellows, and nothing else changes.

Time stands still unless a test moves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import types
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import tiny
from inprocess import END, InProcess
from lab_model import errors
from lab_model.api.generator import LONGEST_WAIT_SECONDS, WRITES_A_SECOND, EngineClient, EngineWork, OutputCollector
from lab_model.api.http.record import Record
from lab_model.engine.request import CancelledError, EngineFaultError, Request, Stats, StepOutput
from lab_model.engine.sampling_params import Logprob
from lab_model.text.choice import Choice, Piece
from lab_model.text.grammar import CALL_BEGIN, ending
from lab_model.text.tokenizer import ModelTokenizer
from lab_model.text.tool_calls import ForcedToolCallParser
from processes import eventually_async
from served import TINY
from starlette.types import Message

STREAMS = 150  # so many that only its limit bounds the wait
STEP_SECONDS = 0.01
WORDS = "the cat sat on the mat and the dog ate the hat " * 3


class Hand:
    """In the engine's place: the test says what comes."""

    vocab = tiny.VOCABULARY

    def __init__(self) -> None:
        self.cancelled: list[Request] = []

    def submit(self, *requests: Request) -> None:
        pass

    def cancel(self, *requests: Request) -> None:
        self.cancelled += requests

    def stats(self) -> Stats:
        return Stats(**dict.fromkeys(Stats.__annotations__, 1))


class Counting(Choice):
    """Counts how often any choice was given something."""

    pushes = 0

    def push(self, event: StepOutput) -> Piece | None:
        Counting.pushes += 1
        return super().push(event)


class Broken(Choice):
    def push(self, event: StepOutput) -> Piece | None:
        raise RuntimeError("made for this test")


@dataclass
class Stream:
    """One call, and what it wrote: when, and which pieces."""

    flow: OutputCollector
    requests: list[Request]
    writes: list[tuple[float, list[Piece]]] = field(default_factory=list)
    error: Exception | None = None
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def text(self) -> str:
        return self.text_of(0)

    def text_of(self, index: int) -> str:
        return "".join(piece.text for _, pieces in self.writes for piece in pieces if piece.index == index)

    @property
    def pieces(self) -> list[Piece]:
        return [piece for _, pieces in self.writes for piece in pieces]


class Stage:
    def __init__(self) -> None:
        self.now = 1000.0
        self.text = ModelTokenizer.of(tiny.tokenizer())
        self.hand = Hand()
        self.generator = EngineClient(name=TINY, kind="chat", revision="r", text=self.text, default_max_tokens=100)
        self.generator.attach(self.hand, frozenset({END}))  # type: ignore[arg-type]
        self.streams: list[Stream] = []

    def begin(
        self, *, choices: int = 1, stream: bool = True, stops: Sequence[str] = (), logprobs: bool = False,
        calls: bool = False, kind: type[Choice] = Counting,
    ) -> Stream:  # fmt: skip
        requests = [Request([1], 1000) for _ in range(choices)]
        told = [
            kind(index, self.text, stops, logprobs=logprobs, calls=ForcedToolCallParser() if calls else None)
            for index in range(choices)
        ]
        record = Record("r", "r", "chat/completions", self.now)
        begun = Stream(OutputCollector(EngineWork(requests, choices), told, record, stream=stream), requests)
        begun.reads.set()

        async def read() -> None:
            try:
                async with contextlib.aclosing(self.generator.run(begun.flow)) as pieces:
                    async for part in pieces:
                        begun.writes.append((self.now, part))
                        await begun.reads.wait()
            except errors.ApiError as error:
                begun.error = error

        begun.task = asyncio.create_task(read())
        self.streams.append(begun)
        return begun

    async def step(self, *events: StepOutput) -> None:
        """What one step of the engine brings, and a moment for who is woken by it."""
        self.generator.deliver(list(events))
        await self.settle()

    async def settle(self) -> None:
        """Let whoever has something to do on the event loop do it."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def crowd(self) -> None:
        """So many streams that tokens wait as long as they ever do; their first tokens are out."""
        crowd = [self.begin() for _ in range(STREAMS)]
        await asyncio.sleep(0)
        await self.step(*(StepOutput(one.requests[0], self.text.encode("the")) for one in crowd))
        assert all(len(one.writes) == 1 for one in crowd)

    def tokens(self, text: str = WORDS) -> Iterator[int]:
        yield from self.text.encode(text)


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    made = Stage()
    monkeypatch.setattr("lab_model.api.generator.time", types.SimpleNamespace(monotonic=lambda: made.now))
    yield made
    for stream in made.streams:
        assert stream.task is not None
        stream.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stream.task


async def test_a_stream_that_is_alone_writes_every_token_at_once(stage: Stage) -> None:
    one = stage.begin()
    await asyncio.sleep(0)
    tokens = list(stage.tokens())
    for count, token in enumerate(tokens, 1):
        stage.now += STEP_SECONDS
        await stage.step(StepOutput(one.requests[0], [token]))
        assert len(one.writes) == count
    assert one.text == stage.text.decode(tokens)


async def test_many_streams_write_seldom_and_lose_nothing(stage: Stage) -> None:
    """Each token is out after the longest wait at the latest; order and text stay; writes are fewer than tokens."""
    many = [stage.begin() for _ in range(STREAMS)]
    await asyncio.sleep(0)
    tokens = list(stage.tokens())
    came: list[float] = []
    for token in tokens:
        came.append(stage.now)
        await stage.step(*(StepOutput(one.requests[0], [token]) for one in many))
        stage.now += STEP_SECONDS
    for one in many:
        await stage.step(StepOutput(one.requests[0], [], "length"))
    expected = stage.text.decode(tokens)
    for one in many:
        assert one.text == expected
        assert one.writes[0][0] == came[0], "the first token waited"
        assert one.pieces[-1].finish == "length"
        out = ""
        shown = 0
        for at, pieces in one.writes:
            out += "".join(piece.text for piece in pieces)
            # The tokens that this write completed: the oldest of them waited longest.
            known = next(i for i in range(len(tokens) + 1) if len(stage.text.decode(tokens[:i])) >= len(out))
            assert at - came[shown] < LONGEST_WAIT_SECONDS + STEP_SECONDS / 2, "a token waited too long"
            shown = min(known, len(tokens) - 1)
    writes = sum(len(one.writes) for one in many)
    assert writes <= STREAMS * ((stage.now - came[0]) / LONGEST_WAIT_SECONDS + 3)
    assert writes < 0.5 * STREAMS * len(tokens)


async def test_few_streams_hardly_wait(stage: Stage) -> None:
    """The wait grows with the streams: of two, no token waits for another step, however short."""
    one, two = stage.begin(), stage.begin()
    await asyncio.sleep(0)
    tokens = list(stage.tokens())
    for count, token in enumerate(tokens, 1):
        await stage.step(*(StepOutput(stream.requests[0], [token]) for stream in (one, two)))
        assert [len(stream.writes) for stream in (one, two)] == [count, count]
        stage.now += 2 / WRITES_A_SECOND


async def test_the_first_token_of_a_stream_waits_for_nobody(stage: Stage) -> None:
    await stage.crowd()
    late = stage.begin()
    await asyncio.sleep(0)
    await stage.step(StepOutput(late.requests[0], stage.text.encode("the")))
    assert late.text == "the"


async def test_half_a_character_is_no_first_token(stage: Stage) -> None:
    """What is shown first waits for nobody, also where the first tokens show nothing yet."""
    await stage.crowd()
    late = stage.begin()
    await asyncio.sleep(0)
    parts = stage.text.encode("ß")
    assert len(parts) == 2
    await stage.step(StepOutput(late.requests[0], parts[:1]))
    assert late.writes == []
    await stage.step(StepOutput(late.requests[0], parts[1:]))
    assert late.text == "ß"


async def test_the_end_waits_for_nobody(stage: Stage) -> None:
    """And takes with it what was held."""
    await stage.crowd()
    one = stage.streams[0]
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" cat")))
    assert one.text == "the"
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" sat"), "length"))
    assert one.text == "the cat sat"
    assert one.pieces[-1].finish == "length"


async def test_who_reads_slowly_gets_the_end_too(stage: Stage) -> None:
    one = stage.begin()
    one.reads.clear()
    await asyncio.sleep(0)
    await stage.step(StepOutput(one.requests[0], stage.text.encode("the")))
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" cat"), "length"))
    one.reads.set()
    await stage.settle()
    assert one.text == "the cat"
    assert one.pieces[-1].finish == "length"


async def test_a_stop_string_ends_the_answer_when_it_comes(stage: Stage) -> None:
    """Not when the next write is due: the engine makes no tokens that nobody wants."""
    await stage.crowd()
    one = stage.begin(choices=2, stops=["sat"])
    await asyncio.sleep(0)
    for word in ("the", " cat"):
        await stage.step(*(StepOutput(request, stage.text.encode(word)) for request in one.requests))
    assert not stage.hand.cancelled
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" sat")))
    assert stage.hand.cancelled == one.requests[:1], "the other choice goes on"
    assert one.text == "the cat "
    assert [piece.finish for piece in one.pieces if piece.index == 0][-1] == "stop"


async def test_what_comes_after_a_stop_string_is_not_counted(stage: Stage) -> None:
    """Also when the event loop is late, and several steps lie there at once."""
    await stage.crowd()
    one = stage.begin(stops=["sat"])
    await asyncio.sleep(0)
    for word in ("the", " cat", " sat", " on"):
        stage.generator.deliver([StepOutput(one.requests[0], stage.text.encode(word))])
    await stage.settle()
    assert one.text == "the cat "
    assert one.flow.work.used().completion == len(stage.text.encode("the cat sat"))


async def test_nobody_touches_what_waits(stage: Stage) -> None:
    """A token among many costs nothing until it is time; then each stream gets all of its own at once."""
    await stage.crowd()
    before = Counting.pushes
    words = (" cat", " sat", " on")
    for word in words:
        await stage.step(*(StepOutput(one.requests[0], stage.text.encode(word)) for one in stage.streams))
        assert Counting.pushes == before
    stage.now += LONGEST_WAIT_SECONDS
    await stage.step(*(StepOutput(one.requests[0], stage.text.encode(" the")) for one in stage.streams))
    assert Counting.pushes == before + STREAMS
    assert {one.text for one in stage.streams} == {"the" + "".join(words) + " the"}


async def test_a_new_prompt_brings_out_what_waits(stage: Stage) -> None:
    """Its step is a long one."""
    await stage.crowd()
    one = stage.streams[0]
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" cat")))
    assert one.text == "the"
    stage.begin()
    await stage.settle()
    assert one.text == "the cat"


async def test_who_has_left_or_only_reads_counts_no_more(stage: Stage) -> None:
    """A stream that is the only one left to write does not wait for those whose readers stand still."""
    await stage.crowd()
    one, *others = stage.streams
    for other in others[::2]:
        other.reads.clear()
    for word in (" cat", " sat"):
        await stage.step(*(StepOutput(other.requests[0], stage.text.encode(word)) for other in others))
    await stage.step(*(StepOutput(other.requests[0], [], "length") for other in others))
    writes = len(one.writes)
    for count, word in enumerate((" cat", " sat", " on"), 1):
        stage.now += 0.001
        await stage.step(StepOutput(one.requests[0], stage.text.encode(word)))
        assert len(one.writes) == writes + count
    for other in others:
        other.reads.set()
    await eventually_async(lambda: {other.text for other in others} == {"the cat sat"})


async def test_nothing_is_kept_of_those_who_left(stage: Stage) -> None:
    for number in range(STREAMS):
        stage.begin(stops=["mat"] if number % 2 else [])
    await asyncio.sleep(0)
    for word in ("the", " cat"):
        await stage.step(*(StepOutput(one.requests[0], stage.text.encode(word)) for one in stage.streams))
    flows = [weakref.ref(one.flow) for one in stage.streams]
    tasks = [one.task for one in stage.streams if one.task]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    del task, tasks
    cancelled = stage.hand.cancelled
    assert len(cancelled) == STREAMS
    # The engine lets go of them with its next step.
    await stage.step(*(StepOutput(request, [], error=CancelledError("it was cancelled")) for request in cancelled))
    stage.streams.clear()
    cancelled.clear()
    gc.collect()
    assert not [flow for flow in flows if flow() is not None]


async def test_logprobs_stay_with_their_tokens(stage: Stage) -> None:
    await stage.crowd()
    one = stage.begin(logprobs=True)
    await asyncio.sleep(0)
    tokens = list(stage.tokens())
    for number, token in enumerate(tokens):
        await stage.step(StepOutput(one.requests[0], [token], logprobs=[Logprob(-float(number), [])]))
    await stage.step(StepOutput(one.requests[0], [], "length"))
    scored = [each for piece in one.pieces for each in piece.scored or ()]
    assert [each.token for each in scored] == [stage.text.name(token) for token in tokens]
    assert [each.logprob for each in scored] == [-float(number) for number in range(len(tokens))]
    assert len(one.writes) < len(tokens)
    for piece in one.pieces:
        assert "".join(each.token[0] for each in piece.scored or ()) == piece.text


async def test_choices_do_not_mix(stage: Stage) -> None:
    await stage.crowd()
    one = stage.begin(choices=2)
    await asyncio.sleep(0)
    for first, second in zip(stage.text.encode("the cat sat on"), stage.text.encode("the dog ate the"), strict=False):
        await stage.step(StepOutput(one.requests[0], [first]), StepOutput(one.requests[1], [second]))
    await stage.step(StepOutput(one.requests[1], [], "length"))
    assert [piece.finish for piece in one.pieces if piece.index == 1][-1] == "length"
    await stage.step(StepOutput(one.requests[0], [], "stop"))
    assert one.text_of(0).startswith("the cat sat")
    assert one.text_of(1).startswith("the dog ate")
    assert all(len({piece.index for piece in pieces}) == len(pieces) for _, pieces in one.writes)


async def test_calls_keep_their_order(stage: Stage) -> None:
    """The parts of a tool call are events of their own, however many leave together."""
    await stage.crowd()
    one = stage.begin(calls=True)
    await asyncio.sleep(0)
    written = f'{CALL_BEGIN}\n{{"name":"look","arguments":{{"at": "the cat on the mat"}}{ending()}'
    for token in stage.text.encode(written):
        await stage.step(StepOutput(one.requests[0], [token]))
    await stage.step(StepOutput(one.requests[0], [], "stop"))
    parts = [part for piece in one.pieces for part in piece.calls]
    assert [part.name for part in parts][:2] == ["look", None]
    assert "".join(part.arguments for part in parts) == '{"at": "the cat on the mat"}'
    assert one.pieces[-1].finish == "tool_calls"


async def test_an_error_comes_after_what_was_held(stage: Stage) -> None:
    await stage.crowd()
    one = stage.streams[0]
    await stage.step(StepOutput(one.requests[0], stage.text.encode(" cat")))
    await stage.step(StepOutput(one.requests[0], [], error=EngineFaultError("the model failed: Test")))
    assert one.text == "the cat"
    assert isinstance(one.error, errors.ServerError)


async def test_an_answer_in_one_piece_is_woken_at_its_beginning_and_end(stage: Stage) -> None:
    """Who asked for JSON has no use for a write in between."""
    one = stage.begin(stream=False)
    await asyncio.sleep(0)
    tokens = list(stage.tokens())
    for token in tokens:
        await stage.step(StepOutput(one.requests[0], [token]))
    stage.now += LONGEST_WAIT_SECONDS
    await stage.step(StepOutput(one.requests[0], [], "length"))
    assert one.text == stage.text.decode(tokens)
    assert len(one.writes) == 2


async def test_a_fault_in_one_answer_leaves_the_others_alone(stage: Stage) -> None:
    one, other = stage.begin(kind=Broken), stage.begin()
    await asyncio.sleep(0)
    await stage.step(StepOutput(one.requests[0], [5]), StepOutput(other.requests[0], stage.text.encode("the")))
    assert other.text == "the"
    assert one.task is not None
    with pytest.raises(RuntimeError, match="made for this test"):
        await one.task
    stage.streams.remove(one)


async def test_streams_together_say_what_each_says_alone() -> None:
    """Through engine and application: 48 streams say what the same questions get as JSON, logprobs and usage too."""
    app = InProcess()
    try:
        fields = [
            {"messages": [{"role": "user", "content": f"the cat {number % 12}"}], "max_tokens": 30 + number}
            for number in range(48)
        ]
        alone = [(await app.ask(logprobs=True, **one)).json() for one in fields]
        ask = {"logprobs": True, "stream_options": {"include_usage": True}}
        together = await asyncio.gather(*(app.chunks(**ask, **one) for one in fields))
        for whole, chunks in zip(alone, together, strict=True):
            said = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            choice = whole["choices"][0]
            assert "".join(each["delta"].get("content", "") for each in said) == choice["message"]["content"]
            shown = [entry for each in said if each["logprobs"] for entry in each["logprobs"]["content"]]
            assert [entry["token"] for entry in shown] == [entry["token"] for entry in choice["logprobs"]["content"]]
            assert said[-1]["finish_reason"] == choice["finish_reason"]
            counts = ("prompt_tokens", "completion_tokens")
            assert [chunks[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    finally:
        await app.close()


@pytest.mark.parametrize("choices", [1, 2])
async def test_what_begins_and_ends_an_answer_has_no_write_of_its_own(choices: int) -> None:
    """Who speaks leaves with the first words; what was used, with the end."""
    app, writes = InProcess(), list[bytes]()
    # Greedy: by chance one answer in ten has no text at all, and its end is its first word.
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": choices,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    asked = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Message:
        return asked.pop() if asked else await asyncio.Future()

    async def send(message: Message) -> None:
        writes.extend(filter(None, [message.get("body")]))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    try:
        await app.app(scope, receive, send)
    finally:
        await app.close()
    first, *_, last = ([line.removeprefix(b"data: ") for line in write.splitlines() if line] for write in writes)
    opened = [json.loads(event)["choices"][0] for event in first]
    assert [choice["delta"].get("role") for choice in opened[:choices]] == choices * ["assistant"]
    assert opened[choices]["delta"]["content"]
    *_, used, done = last
    assert json.loads(used)["usage"]["completion_tokens"] == 3 * choices
    assert done == b"[DONE]"
