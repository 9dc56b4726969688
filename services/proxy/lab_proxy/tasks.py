"""Background tasks: when one fails, it is logged, counted and restarted with back-off. Also ends tasks."""

import asyncio
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("lab_proxy")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds until a task that failed starts again
STEADY_SECONDS = 30.0  # after this time without a failure a task counts as healthy
failing: dict[str, str] = {}  # unhealthy tasks of this process: name -> last error
failures: Counter[str] = Counter()


def supervise(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """A task that runs `work` and restarts it whenever it fails."""
    task = asyncio.create_task(_run(name, work), name=name)
    task.add_done_callback(lambda _: failing.pop(name, None))  # one that was ended fails no longer
    return task


async def _run(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    pause = FIRST_PAUSE
    while True:
        began = time.monotonic()
        sound = asyncio.get_running_loop().call_later(STEADY_SECONDS, failing.pop, name, None)
        try:
            return await work()
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))  # not the message: it may hold a request's data
            pause = FIRST_PAUSE if time.monotonic() - began > STEADY_SECONDS else pause
            log.error("task %s failed: %s; it restarts in %g s\n%s", name, type(error).__name__, pause, where)  # noqa: TRY400
            failing[name] = type(error).__name__
            failures[name] += 1
        finally:
            sound.cancel()
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


AGAIN_SECONDS = 2.0  # time for a task to clean up; then it is cancelled again
ATTEMPTS = 5  # cancellations of one task, so that none holds up the shutdown


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks until they are done. A cancellation can get lost if the awaited operation ends at that moment."""
    left = {task for task in tasks if task is not None}
    for _ in range(ATTEMPTS):
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=AGAIN_SECONDS)
    for task in left:
        log.error("task %s does not end: %s", task.get_name(), task.get_stack(limit=1))
