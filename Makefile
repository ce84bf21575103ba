# `make demo` trains and evaluates a network, `make test` runs the tests. Both first make .venv.
# Another interpreter: make demo PYTHON=/path/to/python3.12

PYTHON ?=
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(RUN) run_trainer.py --use_synthetic_data --recipe=one_cycle --train_epochs=10 \
		--log_per_iterations=100 --ckpt_path=runs/demo --clean
	$(RUN) run_evaluator.py --ckpt_path=runs/demo

test: lint
	$(RUN) -m pytest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: requirements.txt requirements-test.txt files/find_python.sh
	@python=$$(sh files/find_python.sh $(PYTHON)) && "$$python" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
