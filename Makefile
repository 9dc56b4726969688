# Each target is one call of `lab/run.sh`: it finds a Python, makes .venv if the command needs it, and runs `python -m lab`.
.PHONY: help lab start stop status logs models doctor keys usage test test-all check constraints clean up down test-stack test-cluster drill load load-cache load-stampede load-knee load-faults load-table load-compare load-report load-calibrate load-ui bench-engine bench-proxy bench-ui bench-tasks train-probe sbom k8s-render k8s-check

# On with 1 or yes, on make's command line or in the environment.
ON_GPU = $(filter-out 0 no off false,$(GPU))
ON_CLUSTER = $(filter-out 0 no off false,$(CLUSTER))

help: ## list these commands
	@echo "LLM Lab:"; awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

lab: ## install what is missing and start the lab; Ctrl-C stops it (another port: PROXY_PORT=8081 make lab; models of another server instead of the local ones: make lab REMOTE=https://…/v1)
	@sh lab/run.sh lab

start: ## start the lab in the background; returns when all services are ready
	@sh lab/run.sh start

stop: ## stop the lab, also one that another terminal started
	@sh lab/run.sh stop

status: ## show each service: state, process id, memory, uptime, address
	@sh lab/run.sh status

logs: ## follow the logs (of one service: make logs SERVICE=model)
	@sh lab/run.sh logs

models: ## list the models, or add some (make models ADD=NAME: a set such as lecture, a short name, owner/name on the hub, or a path)
	@sh lab/run.sh models

doctor: ## find problems that keep the lab from starting or running, with a remedy for each
	@sh lab/run.sh doctor

keys: ## create, list, change and revoke virtual keys (make keys ARGS="create --owner kim")
	@sh lab/run.sh keys

usage: ## show tokens and cost by day, owner and model (make usage ARGS="--csv")
	@sh lab/run.sh usage

test: ## run all tests that need no container (a selection: make test ARGS="-k cache")
	@sh lab/run.sh test

test-all: ## run the same tests with all generated cases; takes more than half an hour
	@sh lab/run.sh test --lane all

check: ## check lint, format, types and terms
	@sh lab/run.sh check

constraints: ## write the package versions of .venv to constraints.txt
	@sh lab/run.sh constraints

clean: ## stop the lab and remove .venv, .state and caches; runs/ stays
	@sh lab/run.sh clean

up: $(if $(ON_CLUSTER),secrets/ray_auth_token) ## start the lab in containers; returns when all are healthy (with a GPU: GPU=1 make up; several Ray nodes: CLUSTER=1 make up)
	@$(COMPOSE) up --build $(if $(WORKERS),--scale worker=$(WORKERS)) --wait --wait-timeout 900 || { $(COMPOSE) logs --tail=20; exit 1; }
	@echo "lab: ui http://127.0.0.1:$${UI_PORT:-8501}, proxy http://127.0.0.1:$${PROXY_PORT:-8080}; make down stops it"

down: ## stop and remove the containers (with their stored data: make down ARGS=-v)
	@docker compose --profile '*' down --remove-orphans $(ARGS)

test-stack: ## run the tests against containers; needs a Docker engine
	@sh lab/run.sh test --lane stack

test-cluster: ## run the tests of several Ray nodes and the upgrade drill; needs a Docker engine
	@sh lab/run.sh test --lane cluster

drill: ## replace a revision, a worker and each proxy of CLUSTER=1 make up under streams of 30 seconds; count the streams that are cut
	@sh lab/run.sh install && .venv/bin/python -m bench.drill $(ARGS)

sbom: ## write the packages of the images (CycloneDX) and their digests to dist/ (another tag: LAB_TAG=0.1.0 make sbom)
	@sh lab/run.sh install && .venv/bin/python -m lab.sbom $${LAB_TAG:-dev}

load: ## measure throughput of the running lab; every question is new (LOAD_USERS=4 LOAD_SECONDS=60 make load)
	@sh lab/run.sh load $(or $(WORKLOAD),throughput)

load-cache: ## measure throughput with the cache: questions repeat
	@sh lab/run.sh load caching

load-stampede: ## send identical requests at once and count the calls of the model: one is expected
	@sh lab/run.sh load stampede

load-knee: ## find the highest request rate that the lab keeps up with
	@sh lab/run.sh load knee

load-faults: ## pause redis, restart the proxy and kill a replica under load; report which requests fail, and for how long
	@sh lab/run.sh load faults

load-table: ## measure the effect of the cache as a table; takes 20 minutes (shorter: SECONDS=5 make load-table)
	@sh lab/run.sh load table $(SECONDS)

load-compare: ## compare two runs or groups of runs (make load-compare A=RUN,RUN,RUN B=RUN,RUN,RUN)
	@sh lab/run.sh load compare "$(A)" "$(B)"

load-report: ## show a finished run and write its report again (RUN=NAME; default: the last run)
	@sh lab/run.sh load report $(RUN)

load-calibrate: ## check the load generator against a mock with known times; needs no lab
	@sh lab/run.sh load calibrate

load-ui: ## open Locust's web page, on port 8089
	@sh lab/run.sh load web

bench-engine: ## measure the engine and transformers' own generation (parts: make bench-engine ARGS="--only decode1,ttft")
	@sh lab/run.sh install && GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-ACTIVE} .venv/bin/python -m bench.engine $(ARGS)

bench-proxy: ## measure the proxy and compare with its targets; needs wrk (parts: make bench-proxy ARGS="--only hits,misses")
	@sh lab/run.sh install && .venv/bin/python -m bench.proxy $(ARGS)

bench-ui: ## measure page switches and the memory of 20 sessions against the running lab (another proxy: make bench-ui ARGS="--proxy URL")
	@sh lab/run.sh install && .venv/bin/python -m bench.ui $(ARGS)

bench-tasks: ## measure the accuracy of the embedded models on held-out sentences and questions
	@sh lab/run.sh install && .venv/bin/python -m bench.tasks

train-probe: ## fit the sentiment probe on the embedding model's vectors; writes services/model/lab_model/encoders/sentiment.json
	@sh lab/run.sh install && .venv/bin/python -m bench.tasks.train_probe

k8s-render: ## print the manifests of an overlay of k8s/ (OVERLAY=kind, cpu or gpu)
	@command -v kubectl >/dev/null || { echo "lab: kubectl is not on PATH; this command needs it: https://kubernetes.io/docs/tasks/tools/" >&2; exit 1; }
	@kubectl kustomize k8s/overlays/$(or $(OVERLAY),kind)

k8s-check: ## check every overlay and combination of k8s/: schemas, KubeRay's rules, compose.yaml, settings
	@sh lab/run.sh test tests/k8s/test_k8s.py

# Without GPU=1 the model image is built for the CPU, which is gigabytes smaller. Key files in secrets/ are used if they exist.
COMPOSE = docker compose $(if $(ON_GPU)$(ON_CLUSTER),-f compose.yaml) $(if $(ON_GPU),-f compose.gpu.yaml) $(if $(ON_CLUSTER),-f compose.scale.yaml -f compose.cluster.yaml)
ifneq ($(and $(ON_GPU),$(ON_CLUSTER)),)
$(error GPU=1 and CLUSTER=1 exclude each other: several nodes with GPUs are for Kubernetes, see docs/kubernetes.md)
endif
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
ifneq ($(wildcard secrets/load_admin_key),)
up: export LOAD_ADMIN_KEY_FILE ?= ./secrets/load_admin_key
endif
ifneq ($(ON_CLUSTER),)
up: export RAY_AUTH_TOKEN ?= $(shell cat secrets/ray_auth_token)
endif

secrets/ray_auth_token: # of all Ray nodes; another one would be another cluster
	@mkdir -p -m 700 secrets && umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >$@
