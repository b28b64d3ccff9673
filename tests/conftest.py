import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, *(os.path.join(ROOT, folder) for folder in ("convert", "examples", "tests/tools"))]

os.environ["PADDLE_CLIP_CACHE"] = tempfile.mkdtemp(prefix="paddle-clip-tests-")  # and not the user's
atexit.register(shutil.rmtree, os.environ["PADDLE_CLIP_CACHE"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two suites share the cores, and sums keep their order

import paddle_clip  # noqa: F401  isort: skip  before paddle, see extras.ZLIB_IS_BROKEN
import paddle

# A shell starts background jobs with SIGINT ignored, and the processes that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _gpu_missing():
    if not paddle.device.is_compiled_with_cuda():
        return "this build of Paddle has no CUDA"
    if not paddle.device.cuda.device_count():
        return "Paddle finds no GPU"
    return None


DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.skipif(bool(_gpu_missing()), reason=str(_gpu_missing())))]


@pytest.fixture(params=DEVICES)
def device(request):
    """Runs the test on the CPU, and on the GPU where there is one."""
    paddle.set_device(request.param)
    yield request.param
    paddle.set_device("cpu")


@pytest.fixture(autouse=True)
def on_cpu():
    paddle.set_device("cpu")
    paddle.seed(0)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder of the checkpoints that make_files.py wrote."""
    folder = tmp_path_factory.mktemp("files")
    script = os.path.join(ROOT, "tests", "tools", "make_files.py")
    subprocess.run([sys.executable, script, str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def library_files(files):
    """The same folder, with the files that other libraries wrote for the same models."""
    tools = os.path.join(ROOT, "tests", "tools")
    packages = os.path.join(sys.prefix, "paddleclip")
    assert os.path.isdir(packages), f"paddleclip 1.0.0 is missing: pip install --no-deps --target {packages} paddleclip"
    subprocess.run([sys.executable, os.path.join(tools, "make_library_files.py"), str(files)], check=True)
    subprocess.run([sys.executable, os.path.join(tools, "make_paddleclip_files.py"), str(files), packages], check=True)
    return files


@pytest.fixture
def arrays_of(files):
    """A function returning the arrays that PyTorch saw in the file of a stem."""

    def load(stem):
        with np.load(files / f"{stem}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def run():
    """A function running a script of the repository; returns the completed process, with its output as text."""

    def call(*arguments, cwd=ROOT, **environment):
        command = [sys.executable, *map(str, arguments)]
        environment = {**os.environ, "GLOG_minloglevel": "2", **environment}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    return call
