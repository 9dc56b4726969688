"""proxy: one OpenAI-compatible door to local and paid models, with an exact response cache in redis.

A request meets the modules in this order: `app` (HTTP, who may come in), `canonical` (strict JSON, the cache's key),
`routes` (which upstream serves a name), `exchange` (one request's way), `cache` (redis), `upstream` (the HTTP client),
`entry` (what may be stored, both wire modes of it).
"""

__version__ = "0.1.0"
