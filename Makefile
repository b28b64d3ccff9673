# make demo   convert the small model in the package, classify and plot its sample pictures, compare with PyTorch
# make rn50   convert a checkpoint made by OpenAI's own code and compare Paddle with PyTorch on it
# make test   run the linters and the tests
# make lint   run the linters alone
# make smoke  install the clone into a fresh environment with PYTHON and use it (about a minute)
# make parity compare all nine architectures at full size (about 20 minutes)
#
# Each sets up what it needs in .venv-<Paddle version>, once. PADDLE=2.6.2 chooses another Paddle, PYTHON another Python.

PADDLE ?= 3.3.1
PYTHON ?= python3
VENV := .venv-$(PADDLE)
BIN := $(VENV)/bin
# Paddle 2 was built against numpy 1.
NUMPY := $(if $(filter 2.%,$(PADDLE)),numpy<2,numpy>=2)
# What translates programs to ONNX is for Paddle 3.
ONNX := $(if $(filter 2.%,$(PADDLE)),,paddle2onnx openvino nncf onnxruntime)
RAY := $(if $(filter 2.%,$(PADDLE)),,'ray[data]')
# The code is the same for both, and Paddle 2 has no types.
LINT := $(if $(filter 2.%,$(PADDLE)),,lint)
export GLOG_minloglevel = 2

.PHONY: ready demo rn50 test lint smoke parity clean

test: $(VENV)/ready $(LINT)
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

smoke:
	$(PYTHON) tests/smoke.py

demo: $(VENV)/ready
	mkdir -p .demo
	cp paddle_clip/data/clip_tiny.pt .demo/tiny.pt
	$(BIN)/python convert/pt2paddle.py .demo/tiny.pt
	$(BIN)/paddle-clip classify @samples --model .demo/tiny.pdparams --top-k 1 \
	    --labels 'red circle' 'orange star' 'green heart' 'blue triangle' 'black cross' \
	    'yellow diamond' 'purple square' 'pink ring'
	$(BIN)/paddle-clip similarity @samples --model .demo/tiny.pdparams --plot .demo/similarity.png --json >.demo/similarity.json
	$(BIN)/python convert/parity.py .demo/tiny.pt

rn50: $(VENV)/ready
	mkdir -p .demo
	$(BIN)/python convert/reference.py make RN50 .demo/RN50.pt
	$(BIN)/python convert/pt2paddle.py .demo/RN50.pt
	$(BIN)/python convert/parity.py .demo/RN50.pt

parity: $(VENV)/ready
	$(BIN)/python convert/parity.py --all

ready: $(VENV)/ready

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' $(ONNX) $(RAY) 'paddlepaddle==$(PADDLE)' '$(NUMPY)'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps clip-anytorch==2.6.0 open_clip_torch==3.3.0 cn-clip==1.6.0 six
	# Its top-level package is called clip, as clip-anytorch's: a folder of its own keeps them apart.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/paddleclip paddleclip==1.0.0
	touch $@

clean:
	rm -rf .venv-* .demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
