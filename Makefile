# `make demo` and `make test` are all that a newcomer needs; both make .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
# The tests start Python a thousand times: each module is compiled once, not by each process again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check torture fuzz golden fix clean-demo pins

demo: .venv/installed
	@runner demo-models
	@runner render demo --check
	@runner sweep recipes/demo --slots 2
	@runner report recipes/demo --html runs/demo/report.html
	@printf '\nrecipes: recipes/demo   runs: runs/demo   base models: demo_models\nthe report as a page: runs/demo/report.html\n'

test: check  # the fast part, then everything that starts training
	pytest -m "slow and not gpu and not torture" -n 2 --dist loadfile --durations=15

torture: .venv/installed-dev  # whole matrices and the headline test with 30 kills: hours on two cores
	pytest -m "torture and not gpu" --durations=40

check: .venv/installed-dev
	ruff check .
	ruff format --check .
	mypy runner
	runner render --check
	pytest -m "not slow and not gpu and not torture" -q -n 2

# New examples each time; a failure is kept in .hypothesis/ and printed with the command to repeat it.
fuzz: .venv/installed-dev
	FUZZ_FACTOR=$(or $(FUZZ_FACTOR),20) pytest -q --hypothesis-profile=fuzz --hypothesis-show-statistics tests/test_fuzz.py tests/data/test_fuzz_rows.py

golden: .venv/installed-dev
	UPDATE_GOLDEN=1 pytest -q -m "not slow and not gpu and not torture" tests

fix: .venv/installed-dev
	ruff check --fix .
	ruff format .

clean-demo:
	rm -rf runs/demo demo_models

# The imports of runs are compiled before the first run.
COMPILE_RUNS := from runner.recipe.libraries import hide_libraries; hide_libraries(["bitsandbytes", "deepspeed", "scipy", "matplotlib"]); import runner.sft.train

# Two stamps: the runner's dependencies, and with them the tools of the tests. The demo starts a minute earlier.
.venv/installed: pyproject.toml constraints.txt .ci/install.py
	@echo "making .venv from constraints.txt: up to a minute, and 1.5 GB on disk"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python .ci/install.py .
	@$(BIN)/python -c '$(COMPILE_RUNS)'
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/python .ci/install.py '.[dev]'
	@touch $@

# The tree of a GPU machine is resolved; that of a CPU build of torch is the same without CUDA's
# own libraries. Pins stay unless they no longer fit: `make pins UPGRADE=--upgrade`
# takes the newest versions.
RESOLVE := uv pip compile pyproject.toml - --all-extras --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --no-annotate --custom-compile-command "make pins" --quiet $(UPGRADE)

pins:
	echo uv | $(RESOLVE) --output-file constraints-cuda.txt
	grep --invert-match --extended-regexp '^(cuda-|nvidia-|triton==)' constraints-cuda.txt > constraints.txt
