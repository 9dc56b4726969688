"""Money as integer pico-dollars (10^-12 USD): a price per million tokens is an integer number of them per token.

Integers add up exactly, in Python and in redis (64 bits hold 9.2 million USD).
"""

from decimal import Decimal

PICO = 10**12
DECIMALS = 6  # of a price in USD per million tokens, and of a budget in USD


def from_usd(usd: Decimal) -> int:
    """Pico-dollars. Raises ValueError for a negative or infinite amount, or more than 6 decimals."""
    if not usd.is_finite() or usd < 0 or usd != round(usd, DECIMALS):
        raise ValueError(f"{usd} is no amount in USD with at most {DECIMALS} decimals")
    return int(usd * PICO)


def to_usd(pico: int) -> Decimal:
    """USD, exact, without trailing zeros."""
    usd = (Decimal(pico) / PICO).normalize()
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd


def shown(pico: int) -> str:
    """USD in plain digits: `0.000135`."""
    return f"{to_usd(pico):f}"
