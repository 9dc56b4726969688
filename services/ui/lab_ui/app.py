"""The script Streamlit runs for every session: the shared parts, the language, the two pages."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from lab_ui import chat, status, texts
from lab_ui.answers import Answers
from lab_ui.settings import Settings

ICON = Path(__file__).with_name("icon.svg")  # a material icon or an emoji would be fetched from a foreign server

# Korean words are not cut at a line's end; the page has its own progress line and stop.
STYLE = """<style>
[data-testid="stMarkdownContainer"] *, [data-testid="stCaptionContainer"] * {
  word-break: keep-all !important; overflow-wrap: anywhere !important;
}
[data-testid="stStatusWidget"] { display: none; }
</style>"""


@st.cache_resource(show_spinner=False, on_release=lambda parts: parts[1].close())
def parts() -> tuple[Settings, Answers]:
    """What all sessions of this process share."""
    settings = Settings()
    return settings, Answers(settings)


def main() -> None:
    settings, answers = parts()
    st.set_page_config(page_title="LLM Lab", page_icon=str(ICON), layout="centered")
    st.html(STYLE)
    first = texts.first_language(settings.language, st.context.locale)
    with st.sidebar:  # its label is in both languages: it is there before the language is known
        language = st.segmented_control(
            "Language / 언어", list(texts.LANGUAGES), format_func=texts.LANGUAGES.__getitem__, default=first,
            required=True, key="lang", bind="query-params", label_visibility="collapsed",
        )  # fmt: skip
    words = texts.load(language or first)

    def chat_page() -> None:
        chat.page(settings, answers, words)

    def status_page() -> None:
        status.page(settings, words)

    chosen = st.navigation(
        [
            st.Page(chat_page, title=words("nav.chat"), icon=":material/chat:", default=True),
            st.Page(status_page, title=words("nav.status"), icon=":material/monitor_heart:", url_path="status"),
        ]
    )
    chosen.run()


main()
