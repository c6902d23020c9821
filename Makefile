# Needs make and Python 3.10 or newer with venv and pip; everything else is installed into virtual environments in here.
# pip is used as it is configured: an index set by PIP_INDEX_URL or PIP_EXTRA_INDEX_URL is honoured.

PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
TORCH ?= torch==2.13.0
PROMPT ?= What is the capital of France?
SANITIZER ?= compute-sanitizer
SANITIZED ?= bench/results/$(shell date -u +%F)-sanitizers.jsonl
BENCH ?= bench/results/$(shell date -u +%F)-ops.jsonl
OUT ?= bench/results
SOAK ?= bench/results/$(shell date -u +%F)-soak.jsonl
REQUESTS ?= 10000
SIDE_BY_SIDE ?= 4
OP ?=
MODEL ?= tiny
TRAIN ?=

# Wheels only: nothing is ever compiled here. Without --no-compile pip byte-compiles all of torch, used or not.
PIP_INSTALL = -m pip --disable-pip-version-check install --only-binary :all: --no-compile

.DELETE_ON_ERROR:
.PHONY: help demo test ci soak gpu step train deep61 lint python clean

help:
	@echo "make demo   answer a prompt with the embedded model (sets up $(VENV) on first use; PROMPT=... asks something else)"
	@echo "make test   lint, types and the everyday tests (sets up $(TEST_VENV) on first use)"
	@echo "make ci     all that runs without a GPU, the slow tests too"
	@echo "make soak   REQUESTS=$(REQUESTS) clients of every kind against one server, in minutes; the record goes into $(SOAK)"
	@echo "make gpu    on a GPU: its tests, sanitizers, every case, times (records in bench/results), with the $(PYTHON) that has torch;"
	@echo "            OP=linear,moe and the like: only these families of cases"
	@echo "make step   on one GPU, in minutes: that random layers of Flash say the same however they run, and how long steps of Flash"
	@echo "            and Pro and chunks of prompts take (lines of JSON in OUT=$(OUT)), with the same $(PYTHON)"
	@echo "make train  train MODEL=$(MODEL) with the $(PYTHON) that has torch (training/README.md)"
	@echo "make deep61 unpack the model of 61 layers to training/build/deep61/model"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv, .venv-test and the caches"
	@echo "PYTHON, VENV, TEST_VENV, TORCH (now $(TORCH)) and PROMPT can be set, as in: make demo PYTHON=python3.12"

demo: $(VENV)/.ready
	@$(VENV)/bin/dsv4 generate -p "$(PROMPT)"

# A file stays with one worker: what its tests share is made once, and so are the kernels that it compiles.
test: lint
	$(TEST_VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

ci: lint
	$(TEST_VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not gpu" --durations=10

soak: $(TEST_VENV)/.ready
	$(TEST_VENV)/bin/python -m tests.soak --requests $(REQUESTS) --out $(SOAK)

lint: $(TEST_VENV)/.ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy

# The cases of the contract are judged once, by `dsv4 check`. What fails does not keep the rest from being seen. OP names
# families of cases, with commas: then only what is about them.
comma := ,
FAMILIES = $(subst $(comma), ,$(OP))
GPU_TESTS = $(if $(OP),$(wildcard $(FAMILIES:%=tests/test_kernels_%*.py)),`grep -l mark.gpu tests/test_*.py`)

# Layers of full width are for `make step`: not even two processes should hold them at once.
SMALL_TESTS = not keep_the_contract and not random_layers
SEES_GPU = $(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null \
	|| { echo "make $@: $(PYTHON) has no torch that sees a GPU; name one that does with PYTHON=..." >&2; exit 1; }

gpu:
	@$(SEES_GPU)
	@command -v $(SANITIZER) >/dev/null || { echo "make gpu: no $(SANITIZER) on the PATH; it comes with CUDA's toolkit" >&2; exit 1; }
	@failed=; \
	run() { echo "$$*"; "$$@" || failed="$$failed $$*;"; }; \
	test -z "$(GPU_TESTS)" || run $(PYTHON) -m pytest -n $(SIDE_BY_SIDE) -m gpu -k "$(SMALL_TESTS)" $(GPU_TESTS); \
	run env SANITIZER=$(SANITIZER) $(PYTHON) -m tests.sanitizers $(FAMILIES) --json $(SANITIZED); \
	run $(PYTHON) -m dsv4.cli.main check $(FAMILIES) --device cuda; \
	run $(PYTHON) -m dsv4.cli.main bench ops $(FAMILIES) --out $(BENCH); \
	test -z "$$failed" || { echo "make gpu: failed:$$failed" >&2; exit 1; }

# Whole steps: first that they are right, then how long they take. What fails does not keep the rest from being run.
DAY := $(shell date -u +%F)
STEPS = $(PYTHON) -m dsv4.cli.main bench decode --out $(OUT)/$(DAY)-decode.jsonl

step:
	@$(SEES_GPU)
	@mkdir -p $(OUT)
	@failed=; \
	run() { echo "$$*"; "$$@" || failed="$$failed $$*;"; }; \
	run $(PYTHON) -m pytest -m gpu tests/test_graphs.py; \
	run $(STEPS) --layers 8,16 --contexts 8192,131072,1048576 --sequences 1,8,32,64; \
	run $(STEPS) --config pro --layers 2,4 --contexts 8192 --sequences 1,8; \
	run $(PYTHON) -m dsv4.cli.main bench prefill --out $(OUT)/$(DAY)-prefill.jsonl; \
	echo "make step: lines in" `ls $(OUT)/$(DAY)-decode.jsonl $(OUT)/$(DAY)-prefill.jsonl 2>/dev/null`; \
	test -z "$$failed" || { echo "make step: failed:$$failed" >&2; exit 1; }

train:
	@test -d training/build/corpus || $(PYTHON) -m training.corpus `test ! -e training/build/corpus.tar.xz || echo unpack`
	@test -d training/build/vocabulary || $(PYTHON) -m training.vocabulary
	$(PYTHON) -m training.train $(MODEL) $(TRAIN)

# As it was trained (training/README.md), in the official format.
deep61: training/build/deep61/model/config.json

training/build/deep61/model/config.json: training/deep61.tar.xz | python
	@mkdir -p training/build/deep61
	@$(PYTHON) -m tarfile -e $< training/build/deep61
	@touch $@

python:
	@$(PYTHON) -c "import sys; raise SystemExit(sys.version_info < (3, 10))" || { \
		echo "dsv4 needs Python 3.10 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`; name another with PYTHON=..." >&2; \
		exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" \
		|| { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# A torch that $(PYTHON) can import is lent to the new environment by a .pth file, which works for a system Python and for
# an activated environment alike. The name sorts last: what is installed in here goes first. Without one, the demo gets
# the version that the tests run, in whichever build pip is set up to find.
$(VENV)/.ready: pyproject.toml | python
	@$(PYTHON) -m venv $(VENV)
	@site=`$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"`; \
	if $(PYTHON) -c "import sys, torch; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
		> "$$site/zz_lent.pth" 2>/dev/null; \
	then echo "Using the torch that $(PYTHON) has."; torch=; \
	else rm -f "$$site/zz_lent.pth"; echo "Installing $(TORCH) into $(VENV), once."; torch="$(TORCH)"; fi; \
	$(VENV)/bin/python $(PIP_INSTALL) $$torch --editable .
	@touch $@

$(TEST_VENV)/.ready: pyproject.toml | python
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) --quiet "$(TORCH)" --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-test .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
