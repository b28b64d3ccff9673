"""Derives the sizes of a CLIP model from the shapes of its tensors, under our names, and the shapes from the sizes."""

import math
import re
from collections.abc import Callable
from typing import Any, Optional

from ..config import CLIPConfig
from ..errors import CheckpointError, listed

Shapes = dict[str, tuple[int, ...]]  # {our name: shape}

HINT = "Expected weights of OpenAI's CLIP, in OpenAI's or paddle_clip's names; `paddle-clip models` lists the models"

RESNET_CELL = 32  # pixels that one position of a ResNet's last feature map stands for
BERT_CONTEXT = 52  # tokens of Chinese-CLIP's texts, which no shape tells
# The sizes of a tower that is not there.
NO_IMAGE: dict[str, Any] = {"image_resolution": 0, "vision_layers": 0, "vision_width": 0, "vision_patch_size": None}
NO_TEXT: dict[str, Any] = {"transformer_width": 0, "transformer_heads": 0, "transformer_layers": 0}


def config_from_shapes(shapes: Shapes, source: str = "the state dict") -> CLIPConfig:
    """The config of the model, or of the tower alone, whose tensors have these shapes (OpenAI's `build_model`).

    Args:
        shapes: {our name: shape}.
        source: name of their file, for messages.

    Raises:
        CheckpointError: if a tensor that tells a size is missing or has the wrong number of dimensions, or the grid of
            image positions is not square.
    """

    def size(name: str, axis: int, ndim: int) -> int:
        if len(shapes.get(name, ())) != ndim or 0 in shapes[name]:
            found = f"has the shape {list(shapes[name])}" if name in shapes else "is missing"
            examples = listed(sorted(shapes)[:3])
            raise CheckpointError(
                f"{source} is not a CLIP model: {name} {found}, among {len(shapes)} tensors such as {examples}. {HINT}"
            )
        return shapes[name][axis]

    has_image = any(name.startswith("visual.") for name in shapes)
    if all(name.startswith("visual.") for name in shapes):
        if "visual.proj" in shapes:
            embed_dim = size("visual.proj", 1, 2)
        else:
            embed_dim = 0 if "visual.class_embedding" in shapes else size("visual.attnpool.c_proj.bias", 0, 1)
        return CLIPConfig(embed_dim, **_vision_sizes(shapes, size, source), **NO_TEXT)
    image = _vision_sizes(shapes, size, source) if has_image else NO_IMAGE
    if any(name.startswith("bert.") for name in shapes):
        return CLIPConfig(size("text_projection", 1, 2), **{**image, **_bert_sizes(shapes, size)})
    width = size("ln_final.weight", 0, 1)
    text: dict[str, Any] = {
        "embed_dim": size("text_projection", 1, 2) if has_image or "text_projection" in shapes else 0,
        "context_length": size("positional_embedding", 0, 2),
        "vocab_size": size("token_embedding.weight", 0, 2),
        "transformer_width": width,
        "transformer_heads": width // 64,
        "transformer_layers": _blocks(shapes, "transformer.resblocks"),
        "transformer_mlp_width": _mlp_width(shapes, "transformer", width),
    }
    return CLIPConfig(**{**image, **text})


def _bert_sizes(shapes: Shapes, size: Callable[[str, int, int], int]) -> dict[str, Any]:
    """The sizes that BERT tells; `size` tells one, by name, axis and number of dimensions."""
    width = size("bert.embeddings.word_embeddings.weight", 1, 2)
    positions = size("bert.embeddings.position_embeddings.weight", 0, 2)
    mlp_width = size("bert.encoder.layer.0.intermediate.dense.bias", 0, 1)
    return {
        "context_length": min(BERT_CONTEXT, positions),
        "vocab_size": size("bert.embeddings.word_embeddings.weight", 0, 2),
        "transformer_width": width,
        "transformer_heads": width // 64,
        "transformer_layers": _blocks(shapes, "bert.encoder.layer"),
        "transformer_mlp_width": None if mlp_width == 4 * width else mlp_width,
        "text_tower": "bert",
        "text_positions": positions if positions > BERT_CONTEXT else None,
    }


def _blocks(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, shapes) if match), default=0)


def _mlp_width(shapes: Shapes, transformer: str, width: int) -> Optional[int]:
    """The hidden width of a transformer's MLPs, as its first block tells it; None stands for four times its width."""
    shape = shapes.get(f"{transformer}.resblocks.0.mlp.c_fc.bias", ())
    return shape[0] if len(shape) == 1 and shape[0] not in (0, 4 * width) else None


def _vision_sizes(shapes: Shapes, size: Callable[[str, int, int], int], source: str) -> dict[str, Any]:
    """The sizes that the image tower tells; `size` tells one, by name, axis and number of dimensions."""

    def grid(name: str) -> int:
        positions = size(name, 0, 2) - 1
        side = math.isqrt(max(0, positions))
        if side * side != positions:
            raise CheckpointError(
                f"{source} does not fit: {name} has {positions} positions beside the first, and their grid is not "
                "square; the images of OpenAI's CLIP are. Resize it to a square one, or load the original model"
            )
        return side

    if "visual.class_embedding" in shapes or "visual.proj" in shapes:
        patch, width = size("visual.conv1.weight", 3, 4), size("visual.conv1.weight", 0, 4)
        return {
            "image_resolution": patch * grid("visual.positional_embedding"),
            "vision_layers": _blocks(shapes, "visual.transformer.resblocks"),
            "vision_width": width,
            "vision_patch_size": patch,
            "vision_mlp_width": _mlp_width(shapes, "visual.transformer", width),
        }
    resolution = RESNET_CELL * grid("visual.attnpool.positional_embedding")
    stages = [_blocks(shapes, f"visual.layer{stage}") for stage in (1, 2, 3, 4)]
    return {
        "image_resolution": resolution,
        "vision_layers": (stages[0], stages[1], stages[2], stages[3]),
        "vision_width": size("visual.layer1.0.conv1.weight", 0, 4),
        "vision_patch_size": None,
    }


def tower_sizes(config: CLIPConfig) -> dict[str, int]:
    """The number of weights of each tower: {"image": …, "text": …}."""
    sizes = {"image": 0, "text": 0}
    for name, shape in parameter_shapes(config).items():
        sizes["image" if name.startswith("visual.") else "text"] += math.prod(shape)
    return sizes


def parameter_shapes(config: CLIPConfig) -> Shapes:
    """{our name: shape} of every tensor in the state dict of a model of these sizes, without building it."""
    shapes: Shapes = {}
    if config.has_image:
        shapes.update(_vision_transformer(config) if config.is_vit else _resnet(config))
    if config.text_tower == "bert":
        shapes.update(_bert(config))
    elif config.has_text:
        width = config.transformer_width
        shapes.update(_transformer("transformer", width, config.transformer_layers, config.transformer_mlp_width))
        shapes["token_embedding.weight"] = (config.vocab_size, width)
        shapes["positional_embedding"] = (config.context_length, width)
        shapes.update(_norm("ln_final", width))
        if config.embed_dim:
            shapes["text_projection"] = (width, config.embed_dim)
    if config.has_image and config.has_text:
        shapes["logit_scale"] = ()
    return shapes


def _linear(name: str, in_features: int, out_features: int) -> Shapes:
    return {f"{name}.weight": (in_features, out_features), f"{name}.bias": (out_features,)}


def _conv(name: str, in_channels: int, out_channels: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out_channels, in_channels, kernel, kernel)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias")}


def _batch_norm(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "_mean", "_variance")}


def _transformer(prefix: str, width: int, layers: int, mlp_width: Optional[int]) -> Shapes:
    shapes: Shapes = {}
    mlp_width = mlp_width or 4 * width
    for block in (f"{prefix}.resblocks.{index}" for index in range(layers)):
        shapes.update(_linear(f"{block}.attn.in_proj", width, 3 * width))
        shapes.update(_linear(f"{block}.attn.out_proj", width, width))
        shapes.update(_norm(f"{block}.ln_1", width))
        shapes.update(_linear(f"{block}.mlp.c_fc", width, mlp_width))
        shapes.update(_linear(f"{block}.mlp.c_proj", mlp_width, width))
        shapes.update(_norm(f"{block}.ln_2", width))
    return shapes


def _bert(config: CLIPConfig) -> Shapes:
    width, mlp_width = config.transformer_width, config.transformer_mlp_width or 4 * config.transformer_width
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (config.text_positions or config.context_length, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        **_norm("bert.embeddings.LayerNorm", width),
        "text_projection": (width, config.embed_dim),
    }
    for block in (f"bert.encoder.layer.{index}" for index in range(config.transformer_layers)):
        for part in ("query", "key", "value"):
            shapes.update(_linear(f"{block}.attention.self.{part}", width, width))
        shapes.update(_linear(f"{block}.attention.output.dense", width, width))
        shapes.update(_norm(f"{block}.attention.output.LayerNorm", width))
        shapes.update(_linear(f"{block}.intermediate.dense", width, mlp_width))
        shapes.update(_linear(f"{block}.output.dense", mlp_width, width))
        shapes.update(_norm(f"{block}.output.LayerNorm", width))
    return shapes


def _vision_transformer(config: CLIPConfig) -> Shapes:
    width, patch = config.vision_width, config.vision_patch_size
    assert isinstance(config.vision_layers, int) and patch is not None
    shapes = _conv("visual.conv1", 3, width, patch)
    shapes["visual.class_embedding"] = (width,)
    shapes["visual.positional_embedding"] = ((config.image_resolution // patch) ** 2 + 1, width)
    shapes.update(_norm("visual.ln_pre", width))
    shapes.update(_transformer("visual.transformer", width, config.vision_layers, config.vision_mlp_width))
    shapes.update(_norm("visual.ln_post", width))
    if config.embed_dim:
        shapes["visual.proj"] = (width, config.embed_dim)
    return shapes


def _resnet(config: CLIPConfig) -> Shapes:
    width = config.vision_width
    assert isinstance(config.vision_layers, tuple)
    shapes: Shapes = {}

    def conv_norm(prefix: str, number: int, in_channels: int, out_channels: int, kernel: int) -> None:
        shapes.update(_conv(f"{prefix}.conv{number}", in_channels, out_channels, kernel))
        shapes.update(_batch_norm(f"{prefix}.bn{number}", out_channels))

    conv_norm("visual", 1, 3, width // 2, 3)
    conv_norm("visual", 2, width // 2, width // 2, 3)
    conv_norm("visual", 3, width // 2, width, 3)
    inplanes = width
    for stage, blocks in enumerate(config.vision_layers):
        planes = width * 2**stage
        for index in range(blocks):
            block = f"visual.layer{stage + 1}.{index}"
            conv_norm(block, 1, inplanes, planes, 1)
            conv_norm(block, 2, planes, planes, 3)
            conv_norm(block, 3, planes, 4 * planes, 1)
            if index == 0:
                shapes.update(_conv(f"{block}.downsample.0", inplanes, 4 * planes, 1))
                shapes.update(_batch_norm(f"{block}.downsample.1", 4 * planes))
            inplanes = 4 * planes
    shapes["visual.attnpool.positional_embedding"] = ((config.image_resolution // RESNET_CELL) ** 2 + 1, inplanes)
    for letter in "kqv":
        shapes.update(_linear(f"visual.attnpool.{letter}_proj", inplanes, inplanes))
    shapes.update(_linear("visual.attnpool.c_proj", inplanes, config.embed_dim))
    return shapes
