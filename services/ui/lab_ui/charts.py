"""Charts as Altair objects, each with its alt text and the rows of its table.

Knows numbers and labels. Does not draw; drawing/charts.py does. The functions import Altair, because its import is
slow. In all of them `words` is the alt text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PRIMARY, SECOND, MUTED = "#0f9488", "#d97706", "#94a3b8"  # readable on white and on dark


@dataclass(frozen=True)
class Chart:
    """`alt`: one sentence that describes the picture. `head`, `rows`: the same numbers as a table. `numbers`: columns
    of the table that hold numbers."""

    altair: Any
    alt: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = (1,)


def _data(values: list[dict[str, Any]]) -> Any:
    import altair as alt  # noqa: PLC0415 - see above

    return alt.Data(values=values)  # type: ignore[no-untyped-call] # altair's own


def bars(
    rows: Sequence[tuple[str, float, str]], *, words: str, label: str, value: str, domain: float | None = None,
    colours: Sequence[str] = (), format: str = ".1%",  # noqa: A002 - Vega's name
) -> Chart:  # fmt: skip
    """Horizontal bars in the given order: (label, value, value as text)."""
    import altair as alt  # noqa: PLC0415

    data = _data([
            {"label": name, "value": amount, "text": text, "place": place,
             "colour": colours[place] if colours else PRIMARY}
            for place, (name, amount, text) in enumerate(rows)
        ]
    )  # fmt: skip
    scale = alt.Scale(domain=[0, domain]) if domain else alt.Scale(zero=True)
    base = alt.Chart(data).encode(
        y=alt.Y("label:N", sort=alt.EncodingSortField("place", order="ascending"), title=None,
                 axis=alt.Axis(labelLimit=220, labelFontSize=13, ticks=False, domain=False)),
        x=alt.X("value:Q", title=value, scale=scale, axis=alt.Axis(format=format, grid=True, tickCount=5)),
        tooltip=[alt.Tooltip("label:N", title=label), alt.Tooltip("text:N", title=value)],
    )  # fmt: skip
    picture = base.mark_bar(cornerRadiusEnd=3, height={"band": 0.72}).encode(color=alt.Color("colour:N", scale=None))
    picture = picture.properties(height={"step": 26})
    return Chart(picture, words, (label, value), [(name, text) for name, _, text in rows])


def pairs(
    rows: Sequence[tuple[str, str, float, str]], *, words: str, label: str, series: str, value: str,
    colours: tuple[str, str] = (MUTED, PRIMARY),
    format: str = ".1%",  # noqa: A002 - Vega's name
) -> Chart:  # fmt: skip
    """Horizontal bars of two series, one below the other: (label, series, value, value as text)."""
    import altair as alt  # noqa: PLC0415

    names = list(dict.fromkeys(name for _, name, _, _ in rows))
    data = _data(
        [
            {"label": name, "series": which, "value": amount, "text": text, "place": place}
            for place, (name, which, amount, text) in enumerate(rows)
        ]
    )
    picture = (
        alt.Chart(data)
        .mark_bar(cornerRadiusEnd=3)
        .encode(
            y=alt.Y("label:N", sort=alt.EncodingSortField("place", op="min", order="ascending"), title=None,
                     axis=alt.Axis(labelLimit=220, labelFontSize=13, ticks=False, domain=False)),
            yOffset=alt.YOffset("series:N", sort=names),
            x=alt.X("value:Q", title=value, axis=alt.Axis(format=format, tickCount=5)),
            color=alt.Color("series:N", sort=names, title=None, scale=alt.Scale(range=list(colours)),
                             legend=alt.Legend(orient="top")),
            tooltip=[alt.Tooltip("label:N", title=label), alt.Tooltip("series:N", title=series),
                     alt.Tooltip("text:N", title=value)],
        )
        .properties(height={"step": 15})
    )  # fmt: skip
    return Chart(picture, words, (label, series, value), [(a, b, text) for a, b, _, text in rows], (2,))


def spans(rows: Sequence[tuple[str, float, float, str]], *, words: str, label: str, value: str) -> Chart:
    """A waterfall: (label, begin, end, length as text), in milliseconds since the request began."""
    import altair as alt  # noqa: PLC0415

    data = _data(
        [
            {"label": name, "begin": begin, "end": end, "text": text, "place": place}
            for place, (name, begin, end, text) in enumerate(rows)
        ]
    )
    base = alt.Chart(data).encode(
        y=alt.Y("label:N", sort=alt.EncodingSortField("place", order="ascending"), title=None,
                 axis=alt.Axis(labelLimit=200, labelFontSize=13, ticks=False, domain=False)),
        x=alt.X("begin:Q", title=value), x2="end:Q",
        tooltip=[alt.Tooltip("label:N", title=label), alt.Tooltip("text:N", title=value)],
    )  # fmt: skip
    picture = base.mark_bar(cornerRadius=3, height={"band": 0.7}, color=PRIMARY).properties(height={"step": 28})
    return Chart(picture, words, (label, value), [(name, text) for name, _, _, text in rows])


def lines(points: Sequence[tuple[float, float]], *, words: str, x: str, y: str) -> Chart:
    """One line over time: (x, y). Both axes start at 0."""
    import altair as alt  # noqa: PLC0415

    picture = (
        alt.Chart(_data([{"x": at, "y": value} for at, value in points]))
        .mark_line(color=PRIMARY)
        .encode(
            x=alt.X("x:Q", title=x, scale=alt.Scale(zero=True)),
            y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=True)),
            tooltip=[alt.Tooltip("x:Q", title=x, format=".0f"), alt.Tooltip("y:Q", title=y, format=".3~g")],
        )
        .properties(height=180)
    )
    return Chart(picture, words, (x, y), [(f"{at:.0f}", f"{value:.3g}") for at, value in points], (0, 1))


def lines_of(points: Sequence[tuple[float, float, str]], *, words: str, x: str, y: str, series: str) -> Chart:
    """Several lines over time: (x, y, name of the line). Both axes start at 0."""
    import altair as alt  # noqa: PLC0415

    names = list(dict.fromkeys(name for _, _, name in points))
    picture = (
        alt.Chart(_data([{"x": at, "y": value, "series": name} for at, value, name in points]))
        .mark_line()
        .encode(
            x=alt.X("x:Q", title=x, scale=alt.Scale(zero=True)),
            y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=True)),
            color=alt.Color("series:N", sort=names, title=series, scale=alt.Scale(range=[PRIMARY, SECOND, MUTED]),
                            legend=alt.Legend(orient="top")),
            tooltip=[alt.Tooltip("x:Q", title=x, format=".0f"), alt.Tooltip("y:Q", title=y, format=".3~g"),
                     alt.Tooltip("series:N", title=series)],
        )
        .properties(height=180)
    )  # fmt: skip
    rows = [(f"{at:.0f}", f"{value:.3g}", name) for at, value, name in points]
    return Chart(picture, words, (x, y, series), rows, (0, 1))


def dots(
    rows: Sequence[tuple[int, float, str, str]], *, words: str, x: str, y: str, series: str, logarithmic: bool = False
) -> Chart:
    """One point for each call: (number, value, series, value as text)."""
    import altair as alt  # noqa: PLC0415

    data = _data([{"x": n, "y": v, "series": s, "text": t} for n, v, s, t in rows])
    names = list(dict.fromkeys(s for _, _, s, _ in rows))
    picture = (
        alt.Chart(data)
        .mark_circle(size=55, opacity=0.85)
        .encode(
            x=alt.X("x:Q", title=x, axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("y:Q", title=y, axis=alt.Axis(tickCount=4),
                    scale=alt.Scale(type="log" if logarithmic else "linear")),
            color=alt.Color("series:N", sort=names, title=series, scale=alt.Scale(range=[SECOND, PRIMARY, MUTED]),
                             legend=alt.Legend(orient="top")),
            tooltip=[alt.Tooltip("x:Q", title=x), alt.Tooltip("text:N", title=y),
                     alt.Tooltip("series:N", title=series)],
        )
        .properties(height=240)
    )  # fmt: skip
    return Chart(picture, words, (x, y, series), [(str(n), t, s) for n, _, s, t in rows], (0, 1))


def tries(
    rows: Sequence[tuple[int, float, float, str]], *, words: str, call: str, seconds: str, outcome: str, good: str
) -> Chart:
    """One row for each call with a bar for each of its requests: (call, begin, end, outcome), in seconds. `good`: the
    outcome that is drawn in the primary colour."""
    import altair as alt  # noqa: PLC0415

    data = _data([{"call": n, "begin": b, "end": e, "outcome": o} for n, b, e, o in rows])
    names = [good, *dict.fromkeys(o for _, _, _, o in rows if o != good)]
    colours = [PRIMARY, SECOND, MUTED, "#be185d"]
    picture = (
        alt.Chart(data)
        .mark_bar(cornerRadius=2, minBandSize=4)
        .encode(
            y=alt.Y("call:O", title=call, axis=alt.Axis(ticks=False, domain=False, labelOverlap=True)),
            x=alt.X("begin:Q", title=seconds), x2="end:Q",
            color=alt.Color("outcome:N", sort=names, title=outcome, scale=alt.Scale(domain=names, range=colours),
                            legend=alt.Legend(orient="top", labelLimit=400, direction="vertical")),
            tooltip=[alt.Tooltip("call:O", title=call), alt.Tooltip("outcome:N", title=outcome),
                     alt.Tooltip("begin:Q", title=seconds, format=".2f")],
        )
        .properties(height={"step": 14})
    )  # fmt: skip
    table = [(str(n), f"{b:.2f}", f"{e:.2f}", o) for n, b, e, o in rows]
    return Chart(picture, words, (call, f"{seconds} ▸", f"▸ {seconds}", outcome), table, (0, 1, 2))


def grid(rows: Sequence[tuple[str, str, float, str]], *, words: str, x: str, y: str, value: str, labels: bool) -> Chart:
    """Cells in the order of `rows`: (column, row, share from 0 to 1, text). `labels`: whether to draw the texts too."""
    import altair as alt  # noqa: PLC0415

    data = _data([{"x": a, "y": b, "share": share, "text": text} for a, b, share, text in rows])
    columns, lines = list(dict.fromkeys(a for a, *_ in rows)), list(dict.fromkeys(b for _, b, *_ in rows))
    base = alt.Chart(data).encode(
        x=alt.X("x:N", sort=columns, title=x, axis=alt.Axis(labelAngle=-40, orient="top", labelLimit=110)),
        y=alt.Y("y:N", sort=lines, title=y, axis=alt.Axis(labelLimit=140)),
    )
    picture = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color("share:Q", scale=alt.Scale(scheme="teals", domain=[0, 1]), title=value,
                        legend=None if labels else alt.Legend(format=".0%", orient="bottom")),
        tooltip=[alt.Tooltip("x:N", title=x), alt.Tooltip("y:N", title=y), alt.Tooltip("text:N", title=value),
                 alt.Tooltip("share:Q", title=value, format=".1%")],
    )  # fmt: skip
    if labels:
        text = base.mark_text(fontSize=11, limit=80).encode(
            text="text:N", color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("#1c2b2d"))
        )
        picture = picture + text
    picture = picture.properties(height={"step": 20})
    return Chart(picture, words, (x, y, value), [(a, b, f"{text} {share:.1%}") for a, b, share, text in rows], ())
