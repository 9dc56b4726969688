"""Some questions are asked often, most seldom: what the cache makes of it.

A locustfile: `python -m lab_load caching`. Zipf's law over LOAD_PROMPTS questions, temperature 0.
"""

from __future__ import annotations

from locust import task

from lab_load.asker import Asker


class Caching(Asker):
    """The same questions again and again, as people ask them."""

    scenario = "caching"
    by_cache = True

    @task
    def ask_again(self) -> None:
        self.ask(self.trial.zipf.draw())
