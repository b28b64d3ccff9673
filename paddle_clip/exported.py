"""The folder that `export` writes, as it is read: config.json, and what the programs beside it say of themselves.

Programs run with the rights of the process. What is checked here finds what was damaged, mixed up or plainly harmful;
it does not make a stranger's program safe.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .checkpoints.files import crc32_of_file, expanded, former, read_json
from .config import TEXT_TOWERS
from .errors import CheckpointError, listed

FORMAT = "paddle_clip export"
VERSION = 1
TOWERS = ("image", "text")
EXPORT_DTYPES = ("float32", "float16", "bfloat16")
_AGAIN = "copy the whole folder again, or export the model again"
_MOST_PIXELS = 1 << 24  # of the images that are encoded at once: 200 MB of them
_MOST_SCALE = 80.0  # of logit_scale: beyond, its exponential is no float32

# What programs of Paddle may compute, by Paddle 3's names and Paddle 2's: what the encoders use, and what adapters put
# into them may use. None of it reads or writes a file, talks to another process or calls Python.
_OPERATORS_BY_NAME = """
    abs add argmax arange assign assign_value assign_value_ batch_norm batch_norm_ bmm cast clip concat conv2d
    conv2d_transpose cos data depthwise_conv2d divide dropout einsum elementwise_pow elu embedding equal erf exp expand
    expand_as fetch flatten floor full full_int_array full_like full_with_tensor gather gather_nd gelu greater_equal
    greater_than group_norm hardsigmoid hardswish instance_norm layer_norm leaky_relu less_equal less_than log
    log_softmax logical_and logical_not logical_or matmul max maximum mean min minimum mish multiply not_equal p_norm
    pad pool2d pow prelu relu relu6 reshape rms_norm roll rsqrt scale shape shape64 sigmoid silu sin slice softmax
    softplus split split_with_num sqrt square squeeze stack strided_slice subtract sum swish take_along_axis tanh tile
    topk transpose tril triu unbind unsqueeze where
    arg_max elementwise_add elementwise_div elementwise_max elementwise_min elementwise_mul elementwise_sub expand_as_v2
    expand_v2 feed fill_any_like fill_constant flatten_contiguous_range lookup_table_v2 matmul_v2 range reduce_max
    reduce_mean reduce_min reduce_sum reshape2 squeeze2 top_k_v2 transpose2 tril_triu unsqueeze2
"""
_OPERATORS = frozenset(_OPERATORS_BY_NAME.split())


class Program(NamedTuple):
    """What a program takes, gives and holds; -1 stands for a free size."""

    input: list[int]
    output: list[int]
    weights: list[list[int]]


def is_export(directory: str) -> bool:
    """Whether a folder is what `export` writes, as far as its config.json says."""
    try:
        return read_json(os.path.join(expanded(directory), "config.json")).get("format") == FORMAT
    except (OSError, CheckpointError):
        return False


def program_suffix(paddle_version: str) -> str:
    """The ending of the programs that a version of Paddle writes and reads."""
    return ".pdmodel" if paddle_version.startswith("2.") else ".json"


# -------------------------------------------------------------------------------------------------------- config.json


def _is_positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_list_of_files(value: Any) -> bool:
    if not isinstance(value, dict) or any(os.path.basename(name) != name for name in value):
        return False
    programs = (any(f"{tower}{suffix}" in value for suffix in (".json", ".pdmodel")) for tower in TOWERS)
    return all(programs) and all(f"{tower}.pdiparams" in value for tower in TOWERS)


# What is read of config.json, and whether a value can be of use.
_SOUND: dict[str, Callable[[Any], bool]] = {
    "paddle": lambda value: isinstance(value, str),
    "dtype": lambda value: isinstance(value, str) and value in EXPORT_DTYPES,
    "logit_scale": lambda value: isinstance(value, float) and abs(value) <= _MOST_SCALE,
    "image_resolution": _is_positive,
    "context_length": _is_positive,
    "embed_dim": _is_positive,
    "vocab_size": lambda value: value is None or _is_positive(value),
    "images_at_once": _is_positive,
    "tokens_at_once": _is_positive,
    "text_tower": lambda value: value is None or (isinstance(value, str) and value in TEXT_TOWERS),
    "text_positions": lambda value: value is None or _is_positive(value),
    "eos_token_id": lambda value: value is None or (type(value) is int and 0 <= value < 1 << 31),
    "crc32": _is_list_of_files,
}


def read_description(directory: str) -> dict[str, Any]:
    """The content of an export's config.json, once it and the files it lists are found sound.

    Raises:
        CheckpointError: if the folder is no export, damaged, or made by another version.
        FileNotFoundError: if there is no such folder.
    """
    if not os.path.isdir(directory):
        if os.path.isdir(old := former(directory)):
            raise FileNotFoundError(
                f"no folder {directory}, as an export was killed: the one from before is {old}. Rename it, or export "
                "the model again"
            )
        raise FileNotFoundError(f"no folder {directory}: paddle_clip.export(model, directory) makes one")
    if not is_export(directory):
        raise CheckpointError(f"{directory} is not what paddle_clip.export writes: its config.json says nothing of it")
    path = os.path.join(directory, "config.json")
    description = read_json(path)
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{directory} has version {description.get('version')!r:.40} of the format and this package reads "
            f"{VERSION}: export the model again"
        )
    wrong = sorted(name for name, is_sound in _SOUND.items() if not is_sound(description.get(name)))
    if not wrong and description["images_at_once"] * description["image_resolution"] ** 2 > _MOST_PIXELS:
        wrong = ["images_at_once"] * (description["images_at_once"] > 1)
    if wrong:
        raise CheckpointError(f"{path} is damaged: it lacks, or has no sound value for, {', '.join(wrong)}; {_AGAIN}")
    for name, expected in description["crc32"].items():
        file = os.path.join(directory, name)
        if not os.path.isfile(file):
            raise CheckpointError(f"{directory} lacks {name}: {_AGAIN}")
        if crc32_of_file(file) != expected:
            raise CheckpointError(f"{file} is damaged: {_AGAIN}")
    return description


def require_described(directory: str, tower: str, program: Program, description: dict[str, Any]) -> None:
    """Raises CheckpointError if a program takes or gives something else than config.json says."""
    size, length, width = (description[name] for name in ("image_resolution", "context_length", "embed_dim"))
    positions = description.get("text_positions") or length  # earlier exports do not tell
    wrong = []
    if len(program.output) != 2 or program.output[-1] != width:
        wrong.append(f"embed_dim {width}, and the program gives {program.output}")
    if tower == "image" and program.input != [-1, 3, size, size]:
        wrong.append(f"image_resolution {size}, and the program takes {program.input}")
    if tower == "text" and program.input != [-1, -1]:
        wrong.append(f"context_length {length}, and the program takes {program.input}")
    if tower == "text" and not any(len(shape) == 2 and shape[0] == positions for shape in program.weights):
        name = "context_length" if positions == length else "text_positions"
        wrong.append(f"{name} {positions}, and the program has no embedding of so many positions")
    if length > positions:
        wrong.append(f"context_length {length}, which is more than text_positions {positions}")
    if wrong:
        raise CheckpointError(
            f"{os.path.join(directory, 'config.json')} does not fit the {tower} program: it says {'; '.join(wrong)}. "
            "Copy the whole folder again, or export the model again"
        )


# ----------------------------------------------------------------------------------------------------------- programs


def read_program(path: str) -> Program:
    """What a program of Paddle says of itself.

    Raises:
        CheckpointError: if it is no program, takes or gives more than one array, or uses operators that the encoders
            and layers in them have no use for, such as those that write files.
    """
    try:
        return _program_of_json(path) if path.endswith(".json") else _program_of_pdmodel(path)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no program that paddle_clip.export writes ({error!r:.200}); {_AGAIN}"
        ) from None


def _program_of_json(path: str) -> Program:
    """The program of Paddle 3 in a file."""
    (region,) = read_json(path)["program"]["regions"]
    (block,) = region["blocks"]
    found: dict[str, list[list[int]]] = {"data": [], "fetch": [], "p": []}  # the input, the output, the parameters
    names = set()
    for operation in block["ops"]:
        dialect, _, name = operation["#"].rpartition(".")
        # "p" is a parameter; dialect 0 builds lists of values and takes them apart, 1 computes.
        is_known = operation["#"] in ("p", "0.combine", "0.slice", "0.split") or (dialect == "1" and name in _OPERATORS)
        names |= {"a block in a block" if "regions" in operation else "" if is_known else operation["#"]}
        if name in found:
            output = operation["O"][0] if isinstance(operation["O"], list) else operation["O"]
            found[name].append(_as_shape(output["TT"]["D"][1]))
    _require_operators(path, names - {""})
    (taken,), (given,) = found["data"], found["fetch"]
    return Program(taken, given, found["p"])


def _as_shape(value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(size) is not int for size in value):
        raise TypeError(f"{value!r:.40} is no shape")
    return value


def _program_of_pdmodel(path: str) -> Program:
    """The program of Paddle 2 in a file."""
    from paddle.base import core

    with open(path, "rb") as file:
        program = core.ProgramDesc(file.read())  # which the block does not keep
    block = program.block(0)
    operations = [block.op(index) for index in range(block.op_size())]
    unknown = {operation.type() for operation in operations} - _OPERATORS
    _require_operators(path, unknown | ({"a block in a block"} if program.num_blocks() > 1 else set()))
    kept = ("feed", "fetch")  # which have no shape
    shapes = {tensor.name(): list(tensor.shape()) for tensor in block.all_vars() if tensor.name() not in kept}
    weights = [shapes[tensor.name()] for tensor in block.all_vars() if tensor.persistable() and tensor.name() in shapes]
    (taken,) = (operation.output_arg_names() for operation in operations if operation.type() == "feed")
    (given,) = (operation.input_arg_names() for operation in operations if operation.type() == "fetch")
    return Program(shapes[taken[0]], shapes[given[0]], weights)


def _require_operators(path: str, unknown: Iterable[str]) -> None:
    if unknown:
        raise CheckpointError(
            f"{path} uses operators that exports may not use: {listed(sorted(unknown))}. They may touch files or other "
            "programs, or are none of CLIP's: export the model again, without the layers that use them"
        )
