"""Strict JSON, canonical JSON and keys: lab_proxy.canonical."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from counts import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_proxy import canonical
from lab_proxy.cache import key as cache_key
from lab_proxy.cache import streams
from lab_proxy.endpoints import CHAT
from lab_proxy.errors import InvalidRequest
from lab_proxy.http import guards
from lab_proxy.long_bodies import LONG_BODY
from processes import GENEROUS_SECONDS

FIELDS = {"tenant": "t", "upstream": "u", "model": "m", "revision": "r", "endpoint": "/v1/x", "body": {"a": 1}}


def form(text: str) -> bytes:
    return canonical.encode(canonical.parse(text.encode()))


def key(**changed: object) -> str:
    return cache_key.key_of(b"s" * 32, cache_key.canonical_form(**(FIELDS | changed)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"b": 1, "a" :2}', '{"a":2,"b":1}'),
        ('{"x": [1, 1.0, 1e0, 100E-2, -0, -0.0, 0e5]}', '{"x":[1,1,1,1,0,0,0]}'),
        ('{"seed": 9007199254740993}', '{"seed":9007199254740993}'),
        ('{"seed": 9007199254740993.0}', '{"seed":9007199254740993}'),
        ('{"seed": 18446744073709551617}', '{"seed":18446744073709551617}'),
        ('{"x": [0.1, 0.10, 1e-1, 123.456]}', '{"x":[0.1,0.1,0.1,123.456]}'),
        ('{"x": [0.000001, 1e-7, 1.5e-10, -2.5e-8]}', '{"x":[0.000001,1e-7,1.5e-10,-2.5e-8]}'),
        ('{"x": [5e-324, 4.35, 1e21]}', '{"x":[5e-324,4.35,1000000000000000000000]}'),
        ('{"x": [1e39, 1e40, 1.5e308]}', '{"x":[1' + "0" * 39 + ",1e+40,1.5e+308]}"),
        ('{"x": 1' + "0" * 41 + "}", '{"x":1e+41}'),
        ('{"x": [-1e41, -1' + "0" * 41 + ".0]}", '{"x":[-1e+41,-1e+41]}'),
        ('{"x": ' + "9" * 40 + "}", '{"x":' + "9" * 40 + "}"),
        ('{"x": "\\u00e9\\/\\u0041"}', '{"x":"é/A"}'),
        ('{"x": "\\u0000\\u001b\\n\\u007f\\u2028"}', '{"x":"\\u0000\\u001b\\n\x7f\u2028"}'),
        ('{"x": "\\ud83d\\ude00"}', '{"x":"😀"}'),
        ('{"x": [true, false, null, {}, []]}', '{"x":[true,false,null,{},[]]}'),
        # RFC 8785's example of key order: by UTF-16 code units, so that 😀 (d83d) comes before ﬀ (fb00).
        ('{"\\ufb00": 1, "\\ud83d\\ude00": 2, "\\u20ac": 3, "1": 4, "\\r": 5}', '{"\\r":5,"1":4,"€":3,"😀":2,"ﬀ":1}'),
    ],
)
def test_cache_k1_canonical_form(text: str, expected: str) -> None:
    """Order, white space, escapes and the spelling of a number do not matter; integers stay exact up to 40 digits."""
    assert form(text) == expected.encode()


def test_cache_k1_numbers_do_not_amplify() -> None:
    """A short spelling of a large number is no way to make the proxy write and hash fifty times what was sent."""
    sent = '{"x": [' + ",".join(["1e308"] * 1000) + "]}"
    assert len(form(sent)) < 2 * len(sent)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"x": "a"}', '{"x": "A"}'),
        ('{"x": "a"}', '{"x": "a "}'),
        ('{"x": "\\u00e9"}', '{"x": "e\\u0301"}'),
        ('{"x": 1}', '{"x": "1"}'),
        ('{"x": 1}', '{"x": true}'),
        ('{"x": 0}', '{"x": false}'),
        ('{"x": [1, 2]}', '{"x": [2, 1]}'),
        ('{"x": [[1], 2]}', '{"x": [[1, 2]]}'),
        ('{"user": "bob", "seed": 1}', '{"user": "bobseed: 1"}'),
        ('{"x": 9007199254740992}', '{"x": 9007199254740993}'),
    ],
)
def test_cache_k1_what_differs_stays_different(one: str, other: str) -> None:
    assert form(one) != form(other)


def test_cache_k1_every_part_of_the_key_counts() -> None:
    """Tenant, upstream, model, revision, endpoint, body and secret each change the key; nothing leaks between them."""
    plain = key()
    changed = [key(**{name: "z"}) for name in FIELDS]
    assert len({plain, *changed, key(revision=None), key(tenant="tu", upstream="")}) == len(FIELDS) + 3
    assert cache_key.key_of(b"z" * 32, cache_key.canonical_form(**FIELDS)) != plain  # type: ignore[arg-type]
    assert len(plain) == 64


def test_cache_k1_keys_of_inputs() -> None:
    """One key an input: another input, another rest and another secret make another; none is a whole request's."""
    inputs = [b'"a"', b'"b"', b"[1]"]
    keys = cache_key.input_keys(b"s" * 32, key(), inputs)
    assert keys == cache_key.input_keys(b"s" * 32, key(), inputs[:1]) + keys[1:]
    others = cache_key.input_keys(b"s" * 32, key(model="z"), inputs) + cache_key.input_keys(b"z" * 32, key(), inputs)
    assert len({key(), *keys, *others}) == 10
    assert all(len(each) == 64 for each in keys)


def test_cache_k2_every_field_is_in_the_key_but_those_that_cannot_change_the_answer() -> None:
    plain = cache_key.comparable({"model": "alias", "messages": []}, "m", {})
    assert plain == {"model": "m", "messages": []}
    assert "prompt_cache_retention" in cache_key.UNKEYED
    for name in cache_key.UNKEYED:
        assert cache_key.comparable({"model": "alias", "messages": [], name: {"a": 1}}, "m", {}) == plain
    for name in ("seed", "tools", "a_field_nobody_knows", "logit_bias"):
        assert cache_key.comparable({"messages": [], name: {"a": 1}}, "m", {}) != plain


def test_cache_k3_null_default_and_left_out_are_the_same() -> None:
    defaults = {"n": b"1", "logprobs": b"false", "response_format": b'{"type":"text"}'}
    plain = {"model": "m"}
    for text in (
        '{"n": 1}',
        '{"n": 1.0}',
        '{"n": null}',
        '{"logprobs": false}',
        '{"unknown": null}',
        '{"response_format": {"type": "text"}}',
    ):
        assert cache_key.comparable(canonical.parse(text.encode()), "m", defaults) == plain
    for text in ('{"n": 2}', '{"n": true}', '{"logprobs": 0}', '{"unknown": false}'):
        assert cache_key.comparable(canonical.parse(text.encode()), "m", defaults) != plain


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 1}',
        b'{"x": {"a": 1, "\\u0061": 2}}',
        b'{"x": NaN}',
        b'{"x": -Infinity}',
        b'{"x": 1e400}',
        b'{"x": ' + b"9" * 400 + b"}",
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": "\xff"}',
        b'{"x": "\xed\xa0\x80"}',
        b'{"x": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"x": "\\ude00\\ud83d"}',
        b'{"x":' * 64 + b"[]" + b"}" * 64,
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b"[]",
        b"null",
        b"1",
        b'"{}"',
        b"",
        b"{",
        b"{} {}",
        b"{'x': 1}",
        b'{"x": 01}',
        b'{"x": 1,}',
        b'{"x": "a\nb"}',
        b"\xef\xbb\xbf{}",
        b'{"x": 1}\x00',
        '{"x": 1}'.encode("utf-16"),
    ],
)
def test_cache_k4_ambiguous_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        canonical.parse(raw)
    assert refused.value.status == 400


LATE_DUPLICATE = """
from lab_proxy import canonical
from lab_proxy.errors import InvalidRequest
from lab_proxy.http import guards

keys = 500_000
raw = b"{" + b",".join(b'"k%d":1' % i for i in range(keys)) + b',"k%d":1}' % (keys - 1)
assert len(raw) < 8 * 1024 * 1024  # as large as a body may be
try:
    canonical.parse(raw)
except InvalidRequest as refused:
    print(refused)
"""


def test_cache_k4_a_late_duplicate_is_found_in_linear_time() -> None:
    """Half a million keys are looked at once each. Compared with all before it (10^11 comparisons) each takes hours, so
    that the process is ended and the test fails."""
    found = subprocess.run(
        [sys.executable, "-c", LATE_DUPLICATE], capture_output=True, text=True, timeout=GENEROUS_SECONDS, check=True
    )
    assert 'duplicate key "k499999"' in found.stdout


def test_cache_k4_depth_64_is_accepted() -> None:
    assert canonical.parse(b'{"x":' * 63 + b"[]" + b"}" * 63)
    assert canonical.parse(b'{"x":[' + b"[]," * 500 + b"[]]}")


texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=cases(50, 100))
@given(st.dictionaries(texts, values, max_size=4))
def test_cache_k1_form_is_stable(value: dict[str, object]) -> None:
    """The form of the form is the form; it holds the same data, and no spelling of the same data changes it."""
    once = form(json.dumps(value))
    assert form(once.decode()) == once
    assert form(json.dumps(value, ensure_ascii=False, indent=3)) == once
    assert form(json.dumps(dict(reversed(value.items())))) == once
    assert json.loads(once, parse_int=float) == json.loads(json.dumps(value), parse_int=float)


@settings(deadline=None, max_examples=cases(50, 100))
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_cache_k1_numbers_keep_their_value(value: float) -> None:
    said = canonical.encode({"x": value}).decode()[5:-1]
    assert float(said) == value
    digits = said.lstrip("-").replace(".", "").partition("e")[0]
    assert value == math.trunc(value) or len(digits.strip("0")) <= 17


@settings(deadline=None, max_examples=cases(50, 100))
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0dDe8+-1.nulltrue ', max_size=60).map(str.encode))
def test_cache_k4_no_body_is_a_fault(raw: bytes) -> None:
    """Any bytes give an object or a 400, nothing else."""
    with contextlib.suppress(InvalidRequest):
        assert isinstance(canonical.parse(raw), dict)


# ---- K6: the vectors, and a second implementation that knows the contract only

VECTORS = json.loads((Path(__file__).parent / "vectors/cache_keys.json").read_text("utf-8"))


def second_form(value: object) -> str:
    """Canonical JSON by other means: of dictionaries, lists, strings, Decimals, booleans and None."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{second_form(name)}:{second_form(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(second_form, value)) + "]"
    if not isinstance(value, Decimal):
        return json.dumps(value, ensure_ascii=False)
    if value == value.to_integral_value() and abs(value) < 10**40:
        return str(int(value))
    shown = repr(float(value))  # ECMAScript's, but for where the exponent begins and how it is written
    digits, _, power = shown.partition("e")
    if power or not 1e-6 <= abs(value) < 1e21:
        digits, power = f"{Decimal(shown).normalize():e}".split("e")
        return f"{digits}e{int(power):+d}" if not -7 < int(power) < 21 else f"{Decimal(shown):f}"
    return digits


def second_key(secret: str, unkeyed: list[str], vector: dict[str, Any]) -> tuple[str, str]:
    body = json.loads(vector["request"], parse_float=Decimal, parse_int=Decimal)
    defaults = json.loads(json.dumps(vector["defaults"]), parse_float=Decimal, parse_int=Decimal)
    body = {name: value for name, value in body.items() if name not in unkeyed and value is not None}
    body = {name: value for name, value in body.items() if second_form(value) != second_form(defaults.get(name))}
    if isinstance(body.get("stop"), list) and len(body["stop"]) == 1:
        (body["stop"],) = body["stop"]
    if body.get("tools") and body.get("tool_choice") == "auto":
        body.pop("tool_choice")
    if vector.get("local") and body.get("max_tokens") is None and "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        match message:
            case {"content": [{"type": "text", "text": str(text), **rest}]} if not rest:
                message["content"] = text
    parts = [Decimal(4), *(vector[name] for name in ("tenant", "upstream", "model", "revision", "endpoint"))]
    form = second_form([*parts, body | {"model": vector["model"]}])
    return form, hmac.new(secret.encode(), form.encode(), "sha256").hexdigest()


# Of the vectors of each version of the contract.
DIGESTS = {4: "ee06c28f1abde081cbbc4a0cab7148c132bb73a6936002917c3a9c25fbf73b29"}


def test_cache_k6_other_keys_are_another_version() -> None:
    """Vectors change with `cache.key.CONTRACT` alone: an old entry under a new meaning would be a wrong answer."""
    digest = hashlib.sha256(json.dumps(VECTORS, sort_keys=True).encode()).hexdigest()
    assert DIGESTS[cache_key.CONTRACT] == digest, "the vectors have changed: raise CONTRACT, and add the digest here"


SAME = {
    "stop": ({"stop": "x"}, {"stop": ["x"]}, {"stop": ["x", "y"]}),
    "tool_choice": ({"tools": [1]}, {"tools": [1], "tool_choice": "auto"}, {"tools": [1], "tool_choice": "none"}),
    "tool_choice without tools": ({"a": 1, "tool_choice": "auto"}, {"tool_choice": "auto", "a": 1}, {"a": 1}),
    "content": (
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": ""}]}]},
    ),
    "content with more": (
        {"messages": [{"content": [{"type": "text", "text": "x", "cache": 1}]}]},
        {"messages": [{"content": [{"cache": 1, "type": "text", "text": "x"}]}]},
        {"messages": [{"content": "x"}]},
    ),
    "max_tokens": ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 6}),
}


@pytest.mark.parametrize("case", SAME)
def test_cache_two_spellings_of_a_request_have_one_key(case: str) -> None:
    one, same, other = (cache_key.comparable(body, "m", {}, local=True) for body in SAME[case])
    assert canonical.encode(one) == canonical.encode(same) != canonical.encode(other)


def test_cache_an_upstream_may_tell_the_limits_apart() -> None:
    one, other = ({name: 5} for name in ("max_tokens", "max_completion_tokens"))
    assert cache_key.comparable(one, "m", {}) != cache_key.comparable(other, "m", {})


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["title"])
def test_cache_k6_vectors(vector: dict[str, Any]) -> None:
    """Every vector's form and key, by this package and by a second implementation of the contract."""
    assert VECTORS["version"] == cache_key.CONTRACT
    assert VECTORS["unkeyed"] == sorted(cache_key.UNKEYED)
    parts = {name: vector[name] for name in ("tenant", "upstream", "model", "revision", "endpoint")}
    defaults = {name: canonical.encode(value) for name, value in vector["defaults"].items()}
    local = vector.get("local", False)
    body = cache_key.comparable(canonical.parse(vector["request"].encode()), vector["model"], defaults, local=local)
    form = cache_key.canonical_form(**parts, body=body)
    assert (form.decode(), cache_key.key_of(VECTORS["secret"].encode(), form)) == (vector["canonical"], vector["key"])
    assert second_key(VECTORS["secret"], VECTORS["unkeyed"], vector) == (vector["canonical"], vector["key"])


async def test_a_long_body_is_parsed_outside_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB took seconds, in which the process answered nobody. A short body is not worth a thread."""
    threads = []
    monkeypatch.setattr(guards, "parse", lambda raw: threads.append(threading.get_ident()) or {})
    for size in (LONG_BODY, LONG_BODY + 1):
        await guards.parse_body(b"x" * size)
    assert [thread == threading.get_ident() for thread in threads] == [True, False]


def test_a_long_text_is_replayed_in_few_events() -> None:
    """1 MB of words is not an event for each word; a short text is. Joined, they are the text."""
    for words, most in ((10, 10), (200_000, streams.MAX_PIECES)):
        text = "word " * words
        message = {"role": "assistant", "content": text}
        answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        events = list(streams.replay(CHAT, answer, "id", 0, usage=False))
        assert len(events) <= most + 3  # the first with the role, the last with the reason, [DONE]
        whole = streams.StreamAccumulator(CHAT)
        for event in events[:-1]:
            whole.feed(json.loads(event[6:]))
        assert whole.answer()["choices"][0]["message"]["content"] == text
