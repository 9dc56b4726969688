"""The metrics of replicas on many nodes as one page. tests/k8s/test_serve.py asks real replicas."""

from __future__ import annotations

from lab_model.serving.metrics_sum import MetricsSum
from prometheus_client.parser import text_string_to_metric_families


def page(tokens: float, waiting: float, kv: float) -> str:
    return f"""\
# HELP vllm:generation_tokens_total Tokens generated.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{model_name="m"}} {tokens}
# HELP vllm:num_requests_waiting Requests in the queue.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{model_name="m"}} {waiting}
# HELP vllm:kv_cache_usage_perc Share of KV pages in use.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{model_name="m"}} {kv}
# HELP process_resident_memory_bytes Of the process.
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1e9
"""


def values(made: MetricsSum) -> list[float]:
    """Tokens, waiting, KV cache; nothing else is on the page."""
    families = list(text_string_to_metric_families(made.text().decode()))
    assert len(families) == 3
    return [family.samples[0].value for family in families]


def test_counters_and_gauges_add_up_and_the_fullest_cache_counts() -> None:
    made = MetricsSum()
    made.update({"a": page(3, 1, 0.5), "b": page(5, 2, 0.25)})
    assert values(made) == [8, 3, 0.5]


def test_a_replica_that_ended_stays_in_counters_alone() -> None:
    made = MetricsSum()
    made.update({"a": page(3, 1, 0.5), "b": page(5, 2, 0.25)})
    made.update({"b": page(6, 0, 0.25), "c": page(1, 0, 0)})
    assert values(made) == [3 + 6 + 1, 0, 0.25]


def test_a_replica_that_was_too_busy_once_is_not_counted_twice() -> None:
    made = MetricsSum()
    made.update({"a": page(3, 1, 0.5), "b": page(5, 2, 0.25)})
    made.update({"b": page(5, 2, 0.25)})
    made.update({"a": page(4, 1, 0.5), "b": page(5, 2, 0.25)})
    assert values(made) == [9, 3, 0.5]
