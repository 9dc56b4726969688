"""The sidebar of the chat page: model and sampling of each column, which are the page's link too."""

from __future__ import annotations

from typing import Any

import streamlit as st

from .. import chat, links
from ..formats import number
from ..texts import Texts

state = st.session_state


def _column(column: int) -> dict[str, links.Parameter]:
    """The parameters of one column; in the second column `model` is `model2`, and so on."""
    mark = str(column + 1) if column else ""
    parameters: dict[str, links.Parameter] = {
        "model": links.Text("", 200), "temperature": links.Number(0.0, 0.0, 2.0), "top_p": links.Number(1.0, 0.05, 1.0),
        "max_tokens": links.Number(512, 1, 1_000_000), "system": links.Text(""),
    }  # fmt: skip
    return {name + mark: parameter for name, parameter in parameters.items()}


link = links.Link(
    "chat",
    {
        "q": links.Text(""),
        "columns": links.Number(1, 1, chat.MAX_COLUMNS),
        **{name: each for column in range(chat.MAX_COLUMNS) for name, each in _column(column).items()},
    },
)


def linked(columns: int, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Values for the URL, without the first model, which is the default, and without columns that are not shown."""
    first = next(iter(models), "")
    names = ["q", "columns", *(name for column in range(columns) for name in _column(column))]
    values = {link.key(name): state.get(link.key(name)) for name in names}
    return {key: None if key.startswith("chat.model") and value == first else value for key, value in values.items()}


def draw_settings(models: dict[str, dict[str, Any]], texts: Texts) -> list[dict[str, Any]]:
    """The fields of a request except the messages, and `system`, for each column."""
    with st.sidebar:
        st.subheader(texts("settings.title"), anchor=False)
        count = int(
            st.segmented_control(
                texts("settings.columns"), range(1, chat.MAX_COLUMNS + 1), key=link.key("columns"), required=True,
                persist_state="session", help=texts("settings.columns_help"),
            )
            or 1
        )  # fmt: skip
        shown = 0
        if count > 1:
            shown = st.segmented_control(
                texts("settings.of_column"), range(count), format_func=chat.COLUMN_NAMES.__getitem__, default=0,
                required=True, key=f"settings-of-{count}", persist_state="session",
            )  # fmt: skip
        draw_column(shown, models, texts)
        st.toggle(
            texts("settings.logprobs"), value=True, key="logprobs", help=texts("settings.logprobs_help"),
            persist_state="session",
        )  # fmt: skip
    return [read_column(column, models) for column in range(count)]


def draw_column(column: int, models: dict[str, dict[str, Any]], texts: Texts) -> None:
    key = [link.key(name) for name in _column(column)]
    if models and state.get(key[0]) not in models:
        state[key[0]] = next(iter(models))
    st.selectbox(
        texts("settings.model"), list(models), format_func=lambda name: chat.model_label(name, models, texts),
        disabled=not models, key=key[0], placeholder="–", persist_state="session",
    )  # fmt: skip
    st.text_area(
        texts("settings.system"), placeholder=texts("settings.system_placeholder"), max_chars=chat.MAX_QUESTION,
        key=key[4], persist_state="session",
    )  # fmt: skip
    st.slider(
        texts("settings.temperature"), 0.0, 2.0, step=0.1, help=texts("settings.temperature_help"), key=key[1],
        persist_state="session",
    )  # fmt: skip
    st.slider(
        texts("settings.top_p"), 0.05, 1.0, step=0.05, help=texts("settings.top_p_help"), key=key[2],
        persist_state="session",
    )  # fmt: skip
    limit = models.get(state.get(key[0]) or "", {}).get("context") or chat.DEFAULT_CONTEXT
    state[key[3]] = min(int(state[key[3]]), limit)
    st.number_input(
        texts("settings.max_tokens"), 1, limit, step=64, key=key[3],
        help=texts("settings.max_tokens_help", limit=number(limit)), persist_state="session",
    )  # fmt: skip


def read_column(column: int, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a column, also if its widgets are not drawn now."""
    model, temperature, top_p, max_tokens, system = (state[link.key(name)] for name in _column(column))
    if model not in models:
        model = next(iter(models), "")
    return {
        "model": model, "temperature": temperature, "top_p": top_p, "max_tokens": int(max_tokens), "system": system,
        "logprobs": state.get("logprobs", True) and models.get(model, {}).get("local", False),
    }  # fmt: skip
