"""The script that Streamlit runs for every session: shared parts, language, key, navigation. Pages are in app_pages.

A new page needs a script in app_pages/, a line in pages.py, a title in texts/*/nav.yaml, texts in texts/*/PAGE.yaml.
Streamlit runs this file and the pages by their path, outside the package, so they import by the package's name.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from lab_ui.drawing.faults import KEY, draw_key, draw_unexpected
from lab_ui.pages import PAGES
from lab_ui.proxy import Proxy
from lab_ui.session import Session
from lab_ui.settings import Settings
from lab_ui.texts import LANGUAGES, choose, load

ICON = Path(__file__).with_name("icon.svg")  # the browser would load a material icon or an emoji from another server
STYLE = Path(__file__).with_name("style.css")


@st.cache_resource(show_spinner=False, on_release=lambda parts: parts[1].close())
def shared() -> tuple[Settings, Proxy]:
    """Settings and client that all sessions of this process share."""
    settings = Settings()
    return settings, Proxy(settings)


def main() -> None:
    settings, proxy = shared()
    st.set_page_config(page_title="LLM Lab", page_icon=str(ICON), layout="wide")
    st.html(STYLE)
    if st.context.theme.type == "dark":  # its primary colour is light, so Streamlit's white text is unreadable
        st.html('<style>[data-testid^="stBaseButton-primary"] { color: #06201d; }</style>')
    # 1. Language and key, in the sidebar of every page.
    with st.sidebar:
        texts = load(reader_language(settings.language))
        key = st.session_state.get(KEY) or (settings.api_key.get_secret_value() if settings.api_key else None)
        session = Session(settings, proxy, texts, key)
        draw_key(session)
    st.session_state.session = session
    # 2. The pages by section.
    sections: dict[str, list[st.Page]] = {}
    for page in PAGES:
        sections.setdefault(texts(f"nav.sections.{page.section}"), []).append(
            st.Page(
                page.file,
                title=texts(f"nav.{page.name}"),
                icon=f":material/{page.icon}:",
                url_path=page.url_path,
                default=page is PAGES[0],
            )
        )
    # 3. The page. An Exception is an error of the ui; Streamlit's reruns and stops are BaseExceptions.
    try:
        st.navigation(sections, expanded=True).run()
    except Exception as error:
        draw_unexpected(texts, error)


def reader_language(setting: str) -> str:
    """The language of `?lang=`, else of the setting, else of the browser. Also draws the switch that changes it.

    Streamlit keeps a query parameter over reloads, page links and the browser's Back if a widget is bound to it. A
    bound switch would write its label (`?lang=한국어`), so a hidden field has the code, and the switch changes it.
    """
    state = st.session_state
    asked = st.text_input("lang", key="lang", bind="query-params", label_visibility="collapsed")
    state.language = choose(asked, setting, st.context.locale)

    def change() -> None:
        state.lang = state.language

    st.segmented_control(  # the label is in both languages, because the reader sees it before choosing one
        "Language / 언어", list(LANGUAGES), format_func=LANGUAGES.__getitem__, required=True, key="language",
        on_change=change, label_visibility="collapsed",
    )  # fmt: skip
    return str(state.language)


if __name__ == "__main__":
    main()
