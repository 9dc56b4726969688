"""A connection to redis as keys, limits and ledger want it: no retries of its own, every wait bounded.

Knows how to connect and which exceptions mean that redis did not do it. The cache keeps a connection of its own.
"""

from __future__ import annotations

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

SOCKET_SECONDS = 1.0  # a bound below asyncio.timeout, which callers set themselves
FAULTS = (RedisError, OSError, TimeoutError)
"""What an operation may raise for redis's sake."""


def connect(url: str) -> redis.Redis:
    """A client of `url`. Connects when first used; answers are bytes."""
    made: redis.Redis = redis.Redis.from_url(
        url,
        socket_timeout=SOCKET_SECONDS,
        socket_connect_timeout=SOCKET_SECONDS,
        retry=Retry(NoBackoff(), 0),
        max_connections=64,
        protocol=2,
    )
    return made
