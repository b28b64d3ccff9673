"""What runs an exported encoder: Paddle Inference, or OpenVINO, which is an extra; and what translates programs."""

import importlib.util
import mmap
import os
import subprocess
import sys

import numpy as np
from paddle import inference

PROGRAM_SUFFIXES = (".json", ".pdmodel")  # Paddle 3's, Paddle 2's
ENGINES = ("paddle", "openvino")
# The packages of the extras onnx, openvino and int8, and what brings all each of them needs.
INSTALL = {
    "paddle2onnx": "pip install paddle2onnx",
    "openvino": "pip install openvino paddle2onnx",
    "nncf": "pip install nncf openvino paddle2onnx",
}


class PaddleInference:
    """An encoder, array to array, by Paddle Inference: CUDA on a GPU, on the CPU oneDNN, or with Paddle 2 MKL.

    Args:
        directory: what `export` wrote.
        tower: "image" or "text".
        device: "cpu", "gpu" or "gpu:<number>".
        threads: for the CPU.
        rows: images the CPU is given at once; it is given these or one. Of no effect on texts and on a GPU.
    """

    def __init__(self, directory, tower, device, threads, rows):
        path = os.path.join(directory, tower)
        program = next(path + suffix for suffix in PROGRAM_SUFFIXES if os.path.exists(path + suffix))
        config = inference.Config(program, path + ".pdiparams")
        paddle_3 = program.endswith(".json")
        if paddle_3:
            config.enable_new_ir()
            config.enable_new_executor()
        if device.startswith("gpu"):
            config.enable_use_gpu(100, int(device.partition(":")[2] or 0))
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(threads)
            if paddle_3:
                config.enable_mkldnn()
                # Each shape of images keeps a packed copy of the weights, which pays: there are two, see _parts.
                # Texts have too many shapes for that: without this fusion nothing is packed.
                config.set_mkldnn_cache_capacity(2 if tower == "image" else 100)
                if tower == "text":
                    config.delete_pass("matmul_add_act_fuse_pass")
            else:
                config.disable_mkldnn()  # which in Paddle 2 fails where the batch size is free
        config.enable_memory_optim()
        config.disable_glog_info()
        self._predictor = inference.create_predictor(config)
        self._rows = rows if tower == "image" and device == "cpu" else None

    def __call__(self, array):
        return np.concatenate([self._run(part)[:rows] for part, rows in self._parts(array)])

    def _parts(self, array):
        """The batch in the shapes that are run, each with how many of its rows are wanted."""
        if self._rows is None or len(array) in (1, self._rows):
            yield array, len(array)
        elif len(array) <= self._rows // 2:
            for row in range(len(array)):
                yield array[row : row + 1], 1
        else:
            padded = np.zeros((self._rows, *array.shape[1:]), array.dtype)
            padded[: len(array)] = array
            yield padded, len(array)

    def _run(self, array):
        self._predictor.get_input_handle(self._predictor.get_input_names()[0]).copy_from_cpu(array)
        self._predictor.run()
        return self._predictor.get_output_handle(self._predictor.get_output_names()[0]).copy_to_cpu()


class OpenVINO:
    """An encoder, array to array, by OpenVINO on the CPU.

    Args:
        directory: what `export(…, openvino=True)` wrote.
        file: name of one of its .xml files.
        threads: of the CPU.
        example: an input, run at once: the weights are packed by it, and what was read of their file is given back.

    Raises:
        ImportError: if OpenVINO is not installed.
    """

    def __init__(self, directory, file, threads, example):
        require("openvino")
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # and not bfloat16, where the processor has it
        }
        path = os.path.join(directory, file)
        with open(os.path.splitext(path)[0] + ".bin", "rb") as weights:
            # Writable, as a Tensor's memory has to be; nothing is written.
            self._mapped = mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_COPY)
        self._weights = np.frombuffer(self._mapped, np.uint8)  # what the program reads, as long as it runs
        core = openvino.Core()
        with open(path, "rb") as program:
            model = core.read_model(program.read(), openvino.Tensor(self._weights, shared_memory=True))
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._shapes = set()
        self(example)

    def __call__(self, array):
        features = self._request.infer([array])[0]
        if array.shape not in self._shapes:  # for which weights may have been packed, and copies of them are kept
            self._shapes.add(array.shape)
            self._mapped.madvise(mmap.MADV_DONTNEED)  # what is needed still is read from the file again
        return features


def has_openvino():
    """Whether a model can be compiled for OpenVINO: it and the way to ONNX are installed."""
    return all(importlib.util.find_spec(name) for name in ("openvino", "paddle2onnx"))


def write_onnx(directory, tower):
    """Translates a program of `export` into <tower>.onnx beside it.

    Raises:
        ImportError: if paddle2onnx is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("paddle2onnx")
    options = {
        "model_dir": directory,
        "model_filename": f"{tower}.json",
        "params_filename": f"{tower}.pdiparams",
        "save_file": os.path.join(directory, f"{tower}.onnx"),
        "opset_version": "17",
        "enable_onnx_checker": "False",  # it would load the weights once more
        "optimize_tool": "None",  # what loads the file optimizes it
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    _run(
        ["-m", "paddle2onnx.command", *arguments],
        options["save_file"],
        f"translate the {tower} encoder to ONNX",
    )


# OpenVINO leaves float32 products to MLAS, but those with an operation after them to oneDNN. MLAS is a sixth slower
# where more numbers are added up than come out, as in c_proj: behind these goes a clamp that changes nothing.
TRANSLATE = """
import sys, numpy, openvino
from openvino import opset13, passes
path, = sys.argv[1:]
model = openvino.Core().read_model(path + ".onnx")
manager = passes.Manager()
manager.register_pass(passes.ConstantFolding())  # parts of weights
manager.run_passes(model)
largest = numpy.finfo("float32").max
for node in model.get_ordered_ops():
    if node.get_type_name() == "Add" and node.input_value(0).get_node().get_type_name() == "MatMul":
        weight = node.input_value(0).get_node().input_value(1).get_node()
        if weight.get_type_name() == "Constant" and weight.shape[0] > weight.shape[1]:
            readers = node.output(0).get_target_inputs()
            clamp = opset13.clamp(node, -largest, largest)
            for reader in readers:
                reader.replace_source_output(clamp.output(0))
openvino.save_model(model, path + ".xml", compress_to_fp16=False)
"""


def write_openvino(directory, tower):
    """Translates <tower>.onnx, of `write_onnx`, into OpenVINO's <tower>.xml and .bin beside it.

    Its weights are read as they are needed, which those in a .onnx file are not.

    Raises:
        ImportError: if OpenVINO is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("openvino")
    path = os.path.join(directory, tower)
    _run(["-c", TRANSLATE, path], path + ".bin", f"translate the {tower} encoder for OpenVINO")


QUANTIZE = """
import logging, sys
import nncf, numpy, openvino
nncf.set_log_level(logging.ERROR)
directory, kind = sys.argv[1:]
images = numpy.load(f"{directory}/calibration.npy", mmap_mode="r")
model = openvino.Core().read_model(f"{directory}/image.xml")
data = nncf.Dataset([image[None] for image in images])
model = nncf.quantize(model, data, subset_size=len(images), model_type=getattr(nncf.ModelType, kind, None))
openvino.save_model(model, f"{directory}/image.int8.xml")
"""


def write_int8(directory, images, transformer):
    """Quantises image.xml into image.int8.xml and .bin beside it: NNCF's post-training quantisation.

    Args:
        directory: with the image.xml of `write_openvino`.
        images: what the ranges of the activations are read from, [N, 3, R, R].
        transformer: whether the encoder is one; a convolutional network has other rules.

    Raises:
        ImportError: if NNCF is not installed.
        RuntimeError: if it fails, with what it said last.
    """
    require("nncf")
    path = os.path.join(directory, "calibration.npy")
    np.save(path, images)
    arguments = ["-c", QUANTIZE, directory, "TRANSFORMER" if transformer else ""]
    _run(arguments, os.path.join(directory, "image.int8.bin"), "quantise the image encoder")
    os.unlink(path)


def require(*packages):
    """Raises ImportError, with the command that installs it, for the first of the packages that is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: {INSTALL[package]}")


def _run(arguments, result, purpose):
    """Runs Python in a process of its own, as these tools print much and keep the memory of the weights."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode or not os.path.exists(result):
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        # paddle2onnx says why it failed before it fails of something else.
        reason = next((line for line in said if "Failed" in line), said[-1])
        raise RuntimeError(f"could not {purpose} (exit status {done.returncode}): {reason}")
