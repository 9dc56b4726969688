"""`make bench-tasks`: measures the accuracy of the embedded models on the held-out sets of this folder.

The models are loaded into this process and called over their HTTP API. Sentences and questions were written for the
lab; the probe and the prompts were chosen without those of the test files.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import httpx2
from lab_model.models.catalogue import AppArgs, load_catalogue
from lab_model.models.kinds import Kind
from lab_model.models.loading import load

FOLDER = Path(__file__).parent


async def sentiment(ask: Any) -> None:
    for language in ("en", "ko"):
        lines = (FOLDER / f"sentiment-test.{language}.txt").read_text(encoding="utf-8").splitlines()
        results = await ask("sentiment-analysis", inputs=[line[2:] for line in lines])
        right = sum(
            (each[0]["label"] == "POSITIVE") == line.startswith("+") for each, line in zip(results, lines, strict=True)
        )
        report(f"sentiment-analysis, {language}", right, len(lines))


async def zero_shot(ask: Any) -> None:
    rows = [line.split("\t") for line in (FOLDER / "topics-test.txt").read_text(encoding="utf-8").splitlines()]
    for language in ("en", "ko"):
        own = [(label, text) for tongue, label, text in rows if tongue == language]
        labels = sorted({label for label, _ in own})
        results = await ask(
            "zero-shot-classification", inputs=[text for _, text in own], parameters={"candidate_labels": labels}
        )
        right = sum(each[0]["label"] == label for each, (label, _) in zip(results, own, strict=True))
        report(f"zero-shot-classification of {len(labels)} labels, {language}", right, len(own))


async def questions(ask: Any) -> None:
    rows = [json.loads(line) for line in (FOLDER / "questions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    for language in ("en", "ko"):
        own = [(row["context"], *each) for row in rows if row["lang"] == language for each in row["questions"]]
        inputs = [{"question": question, "context": context} for context, question, _ in own]
        results = await ask("question-answering", inputs=inputs)
        pairs = [(plain(found["answer"]), [plain(each) for each in answers])
                 for found, (_, _, answers) in zip(results, own, strict=True)]  # fmt: skip
        answerable = [(found, answers) for found, answers in pairs if answers]
        report(f"question-answering, answerable, {language}", sum(f in a for f, a in answerable), len(answerable))
        without = [found for found, answers in pairs if not answers]
        report(f"question-answering, without an answer, {language}", sum(not found for found in without), len(without))


def plain(answer: str) -> str:
    return answer.strip(" .,;:!?").lower().removeprefix("the ").removeprefix("a ")


def report(name: str, right: int, count: int) -> None:
    print(f"{name:<55} {right:>3} of {count:>3}  {right / count:>6.1%}", flush=True)  # noqa: T201


async def main() -> None:
    entries = {entry.kind: entry for entry in load_catalogue(None)}
    plan: dict[Kind, Any] = {"embedding": (sentiment, zero_shot), "chat": (questions,)}
    for kind, tasks in plan.items():
        with tempfile.TemporaryDirectory() as folder:
            args = AppArgs(entry=entries[kind], log_pipe=Path(folder) / "log", metrics_dir=Path(folder))
            app = load(args).app
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=600
        ) as http:

            async def ask(task: str, http: httpx2.AsyncClient = http, **body: Any) -> list[Any]:
                answer = await http.post(f"/v1/tasks/{task}", json=body)
                if answer.status_code != 200:
                    raise RuntimeError(answer.text)
                results: list[Any] = answer.json()["results"]
                return results

            for each in tasks:
                await each(ask)


if __name__ == "__main__":
    asyncio.run(main())
