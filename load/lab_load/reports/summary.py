"""The results of a run: figures, summary as text, files. Knows nothing of HTTP or Locust."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import psutil

from .. import __version__
from ..measures import trust
from ..measures.counters import Counters
from ..measures.histogram import SAMPLES, Times
from ..measures.prefix import expected_cached
from ..measures.record import Record
from ..measures.sums import Table
from ..measures.trial import Trial
from ..workloads.workload import perfect_hits

METRICS = {  # metric -> definition, printed in every report
    "schedule_lag_seconds": "real start − intended start of a request",
    "ttft_seconds": "first event with content in any channel − intended start (closed loop: start)",
    "first_visible_seconds": "first text of the answer − intended start",
    "end_to_end_seconds": "last event with content − intended start; a failure counts with the time until it failed",
    "tpot_seconds": "(last event − first event) / (tokens − 1), one value per request; tokens from the usage",
    "inter_token_seconds": "gaps between events with content, over all requests",
}
GROUPS = ("hit", "miss", "collapsed", "other")
CLOSED_LOOP = (
    "Closed loop: a user sends its next request only after its answer is complete, so a slow server gets fewer "
    "requests. The times are those of this number of users, not of arrivals at a fixed rate (coordinated omission). "
    "LOAD_RATE sets a fixed rate."
)


def group_of(record: Record) -> str:
    return record.state if record.state in GROUPS else "other"


def times(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The metrics of some requests. End-to-end times include failures, with at least the time they took."""
    fine = [each for each in records if not each.error and not each.abandoned]

    def known(values: Iterable[float | None]) -> dict[str, Any]:
        return Times(value for value in values if value is not None).figures()

    return {
        "schedule_lag_seconds": known(each.lag for each in records),
        "ttft_seconds": known(each.ttft for each in fine),
        "first_visible_seconds": known(each.visible for each in fine),
        "end_to_end_seconds": known(each.seconds for each in records if not each.abandoned),
        "tpot_seconds": known(each.tpot for each in fine),
        "inter_token_seconds": known(gap for each in fine for gap in each.gaps),
    }


def rates(trial: Trial, records: Sequence[Record]) -> dict[str, Any]:
    """Rates per second of the steady window. An answer that is partly inside counts with its events inside."""
    since, until = trial.steady
    length = max(until - since, 1e-9)
    fine = [each for each in records if not each.error and not each.abandoned]
    tokens = math.fsum(
        each.completion_tokens * sum(since <= event < until for event in each.events) / len(each.events)
        for each in fine if each.events
    )  # fmt: skip
    good = [each for each in fine if meets_slo(trial, each)]
    return {
        "window_seconds": until - since,
        "output_tokens_per_second": tokens / length,
        "requests_per_second": sum(since <= each.ended < until for each in fine) / length,
        "goodput_per_second": sum(since <= each.ended < until for each in good) / length,
    }


def meets_slo(trial: Trial, record: Record) -> bool:
    """Whether TTFT and TPOT are within LOAD_SLO_…; for an answer that has neither, such as an embedding, its end-to-end
    time counts."""
    settings = trial.settings
    first = record.seconds if record.ttft is None else record.ttft
    return first <= settings.slo_ttft_seconds and (record.tpot or 0.0) <= settings.slo_tpot_seconds


def expected_hits(trial: Trial, draws: int) -> tuple[float, float] | None:
    """Expected share of answers without an upstream call and its standard deviation; None if the workload does not
    follow Zipf's law.

    With a TTL or a capacity: the long-run ratio under that limit, with the deviation of a binomial distribution and
    of the cold start.
    """
    (workload,) = trial.workloads.values()
    if workload.zipf is None or draws == 0:
        return None
    mean, deviation = workload.zipf.expected_hits(draws)
    cold = mean / draws
    settings, seconds = trial.settings, max(trial.steady[1] - trial.began, 1e-9)
    limits = []
    if settings.ttl_seconds:
        limits.append(workload.zipf.ttl_hit_ratio(draws / seconds, settings.ttl_seconds))
    if settings.capacity:
        limits.append(workload.zipf.lru_hit_ratio(settings.capacity))
    if not limits or min(limits) >= cold:
        return cold, deviation / draws
    ratio = min(limits)
    return ratio, math.sqrt(ratio * (1 - ratio) / draws) + (1 - cold) / 3


def _scenario(trial: Trial, name: str, records: list[Record]) -> dict[str, Any]:
    since, until = trial.steady
    workload = trial.workloads[name]
    # A scheduled workload counts as a whole; for the others only the steady window counts.
    steady = records if workload.scheduled else [each for each in records if since <= each.intended <= until]
    errors = Counter(each.error for each in records if each.error)
    fine = [each for each in records if not each.error]
    states = Counter(each.state for each in fine)
    decided = states["hit"] + states["miss"] + states["collapsed"]
    found: dict[str, Any] = {
        "workload": {"about": workload.about, "sha256": workload.sha256, "requests": len(workload.items)},
        "answers": len(fine), "failed": errors.total(), "errors": dict(errors), "steady": len(steady),
        "abandoned": sum(each.abandoned for each in records),
        "refused": sum(400 <= each.status < 500 for each in fine),
        "states": dict(sorted(states.items())),
        **rates(trial, records),
        "metrics": times(steady),
        "by_cache": {group: times([each for each in steady if not each.error and group_of(each) == group])
                     for group in GROUPS if any(group_of(each) == group for each in steady if not each.error)},
        "tokens": {kind: sum(getattr(each, f"{kind}_tokens") for each in fine)
                   for kind in ("prompt", "completion", "cached")},
        "replicas": dict(sorted(Counter(each.replica for each in fine if each.replica).items())),
    }  # fmt: skip
    if trial.shared is not None and workload.prefix_groups:
        least, most = expected_cached(records, trial.shared, lambda record: record.number % workload.prefix_groups)
        found["prefix"] = {"cached_tokens": found["tokens"]["cached"], "expected_least": least, "expected_most": most}
    if decided:
        questions = [each.question for each in fine]
        found["hit_ratio"] = {
            "measured": states["hit"] / decided,
            "with_collapsed": (states["hit"] + states["collapsed"]) / decided,
            "perfect": perfect_hits(questions) / max(len(questions), 1),
        }
        if len(trial.workloads) == 1 and (expected := expected_hits(trial, len(fine))) is not None:
            found["hit_ratio"] |= {"expected": expected[0], "expected_deviation": expected[1]}
    return found


def summarize(trial: Trial, table: Table) -> dict[str, Any]:
    """The content of summary.json: settings, target, machine, figures, and whether they can be trusted."""
    now = time.perf_counter()
    cpu = 100 * (time.process_time() - trial.cpu_began) / max(now - trial.began, 1e-9)
    results: dict[str, Any] = {}
    for name in sorted(trial.workloads):
        records = [record for record in trial.records if record.scenario == name]
        if records:
            results[name] = _scenario(trial, name, records)
    settings = trial.settings
    open_loop = all(trial.open_loop(name) for name in trial.workloads)
    lag = Times(record.lag for record in trial.records)
    wanted = settings.generators if open_loop else settings.users
    # Users stop when the workload is used up; users that the run did not reach were never started.
    conduct = trust.Conduct(
        users_wanted=wanted, users_most=trial.users, all_spawned=trial.full is not None,
        cpu_percent=max(cpu, trial.cpu_most), answers=len(trial.records),
        lag=(lag.percentile("p99") or lag.figures().get("max")) if open_loop else None,
    )  # fmt: skip
    reasons = trust.reasons(conduct)
    if any(trial.used_up(name) for name in trial.workloads):
        reasons.append("the workload has fewer requests than arrive at this rate: raise LOAD_REQUESTS")
    return {
        "name": trial.name,
        "started": trial.started.isoformat(timespec="seconds"),
        "seconds": now - trial.began,
        "loop": "open" if open_loop else "closed",
        "users": trial.users,
        "settings": settings.model_dump(mode="json", exclude={"api_key", "admin_key"}) | {"salt": trial.salt},
        "target": {"host": trial.target.host, "model": trial.target.model, "server": trial.target.server,
                   "status": trial.target.status},
        "generator": {
            "versions": {"lab_load": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("locust", "gevent", "geventhttpclient", "hdrhistogram")},
            "machine": machine(), "cpu_percent_mean": cpu, "cpu_percent_most": trial.cpu_most,
            "processes": settings.generators,
        },
        "sent": trial.sent, "unfinished": trial.unfinished,
        "trusted": not reasons, "reasons": reasons,
        "sums": {"holds": table.holds, "rows": [row.as_dict() for row in table.rows], "notes": table.notes},
        "results": results,
        "definitions": METRICS,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """The generator's machine. If the target is on loopback, it is also the server's."""
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "megahertz": round(frequency.max or frequency.current) if frequency else None,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def moment(trial: Trial, counters: Counters) -> dict[str, Any]:
    """One line of progress.jsonl, for live charts: figures of the last second. `queue`: requests at the model."""
    now = time.perf_counter()
    last = [record for record in trial.records[-2000:] if record.ended >= now - 1]
    first = [record.ttft for record in last if record.ttft is not None]
    states = Counter(record.state for record in last if not record.error)
    decided = states["hit"] + states["miss"] + states["collapsed"]
    return {
        "seconds": round(now - trial.began, 2),
        "answers": len(trial.records), "failed": sum(bool(record.error) for record in trial.records),
        "per_second": len(last), "tokens_per_second": sum(record.completion_tokens for record in last),
        "ttft_p50": statistics.median(first) if first else None,
        "hit_ratio": states["hit"] / decided if decided else None,
        "in_flight": counters.in_flight, "queue": counters.running,
        "replicas": dict(sorted(Counter(record.replica for record in last if record.replica).items())),
    }  # fmt: skip


# -- the summary as text


def page(result: dict[str, Any]) -> str:
    """The summary for the terminal."""
    target, settings = result["target"], result["settings"]
    lines = [f"load: {result['name']}: {target['model']} at {target['host']}, {result['users']} users, "
             f"{result['loop']} loop, {result['seconds']:.0f} s, seed {settings['seed']}"]  # fmt: skip
    for name, figures in result["results"].items():
        kinds = ", ".join(f"{count} × {kind}" for kind, count in figures["errors"].items())
        lines += ["", f"  {name}: {figures['answers']} answers, {figures['failed']} failed"
                      f"{f': {kinds}' if kinds else ''}"]  # fmt: skip
        if result["trusted"]:
            lines += _figures(figures)
    if not result["trusted"]:
        lines += [
            "",
            "  These figures cannot be trusted, so none are shown:",
            *(f"  - {why}" for why in result["reasons"]),
        ]
    if result["unfinished"]:
        lines.append(f"  {result['unfinished']} answers were cut off after LOAD_DRAIN_SECONDS; no time includes them")
    lines += ["", *sums(result["sums"])]
    if result["loop"] == "closed":
        lines += ["", f"  {CLOSED_LOOP}"]
    return "\n".join(lines)


COLUMNS = ("count", "mean", "p50", "p95", "p99", "max")
LABELS = {
    "ttft_seconds": "first token, s (TTFT)", "end_to_end_seconds": "end to end, s (E2E)",
    "tpot_seconds": "per output token, s (TPOT)", "inter_token_seconds": "between events, s (ITL)",
    "schedule_lag_seconds": "schedule lag, s",
}  # fmt: skip


def rows(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Label and numbers of each row of a scenario's table: all requests, then by cache state if there are several."""
    found = [(label, figures["metrics"][name]) for name, label in LABELS.items()]
    if len(figures["by_cache"]) > 1:
        found += [(f"{group}: {LABELS[name]}", metrics[name]) for group, metrics in figures["by_cache"].items()
                  for name in ("ttft_seconds", "end_to_end_seconds")]  # fmt: skip
    return [(label, numbers) for label, numbers in found if numbers["count"]]


def cell(numbers: dict[str, Any], column: str) -> str:
    """A number as text, or the reason why a percentile has none: too few samples."""
    value = numbers.get(column)
    if value is None:
        return f"n<{SAMPLES[column]}" if column in SAMPLES else "–"
    return str(value) if column == "count" else f"{value:.{0 if value >= 1000 else 2 if value >= 10 else 4}f}"


def _figures(figures: dict[str, Any]) -> list[str]:
    lines = [" " * 38 + "".join(f"{column:>10}" for column in COLUMNS)]
    lines += [f"  {label:<36}" + "".join(f"{cell(numbers, column):>10}" for column in COLUMNS)
              for label, numbers in rows(figures)]  # fmt: skip
    lines.append(f"  {figures['output_tokens_per_second']:.1f} tokens/s, "
                 f"{figures['requests_per_second']:.2f} requests/s, goodput {figures['goodput_per_second']:.2f}/s, "
                 f"over {figures['window_seconds']:.1f} s")  # fmt: skip
    return lines + [f"  {fact}" for fact in facts(figures)]


def facts(figures: dict[str, Any]) -> list[str]:
    """Facts about a run beside its times, one sentence each: prefix cache, replicas, hit ratio."""
    found = []
    if prefix := figures.get("prefix"):
        found.append(f"{prefix['cached_tokens']} prompt tokens from the prefix cache, expected "
                     f"{prefix['expected_least']} to {prefix['expected_most']}{_judged(prefix)}")  # fmt: skip
    if len(replicas := figures.get("replicas", {})) > 1:
        found.append("answers by replica: " + ", ".join(f"{name} {count}" for name, count in replicas.items()))
    if ratio := figures.get("hit_ratio"):
        expected = (f", expected {ratio['expected']:.3f} ± {3 * ratio['expected_deviation']:.3f}"
                    if "expected" in ratio else "")  # fmt: skip
        found.append(f"hit ratio {ratio['measured']:.3f}, with collapsed {ratio['with_collapsed']:.3f}; "
                     f"a perfect cache {ratio['perfect']:.3f}{expected}")  # fmt: skip
    return found


def _judged(prefix: dict[str, int]) -> str:
    """For a `prefix` run: why its cached tokens differ from the expected ones, empty if they do not."""
    if prefix["cached_tokens"] > prefix["expected_most"]:
        return ": more, so prompts were in the cache before the run"
    if prefix["cached_tokens"] < prefix["expected_least"]:
        return ": fewer, so the cache evicted some of them (memory for keys and values)"
    return ""


SIDES = ("client", "proxy", "model", "ledger", "answers", "server")


def sums(table: dict[str, Any]) -> list[str]:
    """The table of sums as text."""
    shown = [side for side in SIDES if any(side in row["values"] for row in table["rows"])]
    lines = ["  " + f"{'sums':<46}" + "".join(f"{side:>10}" for side in shown)]
    for row in table["rows"]:
        values = "".join(f"{_number(row['values'].get(side)):>10}" for side in shown)
        state = "" if not row["known"] else "  ok" if row["holds"] else "  DIFFERS"
        lines.append(f"  {row['name']:<46}{values}{state}")
    lines += [f"  {note}" for note in table["notes"]]
    return [*lines, f"  {verdict(table)}"]


def verdict(table: dict[str, Any]) -> str:
    """The result of the table of sums in a sentence."""
    if not table["holds"]:
        return "THE SUMS DIFFER: client and servers did not count the same"
    sides = {side for row in table["rows"] for side, value in row["values"].items() if value is not None}
    servers = sorted(sides & {"proxy", "model", "ledger"})
    return f"the sums agree: client, {', '.join(servers)}" if servers else "no server's counters to compare with"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.3f}"


def markdown(result: dict[str, Any]) -> str:
    """The summary as a Markdown document."""
    lines = [f"# {result['name']}", "", f"`{result['target']['model']}` at {result['target']['host']}, "
             f"{result['users']} users, {result['loop']} loop, {result['seconds']:.0f} s", ""]  # fmt: skip
    lines += [f"- **not trusted**: {why}" for why in result["reasons"]]
    for name, figures in result["results"].items():
        lines += [f"## {name}", "", f"{figures['workload']['about']}; SHA-256 `{figures['workload']['sha256']}`", ""]
        if result["trusted"]:
            lines += [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
            lines += [f"| {label} | {' | '.join(cell(numbers, column) for column in COLUMNS)} |"
                      for label, numbers in rows(figures)]  # fmt: skip
            lines += ["", *(f"- {fact}" for fact in facts(figures)), ""]
    lines += ["```", *sums(result["sums"]), "```", ""]
    lines += [f"- `{name}`: {text}" for name, text in result["definitions"].items()]
    return "\n".join(lines) + "\n"


def write(folder: Path, trial: Trial, result: dict[str, Any]) -> None:
    """Write summary.json, summary.md, and records.jsonl with all requests."""
    (folder / "summary.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(markdown(result), encoding="utf-8")
    since, until = trial.steady
    with (folder / "records.jsonl").open("wb") as file:
        for record in sorted(trial.records, key=lambda each: each.started):
            steady = trial.workloads[record.scenario].scheduled or since <= record.intended <= until
            file.write(orjson.dumps(record.line(trial.began, steady=steady)) + b"\n")
