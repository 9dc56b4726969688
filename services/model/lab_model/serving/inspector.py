"""The deployment of a model's second copy, for hidden states and attention: low priority, in memory while it is used.

Serve starts its replica at the first call, and ends it after the entry's idle_minutes, or IDLE_MINUTES, without a call.
Knows Ray Serve. Knows nothing of what the copy computes.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from ..models.catalogue import AppArgs
from .ray_internals import replica_environment

IDLE_MINUTES = 5.0
NICENESS = 10  # lower priority than the model that answers
MOST_WAITING = 8


def bind_inspector(args: AppArgs) -> Any:
    """For an application to bind: becomes a handle to this deployment."""
    return Inspector.options(  # type: ignore[attr-defined]
        name=f"{args.entry.id}-inside",
        max_ongoing_requests=1,
        max_queued_requests=MOST_WAITING,
        max_constructor_retry_count=1,
        autoscaling_config={
            "min_replicas": 0,
            "initial_replicas": 0,
            "max_replicas": 1,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 0,
            "downscale_delay_s": 60 * (args.entry.idle_minutes or IDLE_MINUTES),
        },
        ray_actor_options={"num_cpus": args.cpus, "runtime_env": replica_environment(args.metrics_dir)},
    ).bind(args)


@serve.deployment
class Inspector:
    """The deployment's only replica."""

    def __init__(self, args: AppArgs) -> None:
        from ..models.inside import Inside  # noqa: PLC0415 - processes that only route import this module
        from .copies import announce  # noqa: PLC0415

        os.nice(NICENESS)
        if args.metrics_dir:
            announce(args.metrics_dir, args.entry.id)
        self._inside = Inside(args)

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call the method of `Inside` with this name."""
        return getattr(self._inside, method)(**arguments)
