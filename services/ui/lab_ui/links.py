"""An experiment as a URL: the parameters of a page, read once from the query and written back after each run.

Knows names, defaults and ranges. Knows no widget: pages hand in Streamlit's query parameters and session state. A value
that cannot be read counts as the default, so a broken link opens the page with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TEXT = 2000  # characters of a text in a link, because browsers and logs cut longer URLs


@dataclass(frozen=True)
class Text:
    """Any text of at most `limit` characters; a longer text is left out of the link."""

    default: str = ""
    limit: int = MAX_TEXT

    def read(self, code: str) -> str:
        return code if len(code) <= self.limit else self.default

    def write(self, value: Any) -> str | None:
        text = str(value)
        return text if len(text) <= self.limit else None


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; an int if `default` is an int."""

    default: float
    low: float
    high: float

    def read(self, code: str) -> float:
        try:
            value = type(self.default)(code)
        except ValueError:
            return self.default
        return value if self.low <= value <= self.high else self.default

    def write(self, value: Any) -> str | None:
        return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Choice:
    """One of `codes`; the first is the default."""

    codes: Sequence[str] = field(default=())

    @property
    def default(self) -> str:
        return self.codes[0]

    def read(self, code: str) -> str:
        return code if code in self.codes else self.default

    def write(self, value: Any) -> str | None:
        return str(value)


Parameter = Text | Number | Choice


class Link:
    """The parameters of one page. The widget of a parameter has the key `PAGE.NAME`."""

    def __init__(self, page: str, parameters: Mapping[str, Parameter]) -> None:
        self._page, self._parameters = page, parameters

    def key(self, name: str) -> str:
        return f"{self._page}.{name}"

    def read(self, query: Mapping[str, str], state: MutableMapping[Any, Any]) -> None:
        """Put the value of each parameter into the session state, unless the state already has one."""
        for name, parameter in self._parameters.items():
            if self.key(name) not in state:
                state[self.key(name)] = parameter.read(query[name]) if name in query else parameter.default

    def write(self, query: MutableMapping[str, str], state: Mapping[Any, Any]) -> None:
        """Put each value that differs from its default into the URL, and remove the others."""
        for name, parameter in self._parameters.items():
            value = state.get(self.key(name), parameter.default)
            code = None if value is None or value == parameter.default else parameter.write(value)
            if code is None:
                if name in query:
                    del query[name]
            elif query.get(name) != code:
                query[name] = code
