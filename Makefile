# make demo   two images to an mp4 with the embedded model, from nothing
# make test   every check: ruff, mypy, pytest
# Both create .venv and install what they need, once, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
LOCK := pyproject.toml constraints.txt

DEMO_VIDEO := demo/blue_bird.mp4
DEMO_PROMPT := CG animation style, a small blue bird takes off from the ground, flapping its wings. The camera follows \
the bird upward, with a blue sky and white clouds under bright sunshine.

.PHONY: demo test format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO_VIDEO))
	$(BIN)/wan-local generate --model tiny --resolution 480p \
		--start-image tests/images/first_frame.png --end-image tests/images/last_frame.png \
		--prompt "$(DEMO_PROMPT)" --seed 42 --output $(DEMO_VIDEO)

test: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	-@command -v npm >/dev/null && npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund --silent
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

# Mend what can be mended by machine.
format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wan_local needs Python 3.11 or newer; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(LOCK) | $(BIN)/python
	@echo "Installing wan_local into $(VENV) (torch is the big part) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(LOCK) | $(BIN)/python
	@echo "Installing wan_local and its checks into $(VENV) (torch is the big part) ..."
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.installed
