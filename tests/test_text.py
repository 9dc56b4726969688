"""Text and tokens: what a client sees of an answer while it grows."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_model.text import Growing, TemplateError, Text

TEXT = Text(tiny.tokenizer())


def grow(ids: list[int], stop: list[str], step: int = 1) -> tuple[str, bool]:
    growing = Growing(TEXT.decode, stop)
    out = ""
    for at in range(0, len(ids), step):
        out += growing.push(ids[at : at + step])
        if growing.stopped:
            return out, True
    return out + growing.rest(), growing.stopped


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.integers(1, 4))
def test_pieces_add_up_to_the_text(text: str, step: int) -> None:
    """Characters of several tokens come out whole, in any step size."""
    ids = TEXT.encode(text)
    assert grow(ids, [], step) == (TEXT.decode(ids), False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(3, tiny.VOCABULARY - 1), max_size=40))
def test_odd_bytes_are_replaced_not_lost(ids: list[int]) -> None:
    """Tokens that are not UTF-8 give U+FFFD, the same as decoding all at once up to where replacement marks join."""
    text, _ = grow(ids, [])
    mark = "\N{REPLACEMENT CHARACTER}"
    assert text.replace(mark, "") == TEXT.decode(ids).replace(mark, "")


@settings(max_examples=300, deadline=None)
@given(st.text("abc ", max_size=40), st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_leaks(text: str, stops: list[str]) -> None:
    """The answer ends before the first stop string that completes, across any token borders."""
    got, stopped = grow(TEXT.encode(text), stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert (got, stopped) == (text, False)
        return
    assert stopped
    assert not any(stop in got for stop in stops)
    assert text.startswith(got)
    assert any(text.startswith(stop, len(got)) for stop in stops)


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateError, match="roles must alternate"):
        Text(tokenizer).chat([{"role": "user", "content": "hi"}])
