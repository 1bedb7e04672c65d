PYTHON ?= python3
BIN := .venv/bin

# one virtual environment, made again when the project's dependencies change
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.PHONY: quickstart test test-engines test-stacks check dev docs gpu-evidence

quickstart: .venv/ready  ## the main job: proxies, fit, validation, transfer
	$(BIN)/scaletune run configs/quickstart.toml

test: .venv/ready  ## the whole suite, CPU, in as many processes as there are cores (at most 4)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-engines: .venv/ready  ## the engines of several machines: 250 MB more than `test` installs
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,ray,slurm]'
	$(BIN)/python -m pytest tests/test_ray.py tests/test_slurm.py

test-stacks:  ## the emitters whose stacks do not go with our pinned packages: 3 GB, most of it Triton
	$(PYTHON) -m venv .venv-stacks
	.venv-stacks/bin/pip install --quiet torch==2.13.0
	.venv-stacks/bin/pip install --quiet --editable '.[test]' torch==2.13.0 torchtitan==0.3.0 ai2-olmo-core==3.0.0 triton
	.venv-stacks/bin/python -m pytest -rs tests/test_transferring_stacks.py

dev: .venv/ready  ## the tools for working on the code
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'

check: dev  ## what must be clean before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready  ## builds the site in build/site; a broken link fails. To read it: python3 -m http.server -d build/site
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu-evidence:  ## what a machine with a GPU is asked: run it there, in an environment that has the dependencies
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'gpu-evidence needs a CUDA device'"
	$(PYTHON) -m pytest -m gpu -rs
	$(PYTHON) benchmarks/throughput.py
	$(PYTHON) benchmarks/stacked_steps.py
	$(PYTHON) -m scaletune run configs/quickstart.toml --set name=quickstart-gpu --set engine.workers=8 --out $${OUT:-gpu-evidence}
	$(PYTHON) -m scaletune run configs/quickstart.toml --set name=quickstart-stacked --set engine.stack=fill --out $${OUT:-gpu-evidence}
