"""The chat page: settings and stored conversations in the sidebar, the conversation in up to four columns."""

from __future__ import annotations

import time
import uuid
from typing import Any

import streamlit as st

from lab_ui import chat, exports, history, surprise
from lab_ui.answer import Answer, Fault
from lab_ui.drawing.chat_settings import draw_settings, link, linked
from lab_ui.drawing.code import draw_code
from lab_ui.drawing.components import announce, draw_history, draw_tokens
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip
from lab_ui.formats import number
from lab_ui.session import Session
from lab_ui.untrusted import plain, span

PACE = 0.1  # seconds between two redraws of growing answers; more for very long ones, see `draw_growing`
session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state


def main() -> None:
    link.read(st.query_params, state)
    turns: list[chat.Turn] = state.setdefault("turns", [])
    state.setdefault("chat_id", uuid.uuid4().hex)

    # 1. The models. A list that was received is kept; if the proxy stops, the next answer reports it.
    listing = proxy.models(session.key)
    if not isinstance(listing, Fault) or "models" not in state:
        state.models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    models: dict[str, dict[str, Any]] = state.models
    columns = draw_settings(models, texts)

    # 2. The question: typed, or stored by a button's callback.
    typed = st.chat_input(
        texts("chat.placeholder" if models else "chat.no_model_placeholder"),
        disabled=not models,
        max_chars=chat.MAX_QUESTION,
    )
    question = typed or (state.pop("asked", None) if models else None)  # kept until there is a model
    if question and models:
        for turn in turns:
            turn.stop()
        answers = [[proxy.ask(chat.request(turns, question, each, place), session.key)]
                   for place, each in enumerate(columns)]  # fmt: skip
        turns.append(chat.Turn(question, answers))
        state[link.key("q")] = turns[0].question
    with st.sidebar:
        draw_stored(turns, len(columns))

    # 3. The conversation. Parts that a rerun can drop are in `st.empty()`, else Streamlit keeps showing them, dimmed,
    #    while an answer grows.
    draw_head(turns)
    welcome = st.empty()
    if not models:
        with welcome.container():
            fault = listing if isinstance(listing, Fault) else Fault("no_model")
            draw_fault(session, fault, "models", lambda: None)
            st.fragment(rerun_with_models, run_every=settings.refresh_seconds)(time.monotonic())
    elif not turns:
        with welcome.container():
            draw_examples()
    growing: list[tuple[Answer, Any, Any]] = []
    wide = max([len(columns), *(len(turn.answers) for turn in turns)]) if turns else len(columns)
    with st.container(key="wide" if wide > 1 else None):
        for place, turn in enumerate(turns):
            draw_question(place, turn, models)
            shown = len(turn.answers)
            for column, space in enumerate(st.columns(shown) if shown > 1 else [st.container()]):
                with space, st.chat_message("assistant", avatar=":material/science:"):
                    growing += draw_answer(place, column, turn)

    # 4. Show the growing answers until they end, then rerun to draw the figures and buttons below them.
    link.write(st.query_params, linked(len(columns), models))
    if growing:
        draw_growing(growing)
        st.rerun()
    if turns:
        last = turns[-1].answer(0)
        announce(texts("chat.announce", tokens=str(last.completion_tokens or 0)) if last and last.text else "")


def draw_head(turns: list[chat.Turn]) -> None:
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title(texts("chat.title"), anchor=False, width="content")
        if turns:
            with st.container(horizontal=True, width="content"):
                draw_export(turns)
                st.button(texts("chat.new"), icon=":material/add_comment:", on_click=start_again, key="new")
    intro = st.empty()
    if not turns:
        intro.markdown(f"{texts('chat.intro')}\n\n:small[{texts('chat.honest')}]")


def draw_examples() -> None:
    asked = state.get(link.key("q"))
    if asked:
        st.caption(texts("chat.linked"))
        st.button(
            plain(asked[:200] + ("…" if len(asked) > 200 else "")),
            key="linked",
            type="primary",
            on_click=ask,
            args=(asked,),
        )
    st.caption(texts("chat.try"))
    for column, example in zip(st.columns(2, gap="small") * 2, chat.EXAMPLES, strict=True):
        column.button(example, on_click=ask, args=(example,), width="stretch")


def draw_export(turns: list[chat.Turn]) -> None:
    title = turns[0].question[:80]
    files = {
        "Markdown": ("md", "text/markdown", lambda: exports.markdown(turns, title)),
        "JSONL": ("jsonl", "application/jsonl", lambda: exports.jsonl(turns)),
        "Notebook": ("ipynb", "application/x-ipynb+json",
                     lambda: exports.notebook(turns, title, settings.shown_proxy_url)),
    }  # fmt: skip
    with st.popover(texts("chat.export"), icon=":material/download:"):
        for name, (ending, kind, make) in files.items():
            st.download_button(name, make, f"llm-lab-chat.{ending}", kind, key=f"export-{ending}", on_click="ignore")


# ---- stored conversations


def draw_stored(turns: list[chat.Turn], columns: int) -> None:
    """List the conversations in the browser's storage, and load the one that the reader opens."""
    st.subheader(texts("history.title"), anchor=False)
    fresh = not turns and not state.get("started")
    opened = draw_history(history.dump(state.chat_id, turns, columns), state.chat_id, texts, fresh=fresh)
    if opened is None:
        return
    loaded = history.load(opened, proxy.answer)
    state.started = True
    asked = state.get(link.key("q"))
    # The question of a link has priority over the conversation that this tab had.
    if loaded and not (fresh and asked and asked != loaded[1][0].question):
        for turn in turns:
            turn.stop()
        state.chat_id, state.turns, _ = loaded
        st.rerun()


# ---- the conversation


def draw_question(place: int, turn: chat.Turn, models: dict[str, dict[str, Any]]) -> None:
    with st.chat_message("user", avatar=":material/person:"):
        if state.get("edited") == place:
            st.text_area(texts("chat.edit"), turn.question, key=f"edit-text-{place}", max_chars=chat.MAX_QUESTION,
                         persist_state="session")  # fmt: skip
            with st.container(horizontal=True):
                st.button(texts("chat.edit_send"), type="primary", key=f"edit-send-{place}", on_click=ask_edited,
                          args=(place,))  # fmt: skip
                st.button(texts("chat.edit_cancel"), key=f"edit-cancel-{place}", on_click=edit, args=(None,))
            return
        with st.container(horizontal=True, vertical_alignment="center"):
            st.text(turn.question, width="stretch")
            st.button(texts("chat.edit"), icon=":material/edit:", key=f"edit-{place}", type="tertiary", on_click=edit,
                      args=(place,))  # fmt: skip
        asked = {answer.request.get("model") for answer in turn.every}
        mute = [name for name in asked if name in models and not chat.speaks_korean(models[name])]
        if mute and chat.HANGUL.search(turn.question):
            st.caption(f":material/info: {texts('chat.no_korean', model=', '.join(map(span, mute)))}")


def draw_answer(place: int, column: int, turn: chat.Turn) -> list[tuple[Answer, Any, Any]]:
    """Draw one answer. If it is still growing, return it with the placeholders of its text and its progress line."""
    answer = turn.answer(column)
    if answer is None:
        return []
    key = f"{place}-{column}"
    if len(turn.answers) > 1:
        st.caption(f"**{chat.COLUMN_NAMES[column]}** · {plain(str(answer.request.get('model', '')))}")
    body, line, stop, rest = st.empty(), st.empty(), st.empty(), st.empty()
    if answer.running:
        if answer.text:
            body.markdown(plain(answer.text), anchors=False)
        stop.button(texts("chat.stop"), icon=":material/stop_circle:", key=f"stop-{key}", on_click=answer.stop,
                    shortcut="Esc" if column == 0 else None)  # fmt: skip
        return [(answer, body, line)]
    coloured = bool(answer.tokens) and state.get(f"view-{key}") == "surprise"
    if answer.text and not coloured:
        body.markdown(plain(answer.text), anchors=False)
    with rest.container():
        if coloured:
            draw_surprise(place, column, turn, answer)
        if answer.state == "stopped":
            st.caption(f":material/stop_circle: {texts('chat.stopped')}")
        elif answer.state == "done" and not answer.text:
            st.caption(texts("chat.empty"))
        if answer.finish_reason == "length":
            st.caption(texts("chat.length", limit=number(answer.request.get("max_tokens", 0))))
        if answer.finish_reason == "content_filter":
            st.caption(texts("chat.filtered"))
        if answer.fault:
            last = place == len(state.turns) - 1
            draw_fault(session, answer.fault, key, (lambda: regenerate(place, column)) if last else None)
        cost = chat.cost_text(answer, state.models.get(answer.request.get("model")), price_table, texts)
        shown = chat.figures(answer, texts) | ({texts("figures.cost"): cost} if cost else {})
        draw_strip(shown, highlighted=texts("cache_state.hit"))
        draw_actions(place, column, turn, answer)
        draw_code(session, answer.request, f"code-{key}")
    return []


def price_table() -> dict[str, Any]:
    """The body of /v1/prices, asked once in a session; empty where it was not answered."""
    if "prices" not in state:
        reply = proxy.call("GET", "/v1/prices", session.key, seconds=settings.status_timeout_seconds)
        if isinstance(reply, Fault):
            return {}
        state.prices = dict(reply.body)
    return dict(state.prices)


def draw_actions(place: int, column: int, turn: chat.Turn, answer: Answer) -> None:
    key, siblings = f"{place}-{column}", len(turn.answers[column])
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button(texts("chat.regenerate"), icon=":material/refresh:", key=f"regenerate-{key}", type="tertiary",
                  on_click=regenerate, args=(place, column), help=texts("chat.regenerate_help"))  # fmt: skip
        if siblings > 1:
            st.button(texts("chat.before"), icon=":material/chevron_left:", key=f"before-{key}", type="tertiary",
                      on_click=turn.move, args=(column, -1), disabled=turn.shown[column] == 0)  # fmt: skip
            st.caption(f"{turn.shown[column] + 1} / {siblings}", width="content")
            st.button(texts("chat.after"), icon=":material/chevron_right:", key=f"after-{key}", type="tertiary",
                      on_click=turn.move, args=(column, 1), disabled=turn.shown[column] == siblings - 1)  # fmt: skip
        if answer.tokens:
            state.setdefault(f"view-{key}", "text")
            st.segmented_control(
                texts("chat.view"), ["text", "surprise"], format_func=lambda code: texts(f"chat.views.{code}"),
                required=True, key=f"view-{key}", label_visibility="collapsed",
            )  # fmt: skip


def draw_surprise(place: int, column: int, turn: chat.Turn, answer: Answer) -> None:
    bits, perplexity = surprise.mean_bits(answer.tokens), surprise.perplexity(answer.tokens)
    if bits is not None and perplexity is not None:
        st.caption(texts("surprise.about", bits=number(bits, 2), perplexity=number(perplexity, 2)))
    picked = draw_tokens(surprise.view(answer.tokens), texts, f"tokens-{place}-{column}-{answer.id}", continues=True)
    if picked is not None:
        fault = continue_from(turn, column, answer, *picked)
        if fault is None:
            st.rerun()
        draw_fault(session, fault, f"continue-{place}-{column}")


def draw_growing(growing: list[tuple[Answer, Any, Any]]) -> None:
    """Redraw the answers until they end. Streamlit can end this run at each redraw, for the rerun after a Stop."""
    drawn = [0] * len(growing)
    while running := [answer for answer, _, _ in growing if answer.running]:
        running[0].wait(max(PACE, sum(drawn) / 100_000))
        for answer in running[1:]:
            answer.wait(0)
        for place, (answer, body, line) in enumerate(growing):
            text = answer.text
            if len(text) > drawn[place]:
                body.markdown(plain(text), anchors=False)
                drawn[place] = len(text)
            if answer.running:
                line.caption(texts(chat.PHASES.get("decode" if text else answer.phase, "chat.sent"),
                                   seconds=number(answer.seconds, 1)))  # fmt: skip
            else:
                line.empty()


def rerun_with_models(drawn: float) -> None:
    """While the lab starts: rerun the page as soon as there is a chat model."""
    if time.monotonic() - drawn < 0.5:  # the page itself has just requested the list
        return
    listing = proxy.models(session.key)
    if not isinstance(listing, Fault) and chat.chat_models(listing):
        st.rerun()


# ---- what buttons do


def ask(question: str) -> None:
    state.asked = question


def edit(place: int | None) -> None:
    state.edited = place
    state.pop(f"edit-text-{place}", None)  # an edit that was cancelled


def ask_edited(place: int) -> None:
    """Ask the edited question in a new conversation; the old one stays in the browser's storage."""
    question = str(state[f"edit-text-{place}"]).strip()
    state.edited = None
    if not question:
        return
    for turn in state.turns[place:]:
        turn.stop()
    state.turns = state.turns[:place]
    state.chat_id = uuid.uuid4().hex
    state.asked = question


def regenerate(place: int, column: int) -> None:
    """Ask again without the cache; the new answer is a sibling of the one shown."""
    turn: chat.Turn = state.turns[place]
    answer = turn.answer(column)
    if answer is not None:
        request = answer.request if "messages" in answer.request else turn.answers[column][0].request
        turn.add(column, proxy.ask(request, session.key, {"cache-control": "no-cache"}))


def continue_from(turn: chat.Turn, column: int, answer: Answer, at: int, rank: int) -> Fault | None:
    """Continue the answer from an alternative of a token; the new answer is a sibling. Returns the Fault that prevents
    it, else None."""
    first = turn.answers[column][0].request
    begun = [*answer.tokens[:at], surprise.chosen(answer.tokens[at], rank)]
    text = surprise.text_of(begun)
    ids = []
    for source in ({"messages": first.get("messages", [])}, {"text": text, "add_special_tokens": False}):
        cut = proxy.call("POST", "/v1/inspect/tokenize", session.key, body={"model": first.get("model"), **source})
        if isinstance(cut, Fault):
            return cut
        ids.append([int(each) for each in cut.body.get("ids", [])])
    body = chat.continuation(first, *ids)
    turn.add(column, proxy.ask(body, session.key, begun=begun))
    return None


def start_again() -> None:
    for turn in state.turns:
        turn.stop()
    state.turns, state.started, state.edited = [], True, None
    state.chat_id = uuid.uuid4().hex
    state[link.key("q")] = ""


main()
