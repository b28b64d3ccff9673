"""Exported programs -> ONNX, OpenVINO and int8, each in a process of its own.

What translates prints much and keeps the memory of the weights. `python -m paddle_clip.translation` is that process.
"""

import os
import subprocess
import sys
from typing import Optional

import numpy as np

from .checkpoints.shapes import tower_sizes
from .config import CLIPConfig
from .extras import require

MOST_BYTES = 2**31 - 2**24  # of a tower's weights, so that with its program it is less than the 2 GiB of protobuf


def too_large(config: CLIPConfig) -> str:
    """Why a model in float32 is too large to be translated, or ""."""
    for tower, size in tower_sizes(config).items():
        if 4 * size > MOST_BYTES:
            return (
                f"the {tower} encoder has {4 * size / 1e9:.1f} GB of weights; ONNX, through which it is translated, "
                "holds 2.1 GB: take engine='paddle', or export without onnx and openvino"
            )
    return ""


def write_onnx(directory: str, tower: str) -> None:
    """Translates a program of `export` into <tower>.onnx beside it.

    Raises:
        ImportError: if paddle2onnx is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("onnx")
    path = os.path.join(directory, tower)
    _run_module(["onnx", path], path + ".onnx", f"translate the {tower} encoder to ONNX")


def write_openvino(directory: str, tower: str) -> None:
    """Translates a program of `export` into OpenVINO's <tower>.xml and .bin beside it.

    Raises:
        ImportError: if OpenVINO or paddle2onnx is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("openvino")
    path = os.path.join(directory, tower)
    _run_module(["openvino", path], path + ".bin", f"translate the {tower} encoder for OpenVINO")


def write_int8(directory: str, images: np.ndarray, is_transformer: bool) -> None:
    """Quantises image.xml into image.int8.xml and .bin beside it, by NNCF's post-training quantisation.

    Args:
        directory: folder with the image.xml of `write_openvino`.
        images: pictures that the ranges of the activations are read from, [N, 3, R, R].
        is_transformer: whether the encoder is one; a convolutional network has other rules.

    Raises:
        ImportError: if NNCF is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("int8")
    path = os.path.join(directory, "calibration.npy")
    np.save(path, images)
    arguments = ["int8", directory, "TRANSFORMER" if is_transformer else ""]
    _run_module(arguments, os.path.join(directory, "image.int8.bin"), "quantise the image encoder")
    os.unlink(path)


def _run_module(arguments: list[str], result: str, purpose: str) -> None:
    """Runs this module with some arguments, which is to write the file `result`."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # a clone may not be installed
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or not os.path.exists(result):
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        # paddle2onnx says why it failed before it fails of something else.
        reason = next((line for line in said if "Failed" in line), said[-1])
        raise RuntimeError(f"could not {purpose} (exit status {done.returncode}): {reason}")


# ------------------------------------------------------------------------------------------- in the process of its own


def _to_onnx(path: str, save_file: Optional[str] = None) -> Optional[bytes]:
    """The program <path>.json as ONNX: the bytes, or None if they are written to a file."""
    import paddle2onnx

    result: Optional[bytes] = paddle2onnx.export(
        path + ".json",
        path + ".pdiparams",
        save_file,
        opset_version=17,
        enable_onnx_checker=False,  # it would load the weights once more
        optimize_tool="None",  # what loads the file optimizes it
    )
    return result


def _to_openvino(path: str) -> None:
    """Writes <path>.xml and .bin of the program <path>.json.

    Their weights are read as they are needed, which those in ONNX are not.
    OpenVINO leaves float32 products to MLAS, but those with an operation after them to oneDNN. MLAS is a sixth slower
    where more numbers are added up than come out, as in c_proj: behind these goes a clamp that changes nothing.
    """
    import openvino
    from openvino import opset13, passes

    model = openvino.Core().read_model(_to_onnx(path))
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())  # parts of weights
    manager.run_passes(model)
    largest = float(np.finfo("float32").max)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Add" and node.input_value(0).get_node().get_type_name() == "MatMul":
            weight = node.input_value(0).get_node().input_value(1).get_node()
            if weight.get_type_name() == "Constant" and weight.shape[0] > weight.shape[1]:
                readers = node.output(0).get_target_inputs()
                clamp = opset13.clamp(node, -largest, largest)
                for reader in readers:
                    reader.replace_source_output(clamp.output(0))
    openvino.save_model(model, path + ".xml", compress_to_fp16=False)


def _to_int8(directory: str, kind: str) -> None:
    """Writes image.int8.xml and .bin of the image.xml and calibration.npy in a folder."""
    import logging

    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    images = np.load(os.path.join(directory, "calibration.npy"), mmap_mode="r")
    model = openvino.Core().read_model(os.path.join(directory, "image.xml"))
    data = nncf.Dataset([image[None] for image in images])
    model = nncf.quantize(model, data, subset_size=len(images), model_type=getattr(nncf.ModelType, kind, None))
    openvino.save_model(model, os.path.join(directory, "image.int8.xml"))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "onnx":
        _to_onnx(arguments[0], arguments[0] + ".onnx")
    else:
        (_to_openvino if what == "openvino" else _to_int8)(*arguments)
