"""Commands for the models of the catalogue: `python -m lab_model.cli list | add NAME | fetch [ID]`.

`make models` runs it. MODEL_FOLDER and MODEL_CATALOGUE_FILE set the catalogue.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from .errors import CatalogueError
from .models.catalogue import Entry, load_catalogue
from .models.fetching import add, fetch, known
from .models.progress import Progress
from .models.sizes import size_of
from .models.sources import resolve_source
from .settings import Settings, wrong_settings

FAILED, WRONG_SETTING = 1, 2


def main(argv: Sequence[str]) -> int:
    """Run a command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab_model.cli", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the catalogue, and the models that can be added by a short name")
    adding = commands.add_parser("add", help="download a model, check it, and add it to the catalogue")
    adding.add_argument("name", help="a short name, owner/name on a hub, or a local folder or .gguf file")
    adding.add_argument("--kind", help="chat, base, embedding, …; default: read from the model's files")
    fetching = commands.add_parser("fetch", help="download the weights of all models of the catalogue, or of one")
    fetching.add_argument("name", nargs="?", default="")
    for each in (adding, fetching):
        each.add_argument("--progress-file", type=Path)
    options = parser.parse_args(argv)
    try:
        settings = Settings()
        entries = load_catalogue(settings.catalogue_file, settings.folder)
        if options.command == "list":
            return show(entries, settings.folder)
        report = reporter(options.progress_file)
        if options.command == "add":
            if settings.folder is None:
                raise CatalogueError("MODEL_FOLDER is not set; it is the folder for added models")
            for entry in add(options.name, settings.folder, report, kind=options.kind):
                terms = f", licence: {entry.licence}" if entry.licence else ""
                say(f"{entry.id} is in the catalogue ({entry.kind}{terms}); the first request loads it")
            return 0
        wanted = [entry for entry in entries if options.name in ("", entry.id)]
        if not wanted:
            raise CatalogueError(f"{options.name} is not in the catalogue")
        for entry in wanted:
            say(f"{entry.id} is in {fetch(entry, settings.folder, report).folder}")
    except ValidationError as error:
        for line in wrong_settings(error):
            say(line)
        return WRONG_SETTING
    except CatalogueError as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        say("interrupted; the same command continues the download")
        return 130
    return 0


def show(entries: Sequence[Entry], folder: Path | None) -> int:
    """Print the catalogue, one line for each model, then the short names. Returns the exit code."""
    for entry in entries:
        try:
            size = size_of(entry, resolve_source(entry, folder))
            facts = f"{size.parameters / 1e6:.0f} M parameters, {size.disk / 1e6:.0f} MB on disk"
        except CatalogueError as error:
            facts = f"not downloaded: {str(error).removeprefix(f'{entry.id}: ')}"
        print(f"{entry.id:28} {entry.kind:10} {facts}{f', {entry.licence}' if entry.licence else ''}")  # noqa: T201
    table = known()
    print("\nto add (make models ADD=<name>):")  # noqa: T201
    for name, model in table.models.items():
        languages = ", ".join(model.languages)
        print(f"{name:28} {model.kind:10} {model.megabytes} MB, {model.licence}; {languages}")  # noqa: T201
    for name, members in table.sets.items():
        print(f"{name:28} {'set':10} {', '.join(members)}")  # noqa: T201
    print("or <owner>/<name>[/<file>.gguf][@<revision>] on a hub, or a local folder or .gguf file")  # noqa: T201
    return 0


def reporter(file: Path | None) -> Callable[[str, float | None], None]:
    """A function that reports progress to the file and to stderr: on a terminal one line that changes, else one line
    for each 10 %."""
    progress, last = Progress(file), ""

    def report(what: str, share: float | None) -> None:
        nonlocal last
        progress.report(what, share)
        terminal = sys.stderr.isatty()
        percent = "" if share is None else f" {int(share * 100) if terminal else int(share * 10) * 10} %"
        line = f"model: {what}{percent}"
        if line != last:
            last = line
            done = share is None or share >= 1
            end = "\n" if done or not terminal else ""
            print(f"\r{line}   " if terminal else line, end=end, file=sys.stderr, flush=True)  # noqa: T201

    return report


def say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
