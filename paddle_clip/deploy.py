"""A model -> programs for deployment: written to a folder by `export`, or held in memory by `compile`."""

import errno
import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.static import InputSpec

from . import translation
from .checkpoints.files import StrPath, crc32_of_file, expanded, former, replacing_folder
from .checks import unwrapped
from .encoding import require_dynamic_mode
from .engines import Predictor, as_batch, require_engine
from .exported import EXPORT_DTYPES, FORMAT, TOWERS, VERSION, is_export, program_suffix, read_program
from .extras import has, require
from .model import CLIP

PADDLE_3 = not paddle.__version__.startswith("2.")
# Work the CPU is given at once. Larger batches are slower: their activations leave the caches, and the memory of each
# is asked of the system and given back. Measured with benchmarks/scaling.py.
CPU_TOKENS = 640
CPU_PIXELS_VIT = 8 * 224**2
CPU_PIXELS_RESNET = 4 * 224**2

_LEAST_FREE = 1 << 20  # bytes on a disk that is not full


class _Tower(nn.Layer):
    """One encoder of a model, as a layer of its own: tracing it leaves the model as it is."""

    def __init__(self, encode: Callable[[Tensor], Tensor], model: CLIP):
        super().__init__()
        self.model = model
        self.encode = encode

    # No branch of ours asks a Tensor: rewriting code for those that do takes five times as long as tracing it, and a
    # home folder that can be written.
    @paddle.jit.not_to_static
    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x).astype("float32")


def export(
    model: CLIP,
    directory: StrPath,
    onnx: bool = False,
    openvino: bool = False,
    calibration: Optional[Any] = None,
) -> None:
    """Writes both encoders as Paddle Inference programs, which run without this package's networks.

    Batch size and text length stay free. Convolutions and their batch norms are folded when the folder is loaded.

    Args:
        model: a `CLIP` in float32, or, for a GPU, float16 or bfloat16.
        directory: folder to make. One that `export` wrote before is replaced; any other must be empty.
        onnx: whether to write both encoders as image.onnx and text.onnx too, for ONNX Runtime, TensorRT and others.
            Takes Paddle 3, a model in float32 and the extra `onnx`.
        openvino: whether to write both encoders for OpenVINO too. Takes Paddle 3, a model in float32 and the extra
            `openvino`.
        calibration: some hundreds of preprocessed pictures of the kind the model will see, [N, 3, R, R], numpy array or
            Tensor. The image encoder is then written in int8 too, for `Predictor(…, precision="int8")`. Takes the
            extra `int8`; implies `openvino`.

    Raises:
        ValueError: if the model is in another dtype, it or the Paddle another than `onnx` and `openvino` take, one of
            its towers has more than the 2 GiB that ONNX holds, `calibration` is of another shape, or a layer put into
            the model uses operators that exports may not use.
        FileExistsError: if the folder holds anything else.
        ImportError: if what an extra brings is not installed.
        RuntimeError: if the translation or the quantisation fails, or Paddle is in static mode.
        CheckpointError: if another process is writing the folder.
        OSError: if the system refuses to write. An export from before is untouched.
    """
    require_dynamic_mode()
    model = unwrapped(model)
    if calibration is not None:
        openvino, calibration = True, as_batch(calibration, model.config.image_resolution)
        if not len(calibration):
            raise ValueError("calibration has no images; give some hundreds")
    dtype = str(model.dtype).split(".")[-1]
    if not (model.config.has_image and model.config.has_text):
        raise ValueError("the model is one tower alone, and an export has both; engine='eager' runs it as it is")
    if getattr(model.visual, "proj", model) is None:
        raise ValueError("visual.proj is None: image features do not fit those of texts, which an export takes to fit")
    require_export(directory, dtype, onnx, openvino, calibration is not None)
    if (onnx or openvino) and translation.too_large(model.config):
        raise ValueError(translation.too_large(model.config))
    directory = os.path.realpath(expanded(directory))  # a link to a folder stays one
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with replacing_folder(directory) as partial:
        try:
            _write(model, dtype, partial, onnx, openvino, calibration)
        except (RuntimeError, ValueError) as error:  # as Paddle and OpenVINO tell of a full disk
            if shutil.disk_usage(partial).free < _LEAST_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory) from error
            raise


def require_export(
    directory: StrPath, dtype: str, onnx: bool = False, openvino: bool = False, int8: bool = False
) -> None:
    """Raises what `export` would for files it cannot write, before any work is done.

    Raises:
        ValueError: if a model of this dtype cannot be exported, or it or this Paddle is another than `onnx` and
            `openvino` take.
        ImportError: if what an extra brings is not installed.
        FileExistsError: if the folder holds anything but an export.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(
            f"the model is in {dtype}; export takes {', '.join(EXPORT_DTYPES)}: load it with dtype='float32'"
        )
    if (onnx or openvino) and (dtype != "float32" or not PADDLE_3):
        raise ValueError(
            "files for ONNX and OpenVINO take a float32 model and Paddle 3; "
            f"this is {dtype}, Paddle {paddle.__version__}"
        )
    for extra, is_asked_for in (("int8", int8), ("openvino", openvino), ("onnx", onnx)):
        if is_asked_for:
            require(extra)
    directory = os.path.realpath(expanded(directory))
    for path in (directory, former(directory)):
        if os.path.lexists(path) and not _is_replaceable(path):
            raise FileExistsError(f"{path} is not an empty folder, nor one that export wrote: choose another")


def _is_replaceable(directory: str) -> bool:
    return os.path.isdir(directory) and (not os.listdir(directory) or is_export(directory))


def _write(
    model: CLIP, dtype: str, directory: str, onnx: bool, openvino: bool, calibration: Optional[np.ndarray]
) -> None:
    with ThreadPoolExecutor(len(TOWERS)) as pool:  # each translation is a process that uses one core
        programs = _write_programs(model, directory)
        translations = [pool.submit(_translate, directory, tower, onnx, openvino) for tower in programs]
    for each in translations:
        each.result()
    if calibration is not None:
        translation.write_int8(directory, calibration, model.config.is_vit)
    size = model.config.image_resolution
    pixels = CPU_PIXELS_VIT if model.config.is_vit else CPU_PIXELS_RESNET
    description = {
        "format": FORMAT,
        "version": VERSION,
        "paddle": paddle.__version__,
        "dtype": dtype,
        "logit_scale": float(model.logit_scale.astype("float32")),
        "image_resolution": size,
        "context_length": model.context_length,
        "embed_dim": model.embed_dim,
        "eos_token_id": model.config.eos_token_id,
        "text_tower": model.config.text_tower,
        "text_positions": model.config.text_positions,
        "preprocessing": model.preprocessing._asdict(),
        "vocab_size": model.vocab_size,
        "images_at_once": max(1, pixels // size**2),
        "tokens_at_once": CPU_TOKENS,
        "crc32": {name: crc32_of_file(os.path.join(directory, name)) for name in sorted(os.listdir(directory))},
    }
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(description, file, indent=1)


def _translate(directory: str, tower: str, onnx: bool, openvino: bool) -> None:
    """Writes the program of a tower in the formats that are asked for."""
    if onnx:
        translation.write_onnx(directory, tower)
    if openvino:
        translation.write_openvino(directory, tower)


def _write_programs(model: CLIP, directory: str) -> Iterator[str]:
    """Traces both encoders and writes them with their weights; yields each tower when it is written."""
    size = model.config.image_resolution
    specs = {"image": InputSpec([None, 3, size, size], "float32"), "text": InputSpec([None, None], "int64")}
    encoders: dict[str, Callable[[Tensor], Tensor]] = {"image": model.encode_image, "text": model.encode_text}
    training = model.training
    model.eval()
    try:
        for tower in TOWERS:
            layer = _Tower(encoders[tower], model)
            layer.eval()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"paddle\.")  # of what Paddle's own code calls in Paddle
                static = paddle.jit.to_static(layer, input_spec=[specs[tower]], full_graph=True)
                paddle.jit.save(static, os.path.join(directory, tower))
            read_program(os.path.join(directory, tower + program_suffix(paddle.__version__)))  # which refuses some
            yield tower
    finally:
        if training:
            model.train()
    del layer, static
    gc.collect()  # they are cycles, and would keep the model's memory after it is gone
    for name in os.listdir(directory):
        if name.endswith(".info"):  # of paddle.jit.load alone
            os.unlink(os.path.join(directory, name))


def compile(
    model: CLIP,
    threads: Optional[int] = None,
    engine: Optional[str] = None,
    calibration: Optional[Any] = None,
    precision: Optional[str] = None,
) -> Predictor:
    """Makes the same model for speed: a `Predictor` for Paddle's current device.

    It holds weights of its own; delete the model to have its memory back. With OpenVINO the space of their files in the
    system's temporary folder is taken as long as it lives: where that is in memory, let TMPDIR name one on a disk.

    Args:
        model: a `CLIP` in float32, or, for a GPU, float16 or bfloat16.
        threads: number of threads on the CPU; by default one for each core this process may use.
        engine: "paddle" or "openvino", see `Predictor`. By default OpenVINO on the CPU, if the extra `openvino` is
            installed and each tower has less than 2 GiB of weights.
        calibration: pictures to quantise the image encoder by, see `export`.
        precision: "float32"; "bfloat16" for both encoders, on a processor that has such products; or "int8" for the
            image encoder, by OpenVINO, which takes `calibration` and is the default with it.

    Raises:
        ImportError: if the engine is not installed.
        RuntimeError: if the model cannot be translated for the engine; "paddle" needs no translation.
        ValueError: if the model is in another dtype, or there is no such engine.
    """
    model, device = unwrapped(model), paddle.get_device()
    precision = precision or ("float32" if calibration is None else "int8")
    require_engine(engine, precision, device, threads)
    if precision == "int8" and calibration is None:
        raise ValueError("int8 takes pictures to quantise by: give calibration=images, see export")
    if engine is None:
        usable = device == "cpu" and PADDLE_3 and model.dtype == paddle.float32 and has("openvino")
        usable = usable and not translation.too_large(model.config)
        engine = "openvino" if usable or precision == "int8" else "paddle"
    with tempfile.TemporaryDirectory() as folder:
        directory = os.path.join(folder, "export")
        export(model, directory, openvino=engine == "openvino", calibration=calibration)
        return Predictor(directory, threads, device, engine, precision)
