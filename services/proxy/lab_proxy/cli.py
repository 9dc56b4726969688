"""The operator's commands: `python -m lab_proxy keys …` and `… usage`.

They work directly on redis (PROXY_REDIS_URL), with the same key store and ledger as the operator's pages.
"""

import argparse
import asyncio
import contextlib
import csv
import io
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import orjson

from .errors import ProxyError
from .keys.store import SPEC_FIELDS, Key, KeyStore, key_spec
from .ledger import usage
from .redis.client import Client
from .redis.connection import RedisError
from .settings import Settings

COLUMNS = (
    "id", "state", "owner", "name", "models", "rpm", "tpm", "concurrency", "budget_per_day_usd", "budget_total_usd",
    "expires", "namespace",
)  # fmt: skip
USAGE_COLUMNS = (
    "day", "owner", "model", "requests", "upstream_calls", "prompt_tokens", "completion_tokens", "hits", "collapsed",
    "cost_usd",
)  # fmt: skip
SECONDS = 30.0  # time limit of one command

Work = Callable[[argparse.Namespace, Client], Awaitable[None]]


class UsageError(Exception):
    """A wrong command. It ends the command with one line."""


def run(argv: Sequence[str], settings: Settings) -> int:
    """Run a command. Returns the exit code: 0, 1 if redis fails, 2 for a wrong command."""
    args = _parser().parse_args(argv)
    try:
        asyncio.run(_bounded(args, settings))
    except (ProxyError, UsageError, ValueError) as error:
        _note(str(error))
        return 2
    except (RedisError, TimeoutError) as error:
        why = str(error) or "no answer in time"
        _note(f"redis failed ({why}): check PROXY_REDIS_URL; nothing was changed")
        return 1
    return 0


async def _bounded(args: argparse.Namespace, settings: Settings) -> None:
    client = Client(settings.redis_url)
    work: Work = args.work
    try:
        async with asyncio.timeout(SECONDS):
            await client.start()
            await work(args, client)
    finally:
        await client.stop()
    if args.warns and not settings.keys_required:
        _note("this proxy does not require keys yet: set PROXY_ADMIN_KEY_FILE, or PROXY_REQUIRE_KEYS=true")


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lab_proxy", description="The proxy's virtual keys and their usage.")
    areas = top.add_subparsers(required=True, metavar="keys|usage")
    keys = areas.add_parser("keys", help="virtual keys: create, list, change, rotate, revoke, import")
    verbs = keys.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work: Work, description: str, warns: bool = False) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=description, description=description)
        made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        made.set_defaults(work=work, warns=warns)
        return made

    create = command("create", _create, "create a key; it is shown once", warns=True)
    create.add_argument("--owner", required=True, help="owner of the key; cached answers and usage belong to an owner")
    _add_spec_options(create)
    listed = command("list", _list, "show all keys, without their secrets")
    listed.add_argument("--owner", help="only keys of this owner")
    listed.add_argument("--all", action="store_true", help="include revoked and expired keys")
    change = command("change", _change, "change a key's limits; the value `none` removes a limit")
    change.add_argument("id")
    _add_spec_options(change)
    rotate = command("rotate", _rotate, "give a key a new secret; it is shown once")
    rotate.add_argument("id")
    rotate.add_argument("--grace", type=float, default=0, metavar="SECONDS", help="the old secret works so long (0)")
    revoke = command("revoke", _revoke, "end keys permanently, within a second in all proxy processes")
    revoke.add_argument("id", nargs="+")
    many = command("import", _import, "create a key for each line of a CSV file, all or none", warns=True)
    many.add_argument("file", type=Path, help="columns: owner (or name), and any of: " + ", ".join(SPEC_FIELDS[1:]))
    many.add_argument("--out", type=Path, help="new file for the keys, readable only by you; default: stdout")
    many.add_argument("--again", action="store_true", help="also create keys for owners that have an active key")
    _add_spec_options(many)

    usage = areas.add_parser("usage", help="tokens and cost by day, owner and model")
    days = (("from", "first day, such as 2026-11-01 (default: 30 days ago)"), ("to", "last day (default: today, UTC)"))
    for name, meaning in days:
        usage.add_argument(f"--{name}", dest=f"{name}_day", type=date.fromisoformat, help=meaning)
    for name in ("owner", "model"):
        usage.add_argument(f"--{name}", help=f"only this {name}")
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV with all columns")
    usage.set_defaults(work=_usage, warns=False)
    return top


def _add_spec_options(parser: argparse.ArgumentParser) -> None:
    options = {
        "name": "label of the key",
        "models": "allowed models: names or shell patterns, separated by commas (default: all)",
        "rpm": "requests per minute",
        "tpm": "tokens per minute",
        "concurrency": "concurrent requests",
        "budget-per-day-usd": "budget per day (UTC) in dollars",
        "budget-total-usd": "total budget in dollars",
        "expires": "expiry: 2026-12-31, a time with zone, or 30d",
        "namespace": "share cached answers with all keys of this namespace",
    }
    for name, meaning in options.items():
        parser.add_argument(f"--{name}", dest=name.replace("-", "_"), help=meaning, metavar=name.upper().split("-")[0])


def _spec_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The KeySpec fields of the command line; `none` and an empty text are null."""
    given = {name: getattr(args, name, None) for name in SPEC_FIELDS}
    return {name: None if value in {"none", ""} else value for name, value in given.items() if value is not None}


async def _create(args: argparse.Namespace, client: Client) -> None:
    ((key, secret),) = await KeyStore(client).create([key_spec(_spec_fields(args))])
    _show_secret(args, key, secret)


async def _list(args: argparse.Namespace, client: Client) -> None:
    found = [key for key in await KeyStore(client).list() if args.owner in {None, key.owner}]
    _show_keys(args, [key for key in found if args.all or key.public_fields()["state"] == "active"])


async def _change(args: argparse.Namespace, client: Client) -> None:
    _show_key(args, await KeyStore(client).change(args.id, _spec_fields(args)))


async def _rotate(args: argparse.Namespace, client: Client) -> None:
    _show_secret(args, *await KeyStore(client).rotate(args.id, args.grace))


async def _revoke(args: argparse.Namespace, client: Client) -> None:
    store = KeyStore(client)
    for key_id in args.id:  # an unknown id among them revokes none
        await store.get(key_id)
    _show_keys(args, [await store.revoke(key_id) for key_id in args.id])


async def _import(args: argparse.Namespace, client: Client) -> None:
    store = KeyStore(client)
    specs = _read_class(args.file, _spec_fields(args))
    if not args.again:
        have = {key.owner for key in await store.list() if key.public_fields()["state"] == "active"}
        if twice := sorted({each.owner for each in specs} & have):
            why = "already have an active key: --again creates another; nothing was changed"
            raise UsageError(f"{', '.join(twice[:5])} {why}")
    with contextlib.ExitStack() as undo:
        # Create the file before the keys: a key that cannot be written is lost.
        out: TextIO = io.StringIO()
        if args.out:
            try:
                descriptor = os.open(args.out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except OSError as error:
                raise UsageError(f"--out {args.out} cannot be created: {error.strerror}; nothing was changed") from None
            out = os.fdopen(descriptor, "w", encoding="utf-8", newline="")
            undo.callback(args.out.unlink)
            undo.callback(out.close)
        made = await store.create(specs)
        undo.pop_all()
    rows = [{"name": key.name or key.owner, "key": secret, "owner": key.owner, "id": key.id} for key, secret in made]
    if args.json and not args.out:
        _print_json(rows)
    else:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        if isinstance(out, io.StringIO):
            _print(out.getvalue().rstrip())
    out.close()
    _note(f"{len(rows)} keys created" + (f": only {args.out} has their secrets; keep it" if args.out else ""))


def _read_class(path: Path, defaults: dict[str, Any]) -> list[Any]:
    """One KeySpec for each line. `defaults`: fields of the command line, for lines that leave them out."""
    try:
        lines = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV in UTF-8: {error}") from None
    specs = []
    for number, line in enumerate(lines, 2):
        if None in line:
            raise UsageError(f"{path} line {number}: more values than columns; nothing was changed")
        given = {(name or "").strip().lower(): (value or "").strip() for name, value in line.items()}
        fields = defaults | {name: value for name, value in given.items() if value}
        fields.setdefault("owner", fields.get("name"))
        try:
            specs.append(key_spec(fields))
        except ProxyError as error:
            raise UsageError(f"{path} line {number}: {error.message}; nothing was changed") from None
    if not specs:
        raise UsageError(f"{path} has no line below its header")
    return specs


async def _usage(args: argparse.Namespace, client: Client) -> None:
    last = args.to_day or datetime.now(UTC).date()
    first = args.from_day or max(last, date.min + timedelta(days=29)) - timedelta(days=29)
    if not timedelta(0) <= last - first < timedelta(days=usage.MAX_DAYS):
        raise UsageError(f"--from to --to must span 1 to {usage.MAX_DAYS} days")
    rows = await usage.usage(client, first, last, owner=args.owner, model=args.model)
    if args.json:
        return _print_json({"total": usage.total(rows), "rows": rows})
    if args.csv:
        return _print(usage.as_csv(rows).rstrip())
    shown = [*rows, {"day": "total", "owner": "", "model": ""} | usage.total(rows)]
    costs = [row | {"cost_usd": "unpriced" if row["cost_usd"] is None else f"{row['cost_usd']:.6f}"} for row in shown]
    return _print_table(USAGE_COLUMNS, costs)


# ---- output


def _show_keys(args: argparse.Namespace, keys: list[Key]) -> None:
    fields = [key.public_fields() for key in keys]
    return _print_json(fields) if args.json else _print_table(COLUMNS, fields)


def _show_key(args: argparse.Namespace, key: Key) -> None:
    return _print_json(key.public_fields()) if args.json else _print_table(COLUMNS, [key.public_fields()])


def _show_secret(args: argparse.Namespace, key: Key, secret: str) -> None:
    if args.json:
        return _print_json(key.public_fields() | {"key": secret})
    _print_table(COLUMNS, [key.public_fields()])
    _print(secret)
    return _note("the key is shown only this once")


def _print_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Columns that are empty in all rows are left out, except the first."""
    texts = [[_cell(row.get(name)) for row in rows] for name in columns]
    shown = [[name, *cells] for name, cells in zip(columns, texts, strict=True) if name == columns[0] or any(cells)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in shown]
    for line in zip(*padded, strict=True):
        _print("  ".join(line).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _print_json(value: Any) -> None:
    _print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _note(text: str) -> None:
    sys.stderr.write(f"proxy: {text}\n")
