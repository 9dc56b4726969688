"""Draws a request as code, one tab for each language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from .. import snippets
from ..session import Session

TABS = {
    "Python": (snippets.python, "python"), "curl": (snippets.curl, "bash"),
    "JavaScript": (snippets.javascript, "javascript"), "LangChain": (snippets.langchain, "python"),
}  # fmt: skip


def draw_code(session: Session, request: Mapping[str, Any], key: str) -> None:
    """A collapsed section; the code is generated when the reader opens it."""
    texts = session.texts
    box = st.expander(texts("code.title"), icon=":material/code:", type="compact", key=key, on_change="rerun")
    if not box.open:
        return
    with box:
        st.caption(texts("code.intro"))
        names = [name for name in TABS if name != "LangChain" or "messages" in request]
        for name, tab in zip(names, st.tabs(names), strict=True):
            write, language = TABS[name]
            tab.code(write(request, session.settings.shown_proxy_url), language=language, wrap_lines=True)
