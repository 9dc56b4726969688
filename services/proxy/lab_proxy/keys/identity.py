"""Who calls, and with which limits. Data only."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller and its limits. Budgets are in pico-dollars; None: no limit."""

    tenant: str
    owner: str
    key_id: str | None = None
    models: tuple[str, ...] | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budget_day: int | None = None
    budget_total: int | None = None
    expires: float | None = None
    shared: bool = False  # the tenant is a namespace of several owners: only the admin may flush it

    limited: bool = field(init=False)  # the key has a limit that redis counts; stored, because every request reads it

    def __post_init__(self) -> None:
        limits = (self.rpm, self.tpm, self.concurrency, self.budget_day, self.budget_total)
        object.__setattr__(self, "limited", any(limit is not None for limit in limits))

    def allows(self, *names: str) -> bool:
        """The key may use one of these names of a model (id or alias)."""
        models = self.models
        return models is None or any(fnmatch.fnmatchcase(name, model) for model in models for name in names)


LOCAL = Identity(tenant="local", owner="local")
"""Every caller, where no key is required."""
