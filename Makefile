# Every target does its own set-up: on a fresh machine `make demo` or `make test` is the only command needed.
BIN := .venv/bin
TREE := dist_defend examples tests setup.py launch

.PHONY: setup test test-gpu demo docs lint format release clean

setup:
	@launch/bootstrap

# Where Slurm is missing (make setup installs it for root) its tests are left out, loudly; CI may not do without them.
# A line says with which Pythons the files are tried (tests/e2e/test_pythons.py).
test: lint
	@left_out=; if [ -z "$$CI" ]; then $(BIN)/python -m tests.slurm.cluster || left_out=--ignore=tests/slurm; fi; \
	$(BIN)/python -m tests.interpreters; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --no-loadscope-reorder $$left_out

# On a machine with a GPU and its own PyTorch; ten minutes at most. The first time: tests/gpu/first_ten_minutes.sh.
test-gpu:
	timeout 600 python3 -m pytest tests/gpu

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo

# The documentation's site. A warning, such as a link that leads nowhere, is an error. Then open build/docs/index.html;
# the search wants a server: python -m http.server -d build/docs
docs: setup
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build

lint: setup
	$(BIN)/ruff check $(TREE)
	$(BIN)/ruff format --check $(TREE)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format $(TREE)
	$(BIN)/ruff check --fix $(TREE)

# dist/ with sdist and wheel, checked, installed into a fresh environment and tried there. Downloads torch and all else again.
release: setup
	launch/release

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
