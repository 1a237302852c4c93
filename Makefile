# make install      install into .venv; on a machine with a GPU, say how to add Transformer Engine
# make quickstart   install into .venv, fine-tune the embedded model on two processes, show answers before and after
# make test         install into .venv, run the tests; tests/te too where scripts/install_te.sh was run
# make slow         tests that take more than about twenty seconds each
# make fuzz         damaged files and command lines, the same few each time; FUZZ_SECONDS=60 make fuzz runs longer, with new ones
# make lint         ruff, pyright, import-linter, hadolint
# make bench        the benchmarks, as JSON
# make gpu          on a machine with a GPU: quickstart, tests/gpu, doctor and the benchmarks of a step; PARTS="tests" runs some
# make docs         the documentation site, strict

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON := $(shell scripts/find_python.sh 2>/dev/null)
STAMP  := $(VENV)/.installed

# Python compiles modules when they are first imported, which most never are; pip does it where Python may not keep them.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: quickstart install test slow fuzz lint bench gpu docs clean

quickstart: install
	$(BIN)/mixtral-recipes finetune --peft lora

install: $(STAMP)

$(STAMP): pyproject.toml scripts/find_python.sh
	@scripts/find_python.sh > /dev/null
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
		$(BIN)/python -m pip install --quiet --progress-bar off $(COMPILE) -e '.[dev]'
	touch $(STAMP)
	@scripts/mention_te.sh $(BIN)/python

test: install
	if [ -x $(VENV)-te/bin/python ]; then $(VENV)-te/bin/python -m pytest -q tests/te; fi
	$(BIN)/python -m pytest $(PYTEST_ARGS)

slow: install
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: install
	$(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile

bench: install
	for script in $$(grep -l __main__ benchmarks/*.py); do $(BIN)/python $$script || exit 1; done

gpu: install
	$(BIN)/python scripts/gpu_session.py $(PARTS)

docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
