"""Deploys and ends the models' Serve applications, and reads their state.

Knows Ray Serve. Knows nothing of memory or of when a model is needed.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, NamedTuple

from ray import serve
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from ..models.catalogue import AppArgs
from .ray_internals import begin_delete
from .replica import build_app

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
INFO_SECONDS = 2  # timeout of a replica's answer about itself


class Application(NamedTuple):
    """status: as in Serve: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING. reason: why it does not run."""

    status: str
    reason: str = ""


class Applications:
    """One application for each model in memory, named like the model."""

    async def list(self) -> dict[str, Application]:
        """All applications by name. Raises Ray's exceptions."""
        found = (await asyncio.to_thread(serve.status)).applications
        return {name: Application(str(each.status.value), reason(each)) for name, each in found.items()}

    async def deploy(self, args: AppArgs) -> None:
        """Begin to load a model."""
        target = serve.RunTarget(build_app(args), args.entry.id, f"/m/{args.entry.id}", QUIET)
        await asyncio.to_thread(
            serve.run_many,
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    async def delete(self, name: str) -> None:
        """Begin to end a model's application; running answers finish first."""
        await asyncio.to_thread(begin_delete, name)

    async def info(self, name: str) -> dict[str, Any]:
        """A replica's own report. Raises TimeoutError for a busy one, and what Ray raises for a dead one."""
        handle = await asyncio.to_thread(serve.get_app_handle, name)  # blocks: it calls Serve's controller
        found: dict[str, Any] = await asyncio.wait_for(handle.info.remote(), INFO_SECONDS)
        return found


def reason(status: ApplicationStatusOverview) -> str:
    """Reason why an application does not run, in one line: its deployment's exception without the trace."""
    lines = [line for deployment in status.deployments.values() for line in deployment.message.splitlines()]
    raised = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", line)]
    return (raised or [status.message.strip()])[-1].rpartition("CatalogueError: ")[2][:500]
