"""Texts of a fault: what went wrong and what to do. Knows the kinds of faults; does not draw."""

from __future__ import annotations

from .answer import Fault
from .texts import Texts


def texts_of(fault: Fault, texts: Texts) -> tuple[str, str]:
    """What went wrong, and what to do."""
    wait = fault.retry_after if fault.retry_after and fault.retry_after.isdigit() else "5"
    kind = fault.kind
    if kind == "model_down" and fault.retry_after and "load" in fault.message.lower():
        kind = "model_loading"
    return texts(f"faults.{kind}.what"), texts(f"faults.{kind}.do", seconds=wait)
