# Select-MoE. Bare `make` lists the targets. No logic here: scripts/ and python do the work.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PRESET ?= quick
DATA ?=
TARGET ?= cpu
TAG ?= select-moe:dev

.DEFAULT_GOAL := help
.PHONY: help setup run down test unit model-test warmup-test components-test integration docs-test browser-test study-kill study-kill-route study-judge study-test lint format types compile lock \
        image image-test chart-test sbom licences clean bench-s3 bench-warmup bench-routing bench-routing-memory bench-router-data bench-convert bench-forward bench-encoding bench-near-duplicates bench-ingest kind-up kind-run kind-test kind-logs kind-down images-lock

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: .venv/.done ## build .venv from requirements.lock (CPU torch where there is no GPU); no root needed
.venv/.done: requirements.lock requirements-demo.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh

run: setup ## the whole pipeline on this machine: PRESET=quick|full, DATA=path/to/rows.jsonl
	@$(PYTHON) -m pipelines.local run preset=$(PRESET) $(if $(DATA),data=$(DATA)) $(ARGS)

down: setup ## stop the servers that `make run` started
	@$(PYTHON) -m pipelines.local down

test: lint types unit integration docs-test ## the tests that need no root, in some ten minutes

unit: setup ## fast tests, no servers
	@$(PYTHON) -m pytest tests/unit components -q --ignore-glob='*/test_component_local.py'

model-test: setup ## transformers' own model tests and what else a transformers model promises (fetches its sdist once)
	@$(PYTHON) -m tests.models.fetch >/dev/null
	@$(PYTHON) -m pytest tests/models -q -rs -W ignore --dist load

warmup-test: setup ## warm-up killed, on a full disk, with LoRA into route; stages 1 and 2 by the predecessor's commands
	@$(PYTHON) -m pytest tests/warmup -q

components-test: setup ## every component alone through KFP's local runner, with its unit tests
	@$(PYTHON) -m pytest components -q

integration: setup ## the compiled pipeline with real MLflow and S3 servers
	@$(PYTHON) -m pytest tests/integration -q

docs-test: setup ## the commands of README and docs
	@$(PYTHON) -m pytest tests/docs -q

study-kill: setup study-kill-route ## kill -9 in the middle of every stage, twice the time of `make run` (PRESET=quick), after study-kill-route
	@$(PYTHON) -m bench.study_kill .selectmoe/study-kill preset=$(PRESET)

study-kill-route: setup ## 200 random kill -9 of a routing run: same bytes, at most one commit interval lost
	@$(PYTHON) -m bench.study_kill_route .selectmoe/study-kill-route $(ARGS)

study-judge: setup ## which gate loss makes a judge? two hours of two idle cores at most; goes on after a kill; writes docs/experiments/judge.md
	@$(PYTHON) -m bench.study_judge .selectmoe/study-judge

study-test: setup ## the study of gate losses on a tiny model, killed and started again
	@$(PYTHON) -m pytest tests/study -q -n 0

browser-test: setup ## a run's pages in MLflow, seen with Chromium (apt-get install chromium chromium-driver)
	@$(PYTHON) -m pytest tests/browser -q -n 0

lint: setup ## ruff: format and rules
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .

format: setup ## ruff: write the format, mend what can be mended
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

types: setup ## mypy, strict
	@.venv/bin/mypy

compile: setup ## write pipelines/select_moe/pipeline.yaml
	@$(PYTHON) -m pipelines compile

lock: setup ## resolve requirements.lock anew
	@scripts/lock.sh

image: ## build the image: TARGET=cpu|gpu, TAG=select-moe:dev; Docker or Podman, no .venv needed
	@python3 image/build.py --target $(TARGET) --tag $(TAG) $(ARGS)

image-test: setup ## build the image in a stock Docker engine, try it hardened, run the pipeline in it (root)
	@scripts/image_test.sh

chart-test: setup ## the Helm chart and k8s/ with real helm and kubectl, no cluster
	@$(PYTHON) scripts/chart_tools.py
	@$(PYTHON) -m pytest tests/chart -q

sbom: setup ## build/sbom.cdx.json: what is installed here, as CycloneDX
	@scripts/sbom.sh

licences: setup ## fail on a package whose licence pyproject.toml does not allow
	@.venv/bin/pip-licenses --summary

kind-up: setup ## everything in a kind cluster on this machine: KFP, the chart, the image (Docker or Podman, kind, kubectl, helm)
	@$(PYTHON) -m k8s.kind up $(ARGS)

kind-run: setup ## submit the pipeline there and follow it: PRESET=quick
	@$(PYTHON) -m k8s.kind run preset=$(PRESET) $(ARGS)

kind-test: setup ## what only a cluster proves: helm test, end to end, cache, a pod deleted, a worker drained
	@$(PYTHON) -m k8s.kind test $(ARGS)

kind-logs: setup ## collect what helps to find a fault in .selectmoe/kind/logs-TIME
	@$(PYTHON) -m k8s.kind logs $(ARGS)

kind-down: setup ## remove the cluster
	@$(PYTHON) -m k8s.kind down

images-lock: setup ## write the registries' digests beside the tags in the chart's values (needs a network)
	@$(PYTHON) -m k8s.images $(ARGS)

bench-warmup: setup ## a step of gates and routers against a full one; what data and logging cost
	@$(PYTHON) -m bench.warmup

bench-s3: setup ## our S3 transfer against boto3's own, on a real local server
	@$(PYTHON) -m bench.s3 $(ARGS)

bench-forward: setup ## what quality gates cost a forward pass, as a ratio to OLMoE's of the same size
	@$(PYTHON) -m bench.forward $(ARGS)

bench-ingest: setup ## rows a second and memory of a million rows, beside a plain loop and the datasets library: ARGS=rows=100000
	@$(PYTHON) -m bench.ingest $(ARGS)

bench-near-duplicates: setup ## which planted near-duplicates are found among real rows, and how fast
	@$(PYTHON) -m bench.near_duplicates $(ARGS)

bench-encoding: setup ## what the template's masks cost, as a ratio to plain tokenising
	@$(PYTHON) -m bench.encoding $(ARGS)

bench-routing: setup ## routing against a plain loop over OLMoE; what it costs beside the model; tokenising
	@$(PYTHON) -m bench.routing $(ARGS)

bench-routing-memory: setup ## memory of routing by the number of rows, and of planning a million
	@$(PYTHON) -m bench.routing_memory $(ARGS)

bench-router-data: setup ## a million rows of router data written, merged and read, against a plain copy
	@$(PYTHON) -m bench.router_data $(ARGS)

bench-convert: setup ## memory, time and a kill of converting a checkpoint of several GB made on the fly
	@$(PYTHON) -m bench.convert $(ARGS)

clean: ## remove what tools left behind (not .venv, not .selectmoe)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
