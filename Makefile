# `make demo` trains and evaluates a network, `make test` runs the tests, `make bench` measures the
# project beside others, `make gpu` tests and measures it on a GPU. `make figures` draws the pictures
# in files/, `make savedmodels` exports the trained networks in files/pretrained. `make drill`, `make
# fuzz` and `make load` are the long forms of the tests in tests/faults. Each first makes the
# environment it needs.
# Another interpreter: make demo PYTHON=/path/to/python3.12

PYTHON ?=
VENV := .venv
BENCH_VENV := .venv-bench
RUN := $(VENV)/bin/python
comma := ,

.PHONY: demo test lint bench gpu figures savedmodels drill fuzz load
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(RUN) run_trainer.py --use_synthetic_data --recipe=one_cycle --train_epochs=10 \
		--log_per_iterations=100 --ckpt_path=runs/demo --clean
	$(RUN) run_evaluator.py --ckpt_path=runs/demo

# three files at a time: a test and the programs that it starts seldom fill a core each
test: lint
	$(RUN) -m pytest --numprocesses=3 --dist=loadfile

lint: $(VENV)/ready-for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

drill: $(VENV)/ready-for-tests
	TF_CPP_MIN_LOG_LEVEL=2 $(RUN) tests/faults/drill.py
	TF_CPP_MIN_LOG_LEVEL=2 $(RUN) tests/faults/power_cuts.py

fuzz: $(VENV)/ready-for-tests
	FUZZ_EXAMPLES=40000 $(RUN) -m pytest tests/faults/test_fuzz.py

load: $(VENV)/ready
	TF_CPP_MIN_LOG_LEVEL=2 $(RUN) tests/faults/load.py

bench: $(BENCH_VENV)/ready
	$(BENCH_VENV)/bin/python benchmarks/compare.py

# `make gpu RUN=python3` uses that Python's own packages. QUICK=1 only measures what matters most.
# A test that fails must not stop the measurement, but it stops make at the end.
gpu: $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/ready-for-gpus)
ifdef QUICK
	$(RUN) benchmarks/gpu.py --quick $(GPU_FLAGS)
else
	@failed=0; $(RUN) -m pytest tests/gpu || failed=1; \
		$(RUN) benchmarks/gpu.py $(GPU_FLAGS) && exit $$failed
endif

figures: $(VENV)/ready
	$(RUN) docs/draw_parts.py
	$(RUN) -m cifar10_resnet draw --output=files/ResNet20_CIFAR10.pdf --output=files/ResNet20_CIFAR10.png
	$(RUN) benchmarks/accuracy/draw_curves.py

PRETRAINED := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard files/pretrained/*/*.index)))))
FORMS := nhwc-fp32 nhwc-fp16 nchw-fp32 nchw-fp16
SAVEDMODELS := $(foreach form,$(FORMS),$(PRETRAINED:%=savedmodels/%-$(form)))

savedmodels: $(SAVEDMODELS:=/saved_model.pb)
	@test -n "$^" || { echo "There is no trained network in files/pretrained to export." >&2; exit 1; }

# $(call export_rule,FORM,DATA_FORMAT,DTYPE)
define export_rule
savedmodels/%-$(1)/saved_model.pb: files/pretrained/% | $(VENV)/ready
	rm -rf $$(@D)
	$(RUN) -m cifar10_resnet export --ckpt_path=$$< --export_dir=$$(@D) --data_format=$(2) --dtype=$(3)
endef
$(eval $(call export_rule,nhwc-fp32,channels_last,fp32))
$(eval $(call export_rule,nhwc-fp16,channels_last,fp16))
$(eval $(call export_rule,nchw-fp32,channels_first,fp32))
$(eval $(call export_rule,nchw-fp16,channels_first,fp16))

# $(call make_environment,FOLDER): with the first Python that fits
define make_environment
	@unfit= bare=; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		case $$version in 3.1[0-3]) ;; *) unfit="$$unfit ($$python is $$version)"; continue ;; esac; \
		$$python -c 'import ensurepip, venv' 2>/dev/null && exec $$python -m venv $(1); \
		bare=$$version; \
	done; \
	[ "$$bare" ] && echo "Python $$bare has no venv module. Install it, on Debian or Ubuntu with" \
		"'apt-get install python$$bare-venv', and run make again." >&2 || \
	echo "Python 3.10 to 3.13 is needed and was not found$$unfit. Install one, on Debian or Ubuntu" \
		"with 'apt-get install python3 python3-venv', or name one: make PYTHON=/path/to/python3" >&2; \
	exit 1
endef

# $(call install,FOLDER,WHAT)
define install
	@echo "Installing $(2) into $(1). The first time, this downloads several hundred megabytes."
	@$(1)/bin/python -m pip install --disable-pip-version-check $(2)
	@touch $@
endef

$(VENV)/ready: requirements.txt
	$(call make_environment,$(VENV))
	$(call install,$(VENV),-r requirements.txt)

$(VENV)/ready-for-tests: pyproject.toml $(VENV)/ready
	$(call install,$(VENV),'.[test]')

$(VENV)/ready-for-gpus: pyproject.toml $(VENV)/ready
	$(call install,$(VENV),'.[gpu$(comma)test]')

$(BENCH_VENV)/ready: requirements.txt benchmarks/requirements.txt
	$(call make_environment,$(BENCH_VENV))
	$(call install,$(BENCH_VENV),-r benchmarks/requirements.txt)
