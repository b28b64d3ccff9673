"""CLIP as Paddle Inference programs: exported to a folder, loaded with no model code, run by the fastest engine."""

import gc
import importlib.util
import json
import os
import shutil
import tempfile
import threading

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

from . import archives, engines
from .engines import ENGINES, PROGRAM_SUFFIXES, OpenVINO, PaddleInference
from .errors import CheckpointError
from .transforms import image_transform

FORMAT = "paddle_clip export"
VERSION = 1
TOWERS = ("image", "text")
DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("float32", "int8")
PADDLE_3 = not paddle.__version__.startswith("2.")
# Work the CPU is given at once. Larger batches are slower: their activations leave the caches, and the memory of each
# is asked of the system and given back. Measured with benchmarks/scaling.py.
CPU_TOKENS = 640
CPU_PIXELS = {"ModifiedResNet": 4 * 224**2, "VisualTransformer": 8 * 224**2}


class _Tower(nn.Layer):
    """One encoder of a model, as a layer of its own: tracing it leaves the model as it is."""

    def __init__(self, encode, model):
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(self, x):
        return self.encode(x).astype("float32")


def export(model, directory, onnx=False, openvino=False, calibration=None):
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
        ValueError: if the model is in another dtype, it or the Paddle another than `onnx` and `openvino` take, or
            `calibration` of another shape.
        FileExistsError: if the folder holds anything else.
        ImportError: if what an extra brings is not installed.
        RuntimeError: if the translation or the quantisation fails.
    """
    if calibration is not None:
        openvino, calibration = True, _images(calibration, model.visual.input_resolution)
        if not len(calibration):
            raise ValueError("calibration has no images; give some hundreds")
    dtype = str(model.dtype).split(".")[-1]
    require_export(directory, dtype, onnx, openvino, calibration is not None)
    directory = os.path.realpath(directory)  # a link to a folder stays one
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(directory)}.", dir=os.path.dirname(directory))
    try:
        _write(model, dtype, partial, onnx, openvino, calibration)
        os.chmod(partial, 0o755)
        _replace(directory, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_export(directory, dtype, onnx=False, openvino=False, int8=False):
    """Raises what `export` would for files it cannot write, before any work is done.

    Raises:
        ValueError: if a model of this dtype cannot be exported, or it or this Paddle is another than `onnx` and
            `openvino` take.
        ImportError: if what an extra brings is not installed.
        FileExistsError: if the folder holds anything but an export.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the model is in {dtype}; export takes {', '.join(DTYPES)}: load it with dtype='float32'")
    if (onnx or openvino) and (dtype != "float32" or not PADDLE_3):
        raise ValueError(
            "files for ONNX and OpenVINO take a float32 model and Paddle 3; "
            f"this is {dtype}, Paddle {paddle.__version__}"
        )
    # In this order: what installs the first that is missing installs the others.
    needed = {"nncf": int8, "openvino": openvino, "paddle2onnx": onnx or openvino}
    engines.require(*(package for package in needed if needed[package]))
    directory = os.path.realpath(directory)
    if os.path.lexists(directory) and not _is_replaceable(directory):
        raise FileExistsError(f"{directory} is not an empty folder, nor one that export wrote: choose another")


def _replace(directory, partial):
    """Gives `partial` the name of `directory`; what had it before is whole until then, and gone afterwards."""
    if not os.path.isdir(directory):
        os.rename(partial, directory)
        return
    old = f"{partial}.old"
    os.rename(directory, old)
    try:
        os.rename(partial, directory)
    except BaseException:
        os.rename(old, directory)
        raise
    shutil.rmtree(old)


def _is_replaceable(directory):
    return os.path.isdir(directory) and (not os.listdir(directory) or _is_export(directory))


def _is_export(directory):
    try:
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            return json.load(file)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(model, dtype, directory, onnx, openvino, calibration):
    size = model.visual.input_resolution
    specs = {"image": InputSpec([None, 3, size, size], "float32"), "text": InputSpec([None, None], "int64")}
    encoders = {"image": model.encode_image, "text": model.encode_text}
    training = model.training
    model.eval()
    try:
        for tower in TOWERS:
            layer = _Tower(encoders[tower], model)
            layer.eval()
            static = paddle.jit.to_static(layer, input_spec=[specs[tower]], full_graph=True)
            paddle.jit.save(static, os.path.join(directory, tower))
    finally:
        if training:
            model.train()
    del layer, static
    gc.collect()  # they are cycles, and would keep the model's memory after it is gone
    for name in os.listdir(directory):
        if name.endswith(".info"):  # of paddle.jit.load alone
            os.unlink(os.path.join(directory, name))
    for tower in TOWERS:
        if onnx or openvino:
            engines.write_onnx(directory, tower)
        if openvino:
            engines.write_openvino(directory, tower)
            if not onnx:
                os.unlink(os.path.join(directory, f"{tower}.onnx"))
    if calibration is not None:
        engines.write_int8(directory, calibration, type(model.visual).__name__ == "VisualTransformer")
    description = {
        "format": FORMAT,
        "version": VERSION,
        "paddle": paddle.__version__,
        "dtype": dtype,
        "logit_scale": float(model.logit_scale.astype("float32").item()),
        "image_resolution": size,
        "context_length": model.context_length,
        "embed_dim": model.text_projection.shape[1],
        "images_at_once": max(1, CPU_PIXELS[type(model.visual).__name__] // size**2),
        "tokens_at_once": CPU_TOKENS,
        "crc32": {name: _crc32(os.path.join(directory, name)) for name in sorted(os.listdir(directory))},
    }
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(description, file, indent=1)


def _crc32(path):
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = archives.crc32(block, value)
    return value


class Predictor:
    """An exported model: `encode_image`, `encode_text` and the call of a `CLIP`, without its networks.

    `classify`, `embed` and all else that encodes takes it as it takes a `CLIP`. Inputs are numpy arrays or Tensors, and
    outputs are of the same kind, in float32. Calls from several threads wait for each other.

    Args:
        directory: what `export` wrote.
        threads: for the CPU; by default one for each core this process may use.
        device: "cpu", "gpu" or "gpu:<number>"; by default Paddle's current one.
        engine: "paddle", which is Paddle Inference with oneDNN on the CPU (with Paddle 2 MKL) and CUDA on a GPU; or
            "openvino", on the CPU. By default OpenVINO, if it is installed and the export holds its files.
        precision: "float32", or "int8" for the image encoder that `export(…, calibration=…)` quantised, by OpenVINO.

    Raises:
        CheckpointError: if the folder is no export, damaged, or made by another version.
        FileNotFoundError: if there is no such folder, or it holds no files for the engine and precision.
        ImportError: if the engine is not installed.
        ValueError: if the device, the engine or the precision is another, or the model in half precision and the
            device no GPU.

    Attributes:
        preprocess: turns a picture into one row of `encode_image`'s input, see `transforms.image_transform`.
        context_length: longest text in tokens.
        logit_scale: 0-d Tensor, as a `CLIP` has it.
        engine: "paddle" or "openvino".
    """

    def __init__(self, directory, threads=None, device=None, engine=None, precision="float32"):
        self.device = device or paddle.get_device()
        self.threads = threads or _cores()
        _require_engine(engine, precision, self.device, threads)
        description = _description(directory)
        self.dtype = description["dtype"]
        _require_device(self.device, self.dtype)
        self.engine = _engine(engine, precision, self.device, directory, description["crc32"])
        self.context_length = description["context_length"]
        self.image_resolution = description["image_resolution"]
        self.embed_dim = description["embed_dim"]
        self.logit_scale = paddle.to_tensor(description["logit_scale"], "float32")
        self.preprocess = image_transform(self.image_resolution)
        self._images_at_once = description["images_at_once"]
        self._tokens_at_once = description["tokens_at_once"]
        if self.device.startswith("gpu"):  # which is fastest with all of them
            self._images_at_once = self._tokens_at_once = 1 << 62
        self._lock = threading.Lock()
        if self.engine == "openvino":
            image = "image.int8.xml" if precision == "int8" else "image.xml"
            size = self.image_resolution
            self._towers = {
                "image": OpenVINO(directory, image, self.threads, np.zeros((1, 3, size, size), np.float32)),
                "text": OpenVINO(directory, "text.xml", self.threads, np.zeros((1, self.context_length), np.int64)),
            }
        else:
            self._towers = {
                tower: PaddleInference(directory, tower, self.device, self.threads, self._images_at_once)
                for tower in TOWERS
            }

    def _run(self, tower, array):
        with self._lock:
            return self._towers[tower](array)

    def encode_image(self, image):
        """Image features, not normalised.

        Args:
            image: [B, 3, R, R], numpy array or Tensor.

        Returns:
            [B, E], of the kind of `image`.

        Raises:
            ValueError: if the image is not [B, 3, R, R].
        """
        array = _images(image, self.image_resolution)
        features = np.empty((len(array), self.embed_dim), np.float32)
        rows = self._images_at_once
        for start in range(0, len(array), rows):
            features[start : start + rows] = self._run("image", array[start : start + rows])
        return _like(image, features)

    def encode_text(self, text, trim=True):
        """Text features, not normalised.

        Args:
            text: token ids [B, L], numpy array or Tensor, as `tokenize` returns them.
            trim: whether to leave out what follows the last end-of-text of the batch, see `CLIP.encode_text`.

        Returns:
            [B, E], of the kind of `text`.

        Raises:
            ValueError: if the tokens are not [B, L] with L at most the context length.
        """
        tokens = np.asarray(text)
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.context_length:
            raise ValueError(f"tokens are {list(tokens.shape)}; this model takes [N, 1 to {self.context_length}]")
        lengths = tokens.argmax(axis=-1) + 1 if trim else np.full(len(tokens), tokens.shape[1])  # [B]
        order = np.argsort(lengths, kind="stable")
        features = np.empty((len(tokens), self.embed_dim), np.float32)
        while len(order):  # the longest first
            length = lengths[order[-1]]
            rows = order[-max(1, self._tokens_at_once // length) :]
            features[rows] = self._run("text", np.ascontiguousarray(tokens[rows, :length], np.int64))
            order = order[: -len(rows)]
        return _like(text, features)

    def __call__(self, image, text):
        """logits_per_image [N, M] and logits_per_text [M, N] in float32, see `CLIP.forward`."""
        image_features = self.encode_image(_images(image, self.image_resolution))  # [N, E]
        text_features = self.encode_text(np.asarray(text))  # [M, E]
        image_features = image_features / np.linalg.norm(image_features, axis=-1, keepdims=True)
        text_features = text_features / np.linalg.norm(text_features, axis=-1, keepdims=True)
        logits_per_image = self.logit_scale.exp().item() * image_features @ text_features.T  # [N, M]
        return _like(image, logits_per_image), _like(image, np.ascontiguousarray(logits_per_image.T))


def compile(model, threads=None, engine=None, calibration=None):
    """The same model made for speed: a `Predictor` for Paddle's current device.

    It holds weights of its own; delete the model to have its memory back. With OpenVINO the space of their files in the
    system's temporary folder is taken as long as it lives: where that is in memory, let TMPDIR name one on a disk.

    Args:
        model: a `CLIP` in float32, or, for a GPU, float16 or bfloat16.
        threads: for the CPU; by default one for each core this process may use.
        engine: "paddle" or "openvino", see `Predictor`. By default OpenVINO on the CPU, if the extra `openvino` is
            installed.
        calibration: pictures to quantise the image encoder by, see `export`; by default it stays in float32.

    Raises:
        ImportError: if the engine is not installed.
        RuntimeError: if the model cannot be translated for the engine; "paddle" needs no translation.
        ValueError: if the model is in another dtype, or there is no such engine.
    """
    device, precision = paddle.get_device(), "float32" if calibration is None else "int8"
    _require_engine(engine, precision, device, threads)
    if engine is None:
        usable = device == "cpu" and PADDLE_3 and model.dtype == paddle.float32 and engines.has_openvino()
        engine = "openvino" if usable or precision == "int8" else "paddle"
    with tempfile.TemporaryDirectory() as folder:
        directory = os.path.join(folder, "export")
        export(model, directory, openvino=engine == "openvino", calibration=calibration)
        return Predictor(directory, threads, engine=engine, precision=precision)


def _is_positive(value):
    return type(value) is int and value > 0


def _is_list_of_files(value):
    if not isinstance(value, dict) or any(os.path.basename(name) != name for name in value):
        return False
    programs = (any(f"{tower}{suffix}" in value for suffix in PROGRAM_SUFFIXES) for tower in TOWERS)
    return all(programs) and all(f"{tower}.pdiparams" in value for tower in TOWERS)


# What is read of config.json, and whether a value can be of use.
_SOUND = {
    "paddle": lambda value: isinstance(value, str),
    "dtype": lambda value: value in DTYPES,
    "logit_scale": lambda value: isinstance(value, float),
    "image_resolution": _is_positive,
    "context_length": _is_positive,
    "embed_dim": _is_positive,
    "images_at_once": _is_positive,
    "tokens_at_once": _is_positive,
    "crc32": _is_list_of_files,
}


def _description(directory):
    """The checked content of an export's config.json."""
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"no folder {directory}: paddle_clip.export(model, directory) makes one")
    if not _is_export(directory):
        raise CheckpointError(f"{directory} is not what paddle_clip.export writes: its config.json says nothing of it")
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        description = json.load(file)
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{directory} has version {description.get('version')} of the format and this package reads {VERSION}: "
            "export the model again"
        )
    wrong = sorted(name for name, is_sound in _SOUND.items() if not is_sound(description.get(name)))
    if wrong:
        raise CheckpointError(
            f"{os.path.join(directory, 'config.json')} is damaged: it lacks, or has no sound value for, "
            f"{', '.join(wrong)}; copy the whole folder again, or export the model again"
        )
    if description["paddle"].split(".")[0] != paddle.__version__.split(".")[0]:
        raise CheckpointError(
            f"{directory} was exported by Paddle {description['paddle']} and this is {paddle.__version__}, which does "
            "not read its programs: export the model again"
        )
    for name, expected in description["crc32"].items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise CheckpointError(f"{directory} lacks {name}: copy the whole folder again, or export the model again")
        if _crc32(path) != expected:
            raise CheckpointError(f"{path} is damaged: copy the whole folder again, or export the model again")
    return description


def _require_device(device, dtype):
    kind, _, number = device.partition(":")
    if not (device == "cpu" or (kind == "gpu" and (number.isdigit() or device == "gpu"))):
        raise ValueError(f"the device is {device!r}; choose cpu, gpu or gpu:<number>")
    if kind == "gpu" and not paddle.device.is_compiled_with_cuda():
        raise ValueError(f"the device is {device!r}, and this build of Paddle has no CUDA: use device='cpu'")
    if kind == "cpu" and dtype != "float32":
        raise ValueError(f"{dtype} does not run on the CPU: export the model in float32, or use device='gpu'")


def _cores():
    """Those this process may use; all, on systems that do not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_engine(engine, precision, device, threads):
    """Raises ValueError for what no export can be run with."""
    if engine not in (None, *ENGINES):
        raise ValueError(f"the engine is {engine!r}; choose {' or '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"the precision is {precision!r}; choose {' or '.join(PRECISIONS)}")
    if precision == "int8" and engine == "paddle":
        raise ValueError("int8 is run by OpenVINO: use engine='openvino'")
    if device.startswith("gpu") and (engine == "openvino" or precision == "int8"):
        raise ValueError(f"OpenVINO runs on the CPU, and the device is {device}: paddle.set_device('cpu') first")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")


def _engine(engine, precision, device, directory, files):
    """The engine asked for, or by default the one for this machine and these files of an export."""
    if precision == "int8" and "image.int8.xml" not in files:
        raise FileNotFoundError(f"{directory} holds no int8 encoder: export the model again with calibration=images")
    has_files = all(f"{tower}.xml" in files for tower in TOWERS)
    if (engine == "openvino" or precision == "int8") and not has_files:
        raise FileNotFoundError(f"{directory} holds no files for OpenVINO: export the model again with openvino=True")
    usable = device == "cpu" and has_files and importlib.util.find_spec("openvino")
    return engine or ("openvino" if usable or precision == "int8" else "paddle")


def _images(image, size):
    """A batch as a float32 array, or a ValueError if it is not [N, 3, size, size]."""
    if isinstance(image, paddle.Tensor):
        image = image.astype("float32")  # the array of a bfloat16 Tensor would be one of its bits
    array = np.ascontiguousarray(image, np.float32)
    expected = (3, size, size)
    if array.ndim != 4 or array.shape[1:] != expected:
        raise ValueError(
            f"images are {list(array.shape)}; this model takes [N, {', '.join(map(str, expected))}]: "
            "prepare them with its preprocess, and stack them into a batch"
        )
    return array


def _like(given, array):
    return paddle.to_tensor(array) if isinstance(given, paddle.Tensor) else array
