# The verbs of this project; CI calls the same ones.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null) Cargo.toml Cargo.lock

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rust test-python lint format bench clean

help: ## Show the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

# uv first, with pip; everything else with uv, whose hard links make a second clone cost seconds.
$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'uv>=0.8'

$(VENV)/.tools: pyproject.toml | $(UV)
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --group dev --group host
	@touch $@

# --no-deps is not given: the wheel's own requirements are what a user gets.
$(VENV)/.installed: pyproject.toml $(RUST_SOURCES) | $(VENV)/.tools
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --uv --quiet --extras demo
	@touch $@

setup: $(VENV)/.tools $(VENV)/.installed ## Create .venv and build the extension into it

demo: setup ## Compose LoRAs into an emulated model and measure the error
	$(BIN)/qwenlora demo

test: test-rust test-python ## Run all tests

test-rust:
	cargo test --locked --quiet

test-python: setup
	$(BIN)/pytest -q

lint: setup ## Check formatting, lints, types and stubs
	cargo fmt --check
	cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/stubtest qwenlora._core --concise

format: setup ## Format the sources
	cargo fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --select I .

bench: setup ## Measure on the CPU
	cargo bench --locked --quiet
	$(BIN)/python benches/bench_compose.py

clean: ## Remove what the verbs made
	rm -rf $(VENV) target
