"""Tasks: one cache entry for each input, as with embeddings; an entry is one result. Knows the answer's shape."""

import time
from typing import Any

import orjson

from ..cache.entry import Entry, are_counts
from ..errors import UpstreamBroken
from .context import Plan
from .embeddings import EmbeddingFetch

PER_INPUT = ("per_input_tokens", "per_input_completion_tokens")


class TaskFetch(EmbeddingFetch):
    """`{"model", "method", "results": [one for each input], "usage"}`, from cached and fetched results."""

    def entries(self, plan: Plan, answer: Any, units: list[Any]) -> list[Entry]:
        try:
            results, usage = answer["results"], answer["usage"]
            prompts, completions = (usage[name] for name in PER_INPUT)
            if not len(results) == len(prompts) == len(completions) == len(units) or not isinstance(results, list):
                raise ValueError("not one result for each input")
            if not are_counts([*prompts, *completions]):
                raise ValueError("not numbers of tokens")
            frame = {name: value for name, value in answer.items() if name not in {"results", "usage"}}
            now = time.time()
            orjson.dumps(frame)  # raises a TypeError here rather than when it is stored
            return [
                Entry(orjson.dumps(result), plan.target.ttl, now, {"tokens": tokens, "frame": frame}, plan.epoch)
                for result, *tokens in zip(results, prompts, completions, strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            name = plan.target.upstream
            raise UpstreamBroken(f"The upstream `{name}` did not answer with one result for each input.") from None

    def join(self, kept: list[Entry], order: list[int]) -> tuple[bytes, dict[str, Any]]:
        counts = [kept[place].metadata["tokens"] for place in order]
        prompts, completions = ([each[part] for each in counts] for part in (0, 1))
        usage: dict[str, Any] = {"prompt_tokens": sum(prompts), "completion_tokens": sum(completions)}
        usage |= {"total_tokens": sum(prompts) + sum(completions)}
        usage |= dict(zip(PER_INPUT, (prompts, completions), strict=True))
        frame = orjson.dumps(kept[0].metadata["frame"])
        results = b",".join(kept[place].body for place in order)
        return frame[:-1] + b',"results":[' + results + b'],"usage":' + orjson.dumps(usage) + b"}", usage
