"""The status page: one card a service and a model, the cache's figures, versions; drawn anew every few seconds."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from lab_ui.formats import short
from lab_ui.session import Session
from lab_ui.status import Report, State
from lab_ui.untrusted import span

COLOURS: dict[State, Literal["green", "red", "orange", "gray"]] = {
    "up": "green",
    "down": "red",
    "loading": "orange",
    "unknown": "gray",
}
ICONS = {"up": "check_circle", "down": "error", "loading": "hourglass_top", "unknown": "help"}
session: Session = st.session_state.session
settings, texts = session.settings, session.texts


def main() -> None:
    st.title(texts("status.title"), anchor=False)
    st.caption(texts("status.intro", seconds=short(settings.refresh_seconds)))
    st.fragment(draw, run_every=settings.refresh_seconds)()


def draw() -> None:
    report = Report(session.proxy.status(session.key), settings, texts)
    services, models, cache, versions = report.services, report.models, report.cache, report.versions
    if all(service.state == "up" for service in services):
        st.success(texts("status.all_up"), icon=":material/check_circle:")
    else:
        st.warning(texts("status.some_down"), icon=":material/error:")
    for service in services:
        with st.container(border=True, gap="xsmall"):
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
        with st.container(border=True, gap="xsmall"):
            draw_name(model.name, model.state)
            st.caption(model.line)
            draw_detail(model.detail, model.state)
    if cache is not None:
        st.subheader(texts("status.cache"), anchor=False)
        if not cache:
            st.caption(texts("status.cache_off"))
        else:
            with st.container(horizontal=True):
                for name, figure in cache.items():
                    st.metric(texts(f"status.{name}"), figure)
    if versions:
        st.subheader(texts("status.versions"), anchor=False)
        st.caption(versions)


def draw_name(name: str, state: State) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(name, width="content")
        st.badge(texts(f"status.{state}"), icon=f":material/{ICONS[state]}:", color=COLOURS[state])


def draw_detail(detail: str, state: State) -> None:
    if detail and state != "up":
        st.caption(span(detail))


main()
