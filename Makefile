# Every target is a line: `lab/run.sh` finds a Python, makes .venv where the command needs it, and runs `python -m lab`.
.PHONY: help lab start stop status logs doctor test check constraints clean

help: ## list these commands
	@echo "LLM Lab:"; awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

lab: ## install what is missing, start everything, Ctrl-C stops it (other port: PROXY_PORT=8081 make lab)
	@sh lab/run.sh lab

start: ## the same in the background; returns when all services are ready
	@sh lab/run.sh start

stop: ## stop what runs, however it was started
	@sh lab/run.sh stop

status: ## what runs: state, process, memory, uptime, address
	@sh lab/run.sh status

logs: ## follow the logs; of one service: make logs SERVICE=model
	@sh lab/run.sh logs

doctor: ## what would keep the lab from starting, and what to do (exit codes: .venv/bin/python -m lab doctor --help)
	@sh lab/run.sh doctor

test: ## install what the tests need and run them (some of them: make test ARGS="-k cache")
	@sh lab/run.sh test

check: ## lint, format, types
	@sh lab/run.sh check

constraints: ## write the exact versions in .venv to constraints.txt
	@sh lab/run.sh constraints

clean: ## stop what runs and remove .venv, .state and caches; runs/ stays
	@sh lab/run.sh clean
