"""OpenAI's names and layouts <-> ours: pure dict -> dict, strict, without torch or paddle."""

import dataclasses
import functools
import re
from typing import NamedTuple

import numpy as np

from .archives import BFLOAT16, TORCHSCRIPT, Checkpoint
from .errors import CheckpointError, require_same_tensors
from .presets import ACTIVATIONS, CLIPConfig

# A row per difference between OpenAI's names and ours: their name, our name, transposed or not. All other names and
# layouts are equal. A weight is transposed exactly when it belongs to an nn.Linear: [out, in] in PyTorch, [in, out] in
# Paddle.
OPENAI = (
    ("{}.running_mean", "{}._mean", False),
    ("{}.running_var", "{}._variance", False),
    ("{}.attn.in_proj_weight", "{}.attn.in_proj.weight", True),
    ("{}.attn.in_proj_bias", "{}.attn.in_proj.bias", False),
    ("{}.attn.out_proj.weight", "{}.attn.out_proj.weight", True),
    ("{}.mlp.c_fc.weight", "{}.mlp.c_fc.weight", True),
    ("{}.mlp.c_proj.weight", "{}.mlp.c_proj.weight", True),
    ("visual.attnpool.q_proj.weight", "visual.attnpool.q_proj.weight", True),
    ("visual.attnpool.k_proj.weight", "visual.attnpool.k_proj.weight", True),
    ("visual.attnpool.v_proj.weight", "visual.attnpool.v_proj.weight", True),
    ("visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.weight", True),
)

# open_clip's models with a text tower of its own: OpenAI's names, behind "text.".
OPEN_CLIP = (
    ("text.text_projection", "text_projection", False),
    ("text.positional_embedding", "positional_embedding", False),
    ("text.token_embedding.weight", "token_embedding.weight", False),
    ("text.ln_final.{}", "ln_final.{}", False),
    *((f"text.{theirs}", ours, t) for theirs, ours, t in OPENAI if ".attn." in theirs or ".mlp." in theirs),
    ("text.transformer.{}", "transformer.{}", False),
    *OPENAI,
)


def _hugging_face(theirs, ours):
    """The rows of one tower of Hugging Face's CLIPModel; its three projections are parts of our one."""
    rows = [
        (f"{theirs}.encoder.layers.{{}}.self_attn.{letter}_proj.{part}", f"{ours}.{{}}.attn.in_proj.{part}#{letter}", t)
        for letter in "qkv"
        for part, t in (("weight", True), ("bias", False))
    ]
    for their_layer, our_layer in (
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        rows.append((f"{theirs}.encoder.layers.{{}}.{their_layer}.weight", f"{ours}.{{}}.{our_layer}.weight", True))
        rows.append((f"{theirs}.encoder.layers.{{}}.{their_layer}.bias", f"{ours}.{{}}.{our_layer}.bias", False))
    for number in (1, 2):
        rows.append((f"{theirs}.encoder.layers.{{}}.layer_norm{number}.{{}}", f"{ours}.{{}}.ln_{number}.{{}}", False))
    return rows


HUGGING_FACE = (
    *_hugging_face("text_model", "transformer.resblocks"),
    *_hugging_face("vision_model", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight", False),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding", False),
    ("text_model.final_layer_norm.{}", "ln_final.{}", False),
    ("text_projection.weight", "text_projection", True),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding", False),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", False),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", False),
    ("vision_model.pre_layrnorm.{}", "visual.ln_pre.{}", False),  # its spelling
    ("vision_model.post_layernorm.{}", "visual.ln_post.{}", False),
    ("visual_projection.weight", "visual.proj", True),
)

# The package paddleclip 1.0.0, whose layers are Paddle's: nothing to transpose.
PADDLECLIP = (
    ("{}.resblocks.{}.attn.q_proj.{}", "{}.resblocks.{}.attn.in_proj.{}#q", False),
    ("{}.resblocks.{}.attn.k_proj.{}", "{}.resblocks.{}.attn.in_proj.{}#k", False),
    ("{}.resblocks.{}.attn.v_proj.{}", "{}.resblocks.{}.attn.in_proj.{}#v", False),
    ("visual.attnpool.attn.q_proj.{}", "visual.attnpool.q_proj.{}", False),
    ("visual.attnpool.attn.k_proj.{}", "visual.attnpool.k_proj.{}", False),
    ("visual.attnpool.attn.v_proj.{}", "visual.attnpool.v_proj.{}", False),
    ("visual.attnpool.attn.out_proj.{}", "visual.attnpool.c_proj.{}", False),
)


class Dialect(NamedTuple):
    """A program's way to name and lay out CLIP's weights."""

    name: str
    marker: str  # a pattern; the first dialect of which a tensor's name matches it is the file's
    rules: tuple
    activation: str  # of every model in this dialect, or "" where the file alone does not tell


DIALECTS = (
    Dialect("paddle_clip", r".+\.attn\.in_proj\.weight", (), "quickgelu"),
    Dialect("Hugging Face", r"text_model\.embeddings\.token_embedding\.weight", HUGGING_FACE, ""),
    Dialect("paddleclip 1.0", r".+\.resblocks\.0\.attn\.q_proj\.weight", PADDLECLIP, "quickgelu"),
    Dialect("open_clip", r"text\.token_embedding\.weight", OPEN_CLIP, ""),
    Dialect("OpenAI", r".*", OPENAI, "quickgelu"),
)

# Tensors of the files that are not parameters: sizes, which the shapes repeat, masks, and PyTorch's bookkeeping.
DROPPED = re.compile(
    r"input_resolution|context_length|vocab_size|.+\.num_batches_tracked|(.+\.)?attn_mask|.+\.position_ids"
)

# What is said of the activation where only the names told it, which open_clip shares.
ASSUMED = "; a file that open_clip trained with GELU needs --activation gelu"
_HINT = "Expected weights of OpenAI's CLIP, in OpenAI's or paddle_clip's names; `python presets.py` lists the models"


class Weights(NamedTuple):
    """What a checkpoint says: the model's sizes, its arrays under our names in our layouts, and what was left out."""

    config: CLIPConfig
    arrays: dict  # {our name: array, or something with a `shape`, a `dtype` and `__array__`}
    dropped: list  # names of the tensors that are not weights
    ignored: int  # number of tensors beside the model, such as an optimizer's
    prefix: str  # of the model's names in the file, such as "state_dict.module."
    dialect: str
    activation_from: str  # what told the activation


class Fused:
    """The three projections of an attention as one array, which is made when it is asked for."""

    def __init__(self, parts):
        self.parts = parts
        self.dtype = parts[0].dtype
        self.shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts, axis=-1, dtype=dtype)


def from_checkpoint(tensors, source="the state dict", activation=None):
    """Maps a checkpoint's tensors to ours, strictly.

    Args:
        tensors: {name: array} in the names and layouts of a dialect above, perhaps within a training checkpoint.
        source: where they are from, for messages.
        activation: "quickgelu" or "gelu"; None for what the file or its dialect tells.

    Returns:
        `Weights`; its arrays are views of the ones given, in their dtype.

    Raises:
        CheckpointError: once, with every tensor that is missing, unexpected or misshapen; or if the activation is
            needed and not told.
    """
    prefix = _prefix(tensors, source)
    inner = {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}
    dialect = next(d for d in DIALECTS if any(re.fullmatch(d.marker, name) for name in inner) or d.marker == ".*")
    dropped = sorted(name for name in inner if DROPPED.fullmatch(name))
    arrays, parts = {}, {}
    left_out = set(dropped)
    for name in [name for name in inner if name not in left_out]:
        ours, array = to_paddle(name, inner[name], dialect.rules)
        target, _, part = ours.partition("#")
        if part:
            parts.setdefault(target, {})[part] = array
        elif ours in arrays:
            raise CheckpointError(f"{source} holds {ours} twice, once as {prefix}{name}")
        else:
            arrays[ours] = array
    for name, found in parts.items():
        arrays.update(_fuse(name, found))
    if dialect.name == "paddleclip 1.0" and getattr(arrays.get("logit_scale"), "shape", None) == (1,):
        arrays["logit_scale"] = arrays["logit_scale"].reshape(())

    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    config = config_from_shapes(shapes, source)
    require_same_tensors(parameter_shapes(config), shapes, source, _HINT)
    integers = sorted(name for name, array in arrays.items() if array.dtype.kind != "f" and array.dtype != BFLOAT16)
    if integers:
        raise CheckpointError(f"{source}: weights must be floating-point numbers: {', '.join(integers)}. {_HINT}")
    activation, told_by = _activation(activation, tensors, config, dialect, source)
    config = dataclasses.replace(config, activation=activation)
    return Weights(config, arrays, dropped, len(tensors) - len(inner), prefix, dialect.name, told_by)


def _prefix(tensors, source):
    """What stands before the model's own names, told by its one tensor `logit_scale`."""
    prefixes = sorted(name[: -len("logit_scale")] for name in tensors if re.fullmatch(r"(.+\.)?logit_scale", name))
    if len(prefixes) > 1:
        listed = ", ".join(f"{prefix}*" for prefix in prefixes)
        raise CheckpointError(f"{source} holds several models: {listed}; save one of them alone")
    return prefixes[0] if prefixes else ""


def _fuse(name, found):
    """The three parts of a projection as one; or, if they do not go together, each under a name that nothing has."""
    if set(found) == set("qkv") and len({(part.shape, part.dtype) for part in found.values()}) == 1 and found["q"].ndim:
        return {name: Fused([found[letter] for letter in "qkv"])}
    return {f"{name}#{letter}": part for letter, part in found.items()}


def _activation(given, tensors, config, dialect, source):
    """The activation, and what told it: the caller, the file, the configuration beside it, or its dialect."""
    is_file = isinstance(tensors, Checkpoint)
    is_openais = is_file and tensors.kind == TORCHSCRIPT
    if dialect.name in ("OpenAI", "open_clip") and config.vision_patch_size and not is_openais:
        _require_heads_of_64(config, source)
    if given:
        if given not in ACTIVATIONS:
            raise ValueError(f"activation is {given!r}; choose one of {', '.join(ACTIVATIONS)}")
        return given, "request"
    if is_file and tensors.metadata.get("activation") in ACTIVATIONS:
        return tensors.metadata["activation"], "the file's metadata"
    try:
        if is_file and dialect.name == "Hugging Face":
            described = tensors.neighbour("config.json")
            if described:
                return _hugging_face_activation(described, config), "the config.json beside it"
        if is_file and dialect.name in ("OpenAI", "open_clip") and not is_openais:
            described = tensors.neighbour("open_clip_config.json")
            if described:
                return _open_clip_activation(described["model_cfg"], config), "the open_clip_config.json beside it"
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: the configuration beside it cannot be used ({error!r})") from None
    if not dialect.activation:
        raise CheckpointError(
            f"{source} is a file of {dialect.name}, which does not say what activation it was trained with: "
            "give --activation quickgelu (OpenAI's weights) or --activation gelu (most others)"
        )
    told_by = f"{dialect.name}'s names"
    if dialect.name == "OpenAI" and not is_openais:
        told_by += ASSUMED
    return dialect.activation, told_by


def _require_heads_of_64(config, source):
    """Heads leave no trace in the shapes. Of open_clip's models, those of these widths have wider ones."""
    if config.vision_width in (1280, 1408, 1664):
        raise CheckpointError(
            f"{source} is not a model OpenAI's CLIP has a form for: the heads of open_clip's ViT-H, ViT-g and ViT-bigG "
            "are not 64 wide"
        )


def _open_clip_activation(model, config):
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    wide = config.vision_patch_size and vision.get("head_width", 64) != 64
    if wide or text.get("heads", config.transformer_heads) != config.transformer_heads:
        raise CheckpointError("open_clip_config.json tells of heads that OpenAI's CLIP has no form for: not 64 wide")
    return "quickgelu" if model.get("quick_gelu", False) else "gelu"


def _hugging_face_activation(hugging_face, config):
    towers = [hugging_face.get(name, {}) for name in ("text_config", "vision_config")]
    widths = (config.transformer_width, config.vision_width)
    for tower, width, heads in zip(towers, widths, (8, 12)):
        if tower.get("num_attention_heads", heads) * 64 != width or tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise CheckpointError("config.json tells of a model that OpenAI's CLIP has no form for: heads or epsilon")
    found = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    activations = {"quick_gelu": "quickgelu", "gelu": "gelu"}
    if len(found) != 1 or not found <= activations.keys():
        raise CheckpointError(f"config.json tells of the activations {sorted(found)}; expected quick_gelu or gelu")
    return activations[found.pop()]


@functools.cache
def _pattern(name):
    return re.compile(re.escape(name).replace(r"\{\}", "(.+)"))


def to_paddle(name, array, rules=OPENAI):
    """Our name and layout of a tensor; the array is a view. A part of a fused projection is named "name#part"."""
    for theirs, ours, transposed in rules:
        match = _pattern(theirs).fullmatch(name)
        if match:
            return ours.format(*match.groups()), array.T if transposed else array
    return name, array


def to_openai(name, array):
    """OpenAI's name and layout of one of our tensors; the array is a view."""
    for theirs, ours, transposed in OPENAI:
        match = _pattern(ours).fullmatch(name)
        if match:
            return theirs.format(*match.groups()), array.T if transposed else array
    return name, array


def published_dtype(name):
    """The dtype of a tensor in OpenAI's files, by our or OpenAI's name (OpenAI's `convert_weights`)."""
    float32 = r"(.+\.)?(ln_\w+|bn\d|downsample\.1)\.\w+|(.+\.)?(\w+_embedding)(\.weight)?|logit_scale"
    return "float32" if re.fullmatch(float32, name) else "float16"


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
