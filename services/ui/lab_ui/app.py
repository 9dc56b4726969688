"""The script that Streamlit runs for every session: shared parts, language, key, navigation. Pages are in app_pages.

A new page: its script in app_pages/, a line in pages.py, its title in texts/*/nav.yaml, its texts in texts/*/PAGE.yaml.
Streamlit runs this file and the pages by their path, outside the package: they import by the package's name.
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

ICON = Path(__file__).with_name("icon.svg")  # a material icon or an emoji would be fetched from a foreign server
STYLE = Path(__file__).with_name("style.css")


@st.cache_resource(show_spinner=False, on_release=lambda parts: parts[1].close())
def shared() -> tuple[Settings, Proxy]:
    """What all sessions of this process share."""
    settings = Settings()
    return settings, Proxy(settings)


def main() -> None:
    settings, proxy = shared()
    st.set_page_config(page_title="LLM Lab", page_icon=str(ICON), layout="wide")
    st.html(STYLE)
    if st.context.theme.type == "dark":  # its primary colour is light: Streamlit's white on it cannot be read
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
    # 3. The page. What it raises is a fault of the ui; a rerun or a stop is no Exception.
    try:
        st.navigation(sections, expanded=True).run()
    except Exception as error:
        draw_unexpected(texts, error)


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
