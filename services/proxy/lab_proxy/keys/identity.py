"""The caller with its limits, and the cap of an upstream for all callers together. Data only."""

import fnmatch
from dataclasses import dataclass


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

    @property
    def limited(self) -> bool:
        """The key has a limit that redis counts."""
        return (self.rpm, self.tpm, self.concurrency, self.budget_day, self.budget_total) != _UNLIMITED

    def allows(self, *names: str) -> bool:
        """The key may use one of these names of a model (id or alias)."""
        models = self.models
        return models is None or any(fnmatch.fnmatchcase(name, model) for model in models for name in names)


@dataclass(frozen=True, slots=True)
class CapShare(Identity):
    """The cap of an upstream, as the limits of one identity, and the key that calls: `owner`."""

    upstream: str = ""


_UNLIMITED = (None,) * 5

LOCAL = Identity(tenant="local", owner="local")
"""Every caller, where no key is required."""
