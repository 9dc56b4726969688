"""Upstream APIs: routes, model list, client, retries, fallback, circuit breaker. Knows nothing of the cache."""
