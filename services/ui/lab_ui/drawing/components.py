"""Components with JavaScript: clickable tokens, conversations in the browser's storage, an announcement.

Their scripts and styles are files in components/. The scripts set text by textContent, so nothing is parsed as HTML.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from ..texts import Texts

FOLDER = Path(__file__).parents[1] / "components"


@functools.cache
def _component(name: str, html: str) -> Any:
    style = FOLDER / f"{name}.css"
    return st.components.v2.component(
        f"lab_{name}", html=html, js=(FOLDER / f"{name}.js").read_text(encoding="utf-8"),
        css=style.read_text(encoding="utf-8") if style.exists() else None,
    )  # fmt: skip


def draw_tokens(
    tokens: Sequence[Mapping[str, Any]], texts: Texts, key: str, *, continues: bool = False
) -> tuple[int, int] | None:
    """Draw the tokens of surprise.view. With `continues` the reader can pick an alternative: returns the place of its
    token and its rank, else None."""
    labels = {name: texts(f"surprise.{name}") for name in ("token", "go", "hint")}
    component = _component("tokens", '<div class="strip" role="group"></div><div class="panel" hidden></div>')
    result = component(
        key=key, data={"tokens": list(tokens), "labels": labels, "continues": continues},
        on_picked_change=lambda: None,
    )  # fmt: skip
    picked = getattr(result, "picked", None)
    if not isinstance(picked, Mapping):
        return None
    place, rank = picked.get("place"), picked.get("rank")
    if not isinstance(place, int | float) or not isinstance(rank, int | float):
        return None
    place, rank = int(place), int(rank)
    if not 0 <= place < len(tokens) or not 0 <= rank < len(tokens[place]["top"]):
        return None
    return place, rank


def draw_history(save: Mapping[str, Any], current: str, texts: Texts, *, fresh: bool) -> Any:
    """Store the conversation `save` in the browser and draw the list of stored ones. Returns the conversation that the
    reader opened, else None.

    `fresh`: the session has no conversation yet; after a reload it gets that of its tab.
    """
    labels = {name: texts(f"history.{name}") for name in ("none", "forget")}
    component = _component("history", '<div class="history"></div>')
    result = component(
        key="history", data={"save": dict(save), "current": current, "fresh": fresh, "labels": labels,
                             "language": texts.language},
        on_opened_change=lambda: None,
    )  # fmt: skip
    return getattr(result, "opened", None)


def announce(text: str) -> None:
    """Let screen readers read a sentence aloud once."""
    hidden = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"
    html = f'<div aria-live="polite" style="{hidden}"></div>'
    _component("announce", html)(key="announce", data={"text": text}, height=1)
