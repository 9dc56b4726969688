"""`python -m lab_proxy`: reads settings, builds the parts, runs the server. A wrong setting ends it with one line and
exit code 2."""

import logging
import signal
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from . import cli
from .batches.files import FileStore
from .batches.worker import BatchWorker
from .cache.key import load_secret
from .cache.single_flight import SingleFlight
from .cache.store import Cache
from .http.app import App, Part
from .http.pages.batches import BatchPages
from .http.pages.cache import CachePages
from .http.pages.files import FilePages, files_disabled
from .http.pages.health import HealthPages
from .http.pages.keys import KeyPages
from .http.pages.models import ModelPages
from .http.pages.openapi import OpenApiPages
from .http.pages.timing import TimingPages
from .http.pages.usage import UsagePages
from .http.response import Page, Pages
from .http.server import listen, serve
from .keys.authentication import Authenticator
from .keys.limits import Limits
from .keys.store import KeyStore
from .ledger.ledger import Ledger
from .ledger.money import PICO
from .ledger.prices import Prices
from .ledger.reconciliation import Reconciliation
from .redis.address import Address
from .redis.client import Client
from .reload import Reloader
from .requests.context import Traffic
from .requests.executor import Executor
from .settings import Settings, removed_settings
from .telemetry.logs import start_log
from .telemetry.metrics import Metrics
from .telemetry.observer import Observer
from .telemetry.traces import Traces, installed
from .upstreams.failover import UpstreamPool
from .upstreams.model_list import ModelList
from .upstreams.routes import Routes

log = logging.getLogger("lab_proxy")


def main(argv: Sequence[str] = ()) -> int:
    """Run the server, or, with arguments, one of the operator's commands. Returns the exit code."""
    if not argv:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the reloader handles it
    # 1. Check settings and files before anything starts.
    try:
        settings = Settings()
        if argv:
            return cli.run(argv, settings)
        routes = Routes(settings)
        prices = Prices(settings.prices_file)
        Address(settings.redis_url)
        secret = load_secret(settings.cache_secret_file) if settings.cache_enabled else bytes(32)
        if settings.otlp_endpoint and not installed():
            variable = "PROXY_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT"
            raise ValueError(f"{variable} needs the OpenTelemetry packages: pip install 'lab-proxy[otel]'")
    except ValueError as error:
        why = _first_error(error) if isinstance(error, ValidationError) else error
        print(f"proxy: {why}", file=sys.stderr)  # noqa: T201 - before the log starts
        return 2
    try:
        listener = listen(settings)
    except OSError as error:
        print(f"proxy: cannot listen on PROXY_HOST and PROXY_PORT: {error}", file=sys.stderr)  # noqa: T201 - as above
        return 1
    # 2. The server.
    start_log(settings)
    for line in removed_settings():
        log.warning(line)
    log.info("listening on http://%s:%s", settings.host, settings.port)
    app, traffic = build(settings, routes, prices, secret)
    return serve(app, traffic, settings, listener)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    variable = "".join(f"PROXY_{str(part).upper()}: " for part in first["loc"][:1])
    return f"{variable}{first['msg'].removeprefix('Value error, ')}"


def build(settings: Settings, routes: Routes, prices: Prices, secret: bytes) -> tuple[App, Traffic]:
    """Build the app from its parts, room by room."""
    metrics = Metrics()

    def on_redis_error(operation: str) -> None:
        metrics.count("redis_errors", operation)

    redis_timeout = settings.redis_timeout_ms / 1000
    client = Client(settings.redis_url)
    # 1. telemetry, ledger
    traces = Traces(settings.otlp_endpoint) if settings.otlp_endpoint else None
    observer = Observer(metrics, traces)
    ledger = Ledger(
        client,
        prices,
        folder=settings.disk_queue_folder,
        max_bytes=settings.ledger_spool_bytes,
        on_error=on_redis_error,
        on_cost=lambda upstream, model, pico: metrics.count("cost_usd", upstream, model, by=pico / PICO),
    )
    # 2. cache
    cache = Cache(
        settings.redis_url,
        secret,
        enabled=settings.cache_enabled,
        timeout=redis_timeout,
        max_entry_bytes=settings.cache_max_entry_bytes,
        near_bytes=settings.cache_near_bytes,
        on_error=on_redis_error,
        on_time=lambda operation, seconds: metrics.time("redis", operation, seconds=seconds),
    )
    flights = SingleFlight(
        settings.redis_url if settings.cache_enabled else None,
        limit=settings.cache_max_entry_bytes,
        drain=settings.drain_timeout_seconds,
        on_error=on_redis_error,
    )
    # 3. upstreams
    upstreams = UpstreamPool(routes, settings, metrics, traces)
    models = ModelList(upstreams, settings.model_poll_seconds)

    reconciliation = Reconciliation(upstreams.ask_model, lambda outcome: metrics.count("reconciled", outcome))
    reloader = Reloader(
        {"routes": routes, "prices": prices},
        after=upstreams.on_routes_reloaded,
        on_reload=lambda name, outcome: metrics.count("reloads", name, outcome),
    )
    # 4. keys
    keys = Authenticator(
        client,
        required=settings.keys_required,
        timeout=max(redis_timeout, 0.1),
        admin_key=settings.operator_key(),
        on_error=on_redis_error,
    )
    limits = Limits(
        client,
        prices,
        ledger,
        when_down=settings.limits_when_redis_is_down,
        timeout=redis_timeout,
        on_refusal=lambda reason: metrics.count("limits_refused", reason),
        on_error=on_redis_error,
    )
    # 5. requests, batches
    traffic = Traffic()
    executor = Executor(
        settings,
        cache,
        upstreams,
        routes,
        models,
        limits=limits,
        ledger=ledger,
        flights=flights,
        reconciliation=reconciliation,
    )
    files = FileStore(settings)
    batches = BatchWorker(settings, files, keys, client, executor=executor, traffic=traffic, observer=observer)
    # 6. http
    health = HealthPages(cache, upstreams, models, metrics=metrics, traffic=traffic, files=reloader)
    metrics.watch(reloader.gauges)
    metrics.watch(health.gauges)
    stored: Pages = {**FilePages(files, settings).pages(), **BatchPages(files, batches.wake).pages()}
    pages: dict[tuple[str, str], Page] = {
        **health.pages(),
        **ModelPages(routes, models).pages(),
        **KeyPages(KeyStore(client), ledger).pages(),
        **UsagePages(ledger).pages(),
        **TimingPages(observer.timings, prices, upstreams.ask_model).pages(),
        **CachePages(executor.planner, cache, keys, limits).pages(),
        **(stored if settings.files_enabled else dict.fromkeys(stored, files_disabled)),
    }
    pages |= OpenApiPages(models, pages).pages()
    # Stopped in reverse order: the ledger after all that record charges.
    parts: list[Part] = [traces] if traces else []
    parts += [upstreams, client, cache, models, keys, ledger, limits, reloader, reconciliation, flights, batches]
    app = App(settings, executor, keys=keys, traffic=traffic, observer=observer, pages=pages, parts=parts)
    return app, traffic


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
