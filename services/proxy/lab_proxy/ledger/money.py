"""Money as integer pico-dollars (10^-12 USD): a price per million tokens is an integer number of them per token.

Integers add up exactly, in Python and in redis (64 bits hold 9.2 million USD).
"""

import re
from decimal import Decimal, InvalidOperation

PICO = 10**12
MAX_USD = 1_000_000  # of a price or a budget
DECIMALS = 6  # of a price in USD per million tokens, and of a budget in USD


def parse_usd(value: object) -> Decimal:
    """A number, or the digits of one, as an amount. Raises ValueError like `from_usd`, and for anything else."""
    try:
        text = "" if isinstance(value, bool) else str(value).strip()
        usd = Decimal(text if re.fullmatch(r"[0-9.e+-]{1,40}", text) else "")
    except InvalidOperation:
        raise ValueError("must be an amount in USD, in digits") from None
    from_usd(usd)
    return usd


def from_usd(usd: Decimal) -> int:
    """Pico-dollars. Raises ValueError for a negative amount, one above MAX_USD, or more than 6 decimals."""
    if not usd.is_finite() or not 0 <= usd <= MAX_USD or usd != round(usd, DECIMALS):
        raise ValueError(f"{usd} is not an amount in USD from 0 to {MAX_USD} with at most {DECIMALS} decimals")
    return int(usd * PICO)


def to_usd(pico: int) -> Decimal:
    """USD, exact, without trailing zeros."""
    usd = (Decimal(pico) / PICO).normalize()
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd


def shown(pico: int) -> str:
    """USD in plain digits: `0.000135`."""
    return f"{to_usd(pico):f}"
