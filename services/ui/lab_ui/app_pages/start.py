"""The start page: services and problems, three first steps, and a link to every page."""

from __future__ import annotations

import streamlit as st

from lab_ui import start
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_flow
from lab_ui.pages import PAGES, Page
from lab_ui.session import Session
from lab_ui.status import Report

session: Session = st.session_state.session
settings, texts = session.settings, session.texts


def main() -> None:
    st.title(texts("start.title"), anchor=False)
    st.markdown(texts("start.intro"))
    st.fragment(draw_services, run_every=settings.refresh_seconds)()

    # The first lesson.
    st.subheader(texts("start.steps"), anchor=False)
    by_name = {page.name: page for page in PAGES}
    steps = [by_name[name] for name in start.STEPS if name in by_name]
    for place, (column, page) in enumerate(zip(st.columns(len(steps)), steps, strict=True), 1):
        with column, st.container(border=True, height="stretch", gap="xsmall"):
            st.markdown(f"**{place}. {texts(f'start.step.{page.name}.title')}**")
            st.caption(texts(f"start.step.{page.name}.text"))
            draw_link(page)

    # Every page.
    st.subheader(texts("start.pages"), anchor=False)
    for page in PAGES[1:]:
        link, about = st.columns([1, 3], vertical_alignment="center")
        with link:
            draw_link(page)
        about.caption(texts(f"start.page.{page.name}"))


def draw_link(page: Page) -> None:
    st.page_link(
        page.file, label=texts(f"nav.{page.name}"), icon=f":material/{page.icon}:",
        query_params={"lang": st.session_state.lang} if st.session_state.get("lang") else None,
    )  # fmt: skip


def draw_services() -> None:
    status = session.proxy.status(session.key)
    report = Report(status, settings, texts)
    draw_flow(start.services(report, texts))
    if report.fault and report.fault.kind != "proxy_down":
        draw_fault(session, report.fault, "start")
        return
    found, line = start.doctors_findings(settings.findings_file, texts)
    for finding in [*start.findings(report, texts), *found]:
        st.warning(finding, icon=":material/build:")
    st.caption(line)


main()
