"""Sums the metrics of many replicas into one page. Knows Prometheus text. Knows nothing of Ray or HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

OURS = ("lab_model_", "vllm:")  # not those of Python and of the process, whose sum has no meaning
LARGEST = {"vllm:kv_cache_usage_perc"}  # the fullest replica counts; all other values are added

Key = tuple[str, tuple[tuple[str, str], ...]]  # name of the sample, its labels
Values = dict[Key, float]


class MetricsSum:
    """Counters of a replica that has ended stay in the sum; else it would fall, which Prometheus takes for a
    restart."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, str]] = {}  # name -> documentation, type
        self._of_family: dict[Key, str] = {}
        self._replicas: dict[str, Values] = {}
        self._ended: dict[str, Values] = {}  # last counters of each replica that no longer answers

    def update(self, pages: Mapping[str, str]) -> None:
        """pages: the text of each replica that answers now, by its id."""
        for id_ in set(self._replicas) - set(pages):
            values = self._replicas.pop(id_).items()
            self._ended[id_] = {k: v for k, v in values if self._families[self._of_family[k]][1] != "gauge"}
        for id_, page in pages.items():
            self._ended.pop(id_, None)  # it had not ended but was busy
            self._replicas[id_] = dict(self._read(page))

    def text(self) -> bytes:
        """The sum as Prometheus text."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client: a family for each metric."""
        total: Values = {}
        for values in (*self._ended.values(), *self._replicas.values()):
            for key, value in values.items():
                if self._of_family[key] in LARGEST:
                    total[key] = max(total.get(key, value), value)
                else:
                    total[key] = total.get(key, 0.0) + value
        families = {name: Metric(name, text, kind) for name, (text, kind) in self._families.items()}
        for (sample, labels), value in total.items():
            families[self._of_family[sample, labels]].add_sample(sample, dict(labels), value)
        yield from families.values()

    def _read(self, page: str) -> Iterator[tuple[Key, float]]:
        for family in text_string_to_metric_families(page):
            if not family.name.startswith(OURS):
                continue
            self._families[family.name] = family.documentation, family.type
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # the time of a start, which does not add up
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    self._of_family[key] = family.name
                    yield key, sample.value
