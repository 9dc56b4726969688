"""Numbers as the texts show them. The same in both languages."""

from __future__ import annotations


def number(value: float, decimals: int = 0) -> str:
    """`1,234` or `1,234.5`."""
    return f"{value:,.{decimals}f}"


def short(value: float) -> str:
    """Without trailing zeros: `5` or `2.5`."""
    return f"{value:g}"


def percent(ratio: float) -> str:
    return f"{ratio:.0%}"
