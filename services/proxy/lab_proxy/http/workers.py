"""Several processes that answer on one port, and a parent that watches over them: it serves nothing itself.

A worker that dies is replaced, at once the first time, later each further time. Signals go to all of them, and the
parent ends when they have. Knows processes and signals, nothing of HTTP.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger("lab_proxy.workers")

SPREADS = sys.platform == "linux"  # several sockets on one port: elsewhere the last one gets all
STEADY_SECONDS = 10.0  # who lived so long is replaced at once
LONGEST_PAUSE_SECONDS = 30.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
GRACE_SECONDS = 5.0  # beyond the drain's own bound; then a worker is killed


@dataclass(slots=True)
class _Worker:
    place: int
    started: float
    quick: int  # how often in a row the worker of this place died soon


class Workers:
    """`work` is what a worker does with its listening socket, and with a descriptor whose end says that the parent is
    gone; it returns an exit code. `listen` makes a listening socket: one for each worker where the kernel spreads
    connections over them (Linux), else one for all. Measured with 64 connections over 4 workers: one socket for all
    gave them 0 to 27 each, one each 8 to 20.

    Start it before there is a thread or an event loop: workers are forks.
    """

    def __init__(
        self,
        count: int,
        listen: Callable[[], socket.socket],
        work: Callable[[socket.socket, int], int],
        drain_seconds: float,
    ) -> None:
        self._count = count
        self._listen = listen
        self._work = work
        self._listeners: dict[int, socket.socket] = {}
        self._drain_seconds = drain_seconds
        self._living: dict[int, _Worker] = {}
        self._due: list[tuple[float, int, int]] = []  # when, place, how often it died soon
        self._ending = 0.0  # when the last worker is killed; 0: nobody ends
        self._code = 0
        self._alive, self._held = os.pipe()  # the parent alone holds the writing end
        self._wake, self._woken = socket.socketpair()
        self._heard: list[int] = []

    def run(self) -> int:
        """Until a signal ends it: 0 when every worker ended well, 1 when one had to be killed or failed."""
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._hear)
        for place in range(self._count):
            self._listeners[place] = self._listener(place)
        for place in range(self._count):
            self._start(place, 0)
        while self._living or (self._due and not self._ending):
            select.select([self._wake], [], [], self._patience())
            self._drain_wakeups()
            while self._heard:
                self._obey(self._heard.pop(0))
            self._bury()
            self._start_due()
            if self._ending and time.monotonic() > self._ending:
                self._kill()
        return self._code

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._heard.append(number)

    def _drain_wakeups(self) -> None:
        try:
            while self._wake.recv(1024):
                pass
        except BlockingIOError:
            pass

    def _patience(self) -> float | None:
        now = time.monotonic()
        if self._ending:
            return max(0.0, self._ending - now) + 0.01
        return max(0.0, min(when for when, _, _ in self._due) - now) if self._due else None

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._tell(signal.SIGHUP)
        elif number in {signal.SIGTERM, signal.SIGINT}:
            # A terminal's Ctrl-C has reached the workers already; a second SIGTERM does no harm there.
            self._tell(signal.SIGTERM)
            self._ending = self._ending or time.monotonic() + self._drain_seconds + GRACE_SECONDS

    def _tell(self, number: signal.Signals) -> None:
        for pid in self._living:
            os.kill(pid, number)  # each is a child that was not waited for: the number is still its own

    def _kill(self) -> None:
        log.error("%d workers did not end in time and are killed", len(self._living))
        self._code = 1
        self._tell(signal.SIGKILL)
        self._ending = time.monotonic() + GRACE_SECONDS

    def _bury(self) -> None:
        while self._living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            worker = self._living.pop(pid, None)
            if worker is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            if self._ending:
                # -SIGTERM: it had not begun.
                self._code = self._code or int(code not in {0, -signal.SIGTERM})
                continue
            quick = worker.quick + 1 if time.monotonic() - worker.started < STEADY_SECONDS else 0
            pause = min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** (quick - 2)) if quick > 1 else 0.0
            log.error("worker %d (pid %d) died with %d: another one starts in %.1f s", worker.place, pid, code, pause)
            self._due.append((time.monotonic() + pause, worker.place, quick))
            if pause and SPREADS:  # nobody should wait at its door meanwhile
                self._listeners[worker.place].close()
                del self._listeners[worker.place]

    def _start_due(self) -> None:
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now and not self._ending]:
            self._due.remove(due)
            self._start(due[1], due[2])

    def _start(self, place: int, quick: int) -> None:
        listener = self._listeners[place] = self._listeners.get(place) or self._listener(place)
        # No signal may be lost between the fork and the worker's own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid:
            self._living[pid] = _Worker(place, time.monotonic(), quick)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            return
        # The worker: nothing of the parent's is left, and it leaves by the interpreter's own way out.
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(self._held)
        self._wake.close()
        self._woken.close()
        for each in self._listeners.values():
            if each is not listener:
                each.close()
        random.seed()  # or all workers would draw the same
        sys.exit(self._work(listener, self._alive))

    def _listener(self, place: int) -> socket.socket:
        return self._listen() if SPREADS or place == 0 else self._listeners[0]
