# Two commands run it all: `make reproduce` and `make test`. Both set themselves up in .venv.
PRESET ?= demo
DATA ?=
OUT ?=
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup reproduce test prepare outputs docs lock clean

help:
	@echo "make reproduce                          the study on the synthetic data (some minutes on 2 cores)"
	@echo "make reproduce DATA=/data/rsna PRESET=paper   the study on the RSNA data (needs a GPU)"
	@echo "make test                               every test"
	@echo "make prepare                            format, export, clean, lint: before each commit"
	@echo "make outputs                            the demo's outputs into the notebooks of nbs/"
	@echo "make docs                               notebooks and pages as a site of plain HTML, in site/"

setup: .venv/.done

.venv/.done: requirements.lock settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv from requirements.lock (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

reproduce: setup
	@$(BIN)/ich-reproduce --preset $(PRESET) $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

test: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@said=$$(mktemp); $(BIN)/mypy > $$said 2>&1 & types=$$!; \
	$(BIN)/pytest $(ARGS); tests=$$?; \
	wait $$types; types=$$?; cat $$said; rm -f $$said; exit $$((tests ? tests : types))

prepare: setup
	@$(BIN)/ruff format .
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(BIN)/ruff check .
	@$(BIN)/mypy

outputs: setup
	@$(BIN)/ich-reproduce --preset demo
	@$(BIN)/python -c 'from ich_fastai.outputs import copy_outputs; print(*copy_outputs("runs/demo"))'
	@$(BIN)/python -c 'from ich_fastai.outputs import copy_uses; print(*copy_uses("runs/demo"))'
	@$(BIN)/python -c 'from ich_fastai.outputs import copy_pages; print(*copy_pages("runs/demo"), sep="; ")'
	@$(BIN)/nbdev-clean

docs: setup
	@$(BIN)/python -c 'from ich_fastai.report import write_site; print(write_site("site"))'

# Exact versions of what is installed now, without this package. CUDA packages exist for Linux only.
lock:
	@$(BIN)/pip freeze --all --exclude-editable --exclude pip | grep -v -e '^-' -e ' @ ' | sed -E '/^(nvidia-|cuda-|triton)/s/$$/ ; sys_platform == "linux"/' > requirements.lock

clean:
	rm -rf runs site build dist *.egg-info
