"""Estimate of a request's tokens before it runs, for reservations. Knows request bodies; not limits."""

from collections.abc import Mapping
from typing import Any

from ..endpoints import ENDPOINTS

DEFAULT_TOKENS = 256  # reserved for an answer without a length limit; corrected at its end
DATA_TOKENS = 1000  # reserved for an image or audio in the prompt: its size does not give its tokens
SCAN_BYTES = 16_384  # only bodies larger than this are searched for them
MAX_TOKENS = 10**9


def estimate(endpoint: str, body: Mapping[str, Any], size_bytes: int, tpm: int | None) -> tuple[int, int]:
    """Estimated tokens of the prompt (a quarter of its bytes) and of the answer. The default for an answer without a
    length limit never exceeds what `tpm` leaves after the prompt."""
    prompt = max(1, (size_bytes if size_bytes <= SCAN_BYTES else _text_bytes(body)) // 4)
    if not ENDPOINTS[endpoint].generates:
        return prompt, 0
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    n = body.get("n")
    times = n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 1
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        return prompt, min(limit * times, MAX_TOKENS)
    guess = DEFAULT_TOKENS * min(times, MAX_TOKENS)
    return prompt, guess if tpm is None else max(0, min(guess, tpm - prompt))


def _text_bytes(value: Any) -> int:
    """Bytes of the strings inside; data URLs and audio count as DATA_TOKENS."""
    if isinstance(value, str):
        if value.startswith("data:") or (len(value) > SCAN_BYTES and " " not in value[:SCAN_BYTES]):
            return min(len(value), DATA_TOKENS * 4)
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(len(name) + _text_bytes(inner) for name, inner in value.items())
    if isinstance(value, list):
        return sum(map(_text_bytes, value)) + 4 * sum(isinstance(each, int) for each in value)  # token ids
    return 0
