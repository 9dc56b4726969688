"""The redis client: bounded waits, one error, scripts, and a connection that comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fixtures_proxy import redis_client, redis_url
from lab_proxy import tasks
from lab_proxy.redis import client as redis_module
from lab_proxy.redis import connection
from lab_proxy.redis.address import Address
from lab_proxy.redis.client import Script
from lab_proxy.redis.connection import CommandError, RedisError
from processes import GENEROUS_SECONDS, Process, eventually_async, free_port, redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with redis_server(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine may take its time to connect."""
    monkeypatch.setattr(redis_module, "PROBE_TIMEOUT", GENEROUS_SECONDS)


@asynccontextmanager
async def paused(server: Process) -> AsyncIterator[None]:
    os.kill(server.popen.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.popen.pid, signal.SIGCONT)


async def test_further_commands_fail_at_once_where_too_many_wait(
    server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bounded number of commands waits for a slow redis; each of them is answered when it goes on."""
    monkeypatch.setattr(connection, "MAX_WAITING", 10)
    async with redis_client(server) as client:
        async with paused(server):
            waiting = [asyncio.create_task(client.execute("INCR", "counted")) for _ in range(10)]
            await asyncio.sleep(0)
            with pytest.raises(RedisError, match="too many"):
                await client.execute("INCR", "counted")
        assert await asyncio.gather(*waiting) == list(range(1, 11))
        assert await client.execute("GET", "counted") == b"10"


async def test_a_late_reply_fails_its_command_alone_and_silence_all(
    server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that waits less than the others ends alone; its late reply is nobody else's. After `timeout` of silence
    the connection is lost: what waits fails, further commands fail at once, and it comes back by itself."""
    monkeypatch.setattr(redis_module, "PROBE_SECONDS", (0.01,))
    async with redis_client(server) as client:
        async with paused(server):
            patient = asyncio.create_task(client.execute("ECHO", "patient"))
            with pytest.raises(RedisError, match="no answer in time"):
                await client.execute("ECHO", "hurried", within=0.05)
            assert client.up
        assert await patient == b"patient"
        assert await client.execute("ECHO", "next") == b"next"
    downs: list[str] = []
    async with redis_client(server, timeout=0.2, on_down=downs.append) as client:
        async with paused(server):
            with pytest.raises(RedisError, match="no answer in time"):
                await client.execute("ECHO", "first", within=60)
            assert downs[0] == "no answer in time"
            with pytest.raises(RedisError):
                await client.execute("ECHO", "second")
        await eventually_async(lambda: client.up, what="the client is connected again")
        assert await client.execute("ECHO", "third", within=GENEROUS_SECONDS) == b"third"


async def test_scripts_run_also_where_redis_has_forgotten_them(server: Process) -> None:
    """Alone and among other commands; a refusal is raised, or stands among the replies."""
    add = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    async with redis_client(server) as client:
        for total in (5, 10):
            assert await client.execute(*add(["sum"], 5)) == total
        await client.execute("SCRIPT", "FLUSH")
        pipeline = await client.pipeline([("GET", "sum"), add(["sum"], 1), ("NONSENSE",), add(["sum"], 1)])
        assert pipeline.replies[0] == b"10"
        assert isinstance(pipeline.replies[2], CommandError)
        assert [pipeline.replies[1], pipeline.replies[3]] == [11, 12]
        with pytest.raises(RedisError, match="NONSENSE"):
            await client.execute_all([("GET", "sum"), ("NONSENSE",)])


async def test_a_redis_that_is_not_there_or_refuses_is_one_error(server: Process) -> None:
    """RedisError, which says why; a client that is stopped raises it, too."""
    for url, why in ((f"redis://127.0.0.1:{free_port()}/0", "no connection"),
                     (redis_url(server).replace("//", "//nobody:wrong@"), "redis refuses the connection"),
                     (f"redis://127.0.0.1:{server.port}/99", "redis refuses the connection")):  # fmt: skip
        async with redis_client(url) as client:
            with pytest.raises(RedisError, match=why):
                await client.execute("PING")
    async with redis_client(server) as client:
        assert await client.execute("PING") == b"PONG"
    with pytest.raises(RedisError, match="closed"):
        await client.execute("PING")


async def test_a_url_may_name_a_socket_and_a_database(tmp_path: Path) -> None:
    """unix:// with ?db=, redis:// with /db: the same data. Wrong values name the variable."""
    path = tmp_path / "redis.sock"
    with redis_server(tmp_path, "--unixsocket", str(path), "--requirepass", "p@ss") as server:
        for url in (f"unix://:p%40ss@{path}?db=3", f"redis://:p%40ss@127.0.0.1:{server.port}/3"):
            async with redis_client(url) as client:
                await client.execute("INCR", "both")
        async with redis_client(f"redis://default:p%40ss@127.0.0.1:{server.port}?db=3") as client:
            assert await client.execute("GET", "both") == b"2"
    for wrong in ("redis://host:port/0", "redis://host/zero", "redis://host/0?socket_timeout=3"):
        with pytest.raises(ValueError, match="PROXY_REDIS_URL"):
            Address(wrong)


async def test_a_task_that_misses_a_cancellation_is_ended_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled again; one that never ends does not hold up the shutdown, and the log names it."""
    monkeypatch.setattr(tasks, "AGAIN_SECONDS", 0.01)
    missed = 0

    async def deaf(times: int) -> None:
        nonlocal missed
        while missed < times:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                missed += 1
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf(2))
    await asyncio.sleep(0)
    await tasks.end(None, task)
    assert task.cancelled()
    assert missed == 2
