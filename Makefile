# Every target uses .venv, which `make setup` makes.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.setup-done
# Tests start some hundred processes that import verl: 3 s each with cached bytecode, 10 s where a shell forbids it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup quickstart compare test test-fast lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/setup_env.py scripts/verl_releases.py scripts/cpu-overrides.txt verl_fp16/releases.py
	$(PYTHON) scripts/setup_env.py
	@touch $@

# PRECISION=bf16 runs the twin; OVERRIDES="key=value ..." passes Hydra overrides on; SEED=2 another seed.
quickstart: $(STAMP)
	@OVERRIDES='$(subst ','\'',$(value OVERRIDES))' $(PY) -m verl_fp16.quickstart \
		$(if $(PRECISION),--precision '$(PRECISION)') $(if $(SEED),--seed '$(SEED)')

# Most tests of these tiers wait for one child that imports verl: they run beside each other, a file to a process.
BESIDE = OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

test: $(STAMP) lint
	$(BESIDE) -m "(unit or contract) and not slow and not alone" $(PYTEST_ARGS)
	$(PY) -m pytest -m "not slow and (alone or not (unit or contract))" $(PYTEST_ARGS)

test-fast: $(STAMP) lint
	$(BESIDE) -m "(unit or contract) and not alone" $(PYTEST_ARGS)
	$(PY) -m pytest -m "(unit or contract) and alone" $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf outputs .pytest_cache .ruff_cache
