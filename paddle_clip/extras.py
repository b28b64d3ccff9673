"""What is installed beside this package: Paddle, and the packages of the extras."""

import importlib.metadata
import importlib.util
import os
import shlex
import sys
from typing import Optional

# The packages of each extra by the names they are imported by. Installing an extra brings all of its packages.
EXTRAS = {
    "completion": ("argcomplete",),
    "int8": ("nncf", "openvino", "paddle2onnx"),
    "onnx": ("paddle2onnx",),
    "openvino": ("openvino", "paddle2onnx"),
    "openvino-runtime": ("openvino",),
    "parquet": ("pyarrow",),
    "plot": ("matplotlib",),
    "probe": ("sklearn",),
    "ray": ("ray", "pyarrow"),
    "visualdl": ("visualdl",),
}
_PIP_NAMES = {"sklearn": "scikit-learn", "ray": "ray[data]"}

# Paddle 2's library exports a zlib of its own. Loaded before Python's, it takes that one's place, and whatever
# decompresses then crashes the process, Pillow's PNG reader too.
ZLIB_IS_BROKEN = getattr(sys.modules.get("paddle"), "__version__", "").startswith("2.")

# Paddle's import sets it to 1 where it is not set: what stood there before is what the user chose.
OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS") if "paddle" not in sys.modules else None

# What started this process: a training's launcher may die during Paddle's import, which takes seconds.
STARTED_BY = os.getppid()

NO_PADDLE = (
    "paddle_clip needs PaddlePaddle, which is not installed. On a CPU: pip install paddlepaddle. "
    "On an NVIDIA GPU: pip install paddlepaddle-gpu"
)


def has(extra: str) -> bool:
    """Whether all packages of an extra are installed; none is imported."""
    return all(_is_installed(package) for package in EXTRAS[extra])


def require(extra: str) -> None:
    """Raises ImportError, with the command that installs what is missing, unless `has(extra)`."""
    missing = next((package for package in EXTRAS[extra] if not _is_installed(package)), None)
    if missing:
        command = "pip install " + shlex.join(_PIP_NAMES.get(package, package) for package in EXTRAS[extra])
        raise ImportError(f"{_PIP_NAMES.get(missing, missing)} is not installed: {command}")


def makes_openvino() -> bool:
    """Whether models can be compiled for OpenVINO: its extra is installed, and Paddle 3."""
    paddle_version = version_of("paddlepaddle") or version_of("paddlepaddle-gpu")
    return has("openvino") and paddle_version is not None and not paddle_version.startswith("2.")


def is_gpu_build() -> bool:
    """Whether the Paddle that is installed is built for GPUs, which it then computes on; it is not imported."""
    return version_of("paddlepaddle-gpu") is not None


def version_of(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # `sys.modules[package]` is None, or a module made by hand
        return sys.modules[package] is not None


PADDLE_IS_INSTALLED = _is_installed("paddle")
