"""What runs an exported model: `Predictor`, by Paddle Inference, or by the extra OpenVINO, which takes no Paddle."""

import contextlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Protocol, Union

import numpy as np

from .arrays import as_array, as_tensor, is_tensor
from .checkpoints.files import StrPath, expanded, release_pages
from .checkpoints.settings import preprocessing_of
from .checks import as_numbers, require_images, require_tokens
from .config import TEXT_TOWERS
from .encoding import device_name, require_dtype, unit
from .errors import CheckpointError
from .exported import TOWERS, Program, program_suffix, read_description, read_program, require_described
from .extras import has, require
from .threads import available_cores
from .tokenizer import token_ids
from .transforms import image_transform

ENGINES = ("paddle", "openvino")
PRECISIONS = ("float32", "bfloat16", "int8")


class _Runner(Protocol):
    """An encoder, array to array."""

    program: Program

    def __call__(self, array: np.ndarray) -> np.ndarray: ...


class PaddleInference:
    """An encoder, array to array, by Paddle Inference: CUDA on a GPU, on the CPU oneDNN, or with Paddle 2 MKL.

    Args:
        directory: what `export` wrote.
        tower: "image" or "text".
        device: "cpu", "gpu" or "gpu:<number>".
        threads: number of threads on the CPU.
        rows: images the CPU is given at once; it is given these or one. Of no effect on texts and on a GPU.
        precision: of the products, "float32", or on the CPU "bfloat16".

    Raises:
        ValueError: if the processor, or Paddle 2, has no products in bfloat16.
    """

    def __init__(self, directory: str, tower: str, device: str, threads: int, rows: int, precision: str):
        import paddle
        from paddle import inference

        path = os.path.join(directory, tower)
        program = path + program_suffix(paddle.__version__)  # and no other, which config.json does not list
        config = inference.Config(program, path + ".pdiparams")
        paddle_3 = program.endswith(".json")
        self.program = read_program(program)
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
                if precision == "bfloat16":
                    _require_bfloat16(paddle.base.core.supports_bfloat16_fast_performance())
                    config.enable_mkldnn_bfloat16()
                    # It moves a reshape before the addition of a bias, which then has another shape.
                    config.delete_pass("operator_reshape_onednn_fuse_pass")
            elif precision == "bfloat16":
                raise ValueError("Paddle 2 computes no bfloat16 products: use Paddle 3, or precision='float32'")
            else:
                config.disable_mkldnn()  # which in Paddle 2 fails where the batch size is free
        config.enable_memory_optim()
        config.disable_glog_info()
        with _loading(program):
            self._predictor = inference.create_predictor(config)
        self._rows = rows if tower == "image" and device == "cpu" else None

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return np.concatenate([self._run(part)[:rows] for part, rows in self._parts(array)])

    def _parts(self, array: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
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

    def _run(self, array: np.ndarray) -> np.ndarray:
        self._predictor.get_input_handle(self._predictor.get_input_names()[0]).copy_from_cpu(array)
        self._predictor.run()
        return self._predictor.get_output_handle(self._predictor.get_output_names()[0]).copy_to_cpu()


def _require_bfloat16(has_products: bool) -> None:
    if not has_products:
        raise ValueError(
            "this processor computes no bfloat16 products, which AMD's have since Zen 4 and Intel's since Cooper Lake: "
            "use precision='float32'"
        )


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    """Raises our error in place of those of an engine that cannot load a program."""
    try:
        yield
    except (IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().rpartition("\n")[2]  # the lines above are the engine's own calls
        raise CheckpointError(f"{path} cannot be loaded: {reason:.300}; export the model again") from error


class OpenVINO:
    """An encoder, array to array, by OpenVINO on the CPU.

    Args:
        directory: what `export(…, openvino=True)` wrote.
        file: name of one of its .xml files.
        threads: number of threads.
        hint: precision of the products, OpenVINO's name: "f32" or "bf16".

    Raises:
        ImportError: if OpenVINO is not installed.
        ValueError: if the processor has no products in bfloat16.
    """

    def __init__(self, directory: str, file: str, threads: int, hint: str):
        require("openvino-runtime")
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
        }
        path = os.path.join(directory, file)
        with open(os.path.splitext(path)[0] + ".bin", "rb") as weights, _loading(path):
            # Writable, as a Tensor's memory has to be; nothing is written.
            self._mapped = mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_COPY)
        self._weights = np.frombuffer(self._mapped, np.uint8)  # what the program reads, as long as it runs
        core = openvino.Core()
        if hint == "bf16":
            _require_bfloat16("BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        with open(path, "rb") as program, _loading(path):
            model = core.read_model(program.read(), openvino.Tensor(self._weights, shared_memory=True))
            taken, given = (
                [-1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
                for port in (model.input(), model.output())  # there is one of each
            )
            constants = (node.shape for node in model.get_ops() if node.get_type_name() == "Constant")
            self.program = Program(taken, given, [list(shape) for shape in constants])
            self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._shapes: set[tuple[int, ...]] = set()
        release_pages(self._mapped)  # what is needed still is read from the file again

    def __call__(self, array: np.ndarray) -> np.ndarray:
        features = self._request.infer([array])[0]
        # The weights are packed by the first input, and once more by a much larger or smaller one: copies are kept.
        if array.shape not in self._shapes:
            self._shapes.add(array.shape)
            release_pages(self._mapped)
        return features


class Predictor:
    """An exported model: `encode_image`, `encode_text` and the call of a `CLIP`, without its networks.

    `classify`, `embed` and all else that encodes takes it as it takes a `CLIP`. Inputs are numpy arrays or Tensors, and
    outputs are of the same kind, in float32. With OpenVINO Paddle is not imported. Calls from several threads wait for
    each other.

    An export is programs, which run with the rights of this process: load only those you trust. Checksums find
    accidents and not intent.

    Args:
        directory: what `export` wrote.
        threads: number of threads on the CPU; by default one for each core this process may use.
        device: "cpu", "gpu" or "gpu:<number>"; by default Paddle's current one, or the CPU if Paddle is not imported
            and the export holds OpenVINO's files.
        engine: "paddle", which is Paddle Inference with oneDNN on the CPU (with Paddle 2 MKL) and CUDA on a GPU; or
            "openvino", on the CPU. By default OpenVINO, if it is installed and the export holds its files.
        precision: "float32"; "bfloat16" for both encoders, on a processor that has such products, and not by Paddle 2;
            or "int8" for the image encoder that `export(…, calibration=…)` quantised, by OpenVINO.

    Raises:
        CheckpointError: if the folder is no export, damaged, or made by another version.
        FileNotFoundError: if there is no such folder, or it holds no files for the engine and precision.
        ImportError: if the engine is not installed.
        ValueError: if the device, the engine or the precision is another, or the model in half precision and the
            device no GPU.

    Attributes:
        preprocess: turns a picture into one row of `encode_image`'s input, see `transforms.image_transform`.
        context_length: longest text in tokens.
        embed_dim: width E of the features.
        engine: "paddle" or "openvino".
        precision: as given.
    """

    takes_arrays = True

    def __init__(
        self,
        directory: StrPath,
        threads: Optional[int] = None,
        device: Optional[str] = None,
        engine: Optional[str] = None,
        precision: str = "float32",
    ):
        directory = expanded(directory)
        require_engine(engine, precision, device, threads)
        description = read_description(directory)
        self._made_by = (os.path.abspath(directory), threads, device, engine, precision)
        if precision != "float32":
            device = "cpu"  # which alone computes in it, whatever Paddle's current device is
        self.dtype = description["dtype"]
        self.engine = _choose_engine(engine, precision, device, directory, description["crc32"])
        device = "cpu" if self.engine == "openvino" else device or _current_device()
        self.device = _checked_device(device, self.dtype)
        self.threads = threads or available_cores()
        self.precision = precision
        self.context_length = description["context_length"]
        self.image_resolution = description["image_resolution"]
        self.embed_dim = description["embed_dim"]
        self.vocab_size: Optional[int] = description.get("vocab_size")  # earlier exports do not tell
        self.log_scale: float = description["logit_scale"]
        self.eos_token_id = description.get("eos_token_id")  # exports of before lack it, and have None
        self.text_tower = description.get("text_tower", TEXT_TOWERS[0])
        self._positions: int = description.get("text_positions") or self.context_length
        self.preprocessing = preprocessing_of(description.get("preprocessing", {}), directory)
        self.preprocess = image_transform(self.image_resolution, *self.preprocessing)
        self._images_at_once = description["images_at_once"]
        self._tokens_at_once = description["tokens_at_once"]
        if self.device.startswith("gpu"):  # which is fastest with all of them
            self._images_at_once = self._tokens_at_once = 1 << 62
        self._lock = threading.Lock()
        if self.engine == "paddle":
            _require_same_paddle(directory, description)
        self._towers = self._load(directory)
        for tower, runner in self._towers.items():
            require_described(directory, tower, runner.program, description)

    def __repr__(self) -> str:
        return (
            f"Predictor(image_resolution={self.image_resolution}, embed_dim={self.embed_dim}, "
            f"context_length={self.context_length}, engine={self.engine!r}, device={self.device!r}, "
            f"precision={self.precision!r}, threads={self.threads})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled is the folder's path, not what is in it."""
        if not os.path.isdir(self._made_by[0]):
            raise TypeError(
                "what compile made has no folder to be opened again from: export the model, and pickle "
                "Predictor(directory)"
            )
        return type(self), self._made_by

    def __deepcopy__(self, memo: dict[int, Any]) -> "Predictor":
        """Itself: nothing in it changes."""
        return self

    @property
    def logit_scale(self) -> Any:
        """0-d Tensor, the logarithm of the factor on cosine similarities, as a `CLIP` has it."""
        return as_tensor(np.array(self.log_scale, np.float32))

    def _load(self, directory: str) -> dict[str, _Runner]:
        """{tower: its encoder}."""
        if self.engine == "openvino":
            image = "image.int8.xml" if self.precision == "int8" else "image.xml"
            hint = "bf16" if self.precision == "bfloat16" else "f32"
            return {
                "image": OpenVINO(directory, image, self.threads, hint),
                "text": OpenVINO(directory, "text.xml", self.threads, hint),
            }
        return {
            tower: PaddleInference(directory, tower, self.device, self.threads, self._images_at_once, self.precision)
            for tower in TOWERS
        }

    def tokenize(self, texts: Union[str, Sequence[str]], truncate: bool = False) -> Any:
        """The padded token ids of texts, see `CLIP.tokenize`: a Tensor, or an array where Paddle is not imported."""
        tokens = token_ids(texts, self.context_length, truncate, self.text_tower)
        return as_tensor(tokens) if "paddle" in sys.modules else tokens

    def _run(self, tower: str, array: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._towers[tower](array)

    def encode_image(self, image: Any) -> Any:
        """Computes image features, not normalised.

        Args:
            image: [B, 3, R, R], numpy array or Tensor.

        Returns:
            [B, E], of the kind of `image`.

        Raises:
            ValueError: if the image is not [B, 3, R, R].
        """
        array = as_batch(image, self.image_resolution)
        features = np.empty((len(array), self.embed_dim), np.float32)
        rows = self._images_at_once
        for start in range(0, len(array), rows):
            features[start : start + rows] = self._run("image", array[start : start + rows])
        return _like(image, features)

    def encode_text(self, text: Any, trim: bool = True) -> Any:
        """Computes text features, not normalised.

        Args:
            text: token ids [B, L], numpy array or Tensor, as `tokenize` returns them.
            trim: whether to leave out what follows the last end-of-text of the batch, see `CLIP.encode_text`.

        Returns:
            [B, E], of the kind of `text`.

        Raises:
            ValueError: if the tokens are not ids [B, L] with L at most the context length.
        """
        tokens = as_numbers(text)
        require_tokens(tokens, self._positions, self.vocab_size)
        tokens = np.asarray(tokens)
        lengths = self._lengths(tokens) if trim else np.full(len(tokens), tokens.shape[1])  # [B]
        order = np.argsort(lengths, kind="stable")
        features = np.empty((len(tokens), self.embed_dim), np.float32)
        while len(order):  # the longest first
            length = lengths[order[-1]]
            rows = order[-max(1, self._tokens_at_once // length) :]
            features[rows] = self._run("text", np.ascontiguousarray(tokens[rows, :length], np.int64))
            order = order[: -len(rows)]
        return _like(text, features)

    def _lengths(self, tokens: np.ndarray) -> np.ndarray:
        """The number of tokens of each row up to the last that its feature depends on: [B, L] -> [B]."""
        if self.text_tower == "bert":
            return np.maximum.reduce(np.arange(1, tokens.shape[1] + 1) * (tokens != 0), axis=-1, initial=1)
        return (tokens if self.eos_token_id is None else tokens == self.eos_token_id).argmax(axis=-1) + 1

    def __call__(self, image: Any, text: Any) -> tuple[Any, Any]:
        """logits_per_image [N, M] and logits_per_text [M, N] in float32, see `CLIP.forward`."""
        image_features = unit(self.encode_image(as_batch(image, self.image_resolution)))  # [N, E]
        text_features = unit(np.asarray(self.encode_text(text)))  # [M, E]
        logits_per_image = math.exp(self.log_scale) * image_features @ text_features.T  # [N, M]
        return _like(image, logits_per_image), _like(image, np.ascontiguousarray(logits_per_image.T))


# ------------------------------------------------------------------------------------------------------------- checks


def _checked_device(device: str, dtype: str) -> str:
    kind, _, number = device.partition(":")
    if not (device == "cpu" or (kind in ("cuda", "gpu") and (number.isdigit() or device == kind))):
        raise ValueError(f"the device is {device!r}; choose cpu, gpu or gpu:<number>")
    device = device_name(device)
    require_dtype(dtype, device)
    return device


def _current_device() -> str:
    import paddle

    return paddle.get_device()


def _require_same_paddle(directory: str, description: dict[str, Any]) -> None:
    """Raises CheckpointError unless this Paddle's programs are there, and listed with their checksums."""
    import paddle

    exported_by, files = description["paddle"], description["crc32"]
    if exported_by.split(".")[0] != paddle.__version__.split(".")[0]:
        raise CheckpointError(
            f"{directory} was exported by Paddle {exported_by:.40} and this is {paddle.__version__}, which does "
            "not read its programs: export the model again"
        )
    lacking = [name for tower in TOWERS if (name := tower + program_suffix(paddle.__version__)) not in files]
    if lacking:
        raise CheckpointError(f"{directory} lacks {' and '.join(lacking)} in its config.json: export the model again")


def require_engine(engine: Optional[str], precision: str, device: Optional[str], threads: Optional[int]) -> None:
    """Raises ValueError for what no export can be run with."""
    if engine not in (None, *ENGINES):
        raise ValueError(f"the engine is {engine!r}; choose {' or '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"the precision is {precision!r}; choose {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
    if precision == "int8" and engine == "paddle":
        raise ValueError("int8 is run by OpenVINO: use engine='openvino'")
    if device and device.startswith("gpu") and (engine == "openvino" or precision != "float32"):
        what = "OpenVINO" if engine == "openvino" else f"the precision {precision}"
        raise ValueError(f"{what} is for the CPU, and the device is {device}: paddle.set_device('cpu') first")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")


def _choose_engine(
    engine: Optional[str], precision: str, device: Optional[str], directory: str, files: dict[str, int]
) -> str:
    """The engine asked for, or by default the one for this machine and these files of an export."""
    if precision == "int8" and not {"image.int8.xml", "image.int8.bin"} <= set(files):
        raise FileNotFoundError(f"{directory} holds no int8 encoder: export the model again with calibration=images")
    has_files = all(f"{tower}{suffix}" in files for tower in TOWERS for suffix in (".xml", ".bin"))
    if precision == "int8":
        engine = "openvino"
    if engine == "openvino" and not has_files:
        raise FileNotFoundError(f"{directory} holds no files for OpenVINO: export the model again with openvino=True")
    if engine:
        return engine
    # Paddle's current device is a GPU only if Paddle is there to say so; the files say the export is for a CPU.
    chosen = device or (_current_device() if sys.modules.get("paddle") else "cpu")
    return "openvino" if chosen == "cpu" and has_files and has("openvino-runtime") else "paddle"


def as_batch(image: Any, size: int) -> np.ndarray:
    """A batch as a float32 array, or a ValueError if it is not floating-point numbers [N, 3, size, size]."""
    image = as_numbers(image)
    require_images(image, size)
    return np.ascontiguousarray(as_array(image), np.float32)


def _like(given: Any, array: np.ndarray) -> Any:
    return as_tensor(array) if is_tensor(given) else array
