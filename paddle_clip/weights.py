"""OpenAI's names and layouts <-> ours: pure dict -> dict, strict, without torch or paddle."""

import re
from typing import NamedTuple

import numpy as np

from .errors import CheckpointError, require_same_tensors
from .presets import CLIPConfig

# One row per difference between OpenAI's names and ours: pattern, our name, transposed or not. At most one row matches
# a name; all other names and layouts are equal. A weight is transposed exactly when it belongs to an nn.Linear, which
# is [out, in] in PyTorch and [in, out] in Paddle.
RULES = (
    (r"(.+)\.running_mean", r"\1._mean", False),
    (r"(.+)\.running_var", r"\1._variance", False),
    (r"(.+\.attn)\.in_proj_weight", r"\1.in_proj.weight", True),
    (r"(.+\.attn)\.in_proj_bias", r"\1.in_proj.bias", False),
    (r"(.+\.attn\.out_proj)\.weight", r"\1.weight", True),
    (r"(.+\.mlp\.c_(?:fc|proj))\.weight", r"\1.weight", True),
    (r"(visual\.attnpool\.[qkvc]_proj)\.weight", r"\1.weight", True),
)

# Tensors of official files that are not parameters: sizes, which the shapes repeat, and PyTorch's bookkeeping.
DROPPED = re.compile(r"input_resolution|context_length|vocab_size|.+\.num_batches_tracked|(.+\.)?attn_mask")

_HINT = (
    "Expected the weights of OpenAI's CLIP, in OpenAI's or paddle_clip's names; `python presets.py` lists the models"
)


class Weights(NamedTuple):
    """What a checkpoint says: the model's sizes, its arrays under our names in our layouts, and what was left out."""

    config: CLIPConfig
    arrays: dict[str, np.ndarray]
    dropped: list[str]


def from_checkpoint(tensors, source="the state dict"):
    """Maps a checkpoint's tensors to ours, strictly.

    Args:
        tensors: {name: array} in OpenAI's names and layouts, or in ours.
        source: where they are from, for messages.

    Returns:
        `Weights`; its arrays are views of the ones given, in their dtype.

    Raises:
        CheckpointError: once, with every tensor that is missing, unexpected or misshapen.
    """
    if any(name.endswith(".attn.in_proj.weight") for name in tensors):
        arrays, dropped = dict(tensors), []
    else:
        dropped = sorted(name for name in tensors if DROPPED.fullmatch(name))
        arrays = dict(to_paddle(name, array) for name, array in tensors.items() if name not in dropped)

    shapes = {name: array.shape for name, array in arrays.items()}
    config = config_from_shapes(shapes, source)
    require_same_tensors(parameter_shapes(config), shapes, source, _HINT)
    integers = sorted(name for name, array in arrays.items() if array.dtype.kind not in "fu")
    if integers:
        raise CheckpointError(f"{source}: weights must be floating-point numbers: {', '.join(integers)}. {_HINT}")
    return Weights(config, arrays, dropped)


def to_paddle(name, array):
    """Our name and layout of one of OpenAI's tensors; the array is a view."""
    for pattern, ours, transposed in RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours), array.T if transposed else array
    return name, array


def config_from_shapes(shapes, source="the state dict"):
    """The sizes of the model that tensors of these shapes make up (OpenAI's `build_model`).

    Args:
        shapes: {our name: shape}.
        source: where they are from, for messages.

    Raises:
        CheckpointError: if a tensor that tells a size is missing or has the wrong number of dimensions.
    """

    def size(name, axis, ndim):
        if len(shapes.get(name, ())) != ndim:
            found = f"has the shape {list(shapes[name])}" if name in shapes else "is missing"
            some = ", ".join(sorted(shapes)[:3])
            raise CheckpointError(
                f"{source} is not a CLIP model: {name} {found}, among {len(shapes)} tensors such as {some}. {_HINT}"
            )
        return shapes[name][axis]

    def blocks(prefix):
        pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\.")
        return max((int(match[1]) + 1 for match in map(pattern.match, shapes) if match), default=0)

    text_width = size("ln_final.weight", 0, 1)
    sizes = {
        "embed_dim": size("text_projection", 1, 2),
        "context_length": size("positional_embedding", 0, 2),
        "vocab_size": size("token_embedding.weight", 0, 2),
        "transformer_width": text_width,
        "transformer_heads": text_width // 64,
        "transformer_layers": blocks("transformer.resblocks"),
    }
    if "visual.proj" in shapes:
        patch = size("visual.conv1.weight", 3, 4)
        grid = round((size("visual.positional_embedding", 0, 2) - 1) ** 0.5)
        return CLIPConfig(
            image_resolution=patch * grid,
            vision_layers=blocks("visual.transformer.resblocks"),
            vision_width=size("visual.conv1.weight", 0, 4),
            vision_patch_size=patch,
            **sizes,
        )
    grid = round((size("visual.attnpool.positional_embedding", 0, 2) - 1) ** 0.5)
    return CLIPConfig(
        image_resolution=grid * 32,
        vision_layers=tuple(blocks(f"visual.layer{stage}") for stage in (1, 2, 3, 4)),
        vision_width=size("visual.layer1.0.conv1.weight", 0, 4),
        vision_patch_size=None,
        **sizes,
    )


def parameter_shapes(config):
    """{our name: shape} of every tensor in the state dict of a model of these sizes, without building it."""
    shapes = {}

    def linear(name, in_features, out_features):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (in_features, out_features), (out_features,)

    def conv(name, in_channels, out_channels, kernel):
        shapes[f"{name}.weight"] = (out_channels, in_channels, kernel, kernel)

    def norm(name, width, statistics=()):
        for part in ("weight", "bias", *statistics):
            shapes[f"{name}.{part}"] = (width,)

    def conv_norm(prefix, number, in_channels, out_channels, kernel):
        conv(f"{prefix}.conv{number}", in_channels, out_channels, kernel)
        norm(f"{prefix}.bn{number}", out_channels, ("_mean", "_variance"))

    def transformer(prefix, width, layers):
        for block in (f"{prefix}.resblocks.{index}" for index in range(layers)):
            linear(f"{block}.attn.in_proj", width, 3 * width)
            linear(f"{block}.attn.out_proj", width, width)
            norm(f"{block}.ln_1", width)
            linear(f"{block}.mlp.c_fc", width, 4 * width)
            linear(f"{block}.mlp.c_proj", 4 * width, width)
            norm(f"{block}.ln_2", width)

    def resnet(width, layers, tokens):
        conv_norm("visual", 1, 3, width // 2, 3)
        conv_norm("visual", 2, width // 2, width // 2, 3)
        conv_norm("visual", 3, width // 2, width, 3)
        inplanes = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            for index in range(blocks):
                block = f"visual.layer{stage + 1}.{index}"
                conv_norm(block, 1, inplanes, planes, 1)
                conv_norm(block, 2, planes, planes, 3)
                conv_norm(block, 3, planes, 4 * planes, 1)
                if index == 0:
                    conv(f"{block}.downsample.0", inplanes, 4 * planes, 1)
                    norm(f"{block}.downsample.1", 4 * planes, ("_mean", "_variance"))
                inplanes = 4 * planes
        shapes["visual.attnpool.positional_embedding"] = (tokens, inplanes)
        for letter in "kqv":
            linear(f"visual.attnpool.{letter}_proj", inplanes, inplanes)
        linear("visual.attnpool.c_proj", inplanes, config.embed_dim)

    def vision_transformer(width, layers, patch, tokens):
        conv("visual.conv1", 3, width, patch)
        shapes["visual.class_embedding"] = (width,)
        shapes["visual.positional_embedding"] = (tokens, width)
        norm("visual.ln_pre", width)
        transformer("visual.transformer", width, layers)
        norm("visual.ln_post", width)
        shapes["visual.proj"] = (width, config.embed_dim)

    if config.vision_patch_size is None:
        resnet(config.vision_width, config.vision_layers, (config.image_resolution // 32) ** 2 + 1)
    else:
        tokens = (config.image_resolution // config.vision_patch_size) ** 2 + 1
        vision_transformer(config.vision_width, config.vision_layers, config.vision_patch_size, tokens)
    transformer("transformer", config.transformer_width, config.transformer_layers)
    shapes["token_embedding.weight"] = (config.vocab_size, config.transformer_width)
    shapes["positional_embedding"] = (config.context_length, config.transformer_width)
    norm("ln_final", config.transformer_width)
    shapes["text_projection"] = (config.transformer_width, config.embed_dim)
    shapes["logit_scale"] = ()
    return shapes
