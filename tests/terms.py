"""Find words of our own for known things: `python tests/terms.py`, part of `make check`, prints them and exits with 1.

NAMES may not be a part of any name in the code of services, lab, load and bench: module, class, function, variable.
PHRASES may not stand in their comments, docstrings and log lines. Each word has the standard term beside it.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("services", "lab", "load", "bench")

# Part of a name (snake_case or CamelCase) -> what to write.
NAMES = {
    "aloft": "started", "apart": "detach", "bills": "billing", "doorkeeper": "authenticator",
    "obituary": "failure report", "recall": "plan_cache", "roles": "protocols", "said": "reported, headers, answer",
    "spool": "disk_queue", "tally": "reconciliation, usage", "told": "reported", "way": "plan, path", "ways": "planner",
    "wishes": "cache_control", "heard": "received", "unheard": "failed",
}  # fmt: skip
# In comments and strings -> what to write.
PHRASES = {
    r"\bwho leaves\b": "a client that disconnects", r"\bis said\b": "is reported", r"\bstands? over\b": "overrides",
    r"\bburns? nothing\b": "does not count", r"\bgive_back\b": "release", r"\bways of a request\b": "plans",
    r"\brides? along\b": "is sent with", r"\baloft\b": "started",
}  # fmt: skip
KEPT = {"ledger_spool_bytes"}  # the name of a setting: those stay
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def examine(path: Path) -> Iterator[str]:
    """`FILE:LINE: word -> term` of each old word in one file."""
    where = path.relative_to(ROOT)
    for part in where.with_suffix("").parts:
        yield from (f"{where}: {word} -> {NAMES[word]}" for word in _parts(part) if word in NAMES)
    source = path.read_text("utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.NAME and token.string not in KEPT:
            yield from (f"{where}:{line}: {token.string}: {word} -> {NAMES[word]}"
                        for word in _parts(token.string) if word in NAMES)  # fmt: skip
        elif token.type in {tokenize.COMMENT, tokenize.STRING}:
            for phrase, term in PHRASES.items():
                if re.search(phrase, token.string):
                    yield f"{where}:{line}: {phrase} -> {term}"


def _parts(name: str) -> list[str]:
    return [part.lower() for part in _PART.findall(name)]


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *(f"{place}/**.py" for place in PLACES)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = [line for name in listed.split("\0") if name and (ROOT / name).exists() for line in examine(ROOT / name)]
    for line in found:
        print(line)  # noqa: T201 - the command's output
    if found:
        print(f"{len(found)} old terms: write what stands behind the arrow")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
