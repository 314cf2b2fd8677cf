# Everything from a bare clone: each target makes .venv first if it is not there.
PYTHON ?= python3
# Test processes, and threads of each: set both for a bigger machine.
WORKERS ?= 2
THREADS ?= 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := $(THREADS)

DAVE := Dave lives in Palm Coast, FL and is a lawyer. His personal interests include
GOLF := playing golf, hiking, and spending time with his family and friends.

.PHONY: help install demo test lint format bench bench-peers clean

help:
	@echo "make demo   which words of a prompt made the small real model say what it said"
	@echo "make test   the whole test suite"
	@echo "make lint   style, formatting and types"
	@echo "make format put the formatting right"
	@echo "make bench  timings against Captum"
	@echo "make bench-peers  the same work by Captum, inseq and interpreto"
	@echo "make clean  delete .venv and everything generated"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (several minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	@mkdir -p demo
	@echo "== which words of the prompt made the model say ' Paris': L1 saliency"
	$(BIN)/captum-llm-ext "The capital of France is" --target " Paris" --out demo/capital.png
	@echo "== gradient x activation of 121 layers at once: embeddings; q, k, v and mlp of every block"
	$(BIN)/captum-llm-ext "$(DAVE)" --target " $(GOLF)" --method gradxact \
		--layers embed_tokens "model.layers.*.self_attn.[qkv]_proj" "model.layers.*.mlp" \
		--out demo/layers.png
	@echo "== the pictures are demo/capital.png and demo/layers.png"

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

bench: $(STAMP)
	@echo "== timing against Captum: run it on a machine that does nothing else"
	$(BIN)/python -m tests.benchmarks.gradients
	$(BIN)/python -m tests.benchmarks.perturbations
	$(BIN)/python -m tests.benchmarks.prefixes
	$(BIN)/python -m tests.benchmarks.forward

bench-peers: $(STAMP)
	@echo "== the same work by four libraries: about 15 minutes on a machine that does nothing else"
	$(BIN)/python -m tests.benchmarks.peers

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
