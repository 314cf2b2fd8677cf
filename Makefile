# Everything from a bare clone: each target makes .venv first if it is not there.
PYTHON ?= python3
# Test processes, and threads of each: set both for a bigger machine.
WORKERS ?= 2
THREADS ?= 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := $(THREADS)

QUESTION := Anna sells bread. The train is late. Where does Anna work?
DAVE := Dave lives in Palm Coast, FL and is a lawyer. His personal interests include
GOLF := playing golf, hiking, and spending time with his family and friends.

.PHONY: help install demo test lint format docs tutorials bench bench-peers dist versions clean

help:
	@echo "make demo   which words of a prompt made the small real model say what it said"
	@echo "make test   the whole test suite"
	@echo "make lint   style, formatting and types"
	@echo "make format put the formatting right"
	@echo "make docs   the documentation as pages, in site/"
	@echo "make tutorials  run the notebooks and save their outputs"
	@echo "make bench  timings against Captum"
	@echo "make bench-peers  the same work by Captum, inseq and interpreto"
	@echo "make dist   wheel and sdist; the wheel tried in an empty environment (gigabytes)"
	@echo "make versions  the tests with the lowest and the newest versions allowed (gigabytes)"
	@echo "make clean  delete .venv and everything generated"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (several minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	@mkdir -p demo
	@echo "== which words of the question flow into each token of the answer"
	$(BIN)/captum-llm-ext "$(QUESTION)" --chat --by word --out demo/answer.png
	@echo "== L1 saliency of 31 layers in one call: the embeddings, and the mlp of every block"
	$(BIN)/captum-llm-ext "$(DAVE)" --target " $(GOLF)" --method saliency --by word \
		--layers embed_tokens "model.layers.*.mlp" \
		--out demo/layers.png
	@echo "== the pictures are demo/answer.png and demo/layers.png"

test: $(STAMP)
	@echo "== running the tests in $(WORKERS) processes"
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

lint: $(STAMP)
	@echo "== checking style, formatting and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	@echo "== building the pages: site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tutorials: $(STAMP)
	@echo "== running the notebooks and saving their outputs: about three minutes"
	$(BIN)/python tutorials/run.py

bench: $(STAMP)
	@echo "== timing against Captum: run it on a machine that does nothing else"
	$(BIN)/python -m tests.benchmarks.gradients
	$(BIN)/python -m tests.benchmarks.perturbations
	$(BIN)/python -m tests.benchmarks.prefixes
	$(BIN)/python -m tests.benchmarks.forward
	$(BIN)/python -m tests.benchmarks.flow
	@echo "== one call against loops by hand"
	$(BIN)/python -m tests.benchmarks.loops
	$(BIN)/python -m tests.benchmarks.relevance
	@echo "== 4, 8 and 16 bits against float32"
	$(BIN)/python -m tests.benchmarks.quantization

dist: $(STAMP)
	@echo "== building the wheel and the sdist, and trying the wheel in an empty environment"
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m tests.release.check_wheel

versions: $(STAMP)
	@echo "== running the tests with the lowest and with the newest versions allowed"
	$(BIN)/python -m tests.release.versions

bench-peers: $(STAMP)
	@echo "== the same work by four libraries: about 15 minutes on a machine that does nothing else"
	$(BIN)/python -m tests.benchmarks.peers

clean:
	rm -rf $(VENV) .versions build dist demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis
