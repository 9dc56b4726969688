"""Which models are in memory: loads them at the start, on demand or when asked, within a memory budget, and unloads
those that are idle or were used longest ago. Each model's state, and why it failed.

A model in memory is an application; loading deploys it, unloading deletes it. Knows the catalogue, sizes and states of
applications. Knows nothing of Ray, HTTP or of how a model is loaded. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from ..errors import CatalogueError, UnavailableError
from ..models.catalogue import ADDED, AppArgs, load_catalogue
from ..models.kinds import Kind
from ..models.sizes import size_of
from ..models.sources import resolve_source
from .activity import read_activity
from .budget import Budget, measured, memory_budget
from .copies import write_free
from .downloads import Downloads
from .states import DOWNLOADS, Model, progress_file

log = logging.getLogger(__name__)

BUSY_SECONDS, IDLE_SECONDS = 0.3, 5.0  # between checks of Serve: while something changes; otherwise
FRESH_SECONDS = 1.0  # largest age of a reported state
# A busy model may leave a request for its info unanswered for this time before it counts as not answering.
SILENT_SECONDS = 10.0


class LifecycleArgs(BaseModel):
    """catalogue_file, folder: MODEL_CATALOGUE_FILE and MODEL_FOLDER. shared: fields of every model's AppArgs. gpus:
    number of GPUs of Ray. memory_bytes: for the whole service, 0: all that is free. service: id of the main process.
    wake: a pipe that notifies it of changes. offline: downloads are forbidden."""

    catalogue_file: Path | None = None
    folder: Path | None = None
    shared: dict[str, Any]
    gpus: float = 0
    memory_bytes: int = 0
    start_timeout_seconds: float = 600
    service: int
    wake: Path
    offline: bool = False


class Status(Protocol):
    """State of one application, implemented by `applications.Application`."""

    @property
    def status(self) -> str: ...

    @property
    def reason(self) -> str: ...


class Deployer(Protocol):
    """Deploys and ends applications, implemented by `applications.Applications`."""

    async def list(self) -> Mapping[str, Status]: ...

    async def deploy(self, args: AppArgs) -> None: ...

    async def delete(self, name: str) -> None: ...

    async def info(self, name: str) -> dict[str, Any]: ...


class Lifecycle:
    """Its methods run on one event loop. on_change: called with the kinds of all models when the catalogue was read."""

    def __init__(
        self, args: LifecycleArgs, applications: Deployer, on_change: Callable[[dict[str, Kind]], None]
    ) -> None:
        self._args, self._applications, self._on_change = args, applications, on_change
        self.models: dict[str, Model] = {}
        self._folder = Path(args.shared["metrics_dir"])
        self._woken = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stamp: tuple[int, int] | None = None
        self._adopted = False
        self._looking, self._looked = asyncio.Lock(), 0.0
        self.trouble = ""  # why the list of added models cannot be read
        settings = {"MODEL_FOLDER": args.folder, "MODEL_CATALOGUE_FILE": args.catalogue_file}
        self.downloads = Downloads(self._folder, offline=args.offline, settings=settings)
        self._read_catalogue()
        for model in self.models.values():
            model.wanted = model.entry.load == "start"
        self._budget = Budget(
            self.models,
            self._folder,
            total=memory_budget(args.memory_bytes, args.service),
            kv_tokens=int(args.shared.get("kv_tokens", 16384)),
            gpus=args.gpus,
            device=args.shared.get("device"),
        )
        self._free_written: int | None = None
        self._spawn(self._run())

    # ---- called from outside

    async def ensure_ready(self, id_: str, deadline: float) -> None:
        """Load the model if it is not in memory, and wait for it until `deadline`, as `time.monotonic()`.

        Raises UnavailableError with its state and progress.
        """
        model = self.models[id_]
        if model.state == "ready":
            return
        if model.state == "unloaded":
            self.load(id_)
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._changed.wait_for(lambda: model.state in ("ready", "failed", "absent"))
        self.check_ready(id_)

    def check_ready(self, id_: str) -> None:
        """Raises UnavailableError unless the model is in memory."""
        model = self.models[id_]
        if model.state == "ready":
            return
        error = UnavailableError(f"{id_} is {model.describe()}; GET /ready shows when it answers.", param="model")
        if model.state == "loading":
            error.headers["retry-after"] = str(model.seconds_left)
        raise error

    def load(self, id_: str) -> None:
        """Load a model as soon as there is memory, if necessary by unloading others."""
        model = self.models[id_]
        if model.state != "ready":
            model.wanted = model.asked = True
            if model.state != "loading":
                model.enter("loading", "waits for its turn")
            self._wake()

    async def unload(self, id_: str) -> None:
        """Unload a model; running answers finish first."""
        model = self.models[id_]
        model.wanted = model.asked = False
        model.settled = True
        if model.deployed:
            await self._delete(model)
        if model.state != "failed":
            model.enter("unloaded")
        self._wake()

    def add(self, name: str) -> None:
        """Fetch a model and add it to the catalogue; `downloads` reports the progress.

        Raises UnavailableError if another model is being added, or if MODEL_FOLDER is not set.
        """
        if self._args.folder is None:
            raise UnavailableError("No model can be added: MODEL_FOLDER, the folder for added models, is not set.")
        if busy := self.downloads.busy:
            raise UnavailableError(f"{busy} is being added: add {name} when that is done.")
        self.downloads.begin(name)
        self._spawn(self._add(name))

    def report(self) -> dict[str, dict[str, Any]]:
        """The card of each model."""
        return {id_: model.card(self._budget.predicted(model)) for id_, model in self.models.items()}

    @property
    def starting(self) -> bool:
        """Whether a model that is loaded at the start is still loading."""
        return any(model.wanted and not model.asked and not model.settled for model in self.models.values())

    # ---- the loop

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                log.exception("the models' states cannot be read")
            changing = any(model.wanted or model.deployed != (model.state == "ready") for model in self.models.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BUSY_SECONDS if changing else IDLE_SECONDS):
                    await self._woken.wait()
            self._woken.clear()

    async def refresh(self) -> None:
        """Check now, unless the last check was less than FRESH_SECONDS ago."""
        if time.monotonic() - self._looked > FRESH_SECONDS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._spawn(self._look())), FRESH_SECONDS)

    async def _look(self) -> None:
        async with self._looking:
            await self._look_alone()
            self._looked = time.monotonic()

    async def _look_alone(self) -> None:
        """One round: the catalogue, Serve's states, new loads, idle models."""
        before = [(id_, model.state, model.detail) for id_, model in self.models.items()]
        if self._stamp != self._catalogue_stamp():
            self._read_catalogue()
        if not self._adopted:
            await self._adopt()
        if any(model.deployed for model in self.models.values()):
            applications = await self._applications.list()
            for id_, model in list(self.models.items()):
                if model.deployed:
                    await self._follow(model, applications.get(id_))
        for model in [each for each in self.models.values() if each.wanted and not each.deployed]:
            try:
                await self._begin(model)
            except Exception as error:  # the fault of one model does not stop others
                log.exception("%s cannot be deployed", model.entry.id)
                model.deployed, model.granted = False, 0
                model.enter("failed", f"it cannot be deployed: {type(error).__name__}")
        await self._unload_idle()
        if (free := self._budget.free) != self._free_written:
            write_free(self._folder, free)
            self._free_written = free
        if before != [(id_, model.state, model.detail) for id_, model in self.models.items()]:
            self._tell_service()
        async with self._changed:
            self._changed.notify_all()

    async def _adopt(self) -> None:
        """Take over the models of an earlier process of this application."""
        applications = await self._applications.list()
        for id_, model in self.models.items():
            if id_ in applications and applications[id_].status in ("RUNNING", "DEPLOYING", "UNHEALTHY"):
                model.deployed = True
                model.enter("loading")
        self._adopted = True

    async def _follow(self, model: Model, status: Status | None) -> None:
        """Bring the model's state up to date with its application."""
        if status is None or status.status == "NOT_STARTED":
            model.deployed = model.draining = False
            model.granted = 0
            if model.state == "ready" or (model.state == "loading" and not model.wanted):
                model.enter("unloaded")
            return
        if model.draining or status.status == "DELETING":
            if status.status != "DELETING":
                await self._delete(model)  # the first call failed, or came before the deployment
            return
        if model.state == "loading":
            if status.status in ("RUNNING", "UNHEALTHY"):  # unhealthy may be the second copy alone
                await self._became_ready(model)
            elif status.status == "DEPLOY_FAILED":
                await self._delete(model)
                model.enter("failed", status.reason)
            if model.state == "loading" and model.age > self._args.start_timeout_seconds:
                limit = f"{self._args.start_timeout_seconds:.0f} s (MODEL_START_TIMEOUT_SECONDS)"
                await self._delete(model)
                model.enter("failed", f"not loaded within {limit}")
        elif model.state == "ready":
            # Its replica has died and Serve starts another one, or its second copy cannot run.
            if status.status != "RUNNING" and not await self._ask_info(model):
                model.enter("loading", status.reason or "its process has ended and is restarted")
            elif time.monotonic() - model.answered_at > IDLE_SECONDS:
                await self._ask_info(model)

    async def _became_ready(self, model: Model) -> None:
        if await self._ask_info(model):
            model.real = await asyncio.to_thread(measured, self._folder, model.entry.id)
            model.seconds = model.age
            model.enter("ready")

    async def _ask_info(self, model: Model) -> bool:
        """Ask the replica for its report. It may be busy, so it counts as not answering only after several timeouts."""
        try:
            model.info = await self._applications.info(model.entry.id)
            model.answered_at = time.monotonic()
        except Exception as error:
            if model.state == "ready" and time.monotonic() - model.answered_at > SILENT_SECONDS:
                model.enter("loading", f"not answering: {type(error).__name__}")
            return False
        return True

    async def _begin(self, model: Model) -> None:
        """Deploy a model if its files are on this machine and its memory is free."""
        entry, args = model.entry, self._args
        if model.state != "loading":
            model.enter("loading")
        # 1. The files.
        try:
            source = await asyncio.to_thread(resolve_source, entry, args.folder)
            model.size = await asyncio.to_thread(size_of, entry, source)
        except CatalogueError as error:
            if entry.id in self.downloads.running:
                model.wanted = False
                return model.enter("loading", DOWNLOADS)
            if entry.source.startswith("hub:") and not args.offline and model.detail != DOWNLOADS:
                model.enter("loading", DOWNLOADS)
                model.wanted = False
                self._spawn(self._fetch(model))
                return None
            why = str(error).removeprefix(f"{entry.id}: ")
            return model.enter("failed" if "damaged" in why or "cut short" in why else "absent", why)
        # 2. The memory.
        room = await self._budget.room_for(model, model.size)
        if room.unload is not None:
            log.info("%s is unloaded because %s needs its memory", room.unload.entry.id, entry.id)
            await self.unload(room.unload.entry.id)
        if room.state is not None:
            if room.state == "unloaded":
                model.wanted, model.settled = False, True
            model.enter(room.state, room.detail)
        if room.granted is None or not model.wanted:  # not now, or unloaded meanwhile
            return None
        # 3. The application.
        model.granted, model.detail, model.deployed = room.granted, "", True
        model.since = time.monotonic()
        model.progress.unlink(missing_ok=True)
        arguments = AppArgs(
            entry=entry,
            gpus=self._budget.gpu_share(entry),
            kv_tokens=self._budget.kv_tokens(model, model.size),
            progress_file=model.progress,
            folder=args.folder,
            copy_bytes=model.size.copy,
            **{name: value for name, value in args.shared.items() if name != "kv_tokens"},
        )
        await self._applications.deploy(arguments)
        return None

    async def _unload_idle(self) -> None:
        for id_, model in list(self.models.items()):
            minutes = model.entry.idle_minutes
            if minutes and model.state == "ready":
                activity = await asyncio.to_thread(read_activity, self._folder, id_)
                last = max(activity.last, time.time() - model.age)
                if not activity.running and time.time() - last > minutes * 60:
                    log.info("%s is unloaded because it was idle for %g minutes", id_, minutes)
                    await self.unload(id_)

    async def _delete(self, model: Model) -> None:
        """Begin to end a model's application; `_follow` detects the end."""
        model.draining = True
        with contextlib.suppress(Exception):  # Serve has no application of this name
            await self._applications.delete(model.entry.id)

    # ---- files

    async def _fetch(self, model: Model) -> None:
        """Fetch the model's files, in order to load it."""
        why = await self.downloads.fetch(model.entry.id)
        if why:
            model.enter("absent", why.removeprefix(f"{model.entry.id}: "))
        elif model.state == "loading":  # nobody unloaded it meanwhile
            model.wanted = True
        self._wake()

    async def _add(self, name: str) -> None:
        await self.downloads.add(name)
        self._wake()

    def _catalogue_stamp(self) -> tuple[int, int]:
        try:
            stat = (self._args.folder / ADDED).stat() if self._args.folder else None
        except OSError:
            stat = None
        return (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)

    def _read_catalogue(self) -> None:
        """Read the catalogue again. New entries appear as unloaded; removed ones disappear when they are not in
        memory."""
        self._stamp, self.trouble = self._catalogue_stamp(), ""
        try:
            entries = {entry.id: entry for entry in load_catalogue(self._args.catalogue_file, self._args.folder)}
        except CatalogueError as error:
            self.trouble = str(error)
            log.warning("the added models are not read: %s", error)
            if self.models:
                return
            entries = {entry.id: entry for entry in load_catalogue(self._args.catalogue_file)}
        for id_, entry in entries.items():
            model = self.models.setdefault(id_, Model(entry, progress_file(self._folder, id_)))
            if not model.deployed:
                model.entry = entry
                if model.state in ("absent", "failed"):
                    model.enter("unloaded")
        for id_ in [id_ for id_, model in self.models.items() if id_ not in entries and not model.deployed]:
            del self.models[id_]
        self._on_change({id_: model.entry.kind for id_, model in self.models.items()})

    # ---- inside

    def _wake(self) -> None:
        self._woken.set()

    def _tell_service(self) -> None:
        with contextlib.suppress(OSError):
            pipe = os.open(self._args.wake, os.O_WRONLY | os.O_NONBLOCK)
            with os.fdopen(pipe, "wb", buffering=0) as out:
                out.write(b".")

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # a task that nothing refers to may be collected
        task.add_done_callback(self._tasks.discard)
        return task
