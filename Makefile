# The same commands for people and CI. Needs python3 (3.11 or newer), a C++ compiler and cmake.
PYTHON ?= python3
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# One stamp per set of extras: a second run installs nothing.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
# What releases are made with has an environment of its own: nothing is compiled for it.
DIST_VENV := .venv-dist
DIST_TOOLS := build twine check-wheel-contents towncrier

# Peers to compare with; ours alone, and what is installed: make bench BENCH_EXTRAS=dev
BENCH_EXTRAS ?= dev,bench

# Seconds for each target of make fuzz.
FUZZ_SECONDS ?= 180
MODULE ?= actions.py
SOAK_SECONDS ?= 600

.PHONY: help demo test test-gpu check layers style chat docs site bench bench-full bench-set peers results fuzz fuzz-run mutate mutate-run soak dist try-dist changelog clean needs

help:
	@echo "make demo      convert the embedded checkpoint and see it answer, with a screenshot"
	@echo "make test      run the tests (EXTRAS=dev,reference adds the comparison with transformers)"
	@echo "make test-gpu  run the tests that need a GPU, on Vulkan (lavapipe where there is no GPU)"
	@echo "make check     ruff, mypy --strict, import levels"
	@echo "make bench     ours beside its peers, the quick set: ten minutes (BENCH=--publish keeps the results)"
	@echo "make bench-full  all benchmarks: hours; make bench-full BENCH=--list says what they need"
	@echo "make peers     compile llama.cpp's own programs, for both"
	@echo "make fuzz      readers of strangers' bytes, fuzzed: three minutes each (FUZZ_SECONDS=600, FUZZ=actions)"
	@echo "make mutate    which small faults the tests of a module would not see (MODULE=memory/estimate.py)"
	@echo "make soak      a server under mixed traffic for ten minutes (SOAK_SECONDS=3600): memory stays flat"
	@echo "make style     format, and fix what ruff can fix"
	@echo "make chat      talk with the embedded model"
	@echo "make docs      build the documentation's site into build/site; no network is needed to read it"
	@echo "make dist      build the wheel and the sdist, and check them"
	@echo "make try-dist  install the wheel into an empty environment and try every command"
	@echo "make changelog show what the next release's changelog will say"

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

chat: $(STAMP)
	@$(BIN)/python -m autoglm_gguf.chat

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST)

# On Linux an environment of its own, .venv-gpu: its llama.cpp is another build. A Mac's has Metal.
test-gpu:
	@if [ "$$(uname -s)" = Darwin ]; then $(MAKE) test PYTEST="-m gpu --max-skips 0 $(PYTEST)"; 	  else PYTHON="$(PYTHON)" scripts/vulkan.sh test $(PYTEST); fi

check: $(STAMP) layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@! git grep -nE '^(<<<<<<<|>>>>>>>) ' || { echo 'error: marks of a merge'; exit 1; }

layers: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_architecture.py

# BENCH passes options on (benchmarks/sets.py --help); BENCH_EXTRAS=dev,bench,reference adds transformers.
bench:
	@$(MAKE) --no-print-directory bench-set SET=quick EXTRAS='$(BENCH_EXTRAS)'

bench-full:
	@$(MAKE) --no-print-directory bench-set SET=full EXTRAS='$(BENCH_EXTRAS)'

bench-set: $(STAMP)
	@$(BIN)/python benchmarks/sets.py $(SET) $(BENCH)

peers: $(STAMP)
	@PYTHON=$(BIN)/python benchmarks/build_peers.sh

# The results page, made again of benchmarks/results and benchmarks/page.md.
results: $(STAMP)
	@$(BIN)/python benchmarks/results.py

# Coverage-guided fuzzing, by atheris: FUZZ names targets (all four by default), FUZZ_SECONDS is for each.
fuzz:
	@$(MAKE) --no-print-directory fuzz-run EXTRAS=dev,fuzz

fuzz-run: $(STAMP)
	@$(BIN)/python tests/fuzz/run.py $(FUZZ) --seconds $(FUZZ_SECONDS)

# Mutation testing, by mutmut: MODULE is a file under src/autoglm_gguf; MUTATE="--most 200" samples.
mutate:
	@$(MAKE) --no-print-directory mutate-run EXTRAS=dev,mutate

mutate-run: $(STAMP)
	@$(BIN)/python scripts/mutate.py $(MODULE) $(MUTATE)

# A server under mixed traffic, looked at for what stays: SOAK passes options on (a MODEL.gguf, --clients).
soak: $(STAMP)
	@$(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS) $(SOAK)

style: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs:
	@$(MAKE) --no-print-directory site EXTRAS=$(EXTRAS)$(if $(findstring docs,$(EXTRAS)),,$(comma)docs)

site: $(STAMP)
	$(BIN)/python scripts/cli_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html; with search: python3 -m http.server --directory build/site"

# The wheel is built from the sdist, so that what the sdist lacks is missed here.
dist: $(DIST_VENV)/.installed changelog
	rm -rf dist
	$(DIST_VENV)/bin/python -m build
	$(DIST_VENV)/bin/twine check --strict dist/*
	$(DIST_VENV)/bin/check-wheel-contents dist/*.whl
	$(DIST_VENV)/bin/python scripts/check_dist.py dist

try-dist:
	@test -e dist/*.whl || $(MAKE) dist
	$(PYTHON) scripts/try_wheel.py dist/*.whl

# SINCE=origin/main: fails where something changed since then and no fragment says so.
changelog: $(DIST_VENV)/.installed
	$(DIST_VENV)/bin/towncrier build --draft --version next
	$(if $(SINCE),$(DIST_VENV)/bin/towncrier check --compare-with $(SINCE))

clean:
	rm -rf $(VENV) $(DIST_VENV) .venv-gpu out dist build

$(DIST_VENV)/.installed: Makefile
	@$(PYTHON) -m venv $(DIST_VENV)
	@$(DIST_VENV)/bin/pip install --quiet --disable-pip-version-check $(DIST_TOOLS)
	@touch $@

$(STAMP): pyproject.toml
	@$(MAKE) --no-print-directory needs
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: python3 cannot make a virtual environment"; \
	  echo "hint: Debian/Ubuntu: sudo apt-get install -y python3-venv"; exit 1; }
	@echo "installing into $(VENV) (llama.cpp is compiled the first time: about 5 minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

needs:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: python3: missing or too old (required 3.11 or newer)"; \
	  echo "hint: Debian/Ubuntu: sudo apt-get install -y python3 python3-venv; macOS: brew install python"; \
	  echo "      another interpreter: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@{ command -v "$${CXX:-c++}" || command -v g++ || command -v clang++; } >/dev/null || { \
	  echo "error: no C++ compiler"; \
	  echo "hint: Debian/Ubuntu: sudo apt-get install -y g++; macOS: xcode-select --install"; exit 1; }
	@command -v cmake >/dev/null || { \
	  echo "error: no cmake"; \
	  echo "hint: Debian/Ubuntu: sudo apt-get install -y cmake; macOS: brew install cmake"; exit 1; }
