"""The chat page: a conversation with a model of the proxy, and what can be learned from each answer.

Knows Streamlit and what an Answer holds. Does not know HTTP. All text of models and of the proxy is untrusted: it
reaches the page through `plain`, as Markdown without images, formulas and Streamlit's own directives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from . import snippets
from .answers import Answer, Answers, Fault, look
from .settings import Settings
from .texts import Texts

# English in both languages: the embedded model's Korean is poor.
EXAMPLES = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is photosynthesis?",
    "Write a short poem about the sea.",
)
PACE = 0.1  # seconds between two drawings of a growing answer; more for very long ones, see `_follow`
MAX_QUESTION = 32_000  # characters


@dataclass(frozen=True)
class Turn:
    """A question and what became of it."""

    question: str
    answer: Answer


def page(settings: Settings, answers: Answers, words: Texts) -> None:
    turns: list[Turn] = st.session_state.setdefault("turns", [])

    # 1. What can be asked, and how. A model list once seen stays, so that a proxy that went away is said in the answer.
    seen = look(settings, "/v1/models")
    if not isinstance(seen, Fault) or "models" not in st.session_state:
        st.session_state.models = {} if isinstance(seen, Fault) else chat_models(seen)
    models: dict[str, dict[str, Any]] = st.session_state.models
    sampling = _sidebar(models, words)

    # 2. The question: typed, or put there by a button.
    typed = st.chat_input(
        words("chat.placeholder" if models else "chat.no_model_placeholder"),
        disabled=not models,
        max_chars=MAX_QUESTION,
    )
    question = typed or st.session_state.pop("asked", None)
    if question and models:
        if turns:
            turns[-1].answer.stop()
        turns.append(Turn(question, answers.ask(_request(turns, question, sampling))))

    # 3. The conversation. What a rerun may drop stands in `st.empty()`: else it stays, dimmed, while an answer grows.
    _head(turns, words)
    welcome = st.empty()
    if not models:
        with welcome.container():
            _fault(seen if isinstance(seen, Fault) else Fault("no_model"), words)
            st.button(words("chat.again"), icon=":material/refresh:")
            st.fragment(_until_models, run_every=settings.refresh_seconds)(settings, time.monotonic())
    elif not turns:
        with welcome.container():
            st.caption(words("chat.try"))
            for column, example in zip(st.columns(2, gap="small") * 2, EXAMPLES, strict=True):
                column.button(example, on_click=_ask, args=(example,), width="stretch")
    for number, turn in enumerate(turns):
        with st.chat_message("user", avatar=":material/person:"):
            st.text(turn.question)
        with st.chat_message("assistant", avatar=":material/science:"):
            _answer(number, turn.answer, settings, words, last=turn is turns[-1])


def chat_models(listing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Chat models by id, from the body of /v1/models; an alias has the kind and the context of its model."""
    entries = {
        str(entry["id"]): entry for entry in listing.get("data", []) if isinstance(entry, dict) and "id" in entry
    }
    chat = {}
    for name, entry in entries.items():
        model = entries.get(str(entry.get("alias_of")), entry)
        if model.get("kind", "chat") == "chat":  # another upstream says no kind
            chat[name] = {"alias_of": entry.get("alias_of"), "context": model.get("context")}
    return dict(sorted(chat.items(), key=lambda item: item[1]["alias_of"] is not None))


def _until_models(settings: Settings, drawn: float) -> None:
    """A lab that is still starting: draw the page anew as soon as there is a model to ask."""
    if time.monotonic() - drawn < 0.5:  # the page itself has just looked
        return
    seen = look(settings, "/v1/models")
    if not isinstance(seen, Fault) and chat_models(seen):
        st.rerun()


def plain(text: str) -> str:
    """Untrusted Markdown that loads nothing: `![…](…)`, `$…$` and `:red[…]` are shown as they are written.

    Code stays as it is: fences that begin in the first column, and spans within a line. The server's content security
    policy forbids remote images as well, for whatever a parser may read otherwise.
    """
    shown = ""
    fence = ""
    for line in text.split("\n"):
        mark = re.match(r"`{3,}(?=[^`]*$)|~{3,}", line)
        if fence:
            shown += line + "\n"
            if mark and line.startswith(fence) and not line.strip(fence[0] + " \t"):
                fence = ""
        elif mark:
            fence = mark[0]
            shown += line + "\n"
        else:
            # Two spaces keep the line's end: a poem stays a poem.
            shown += _SPECIAL.sub(_escaped, line) + ("  \n" if line.strip() else "\n")
    return shown.rstrip()


# In this order: code span, escape, image, formula, directive.
_SPECIAL = re.compile(r"(?<!`)(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))|\\.|!(?=\[)|\$|:(?=[a-z-]+\[)")


def _escaped(match: re.Match[str]) -> str:
    if match["code"] or match[0].startswith("\\"):
        return match[0]
    return "!\\" if match[0] == "!" else "\\" + match[0]


def _head(turns: list[Turn], words: Texts) -> None:
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title(words("chat.title"), anchor=False, width="content")
        if turns:
            st.button(words("chat.new"), icon=":material/add_comment:", on_click=_new)
    intro = st.empty()
    if not turns:
        intro.markdown(words("chat.intro"))
    st.caption(words("chat.honest"))


def _sidebar(models: dict[str, dict[str, Any]], words: Texts) -> dict[str, Any]:
    """The settings as fields of a request, but for the messages; `system` beside them."""

    def label(name: str) -> str:
        target = models[name]["alias_of"]
        return words("settings.alias", id=name, target=target) if target else name

    with st.sidebar:
        st.subheader(words("settings.title"), anchor=False)
        model = st.selectbox(
            words("settings.model"), list(models), format_func=label, disabled=not models, key="model",
            placeholder="–", persist_state="session",
        )  # fmt: skip
        system = st.text_area(
            words("settings.system"), placeholder=words("settings.system_placeholder"), max_chars=MAX_QUESTION,
            key="system", persist_state="session",
        )  # fmt: skip
        temperature = st.slider(
            words("settings.temperature"), 0.0, 2.0, 0.0, 0.1, help=words("settings.temperature_help"),
            key="temperature", persist_state="session",
        )  # fmt: skip
        top_p = st.slider(
            words("settings.top_p"), 0.05, 1.0, 1.0, 0.05, help=words("settings.top_p_help"), key="top_p",
            persist_state="session",
        )  # fmt: skip
        limit = models.get(model or "", {}).get("context") or 8192
        max_tokens = st.number_input(
            words("settings.max_tokens"), 1, limit, min(512, limit), 64,
            help=words("settings.max_tokens_help", limit=limit), key=f"max_tokens-{limit}", persist_state="session",
        )  # fmt: skip
    return {"model": model, "system": system, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}


def _request(turns: list[Turn], question: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the chat completion. Questions that got no word of an answer are left out."""
    messages = [{"role": "system", "content": sampling["system"]}] if sampling["system"].strip() else []
    for turn in turns:
        if turn.answer.text:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
    messages.append({"role": "user", "content": question})
    return {
        "model": sampling["model"],
        "messages": messages,
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "max_tokens": sampling["max_tokens"],
    }


def _answer(number: int, answer: Answer, settings: Settings, words: Texts, *, last: bool) -> None:
    body, line, stop, rest = st.empty(), st.empty(), st.empty(), st.empty()
    if answer.running:
        stop.button(
            words("chat.stop"),
            icon=":material/stop_circle:",
            key=f"stop-{number}",
            shortcut="Esc",
            on_click=answer.stop,
        )
        _follow(answer, body, line, words)
        line.empty()
        stop.empty()
    if answer.text:
        body.markdown(plain(answer.text), anchors=False)
    with rest.container():
        if answer.state == "stopped":
            st.caption(f":material/stop_circle: {words('chat.stopped')}")
        elif answer.state == "done" and not answer.text:
            st.caption(words("chat.empty"))
        if answer.finish_reason == "length":
            st.caption(words("chat.length", limit=answer.request["max_tokens"]))
        if answer.finish_reason == "content_filter":
            st.caption(words("chat.filtered"))
        if answer.fault:
            _fault(answer.fault, words)
            if last:
                st.button(words("chat.again"), icon=":material/refresh:", key=f"again-{number}", on_click=_ask_again)
        st.caption(_figures(answer, words), help=words("figures.legend"))
        with st.expander(words("code.title"), icon=":material/code:", type="compact"):
            st.caption(words("code.intro"))
            python, curl = st.tabs(["Python", "curl"])
            python.code(snippets.python(answer.request, settings.shown_proxy_url), language="python", wrap_lines=True)
            curl.code(snippets.curl(answer.request, settings.shown_proxy_url), language="bash", wrap_lines=True)


def _follow(answer: Answer, body: Any, line: Any, words: Texts) -> None:
    """Draw the answer while it grows. Each round talks to Streamlit, which is where a rerun (Stop, say) takes over."""
    drawn = 0
    while not answer.wait(max(PACE, drawn / 100_000)):
        text = answer.text
        if len(text) > drawn:
            body.markdown(plain(text), anchors=False)
            drawn = len(text)
        line.caption(words("chat.writing" if drawn else "chat.waiting", seconds=answer.seconds))


def _figures(answer: Answer, words: Texts) -> str:
    """The quiet line: TTFT, tokens/s, tokens, cache, request id; of each what is known."""
    known = []
    if answer.ttft is not None:
        known.append(words("figures.ttft", ms=answer.ttft * 1000))
    if answer.tokens_per_second is not None:
        known.append(words("figures.speed", speed=answer.tokens_per_second))
    if answer.completion_tokens is not None:
        known.append(words("figures.tokens", prompt=answer.prompt_tokens, completion=answer.completion_tokens))
    if answer.cache:
        state = words(f"cache.{answer.cache}" if f"cache.{answer.cache}" in words else "cache.other")
        known.append(f":green[:material/bolt: {state}]" if answer.cache == "hit" else state)
    known.append(words("figures.request_id", id=_code(answer.request_id)))
    return " · ".join(known)


def _fault(fault: Fault, words: Texts) -> None:
    seconds = fault.retry_after if (fault.retry_after or "").isdigit() else 5
    st.error(words(f"faults.{fault.kind}.do", seconds=seconds), title=words(f"faults.{fault.kind}.what"))
    if fault.message:
        st.caption(plain(words("faults.said", message=fault.message[:500])))


def _code(text: str) -> str:
    """As a Markdown code span, whatever the other side sent."""
    return "`" + re.sub(r"[^A-Za-z0-9._-]", "", text)[:128] + "`"


def _ask(question: str) -> None:
    st.session_state.asked = question


def _ask_again() -> None:
    st.session_state.asked = st.session_state.turns.pop().question


def _new() -> None:
    for turn in st.session_state.turns:
        turn.answer.stop()
    st.session_state.turns = []
