"""Numbers as text, the same in both languages."""

from __future__ import annotations


def number(value: float, decimals: int = 0) -> str:
    """`1,234` or `1,234.5`."""
    return f"{value:,.{decimals}f}"


def short(value: float) -> str:
    """Without trailing zeros: `5` or `2.5`."""
    return f"{value:g}"


def percent(ratio: float, decimals: int = 0) -> str:
    return f"{ratio:.{decimals}%}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds: two decimals below 1, one below 100, else none (`0.42`, `8.1`, `1,234`)."""
    value = seconds * 1000
    return number(value, 0 if value >= 100 else 1 if value >= 1 else 2)


def size(count: float) -> str:
    """Bytes as `512 B`, `1.5 MiB` or `2.0 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def dollars(value: float) -> str:
    """Two decimals from 1 on, else up to six, or nine below a millionth; never an exponent (`0.00012`, `1,234.00`)."""
    if value == 0:
        return "0"
    if value >= 1:
        return f"{value:,.2f}"
    return f"{value:.6f}".rstrip("0") if value >= 0.000001 else f"{value:.9f}".rstrip("0").rstrip(".")
