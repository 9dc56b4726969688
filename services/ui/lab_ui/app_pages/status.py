"""The status page: services in the order of a request, models with their load state, the cache's figures, versions."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from lab_ui.answer import Fault
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip
from lab_ui.formats import percent, short
from lab_ui.session import Session
from lab_ui.status import Model, Report, State
from lab_ui.untrusted import plain, span

COLOURS: dict[State, Literal["green", "red", "orange", "gray"]] = {
    "up": "green", "down": "red", "loading": "orange", "unknown": "gray", "unloaded": "gray", "absent": "gray",
}  # fmt: skip
ICONS = {
    "up": "check_circle", "down": "error", "loading": "hourglass_top", "unknown": "help", "unloaded": "bedtime",
    "absent": "cloud_off",
}  # fmt: skip
session: Session = st.session_state.session
settings, texts = session.settings, session.texts


def main() -> None:
    st.title(texts("status.title"), anchor=False)
    st.caption(texts("status.intro", seconds=short(settings.refresh_seconds)))
    st.fragment(draw, run_every=settings.refresh_seconds)()
    draw_form()  # not in the fragment, because its refresh would interrupt typing


def draw() -> None:
    report = Report(session.proxy.status(session.key), settings, texts)
    if report.fault and report.fault.kind in {"key_needed", "key_invalid", "refused"}:
        draw_fault(session, report.fault, "status")
        return
    services, models, cache = report.services, report.models, report.cache
    if all(service.state == "up" for service in services):
        st.success(texts("status.all_up"), icon=":material/check_circle:")
    else:
        st.warning(texts("status.some_down"), icon=":material/error:")
    for service, column in zip(services, [*st.columns(2), *st.columns(2)], strict=True):
        with column, st.container(border=True, gap="xsmall", height="stretch"):
            draw_name(f"**{service.name}**", service.state)
            st.caption(texts(f"status.{service.name}"))
            if service.facts and service.state != "unknown":
                facts = (f"{texts(f'status.facts.{name}')} {value}" for name, value in service.facts.items())
                st.markdown(f":small[{' · '.join(facts)}]")
            draw_detail(service.detail, service.state)
            for line in service.advice(texts):
                st.markdown(line)
    if models:
        st.subheader(texts("status.models"), anchor=False)
    for model in models:
        draw_model(model)
    draw_adding(report)
    if cache is not None:
        st.subheader(texts("status.cache"), anchor=False)
        if not cache:
            st.caption(texts("status.cache_off"))
        else:
            draw_strip({texts(f"status.{name}"): figure for name, figure in cache.items()})
    if report.versions:
        st.subheader(texts("status.versions"), anchor=False)
        st.caption(report.versions)


def draw_model(model: Model) -> None:
    with st.container(border=True, gap="xsmall"):
        draw_name(model.name, model.state)
        st.caption(model.line)
        for line in filter(None, (model.queue, model.facts)):
            st.caption(line)
        draw_progress(model)
        draw_detail(model.detail, model.state)
        if model.action:
            st.button(texts(f"status.action.{model.action}"), key=f"{model.action}-{model.id}", on_click=operate,
                      args=(model.action, model.id))  # fmt: skip
        draw_refusal(model.id)


def operate(action: str, name: str) -> None:
    """Let the model service `load`, `unload` or `add` a model. Needs the admin key, if the lab has one.

    A callback: the page is drawn after it, with the model's new state.
    """
    reply = session.proxy.call(
        "POST", f"/admin/models/{action}", session.key, body={"model": name}, seconds=settings.status_timeout_seconds
    )
    st.session_state.refused = {}
    if isinstance(reply, Fault):
        st.session_state.refused = {"" if action == "add" else name: reply}
    else:
        st.toast(texts(f"status.begun.{action}", name=span(name)), icon=":material/check:")


def draw_refusal(name: str) -> None:
    """Why the last button pressed did nothing, if it was this model's. `name`: empty for the form."""
    fault = st.session_state.get("refused", {}).get(name)
    if fault is not None:
        draw_fault(session, fault, f"refused-{name}")


def draw_progress(model: Model) -> None:
    if model.step:
        words = plain(model.step) + (f" · {percent(model.share)}" if model.share is not None else "")
        st.progress(model.share or 0.0, words)


def draw_adding(report: Report) -> None:
    """Progress of the model that was added last."""
    adding = report.adding
    if adding is not None:
        with st.container(border=True, gap="xsmall"):
            draw_name(adding.name, adding.state)
            draw_progress(adding)
            draw_detail(adding.detail, adding.state)


def draw_form() -> None:
    """A form that downloads a model and adds it to the catalogue."""
    with st.form("add", border=False, clear_on_submit=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            st.text_input(texts("status.add.label"), max_chars=200, placeholder="korean", key="added")
            st.form_submit_button(texts("status.add.button"), icon=":material/add:", on_click=add)
        st.caption(texts("status.add.about"))
    draw_refusal("")


def add() -> None:
    if name := str(st.session_state.added).strip():
        operate("add", name)


def draw_name(name: str, state: State) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(name, width="content")
        st.badge(texts(f"status.{state}"), icon=f":material/{ICONS[state]}:", color=COLOURS[state])


def draw_detail(detail: str, state: State) -> None:
    if detail and state != "up":
        st.caption(span(detail))


main()
