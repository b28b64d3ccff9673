"""What fine-tuning changes of a model, and how much it forgets: frozen layers, LoRA, interpolation of weights."""

import contextlib
import copy
import functools
from collections.abc import Collection, Iterator
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from .bert import BertLayer
from .checks import unwrapped
from .errors import require_same_tensors
from .model import CLIP, Bottleneck, ResidualAttentionBlock

TOWERS = ("image", "text")


class LowRank(nn.Layer):
    """A linear layer whose weight W [D, E] stays, and becomes W + down @ up (Hu et al. 2021, "LoRA", arXiv:2106.09685).

    down is [D, rank], drawn at random; up is [rank, E] and begins at 0. The bias is that of the layer.
    """

    def __init__(self, layer: nn.Linear, rank: int, random: np.random.Generator):
        super().__init__()
        (inputs, outputs), dtype = layer.weight.shape, layer.weight.dtype
        self.weight, self.bias = layer.weight, layer.bias
        drawn = random.normal(size=[inputs, rank], scale=inputs**-0.5)
        self.down = self.create_parameter(
            [inputs, rank], dtype=dtype, default_initializer=nn.initializer.Assign(drawn.astype("float32"))
        )
        self.up = self.create_parameter([rank, outputs], dtype=dtype, default_initializer=nn.initializer.Constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)

    @paddle.no_grad()
    def merged(self) -> Tensor:
        """The weight of the linear layer that computes the same, [D, E]."""
        return self.weight + self.down @ self.up


@contextlib.contextmanager
def adapted(
    model: CLIP,
    freeze: Collection[str] = (),
    lora: Optional[int] = None,
    unfreeze: Collection[str] = (),
    seed: int = 0,
) -> Iterator[list[Tensor]]:
    """Prepares a model for a training, and puts its own layers back at the end, with the trained weights.

    Args:
        model: a `CLIP`.
        freeze: what is not trained, see `names_within`.
        lora: rank of what is added to the weights of all linear layers that are not frozen; the rest of the model is
            frozen then, but `logit_scale`. None trains the weights themselves.
        unfreeze: what is trained nevertheless, see `names_within`.
        seed: seed of the random numbers LoRA begins with.

    Yields:
        The parameters that are trained. The others need no gradients meanwhile.

    Raises:
        ValueError: if a name is not of the model, or nothing of the towers remains to be trained.
    """
    frozen = frozen_names(model, freeze, unfreeze)
    replaced = _add_low_rank(model, frozen, lora, seed) if lora else []
    parameters = dict(model.named_parameters())
    if lora:
        frozen = parameters.keys() - {"logit_scale"} - names_within(model, unfreeze, "unfreeze")
        for name, _, _ in replaced:
            frozen -= {f"{name}.down", f"{name}.up"}
    needed_none = {name: parameter.stop_gradient for name, parameter in parameters.items()}
    try:
        for name in frozen:
            parameters[name].stop_gradient = True
        yield [parameter for name, parameter in parameters.items() if name not in frozen]
    finally:
        for name, parameter in parameters.items():
            parameter.stop_gradient = needed_none[name]
        for name, added, before_it in replaced:
            before_it.weight.set_value(added.merged())
            _put(model, name, before_it)


def frozen_names(model: CLIP, freeze: Collection[str], unfreeze: Collection[str]) -> set[str]:
    """The names of the parameters within `freeze` that are not within `unfreeze`.

    Raises:
        ValueError: if a name is not of the model, or nothing of the towers remains to be trained.
    """
    frozen = names_within(model, freeze, "freeze") - names_within(model, unfreeze, "unfreeze")
    if frozen == names_within(model, TOWERS, ""):
        raise ValueError(f"freeze={list(freeze)} leaves nothing to train: leave some out")
    return frozen


def names_within(model: CLIP, chosen: Collection[str], argument: str) -> set[str]:
    """The names of the parameters that are chosen by the names of what they are in.

    Args:
        model: a `CLIP`.
        chosen: one name or several: "image" or "text" for a whole tower; names of layers, such as
            "visual.transformer.resblocks.0"; names of parameters.
        argument: its name, for the message.

    Raises:
        ValueError: if a name is none of these.
    """
    names = {name for name, _ in model.named_parameters()} - {"logit_scale"}
    image = {name for name in names if name.startswith("visual.")}
    within: set[str] = set()
    for given in [chosen] if isinstance(chosen, str) else chosen:
        inside = {name for name in names if name == given or name.startswith(f"{given}.")}
        found = {"image": image, "text": names - image}.get(given, inside)
        if not found:
            raise ValueError(
                f"{argument} is {given!r}; choose image, text, or the name of a layer, such as "
                + ", ".join(sorted(name for name, _ in model.named_children()))
            )
        within |= found
    return within


def frozen_tower(model: CLIP, trained: Collection[Tensor]) -> Optional[str]:
    """The tower of which no parameter is trained, or None."""
    ids = {id(parameter) for parameter in trained}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ids} - {"logit_scale"}
    in_image = {name.startswith("visual.") for name in names}
    return None if len(in_image) > 1 else TOWERS[in_image == {True}]


def _add_low_rank(model: CLIP, frozen: Collection[str], rank: int, seed: int) -> list[tuple[str, LowRank, nn.Linear]]:
    """Puts `LowRank` in place of all linear layers that are not frozen; returns their names, what is there and was."""
    random = np.random.default_rng(seed)
    replaced = []
    for name, layer in model.named_sublayers():
        if isinstance(layer, nn.Linear) and f"{name}.weight" not in frozen:
            replaced.append((name, LowRank(layer, rank, random), layer))
    for name, added, _ in replaced:
        _put(model, name, added)
    return replaced


def _put(model: CLIP, name: str, layer: nn.Layer) -> None:
    parent, _, own = name.rpartition(".")
    dict(model.named_sublayers())[parent].add_sublayer(own, layer)


def merged_state(model: CLIP) -> dict[str, np.ndarray]:
    """The weights of the model by the names it has without `LowRank`, and with what that adds."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, LowRank):
            arrays[f"{name}.weight"] = layer.merged().numpy()
            del arrays[f"{name}.down"], arrays[f"{name}.up"]
    return arrays


@contextlib.contextmanager
def recomputed(model: CLIP) -> Iterator[None]:
    """Has the blocks of both towers keep their inputs alone for the gradients, and compute the rest again.

    Memory for gradients becomes that of one block, for the time of one more forward pass.
    """
    from paddle.distributed.fleet.utils import recompute

    blocks = [
        layer for layer in model.sublayers() if isinstance(layer, (BertLayer, Bottleneck, ResidualAttentionBlock))
    ]
    for block in blocks:
        # Nothing in them is random. The other way of Paddle's needs an input that needs gradients.
        again = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def interpolate(before: CLIP, after: CLIP, alpha: float = 0.5) -> CLIP:
    """Makes a model with weights between those of two (Wortsman et al. 2021, "WiSE-FT", arXiv:2109.01903).

    A model that was fine-tuned forgets what it was not shown. Part of the way back it often knows both.

    Args:
        before: the model before fine-tuning.
        after: the fine-tuned model.
        alpha: share of `after`: 0 gives `before`, 1 gives `after`.

    Returns:
        A new model in eval mode: (1 - alpha) * before + alpha * after.

    Raises:
        CheckpointError: if the models differ in their tensors.
        ValueError: if `alpha` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it must be between 0, the model before, and 1, the one after")
    before, after = unwrapped(before), unwrapped(after)
    first, second = before.state_dict(), after.state_dict()
    require_same_tensors(
        expected={name: tuple(tensor.shape) for name, tensor in first.items()},
        found={name: tuple(tensor.shape) for name, tensor in second.items()},
        source="the model after",
        hint="interpolate a model and what was fine-tuned from it",
    )
    between = copy.deepcopy(after)
    with paddle.no_grad():
        for name, tensor in between.state_dict().items():
            tensor.set_value((1 - alpha) * first[name].astype(tensor.dtype) + alpha * second[name])
    between.eval()
    return between
