"""`load-table`: measures the effect of the cache, for three exponents of Zipf's law, with and without it, repeated.

Writes table.md and table.svg for a document, and table.html with both.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from ..measures.histogram import Times
from ..reports import html
from ..settings import Settings
from . import runs

EXPONENTS = (0.6, 0.9, 1.2)
REPEATS = 3
SECONDS = 60  # of each run by default: 18 runs and their starts take 20 minutes
PROMPTS = 1000  # more than any run requests, at every exponent
HEAD = ("Zipf s", "cache", "requests/s", "tokens/s", "hit ratio", "expected", "TTFT p50 of hits, ms",
        "TTFT p50 of the others, ms", "E2E mean, ms")  # fmt: skip

Results = dict[tuple[float, bool], list[dict[str, Any]]]  # exponent, cache -> figures of each run that can be trusted


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: seconds of each run. Raises ValueError, RunError. Returns the highest exit code of the runs."""
    if len(arguments) > 1 or not all(each.isdecimal() and int(each) for each in arguments):
        raise ValueError(f"table takes the seconds of each run, a whole number, not {' '.join(arguments)}")
    seconds = int(arguments[0]) if arguments else SECONDS
    prompts = settings.prompts if "prompts" in settings.model_fields_set else PROMPTS
    found: Results = {(exponent, cache): [] for exponent in EXPONENTS for cache in (True, False)}
    worst, model, number = 0, "", 0
    for repeat in range(REPEATS):  # in turns, so that a slow drift of the machine affects all of them alike
        for exponent, cache in found:
            number += 1
            done = runs.run("caching", settings, zipf_exponent=exponent, cache=cache, seconds=seconds, prompts=prompts,
                            seed=settings.seed + repeat, requests=max(settings.requests, 200 * seconds))  # fmt: skip
            figures = runs.result(done)
            assert done.summary is not None  # noqa: S101 result() looked
            model = str(done.summary["target"]["model"])
            if done.summary["trusted"]:
                found[exponent, cache].append(figures)
            worst = max(worst, done.code)
            shown = (f"{figures['requests_per_second']:.2f} requests/s" if done.summary["trusted"]
                     else f"not trusted: {'; '.join(done.summary['reasons'])}")  # fmt: skip
            what = f"run {number} of {len(found) * REPEATS}: s = {exponent}, cache {'on' if cache else 'off'}"
            sys.stdout.write(f"{what}: {shown}{f', exit code {done.code}' if done.code else ''}\n")
            sys.stdout.flush()
    text = [
        f"`{model}`, {settings.users} users at once, {prompts} different questions of {settings.prompt_words} words, "
        f"at most {settings.max_tokens} tokens an answer, {seconds} s a run; means of {REPEATS} runs (least–most). "
        "Each run starts with a cold cache.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(row(*key, results)) + " |" for key, results in found.items()),
    ]
    groups = {
        f"s = {exponent}": {f"cache {'on' if cache else 'off'}": statistics.fmean(
            float(each["requests_per_second"]) for each in found[exponent, cache]
        ) for cache in (False, True) if found[exponent, cache]}
        for exponent in EXPONENTS
    }  # fmt: skip
    picture = html.bars("Requests per second by Zipf's exponent s, cache off and on", groups)
    (settings.runs_dir / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    (settings.runs_dir / "table.svg").write_text(picture + "\n", encoding="utf-8")
    body = f"<h1>Effect of the cache</h1><p>{text[0].replace('`', '')}</p>{picture}"
    body += html.table(HEAD, [row(*key, results) for key, results in found.items()])
    (settings.runs_dir / "table.html").write_text(html.document("Effect of the cache", body), encoding="utf-8")
    sys.stdout.write("\n".join(text) + f"\n  {settings.runs_dir}/: table.md, table.svg, table.html\n")
    return worst


def row(exponent: float, cache: bool, results: Sequence[dict[str, Any]]) -> list[str]:
    """One row of the table: means over the runs, rates with their range."""
    start = [f"{exponent:g}", "on" if cache else "off"]
    if not results:
        return [*start, "not trusted", *["–"] * (len(HEAD) - 3)]

    def span(name: str) -> str:
        values = [float(result[name]) for result in results]
        return f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    def ratio(name: str) -> str:
        values = [result["hit_ratio"][name] for result in results if name in result.get("hit_ratio", {})]
        return f"{statistics.fmean(values):.3f}" if values and cache else "–"

    def first(groups: Sequence[str]) -> str:
        """Median TTFT of the requests of some cache states."""
        kept = [result["by_cache"][group]["ttft_seconds"] for result in results for group in groups
                if group in result["by_cache"]]  # fmt: skip
        merged = Times.merge(each["histogram"] for each in kept if each["count"])
        median = merged.percentile("p50")
        return "–" if median is None else f"{1000 * median:.1f}"

    ends = statistics.fmean(result["metrics"]["end_to_end_seconds"].get("mean", 0.0) for result in results)
    return [*start, span("requests_per_second"), span("output_tokens_per_second"), ratio("with_collapsed"),
            ratio("expected"), first(["hit"]), first(["miss", "collapsed", "other"]), f"{1000 * ends:.0f}"]  # fmt: skip
