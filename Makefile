# Every target is a line: `lab/run.sh` finds a Python, makes .venv where the command needs it, and runs `python -m lab`.
.PHONY: help lab start stop status logs models doctor keys usage test test-all check constraints clean up down test-stack load load-cache load-stampede load-knee load-faults load-table load-compare load-report load-calibrate load-ui bench-engine bench-proxy bench-ui bench-tasks train-probe sbom k8s-render k8s-check

help: ## list these commands
	@echo "LLM Lab:"; awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

lab: ## install what is missing and start the lab; Ctrl-C stops it (another port: PROXY_PORT=8081 make lab; without a model of its own: make lab REMOTE=https://…/v1)
	@sh lab/run.sh lab

start: ## start the lab in the background; returns when all services are ready
	@sh lab/run.sh start

stop: ## stop the lab, however it was started
	@sh lab/run.sh stop

status: ## show each service: state, process id, memory, uptime, address
	@sh lab/run.sh status

logs: ## follow the logs (of one service: make logs SERVICE=model)
	@sh lab/run.sh logs

models: ## list the models, or add one (make models ADD=lecture: a set, a short name, owner/name of a hub, or a path)
	@sh lab/run.sh models

doctor: ## find what keeps the lab from starting or running, and say what to do
	@sh lab/run.sh doctor

keys: ## make, list, change and revoke virtual keys (make keys ARGS="create --owner kim")
	@sh lab/run.sh keys

usage: ## show tokens and cost by day, owner and model (make usage ARGS="--csv")
	@sh lab/run.sh usage

test: ## run all tests that need no container (some of them: make test ARGS="-k cache")
	@sh lab/run.sh test

test-all: ## run the same tests with all generated cases: more than half an hour
	@sh lab/run.sh test --lane all

check: ## check lint, format, types and terms
	@sh lab/run.sh check

constraints: ## write the exact versions in .venv to constraints.txt
	@sh lab/run.sh constraints

clean: ## stop the lab and remove .venv, .state and caches; runs/ stays
	@sh lab/run.sh clean

up: ## start the lab in containers; returns when all are healthy (with a GPU: GPU=1 make up)
	@$(COMPOSE) up --build --wait --wait-timeout 900 || { $(COMPOSE) logs --tail=20; exit 1; }
	@echo "lab: ui http://127.0.0.1:$${UI_PORT:-8501}, proxy http://127.0.0.1:$${PROXY_PORT:-8080}; make down ends it"

down: ## stop and remove the containers (with their stored data: make down ARGS=-v)
	@docker compose --profile '*' down --remove-orphans $(ARGS)

test-stack: ## run the tests against containers; needs a Docker engine
	@sh lab/run.sh test --lane stack

sbom: ## write what the images hold (CycloneDX) and their digests to dist/ (of another tag: LAB_TAG=0.1.0 make sbom)
	@sh lab/run.sh install && .venv/bin/python -m lab.sbom $${LAB_TAG:-dev}

load: ## measure throughput: put load on the running lab, every question new (LOAD_USERS=4 LOAD_SECONDS=60 make load)
	@sh lab/run.sh load $(or $(WORKLOAD),throughput)

load-cache: ## measure the cache: the same with questions that repeat
	@sh lab/run.sh load caching

load-stampede: ## identical requests at once: one call of the model
	@sh lab/run.sh load stampede

load-knee: ## find the rate that the lab keeps up with
	@sh lab/run.sh load knee

load-faults: ## pause redis, end the proxy and a replica under load; what fails, and for how long
	@sh lab/run.sh load faults

load-table: ## the effect of the cache as a table: 20 minutes (SECONDS=5 make load-table for a look)
	@sh lab/run.sh load table $(SECONDS)

load-compare: ## compare two runs or groups of runs (make load-compare A=RUN,RUN,RUN B=RUN,RUN,RUN)
	@sh lab/run.sh load compare "$(A)" "$(B)"

load-report: ## show a finished run and write its report again (RUN=NAME; without: the last one)
	@sh lab/run.sh load report $(RUN)

load-calibrate: ## the load generator before a mock with known times; needs no lab
	@sh lab/run.sh load calibrate

load-ui: ## open Locust's web page, on port 8089
	@sh lab/run.sh load web

bench-engine: ## measure the engine beside transformers' own (parts: make bench-engine ARGS="--only decode1,ttft")
	@sh lab/run.sh install && GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-ACTIVE} .venv/bin/python -m bench.engine $(ARGS)

bench-proxy: ## measure the proxy beside its targets; needs wrk (parts: make bench-proxy ARGS="--only hits,misses")
	@sh lab/run.sh install && .venv/bin/python -m bench.proxy $(ARGS)

bench-ui: ## measure a page switch and the memory of 20 sessions, before the running lab (another proxy: make bench-ui ARGS="--proxy URL")
	@sh lab/run.sh install && .venv/bin/python -m bench.ui $(ARGS)

bench-tasks: ## how often the embedded models are right on held-out sentences and questions
	@sh lab/run.sh install && .venv/bin/python -m bench.tasks

train-probe: ## fit the sentiment probe over the embedding model's vectors; writes services/model/lab_model/encoders/sentiment.json
	@sh lab/run.sh install && .venv/bin/python -m bench.tasks.train_probe

k8s-render: ## print the manifests of an overlay of k8s/ (OVERLAY=kind, cpu or gpu)
	@command -v kubectl >/dev/null || { echo "lab: kubectl is not here; it renders k8s/: https://kubernetes.io/docs/tasks/tools/" >&2; exit 1; }
	@kubectl kustomize k8s/overlays/$(or $(OVERLAY),kind)

k8s-check: ## check every overlay and combination of k8s/: schemas, KubeRay's rules, compose.yaml, settings
	@sh lab/run.sh test tests/k8s/test_k8s.py

# Without GPU=1 the model's image is built for the CPU, which spares gigabytes. Keys in secrets/ are taken.
ON_GPU = $(filter-out 0 no off false,$(GPU))
COMPOSE = docker compose $(if $(ON_GPU),-f compose.yaml -f compose.gpu.yaml)
ifeq ($(ON_GPU),)
up: export MODEL_BASE_IMAGE ?= python:3.11-slim-bookworm
up: export TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
endif
ifneq ($(wildcard secrets/openai_api_key),)
up: export OPENAI_API_KEY_FILE ?= ./secrets/openai_api_key
endif
ifneq ($(wildcard secrets/proxy_admin_key),)
up: export PROXY_ADMIN_KEY_FILE ?= ./secrets/proxy_admin_key
endif
