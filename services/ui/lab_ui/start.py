"""The start page: services, problems, links to the pages. Knows the status report; does not draw."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

from .status import Report
from .texts import Texts
from .untrusted import plain, span

MAX_FINDINGS, MAX_WORDS = 20, 500  # shown of the doctor's; characters of each
STEPS = ("chat", "next_token", "cache")  # pages, in the order of the first lesson


def services(report: Report, texts: Texts) -> list[tuple[str, str, str, str]]:
    """(name, state, the state's text, the service's purpose), in the order in which a request meets them."""
    return [
        (each.name, each.state, texts(f"status.{each.state}"), texts(f"status.{each.name}")) for each in report.services
    ]


def findings(report: Report, texts: Texts) -> list[str]:
    """Problems and what to do, in Markdown, the most important first."""
    found = [
        f"**{each.name}**: {' '.join(each.advice(texts))}"
        for each in report.services
        if each.state in {"down", "loading"}
    ]
    found += [
        f"**{model.name}**: {texts(f'status.{model.state}')} {span(model.detail) if model.detail else ''}".rstrip()
        for model in report.models
        if model.state == "down"
    ]
    if report.cache == {}:
        found.append(texts("status.cache_off"))
    return found


def doctors_findings(path: Path | None, texts: Texts) -> tuple[list[str], str]:
    """The doctor's findings in Markdown, and the line below them: when it looked, or where to run it."""
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8")) if path else None
        at = dt.datetime.fromtimestamp(float(read["at"])).astimezone()
        listed = [
            [plain(each[name][:MAX_WORDS]) for name in ("what", "why", "remedy")]
            for each in read["findings"][:MAX_FINDINGS]
        ]
        found = [f"**{what}**: {why}; {remedy}." for what, why, remedy in listed]
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # none yet, or of another version
        return [], texts("start.doctor.run")
    return found, texts("start.doctor.looked" if found else "start.doctor.nothing", time=f"{at:%H:%M}")
