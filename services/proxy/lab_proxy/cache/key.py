"""Cache keys: the fields of a request that count, its canonical form, the HMAC of it. Knows no redis and no models."""

import contextlib
import functools
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import canonical
from ..canonical import encode

CONTRACT = 4
"""Version of key and entry. A change of either makes every older entry a miss."""

UNKEYED = frozenset({
    "stream", "stream_options", "user", "safety_identifier", "metadata", "store", "prompt_cache_key",
    "prompt_cache_retention",
})  # fmt: skip
"""Fields that cannot change an answer. All other fields are part of the key, unknown ones too."""


def comparable(
    body: Mapping[str, Any], model: str, defaults: Mapping[str, bytes], *, local: bool = False
) -> dict[str, Any]:
    """The fields of a request body that are part of the key: not UNKEYED, not null, not equal to their default. Two
    spellings of the same request give the same fields.

    `defaults` maps a field to the canonical bytes of its documented default. `local`: a model of the model service
    answers, to which `max_completion_tokens` and `max_tokens` are the same.
    """
    kept = {}
    for field, value in body.items():
        if value is None or field in UNKEYED:
            continue
        default = defaults.get(field)
        if default is None or encode(value) != default:
            kept[field] = value
    kept["model"] = model
    stop = kept.get("stop")
    if isinstance(stop, list) and len(stop) == 1:
        kept["stop"] = stop[0]
    if kept.get("tool_choice") == "auto" and kept.get("tools"):
        del kept["tool_choice"]
    if local and "max_completion_tokens" in kept and "max_tokens" not in kept:
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [_with_plain_text(message) for message in messages]
    return kept


def _with_plain_text(message: Any) -> Any:
    """The message with its text in place of a list of exactly one text part."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        return message
    part = content[0]
    text = part.get("text")
    is_text = part.keys() == {"type", "text"} and part["type"] == "text" and isinstance(text, str)
    return message | {"content": text} if is_text else message


def canonical_form(*, tenant: str, upstream: str, model: str, revision: str | None, endpoint: str, body: Any) -> bytes:
    """The canonical form of a request: requests with equal forms share an entry."""
    return encode([CONTRACT, tenant, upstream, model, revision, endpoint, body])


def with_input(form: bytes, text: bytes) -> bytes:
    """`form` (of an embeddings request without its inputs) with one or more canonical inputs appended."""
    return form[:-1] + b"," + text + b"]"


def key_of(secret: bytes, of: bytes) -> str:
    """The key of a canonical form, 64 hex digits. An HMAC, because a plain hash of a short prompt can be guessed."""
    mac = _keyed(secret).copy()
    mac.update(of)
    return mac.hexdigest()


@functools.lru_cache(maxsize=4)
def _keyed(secret: bytes) -> hmac.HMAC:
    """An HMAC object to be copied, because creating one takes longer than the HMAC of a request."""
    return hmac.new(secret, digestmod="sha256")


def input_keys(secret: bytes, rest: str, inputs: Iterable[bytes]) -> list[str]:
    """One key for each canonical input of a request whose key without its inputs is `rest`.

    It is the HMAC of `rest` (64 hex digits; a canonical form begins with a bracket, so both kinds never collide) and
    the input's bytes. So the other fields are encoded once, not once per input.
    """
    return [key_of(secret, rest.encode() + given) for given in inputs]


def sample_key(key: str, slot: int) -> str:
    """The key of one of several samples; the first sample has the request's own key."""
    return f"{key}:{slot}" if slot else key


def load_secret(path: Path) -> bytes:
    """The secret of the cache keys. Created once: of several starting processes one creates it, and all read it. Raises
    ValueError that names the variable if the file cannot be read or created, or is too short."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                with os.fdopen(descriptor, "w") as out:
                    out.write(secrets.token_hex(32))
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)  # atomic, and only if no other process was faster
            finally:
                draft.unlink()
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"PROXY_CACHE_SECRET_FILE cannot be read or created: {error}") from None
    if len(secret) < 32:
        raise ValueError(f"PROXY_CACHE_SECRET_FILE {path} has fewer than 32 bytes: remove it, and a new one is created")
    return secret


_PARTS = ("version", "tenant", "upstream", "model", "revision", "endpoint")  # of a canonical form, before its body


def differences(one: bytes, two: bytes) -> list[str]:
    """Paths at which two canonical forms differ: paths in the body (`messages[0].content`), or names of the parts
    before it."""
    mine, other = canonical.parse(b'{"form":%s}' % one)["form"], canonical.parse(b'{"form":%s}' % two)["form"]
    named = [name for name, a, b in zip(_PARTS, mine, other, strict=False) if a != b]
    bodies = [{"body": form[len(_PARTS)], "input": form[len(_PARTS) + 1 :]} for form in (mine, other)]
    body = [path for path in _paths(bodies[0]["body"], bodies[1]["body"], "") if path != "model"]
    return named + body + ([] if bodies[0]["input"] == bodies[1]["input"] else ["input"])


def _paths(one: Any, two: Any, at: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for name in sorted(one.keys() | two.keys()):
            path = f"{at}.{name}" if at else name
            if (name in one) != (name in two):
                yield path
            else:
                yield from _paths(one[name], two[name], path)
    elif isinstance(one, list) and isinstance(two, list):
        for place in range(max(len(one), len(two))):
            if place >= min(len(one), len(two)):
                yield f"{at}[{place}]"
            else:
                yield from _paths(one[place], two[place], f"{at}[{place}]")
    elif type(one) is not type(two) or one != two:
        yield at
