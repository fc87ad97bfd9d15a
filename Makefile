# The verbs of this project; CI calls the same ones.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null) Cargo.toml Cargo.lock

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-rust test-rust-fast test-models test-python lint \
	format locales bench fuzz differential browser dist clean shapes lock audit audit-workflows \
	audit-crates audit-packages pack pictures notices test-oldest

# Python keeps the bytecode of what it imports, whatever the shell says. Without it every process
# of a test compiles PyTorch and its kin anew, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

help: ## Show the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

# uv first, with pip; everything else with uv, whose hard links make a second clone cost seconds.
$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'uv>=0.8'

# The versions that everybody has, with the hashes of their files: `make lock` writes it. `LOCK=` takes
# the newest that pyproject.toml allows.
LOCK ?= requirements-dev.lock
INSTALL := VIRTUAL_ENV=$(CURDIR)/$(VENV) UV_CONSTRAINT=$(LOCK) $(UV) pip install --quiet

$(VENV)/.tools: pyproject.toml $(LOCK) | $(UV)
	$(INSTALL) --group dev --group host
	@touch $@

# ComfyUI's frontend as tests/browser use it: ComfyUI 0.3.75's own, the one before growing rows, and
# the newest. One environment holds one of them, so each has a folder.
FRONTENDS := 1.32.9 1.49.6 1.58.1

$(VENV)/.frontends: Makefile | $(UV)
	for version in $(FRONTENDS); do \
		$(UV) pip install --quiet --no-deps --python $(BIN)/python --target $(VENV)/frontends/$$version \
			comfyui-frontend-package==$$version || exit 1; \
	done
	@touch $@

# The program that packs for ComfyUI's registry. Of what it requires, reading and packing need only
# this one that the tests have not. It has a folder, since the rest of it brings 280 MB.
$(VENV)/.comfy-cli: Makefile | $(UV)
	$(UV) pip install --quiet --no-deps --python $(BIN)/python --target $(VENV)/comfy-cli \
		comfy-cli==1.23.0 tomlkit==0.15.1
	@touch $@

# The browser of the tests. Where it cannot be installed they are skipped.
browser:
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends chromium fonts-noto-cjk >/dev/null) || true

# The wheel requires nothing; the extra brings PyTorch and what the full demo writes files with.
$(VENV)/.installed: pyproject.toml $(RUST_SOURCES) | $(VENV)/.tools
	VIRTUAL_ENV=$(CURDIR)/$(VENV) UV_CONSTRAINT=$(LOCK) $(BIN)/maturin develop --release --locked --uv --quiet --extras demo
	@touch $@

setup: $(VENV)/.tools $(VENV)/.installed ## Create .venv and build the extension into it

demo: setup ## Compose LoRAs into an emulated model and measure the error
	$(BIN)/qwenlora demo

test: test-rust test-models test-python ## Run all tests

test-fast: test-rust-fast ## Run the quick tests
	$(MAKE) --no-print-directory test-python PYTEST_ARGS='-m "not slow"'

test-rust:
	cargo test --locked --quiet

# Left out are the files that start threads and the program's screens of all layouts.
test-rust-fast:
	cargo test --locked --quiet -p qwenlora-core --lib \
		--test corpus --test grammar --test header --test packed --test stack

# In a folder of their own: another configuration of the same crates.
test-models:
	RUSTFLAGS="--cfg loom" cargo test --locked --quiet --profile loom --target-dir target/loom \
		-p qwenlora-core --lib loom

JOBS ?= 2
PYTEST_ARGS ?=

test-python: setup $(VENV)/.frontends $(VENV)/.comfy-cli browser
	$(BIN)/pytest -q -n $(JOBS) $(PYTEST_ARGS)

# The oldest PyTorch, NumPy and safetensors that the wheel allows, in an environment of their own.
# tests/conftest.py leaves out there what needs packages that want a newer PyTorch.
OLDEST := $(VENV)/oldest

test-oldest: | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST) --resolution lowest-direct --extra torch -r pyproject.toml
	$(UV) pip install --quiet --python $(OLDEST) --constraints requirements-dev.lock \
		hypothesis packaging pillow pytest pytest-timeout pytest-xdist pyyaml
	$(UV) pip install --quiet --python $(OLDEST) --no-deps .
	$(OLDEST)/bin/pytest -q -n $(JOBS) -m 'not slow' --ignore=tests/browser --ignore=tests/host \
		--ignore=tests/release

lint: setup ## Check formatting, lints, types and stubs
	cargo fmt --check
	cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
	RUSTFLAGS="--cfg loom" cargo clippy --locked --quiet --profile test --target-dir target/loom \
		-p qwenlora-core --lib -- -D warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/stubtest qwenlora._core --concise

format: setup ## Format the sources
	cargo fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --select I .

locales: setup ## Write the nodes' English texts anew, for translators
	$(BIN)/python tests/host/write_locales.py

shapes: setup ## Write anew what stubs show where the nodes cannot run
	$(BIN)/python tests/host/write_shapes.py

pack: ## Make the node pack of a release, dist/ComfyUI-qwenlora-VERSION.zip (Python 3.11 and git)
	$(PYTHON) release/pack.py

pictures: setup ## Draw the icon and the banner of the node pack
	$(BIN)/python release/pictures.py

BENCH ?= --device cpu
BENCH_OUT ?= target/bench

$(VENV)/.bench: pyproject.toml $(LOCK) | $(UV)
	$(INSTALL) --group bench
	@touch $@

bench: setup $(VENV)/.bench ## Measure on the CPU; on a GPU: BENCH="--device cuda"
	cargo bench --locked --quiet
	mkdir -p $(BENCH_OUT)
	$(BIN)/python benches/bench_composition.py --json $(BENCH_OUT)/composition.json \
		--plots $(BENCH_OUT) $(BENCH)
	$(BIN)/python benches/bench_keys.py
	$(BIN)/python benches/bench_pack.py

# target:seeds:dictionary. No sanitizer: core and fuzz hold no unsafe code, and run seven times as
# fast without one.
FUZZ_TARGETS := header:file:header file:file:header key:key:keys listing:listing:keys \
	adapters:adapters: config:config:config
FUZZ_SECONDS ?= 180

fuzz: ## Fuzz what reads files, each target for FUZZ_SECONDS (needs nightly Rust and cargo-fuzz)
	cd fuzz && cargo test --locked --quiet --lib
	@cd fuzz && for target in $(FUZZ_TARGETS); do \
		IFS=: read -r name seeds words <<< "$$target"; \
		mkdir -p corpus/$$name && echo "fuzzing $$name" && \
		cargo +nightly fuzz run --sanitizer none $$name corpus/$$name seeds/$$seeds -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=16384 -timeout=10 -rss_limit_mb=2048 \
			-print_final_stats=1 $${words:+-dict=dictionaries/$$words.dict} || exit 1; \
	done

# One process and one thread: the tensors are small.
SECONDS ?= 60
FIRST_SEED ?= 10000
SEED ?=

differential: setup ## Random models, files and histories against an oracle, for SECONDS; or one SEED
	$(BIN)/pytest -q tests/differential -m slow $(if $(SEED),--seed $(SEED),\
		--seconds $(SECONDS) --first-seed $(FIRST_SEED))

# PyTorch and the tests' tools are not installed: what is tried has environments of its own.
$(VENV)/.release: pyproject.toml $(LOCK) | $(UV)
	$(INSTALL) --group release
	@touch $@

DIST ?=

dist: $(VENV)/.release ## Build this system's wheels and the sdist into dist/ and try them; DIST="--torch newest"
	$(BIN)/python release/dist.py all $(DIST)

# All groups and extras, for every system and Python that the project runs on.
GROUPS = $(shell sed -n '/^\[dependency-groups\]/,/^\[/s/^\([a-z]*\) = .*/--group \1/p' pyproject.toml)

lock: | $(UV) ## Write the versions of the tools anew, the newest that pyproject.toml allows
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --upgrade \
		--no-emit-index-url --custom-compile-command 'make lock' --output-file requirements-dev.lock \
		--all-extras $(GROUPS) pyproject.toml

notices: ## Write the licenses of the crates in the wheel (needs cargo-about)
	@cargo about --version >/dev/null || (echo 'needs cargo-about: cargo install cargo-about --locked --features cli' && false)
	cargo about generate --locked --manifest-path rust/py/Cargo.toml --config release/about.toml \
		--output-file LICENSE-THIRD-PARTY.txt release/about.hbs

$(VENV)/.audit: pyproject.toml $(LOCK) | $(UV)
	$(INSTALL) --group audit
	@touch $@

audit: audit-workflows audit-crates audit-packages ## Check licenses, sources, known holes, workflows

audit-workflows: $(VENV)/.audit
	$(BIN)/zizmor --quiet --offline .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

audit-crates:
	@cargo deny --version >/dev/null || (echo 'needs cargo-deny: cargo install cargo-deny --locked' && false)
	cargo deny --locked check
	cargo deny --locked --manifest-path fuzz/Cargo.toml check

# A package that is not found is a failure: where PyPI cannot be asked, nothing was audited.
audit-packages: $(VENV)/.audit
	$(BIN)/pip-audit --strict --disable-pip --requirement requirements-dev.lock

clean: ## Remove what the verbs made
	rm -rf $(VENV) target fuzz/target dist
