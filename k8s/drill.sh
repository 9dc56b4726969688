#!/usr/bin/env bash
# The upgrade drill against a real cluster with overlays/cpu or overlays/gpu: streams of 30 seconds while a changed setting
# rolls out, a Ray worker's pod is deleted and the proxies are restarted. Ends with 1 when a stream was cut.
#
#   PROXY=https://api.lab.example DRILL_KEY=sk-lab-… k8s/drill.sh [options of python -m bench.drill]
#
# PROXY must be an ingress or a load balancer: a port-forward leads to one pod, and is cut with it. Run it from a checkout
# with .venv (make test makes one). NAMESPACE: llm-lab unless set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PROXY:?base URL of the proxy: https://api.lab.example}" "${DRILL_KEY:?a virtual key}"
export K="kubectl -n ${NAMESPACE:-llm-lab}"

# serveConfigV2 with another value: Serve replaces the replicas in place. The operator sends it within seconds; then all
# applications are RUNNING again.
revision='$K get rayservice model -o yaml | sed -e "s/drain_timeout_seconds: 600/drain_timeout_seconds: 601/" -e t \
    -e "s/drain_timeout_seconds: 601/drain_timeout_seconds: 600/" | $K apply -f - &&
    sleep 20 && until $K get rayservice model -o jsonpath="{.status.activeServiceStatus.applicationStatuses.*.status}" |
    grep -qE "^RUNNING( RUNNING)*$"; do sleep 2; done'
# preStop drains the Ray node; the command returns when the pod is gone. KubeRay starts another.
worker='$K delete "$($K get pod -l llm-lab/service=model,ray.io/node-type=worker -o name | head -1)"'
proxies='$K rollout restart deployment/proxy && $K rollout status deployment/proxy --timeout=600s'

exec .venv/bin/python -m bench.drill --proxy "$PROXY" "$@" "revision=$revision" "worker=$worker" "proxies=$proxies"
