"""Draws a chart with its alt text, and below it a table with the same numbers, collapsed at first."""

from __future__ import annotations

import streamlit as st

from ..charts import Chart
from ..texts import Texts
from .html import draw_table

MAX_ROWS = 200  # of the table


def draw_chart(chart: Chart, texts: Texts, key: str) -> None:
    st.altair_chart(chart.altair, alt=chart.alt, key=key, width="stretch")
    table = st.expander(texts("charts.table"), icon=":material/table:", type="compact", key=f"{key}-table",
                        on_change="rerun")  # fmt: skip
    if table.open:
        with table:
            draw_table(chart.head, chart.rows[:MAX_ROWS], chart.numbers, chart.alt)
