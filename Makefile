# Two commands: `make run` (install, then Re-Align end to end on the embedded world) and `make test` (install, then every check).
PYTHON ?= python3
BIN := .venv/bin
# one thread per process, nothing from the network, no window: the same everywhere
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export MPLBACKEND = agg

.PHONY: run test outputs docs checkpoint clean install

run: .venv/installed
	$(BIN)/realign-run runs/world

test: .venv/installed
	$(BIN)/python tools/check.py

install: .venv/installed

# torch first and at its exact version: asked for as a dependency of others, pip may take another build of it
.venv/installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed for the versions in constraints.txt: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -e '.[cpu,offline,dev]' -c constraints.txt
	touch $@

# run every notebook in place, keep its outputs, and make README.md again
outputs: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py -j 2
	$(BIN)/nbdev_clean
	$(BIN)/python tools/make_readme.py

docs: .venv/installed
	@command -v quarto > /dev/null || { echo "make docs needs Quarto (quarto.org); make test checks the docs without it"; exit 1; }
	$(BIN)/nbdev_docs

# train the packaged tiny VLM from zero: half an hour on one quiet core (nbs/94_recipe.ipynb)
checkpoint: .venv/installed
	$(BIN)/python -c "from realign_nb.recipe import train; train('realign_nb/assets/tiny')"

# what the other targets made, except .venv
clean:
	rm -rf _proc _docs _check build dist *.egg-info .pytest_cache nbs/nbdev.yml runs/world
	find realign_nb tools tests nbs -name __pycache__ -type d -prune -exec rm -rf {} +
