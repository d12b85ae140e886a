# Two environments, each from its own lock: Optimum's ONNX export needs transformers 4.57, and
# everything else must run on transformers 5 as well.
PYTHON ?= python3
EXPORT := .venv
LATEST := .venv-latest
PIP_OPTIONS := --disable-pip-version-check --quiet
# Neighbours stay in one worker, which imports and prepares for them once, until the other idles.
SPREAD := -n auto --dist worksteal
# Tests of what does not depend on transformers, so that one environment is enough for them.
ONCE := analysis/test_cosines.py analysis/test_heatmaps.py analysis/test_page.py benchmarks \
	cli/test_border.py cli/test_reading.py cli/test_streams.py comparison faults outputs \
	pruners/depth/measures pruners/depth/search/test_journal.py \
	pruners/depth/search/test_searches.py pruners/depth/search/test_sliding.py \
	pruners/hybrid/test_time_model.py pruners/width/allocation/test_projection.py \
	pruners/width/test_brain_surgeon.py pruners/width/test_policy_gradient.py recipe \
	recovery/training/test_loop.py report test_cache.py test_checks.py \
	test_control_characters.py test_direction.py test_files.py test_plugins.py \
	test_registry.py test_returned.py test_startup.py test_target.py test_texts.py

# Where it is set, every worker and process compiles all modules anew and rewrites all assertions.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint unit process unit-latest fuzz faults real integration lock clean

demo: $(EXPORT)/.ready ## run the hybrid recipe on the default model
	$(EXPORT)/bin/slm-plugin run recipes/hybrid.yaml --overwrite

test: lint unit process unit-latest fuzz real integration ## everything that CI runs

lint: $(EXPORT)/.ready
	$(EXPORT)/bin/ruff check .
	$(EXPORT)/bin/ruff format --check .
	$(EXPORT)/bin/mypy

unit: $(EXPORT)/.ready
	$(EXPORT)/bin/python -m pytest tests -m "not real and not process" $(SPREAD)

process: $(EXPORT)/.ready ## tests that run whole commands: kills, signals, fresh loads
	$(EXPORT)/bin/python -m pytest tests -m process $(SPREAD)

unit-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pytest tests -m "not real" $(SPREAD) $(ONCE:%=--ignore=tests/%)

fuzz: $(EXPORT)/.ready
	$(EXPORT)/bin/python -m tests.fuzz --count 2000

faults: $(EXPORT)/.ready ## plant mistakes in a copy and see the tests fail (15 minutes)
	$(EXPORT)/bin/python -m tests.faults

real: $(EXPORT)/.ready
	$(EXPORT)/bin/python -m pytest tests -m real

integration: $(EXPORT)/.ready $(LATEST)/.ready ## each line of transformers reads what the other wrote
	SLM_PLUGIN_OTHER_PYTHON=$(CURDIR)/$(LATEST)/bin/python $(EXPORT)/bin/python -m pytest integration

$(EXPORT)/.ready: locks/export.txt pyproject.toml
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/pip install $(PIP_OPTIONS) -r locks/export.txt
	$(EXPORT)/bin/pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	touch $@

$(LATEST)/.ready: locks/latest.txt pyproject.toml
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install $(PIP_OPTIONS) -r locks/latest.txt
	$(LATEST)/bin/pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	touch $@

lock: ## resolve both locks anew (minutes)
	$(call resolve,locks/export.txt,'.[all,dev]' 'transformers<5')
	$(call resolve,locks/latest.txt,'.[dev]')

# The torch build's own CUDA packages stay out: which ones a machine needs, torch itself says.
define resolve
rm -rf .venv-lock
$(PYTHON) -m venv .venv-lock
.venv-lock/bin/pip install $(PIP_OPTIONS) torch==2.13.0 $(2)
.venv-lock/bin/pip freeze --all --exclude pip --exclude slm-plugin | sed 's/+cpu$$//' \
	| grep -viE '^(nvidia|cuda|triton)' > $(1)
rm -rf .venv-lock
endef

clean:
	rm -rf $(EXPORT) $(LATEST) runs
