"""Checkpoints of an unfinished training.

A checkpoint is a safetensors file: the model's tensors as model.*, the optimiser's as optimizer.*, metadata. What LoRA
adds to the weights is in model.* already, so that every tool takes the file, and by itself in lora.*.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

from .adapting import LowRank, merged_state
from .checkpoints import writing
from .checkpoints.reading import read
from .checkpoints.settings import metadata_of
from .errors import CheckpointError, require_same_tensors
from .model import CLIP

# What Paddle's Adam keeps of each parameter: arrays of its shape, and single numbers.
_MOMENTS, _POWERS = ("moment1_0", "moment2_0"), ("beta1_pow_acc_0", "beta2_pow_acc_0")
_BATCH = ("batch_size", "accumulate", "ranks")  # settings whose product alone must be the same


def save_checkpoint(
    path: str,
    model: CLIP,
    optimizer: Optimizer,
    scaler: paddle.amp.GradScaler,
    state: dict[str, Any],
) -> None:
    """Writes the state of a training after a step; the file before it stays until the new one is whole.

    `state` has "step", "settings" and what else JSON can hold.
    """
    arrays = {f"model.{name}": array for name, array in merged_state(model).items()}
    arrays |= {
        f"lora.{name}": tensor.numpy() for name, tensor in model.state_dict().items() if f"model.{name}" not in arrays
    }
    our_names = {parameter.name: name for name, parameter in model.named_parameters()}
    for key, tensor in optimizer.state_dict().items():
        if isinstance(tensor, Tensor):  # Paddle's parameter_moment1_0, whose first part changes from run to run
            parameter = next(name for name in our_names if key.startswith(f"{name}_"))
            arrays[f"optimizer.{our_names[parameter]}.{key[len(parameter) + 1 :]}"] = tensor.numpy()
    scaling = {name: np.asarray(value).tolist() for name, value in scaler.state_dict().items()}
    described = json.dumps({**state, "scaler": scaling}, default=lambda number: number.item())
    metadata = {**metadata_of(model.config, model.preprocessing), "training": described}
    writing.write(path, arrays, lambda name: "keep", lambda checksums: {**metadata, "crc32": checksums})


def resume_checkpoint(
    path: str,
    model: CLIP,
    optimizer: Optimizer,
    trained: Sequence[Tensor],
    scaler: paddle.amp.GradScaler,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Puts a checkpoint's state into model, optimiser and scaler; returns the `state` it was saved with.

    Raises:
        CheckpointError: if the file cannot be used.
        ValueError: if it was made with other settings.
    """
    checkpoint = read(path)
    compared = writing.verify_checksums(checkpoint, path)
    try:
        state = json.loads(checkpoint.metadata["training"])
        earlier = dict(state["settings"])
        scaling: Any = dict(state["scaler"])
        sound = compared > 0 and type(state["step"]) is int and state["step"] > 0
        sound = sound and scaling.keys() == scaler.state_dict().keys()
        sound = sound and all(type(earlier.get(name, 1)) is int for name in _BATCH)
        if not (sound and all(np.isfinite(number).all() for number in [*scaling.values(), state.get("best") or 0])):
            raise ValueError("it lacks checksums, a step, the batch or the scaler's numbers")
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of a training ({error!r:.200}); delete it to start anew"
        ) from None
    different = differences(earlier, settings)
    if different:
        raise ValueError(f"{path} is of another training: {different}. Give the old values, or delete it to start anew")

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: array for name, array in checkpoint.items() if name.startswith(prefix)}

    _require_moments(path, part("optimizer."), model, trained)
    parameters = dict(model.named_parameters())
    accumulators = {}
    for name, array in part("optimizer.").items():
        parameter, _, accumulator = name.rpartition(".")
        accumulators[f"{parameters[parameter].name}_{accumulator}"] = paddle.to_tensor(np.array(array))
    kept = {f"{name}.weight": layer.weight for name, layer in model.named_sublayers() if isinstance(layer, LowRank)}
    model.set_state_dict({**part("model."), **part("lora."), **kept})  # the settings tell that these are the same
    optimizer.set_state_dict(accumulators)
    if scaling:
        scaler.load_state_dict(scaling)
    return state


def _require_moments(path: str, found: dict[str, np.ndarray], model: CLIP, trained: Sequence[Tensor]) -> None:
    """Raises CheckpointError unless there is what Adam keeps of the trained parameters, in float32, and no more."""
    expected, our_names = {}, {parameter.name: name for name, parameter in model.named_parameters()}
    for parameter in trained:
        shapes = {**dict.fromkeys(_MOMENTS, tuple(parameter.shape)), **dict.fromkeys(_POWERS, (1,))}
        expected.update({f"{our_names[parameter.name]}.{key}": shape for key, shape in shapes.items()})
    shapes_found = {name: array.shape if array.dtype == np.float32 else (-1,) for name, array in found.items()}
    require_same_tensors(expected, shapes_found, f"{path}, optimizer,", "Delete it to start anew")


def differences(earlier: dict[str, Any], settings: dict[str, Any]) -> str:
    """What two trainings differ in, in words; "" if nothing. The same batch may be cut into other parts."""
    same_batch = math.prod(earlier.get(name, 1) for name in _BATCH) == math.prod(settings[name] for name in _BATCH)
    names = sorted(settings.keys() - set(_BATCH) if same_batch else settings)
    different = [name for name in names if (earlier.get(name) or None) != (settings[name] or None)]
    return ", ".join(f"{name} was {earlier.get(name)!s:.80} and is {settings[name]}" for name in different)
