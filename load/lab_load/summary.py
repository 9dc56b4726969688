"""What a run measured: figures, the page of text, the files. Knows nothing of HTTP or Locust."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from . import __version__
from .answer import Answer
from .trial import Trial

CLOSED_LOOP = (
    "Closed loop: a user asks again only when its answer is complete, so a slow server is asked less. These are times "
    "of answers at this number of users, not those that arrivals at a fixed rate would see (coordinated omission): "
    "they say nothing of the queue that such arrivals build up."
)
SATURATED = 90.0  # percent of a core: from here on the generator itself may be what is slow


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Count, mean, percentiles (nearest rank: a value that was really seen), largest; only the count of nothing."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)

    def rank(p: float) -> float:
        return ordered[max(math.ceil(p * len(ordered)) - 1, 0)]

    return {
        "count": len(ordered),
        "mean": math.fsum(ordered) / len(ordered),
        "p50": rank(0.50),
        "p95": rank(0.95),
        "p99": rank(0.99),
        "max": ordered[-1],
    }


def times(answers: Iterable[Answer]) -> dict[str, dict[str, float | int]]:
    fine = [answer for answer in answers if not answer.error]
    return {
        "ttft_seconds": spread([answer.ttft for answer in fine]),
        "inter_token_seconds": spread([gap for answer in fine for gap in answer.gaps]),
        "end_to_end_seconds": spread([answer.seconds for answer in fine]),
        "tokens_per_second": spread([speed for a in fine if (speed := a.tokens_per_second) is not None]),
        "prompt_tokens": spread([answer.prompt_tokens for answer in fine]),
        "completion_tokens": spread([answer.completion_tokens for answer in fine]),
    }


def throughput(trial: Trial, answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates and times while all users were there: not while they started, not while the last answers drained."""
    since, until = trial.full or trial.began, trial.stopped or time.perf_counter()
    within = [answer for answer in answers if since <= answer.began < until]
    fine = [answer for answer in answers if not answer.error]
    # An answer that lies across an edge counts with the share of its events inside.
    tokens = math.fsum(
        answer.completion_tokens * sum(since <= event < until for event in answer.events) / len(answer.events)
        for answer in fine
    )
    ended = sum(since <= answer.ended < until for answer in fine)
    return {
        "window_seconds": until - since,
        "output_tokens_per_second": tokens / (until - since) if until > since else 0.0,
        "answers_per_second": ended / (until - since) if until > since else 0.0,
        "cache": dict(Counter(answer.cache for answer in answers)),
        "metrics": times(within),
    }


def caching(trial: Trial, answers: Sequence[Answer]) -> dict[str, Any]:
    """Hits beside those that a perfect cache would have, in theory and for the very questions that were drawn.

    Of the whole run: the cache fills from its first question on.
    """
    fine = [answer for answer in answers if not answer.error]
    draws, distinct = len(fine), len({answer.number for answer in fine})
    states = Counter(answer.cache for answer in fine)
    expected, deviation = trial.zipf.expected_hits(draws)
    each = max(draws, 1)
    return {
        "prompts": trial.settings.prompts,
        "zipf_exponent": trial.settings.zipf_exponent,
        "draws": draws,
        "distinct": distinct,
        "states": dict(states),
        "hit_ratio": {
            "measured": states["hit"] / each,
            "these_draws": (draws - distinct) / each,
            "expected": expected / each,
            "expected_deviation": deviation / each,
        },
        # asked again before the first answer was stored; collapsed ones joined the request that was under way
        "missed_again": max(states["miss"] - distinct, 0),
        "metrics": {state: times(answer for answer in fine if answer.cache == state) for state in sorted(states)},
    }


FIGURES = {"caching": caching}  # of scenarios with figures of their own; the others have throughput's


def summarize(trial: Trial) -> dict[str, Any]:
    """All that summary.json holds: what ran, against what, where, and what came out."""
    now = time.perf_counter()
    cpu = 100 * (time.process_time() - trial.cpu_began) / max(now - trial.began, 1e-9)
    results: dict[str, Any] = {}
    for scenario in sorted({answer.scenario for answer in trial.answers}, reverse=True):
        answers = [answer for answer in trial.answers if answer.scenario == scenario]
        errors = Counter(answer.error for answer in answers if answer.error)
        counts = {"answers": len(answers) - errors.total(), "failed": errors.total(), "errors": dict(errors)}
        results[scenario] = counts | FIGURES.get(scenario, throughput)(trial, answers)
    return {
        "name": trial.name,
        "started": trial.started.isoformat(timespec="seconds"),
        "seconds": now - trial.began,
        "users": trial.users,
        "settings": trial.settings.model_dump(mode="json", exclude={"api_key"}) | {"salt": trial.salt},
        "target": {
            "host": trial.target.host,
            "model": trial.target.model,
            "server": trial.target.server,
            "status": trial.target.status,
        },
        "generator": {
            "versions": {"lab_load": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("locust", "gevent", "geventhttpclient")},
            "machine": machine(),
            "cpu_percent_mean": cpu,
            "cpu_percent_most": max(trial.cpu_most, cpu),
            "saturated": max(trial.cpu_most, cpu) > SATURATED,
        },
        "loop": CLOSED_LOOP,
        "unfinished": trial.unfinished,
        "results": results,
    }


def machine() -> dict[str, Any]:
    """Where the generator ran; the server's own machine stands in the target's status, as far as it tells."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "processor": model,
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
    }


def page(summary: dict[str, Any]) -> str:
    """The summary for the person at the terminal."""
    target, settings = summary["target"], summary["settings"]
    lines = [f"load: {summary['name']}: {target['model']} at {target['host']}, {summary['users']} users, "
             f"{summary['seconds']:.0f} s, seed {settings['seed']}"]  # fmt: skip
    for scenario, result in summary["results"].items():
        lines += ["", *(_caching if scenario == "caching" else _throughput)(result)]
        kinds = ", ".join(f"{count} × {kind}" for kind, count in result["errors"].items())
        lines.append(f"  {result['answers']} answers, {result['failed']} failed{f': {kinds}' if kinds else ''}")
    if not summary["results"]:
        lines.append("  no answer came back")
    if len(summary["results"]) > 1:
        lines.append("  Both ran at once, so the figures of each hold the other's load.")
    if summary["unfinished"]:
        lines.append(f"  {summary['unfinished']} answers were cut off after LOAD_DRAIN_SECONDS and are not counted")
    generator = summary["generator"]
    if generator["saturated"]:
        lines.append(f"  The load generator itself used {generator['cpu_percent_most']:.0f} % of a core: these are its "
                     "own limits as much as the server's. Take fewer users.")  # fmt: skip
    loop = textwrap.fill(summary["loop"], width=96, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, "", loop])


def _table(metrics: dict[str, dict[str, float | int]], rows: dict[str, str]) -> list[str]:
    columns = ("count", "mean", "p50", "p95", "p99", "max")

    def shown(value: float) -> str:
        return f"{value:>10.{0 if value >= 1000 else 2 if value >= 10 else 4}f}"

    lines = [" " * 36 + "".join(f"{column:>10}" for column in columns)]
    for name, label in rows.items():
        got = metrics[name]
        cells = [f"{got['count']:>10}", *(shown(got[c]) if c in got else f"{'–':>10}" for c in columns[1:])]
        lines.append(f"  {label:<34}" + "".join(cells))
    return lines


def _throughput(result: dict[str, Any]) -> list[str]:
    rows = {
        "ttft_seconds": "first token, s (TTFT)",
        "inter_token_seconds": "between events, s (ITL)",
        "end_to_end_seconds": "whole answer, s",
        "tokens_per_second": "tokens/s of one answer, decode",
    }
    lines = _table(result["metrics"], rows)
    rate, answers = result["output_tokens_per_second"], result["answers_per_second"]
    lines.append(f"  {rate:.1f} tokens/s and {answers:.2f} answers/s "
                 f"in all, over {result['window_seconds']:.1f} s with all users")  # fmt: skip
    if hits := result["cache"].get("hit", 0) + result["cache"].get("collapsed", 0):
        lines.append(f"  {hits} answers came from the cache: another LOAD_SALT, or these are not the model's figures")
    return lines


def _caching(result: dict[str, Any]) -> list[str]:
    ratio, states = result["hit_ratio"], result["states"]
    lines = [
        f"  hit ratio {ratio['measured']:.3f} measured",
        f"            {ratio['these_draws']:.3f} a perfect cache on these draws: {result['draws']}, of "
        f"{result['distinct']} questions",
        f"            {ratio['expected']:.3f} ± {ratio['expected_deviation']:.3f} expected by Zipf's law, s = "
        f"{result['zipf_exponent']:g}, over {result['prompts']} questions",
    ]
    if ratio["measured"] > ratio["these_draws"]:
        lines.append("  more hits than a cold cache can have: it held answers of an earlier run with this LOAD_SALT")
    if result["missed_again"]:
        lines.append(f"  {result['missed_again']} questions were asked again before their first answer was stored")
    if states.get("collapsed"):
        lines.append(f"  {states['collapsed']} joined a request that was under way")
    others = sorted(states.keys() - {"hit", "miss", "collapsed"})
    lines += [f"  {states[state]} passed by the cache ({state})" for state in others]
    for state, metrics in result["metrics"].items():
        rows = {"ttft_seconds": f"{state}: first token, s", "end_to_end_seconds": f"{state}: whole answer, s"}
        lines += _table(metrics, rows) if state == min(result["metrics"]) else _table(metrics, rows)[1:]
    return lines


def write(folder: Path, trial: Trial, summary: dict[str, Any]) -> None:
    """summary.json; its metrics as summary.csv; every answer as answers.csv."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        columns = ("count", "mean", "p50", "p95", "p99", "max")
        rows.writerow(["scenario", "cache", "metric", *columns])
        for scenario, result in summary["results"].items():
            groups = result["metrics"] if scenario == "caching" else {"": result["metrics"]}
            for state, metrics in groups.items():
                for name, got in metrics.items():
                    rows.writerow([scenario, state, name, *(got.get(column, "") for column in columns)])
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["scenario", "question", "began_seconds", "ttft_seconds", "end_to_end_seconds",
                       "tokens_per_second", "prompt_tokens", "completion_tokens", "cache", "error"])  # fmt: skip
        for a in trial.answers:
            ttft, speed = (a.ttft if a.events else ""), (a.tokens_per_second or "")
            rows.writerow([a.scenario, a.number, a.began - trial.began, ttft, a.seconds, speed, a.prompt_tokens,
                           a.completion_tokens, a.cache, a.error])  # fmt: skip
