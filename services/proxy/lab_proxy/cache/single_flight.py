"""Single flight: of identical concurrent requests one calls the upstream, in this process and across processes.

Redis holds a lease for each name. The command that takes it is sent with the cache's read, so that a single miss costs
no extra round trip. A process that finds the lease taken follows its holder (flight_channel). Without redis each
process leads its own flights. Knows names and flights; the planner decides which requests share a name.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from ..redis.client import OnError
from ..tasks import end
from .flight import Flight, Lease, Spare, Subscriber
from .flight_channel import FlightChannel

STOP_POLL_SECONDS = 0.05
SPARE_BYTES = 64 * 1024 * 1024

Fetch = Callable[[Flight], Awaitable[None]]


class SingleFlight:
    """The flights of this process. A part: start and stop it."""

    def __init__(self, url: str | None, *, limit: int, drain: float = 0, on_error: OnError = lambda _: None) -> None:
        """`url`: of redis; None: flights within this process only. `limit`: bytes that each flight may keep. Longer
        flights share SPARE_BYTES; when these are used up, no request joins a longer one. `drain`: seconds for which
        `stop` waits until other processes have received the flights that they follow. Raises ValueError for a URL with
        unsupported options."""
        self._limit, self._drain = limit, drain
        self.channel = FlightChannel(url, on_error=on_error, on_end=self._on_end, on_deserted=self._abandon)
        self._spare = Spare(SPARE_BYTES)
        self._number = 0
        self._joinable: dict[str, Flight] = {}  # by name
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.channel.start()

    async def stop(self) -> None:
        until = time.monotonic() + self._drain
        while any(each.remote_subscribers for each in self.channel.leading.values()):
            if time.monotonic() >= until:
                break
            await asyncio.sleep(STOP_POLL_SECONDS)
        await end(*self._tasks)
        await self.channel.stop()

    # ---- subscribers

    def join(self, name: str) -> Subscriber:
        """Subscribe to the flight of this name, or to a new one (then `first` is true). Without a name the flight is
        not shared."""
        flight, channel = self._joinable.get(name), self.channel
        first = flight is None
        if flight is None:
            self._number += 1
            token, calls = f"{channel.process_id}.{self._number}", (self._on_end, self._close, channel.mark_dirty)
            flight = Flight(name, token, self._limit, self._spare, *calls)
            if name:
                self._joinable[name] = channel.leading[token] = flight
        return Subscriber(flight, first, channel.connected, self._start, self._on_leave)

    def _start(self, flight: Flight, holder: str | None, fetch: Fetch) -> None:
        flight.started = True
        if holder == "":  # its entries were stored in the meantime
            return flight.abandon()
        flight.task = asyncio.create_task(self._run(flight, holder, fetch))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        return flight.notify()

    def _on_leave(self, subscriber: Subscriber) -> None:
        """The last subscriber ends the flight, unless another process follows or is about to."""
        flight = subscriber.flight
        if not flight.started:
            if subscriber.first:
                flight.abandon()  # it left before its lookup: another one looks
        elif not flight.done and not flight.subscribers and not flight.remote_subscribers:
            if flight.holds_lease:
                self.channel.wait_for_followers(flight)
            else:
                self._abandon(flight)

    def _abandon(self, flight: Flight) -> None:
        if flight.task and not (flight.done or flight.subscribers or flight.remote_subscribers):
            flight.task.cancel()
            flight.abandon()

    # ---- flights

    def _close(self, flight: Flight) -> None:
        """Nobody may join any more: the next request of this name starts another flight."""
        if self._joinable.get(flight.name) is flight:
            del self._joinable[flight.name]
            if flight.holds_lease:
                self.channel.release(flight)

    def _on_end(self, flight: Flight) -> None:
        if flight.result is not None and flight.result.outcome == "stored":
            flight.holds_lease = False  # it expires: the next request finds the entry first; saves a round trip
        self._close(flight)
        if flight.abandoned or flight.entries is not None:
            self.channel.disown(flight)
        if not flight.remote_subscribers:
            self.channel.leading.pop(flight.token, None)

    async def _run(self, flight: Flight, holder: str | None, fetch: Fetch) -> None:
        try:
            # 1. While another process leads, follow it. Afterwards the lease decides who leads.
            while holder is not None and holder != flight.token:
                if not holder.startswith(f"{self.channel.process_id}."):  # otherwise an ended flight of this process
                    if not await self.channel.follow(flight, holder):
                        holder = None  # redis is down, and no part was sent: lead without a lease
                        break
                    if flight.done:
                        return
                lease = Lease(flight, flight.lookup_names, displaced=holder)
                replies = await self.channel.execute(lease.command())
                lease.on_reply(replies[0] if replies else None)
                holder = lease.holder
                if holder == "":
                    break  # the entries are in the cache
            # 2. Lead, if there is something to fetch.
            if holder != "":
                flight.holds_lease = holder == flight.token
                flight.renewed = time.monotonic()
                await fetch(flight)
            flight.abandon()  # unless it has ended properly
        except asyncio.CancelledError:
            flight.abandon()
            raise
        except Exception as error:  # each subscriber raises it in its own request
            flight.end(error=error)
