"""The end of background tasks."""

import asyncio
import logging
from typing import Any

log = logging.getLogger("lab_proxy")

AGAIN_SECONDS = 2.0  # for a task to clean up; then it is cancelled again
ATTEMPTS = 5  # so that no task holds up the shutdown


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks until they are done: one cancellation may get lost where it meets the end of what a task awaits."""
    left = {task for task in tasks if task is not None}
    for _ in range(ATTEMPTS):
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=AGAIN_SECONDS)
    for task in left:
        log.error("task %s does not end: %s", task.get_name(), task.get_stack(limit=1))
