# Everything is built inside the clone: .venv holds Python's side, target Rust's, dist the wheel. `make help` lists the targets.

PYTHON  ?= python3
RANKS   ?= 2
# Processes that run tests. One group of ranks runs at a time (tests/py/turns.py), beside what needs none.
WORKERS ?= 2

VENV  := .venv
BIN   := $(VENV)/bin
TOOLS := $(VENV)/.tools
ZIG   := $(VENV)/.zig
SERVICES := $(VENV)/.services
BUILT := $(VENV)/.built
REQUIRED := $(VENV)/.required
WHEEL := $(VENV)/.wheel

# What a wheel is made of; a change in any of it makes the next target rebuild and reinstall the wheel.
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md THIRD-PARTY-LICENSES \
           $(shell find rust python -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.py' -o -name '*.pyi' -o -name 'py.typed' \))

# maturin sets this for the wheel; clippy needs it too, so that nothing links against libpython.
export PYO3_BUILD_EXTENSION_MODULE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-rust test-python test-properties test-loom test-all wheel sdist bench lint lint-rust lint-python all help clean

# A file's tests stay together, in order: they share the ranks that were started for the first of them. Files go in their own
# order, not the longest lists first: those need no ranks, and the files that do would wait for one another at the end.
PYTEST = $(BIN)/python -m pytest $(if $(filter-out 0 1,$(WORKERS)),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)

# On Linux the wheel for others is linked by zig against a glibc older than this machine's.
ifeq ($(shell uname -s),Linux)
PORTABLE := --zig --compatibility manylinux_2_28
endif
# A panic names a source file: by these, not by the folders of who built it. \037 stands between flags, spaces within.
ANONYMOUS = $$(printf -- '--remap-path-prefix=%s=cargo\037--remap-path-prefix=%s=zerort' \
                '$(or $(CARGO_HOME),$(HOME)/.cargo)' '$(CURDIR)')

demo: $(WHEEL)  ## train a small GPT on Python's own sources, on two ranks; RESUME=1 goes on with an interrupted run, STAGE=3 shards, MONITORS=1 writes curves
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) examples/train_text.py \
	    $(if $(RESUME),--resume) $(if $(STAGE),--stage $(STAGE)) $(if $(MONITORS),--monitors)

test: lint test-rust test-python  ## lint, the Rust tests, then pytest against the installed wheel, two files at a time; WORKERS=1 runs one

# With make --jobs=3 pytest, which takes longest, begins as soon as the wheel is installed, and goes first.
test-rust: | lint-rust
	nice cargo test --locked

test-python: $(WHEEL)
	$(PYTEST)

# The models of tests/turns_loom.rs. Loom and what it needs are built for them alone, in a folder of their own, because the flag
# changes other crates too.
test-loom:
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --locked --release --test turns_loom

# Every property of the core with 20 000 cases instead of 256: what one case in some thousands breaks fails here, not by chance.
test-properties:
	PROPTEST_CASES=20000 PROPTEST_MAX_GLOBAL_REJECTS=1000000 cargo test --locked --release

test-all: test test-properties test-loom wheel sdist $(SERVICES)  ## test, then many more cases of every property, every order of shared counters, the slow tests, the wheel and the sdist for others, and what they contain
	$(PYTEST) -m 'slow or distribution'

wheel: $(ZIG)  ## a wheel for others into dist: every Python from 3.10 on, on Linux every glibc from 2.28 on
	rm -f dist/zerort-*.whl
	CARGO_ENCODED_RUSTFLAGS="$(ANONYMOUS)" PATH="$(abspath $(BIN)):$$PATH" \
	    $(BIN)/maturin build --locked --release $(PORTABLE) --interpreter $(BIN)/python --out dist

sdist: $(TOOLS)  ## the sources for others into dist
	rm -f dist/zerort-*.tar.gz
	$(BIN)/maturin sdist --out dist

bench: $(WHEEL)  ## criterion benches, then step times against DDP, ZeroRedundancyOptimizer and FSDP2
	cargo bench --locked
	$(BIN)/python benches/py/border.py
	$(BIN)/python benches/py/reduce_scatter.py
	$(BIN)/python benches/py/step_time.py
	$(BIN)/python benches/py/checkpoint.py
	$(BIN)/python benches/py/checkpoint.py --beside 2 --megabytes 1024

lint: lint-rust lint-python  ## formatting, clippy, ruff, mypy, and the stub against the built module

lint-rust:
	cargo fmt --all --check
	nice cargo clippy --locked --workspace --all-targets -- -D warnings

lint-python: $(WHEEL)
	$(BIN)/python packaging/licenses.py --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	nice $(BIN)/mypy
	nice $(BIN)/python -m mypy.stubtest --mypy-config-file packaging/stubtest.ini zerort._core

all: test bench  ## test and bench

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean:  ## remove the virtual environment, the wheel and everything compiled
	rm -rf $(VENV) dist target .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "zerort needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'maturin>=1.12,<2'
	touch $@

$(BUILT): $(TOOLS) $(SOURCES)
	rm -f dist/zerort-*.whl
	$(BIN)/maturin build --locked --release --interpreter $(BIN)/python --out dist
	touch $@

# What pyproject.toml asks for, while the wheel is built where make may do several things at a time.
$(REQUIRED): $(TOOLS) pyproject.toml packaging/requirements.py
	$(BIN)/python packaging/requirements.py dev >$(VENV)/requirements.txt
	$(BIN)/python -m pip install --requirement $(VENV)/requirements.txt
	touch $@

# Two installs: the first replaces a wheel of the same version, the second sees that nothing is missing.
$(WHEEL): $(BUILT) $(REQUIRED)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps dist/zerort-*.whl
	$(BIN)/python -m pip install --quiet "$$(echo dist/zerort-*.whl)[dev]"
	touch $@

# What the slow tests read back; `make test` does with what is in dev.
$(SERVICES): $(WHEEL)
	$(BIN)/python -m pip install "$$(echo dist/zerort-*.whl)[monitors,report]"
	touch $@

$(ZIG): $(TOOLS)
	$(BIN)/python -m pip install ziglang
	touch $@
