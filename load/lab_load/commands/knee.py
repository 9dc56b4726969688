"""`load-knee`: runs an open loop at rising rates until the service no longer keeps up.

The search stops if goodput falls below the best so far, if TTFT rises within a run (the slope of its regression over
the start times is significant and large enough to matter), or if the generator itself can no longer be trusted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..reports import html
from ..settings import Settings
from . import runs

FACTOR = 1.5  # each rate, divided by the one before
MOST = 8  # rates to try
SECONDS = 15  # of each rate, unless LOAD_SECONDS is shorter
FALL = 0.9  # goodput below this share of the best one has fallen
SIGNIFICANT = 3.0  # t statistic of a significant slope
MATTERS = 0.5  # growth of TTFT over a run that matters, as a share of its mean


@dataclass(frozen=True)
class Step:
    """One rate. Rates and goodput in requests/s, TTFT in seconds."""

    rate: float
    goodput: float
    ttft: float
    rising: bool
    trusted: bool
    failed: int


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of y over x: the slope and its t statistic; (0, 0) for fewer than 10 points."""
    n = len(points)
    if n < 10:
        return 0.0, 0.0
    mean_x, mean_y = math.fsum(x for x, _ in points) / n, math.fsum(y for _, y in points) / n
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return 0.0, 0.0
    rise = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = math.fsum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in points)
    error = math.sqrt(rest / (n - 2) / spread)
    return rise, rise / error if error else math.copysign(math.inf, rise) if rise else 0.0


def rises(points: Sequence[tuple[float, float]]) -> bool:
    """Whether TTFT grows over a run, significantly and by at least MATTERS of its mean. points: (start, TTFT) in
    seconds."""
    rise, t = slope(points)
    if t < SIGNIFICANT:
        return False
    length = max(x for x, _ in points) - min(x for x, _ in points)
    return rise * length > MATTERS * math.fsum(y for _, y in points) / len(points)


def stop_reason(steps: Sequence[Step]) -> str:
    """Reason why the search ends after these steps; empty if it continues."""
    last, best = steps[-1], max(step.goodput for step in steps)
    if not last.trusted:
        return "the generator is at its limit"
    if last.goodput < FALL * best:
        return f"goodput fell to {last.goodput:.2f}/s from {best:.2f}/s"
    if last.rising:
        return "TTFT rises within the run: the queue grows"
    return "" if len(steps) < MOST else f"no knee within {MOST} rates"


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: the workload, default `throughput`. LOAD_RATE is the first rate, default 1/s."""
    workload, rate = (arguments or ["throughput"])[0], settings.rate or 1.0
    seconds = min(settings.seconds, SECONDS)
    steps: list[Step] = []
    while True:
        done = runs.run(workload, settings, rate=rate, seconds=seconds, requests=math.ceil(2 * rate * seconds) + 20)
        figures = runs.result(done)
        assert done.summary is not None  # noqa: S101 result() looked
        assert done.folder is not None  # noqa: S101
        records = [json.loads(line) for line in (done.folder / "records.jsonl").read_text("utf-8").splitlines()]
        points = [
            (each["intended"], each["ttft"]) for each in records if each["ttft"] is not None and not each["error"]
        ]
        mean = figures["metrics"]["ttft_seconds"].get("mean", math.nan)
        steps.append(
            Step(rate, figures["goodput_per_second"], mean, rises(points), done.summary["trusted"], figures["failed"])
        )
        sys.stdout.write(
            f"{rate:8.2f} requests/s: goodput {steps[-1].goodput:8.2f}/s, mean TTFT {mean:8.4f} s, "
            f"{figures['failed']} failed\n"
        )
        sys.stdout.flush()
        if why := stop_reason(steps):
            break
        rate *= FACTOR
    good = [step for step in steps if step.trusted and not step.rising and step.goodput >= FALL * step.rate]
    knee = f"{good[-1].rate:.2f} requests/s" if good else f"below {steps[0].rate:.2f} requests/s"
    sys.stdout.write(f"knee: {knee}; ended: {why}\n")
    _write(settings.runs_dir / "knee.html", steps, f"Knee: {knee}. Ended: {why}.")
    return 0 if steps[0].trusted else 5


def _write(path: Path, steps: Sequence[Step], text: str) -> None:
    lines = {
        "goodput": [(step.rate, step.goodput) for step in steps],
        "offered": [(step.rate, step.rate) for step in steps],
    }
    times = {"mean TTFT": [(step.rate, step.ttft) for step in steps]}
    rows = [[f"{step.rate:.2f}", f"{step.goodput:.2f}", f"{step.ttft:.4f}"] for step in steps]
    body = (
        f"<h1>Knee</h1><p>{text}</p>"
        + html.chart("Goodput over the offered rate", "/s", lines, x_unit="/s")
        + html.chart("TTFT over the offered rate", "s", times, x_unit="/s")
        + html.table(["rate, /s", "goodput, /s", "mean TTFT, s"], rows)
    )
    path.write_text(html.document("Knee", body), encoding="utf-8")
    sys.stdout.write(f"  {path}\n")
