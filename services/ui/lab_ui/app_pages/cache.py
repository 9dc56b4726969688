"""The cache page: the phases of one request, two requests compared, one question sent many times in turn or at once."""

from __future__ import annotations

import secrets
from typing import Any

import streamlit as st

from lab_ui import cache, chat, links
from lab_ui.answer import Answer, Fault
from lab_ui.charts import dots, spans
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip, draw_table
from lab_ui.formats import milliseconds, number
from lab_ui.session import Session
from lab_ui.status import Report
from lab_ui.untrusted import quote, span

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
VIEWS = ("xray", "why", "repeat", "stampede")
link = links.Link(
    "cache",
    {
        "view": links.Choice(VIEWS),
        "q": links.Text(cache.QUESTION),
        "change": links.Choice(tuple(cache.CHANGES)),
        "times": links.Number(100, 2, cache.MAX_CALLS),
        "at_once": links.Number(10, 2, cache.MAX_AT_ONCE),
    },
)


def main() -> None:
    link.read(st.query_params, st.session_state)
    st.title(texts("cache.title"), anchor=False)
    st.markdown(texts("cache.intro"))
    st.fragment(draw_live, run_every=settings.refresh_seconds)()
    listing = proxy.models(session.key)
    models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    if not models:
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
        return
    model = next(iter(models))
    view = st.segmented_control(
        texts("cache.views"), VIEWS, format_func=lambda code: texts(f"cache.view.{code}"), key=link.key("view"),
        persist_state="session", required=True, label_visibility="collapsed",
    )  # fmt: skip
    question = st.text_input(
        texts("cache.question"), key=link.key("q"), persist_state="session", max_chars=links.MAX_TEXT
    ) or cache.QUESTION  # fmt: skip
    {"xray": draw_xray, "why": draw_why, "repeat": draw_repeat, "stampede": draw_stampede}[view or VIEWS[0]](
        model, question
    )
    link.write(st.query_params, st.session_state)


def draw_live() -> None:
    """The hit ratio of the whole proxy, refreshed every few seconds."""
    status = proxy.status(session.key)
    figures = Report(status, settings, texts).cache
    if figures:
        draw_strip({texts(f"status.{name}"): value for name, value in figures.items()})


# ---- one request


def draw_xray(model: str, question: str) -> None:
    st.markdown(texts("cache.xray.about"))
    modes = ("normal", "no-cache", "no-store")
    mode = st.segmented_control(
        texts("cache.mode"), modes, format_func=lambda code: texts(f"cache.modes.{code.replace('-', '_')}"),
        key="cache_mode", persist_state="session", required=True, default="normal",
    )  # fmt: skip
    send = st.button(texts("cache.send"), type="primary", icon=":material/send:")
    body = cache.chat_body(model, question)
    if send:
        headers = {} if mode == "normal" else {"cache-control": mode}
        asked = proxy.ask(body, session.key, headers)
        with st.spinner(texts("cache.waiting")):
            while not asked.wait(0.1):
                pass
        st.session_state.xray = asked
        st.session_state.xray_timing = proxy.call(
            "GET", f"/v1/requests/{asked.request_id}/timing", session.key, seconds=settings.status_timeout_seconds
        )
    if "xray" not in st.session_state:
        return
    answer: Answer = st.session_state.xray
    if answer.fault:
        draw_fault(session, answer.fault, "xray")
        return
    # 1. Where the time went.
    timing = st.session_state.xray_timing
    reported = [] if isinstance(timing, Fault) else cache.reported_phases(timing.body)
    phases = reported or cache.measured_phases(answer)
    rows = [
        (texts(f"cache.phase.{each.name}") if f"cache.phase.{each.name}" in texts else each.name, each.begin, each.end,
         f"{milliseconds(each.length / 1000)} ms")
        for each in phases
    ]  # fmt: skip
    st.subheader(texts("cache.waterfall"), anchor=False)
    st.caption(texts("cache.measured_by_proxy" if reported else "cache.measured_by_ui"))
    words = texts("cache.waterfall_alt", phases=", ".join(f"{name} {text}" for name, _, _, text in rows))
    draw_chart(spans(rows, words=words, label=texts("cache.phases"), value="ms"), texts, "xray-chart")
    st.markdown(quote(answer.text[:400]))
    # 2. The headers.
    st.subheader(texts("cache.headers"), anchor=False)
    status = answer.headers.get("cache-status", "")
    draw_table(
        ("Cache-Status", texts("cache.meaning")), cache.header_parts(status, texts), label=texts("cache.headers")
    )
    others = {name: answer.headers[name] for name in cache.SHOWN_HEADERS[1:] if name in answer.headers}
    st.caption(" · ".join(f"{name}: {span(value)}" for name, value in others.items()))
    # 3. The key.
    st.subheader(texts("cache.key"), anchor=False)
    explained = proxy.call("POST", "/cache/explain", session.key, body={"request": answer.request})
    draw_explained(explained)


def draw_explained(explained: Any) -> None:
    if isinstance(explained, Fault):
        draw_fault(session, explained, "explained")
        return
    found = explained.body
    st.markdown(texts("cache.canonical_about"))
    st.code(str(found.get("canonical", "")), language="json", wrap_lines=True)
    st.caption(texts("cache.key_line", key=span(found.get("key", "")), state=state(found)))


def state(found: Any) -> str:
    if not found.get("cacheable", True):
        return texts("cache.not_cacheable", why=span(found.get("why") or ""))
    return cache.state_text(str(found.get("state", "")), texts)


# ---- two requests


def draw_why(model: str, question: str) -> None:
    st.markdown(texts("cache.why.about"))
    listing = proxy.models(session.key)
    names = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    alias = next((name for name, each in names.items() if each["alias_of"] == model), None)
    change = st.pills(
        texts("cache.change"), [*cache.CHANGES], format_func=lambda code: texts(f"cache.changes.{code}"),
        key=link.key("change"), persist_state="session", required=True,
    )  # fmt: skip
    one = cache.chat_body(model, question)
    other = cache.changed(one, change or "order", alias)
    left, right = st.columns(2)
    first = left.text_area(texts("cache.first"), cache.pretty(one), height=270, max_chars=cache.MAX_BODY,
                           key=f"first-{hash((model, question))}", persist_state="session")  # fmt: skip
    second = right.text_area(texts("cache.second"), cache.pretty(other), height=270, max_chars=cache.MAX_BODY,
                             key=f"second-{hash((model, question, change))}", persist_state="session")  # fmt: skip
    bodies = cache.parse_body(first), cache.parse_body(second)
    for body, name in zip(bodies, ("cache.first", "cache.second"), strict=True):
        if body is None:
            st.error(texts("cache.not_json", which=texts(name)), icon=":material/error:")
    if None in bodies:
        return
    guess = st.segmented_control(
        texts("cache.guess"), ["same", "different"], format_func=lambda code: texts(f"cache.guesses.{code}"),
        key=f"guess-{hash((first, second))}", persist_state="session",
    )  # fmt: skip
    if guess is None:
        return
    explained = proxy.call(
        "POST", "/cache/explain", session.key, body={"request": bodies[1], "against": bodies[0]},
        seconds=settings.status_timeout_seconds,
    )  # fmt: skip
    if isinstance(explained, Fault):
        draw_fault(session, explained, "why")
        return
    differs = [str(path) for path in explained.body.get("differs") or []]
    right_guess = (guess == "same") == (not differs)
    verdict = texts("cache.same_key" if not differs else "cache.other_key")
    (st.success if right_guess else st.info)(
        f"{texts('cache.guess_right' if right_guess else 'cache.guess_wrong')} {verdict}",
        icon=":material/check_circle:" if right_guess else ":material/info:",
    )
    if differs:
        rows = [(path, cache.at(bodies[0], path), cache.at(bodies[1], path)) for path in differs]
        draw_table((texts("cache.path"), texts("cache.first"), texts("cache.second")), rows)
    draw_explained(explained)


# ---- many requests


def draw_repeat(model: str, question: str) -> None:
    st.markdown(texts("cache.repeat.about"))
    times = st.slider(texts("cache.times"), 2, cache.MAX_CALLS, key=link.key("times"), persist_state="session")
    if st.button(texts("cache.repeat.button", times=times), type="primary", icon=":material/replay:"):
        # A new question each time, so that the first call is a miss.
        body = cache.chat_body(model, f"{question} ({secrets.token_hex(3)})", max_tokens=16)
        with st.spinner(texts("cache.waiting")):
            replies = proxy.calls(times, 1, lambda _: proxy.call("POST", cache.PATHS["chat"], session.key, body=body))
        st.session_state.repeat = cache.Calls(replies)
    draw_calls("repeat")


def draw_stampede(model: str, question: str) -> None:
    st.markdown(texts("cache.stampede.about"))
    at_once = st.slider(texts("cache.at_once"), 2, cache.MAX_AT_ONCE, key=link.key("at_once"), persist_state="session")
    if st.button(texts("cache.stampede.button", times=at_once), type="primary", icon=":material/groups:"):
        body = cache.chat_body(model, f"{question} ({secrets.token_hex(3)})", max_tokens=16)
        with st.spinner(texts("cache.waiting")):
            replies = proxy.calls(
                at_once, at_once, lambda _: proxy.call("POST", cache.PATHS["chat"], session.key, body=body)
            )
        st.session_state.stampede = cache.Calls(replies)
    calls = draw_calls("stampede")
    if calls and not calls.first_fault:
        upstream = calls.states["miss"]
        st.success(texts("cache.stampede.result", calls=number(len(calls.replies)), upstream=number(upstream)),
                   icon=":material/check_circle:")  # fmt: skip


def draw_calls(name: str) -> cache.Calls | None:
    calls: cache.Calls | None = st.session_state.get(name)
    if calls is None:
        return None
    if calls.first_fault:
        draw_fault(session, calls.first_fault, name)
    figures = calls.figures(texts)
    draw_strip(figures, highlighted=texts("cache_state.hit"))
    points = calls.dots(texts)
    if points:
        words = texts("cache.calls_alt", figures=", ".join(f"{what} {value}" for what, value in figures.items()))
        chart = dots(points, words=words, x=texts("cache.call"), y="ms", series=texts("cache.state"), logarithmic=True)
        draw_chart(chart, texts, f"{name}-chart")
    return calls


main()
