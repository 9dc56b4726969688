"""The response cache: keys, entries, wire modes, storage, single flight. Knows nothing of HTTP or upstreams."""
