"""Which models are in memory: loads them at the start, on demand or when asked, within a memory budget, and unloads
those that are idle or were used longest ago. Each model's state, and why it failed.

A model in memory is an application; loading deploys it, unloading deletes it. Knows the catalogue, sizes and states of
applications. Knows nothing of Ray, HTTP or of how a model is loaded. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
from pydantic import BaseModel

from ..errors import CatalogueError, UnavailableError
from ..host import memory_left
from ..models.catalogue import ADDED, AppArgs, Entry, load_catalogue
from ..models.kinds import KINDS, Kind
from ..models.progress import Step, read_progress
from ..models.sizes import LEAST_KV_TOKENS, PROCESS_BYTES, Size, size_of
from ..models.sources import resolve_source
from .activity import processes, read_activity
from .copies import is_running, write_free

log = logging.getLogger(__name__)

State = Literal["absent", "loading", "ready", "failed", "unloaded"]
BUSY_SECONDS, IDLE_SECONDS = 0.3, 5.0  # between looks at Serve, while something changes and otherwise
# Share of the memory that is free at the start which all models together may take, unless MODEL_MEMORY_BYTES is set.
FREE_SHARE = 0.9
FRESH_SECONDS = 1.0  # a reported state is at most this old
# A busy model may leave a question for its info unanswered for so long before it counts as not answering.
SILENT_SECONDS = 10.0


class LifecycleArgs(BaseModel):
    """catalogue_file, folder: MODEL_CATALOGUE_FILE and MODEL_FOLDER. shared: fields of every model's AppArgs. gpus: of
    this Ray. memory_bytes: of the whole service, 0: what is free. service: the main process. wake: a pipe that tells
    it of changes. offline: the user has forbidden downloads."""

    catalogue_file: Path | None = None
    folder: Path | None = None
    shared: dict[str, Any]
    gpus: float = 0
    memory_bytes: int = 0
    start_timeout_seconds: float = 600
    service: int
    wake: Path
    offline: bool = False


@dataclass
class Model:
    """One model of the catalogue. since: when its state began, as `time.monotonic()`. deployed: Serve has its
    application, which takes memory until Serve has ended it; draining: that has begun. asked: a caller waits for it, so
    others may be unloaded.
    settled: its first load has ended. info, real bytes of memory, seconds: of its last load."""

    entry: Entry
    state: State = "unloaded"
    detail: str = ""
    since: float = field(default_factory=time.monotonic)
    size: Size | None = None
    wanted: bool = False
    asked: bool = False
    deployed: bool = False
    draining: bool = False
    settled: bool = False
    granted: int = 0  # bytes of memory
    info: dict[str, Any] = field(default_factory=dict)
    answered_at: float = 0.0
    real: int | None = None
    seconds: float = 0.0

    def enter(self, state: State, detail: str = "") -> None:
        if state != self.state:
            self.since = time.monotonic()
        self.state, self.detail = state, detail
        if state in ("ready", "failed", "absent"):
            self.settled = True
            self.wanted = self.asked = False


class Status(Protocol):
    """Of one application: `applications.Application`."""

    @property
    def status(self) -> str: ...

    @property
    def reason(self) -> str: ...


class Deployer(Protocol):
    """What deploys and ends applications: `applications.Applications`."""

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
        self._downloads: set[str] = set()  # models whose files are being fetched in order to be loaded
        self._looking, self._looked = asyncio.Lock(), 0.0
        self.trouble = ""  # of the list of added models
        self.fetching: dict[str, Any] | None = None  # the model that is being added
        self._read_catalogue()
        for model in self.models.values():
            model.wanted = model.entry.load == "start"
        self._budget = self._memory_budget()
        self._free_written: int | None = None
        self._spawn(self._run())

    # ---- asked from outside

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
        error = UnavailableError(f"{id_} is {self.describe(model)}; GET /ready tells when it answers.", param="model")
        if model.state == "loading":
            error.headers["retry-after"] = str(self._seconds_left(model))
        raise error

    def load(self, id_: str) -> None:
        """Load it as soon as there is memory, by unloading others if need be."""
        model = self.models[id_]
        if model.state != "ready":
            model.wanted = model.asked = True
            if model.state != "loading":
                model.enter("loading", "waits for its turn")
            self._wake()

    async def unload(self, id_: str) -> None:
        """Running answers may end first."""
        model = self.models[id_]
        model.wanted = model.asked = False
        model.settled = True
        if model.deployed:
            await self._delete(model)
        if model.state != "failed":
            model.enter("unloaded")
        self._wake()

    def add(self, name: str) -> None:
        """Fetch a model and add it to the catalogue, in a process of its own; `fetching` tells how far it is.
        Raises UnavailableError where another one is being added, or nothing can be added."""
        if self._args.folder is None:
            raise UnavailableError("No model can be added: MODEL_FOLDER, where it would lie, is not set.")
        if self.fetching is not None and self.fetching["state"] == "loading":
            raise UnavailableError(f"{self.fetching['name']} is being added: add {name} after it.")
        self.fetching = {"name": name, "state": "loading", "since": time.monotonic()}
        self._spawn(self._fetch(["add", name]))

    def report(self) -> dict[str, dict[str, Any]]:
        """Each model's state: id, kind, state, detail, what is loaded and how far, and of its last load the info."""
        return {id_: self._card(model) for id_, model in self.models.items()}

    @property
    def starting(self) -> bool:
        """Whether a model that is loaded at the start has not been yet."""
        return any(model.wanted and not model.asked and not model.settled for model in self.models.values())

    def describe(self, model: Model) -> str:
        """Its state in words."""
        step = self._step_of(model)
        percent = f" {step.percent} %" if step and step.percent is not None else ""
        words = f"{model.state}: {step.what}{percent}, {self._age(model):.0f} s" if step else str(model.state)
        return f"{words} ({model.detail})" if model.detail else words

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
        """Look now, unless the last look was a second ago."""
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
            except Exception as error:  # one model's fault stops no other
                log.exception("%s cannot be deployed", model.entry.id)
                model.deployed, model.granted = False, 0
                model.enter("failed", f"it cannot be deployed: {type(error).__name__}")
        await self._unload_idle()
        if (free := self._free()) != self._free_written:
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
            if model.state == "loading" and self._age(model) > self._args.start_timeout_seconds:
                limit = f"{self._args.start_timeout_seconds:.0f} s (MODEL_START_TIMEOUT_SECONDS)"
                await self._delete(model)
                model.enter("failed", f"not loaded within {limit}")
        elif model.state == "ready":
            # Its replica has died, and Serve starts another one; or its second copy cannot run.
            if status.status != "RUNNING" and not await self._ask_info(model):
                model.enter("loading", status.reason or "its process has ended and starts again")
            elif time.monotonic() - model.answered_at > IDLE_SECONDS:
                await self._ask_info(model)

    async def _became_ready(self, model: Model) -> None:
        if await self._ask_info(model):
            model.real = await asyncio.to_thread(self._memory_of, model)
            model.seconds = self._age(model)
            model.enter("ready")

    async def _ask_info(self, model: Model) -> bool:
        """The replica's own report; it may be busy, and is not answering only after several timeouts."""
        try:
            model.info = await self._applications.info(model.entry.id)
            model.answered_at = time.monotonic()
        except Exception as error:
            if model.state == "ready" and time.monotonic() - model.answered_at > SILENT_SECONDS:
                model.enter("loading", f"not answering: {type(error).__name__}")
            return False
        return True

    async def _begin(self, model: Model) -> None:
        """Deploy it if its files are there and its memory is free."""
        entry, args = model.entry, self._args
        if model.state != "loading":
            model.enter("loading")
        # 1. The files.
        try:
            source = await asyncio.to_thread(resolve_source, entry, args.folder)
            model.size = await asyncio.to_thread(size_of, entry, source)
        except CatalogueError as error:
            if entry.id in self._downloads:
                model.wanted = False
                return model.enter("loading", "downloads")
            if entry.source.startswith("hub:") and not args.offline and model.detail != "downloads":
                model.enter("loading", "downloads")
                model.wanted = False
                self._downloads.add(entry.id)
                self._spawn(self._fetch(["fetch", entry.id], model))
                return None
            why = str(error).removeprefix(f"{entry.id}: ")
            return model.enter("failed" if "damaged" in why or "cut short" in why else "absent", why)
        # 2. The memory.
        granted = await self._room_for(model, model.size)
        if granted is None or not model.wanted:  # not now, or unloaded meanwhile
            return None
        # 3. The application.
        model.granted, model.detail, model.deployed = granted, "", True
        model.since = time.monotonic()
        self._progress_file(entry.id).unlink(missing_ok=True)
        on_gpu = self._on_gpu(entry)
        arguments = AppArgs(
            entry=entry,
            gpus=self._gpu_share() if on_gpu else 0,
            kv_tokens=self._kv_tokens(model.size, None if on_gpu else granted // entry.most_replicas),
            progress_file=self._progress_file(entry.id),
            folder=args.folder,
            copy_bytes=model.size.copy,
            **{name: value for name, value in args.shared.items() if name != "kv_tokens"},
        )
        await self._applications.deploy(arguments)
        return None

    async def _room_for(self, model: Model, size: Size) -> int | None:
        """Bytes that the model may take; None: not now, or never."""
        replicas = model.entry.most_replicas
        least, most = size.least * replicas, size.memory(self._kv_tokens(size)) * replicas
        if self._on_gpu(model.entry):
            least = most = PROCESS_BYTES * replicas
        if least > self._budget:
            model.enter(
                "failed",
                f"it needs at least {least >> 20} MiB of memory, and all models together may take "
                f"{self._budget >> 20} MiB (MODEL_MEMORY_BYTES)",
            )
            return None
        free = self._free()
        if free >= min(most, self._budget) or (free >= least and not model.asked):
            return min(most, free)
        if not model.asked:
            model.wanted = False
            model.settled = True
            model.enter("unloaded", "no memory was left at the start; the first request loads it")
            return None
        # The least recently used that nobody waits for goes first.
        if any(each.draining for each in self.models.values()):
            return None
        idle = []
        for each in self.models.values():
            if each.state == "ready" and each is not model:
                activity = await asyncio.to_thread(read_activity, self._folder, each.entry.id)
                if not activity.running:
                    idle.append((max(activity.last, time.time() - self._age(each)), each))
        if idle:
            oldest = min(idle, key=lambda pair: pair[0])[1]
            log.info("%s is unloaded: %s needs its memory", oldest.entry.id, model.entry.id)
            await self.unload(oldest.entry.id)
        elif free >= least:
            return min(most, free)
        else:
            model.enter("loading", "waits for memory: the other models are busy")
        return None

    def _free(self) -> int:
        """Bytes that neither a model nor a second copy of one takes."""
        taken = sum(each.granted for each in self.models.values() if each.deployed)
        copies = [each.size for id_, each in self.models.items() if each.deployed and is_running(self._folder, id_)]
        return self._budget - taken - sum(size.copy for size in copies if size)

    async def _unload_idle(self) -> None:
        for id_, model in list(self.models.items()):
            minutes = model.entry.idle_minutes
            if minutes and model.state == "ready":
                activity = await asyncio.to_thread(read_activity, self._folder, id_)
                last = max(activity.last, time.time() - self._age(model))
                if not activity.running and time.time() - last > minutes * 60:
                    log.info("%s is unloaded: it was idle for %g minutes", id_, minutes)
                    await self.unload(id_)

    async def _delete(self, model: Model) -> None:
        """Begin to end its application; `_follow` notices the end."""
        model.draining = True
        with contextlib.suppress(Exception):  # Serve has none of this name
            await self._applications.delete(model.entry.id)

    # ---- files

    async def _fetch(self, arguments: list[str], model: Model | None = None) -> None:
        """Run `lab_model.cli` in a process of its own. model: it is fetched in order to be loaded."""
        name = arguments[-1]
        file = self._progress_file(name if model else "added")
        file.unlink(missing_ok=True)
        process, why = None, ""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lab_model.cli", *arguments, "--progress-file", str(file),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                env=self._environment(),
            )  # fmt: skip
            _, err = await process.communicate()
            lines = err.decode(errors="replace").strip().splitlines()
            if process.returncode:
                why = lines[-1].removeprefix("model: ") if lines else f"exit code {process.returncode}"
        except OSError as error:
            why = f"the download cannot be started: {error.strerror}"
        finally:
            if process is not None and process.returncode is None:
                process.terminate()
            if model is not None:
                self._downloads.discard(model.entry.id)
        if model is None and self.fetching is not None:
            self.fetching = {"name": name, "state": "failed" if why else "ready", "detail": why}
            log.info("%s %s", name, f"cannot be added: {why}" if why else "is added")
        elif model is not None and why:
            model.enter("absent", why.removeprefix(f"{model.entry.id}: "))
        elif model is not None and model.state == "loading":  # nobody unloaded it meanwhile
            model.wanted = True
        self._wake()

    def _environment(self) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        if self._args.offline:
            environ["HF_HUB_OFFLINE"] = "1"
        settings = {"MODEL_FOLDER": self._args.folder, "MODEL_CATALOGUE_FILE": self._args.catalogue_file}
        return environ | {name: str(value) for name, value in settings.items() if value}

    def _progress_file(self, name: str) -> Path:
        return self._folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.progress"

    def _catalogue_stamp(self) -> tuple[int, int]:
        try:
            stat = (self._args.folder / ADDED).stat() if self._args.folder else None
        except OSError:
            stat = None
        return (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)

    def _read_catalogue(self) -> None:
        """New entries appear as unloaded; those that are gone disappear when they are not in memory."""
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
            model = self.models.setdefault(id_, Model(entry))
            if not model.deployed:
                model.entry = entry
                if model.state in ("absent", "failed"):
                    model.enter("unloaded")
        for id_ in [id_ for id_, model in self.models.items() if id_ not in entries and not model.deployed]:
            del self.models[id_]
        self._on_change({id_: model.entry.kind for id_, model in self.models.items()})

    # ---- facts

    def _card(self, model: Model) -> dict[str, Any]:
        entry, info, size = model.entry, model.info, model.size
        card: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "state": model.state, "load": entry.load}
        card |= {name: info[name] for name in info if name not in ("id", "kind")}
        card["endpoints"] = list(KINDS[entry.kind].paths)
        card["source"] = entry.source
        card |= {"licence": entry.licence, "languages": list(entry.languages) or None}
        if size:
            context = min([each for each in (size.context, entry.context) if each], default=None)
            card |= {"parameters": size.parameters, "disk_bytes": size.disk}
            card.setdefault("context", context)
            card["predicted_bytes"] = size.memory(self._kv_tokens(size, model.granted or None))
        if model.state == "ready":
            card |= {"seconds": round(model.seconds, 1)} | ({"memory_bytes": model.real} if model.real else {})
        if model.state == "loading":
            step = self._step_of(model)
            card["progress"] = {
                "what": step.what if step else model.detail or "waits",
                "percent": step.percent if step else None,
                "seconds": round(self._age(model), 1),
            }
        if model.detail:
            card["detail"] = model.detail
        return card

    def fetch_report(self) -> dict[str, Any] | None:
        """The model that is being added: name, state, and how far it is or why it failed."""
        if self.fetching is None:
            return None
        found = {name: value for name, value in self.fetching.items() if name != "since"}
        if found["state"] == "loading":
            step = read_progress(self._progress_file("added")) or Step("begins")
            found["progress"] = step._asdict() | {"seconds": round(time.monotonic() - self.fetching["since"], 1)}
        return found

    def _step_of(self, model: Model) -> Step | None:
        if model.state != "loading":
            return None
        if not model.deployed and model.detail != "downloads":
            return Step(model.detail or "waits")
        return read_progress(self._progress_file(model.entry.id)) or Step("starts its process")

    def _age(self, model: Model) -> float:
        return time.monotonic() - model.since

    def _seconds_left(self, model: Model) -> int:
        """A guess from the progress, for Retry-After: 1 to 60."""
        step = self._step_of(model)
        if step is None or not step.percent:
            return 5
        return max(1, min(60, round(self._age(model) * (100 - step.percent) / step.percent)))

    def _kv_tokens(self, size: Size, granted: int | None = None) -> int:
        """Tokens of a model's KV cache: MODEL_KV_TOKENS, or as many as fit into the granted bytes."""
        wanted = int(self._args.shared.get("kv_tokens", 16384))
        if not size.token or granted is None:
            return wanted
        fitting = (granted - size.memory(0)) // size.token
        return max(LEAST_KV_TOKENS, min(wanted, fitting))

    def _memory_budget(self) -> int:
        """Bytes for all models: the setting less what Ray itself takes, or most of what is free."""
        wanted = self._args.memory_bytes
        if not wanted:
            return int(memory_left() * FREE_SHARE)
        own = 0
        with contextlib.suppress(psutil.Error):
            service = psutil.Process(self._args.service)
            for process in [service, *service.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    reported = process.memory_full_info()
                    own += int(getattr(reported, "pss", reported.uss))
        return max(0, wanted - own)

    def _memory_of(self, model: Model) -> int | None:
        """Bytes of its replicas, shared pages in proportion; None where the system does not tell."""
        total = 0
        for pid in processes(self._folder, model.entry.id):
            with contextlib.suppress(psutil.Error):
                reported = psutil.Process(pid).memory_full_info()
                total += int(getattr(reported, "pss", reported.uss))
        return total or None

    def _on_gpu(self, entry: Entry) -> bool:
        return bool(self._args.gpus) and (entry.device or self._args.shared.get("device")) not in ("cpu", "mps")

    def _gpu_share(self) -> float:
        replicas = sum(model.entry.most_replicas for model in self.models.values() if self._on_gpu(model.entry))
        return gpu_share(self._args.gpus, replicas)

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


def gpu_share(gpus: float, replicas: int) -> float:
    """The part of a GPU that each of `replicas` gets, so that all can be placed: no part lies on two GPUs."""
    if not gpus or not replicas:
        return 0
    # Ray counts in ten thousandths, and rounds: seven times 0.1429 would be more than one GPU.
    return math.floor(10_000 / math.ceil(replicas / gpus)) / 10_000
