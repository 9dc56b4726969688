"""The script that Streamlit runs for every session: shared parts, language, navigation. Pages are files in app_pages.

A new page: its script in app_pages/, a line in PAGES, its title in texts/*/nav.yaml, its texts in texts/*/PAGE.yaml.
Streamlit runs this file and the pages by their path, outside the package: they import by the package's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from lab_ui.proxy import Proxy
from lab_ui.session import Session
from lab_ui.settings import Settings
from lab_ui.texts import LANGUAGES, choose, load

ICON = Path(__file__).with_name("icon.svg")  # a material icon or an emoji would be fetched from a foreign server

# Korean words are not cut at a line's end; the page has its own progress line and stop; see `reader_language`.
STYLE = """<style>
[data-testid="stMarkdownContainer"] *, [data-testid="stCaptionContainer"] * {
  word-break: keep-all !important; overflow-wrap: anywhere !important;
}
[data-testid="stStatusWidget"], .st-key-lang { display: none; }
</style>"""


@dataclass(frozen=True)
class Page:
    """`title` and `section`: keys of texts; pages without a section stand first, under no heading."""

    file: str  # beside this one; AppTest.switch_page takes the same
    url_path: str  # the first page's is not used: it is at /
    icon: str
    title: str
    section: str = ""


PAGES = (
    Page("app_pages/chat.py", "chat", "chat", "nav.chat"),
    Page("app_pages/status.py", "status", "monitor_heart", "nav.status"),
)


@st.cache_resource(show_spinner=False, on_release=lambda parts: parts[1].close())
def shared() -> tuple[Settings, Proxy]:
    """What all sessions of this process share."""
    settings = Settings()
    return settings, Proxy(settings)


def main() -> None:
    settings, proxy = shared()
    st.set_page_config(page_title="LLM Lab", page_icon=str(ICON), layout="centered")
    st.html(STYLE)
    with st.sidebar:
        texts = load(reader_language(settings.language))
    st.session_state.session = Session(settings, proxy, texts)
    sections: dict[str, list[st.Page]] = {}
    for page in PAGES:
        sections.setdefault(texts(page.section) if page.section else "", []).append(
            st.Page(
                page.file,
                title=texts(page.title),
                icon=f":material/{page.icon}:",
                url_path=page.url_path,
                default=page is PAGES[0],
            )
        )
    st.navigation(sections).run()


def reader_language(setting: str) -> str:
    """`?lang=ko`, else the setting's or the browser's; and the switch that changes it.

    Streamlit keeps a parameter over reloads, page links and the browser's Back if a widget is bound to it. A bound
    switch would write its labels (`?lang=한국어`): the code is in a hidden field, which the switch changes.
    """
    state = st.session_state
    asked = st.text_input("lang", key="lang", bind="query-params", label_visibility="collapsed")
    state.language = choose(asked, setting, st.context.locale)

    def change() -> None:
        state.lang = state.language

    st.segmented_control(  # its label is in both languages: it is read before one is chosen
        "Language / 언어", list(LANGUAGES), format_func=LANGUAGES.__getitem__, required=True, key="language",
        on_change=change, label_visibility="collapsed",
    )  # fmt: skip
    return str(state.language)


if __name__ == "__main__":
    main()
