"""Connects Locust's events with a trial: prepares a run, writes its results, checks requests of the web page."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import flask
import gevent  # type: ignore[import-untyped] # it ships no types
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.html import get_html_report
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import PERCENTILES_TO_REPORT, StatsCSV
from locust.util.timespan import parse_timespan
from pydantic import ValidationError

from ..measures.counters import Counters, Source
from ..measures.sums import Expected, Table, compare
from ..measures.trial import Target, Trial, clock, make_workloads, new_salt
from ..reports import html, summary
from ..settings import EDITABLE, OWN, Settings, complaint
from ..workloads.workload import Workload
from .client import Client
from .target import TargetError, examine, shared_prefix

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PROGRESS_SECONDS = 5
SETTLE_SECONDS = 10  # after the last answer, for the servers' counters and for requests that still run
STILL_SECONDS = 2
LOOK_SECONDS = 0.1
# Messages between master and workers: the run that begins, and a worker's last records.
RUN, RECORDS = "lab_run", "lab_records"
# Exit codes of a run. 2 and 3: see __main__.
FAILED, SUMS_DIFFER, NOT_TRUSTED = 1, 4, 5


class Hooks:
    """The hooks of one process, for one run at a time. Call `prepare` before each run."""

    def __init__(self, settings: Settings) -> None:
        self._defaults = self._settings = settings
        self._target: Target | None = None
        self._workloads: dict[str, Workload] = {}
        self._salt = ""
        self._environment: Environment | None = None
        self._trial: Trial | None = None
        self._before = Counters()
        self._folder = Path()
        self._page = ""
        self._watches: list[gevent.Greenlet] = []
        self._reported = 0  # records of this process that were sent to the master
        self._index = 0  # of this worker

    def attach(self, events: Any) -> None:
        """Add the hooks to Locust's events."""
        events.init_command_line_parser.add_listener(self._parser)
        events.init.add_listener(self._init)
        events.test_start.add_listener(self._start)
        events.spawning_complete.add_listener(self._full)
        events.usage_monitor.add_listener(self._usage)
        events.test_stopping.add_listener(self._stopping)
        events.test_stop.add_listener(self._stop)
        events.report_to_master.add_listener(self._report)
        events.worker_report.add_listener(self._reported_by)
        events.quit.add_listener(self._quit)

    def prepare(self, names: list[str], settings: Settings) -> None:
        """Prepare a run of these workloads. Raises TargetError, and ValueError for a workload that cannot be made."""
        workloads = make_workloads(names, settings)
        kinds = {workload.kind for workload in workloads.values()}
        if len(kinds) > 1:
            raise ValueError(f"{', '.join(names)} need models of different kinds: use one run for each")
        target = examine(settings, kinds.pop())
        try:
            settings.runs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TargetError(f"LOAD_RUNS_DIR={settings.runs_dir} cannot be created: {error.strerror}") from None
        if not os.access(settings.runs_dir, os.W_OK):
            raise TargetError(f"LOAD_RUNS_DIR={settings.runs_dir} cannot be written to")
        self._settings, self._target, self._workloads, self._salt = settings, target, workloads, new_salt(settings)

    # -- Locust's command line and web page

    def _parser(self, parser: LocustArgumentParser) -> None:
        """Add the settings that Locust shows in the form of its web page."""
        for name in EDITABLE:
            default = getattr(self._defaults, name)
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default) if default is not None else str, default=default,
                help=Settings.model_fields[name].description,
            )  # fmt: skip

    def _init(self, environment: Environment, web_ui: Any, **_: Any) -> None:
        self._environment = environment
        if isinstance(environment.runner, WorkerRunner):
            environment.runner.register_message(RUN, self._receive_run)
        elif isinstance(environment.runner, MasterRunner):
            environment.runner.register_message(RECORDS, self._receive_records)
        if web_ui:
            web_ui.app.before_request(self._guard)

    def _guard(self) -> flask.typing.ResponseReturnValue | None:
        """Refuse requests of pages of another origin, and runs beyond the bounds of the settings."""
        request = flask.request
        name = (urlsplit(f"//{request.host}").hostname or "").lower()
        allowed = LOOPBACK | {"load"} | set(self._defaults.allowed_hosts)
        if name not in allowed and "*" not in allowed:
            return f"the host name {name} is not allowed: add it to LOAD_ALLOWED_HOSTS\n", 403
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.host:
            return "pages of another origin are refused\n", 403
        if request.method != "POST" or not request.path.endswith("/swarm"):
            return None
        classes = request.form.getlist("user_classes") or ["Throughput"]
        try:
            self.prepare([name.lower() for name in classes], self._wanted(request.form.to_dict()))
        except ValidationError as error:
            return flask.jsonify(success=False, message=complaint(error))
        except (TargetError, ValueError, KeyError) as error:
            return flask.jsonify(success=False, message=str(error))
        return None

    def _wanted(self, form: dict[str, str]) -> Settings:
        """The settings that the page's form asks for. Raises ValueError (ValidationError is one)."""
        if form.get("host", self._defaults.host).rstrip("/") != self._defaults.host:
            raise ValueError(f"this page puts load on {self._defaults.host} only; another target: LOAD_HOST")
        wanted: dict[str, Any] = {name: form[name] for name in EDITABLE if form.get(name)}
        for field, name in {"user_count": "users", "spawn_rate": "spawn_rate"}.items():
            if form.get(field):
                wanted[name] = form[field]
        # Without a time Locust would run forever; here such a run ends at the bound.
        wanted["seconds"] = parse_timespan(form["run_time"]) if form.get("run_time") else self._defaults.max_seconds
        return Settings(**wanted)

    # -- a run

    def _start(self, environment: Environment, **_: Any) -> None:
        assert self._target is not None  # noqa: S101 prepare() or the master's message comes first
        if isinstance(environment.runner, MasterRunner):
            self._send_run(environment.runner)
        names = sorted(self._workloads)
        trial = Trial("-".join(names), self._settings, self._target, self._workloads, self._salt)
        for user in environment.user_classes:
            if issubclass(user, Client):
                user.trial = trial
        self._trial, self._reported = trial, 0
        self._watches = [gevent.spawn(self._end_in_time, environment, trial)]
        if isinstance(environment.runner, WorkerRunner):
            trial.index = self._index
            return
        trial.name += f"-{trial.started:%Y%m%d-%H%M%S}"
        self._folder = self._settings.runs_dir / trial.name
        self._folder.mkdir(exist_ok=True)
        for name, workload in self._workloads.items():
            workload.write(self._folder / f"workload-{name}.jsonl")
            _say(f"load: workload {name}: {workload.about}; {len(workload.items)} requests, seed "
                 f"{self._settings.seed}, SHA-256 {workload.sha256}")  # fmt: skip
        self._before = self._source(trial).read()
        trial.began = time.perf_counter()
        _say(f"load: {trial.name}: {trial.target.model} at {trial.target.host}, {trial.settings.users} users, "
             f"{trial.settings.seconds} s")  # fmt: skip
        self._watches += [gevent.spawn(self._progress, trial), gevent.spawn(self._end_when_used_up, environment, trial)]

    def _source(self, trial: Trial) -> Source:
        settings = trial.settings
        routes = frozenset(item.path for workload in trial.workloads.values() for item in workload.items)
        key = settings.api_key.get_secret_value() if settings.api_key else None
        proxies = settings.proxy_urls or ((settings.host,) if settings.proxy_counters else ())
        return Source(settings.host, proxies, settings.model_urls, key, routes)

    def _progress(self, trial: Trial) -> None:
        """Print a line every few seconds, and write one to progress.jsonl each second, for charts."""
        source, beat = self._source(trial), 0
        with (self._folder / "progress.jsonl").open("w", encoding="utf-8") as file:
            while True:
                gevent.sleep(1)
                beat += 1
                file.write(json.dumps(summary.moment(trial, source.read())) + "\n")
                file.flush()
                if beat % PROGRESS_SECONDS:
                    continue
                failed = sum(bool(record.error) for record in trial.records)
                state = "  (waiting for the last answers)" if trial.stopped else ""
                _say(f"    {time.perf_counter() - trial.began:4.0f} s  {len(trial.records)} answers, {failed} failed"
                     f"{state}")  # fmt: skip

    def _end_in_time(self, environment: Environment, trial: Trial) -> None:
        """End the run at the bound, even if the form of the web page set no time."""
        gevent.sleep(trial.settings.longest_schedule + 6)  # later than Locust's own timer
        if environment.runner and trial.stopped is None:
            gevent.spawn(environment.runner.stop)

    def _end_when_used_up(self, environment: Environment, trial: Trial) -> None:
        """End the run early when every request of the workload has its answer."""
        runner = environment.runner
        while runner is not None:
            gevent.sleep(LOOK_SECONDS)
            trial.users = max(trial.users, runner.user_count)
            if trial.full and trial.stopped is None and not runner.user_count:
                gevent.spawn(runner.stop if environment.web_ui else runner.quit)
                return

    def _full(self, user_count: int, **_: Any) -> None:
        if self._trial:
            self._trial.users = max(self._trial.users, user_count)
            self._trial.full = self._trial.full or time.perf_counter()

    def _usage(self, cpu_usage: float, **_: Any) -> None:
        if self._trial:
            self._trial.cpu_most = max(self._trial.cpu_most, cpu_usage)

    def _stopping(self, **_: Any) -> None:
        if self._trial:
            self._trial.stopped = time.perf_counter()

    # -- several processes: the run goes to the workers, and their records to the master

    def _send_run(self, runner: MasterRunner) -> None:
        """Locust calls this before it tells the workers to start. Those on this machine have most of it already; others
        have the same variables at most."""
        assert self._target is not None  # noqa: S101
        workers = list(runner.clients.ready)
        count = {"workers": len(workers)} if self._settings.workers else {}
        self._settings = self._settings.model_copy(update=count)
        target = {"host": self._target.host, "model": self._target.model, "server": self._target.server}
        run = {"names": sorted(self._workloads), "salt": self._salt, "target": target}
        run["settings"] = self._settings.model_dump(mode="json", exclude=set(OWN))
        for index, worker in enumerate(workers):
            runner.send_message(RUN, {**run, "index": index}, client_id=worker.id)

    def _receive_run(self, msg: Any, **_: Any) -> None:
        run = msg.data
        settings = Settings(**run["settings"], **{name: getattr(self._defaults, name) for name in OWN})
        if run["names"] != sorted(self._workloads) or settings.workload_shape != self._settings.workload_shape:
            self._workloads = make_workloads(run["names"], settings)
        self._settings, self._target, self._salt = settings, Target(**run["target"]), run["salt"]
        self._index = run["index"]

    def _receive_records(self, msg: Any, **_: Any) -> None:
        self._reported_by(msg.node_id, msg.data)

    def _report(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        trial = self._trial
        if trial is None:
            return
        data["clock"] = clock()
        data["records"] = [record.to_wire() for record in trial.records[self._reported :]]
        data["sent"], data["cpu"] = trial.sent, trial.cpu_most
        self._reported = len(trial.records)

    def _reported_by(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        trial = self._trial
        if trial is None or "records" not in data:
            return
        trial.merge(client_id, data, clock())

    def _stop(self, environment: Environment, **_: Any) -> None:
        trial = self._trial
        if trial is None:
            return
        gevent.killall(self._watches, block=False)
        if isinstance(environment.runner, WorkerRunner):
            last: dict[str, Any] = {}  # the master stops waiting before Locust's own next report
            self._report(environment.runner.client_id, last)
            environment.runner.send_message(RECORDS, last)
            self._trial = None
            return
        self._trial = None
        table = self._sums(trial)
        # After the sums: the ledger has estimates of these calls until the model reports what they used.
        if len(trial.workloads) == 1 and trial.settings.salt is None:  # another run's salt may find its pages
            (workload,) = trial.workloads.values()
            trial.shared = shared_prefix(trial.settings, trial.target, workload, trial.salt)
        result = summary.summarize(trial, table)
        summary.write(self._folder, trial, result)
        (self._folder / "report.html").write_text(html.page(result, self._folder), encoding="utf-8")
        locust_files = StatsCSV(environment, PERCENTILES_TO_REPORT)
        for name, write in (("stats", locust_files.requests_csv), ("failures", locust_files.failures_csv)):
            with (self._folder / f"locust_{name}.csv").open("w", newline="", encoding="utf-8") as file:
                write(csv.writer(file))
        report = get_html_report(environment, show_download_link=False)  # type: ignore[no-untyped-call] # Locust's
        (self._folder / "locust.html").write_text(report, encoding="utf-8")
        self._page = f"{summary.page(result)}\n\n  {self._folder}/: report.html, summary.json, records.jsonl"
        environment.process_exit_code = exit_code(result)
        if environment.web_ui:
            _say(f"\n{self._page}\n")

    def _sums(self, trial: Trial) -> Table:
        """The table of sums, as soon as it holds. If it does not hold: after the servers have counted nothing more for
        STILL_SECONDS, or after SETTLE_SECONDS.
        """
        source, began = self._source(trial), time.perf_counter()
        last, changed = Counters(), began
        while True:
            counted = source.read().since(self._before)
            table = compare(trial.records, trial.unfinished, counted, expected(trial))
            now = time.perf_counter()
            if counted != last:
                last, changed = counted, now
            still = now - changed > STILL_SECONDS and not counted.in_flight and not counted.running
            if table.holds or still or now - began > SETTLE_SECONDS:
                return table
            gevent.sleep(0.2)

    def _quit(self, **_: Any) -> None:
        """Print the summary after Locust's own tables."""
        if self._environment and not self._environment.web_ui and self._page:
            _say(f"\n{self._page}")


def expected(trial: Trial) -> Expected:
    """What the workloads of a run promise about the cache."""
    settings, records = trial.settings, [record for record in trial.records if not record.error]
    workloads = list(trial.workloads.values())
    if len(workloads) > 1 or not settings.cache:
        return Expected()
    workload = workloads[0]
    fetches = len({record.question for record in records})
    if workload.zipf is None or not records:
        return Expected(workload.cold, workload.once, fetches)
    draws = len(records)
    # With a fixed salt, answers of an earlier run can be in the cache. With a TTL or a capacity, questions are fetched
    # again.
    once = workload.once and settings.salt is None and not settings.ttl_seconds and not settings.capacity
    return Expected(workload.cold, once, fetches, None if settings.salt else summary.expected_hits(trial, draws))


def exit_code(result: dict[str, Any]) -> int:
    """0 success, 1 requests failed, 4 the sums differ, 5 the figures cannot be trusted."""
    if any(scenario["failed"] for scenario in result["results"].values()):
        return FAILED
    if not result["sums"]["holds"]:
        return SUMS_DIFFER
    return 0 if not result["reasons"] else FAILED if not result["results"] else NOT_TRUSTED


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
