"""Write Grafana's dashboards from the tables below: `python obs/dashboards.py`.

A row of a table is one panel: title, unit, and its queries by legend. tests/obs runs each query against a real
Prometheus that scrapes a running lab, and compares the files with what this makes of the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3  # of a panel, in Grafana's grid of 24 columns

Panel = tuple[str, str, dict[str, str]]  # title, Grafana's unit, legend -> PromQL


def _rate(metric: str, by: str = "", where: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{where}}}[$__rate_interval]))"


def _quantiles(metric: str, where: str = "") -> dict[str, str]:
    buckets = _rate(f"{metric}_bucket", "le", where)
    return {f"p{share}": f"histogram_quantile(0.{share}, {buckets})" for share in (50, 95, 99)}


_HITS = _rate("lab_proxy_requests_total", where='cache=~"hit|collapsed"')
_CACHEABLE = _rate("lab_proxy_requests_total", where='cache=~"hit|collapsed|miss"')

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": (
        "Lab: overview",
        (
            ("Requests", "reqps", {"{{route}}": _rate("lab_proxy_requests_total", "route")}),
            ("Answers by status", "reqps", {"{{status}}": _rate("lab_proxy_requests_total", "status")}),
            ("In flight", "short", {"{{instance}}": "lab_proxy_in_flight"}),
            ("Time to the end of an answer", "s", _quantiles("lab_proxy_request_seconds")),
            ("Time to the first token", "s", _quantiles("lab_proxy_ttft_seconds")),
            ("The proxy's own time", "s", _quantiles("lab_proxy_overhead_seconds")),
            ("Calls of upstreams", "reqps", {
                "{{upstream}} {{outcome}}": _rate("lab_proxy_upstream_calls_total", "upstream, outcome"),
            }),
            ("Retries and fallbacks", "reqps", {
                "retries of {{upstream}}": _rate("lab_proxy_upstream_retries_total", "upstream"),
                "{{upstream}} answered by {{answered}}": _rate("lab_proxy_fallbacks_total", "upstream, answered"),
            }),
            ("Circuit breakers", "bool", {"{{upstream}}": "max by (upstream) (lab_proxy_breaker_open)"}),
            ("Processes that answer", "short", {"{{job}}": "sum by (job) (up)"}),
            ("Draining", "bool", {"{{instance}}": "lab_proxy_draining"}),
            ("Reloads of files", "short", {
                "{{file}}": "max by (file) (lab_proxy_generation)",
                "{{file}} is faulty": "max by (file) (lab_proxy_reload_failing)",
            }),
        ),
    ),
    "model": (
        "Lab: model",
        (
            ("Running", "short", {"{{model_name}}": "sum by (model_name) (vllm:num_requests_running)"}),
            ("Waiting", "short", {"{{model_name}}": "sum by (model_name) (vllm:num_requests_waiting)"}),
            ("KV cache in use", "percentunit", {"{{model_name}}": "max by (model_name) (vllm:kv_cache_usage_perc)"}),
            ("Tokens", "short", {
                "{{model_name}} prompt": _rate("vllm:prompt_tokens_total", "model_name"),
                "{{model_name}} generated": _rate("vllm:generation_tokens_total", "model_name"),
            }),
            ("Time to the first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
            ("Time to the end of a generation", "s", _quantiles("vllm:e2e_request_latency_seconds")),
            ("Time in the queue", "s", _quantiles("vllm:request_queue_time_seconds")),
            ("Time in prefill", "s", _quantiles("vllm:request_prefill_time_seconds")),
            ("Time in decode", "s", _quantiles("vllm:request_decode_time_seconds")),
            ("Requests", "reqps", {
                "{{model_name}} {{endpoint}}": _rate("lab_model_requests_total", "model_name, endpoint"),
            }),
            ("Ends of generations", "reqps", {
                "{{finished_reason}}": _rate("vllm:request_success_total", "finished_reason"),
            }),
            ("Hits of the prefix cache", "percentunit", {
                "{{model_name}}": _rate("vllm:prefix_cache_hits_total", "model_name")
                + " / "
                + _rate("vllm:prefix_cache_queries_total", "model_name"),
            }),
            ("Preemptions", "short", {"{{model_name}}": _rate("vllm:num_preemptions_total", "model_name")}),
            ("Failed steps", "short", {"{{model_name}}": _rate("lab_model_engine_faults_total", "model_name")}),
        ),
    ),
    "cache": (
        "Lab: cache",
        (
            ("Hit ratio (hits and shared answers)", "percentunit", {"hit ratio": f"{_HITS} / {_CACHEABLE}"}),
            ("Requests by outcome", "reqps", {"{{cache}}": _rate("lab_proxy_requests_total", "cache")}),
            ("Tokens by source", "short", {"{{source}}": _rate("lab_proxy_tokens_total", "source")}),
            ("Time of a hit", "s", _quantiles("lab_proxy_request_seconds", 'cache="hit"')),
            ("Time of a miss", "s", _quantiles("lab_proxy_request_seconds", 'cache="miss"')),
            ("Round trip to redis", "s", _quantiles("lab_proxy_redis_seconds")),
            ("Redis answers", "bool", {"{{instance}}": "lab_proxy_redis_up"}),
            ("Failures of redis", "short", {"{{operation}}": _rate("lab_proxy_redis_errors_total", "operation")}),
        ),
    ),
    "limits": (
        "Lab: limits and cost",
        (
            ("Refused by a limit", "reqps", {"{{reason}}": _rate("lab_proxy_limits_refused_total", "reason")}),
            ("Cost of upstream calls in an hour", "currencyUSD", {
                "{{upstream}} {{model}}": "sum by (upstream, model) (increase(lab_proxy_cost_usd_total[1h]))",
            }),
            ("Cost since the start", "currencyUSD", {"{{upstream}}": "sum by (upstream) (lab_proxy_cost_usd_total)"}),
            ("Tokens of upstreams", "short", {
                "{{model}} {{kind}}": _rate("lab_proxy_tokens_total", "model, kind", 'source="upstream"'),
            }),
            ("Tokens that cost nothing", "short", {
                "{{source}}": _rate("lab_proxy_tokens_total", "source", 'source!="upstream"'),
            }),
            ("Interrupted calls, reconciled", "reqps", {"{{outcome}}": _rate("lab_proxy_reconciled_total", "outcome")}),
            ("Refused answers", "reqps", {"{{status}}": _rate("lab_proxy_requests_total", "status", 'status=~"4.."')}),
        ),
    ),
    "load": (
        "Lab: under load",
        (
            ("Answers", "reqps", {"ok": _rate("lab_proxy_requests_total", where='status="200"'),
                                  "failed": _rate("lab_proxy_requests_total", where='status=~"5.."')}),
            ("Generated tokens", "short", {"model": _rate("vllm:generation_tokens_total"),
                                           "callers": _rate("lab_proxy_tokens_total", where='kind="completion"')}),
            ("In flight and waiting", "short", {
                "in the proxies": "sum(lab_proxy_in_flight)",
                "in the batch": "sum(vllm:num_requests_running)",
                "in the queue": "sum(vllm:num_requests_waiting)",
            }),
            ("First token: callers", "s", _quantiles("lab_proxy_ttft_seconds", 'cache!="hit"')),
            ("First token: model", "s", _quantiles("vllm:time_to_first_token_seconds")),
            ("Time that requests wait for upstreams", "s", _quantiles("lab_proxy_upstream_seconds")),
            ("In flight by proxy", "short", {"{{instance}}": "lab_proxy_in_flight"}),
            ("KV cache in use", "percentunit", {"{{model_name}}": "max by (model_name) (vllm:kv_cache_usage_perc)"}),
        ),
    ),
}  # fmt: skip


def dashboard(name: str) -> dict[str, Any]:
    """Grafana's JSON of one dashboard."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"lab-{name}",
        "title": title,
        "tags": ["llm-lab"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": []},
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "title": "Lab", "tags": ["llm-lab"], "asDropdown": True, "keepTime": True}],
        "panels": [
            {
                "id": place + 1,
                "title": label,
                "type": "timeseries",
                "datasource": DATASOURCE,
                "gridPos": {
                    "x": place % COLUMNS * WIDTH,
                    "y": place // COLUMNS * HEIGHT,
                    "w": WIDTH,
                    "h": HEIGHT,
                },
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
                    for at, (legend, query) in enumerate(queries.items())
                ],
            }
            for place, (label, unit, queries) in enumerate(panels)
        ],
    }


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text(each), encoding="utf-8")
