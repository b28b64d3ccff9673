"""Translates the names and layouts of other programs to ours, strictly, and ours to OpenAI's."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from ..config import CLIPConfig, Preprocessing
from ..errors import CheckpointError, listed, require_same_tensors
from .casting import BFLOAT16, dtype_name
from .finding import Found, alone, find
from .positions import join_long, resize_grid
from .settings import settings_of
from .shapes import HINT, config_from_shapes, parameter_shapes

Rules = Sequence[tuple[str, str, bool]]

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

_BERT_LINEARS = (
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# cn_clip's Chinese-CLIP; `Wqkv` is what its flash attention calls the fused projection.
CHINESE_CLIP = (
    *(
        (f"bert.encoder.layer.{{}}.{part}.weight", f"bert.encoder.layer.{{}}.{part}.weight", True)
        for part in _BERT_LINEARS
    ),
    ("visual.{}.attn.Wqkv.weight", "visual.{}.attn.in_proj.weight", True),
    ("visual.{}.attn.Wqkv.bias", "visual.{}.attn.in_proj.bias", False),
    *OPENAI,
)

# open_clip's models with a separate text tower: OpenAI's names with the prefix "text.".
OPEN_CLIP = (
    ("text.text_projection", "text_projection", False),
    ("text.positional_embedding", "positional_embedding", False),
    ("text.positional_embedding_res", "positional_embedding_res", False),
    ("text.token_embedding.weight", "token_embedding.weight", False),
    ("text.ln_final.{}", "ln_final.{}", False),
    *((f"text.{theirs}", ours, t) for theirs, ours, t in OPENAI if ".attn." in theirs or ".mlp." in theirs),
    ("text.transformer.{}", "transformer.{}", False),
    *OPENAI,
)


def _hugging_face(theirs: str, ours: str) -> Rules:
    """The rows of one tower of Hugging Face's CLIPModel; its three projections are parts of our fused one."""
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
    ("text_model.embeddings.position_embedding_res.weight", "positional_embedding_res", False),
    ("text_model.final_layer_norm.{}", "ln_final.{}", False),
    ("text_projection.weight", "text_projection", True),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding", False),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", False),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", False),
    ("vision_model.pre_layrnorm.{}", "visual.ln_pre.{}", False),  # Hugging Face's spelling
    ("vision_model.post_layernorm.{}", "visual.ln_post.{}", False),
    ("visual_projection.weight", "visual.proj", True),
    # ChineseCLIPModel
    *(
        (f"text_model.encoder.layer.{{}}.{part}.weight", f"bert.encoder.layer.{{}}.{part}.weight", True)
        for part in _BERT_LINEARS
    ),
    ("text_model.encoder.layer.{}", "bert.encoder.layer.{}", False),
    *(
        (f"text_model.embeddings.{part}.{{}}", f"bert.embeddings.{part}.{{}}", False)
        for part in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    ),
)

# The same names for Paddle's layers, in PaddleMIX (ppdiffusers): nothing is transposed.
PADDLEMIX = tuple((theirs, ours, False) for theirs, ours, _ in HUGGING_FACE)


def _paddlenlp(theirs: str, ours: str) -> Rules:
    """The rows of one tower of PaddleNLP's CLIPModel, whose layers are Paddle's: nothing is transposed."""
    parts = [(f"self_attn.{letter}_proj.{{}}", f"attn.in_proj.{{}}#{letter}") for letter in "qkv"]
    parts += [("self_attn.out_proj.{}", "attn.out_proj.{}"), ("norm1.{}", "ln_1.{}"), ("norm2.{}", "ln_2.{}")]
    parts += [("linear1.{}", "mlp.c_fc.{}"), ("linear2.{}", "mlp.c_proj.{}")]
    return [(f"{theirs}.transformer.layers.{{}}.{part}", f"{ours}.{{}}.{to}", False) for part, to in parts]


PADDLENLP = (
    # ChineseCLIPModel
    *(
        (f"text_model.encoder.layers.{{}}.{theirs}.{{}}", f"bert.encoder.layer.{{}}.{ours}.{{}}", False)
        for theirs, ours in (
            ("self_attn.q_proj", "attention.self.query"),
            ("self_attn.k_proj", "attention.self.key"),
            ("self_attn.v_proj", "attention.self.value"),
            ("self_attn.out_proj", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm2", "output.LayerNorm"),
        )
    ),
    ("text_model.embeddings.layer_norm.{}", "bert.embeddings.LayerNorm.{}", False),
    ("text_model.embeddings.{}", "bert.embeddings.{}", False),
    # CLIPModel
    *_paddlenlp("text_model", "transformer.resblocks"),
    *_paddlenlp("vision_model", "visual.transformer.resblocks"),
    ("text_model.positional_embedding.weight", "positional_embedding", False),
    ("text_model.{}", "{}", False),
    ("vision_model.positional_embedding.weight", "visual.positional_embedding", False),
    ("vision_model.attnpool.positional_embedding.weight", "visual.attnpool.positional_embedding", False),
    ("vision_projection", "visual.proj", False),
    ("vision_model.{}", "visual.{}", False),
)

# The package paddleclip 1.0.0, whose layers are Paddle's: nothing is transposed.
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
    marker: str  # pattern of a tensor's name; a file has the first dialect whose marker one of its names matches
    rules: Rules
    activation: str  # activation of all models in this dialect, or "" where names do not tell it


_HUGGING_FACE_TELLS = (
    r"text_model\.embeddings\.token_embedding\.weight|vision_model\.embeddings\.class_embedding"
    r"|text_model\.encoder\.layer\.0\.intermediate\.dense\.weight"
)

DIALECTS = (
    Dialect("paddle_clip", r".+\.attn\.in_proj\.weight", (), "quickgelu"),
    Dialect("Hugging Face", _HUGGING_FACE_TELLS, HUGGING_FACE, ""),
    Dialect(
        "PaddleNLP",
        r"text_model\.token_embedding\.weight|vision_model\.(class_embedding|attnpool\..+)",
        PADDLENLP,
        "quickgelu",
    ),
    Dialect(
        "paddleclip 1.0",
        r".+\.resblocks\.0\.attn\.q_proj\.weight|visual\.attnpool\.attn\.q_proj\.weight",
        PADDLECLIP,
        "quickgelu",
    ),
    Dialect("paddle_clip", r"visual\.bn1\._mean", (), "quickgelu"),  # a ResNet alone
    Dialect("Chinese-CLIP", r"bert\.embeddings\.word_embeddings\.weight", CHINESE_CLIP, "quickgelu"),
    Dialect("open_clip", r"text\.token_embedding\.weight", OPEN_CLIP, ""),
    Dialect("OpenAI", r".*", OPENAI, "quickgelu"),
)

# Names of tensors that are not weights: sizes, which the shapes tell too; masks; PyTorch's counters; BERT's pooler.
DROPPED = re.compile(
    r"input_resolution|context_length|vocab_size|.+\.num_batches_tracked|(.+\.)?attn_mask|.+\.position_ids"
    r"|(bert|text_model)\.pooler\..+"  # which Chinese-CLIP does not read
)
DROPPED_OF_TOWER = re.compile(f"{DROPPED.pattern}|logit_scale")


class Weights(NamedTuple):
    """The content of a checkpoint: sizes, arrays under our names and in our layouts, and what was left out."""

    config: CLIPConfig
    arrays: dict[str, Any]  # {our name: array, or something with a `shape`, a `dtype` and `__array__`}
    dropped: list[str]  # names of the tensors that are not weights
    ignored: int  # number of tensors beside the model, such as an optimizer's
    prefix: str  # prefix of the model's names in the file, such as "state_dict.module."
    dialect: str
    activation_from: str  # source of the activation
    activation_assumed: bool  # whether its source is names that models of either activation have
    alone: str  # "an image tower alone", "a text tower alone", or "" for a whole model
    preprocessing: Preprocessing = Preprocessing()  # as the file or what is beside it says


class Fused:
    """The three projections of an attention as one array, concatenated when it is read."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.dtype = parts[0].dtype
        self.shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def __array__(self, dtype: Optional[np.dtype] = None, copy: Optional[bool] = None) -> np.ndarray:
        return np.concatenate(self.parts, axis=-1, dtype=dtype)


def from_checkpoint(
    tensors: Mapping[str, np.ndarray],
    source: str = "the state dict",
    activation: Optional[str] = None,
    prefix: Optional[str] = None,
    resolution: Optional[int] = None,
    heads: Optional[int] = None,
) -> Weights:
    """Translates a checkpoint's tensors to our names and layouts, strictly.

    Args:
        tensors: {name: array} in the names and layouts of a dialect above, perhaps within a training checkpoint; a
            `Checkpoint` tells its settings by its metadata too, or by the files beside it.
        source: name of their file, for messages.
        activation: "quickgelu" or "gelu"; None takes the one the file or its dialect tells.
        prefix: start of the model's names, where the file has several models.
        resolution: side of the images in pixels, for which the image positions are interpolated; None keeps them.
        heads: number of the image tower's heads, where nothing tells it: shapes do not.

    Returns:
        The content; its arrays are views of the tensors, in their dtype.

    Raises:
        CheckpointError: if tensors are missing, unexpected or misshapen, with the first of them; if there are several
            models and no prefix chooses; if a setting asks for what is not computed here; or if nothing tells the
            activation or the heads.
        ValueError: if images cannot have the resolution, or the image tower so many heads.
    """
    found = find(tensors, source, prefix)
    source = f"{source} ({alone(found.towers)})" if alone(found.towers) else source
    inner = _split({name: tensors[raw] for name, raw in found.names.items()})
    dialect = _dialect(inner)
    is_dropped = DROPPED_OF_TOWER if len(found.towers) == 1 else DROPPED
    dropped = sorted(name for name in inner if is_dropped.fullmatch(name))
    weights = {name: array for name, array in inner.items() if not is_dropped.fullmatch(name)}
    foreign = [f"{name} is {dtype_name(array.dtype)}" for name, array in weights.items() if array.dtype.names]
    if foreign:
        raise CheckpointError(f"{source}: weights must be floating-point numbers: {listed(foreign)}. {HINT}")
    arrays = _under_our_names(weights, dialect, source, found)

    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    config = config_from_shapes(shapes, source)
    require_same_tensors(parameter_shapes(config), shapes, source, HINT)
    integers = [
        f"{name} is {dtype_name(array.dtype)}"
        for name, array in arrays.items()
        if array.dtype.kind != "f" and array.dtype != BFLOAT16
    ]
    if integers:
        raise CheckpointError(f"{source}: weights must be floating-point numbers: {listed(integers)}. {HINT}")
    told = settings_of(activation, heads, tensors, config, dialect.name, dialect.activation, source)
    if resolution is not None:
        config = resize_grid(arrays, config, resolution, source)
    config = dataclasses.replace(
        config,
        activation=told.activation,
        eos_token_id=told.eos_token_id,
        vision_head_width=told.vision_head_width or config.vision_head_width,
        transformer_heads=told.transformer_heads or config.transformer_heads,
    )
    by = (dialect.name, told.told_by, told.is_assumed)
    ignored = len(tensors) - len(found.names)
    return Weights(config, arrays, dropped, ignored, found.prefix, *by, alone(found.towers), told.preprocessing)


def _split(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with BERT's projections in three parts, which cn_clip's flash attention fuses."""
    for name in [name for name in tensors if ".attention.self." in name and name.startswith("bert.")]:
        start, part = name.split(".attention.self.")
        if part.startswith("Wqkv.") and tensors[name].ndim and tensors[name].shape[0] % 3 == 0:
            fused = tensors.pop(name)
            for letter, array in zip(("query", "key", "value"), np.split(fused, 3)):
                tensors[f"{start}.attention.self.{letter}.{part[5:]}"] = array
        elif part.startswith("out_proj."):
            tensors[f"{start}.attention.output.dense.{part[9:]}"] = tensors.pop(name)
    return tensors


def _dialect(tensors: Mapping[str, np.ndarray]) -> Dialect:
    """The dialect of a model's tensors."""
    dialect = next(d for d in DIALECTS if any(re.fullmatch(d.marker, name) for name in tensors) or d.marker == ".*")
    wider = (array.shape for name, array in tensors.items() if name.endswith(".mlp.fc1.weight"))
    if dialect.rules is HUGGING_FACE and any(len(shape) == 2 and shape[0] < shape[1] for shape in wider):
        return dialect._replace(rules=PADDLEMIX)  # [in, out]
    hidden = tensors.get("bert.encoder.layer.0.intermediate.dense.weight")
    if dialect.name == "Chinese-CLIP" and hidden is not None and hidden.ndim == 2 and hidden.shape[0] < hidden.shape[1]:
        return DIALECTS[0]  # [in, out]: a text tower alone of ours
    return dialect


def _under_our_names(weights: Mapping[str, np.ndarray], dialect: Dialect, source: str, found: Found) -> dict[str, Any]:
    """{our name: array} of tensors in a dialect; projections in three parts are fused."""
    arrays: dict[str, Any] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, theirs in weights.items():
        ours, array = to_paddle(name, theirs, dialect.rules)
        target, _, part = ours.partition("#")
        if part:
            parts.setdefault(target, {})[part] = array
        elif ours in arrays:
            raise CheckpointError(f"{source} holds {ours} twice, once as {found.names[name]}")
        else:
            arrays[ours] = array
    for name, projection in parts.items():
        arrays.update(_fuse(name, projection))
    scale = arrays.get("logit_scale")
    if scale is not None and scale.size == 1:  # [1] by FSDP, by Paddle before 2.5, and by open_clip on request
        arrays["logit_scale"] = scale.reshape(())
    join_long(arrays)
    return arrays


def _fuse(name: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """{name: the fused projection}; parts that do not fit each other keep names that no model has."""
    if set(found) == set("qkv") and len({(part.shape, part.dtype) for part in found.values()}) == 1 and found["q"].ndim:
        return {name: Fused([found[letter] for letter in "qkv"])}
    return {f"{name}#{letter}": part for letter, part in found.items()}


# -------------------------------------------------------------------------------------------------------------- names


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", "(.+)"))


def to_paddle(name: str, array: np.ndarray, rules: Rules = OPENAI) -> tuple[str, np.ndarray]:
    """Our name and layout of a tensor; the array is a view. A part of a fused projection is called "name#part"."""
    for theirs, ours, transposed in rules:
        match = _pattern(theirs).fullmatch(name)
        if match:
            return ours.format(*match.groups()), array.T if transposed else array
    return name, array


def to_openai(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """OpenAI's name and layout of one of our tensors, or cn_clip's of one of BERT's; the array is a view."""
    for theirs, ours, transposed in (*CHINESE_CLIP[: len(_BERT_LINEARS)], *OPENAI):
        match = _pattern(ours).fullmatch(name)
        if match:
            return theirs.format(*match.groups()), array.T if transposed else array
    return name, array


def published_dtype(name: str) -> str:
    """The dtype of a tensor in OpenAI's files, by its name with us or OpenAI (OpenAI's `convert_weights`)."""
    float32 = r"(.+\.)?(ln_\w+|bn\d|downsample\.1)\.\w+|(.+\.)?(\w+_embedding)(\.weight)?|(.+\.)?logit_scale"
    return "float32" if re.fullmatch(float32, name) and "bert." not in name else "float16"
