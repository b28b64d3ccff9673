"""`paddle-clip export`, `cache` and `bench`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

from .shared import add_command, add_json, add_model, load_model, print_json

if TYPE_CHECKING:
    from ..engines import Predictor
    from ..model import CLIP
    from .shared import Commands


def add_export(commands: "Commands") -> None:
    """Adds the command `export`."""
    parser = add_command(
        commands,
        export,
        "write a model for deployment without its Python code",
        ["vit-b-32/", "mine/ --model mine.pdparams --openvino"],
    )
    parser.add_argument("output", metavar="DIRECTORY", help="folder to write")
    parser.add_argument("--onnx", action="store_true", help="write ONNX files too, for ONNX Runtime and TensorRT")
    parser.add_argument("--openvino", action="store_true", help="write OpenVINO's files too, which are faster on a CPU")
    add_model(parser)
    add_json(parser)


def export(arguments: argparse.Namespace) -> None:
    """Writes the folder of an export."""
    from .. import deploy

    deploy.require_export(arguments.output, arguments.dtype, arguments.onnx, arguments.openvino)
    model, _ = load_model(arguments)
    deploy.export(model, arguments.output, onnx=arguments.onnx, openvino=arguments.openvino)
    if arguments.json:
        print_json({"output": arguments.output})
    else:
        print(f"{arguments.output}: load it with paddle_clip.Predictor({arguments.output!r})")


def add_cache(commands: "Commands") -> None:
    """Adds the command `cache`."""
    parser = add_command(
        commands,
        cache,
        "show the size of the compiled models in the cache, or clear them",
        ["", "--clear"],
        needs_paddle=False,
    )
    parser.add_argument(
        "--clear", action="store_true", help="delete the compiled models, which are made again when needed"
    )
    add_json(parser)


def cache(arguments: argparse.Namespace) -> None:
    """Prints, or deletes, the compiled forms."""
    from .. import compiled

    found = compiled.clear() if arguments.clear else compiled.forms()
    if arguments.json:
        print_json([form._asdict() for form in found])
        return
    for form in found:
        print(f"{form.bytes / 1e6:>8,.0f} MB  {form.folder}")
    total = sum(form.bytes for form in found) / 1e6
    print(f"{total:>8,.0f} MB {'deleted' if arguments.clear else 'in all'}")


def add_bench(commands: "Commands") -> None:
    """Adds the command `bench`."""
    parser = add_command(
        commands,
        bench,
        "time both encoders, on texts of 7 tokens, as they are and compiled",
        ["", "--model tiny --batch-size 1 32 --threads 2"],
    )
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="batch sizes to time (default: 1 8)"
    )
    parser.add_argument(
        "--repeat", type=int, default=10, metavar="N", help="runs, of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the compiled model (default: all cores)")
    add_model(parser)
    add_json(parser)


def bench(arguments: argparse.Namespace) -> None:
    """Prints how long the encoders take."""
    if arguments.repeat < 1 or min(arguments.batch_size) < 1:
        raise ValueError("--repeat and --batch-size must be at least 1")
    forms, side = _forms(arguments)

    import paddle

    from ..encoding import tokenized

    rows = []
    for size in arguments.batch_size:
        texts = paddle.to_tensor(tokenized(forms["compiled"], ["a photo of a dog."] * size))
        inputs = {"image": paddle.rand([size, 3, side, side]), "text": texts}
        for tower, batch in inputs.items():
            encoders = {name: getattr(form, f"encode_{tower}") for name, form in forms.items()}
            times = {f"{name}_ms": _median(encode, batch, arguments.repeat) for name, encode in encoders.items()}
            rows.append({"encoder": tower, "batch": size, **times})
    if arguments.json:
        print_json(rows)
        return
    has_eager = "eager" in forms
    head = "".join(f"{name + ' ms':>13}" for name in forms)
    print(f"{'encoder':<8}{'batch':>6}{head}{'speed-up' if has_eager else '':>10}".rstrip())
    for row in rows:
        shown = "".join(f"{row[f'{name}_ms']:>13.2f}" for name in forms)
        ratio = f"{row['eager_ms'] / row['compiled_ms']:>10.2f}" if has_eager else ""
        print(f"{row['encoder']:<8}{row['batch']:>6}{shown}{ratio}")


def _forms(arguments: argparse.Namespace) -> "tuple[dict[str, Union[CLIP, Predictor]], int]":
    """The forms of the model that are timed, and the side of its images; an export is a compiled form alone."""
    from ..engines import Predictor
    from ..exported import is_export

    if is_export(arguments.model):
        predictor = Predictor(arguments.model, arguments.threads, arguments.device)
        return {"compiled": predictor}, predictor.image_resolution
    from ..deploy import compile

    model, _ = load_model(arguments)
    return {"eager": model, "compiled": compile(model, threads=arguments.threads)}, model.config.image_resolution


def _median(encode: Callable[[Any], Any], batch: Any, repeat: int) -> float:
    """Milliseconds of one call, the result on its way to the user; the first two calls do not count."""
    import statistics
    import time

    import numpy as np
    import paddle

    seconds = []
    with paddle.no_grad():
        for _ in range(repeat + 2):
            start = time.perf_counter()
            np.asarray(encode(batch))
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])
