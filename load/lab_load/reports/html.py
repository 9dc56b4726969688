"""The report of a run as one HTML file without scripts or external resources. Charts are SVG, each with its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..measures.histogram import Times
from . import summary

Points = Sequence[tuple[float, float]]
COLOURS = ("#0b6e4f", "#b3261e", "#1f4e9c", "#8a5a00")
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 240, 56, 34

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd}"
    "td,th{text-align:right}td:first-child,th:first-child{text-align:left}"
    ".bad{color:#b3261e;font-weight:600}figure{display:inline-block;margin:0}"
)


def page(result: dict[str, Any], folder: Path) -> str:
    """The HTML page of a run. `folder`: contains its progress.jsonl and records.jsonl."""
    target = result["target"]
    body = [
        f"<h1>{escape(result['name'])}</h1>",
        f"<p>{escape(str(target['model']))} at {escape(target['host'])}, {result['users']} users, "
        f"{result['loop']} loop, {result['seconds']:.0f} s, seed {result['settings']['seed']}</p>",
    ]
    body += [f'<p class="bad">Cannot be trusted: {escape(why)}</p>' for why in result["reasons"]]
    for name, figures in result["results"].items():
        body += [
            f"<h2>{escape(name)}</h2>",
            f"<p>{escape(figures['workload']['about'])}. Workload SHA-256 <code>"
            f"{figures['workload']['sha256']}</code>. {figures['answers']} answers, {figures['failed']} failed.</p>",
        ]
        if result["trusted"]:
            body += [_times(figures), *(f"<p>{escape(fact)}</p>" for fact in summary.facts(figures))]
            body += _distributions(figures)
            body.append(_hit_ratio(folder, name, figures))
    body.append(_progress(folder))
    body += ["<h2>Sums</h2>", _sums(result["sums"]), "<h2>Definitions</h2>", "<dl>"]
    body += [f"<dt><code>{name}</code></dt><dd>{escape(text)}</dd>" for name, text in result["definitions"].items()]
    generator = result["generator"]
    body.append(
        f"</dl><p>Generator: {escape(json.dumps(generator['versions']))}, {escape(generator['machine']['system'])}, "
        f"{generator['machine']['cores']} cores, {generator['cpu_percent_mean']:.0f} % of a core</p>"
    )
    return document(result["name"], "".join(body))


def document(title: str, body: str) -> str:
    """`body`: HTML."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>{body}</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(each)}</th>" for each in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def chart(title: str, unit: str, lines: Mapping[str, Points], *, x_unit: str = "s") -> str:
    """Lines in one chart whose axes start at 0. The alternative text gives the last point of each line."""
    points = [point for line in lines.values() for point in line]
    if len(points) < 2:
        return ""
    right = max(x for x, _ in points) or 1.0
    top = max(y for _, y in points) or 1.0

    def place(x: float, y: float) -> str:
        return f"{LEFT + x / right * (WIDTH - LEFT - 10):.1f},{HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 24):.1f}"

    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
            f'points="{" ".join(place(x, y) for x, y in line)}"/>'
            f'<text x="{LEFT + 8 + 120 * number}" y="14" fill="{colour}" font-size="12">{escape(name)}</text>'
        )
    base = HEIGHT - BOTTOM
    axes = (
        f'<path d="M{LEFT} 20V{base}H{WIDTH - 10}" fill="none" stroke="#666"/>'
        f'<text x="4" y="30" font-size="11">{top:.3g} {escape(unit)}</text><text x="{LEFT - 14}" y="{base}" '
        f'font-size="11">0</text><text x="{WIDTH - 70}" y="{HEIGHT - 14}" font-size="11">'
        f"{right:.3g} {escape(x_unit)}</text>"
    )
    alt = "; ".join(f"{name} ends at {line[-1][1]:.3g} {unit}" for name, line in lines.items() if line)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" aria-label="{escape(title)}: {escape(alt)}" '
        f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{axes}{"".join(drawn)}</svg></figure>'
    )


def bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """A self-contained SVG picture: a group of bars per label (series -> value), each bar with its value."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    top = max((value for values in groups.values() for value in values.values()), default=0.0) or 1.0
    base, wide = HEIGHT - BOTTOM, (WIDTH - 40) / max(len(groups), 1)
    bar = min(60.0, 0.8 * wide / max(len(names), 1))
    drawn = [
        f'<text x="{20 + 130 * number}" y="38" fill="{COLOURS[number % len(COLOURS)]}">{escape(name)}</text>'
        for number, name in enumerate(names)
    ]
    for place, (label, values) in enumerate(groups.items()):
        middle = 20 + (place + 0.5) * wide
        drawn.append(f'<text x="{middle:.0f}" y="{base + 20}" text-anchor="middle">{escape(label)}</text>')
        for number, name in enumerate(names):
            if name not in values:
                continue
            left, height = middle + (number - len(names) / 2) * bar, values[name] / top * (base - 70)
            drawn.append(
                f'<rect x="{left:.1f}" y="{base - height:.1f}" width="{bar - 4:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[number % len(COLOURS)]}"/>'
                f'<text x="{left + bar / 2 - 2:.1f}" y="{base - height - 5:.1f}" '
                f'text-anchor="middle">{values[name]:.3g}</text>'
            )
    alt = "; ".join(f"{label}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items())
                    for label, values in groups.items())  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}. {escape(alt)}" '
        f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13" '
        f'fill="#222"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><text x="20" y="20">{escape(title)}</text>'
        f'<path d="M20 {base}H{WIDTH - 20}" stroke="#666"/>{"".join(drawn)}</svg>'
    )


def _times(figures: dict[str, Any]) -> str:
    rows = [
        [label, *(summary.cell(numbers, column) for column in summary.COLUMNS)]
        for label, numbers in summary.rows(figures)
    ]
    return table(["", *summary.COLUMNS], rows)


def _distributions(figures: dict[str, Any]) -> list[str]:
    found = []
    for name, title in (("ttft_seconds", "TTFT"), ("end_to_end_seconds", "End to end")):
        lines = {
            group: Times.merge([metrics[name]["histogram"]]).cumulative()
            for group, metrics in figures["by_cache"].items()
            if metrics[name]["count"]
        }
        found.append(chart(f"{title}: share of the answers up to this time", "of 1", lines))
    return found


def _hit_ratio(folder: Path, scenario: str, figures: dict[str, Any]) -> str:
    """Chart of the cumulative hit ratio: hits over hits, misses and collapsed requests, at the end of each request."""
    path = folder / "records.jsonl"
    if not figures.get("hit_ratio") or not path.exists():
        return ""
    hits = decided = 0
    line: list[tuple[float, float]] = []
    records = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    for record in sorted((each for each in records if each["scenario"] == scenario), key=lambda each: each["ended"]):
        if not record["error"] and record["cache"] in {"hit", "miss", "collapsed"}:
            decided += 1
            hits += record["cache"] == "hit"
            line.append((record["ended"], hits / decided))
    step = max(1, len(line) // 300)
    return chart("Hit ratio so far", "of 1", {"hit ratio": line[::step]})


def _progress(folder: Path) -> str:
    path = folder / "progress.jsonl"
    moments = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if len(moments) < 2:
        return ""
    throughput = [(each["seconds"], float(each["tokens_per_second"])) for each in moments]
    queue = [(each["seconds"], float(each["queue"])) for each in moments if each["queue"] is not None]
    flight = [(each["seconds"], float(each["in_flight"])) for each in moments if each["in_flight"] is not None]
    running = {name: line for name, line in (("at the proxy", flight), ("at the model", queue)) if line}
    names = sorted({name for each in moments for name in each.get("replicas", ())})
    replicas = {name: [(each["seconds"], float(each["replicas"].get(name, 0))) for each in moments] for name in names}
    return (
        "<h2>Over time</h2>"
        + chart("Output tokens of the answers that ended in each second", "/s", {"tokens": throughput})
        + chart("Requests in flight", "", running)
        + chart("Answers of each replica of the model", "/s", replicas)
    )


def _sums(sums: dict[str, Any]) -> str:
    shown = [side for side in summary.SIDES if any(side in row["values"] for row in sums["rows"])]
    rows = []
    for row in sums["rows"]:
        values = ["" if row["values"].get(side) is None else f"{row['values'][side]:g}" for side in shown]
        rows.append([row["name"], *values, "" if not row["known"] else "ok" if row["holds"] else "differs"])
    state = f'<p class="{"" if sums["holds"] else "bad"}">{escape(summary.verdict(sums))}</p>'
    return table(["", *shown, ""], rows) + state + "".join(f"<p>{escape(note)}</p>" for note in sums["notes"])
