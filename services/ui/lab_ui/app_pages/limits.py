"""The limits page: what is left of a key's limits, a burst, measures that save cost, the price table."""

from __future__ import annotations

import secrets

import streamlit as st

from lab_ui import cache, chat, limits, links, prices
from lab_ui.answer import Fault
from lab_ui.charts import bars, tries
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip, draw_table
from lab_ui.formats import dollars, number, percent
from lab_ui.prices import Price
from lab_ui.session import Session

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state
VIEWS = ("left", "burst", "savings", "prices")
link = links.Link(
    "limits",
    {
        "view": links.Choice(VIEWS), "burst": links.Number(12, 2, limits.MAX_BURST),
        "large_in": links.Number(2.5, 0.0, 1000.0), "large_out": links.Number(10.0, 0.0, 1000.0),
        "small_in": links.Number(0.15, 0.0, 1000.0), "small_out": links.Number(0.6, 0.0, 1000.0),
    },
)  # fmt: skip


def main() -> None:
    link.read(st.query_params, state)
    st.title(texts("limits.title"), anchor=False)
    st.markdown(texts("limits.intro"))
    view = st.segmented_control(
        texts("limits.views"), VIEWS, format_func=lambda code: texts(f"limits.view.{code}"), key=link.key("view"),
        persist_state="session", required=True, label_visibility="collapsed",
    )  # fmt: skip
    if view == "prices":
        draw_prices()
    elif model := draw_model():
        {"left": draw_left, "burst": draw_burst, "savings": draw_savings}[view or VIEWS[0]](model)
    link.write(st.query_params, state)


def draw_model() -> str | None:
    """The first chat model; if there is none, draws the fault and returns None."""
    listing = proxy.models(session.key)
    models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    if not models:
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
    return next(iter(models), None)


# ---- what is left


def draw_left(model: str) -> None:
    usage = proxy.call("GET", "/usage?limit=1", session.key, seconds=settings.status_timeout_seconds)
    if isinstance(usage, Fault):
        draw_fault(session, usage, "usage", lambda: None)
        return
    if st.button(texts("limits.ask"), type="primary", icon=":material/send:"):
        reply = proxy.call("POST", cache.PATHS["chat"], session.key, body=cache.chat_body(model, cache.QUESTION, 8))
        state.limit_headers = dict(reply.headers)
        if isinstance(reply, Fault):
            draw_fault(session, reply, "ask")
    found = [*limits.gauges(state.get("limit_headers", {})), *limits.budgets(usage.body)]
    for each in found:
        unit = "$" if each.name in {"per_day", "total"} else ""
        shown = (dollars if unit else number)(each.left), (dollars if unit else number)(each.limit)
        words = texts("limits.left_of", left=unit + shown[0], limit=unit + shown[1])
        st.progress(each.share, f"**{texts(f'limits.gauge.{each.name}')}** · {words}".replace("$", "\\$"))
        if each.reset:
            st.caption(texts("limits.reset", time=each.reset))
    if not found:
        allowed = usage.body.get("limits")
        limited = isinstance(allowed, dict) and any(value is not None for value in allowed.values())
        st.info(texts("limits.press" if limited else "limits.none"), icon=":material/info:")
    st.subheader(texts("limits.used"), anchor=False)
    found_total = usage.body.get("total")
    total = found_total if isinstance(found_total, dict) else {}
    names = ("requests", "upstream_calls", "prompt_tokens", "completion_tokens", "hits", "cost_usd")
    figures = {texts(f"limits.total.{name}"): number(value) if name != "cost_usd" else f"${dollars(value)}"
               for name in names if isinstance(value := total.get(name), int | float)}  # fmt: skip
    draw_strip(figures)


# ---- a burst


def draw_burst(model: str) -> None:
    st.markdown(texts("limits.burst.about"))
    count = st.slider(texts("limits.burst.count"), 2, limits.MAX_BURST, key=link.key("burst"), persist_state="session")
    if st.button(texts("limits.burst.button", count=count), type="primary", icon=":material/groups:"):
        body = cache.chat_body(model, cache.QUESTION, 8)
        with st.spinner(texts("cache.waiting")):
            state.burst_tries = limits.burst(
                count, lambda: proxy.call("POST", cache.PATHS["chat"], session.key, body=body)
            )
    made: list[limits.Try] = state.get("burst_tries", [])
    if not made:
        return
    refused = sum(each.outcome != "ok" for each in made)
    done = sum(each.outcome == "ok" for each in made)
    draw_strip({
        texts("limits.burst.done"): number(done), texts("limits.burst.refused"): number(refused),
        texts("limits.burst.tries"): number(len(made)),
    })  # fmt: skip
    rows = [(each.call, each.begin, max(each.end, each.begin + 0.004), outcome(each.outcome)) for each in made]
    words = texts("limits.burst.alt", done=number(done), refused=number(refused))
    chart = tries(rows, words=words, call=texts("cache.call"), seconds=texts("limits.burst.seconds"),
                  outcome=texts("limits.burst.outcome"), good=outcome("ok"))  # fmt: skip
    draw_chart(chart, texts, "burst-chart")
    if not refused:
        st.info(texts("limits.burst.none_refused"), icon=":material/info:")


def outcome(kind: str) -> str:
    return texts("limits.burst.ok") if kind == "ok" else texts(f"faults.{kind}.what")


# ---- what saves cost


def draw_savings(model: str) -> None:
    st.markdown(texts("limits.savings.about", count=len(limits.QUESTIONS)))
    columns = st.columns(4)
    for column, name in zip(columns, ("large_in", "large_out", "small_in", "small_out"), strict=True):
        column.number_input(texts(f"limits.savings.{name}"), 0.0, 1000.0, step=0.05, key=link.key(name),
                            persist_state="session")  # fmt: skip
    if st.button(texts("limits.savings.button"), type="primary", icon=":material/play_arrow:"):
        with st.spinner(texts("cache.waiting")):
            state.savings = measure(model)
    asked = state.get("savings")
    if asked is None:
        return
    if isinstance(asked, Fault):
        draw_fault(session, asked, "savings")
        return
    large = Price(state[link.key("large_in")], state[link.key("large_out")])
    small = Price(state[link.key("small_in")], state[link.key("small_out")])
    found = limits.savings(asked, large, small)
    whole = found[0][1]
    rows = [(texts(f"limits.savings.with.{name}"), cost, f"${cost:,.2f}") for name, cost in found]
    words = texts("limits.savings.alt", costs=", ".join(f"{name} {text}" for name, _, text in rows))
    draw_chart(bars(rows, words=words, label=texts("limits.savings.measure"), value=texts("limits.savings.cost"),
                    format="$,.2f"), texts, "savings-chart")  # fmt: skip
    draw_strip({
        texts("limits.savings.hits"): f"{sum(each.hit for each in asked)} / {len(asked)}",
        texts("limits.savings.prompt"): number(sum(each.prompt for each in asked)),
        texts("limits.savings.shorter"): number(sum(each.shorter_prompt for each in asked)),
        texts("limits.savings.completion"): number(sum(each.completion for each in asked)),
        texts("limits.savings.saved"): percent(1 - found[-1][1] / whole) if whole else "–",
    })  # fmt: skip


def measure(model: str) -> list[limits.Asked] | Fault:
    """Ask the questions of the set in turn, and count the tokens of the shorter prompt."""
    nonce, asked = secrets.token_hex(3), []
    for question, easy in limits.QUESTIONS:
        body = limits.request(model, question, limits.LONG_PROMPT, nonce)
        reply = proxy.call("POST", cache.PATHS["chat"], session.key, body=body)
        if isinstance(reply, Fault):
            return reply
        shorter = limits.request(model, question, limits.SHORT_PROMPT, nonce)["messages"]
        counted = proxy.call("POST", "/v1/inspect/tokenize", session.key, body={"model": model, "messages": shorter})
        if isinstance(counted, Fault):
            return counted
        usage = reply.body.get("usage") or {}
        asked.append(
            limits.Asked(easy, reply.cache == "hit", int(usage.get("prompt_tokens") or 0),
                         int(usage.get("completion_tokens") or 0), int(counted.body.get("count") or 0))
        )  # fmt: skip
    return asked


# ---- prices


def draw_prices() -> None:
    reply = proxy.call("GET", "/v1/prices", session.key, seconds=settings.status_timeout_seconds)
    if isinstance(reply, Fault):
        draw_fault(session, reply, "prices", lambda: None)
        return
    st.markdown(texts("limits.prices.about"))
    head = ("model", "input", "cached", "output", "source", "checked")
    draw_table([texts(f"limits.prices.{name}") for name in head], prices.rows(reply.body), (1, 2, 3),
               texts("limits.view.prices"))  # fmt: skip


main()
