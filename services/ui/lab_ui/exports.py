"""A conversation as a file: JSONL of messages, Markdown, or a notebook whose cells send the same questions.

Knows turns and the answers that are shown. Knows nothing of pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import snippets
from .chat import COLUMN_NAMES, Turn


def jsonl(turns: Sequence[Turn]) -> str:
    """One line for each answer that is shown: `messages` in the format of OpenAI's fine-tuning, and `metadata` with the
    model and the figures."""
    lines = []
    for turn in turns:
        for column in range(len(turn.answers)):
            answer = turn.answer(column)
            if answer is None:
                continue
            messages = [*answer.request.get("messages", []), {"role": "assistant", "content": answer.text}]
            figures = {
                "model": answer.request.get("model"), "finish_reason": answer.finish_reason, "cache": answer.cache,
                "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
                "ttft_seconds": answer.ttft, "request_id": answer.request_id,
            }  # fmt: skip
            lines.append(json.dumps({"messages": messages, "metadata": figures}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def markdown(turns: Sequence[Turn], title: str) -> str:
    parts = [f"# {_one_line(title)}"]
    for turn in turns:
        parts.append("\n".join(f"> {line}" for line in turn.question.split("\n")))
        for column in range(len(turn.answers)):
            answer = turn.answer(column)
            if answer is not None:
                mark = f"{COLUMN_NAMES[column]}: " if len(turn.answers) > 1 else ""
                parts.append(f"**{mark}{answer.request.get('model', '')}**\n\n{answer.text}")
    return "\n\n".join(parts) + "\n"


def notebook(turns: Sequence[Turn], title: str, proxy_url: str) -> str:
    """A notebook (nbformat 4.5): one code cell for each question, with the received answer as its output."""
    cells = [_cell("markdown", 0, f"# {_one_line(title)}\n\n`pip install openai`")]
    for turn in turns:
        for column in range(len(turn.answers)):
            answer = turn.answer(column)
            if answer is not None and "messages" in answer.request:
                output = {"output_type": "stream", "name": "stdout", "text": _lines(answer.text + "\n")}
                cell = _cell("code", len(cells), snippets.python(answer.request, proxy_url))
                cells.append(cell | {"execution_count": None, "outputs": [output]})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False)


def _one_line(title: str) -> str:
    return " ".join(title.split())


def _cell(kind: str, number: int, source: str) -> dict[str, Any]:
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(source)}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
