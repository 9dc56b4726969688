"""Draws a fault: cause, what to do, the proxy's message, the request's id. Also draws the field for the key."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

import streamlit as st

from ..answer import Fault
from ..faults import texts_of
from ..session import Session, valid_key
from ..texts import Texts
from ..untrusted import plain, span

logger = logging.getLogger(__name__)
KEY = "reader_key"  # in the session state: the key that this reader entered


def draw_fault(session: Session, fault: Fault, place: str, again: Callable[[], None] | None = None) -> None:
    """Draw a fault. `place`: a name that is unique on the page. `again`: callback of the button “Try again”; None: no
    button."""
    texts = session.texts
    what, do = texts_of(fault, texts)
    st.error(do, title=what, icon=":material/error:")
    details = []
    if fault.message:
        details.append(plain(texts("faults.message", message=fault.message[:500])))
    if fault.request_id:
        details.append(texts("faults.request", id=span(fault.request_id[:128])))
    if details:
        st.caption(" · ".join(details))
    if fault.kind in {"key_needed", "key_invalid"}:
        draw_key_field(texts, f"key-{place}")
    if again is not None:
        st.button(texts("faults.again"), icon=":material/refresh:", key=f"again-{place}", on_click=again)


def draw_key_field(texts: Texts, place: str) -> None:
    """A password field whose text becomes the session's key. An empty text removes the key."""

    def change() -> None:
        text = str(st.session_state[place]).strip()
        st.session_state.key_is_wrong = bool(text) and not valid_key(text)
        if not text:
            st.session_state.pop(KEY, None)
        elif valid_key(text):
            st.session_state[KEY] = text
            st.session_state.pop("models", None)

    st.text_input(
        texts("key.label"), type="password", key=place, placeholder=texts("key.placeholder"), on_change=change,
        autocomplete="off",
    )  # fmt: skip
    if st.session_state.get("key_is_wrong"):
        st.caption(f":red[{texts('key.wrong')}]")


def draw_key(session: Session) -> None:
    """The section of the sidebar that shows whether a key is in use, with its field."""
    texts = session.texts
    own = KEY in st.session_state
    label = texts("key.own" if own else "key.shared" if session.key else "key.none")
    with st.expander(label, icon=":material/key:", type="compact"):
        st.caption(texts("key.about"))
        draw_key_field(texts, "key-sidebar")
        if own:
            st.button(texts("key.forget"), key="key-forget", on_click=_forget)


def _forget() -> None:
    st.session_state.pop(KEY, None)
    st.session_state["key-sidebar"] = ""


def draw_unexpected(texts: Texts, error: Exception) -> None:
    """Draw an error of the ui itself and log it with an id that the reader can report."""
    number = uuid.uuid4().hex[:12]
    logger.error("a page failed, id %s", number, exc_info=error)
    st.error(texts("faults.unexpected.do"), title=texts("faults.unexpected.what"), icon=":material/error:")
    st.caption(texts("faults.request", id=span(number)))
