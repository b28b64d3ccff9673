"""Installs the package `paddle_clip` and nothing else: convert/, tests/ and presets.py stay in the clone."""

import re
from pathlib import Path

from setuptools import setup

# Checksums at disk speed, where it is built for the processor.
ISAL = "isal; " + " or ".join(f"platform_machine == '{name}'" for name in ("x86_64", "AMD64", "aarch64", "arm64"))
HERE = Path(__file__).parent
CPU = ["paddlepaddle>=2.6.2"]
ONNX = ["paddle2onnx>=2.1"]
PARQUET = ["pyarrow"]
PROBE = ["scikit-learn"]
PLOT = ["matplotlib"]

setup(
    name="paddle-clip",
    version=re.search(r'__version__ = "(.+)"', (HERE / "paddle_clip" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="OpenAI's CLIP on PaddlePaddle, with a converter of OpenAI's checkpoints and proof of the numbers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["paddle_clip"],
    package_data={"paddle_clip": ["data/*", "data/samples/*"]},
    entry_points={"console_scripts": ["paddle-clip = paddle_clip.cli:console"]},
    python_requires=">=3.9",
    install_requires=["numpy", "pillow", "ftfy", "regex", "tqdm", "filelock", ISAL],
    extras_require={
        "cpu": CPU,
        "gpu": ["paddlepaddle-gpu>=2.6.2", "numpy<2"],  # PyPI's newest is 2.6.2, which was built against numpy 1
        "onnx": ONNX,
        "openvino": [*ONNX, "openvino"],
        "int8": [*ONNX, "openvino", "nncf"],
        "parquet": PARQUET,
        "probe": PROBE,
        "plot": PLOT,
        "visualdl": ["visualdl"],
        "completion": ["argcomplete"],
        # pyarrow 26 needs numpy 2, which Paddle 2 cannot have.
        # clip-anytorch, the reference, and open_clip are installed by `make` with --no-deps: theirs bring torchvision.
        "test": [
            *CPU,
            *PROBE,
            *PLOT,
            "pyarrow<26",
            "pytest>=7",
            "ruff",
            "torch==2.13.0",
            "transformers==5.23.0",
            "safetensors",
        ],
    },
)
