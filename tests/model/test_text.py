"""Text and tokens: what a client sees of an answer while it grows, and what of a prompt is control and what is text."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from counts import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_model.text.decoding import Decoding, IncrementalDetokenizer, PieceDecoding
from lab_model.text.tokenizer import ModelTokenizer, TemplateError

PLAIN = tiny.tokenizer()
TEXT = ModelTokenizer.of(PLAIN)
NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def sentencepiece() -> ModelTokenizer:
    """A tokenizer of the other family: spaces are ▁, unknown characters are byte tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("a", "t"), ("▁", "c"), ("▁c", "at"), ("s", "at"), ("t", "h"), ("th", "e")]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁acehnost", *map("".join, merges)]
    vocabulary = {piece: id_ for id_, piece in enumerate(known)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ModelTokenizer(
        made, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", {"bos_token": "<s>"}
    )


def grow(ids: list[int], stop: list[str], step: int = 1, decoding: Decoding | None = None) -> tuple[str, bool]:
    growing = IncrementalDetokenizer(decoding or TEXT.decoding(), stop)
    out = ""
    for at in range(0, len(ids), step):
        out += growing.push(ids[at : at + step])
        if growing.stopped:
            return out, True
    return out + growing.rest(), growing.stopped


@settings(max_examples=cases(50, 300), deadline=None)
@given(st.text(max_size=60), st.integers(1, 4))
def test_pieces_add_up_to_the_text(text: str, step: int) -> None:
    """Characters of several tokens come out whole, in any step size, by either way of decoding."""
    ids = TEXT.encode(text)
    assert grow(ids, [], step) == (TEXT.decode(ids), False)
    assert grow(ids, [], step, PieceDecoding(TEXT.decode)) == (TEXT.decode(ids), False)


@settings(max_examples=cases(50, 500), deadline=None)
@given(st.lists(st.integers(0, tiny.VOCABULARY + 20), max_size=40), st.integers(1, 4))
def test_odd_bytes_are_replaced_as_in_the_whole(ids: list[int], step: int) -> None:
    """Tokens that are not UTF-8, special ones and ids that nobody has: exactly what decoding all at once gives."""
    assert grow(ids, [], step)[0] == TEXT.decode(ids)


@settings(max_examples=cases(50, 200), deadline=None)
@given(st.lists(st.integers(3, tiny.VOCABULARY - 1), max_size=40))
def test_odd_bytes_are_not_lost_by_the_other_way(ids: list[int]) -> None:
    """The same as decoding all at once up to where replacement marks join."""
    text, _ = grow(ids, [], decoding=PieceDecoding(TEXT.decode))
    mark = "\N{REPLACEMENT CHARACTER}"
    assert text.replace(mark, "") == TEXT.decode(ids).replace(mark, "")


@settings(max_examples=cases(50, 300), deadline=None)
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


@settings(max_examples=cases(50, 300), deadline=None)
@given(st.text("abcé안 ", max_size=30), st.integers(1, 3))
def test_every_token_knows_its_place(text: str, step: int) -> None:
    """A token begins where the certain text of those before it ends."""
    ids = TEXT.encode(text)
    growing = IncrementalDetokenizer(TEXT.decoding(), ["cab"], aligned=True)
    for at in range(0, len(ids), step):
        growing.push(ids[at : at + step])
        if growing.stopped:
            break
    growing.rest()
    assert growing.starts is not None
    for index, start in enumerate(growing.starts):
        before = b"".join(TEXT.bytes_of(token) for token in ids[:index])
        assert start == len(before.decode(errors="ignore"))
    assert growing.length == (text.find("cab") if growing.stopped else len(text))


def test_sentencepiece_text_comes_in_pieces_too() -> None:
    text = sentencepiece()
    ids = text.encode("the cat 안 sat 😀 on", special=False)
    assert grow(ids, [], decoding=text.decoding()) == ("the cat 안 sat 😀 on", False)
    assert b"".join(map(text.bytes_of, ids)).decode() == " the cat 안 sat 😀 on"


def test_a_token_has_a_name_and_bytes() -> None:
    """Text where it is text; OpenAI's notation where it is a piece of a character; no bytes where it is special."""
    first = TEXT.encode("é😀"[1:], special=False)[0]
    assert TEXT.name(TEXT.encode("a")[0]) == ("a", [97])
    assert TEXT.name(first) == ("bytes:\\xf0", [0xF0])
    assert TEXT.name(2) == ("<|im_end|>", None)


def test_no_text_is_cut_or_filled_up() -> None:
    """Whatever length the tokenizer's file wishes for."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert ModelTokenizer.of(tokenizer).encode("x" * 6) == TEXT.encode("x" * 6)
    assert ModelTokenizer.of(tokenizer).encode("x") == TEXT.encode("x")


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateError, match="roles must alternate"):
        ModelTokenizer.of(tokenizer).chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", ["", "hello 안녕", "a < b | c > d", "<im_end>", "<|im_en"])
def test_a_prompt_is_what_transformers_makes_of_it(content: str) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]
    expected = PLAIN.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert TEXT.chat(messages) == expected


@settings(max_examples=cases(50, 200), deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "<|im_", "end|>", "<|", "x", " ", "\n", "안"]), max_size=8).map("".join))
def test_special_tokens_in_a_message_are_text(content: str) -> None:
    """Nobody ends a turn or begins another by writing how: the only special tokens are the template's."""
    ids = TEXT.chat([{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}])
    specials = [id_ for id_ in ids if id_ < len(NAMES)]
    assert specials == [1, 2, 1, 2, 1]
    shown = PLAIN.decode(ids, skip_special_tokens=False)
    assert (
        shown == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_in_tools_and_errors_are_text() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<|im_start|>{{ tools | tojson }}"
    tools: list[dict[str, Any]] = [{"function": {"name": "f", "<|im_end|>": ["<|im_start|>"]}}]
    ids = ModelTokenizer.of(tokenizer).chat([], tools)
    assert [id_ for id_ in ids if id_ < len(NAMES)] == [1]
    assert PLAIN.decode(ids).count("<|im_end|>") == 1
    tokenizer.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    with pytest.raises(TemplateError, match=r"^<\|im_end\|>$"):
        ModelTokenizer.of(tokenizer).chat([{"role": "user", "content": "<|im_end|>"}])


def test_special_tokens_of_sentencepiece_are_text_too() -> None:
    text = sentencepiece()
    ids = text.chat([{"role": "user", "content": "cat</s><s> sat"}])
    ends = [text.tokenizer.token_to_id(name) for name in ("<s>", "</s>")]
    assert [id_ for id_ in ids if id_ in ends] == ends
    assert text.decode(ids) == "cat</s><s> sat"


def test_special_tokens_of_a_plain_prompt_are_special() -> None:
    """Who writes a whole prompt writes its special tokens too, as at vLLM."""
    assert TEXT.encode("<|im_start|>") == [1]
