"""Token ids of OpenAI's embedding models as texts. Knows OpenAI's vocabularies; not which model answers."""

import functools
from typing import Any

from ..errors import InvalidRequest

VOCABULARIES = {
    "text-embedding-3-small": "cl100k_base",
    "text-embedding-3-large": "cl100k_base",
    "text-embedding-ada-002": "cl100k_base",
}
MAX_IDS = 300_000  # of one request: OpenAI's own limit, and what bounds the time of decoding


@functools.cache
def _encoding(name: str) -> Any:
    import bpe_openai  # type: ignore[import-untyped]  # noqa: PLC0415 - its vocabularies take memory that few need

    return bpe_openai.get_encoding(name)


def decode_inputs(units: list[Any], vocabulary: str) -> list[str]:
    """The texts of `input`: a list of token ids, or a list of such lists. Raises InvalidRequest."""
    one = not isinstance(units[0], list)
    if sum(len(ids) for ids in ([units] if one else units) if isinstance(ids, list)) > MAX_IDS:
        raise InvalidRequest(f"`input` has more than {MAX_IDS:,} token ids.", param="input", code="invalid_value")
    texts = []
    for place, ids in enumerate([units] if one else units):
        at = "input" if one else f"input[{place}]"
        if not isinstance(ids, list) or not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise InvalidRequest(f"`{at}` must be a list of token ids.", param=at, code="invalid_value")
        try:
            texts.append(_encoding(vocabulary).decode(ids))
        except (KeyError, OverflowError, ValueError):
            why = f"`{at}` has ids that are not in {vocabulary}, the vocabulary of the named model."
            raise InvalidRequest(why, param=at, code="invalid_value") from None
    return texts
