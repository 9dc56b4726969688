"""Every question is a new one, so that no cache answers: how fast the model's answers come.

A locustfile: `python -m lab_load throughput`.
"""

from __future__ import annotations

from locust import task

from lab_load.asker import Asker


class Throughput(Asker):
    """Distinct questions, streamed answers."""

    scenario = "throughput"

    @task
    def ask_anew(self) -> None:
        self.ask(self.trial.fresh())
