"""proxy: an OpenAI-compatible proxy for local and paid models, with an exact response cache in redis.

A request meets the rooms in this order: `http`, `batches`, `requests`, `keys`, `upstreams`, `cache`, `ledger`, `redis`,
`telemetry`. A room imports only the rooms after it (tests/docs/test_rooms.py). The files in this folder import no room,
except `__main__` and `cli`, which connect all parts.
"""

__version__ = "0.1.0"
