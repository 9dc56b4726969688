"""The start page: services, problems, links to the pages. Knows the status report; does not draw."""

from __future__ import annotations

from .status import Report
from .texts import Texts
from .untrusted import span

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
