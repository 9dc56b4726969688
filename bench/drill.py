"""`make drill`: streamed answers run without a pause while parts of the lab are replaced; cut streams are counted.

    python -m bench.drill [--proxy URL] [--streams N] [--seconds N] [NAME=COMMAND …]

A step is a shell command that ends when its part is replaced. Before it begins, every stream has sent its first token;
while it runs, a stream that ends is followed by the next; after it, the running ones end by themselves. A stream is cut
when its connection breaks, when it carries an error, or when it ends without [DONE]. One that is refused with a 503
before its first byte is asked again, as OpenAI's clients do, and counted.

Without steps: those of the cluster in containers (`make up CLUSTER=1`). docs/kubernetes.md has those of a real cluster.
Exit code 1 when a stream was cut or failed, or a step's command failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from bench.report import BenchError

PROXY = "http://127.0.0.1:8080"
STREAMS, SECONDS = 4, 30
PROBE_TOKENS = 1000  # of the streams that find how many tokens take so many seconds
FIRST_TOKEN_SECONDS, STREAM_SECONDS, STEP_SECONDS = 120, 600, 1800
AGAIN_SECONDS = 0.5  # after a refusal
PROJECT = "docker ps -q --filter label=com.docker.compose.project=${COMPOSE_PROJECT_NAME:-llm-lab}"
ONE = f"{PROJECT} --filter label=com.docker.compose.service="
HEALTHY = 'until [ "$(docker inspect -f "{{.State.Health.Status}}" $one)" = healthy ]; do sleep 1; done'
CLUSTER_STEPS = {  # of compose.cluster.yaml
    # A changed setting replaces each replica of each model; the second step gives the old one back.
    "revision": f"docker exec -e MODEL_DEFAULT_MAX_TOKENS=1000 $({ONE}model) python -m lab_model.serving.deploy --wait",
    "revision back": f"docker exec $({ONE}model) python -m lab_model.serving.deploy --wait",
    "worker": f"one=$({ONE}worker | head -1); docker exec $one python -m lab_model.serving.drain_node "
    f"&& docker restart $one && {HEALTHY}",
    "proxies": f"for one in $({ONE}proxy); do docker restart $one && {HEALTHY}; done",
}
SMOLLM2_END = {"logit_bias": {"2": -100}}  # without its end token an answer has max_tokens

State = Literal["running", "whole", "cut", "failed", "refused"]


@dataclass
class Stream:
    """One request. began, ended: seconds of a monotonic clock. id: of the request, as the services' logs have it.
    why: what was wrong. events: those with text."""

    began: float
    id: str = ""
    revision: str = ""
    state: State = "running"
    why: str = ""
    events: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    ended: float = 0.0


@dataclass(frozen=True)
class Target:
    """What is asked: the proxy, its model, further fields of the body, the key."""

    proxy: str
    model: str
    more: Mapping[str, Any]
    key: str = "none"

    def body(self, max_tokens: int) -> dict[str, Any]:
        text = f"Count from one to a thousand in words. {uuid.uuid4().hex}"
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.more,
        }

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", "cache-control": "no-store"}


class Streams:
    """So many streams at once, each followed by the next until `finish`."""

    def __init__(self, target: Target, count: int, max_tokens: int) -> None:
        self.all: list[Stream] = []
        self._target, self._count, self._max_tokens = target, count, max_tokens
        self._over = False
        self._lanes: list[asyncio.Task[None]] = []
        # Each on a connection of its own: a kept one would go to a proxy that has ended meanwhile.
        timeout = aiohttp.ClientTimeout(total=STREAM_SECONDS)
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0), timeout=timeout)

    @property
    def running(self) -> list[Stream]:
        """Those that have sent a token and not ended."""
        return [each for each in self.all if each.state == "running" and each.events]

    async def begin(self) -> None:
        """Return when every lane's stream has sent its first token. Raises BenchError when one does not."""
        self._lanes = [asyncio.create_task(self._lane()) for _ in range(self._count)]
        await self.until(lambda: len(self.running) >= self._count, "every stream sends a token")

    async def until(self, true: Callable[[], object], what: str, seconds: float = FIRST_TOKEN_SECONDS) -> None:
        """Wait for a state of the streams. Raises BenchError after `seconds`."""
        until = time.monotonic() + seconds
        while not true():
            if time.monotonic() > until:
                faults = {each.why for each in self.all if each.why}
                raise BenchError(f"not within {seconds:.0f} s: {what}; {'; '.join(faults) or 'no stream failed'}")
            await asyncio.sleep(0.02)

    async def finish(self) -> None:
        """Let the running streams end; begin no other."""
        self._over = True
        await asyncio.gather(*self._lanes)

    async def close(self) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        await self._http.close()

    async def _lane(self) -> None:
        while not self._over:
            stream = Stream(time.monotonic())
            self.all.append(stream)
            await self._ask(stream)
            stream.ended = time.monotonic()
            if stream.state not in ("whole", "cut"):
                await asyncio.sleep(AGAIN_SECONDS)

    async def _ask(self, stream: Stream) -> None:
        url, body = f"{self._target.proxy}/v1/chat/completions", self._target.body(self._max_tokens)
        try:
            async with self._http.post(url, json=body, headers=self._target.headers) as answer:
                stream.id = answer.headers.get("x-request-id", "")
                stream.revision = answer.headers.get("x-model-revision", "")
                if answer.status != 200:
                    stream.state = "refused" if answer.status == 503 else "failed"
                    stream.why = f"{answer.status}: {(await answer.text())[:300]}"
                    return
                async for line in answer.content:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        stream.state = "whole"
                    elif data:
                        self._read(json.loads(data), stream)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: an event that is no JSON
            stream.state, stream.why = ("cut" if stream.events else "failed"), f"{type(error).__name__}: {error}"
        if stream.state == "running":
            stream.state, stream.why = "cut", stream.why or "it ends without [DONE]"

    @staticmethod
    def _read(event: dict[str, Any], stream: Stream) -> None:
        if "error" in event:
            stream.why = f"error event {event['error'].get('code')}: {event['error'].get('message')}"
        elif event.get("choices") and event["choices"][0]["delta"].get("content"):
            stream.events += 1
        if event.get("usage"):
            stream.usage = event["usage"]


@contextlib.asynccontextmanager
async def streams(target: Target, count: int, max_tokens: int) -> AsyncIterator[Streams]:
    """Begun; the block calls `finish`."""
    made = Streams(target, count, max_tokens)
    try:
        await made.begin()
        yield made
    finally:
        await made.close()


@dataclass
class Outcome:
    """Of one step. during: streams that had sent a token when its command began, and ended after that. whole, cut,
    failed, refused: of all streams of the step. longest: seconds of a whole stream. token_seconds: of a token of the
    quickest."""

    step: str
    seconds: float
    during: int
    whole: int
    cut: int
    failed: int
    refused: int
    longest: float
    token_seconds: float
    revisions: list[str]
    completion_tokens: int
    why: list[str]

    @property
    def passed(self) -> bool:
        return not self.cut and not self.failed and self.during > 0

    def line(self) -> str:
        found = (
            f"{self.step:14} {self.seconds:5.0f} s  {self.during:2} streams ran across it, {self.whole:3} whole "
            f"(longest {self.longest:.0f} s), {self.cut} cut, {self.failed} failed, {self.refused} asked again"
        )
        return "\n".join([found, *(f"    {each}" for each in self.why)])


async def step(name: str, command: str, target: Target, count: int, max_tokens: int) -> Outcome:
    """Run the command under streams. Raises BenchError when it fails."""
    async with streams(target, count, max_tokens) as made:
        across, began = made.running, time.monotonic()
        shell = await asyncio.create_subprocess_shell(
            command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            output, _ = await asyncio.wait_for(shell.communicate(), STEP_SECONDS)
        except TimeoutError:
            shell.kill()
            raise BenchError(f"{name}: the command did not end within {STEP_SECONDS} s: {command}") from None
        seconds = time.monotonic() - began
        if shell.returncode:
            raise BenchError(f"{name}: the command ended with {shell.returncode}: {command}\n{output.decode()}")
        await made.finish()
    states = [each.state for each in made.all]
    whole = [each for each in made.all if each.state == "whole"]
    return Outcome(
        step=name,
        seconds=seconds,
        during=len(across),
        whole=len(whole),
        cut=states.count("cut"),
        failed=states.count("failed"),
        refused=states.count("refused"),
        longest=max((each.ended - each.began for each in whole), default=0.0),
        token_seconds=min(((each.ended - each.began) / each.events for each in whole), default=0.0),
        revisions=sorted({each.revision for each in whole}),
        completion_tokens=sum(each.usage.get("completion_tokens", 0) for each in whole),
        why=sorted({each.why for each in made.all if each.why}),
    )


async def first_chat_model(proxy: str, key: str) -> str:
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as http, http.get(f"{proxy}/v1/models", headers=headers) as answer:
        listed = (await answer.json()).get("data", [])
    for each in listed:
        if each.get("kind") == "chat":
            return str(each["id"])
    raise BenchError(f"{proxy} lists no chat model of this lab: name one with --model")


async def drill(options: argparse.Namespace) -> list[Outcome]:
    """Every step, one after the other. Raises BenchError."""
    own = not options.steps
    steps = CLUSTER_STEPS if own else dict(each.split("=", 1) for each in options.steps)
    model = options.model or await first_chat_model(options.proxy, options.key)
    more = json.loads(options.body) if options.body else SMOLLM2_END if own and "smollm2" in model else {}
    target = Target(options.proxy, model, more, options.key)
    found, tokens = [], options.tokens
    if not tokens:
        found = [await step("probe", "true", target, options.streams, PROBE_TOKENS)]
        if not found[0].passed:
            raise BenchError(f"streams fail before any step: {'; '.join(found[0].why)}")
        tokens = math.ceil(options.seconds / found[0].token_seconds)
    say(f"{options.streams} streams of {tokens} tokens at a time, from {model} at {options.proxy}")
    for name, command in steps.items():
        found.append(await step(name, command, target, options.streams, tokens))
        say(found[-1].line())
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="NAME=COMMAND")
    parser.add_argument("--proxy", default=PROXY, help=f"base URL; left out: {PROXY}")
    parser.add_argument("--model", help="left out: the first chat model that the proxy lists")
    parser.add_argument("--key", default=os.environ.get("DRILL_KEY", "none"), help="virtual key; left out: DRILL_KEY")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"at once; left out: {STREAMS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of a stream; left out: {SECONDS}")
    parser.add_argument("--tokens", type=int, help="length of a stream in tokens; left out: measured, for --seconds")
    parser.add_argument("--body", help="further fields of each request, as JSON")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    options = parser.parse_args(argv)
    if wrong := [each for each in options.steps if "=" not in each]:
        parser.error(f"{wrong[0]} is no step: NAME=COMMAND")
    try:
        found = asyncio.run(drill(options))
    except (BenchError, aiohttp.ClientError) as error:
        say(str(error))
        return 1
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    cut = sum(each.cut for each in found)
    say(f"{cut} streams cut")
    return 0 if all(each.passed for each in found) else 1


def say(line: str) -> None:
    print(f"drill: {line}", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
