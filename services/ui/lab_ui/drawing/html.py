"""Small pieces of HTML for st.html, which sanitizes it and runs no script. Every value is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import streamlit as st

from ..wire import Piece

COLOURS = ("#0f766e40", "#b4530940", "#6d28d940", "#1d4ed840", "#be185d40")  # of successive tokens, in turn


def draw_flow(parts: Iterable[tuple[str, str, str, str]]) -> None:
    """Boxes of the services in the order of a request: (name, state, state's text, purpose)."""
    boxes = "".join(
        f'<div><b><span class="lab-dot {html.escape(state)}" aria-hidden="true"></span>{html.escape(name)}</b>'
        f"<small>{html.escape(shown)}</small><small>{html.escape(about)}</small></div>"
        for name, state, shown, about in parts
    )
    st.html(f'<div class="lab-flow">{boxes}</div>')


def draw_strip(facts: Mapping[str, str], highlighted: str = "") -> None:
    """Figures in a row: label -> value; with an empty value the label alone."""
    marks = "".join(
        f'<span class="{"hit" if name == highlighted else ""}">{html.escape(name)}'
        f"{f' <b>{html.escape(value)}</b>' if value else ''}</span>"
        for name, value in facts.items()
    )
    st.html(f'<div class="lab-strip">{marks}</div>')


def draw_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = (), label: str = ""
) -> None:
    """A table. `numbers`: indexes of columns that are aligned to the right. `label`: its accessible name."""
    right = set(numbers)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' scope=col' if tag == 'th' else ''}{' class=number' if place in right else ''}>"
            f"{html.escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    caption = f' aria-label="{html.escape(label)}"' if label else ""
    st.html(
        f'<div class="lab-scroll" tabindex="0" role="region"{caption}><table class="lab-table">'
        f"<thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def draw_pieces(pieces: Iterable[Piece]) -> None:
    """Tokens of a text, each in a colour; colours repeat. A token that is not text is shown as its bytes."""
    spans = []
    for place, piece in enumerate(pieces):
        mark = f'style="background:{COLOURS[place % len(COLOURS)]}" title="{piece.id}"'
        if piece.text is None:
            spans.append(f'<span class="bytes" {mark}>{html.escape(piece.data.hex(" "))}</span>')
        else:
            spans.append(f"<span {mark}>{html.escape(piece.text).replace(chr(10), '↵' + chr(10))}</span>")
    st.html(f'<div class="lab-tokens">{"".join(spans)}</div>')
