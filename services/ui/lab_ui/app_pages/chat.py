"""The chat page: settings in the sidebar, the conversation, and below each answer its figures and its code."""

from __future__ import annotations

import time
from typing import Any

import streamlit as st

from lab_ui import chat, snippets
from lab_ui.answer import Answer, Fault
from lab_ui.drawing.faults import draw_fault
from lab_ui.formats import number
from lab_ui.session import Session
from lab_ui.untrusted import plain

PACE = 0.1  # seconds between two drawings of a growing answer; more for very long ones, see `draw_growing`
session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts


def main() -> None:
    turns: list[chat.Turn] = st.session_state.setdefault("turns", [])

    # 1. The models. A list once received is kept: if the proxy goes away, the next answer reports it.
    listing = proxy.models(session.key)
    if not isinstance(listing, Fault) or "models" not in st.session_state:
        st.session_state.models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    models: dict[str, dict[str, Any]] = st.session_state.models
    sampling = draw_settings(models)

    # 2. The question: typed, or stored by a button's callback.
    typed = st.chat_input(
        texts("chat.placeholder" if models else "chat.no_model_placeholder"),
        disabled=not models,
        max_chars=chat.MAX_QUESTION,
    )
    question = typed or st.session_state.pop("asked", None)
    if question and models:
        if turns:
            turns[-1].answer.stop()
        turns.append(chat.Turn(question, proxy.ask(chat.request(turns, question, sampling), session.key)))

    # 3. The conversation. What a rerun may drop is in `st.empty()`: else it stays, dimmed, while an answer grows.
    draw_head(turns)
    welcome = st.empty()
    if not models:
        with welcome.container():
            draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
            st.fragment(rerun_with_models, run_every=settings.refresh_seconds)(time.monotonic())
    elif not turns:
        with welcome.container():
            st.caption(texts("chat.try"))
            for column, example in zip(st.columns(2, gap="small") * 2, chat.EXAMPLES, strict=True):
                column.button(example, on_click=ask, args=(example,), width="stretch")
    for place, turn in enumerate(turns):
        with st.chat_message("user", avatar=":material/person:"):
            st.text(turn.question)
        with st.chat_message("assistant", avatar=":material/science:"):
            draw_answer(place, turn.answer, last=turn is turns[-1])


def draw_head(turns: list[chat.Turn]) -> None:
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title(texts("chat.title"), anchor=False, width="content")
        if turns:
            st.button(texts("chat.new"), icon=":material/add_comment:", on_click=start_again)
    intro = st.empty()
    if not turns:
        intro.markdown(texts("chat.intro"))
    st.caption(texts("chat.honest"))


def draw_settings(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sidebar: the fields of a request except the messages, and `system`."""
    with st.sidebar:
        st.subheader(texts("settings.title"), anchor=False)
        model = st.selectbox(
            texts("settings.model"), list(models), format_func=lambda name: chat.model_label(name, models, texts),
            disabled=not models, key="model", placeholder="–", persist_state="session",
        )  # fmt: skip
        system = st.text_area(
            texts("settings.system"), placeholder=texts("settings.system_placeholder"), max_chars=chat.MAX_QUESTION,
            key="system", persist_state="session",
        )  # fmt: skip
        temperature = st.slider(
            texts("settings.temperature"), 0.0, 2.0, 0.0, 0.1, help=texts("settings.temperature_help"),
            key="temperature", persist_state="session",
        )  # fmt: skip
        top_p = st.slider(
            texts("settings.top_p"), 0.05, 1.0, 1.0, 0.05, help=texts("settings.top_p_help"), key="top_p",
            persist_state="session",
        )  # fmt: skip
        limit = models.get(model or "", {}).get("context") or chat.DEFAULT_CONTEXT
        max_tokens = st.number_input(
            texts("settings.max_tokens"), 1, limit, min(512, limit), 64, key=f"max_tokens-{limit}",
            help=texts("settings.max_tokens_help", limit=number(limit)), persist_state="session",
        )  # fmt: skip
    return {"model": model, "system": system, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}


def draw_answer(place: int, answer: Answer, *, last: bool) -> None:
    body, line, stop, rest = st.empty(), st.empty(), st.empty(), st.empty()
    if answer.running:
        stop.button(
            texts("chat.stop"),
            icon=":material/stop_circle:",
            key=f"stop-{place}",
            shortcut="Esc",
            on_click=answer.stop,
        )
        draw_growing(answer, body, line)
        line.empty()
        stop.empty()
    if answer.text:
        body.markdown(plain(answer.text), anchors=False)
    with rest.container():
        if answer.state == "stopped":
            st.caption(f":material/stop_circle: {texts('chat.stopped')}")
        elif answer.state == "done" and not answer.text:
            st.caption(texts("chat.empty"))
        if answer.finish_reason == "length":
            st.caption(texts("chat.length", limit=number(answer.request["max_tokens"])))
        if answer.finish_reason == "content_filter":
            st.caption(texts("chat.filtered"))
        if answer.fault:
            draw_fault(session, answer.fault, str(place), ask_again if last else None)
        st.caption(chat.figures(answer, texts), help=texts("figures.legend"))
        with st.expander(texts("code.title"), icon=":material/code:", type="compact"):
            st.caption(texts("code.intro"))
            python, curl = st.tabs(["Python", "curl"])
            python.code(snippets.python(answer.request, settings.shown_proxy_url), language="python", wrap_lines=True)
            curl.code(snippets.curl(answer.request, settings.shown_proxy_url), language="bash", wrap_lines=True)


def draw_growing(answer: Answer, body: Any, line: Any) -> None:
    """Draw the answer until its end. In each drawing Streamlit may end this run for a rerun, after Stop for example."""
    drawn = 0
    while not answer.wait(max(PACE, drawn / 100_000)):
        text = answer.text
        if len(text) > drawn:
            body.markdown(plain(text), anchors=False)
            drawn = len(text)
        line.caption(texts("chat.writing" if drawn else "chat.waiting", seconds=number(answer.seconds, 1)))


def rerun_with_models(drawn: float) -> None:
    """While the lab starts: draw the page anew as soon as there is a model to ask."""
    if time.monotonic() - drawn < 0.5:  # the page itself has just asked
        return
    listing = proxy.models(session.key)
    if not isinstance(listing, Fault) and chat.chat_models(listing):
        st.rerun()


def ask(question: str) -> None:
    st.session_state.asked = question


def ask_again() -> None:
    st.session_state.asked = st.session_state.turns.pop().question


def start_again() -> None:
    for turn in st.session_state.turns:
        turn.answer.stop()
    st.session_state.turns = []


main()
