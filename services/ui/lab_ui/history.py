"""Converts conversations to JSON for the browser's storage, and back.

The stored JSON is untrusted: any shape is accepted, and what cannot be read is left out. Alternatives of tokens are not
stored, because they are large. A running answer is found again by its id as long as the ui keeps it in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from .answer import Answer, Fault, State
from .chat import COLUMN_NAMES, MAX_COLUMNS, MAX_QUESTION, Turn

MAX_TURNS, MAX_SIBLINGS, MAX_TEXT = 200, 20, 200_000
_NUMBERS = ("prompt_tokens", "completion_tokens", "cached_tokens", "started", "first", "last", "ended")
_TEXTS = ("text", "state", "finish_reason", "cache", "request_id")


def dump(id: str, turns: Sequence[Turn], columns: int) -> dict[str, Any]:  # noqa: A002 - the field's name
    """The conversation as JSON; empty if it has no turns."""
    if not turns:
        return {}
    return {
        "id": id,
        "title": turns[0].question[:80],
        "columns": columns,
        "turns": [
            {
                "question": turn.question,
                "shown": turn.shown,
                "answers": [[_dump_answer(answer) for answer in siblings] for siblings in turn.answers],
            }
            for turn in turns
        ],
    }


def load(data: Any, find: Callable[[str], Answer | None]) -> tuple[str, list[Turn], int] | None:
    """Id, turns and number of columns of a stored conversation; None if `data` is not one. `find`: returns the answer
    with an id if it is still in memory."""
    if not isinstance(data, Mapping) or not isinstance(data.get("id"), str) or not isinstance(data.get("turns"), list):
        return None
    turns = []
    for stored in data["turns"][-MAX_TURNS:]:
        if not isinstance(stored, Mapping) or not isinstance(stored.get("question"), str):
            continue
        answers = stored.get("answers")
        columns = [
            [_load_answer(each, find) for each in siblings[:MAX_SIBLINGS] if isinstance(each, Mapping)]
            for siblings in (answers if isinstance(answers, list) else [])[:MAX_COLUMNS]
            if isinstance(siblings, list)
        ]
        columns = [siblings for siblings in columns if siblings]
        if not columns:
            continue
        turn = Turn(stored["question"][:MAX_QUESTION], columns)
        shown = stored.get("shown")
        if isinstance(shown, list) and len(shown) == len(columns):
            for column, place in enumerate(shown):
                if isinstance(place, int) and 0 <= place < len(columns[column]):
                    turn.shown[column] = place
        turns.append(turn)
    columns_shown = data.get("columns")
    if not isinstance(columns_shown, int) or not 1 <= columns_shown <= len(COLUMN_NAMES):
        columns_shown = 1
    return (data["id"][:64], turns, columns_shown) if turns else None


def _dump_answer(answer: Answer) -> dict[str, Any]:
    kept: dict[str, Any] = {name: getattr(answer, name) for name in (*_TEXTS, *_NUMBERS)}
    kept |= {"id": answer.id, "request": dict(answer.request)}
    if answer.fault:
        kept["fault"] = answer.fault.kind
    return {name: value for name, value in kept.items() if value is not None}


def _load_answer(stored: Mapping[str, Any], find: Callable[[str], Answer | None]) -> Answer:
    if isinstance(stored.get("id"), str) and (live := find(stored["id"])) is not None:
        return live
    request = stored.get("request")
    answer = Answer(dict(request) if isinstance(request, Mapping) else {}, None)
    for name in _TEXTS:
        if isinstance(stored.get(name), str):
            setattr(answer, name, stored[name][:MAX_TEXT])
    for name in _NUMBERS:
        if isinstance(stored.get(name), int | float):
            setattr(answer, name, stored[name])
    if answer.state not in get_args(State) or answer.state in {"waiting", "streaming"}:
        answer.state = "stopped"  # the process that received it has ended
    if isinstance(stored.get("fault"), str) and answer.state == "failed":
        answer.fault = Fault("interrupted")
    answer.end()
    return answer
