"""`load-table`: measures the effect of the cache, for three exponents of Zipf's law, with and without it, repeated."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from ..reports import html
from ..settings import Settings
from . import runs

EXPONENTS = (0.6, 0.9, 1.2)
REPEATS = 3
MINUTES = 20


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: seconds of each run; by default all runs together take 20 minutes."""
    each = int(arguments[0]) if arguments else MINUTES * 60 // (len(EXPONENTS) * 2 * REPEATS)
    found: dict[tuple[float, bool], list[dict[str, Any]]] = {}
    worst = 0
    for repeat in range(REPEATS):  # in turns, so that a slow drift of the machine affects all alike
        for exponent in EXPONENTS:
            for cache in (True, False):
                done = runs.run(
                    "caching",
                    settings,
                    zipf_exponent=exponent,
                    cache=cache,
                    seconds=each,
                    seed=settings.seed + repeat,
                    requests=max(settings.requests, 200 * each),
                )
                found.setdefault((exponent, cache), []).append(runs.result(done))
                worst = max(worst, done.code)
                sys.stdout.write(f"s = {exponent}, cache {'on' if cache else 'off'}: exit code {done.code}\n")
                sys.stdout.flush()
    head = ["Zipf s", "cache", "requests/s", "tokens/s", "hit ratio", "expected", "TTFT mean, s", "E2E mean, s"]
    rows = [_row(exponent, cache, results) for (exponent, cache), results in sorted(found.items(), reverse=True)]
    text = "\n".join(
        ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )
    lines = {
        ("cache on" if cache else "cache off"): [
            (exponent, _mean(found[exponent, cache], "requests_per_second")) for exponent in EXPONENTS
        ]
        for cache in (True, False)
    }
    page = html.chart("Requests per second over Zipf's exponent", "/s", lines, x_unit="s")
    (settings.runs_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    (settings.runs_dir / "table.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Effect of the cache</title>'
        f"<style>{html.STYLE}</style>"
        f"<h1>Effect of the cache</h1>{page}{html.table(head, rows)}</html>\n",
        encoding="utf-8",
    )
    sys.stdout.write(f"{text}\n  {settings.runs_dir}/: table.md, table.html\n")
    return worst


def _mean(results: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(float(result[name]) for result in results)


def _row(exponent: float, cache: bool, results: list[dict[str, Any]]) -> list[str]:
    """One row of the table: means over the repeats, rates with their range."""

    def span(name: str) -> str:
        values = [float(result[name]) for result in results]
        return f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    def ratio(name: str) -> str:
        values = [result["hit_ratio"][name] for result in results if name in result.get("hit_ratio", {})]
        return f"{statistics.fmean(values):.3f}" if values and cache else "–"

    times = [
        statistics.fmean(result["metrics"][name].get("mean", 0.0) for result in results)
        for name in ("ttft_seconds", "end_to_end_seconds")
    ]
    return [
        f"{exponent:g}",
        "on" if cache else "off",
        span("requests_per_second"),
        span("output_tokens_per_second"),
        ratio("with_collapsed"),
        ratio("expected"),
        *(f"{value:.4f}" for value in times),
    ]
