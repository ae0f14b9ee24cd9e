# Few targets, no logic. Each makes .venv if it is missing and installs what it needs, once (see the stamps below).
# PYTHON=python3.12 chooses the interpreter; uv installs when the user has it, else pip.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

.PHONY: help demo lecture compare test check documents bench simulate bench-gpu gpu faults chaos pins clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/make \1 -/p' Makefile

demo: .venv/.stamp-demo  ## train the whole cascade on scenes by caption and write the report (16 to 28 minutes on 2 cores)
	$(BIN)/cascade run

lecture: .venv/.stamp-demo  ## the lecture as a page, every system run (hours on 2 cores); ROW="T3 gan" for some; goes on when stopped
	$(BIN)/cascade lecture $(ROW)

compare: .venv/.stamp-demo  ## the taxonomy measured: one table, one plot (hours on 2 cores); SYSTEM="gan vae" for some, SEED=1 for another seed
	$(BIN)/cascade compare $(SYSTEM) $(if $(SEED),--seed $(SEED))

test: .venv/.stamp-test  ## every test but faults, measurements and what needs a GPU; ROOM=diffusion for those that import one room
	$(BIN)/pytest $(if $(ROOM),--room $(ROOM)) --durations=10 -n 3 --dist loadscope --no-loadscope-reorder -m "not faults and not bench and not gpu"

check: .venv/.stamp-test  ## lint, formatting, types, import contracts, and the counts of the house beside their limits
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.house

documents: .venv/.stamp-test  ## write docs/ROWS.md and docs/RESULTS.md from slides, tests and docs/results.json; STORE=runs: images of its rows too
	$(BIN)/python -m tests.row_documents
	$(if $(STORE),$(BIN)/python -m tests.row_figures $(STORE))

roofline: .venv/.stamp-test  ## bound of four published trainings' utilization of an H100, by counted bytes and operations
	$(BIN)/python -m tests.benchmarks.roofline

bench: .venv/.stamp-test  ## measure against peers, a table and bench.json; ONLY='unet reader_storage' for some
	$(BIN)/python -m tests.benchmarks.run $(ONLY)

simulate: .venv/.stamp-test  ## 10⁹ images, up to 10⁶ shards and 4,096 ranks by simulation: what breaks first; tables and simulate.json
	$(BIN)/python -m tests.benchmarks.simulate

bench-gpu: .venv/.stamp-test  ## measure against peers on a GPU, a table and bench-gpu.json; ONLY='unet_step decoding' for some
	$(BIN)/python -m tests.benchmarks.gpu.run $(ONLY)

gpu: .venv/.stamp-test  ## the tests that need a GPU
	$(BIN)/pytest -m gpu tests/gpu

faults: .venv/.stamp-test  ## inject faults; GROUP=storage, buckets, outages, kills, data, tars, services, nodes or fuzzing for one group (minutes each)
	$(BIN)/pytest -m faults -s tests/faults$(if $(GROUP),/test_$(GROUP).py)

chaos: .venv/.stamp-test  ## runs with several faults each, drawn by a seed; SEED=7 RUNS=5 for five
	CHAOS_SEED=$(or $(SEED),0) CHAOS_RUNS=$(or $(RUNS),1) $(BIN)/pytest -m faults -s tests/faults/test_chaos.py

pins: $(BIN)/python  ## write the images' requirements.txt (versions, sha256), their bills of materials and, where there is docker, their bases' digests
	$(BIN)/python infra/pins.py

clean:  ## remove the environment and caches; ./runs stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find components pipelines tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one that you have, e.g. make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.stamp-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[demo,hub,lecture,serve]'
	@touch $@

.venv/.stamp-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[azure,demo,gcs,hub,lecture,serve,test,text]'
	@touch .venv/.stamp-demo $@
