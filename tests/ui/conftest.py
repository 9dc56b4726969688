"""Fixtures of the ui's tests: the stand-in for the proxy, and the app before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fixtures_ui import APP, CHAT_PAGE, StandIn, stand_in
from streamlit.testing.v1 import AppTest


@pytest.fixture
def proxy() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def app(proxy: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AppTest]]:
    """Starts the app in a language, against the stand-in or, with `url`, against another address.

    `page`: its file, like app_pages/status.py. `settings`: further UI_ variables, without the prefix and in lower case.
    """
    import streamlit as st

    def start(language: str = "en", url: str | None = None, page: str = CHAT_PAGE, **settings: str) -> AppTest:
        monkeypatch.setenv("UI_LANGUAGE", language)
        monkeypatch.setenv("UI_PROXY_URL", url or proxy.url)
        monkeypatch.setenv("UI_PUBLIC_PROXY_URL", proxy.url)
        for name, value in settings.items():
            monkeypatch.setenv(f"UI_{name.upper()}", value)
        return AppTest.from_file(APP, default_timeout=60).switch_page(page).run()

    yield start
    st.cache_resource.clear()
