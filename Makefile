# `make demo` and `make test` each do all set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

# The suite in two processes, of one thread of torch each
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The device of `make test-gpu`: cuda, or other, which needs a compiler only (tests/other)
DEVICE ?= cuda

.PHONY: demo test test-all test-gpu test-far lint bench clean

# torch first and pinned, so that nothing drags in another build
.venv/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch hatchling editables
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[demo,test,dev]'
	@# Peers, for tests and benches. Without their dependencies: memcnn and momentumnet ask for torchvision and more.
	$(BIN)/python -m pip install --quiet --no-deps memcnn==1.5.2 revlib==1.7.2 revtorch==0.2.4 \
		invtorch==0.5.0 momentumnet==0.10
	@# Hugging Face's GPT-2, for bench/ordinary.py. Without dependencies: none may bring another torch.
	$(BIN)/python -m pip install --quiet --no-deps transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 \
		safetensors==0.8.0 regex pyyaml requests urllib3 certifi charset-normalizer idna tqdm
	@# Trainers, for revhooks.integrations. Without dependencies, but what they import: Lightning asks for a second one of itself.
	$(BIN)/python -m pip install --quiet --no-deps lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 \
		accelerate==1.12.0 psutil packaging fsspec typing-extensions
	@# Flow libraries and GroupAddRev, for revhooks.adapters. Without dependencies: none may bring another torch or torchvision.
	$(BIN)/python -m pip install --quiet --no-deps FrEIA==0.2 normflows==1.7.3 nflows==0.14 zuko==1.6.0 \
		torch-geometric==2.8.1 xxhash
	@touch $@

demo: .venv/.installed
	$(BIN)/revhooks demo

test: .venv/.installed
	$(TESTS) -m 'not slow and not gpu'

test-all: .venv/.installed
	$(TESTS) -m 'not gpu'

test-gpu: .venv/.installed
	$(BIN)/python -m pytest --device $(DEVICE) -m 'not slow' tests

# Without a GPU: every device is taken for far, and backward runs in another thread
test-far: .venv/.installed
	$(TESTS) --far --threads -m 'not slow and not gpu' tests

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python bench/coupling_chain.py
	$(BIN)/python bench/ordinary.py
	$(BIN)/python bench/fixed_cost.py
	$(BIN)/python bench/host_cost.py
	$(BIN)/python bench/offload.py
	$(BIN)/python bench/semantics.py
	$(BIN)/python bench/drift.py
	$(BIN)/python bench/cifar_table.py
	$(BIN)/python bench/iresnet_table.py
	$(BIN)/python bench/flows.py
	$(BIN)/python bench/flows_by_hand.py
	$(BIN)/python bench/flows_own.py
	$(BIN)/python bench/picture.py
	$(BIN)/python bench/figures.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
