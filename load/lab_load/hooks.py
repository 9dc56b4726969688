"""Between Locust's events and a trial: what a run starts with, what it leaves, and who may start one in the browser."""

from __future__ import annotations

import csv
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
from locust.stats import PERCENTILES_TO_REPORT, StatsCSV
from locust.util.timespan import parse_timespan
from pydantic import ValidationError

from . import summary
from .asker import Asker
from .settings import EDITABLE, Settings, complaint
from .target import Target, TargetError, examine
from .trial import Trial

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PROGRESS_SECONDS = 5


class Hooks:
    """One process, one run at a time. `prepare` comes before each run and raises TargetError."""

    def __init__(self, settings: Settings) -> None:
        self._defaults = self._settings = settings
        self._target: Target | None = None
        self._environment: Environment | None = None
        self._trial: Trial | None = None
        self._folder = Path()
        self._page = ""
        self._watches: list[gevent.Greenlet] = []

    def attach(self, events: Any) -> None:
        """To Locust's events."""
        events.init_command_line_parser.add_listener(self._parser)
        events.init.add_listener(self._init)
        events.test_start.add_listener(self._start)
        events.spawning_complete.add_listener(self._full)
        events.usage_monitor.add_listener(self._usage)
        events.test_stopping.add_listener(self._stopping)
        events.test_stop.add_listener(self._stop)
        events.quit.add_listener(self._quit)

    def prepare(self, settings: Settings) -> None:
        target = examine(settings)
        try:
            settings.runs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TargetError(f"LOAD_RUNS_DIR={settings.runs_dir} cannot be made: {error.strerror}") from None
        if not os.access(settings.runs_dir, os.W_OK):
            raise TargetError(f"LOAD_RUNS_DIR={settings.runs_dir} cannot be written to")
        self._settings, self._target = settings, target

    def _parser(self, parser: LocustArgumentParser) -> None:
        """Locust shows its own arguments in the page's form; so it does with these."""
        for name in EDITABLE:
            default = getattr(self._defaults, name)
            reply = Settings.model_fields[name].description
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default) if default is not None else str, default=default,
                help=reply,
            )  # fmt: skip

    def _init(self, environment: Environment, web_ui: Any, **_: Any) -> None:
        self._environment = environment
        if web_ui:
            web_ui.app.before_request(self._guard)

    def _guard(self) -> flask.typing.ResponseReturnValue | None:
        """No page from elsewhere may put load on anything, and nobody more than the settings allow."""
        request = flask.request
        name = (urlsplit(f"//{request.host}").hostname or "").lower()
        allowed = LOOPBACK | {"load"} | set(self._defaults.allowed_hosts)
        if name not in allowed and "*" not in allowed:
            return f"{name} is none of this page's names: LOAD_ALLOWED_HOSTS\n", 403
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.host:
            return "a page from elsewhere may not do this\n", 403
        if request.method != "POST" or not request.path.endswith("/swarm"):
            return None
        try:
            self.prepare(self._wanted(request.form.to_dict()))
        except ValidationError as error:
            return flask.jsonify(success=False, message=complaint(error))
        except (TargetError, ValueError) as error:
            return flask.jsonify(success=False, message=str(error))
        return None

    def _wanted(self, form: dict[str, str]) -> Settings:
        """The settings that the page's form asks for. Raises ValueError (ValidationError is one)."""
        if form.get("host", self._defaults.host).rstrip("/") != self._defaults.host:
            raise ValueError(f"this page loads {self._defaults.host} alone; elsewhere: LOAD_HOST")
        wanted: dict[str, Any] = {name: form[name] for name in EDITABLE if form.get(name)}
        for field, name in {"user_count": "users", "spawn_rate": "spawn_rate"}.items():
            if form.get(field):
                wanted[name] = form[field]
        # Locust lets a run without a time go on for ever; ours ends at the bound.
        wanted["seconds"] = parse_timespan(form["run_time"]) if form.get("run_time") else self._defaults.max_seconds
        return Settings(**wanted)

    def _start(self, environment: Environment, **_: Any) -> None:
        assert self._target is not None  # noqa: S101 prepare() comes first
        names = [user.scenario for user in environment.user_classes if issubclass(user, Asker)]
        trial = Trial("-".join(sorted(names)), self._settings, self._target)
        trial.name += f"-{trial.started:%Y%m%d-%H%M%S}"
        self._folder = self._settings.runs_dir / trial.name
        self._folder.mkdir(exist_ok=True)
        for user in environment.user_classes:
            if issubclass(user, Asker):
                user.trial = trial
        self._trial = trial
        _say(f"load: {trial.name}: {trial.target.model} at {trial.target.host}, {trial.settings.users} users, "
             f"{trial.settings.seconds} s")  # fmt: skip
        self._watches = [gevent.spawn(self._progress, trial), gevent.spawn(self._end_in_time, environment, trial)]

    def _progress(self, trial: Trial) -> None:
        while True:
            gevent.sleep(PROGRESS_SECONDS)
            failed = sum(bool(answer.error) for answer in trial.answers)
            tokens = sum(answer.completion_tokens for answer in trial.answers)
            state = "  (the last answers)" if trial.stopped else ""
            _say(f"    {time.perf_counter() - trial.began:4.0f} s  {len(trial.answers)} answers, {failed} failed, "
                 f"{tokens} tokens{state}")  # fmt: skip

    def _end_in_time(self, environment: Environment, trial: Trial) -> None:
        """The bound that holds however the run was started: Locust's own timer can be left out of the form."""
        gevent.sleep(trial.settings.seconds + 1)
        if environment.runner and trial.stopped is None:
            gevent.spawn(environment.runner.stop)

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

    def _stop(self, environment: Environment, **_: Any) -> None:
        trial, self._trial = self._trial, None
        if trial is None:
            return
        gevent.killall(self._watches, block=False)
        result = summary.summarize(trial)
        summary.write(self._folder, trial, result)
        locust_files = StatsCSV(environment, PERCENTILES_TO_REPORT)
        for name, write in (("stats", locust_files.requests_csv), ("failures", locust_files.failures_csv)):
            with (self._folder / f"locust_{name}.csv").open("w", newline="", encoding="utf-8") as file:
                write(csv.writer(file))
        report = get_html_report(environment, show_download_link=False)  # type: ignore[no-untyped-call] # Locust's
        (self._folder / "report.html").write_text(report, encoding="utf-8")
        self._page = f"{summary.page(result)}\n\n  {self._folder}/: summary.json, summary.csv, answers.csv, report.html"
        if not any(scenario["answers"] for scenario in result["results"].values()):
            environment.process_exit_code = 1  # nothing failed, but nothing was measured either
        if environment.web_ui:
            _say(f"\n{self._page}\n")

    def _quit(self, **_: Any) -> None:
        """After Locust's own tables."""
        if self._environment and not self._environment.web_ui and self._page:
            _say(f"\n{self._page}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
