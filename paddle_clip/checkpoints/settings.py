"""The settings of a model that its tensors do not tell: in the file's own metadata, or in files beside it.

Each setting that changes a number is honoured, or refused with an error that names it; others are known by name to be
harmless. One that is not known is told in a warning.
"""

import json
import math
import os
import warnings
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from ..config import (
    ACTIVATIONS,
    INTERPOLATIONS,
    MEAN,
    RESIZE_MODES,
    STD,
    CLIPConfig,
    Preprocessing,
    default_preprocessing,
)
from ..errors import CheckpointError, listed
from ..presets import preset_of
from .files import TORCHSCRIPT, Checkpoint, brief

# Files beside a checkpoint that are read.
FILES = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
# Dialects whose settings are in config.json; cn_clip's files lie beside Hugging Face's in the published repositories.
_WITH_CONFIG = ("Hugging Face", "PaddleNLP", "Chinese-CLIP")
Expected = Mapping[str, Container[Any]]  # {setting: the values of it that are computed here}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Settings of every Hugging Face configuration that do not change what its model computes.
_ANY = _words("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty logit_scale_init_value max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
""")
_HUGGING_FACE = {*_ANY, "eos_token_id", "text_config", "text_config_dict", "vision_config", "vision_config_dict"}
_TOWER = {
    *_ANY,
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "eos_token_id",
    "hidden_act",
    "hidden_dropout_prob",
    "num_attention_heads",
    "projection_dim",  # the model's
}
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "ChineseCLIPTokenizer")  # the last is PaddleNLP's
_NONE: Expected = {"quantization_config": (), "pruned_heads": ({},), "tokenizer_class": _CLIP_TOKENIZERS}

# What Chinese-CLIP's text tower, BERT, may say beyond `_TOWER`.
_BERT: Expected = {
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-12,),
    "position_embedding_type": ("absolute",),
    "tokenizer_class": _BERT_TOKENIZERS,
    "type_vocab_size": (2,),
}
_PROCESSOR = _words("""
    _processor_class _valid_processor_keys crop_size data_format device disable_grouping do_center_crop do_convert_rgb
    do_normalize image_mean image_std image_seq_length input_data_format pad_size processor_class rescale_factor
    return_tensors
""")
_PROCESSORS = tuple(
    f"{kind}{name}"
    for kind in ("CLIP", "ChineseCLIP")
    for name in ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
)

# Settings of a tokenizer that do not change the ids of a text: padding is never read, and this package cuts by itself.
_TOKENIZER = _words("""
    add_prefix_space added_tokens_decoder additional_special_tokens auto_map backend bos_token
    clean_up_tokenization_spaces cls_token do_basic_tokenize do_lower_case eos_token errors extra_special_tokens
    is_local local_files_only mask_token max_length max_len model_input_names model_max_length name_or_path never_split
    pad_to_multiple_of pad_token pad_token_type_id padding_side processor_class sep_token special_tokens_map_file
    split_special_tokens stride tokenizer_file truncation_side truncation_strategy unk_token use_fast
""")
_SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "!",
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
)  # OpenAI's, BERT's
# Those of classes that read everything from tokenizer.json do not tell.
_ANY_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Hugging Face's CLIPTokenizer lowers all letters, whatever `do_lower_case` says.
_CLIP_TOKENIZER: Expected = {"tokenizer_class": (*_CLIP_TOKENIZERS, *_ANY_TOKENIZERS)}
_BERT_TOKENIZER: Expected = {
    "do_lower_case": (True,),
    "strip_accents": (True,),
    "tokenize_chinese_chars": (True,),
    "tokenizer_class": (*_BERT_TOKENIZERS, *_ANY_TOKENIZERS),
}

_OPEN_CLIP = {"cast_dtype", "custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict", "text_cfg"}
_OPEN_CLIP_TOWER = _words("""
    attn_pooler_heads attn_pooler_queries eos_id final_ln_after_pool hf_model_pretrained hf_pooler_type hf_proj_type
    hf_tokenizer_name n_queries output_tokens pad_id patch_dropout timm_drop timm_drop_path timm_model_pretrained
    timm_pool timm_proj timm_proj_bias
""")
# Parts of open_clip's blocks that OpenAI's lack, in both towers.
_BLOCK: Expected = {
    "act_kwargs": ({}, {"approximate": "none"}),
    "block_type": ("default",),
    "gelu_approximate": ("none",),
    "ls_init_value": (),
    "norm_kwargs": ({}, {"eps": 1e-5}),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
    ),
}

_WORDS = {  # what a setting is, where its name alone does not tell
    "layer_norm_eps": "another epsilon than OpenAI's",
    "hf_tokenizer_name": "another tokenizer than OpenAI's",
    "tokenizer_class": "another tokenizer than this model's here",
    "no_causal_mask": "its texts are not masked as OpenAI's",
}
_SHOWN = 4  # settings that do not fit, in a message
_OPENAI_WIDEST = 1024  # of OpenAI's vision transformers
_EOS = 49407  # Hugging Face's default
_LEGACY_EOS = 2  # in Hugging Face's files of before 2023, which means the highest id


class Settings(NamedTuple):
    """What a checkpoint and the files beside it say of its model, beyond its tensors."""

    activation: str = ""  # "" where nothing tells it
    told_by: str = ""  # source of the activation
    is_assumed: bool = False  # whether its source is names that models of either activation have
    eos_token_id: Optional[int] = None  # see CLIPConfig
    preprocessing: Preprocessing = Preprocessing()
    vision_head_width: Optional[int] = None  # None where nothing tells it
    transformer_heads: Optional[int] = None  # None where nothing tells it


def settings_of(
    given: Optional[str],
    heads: Optional[int],
    tensors: Mapping[str, Any],
    config: CLIPConfig,
    dialect: str,
    default: str,
    source: str,
) -> Settings:
    """The settings of a checkpoint: as the caller says, its metadata, the files beside it, or its dialect.

    Args:
        given: the activation the caller asks for, or None.
        heads: the number of the image tower's heads that the caller asks for, or None.
        tensors: a `Checkpoint`, or a mapping, which tells nothing by itself.
        config: the sizes of the model, by its tensors.
        dialect: name of the program that named the tensors.
        default: activation of all models in this dialect, or "".
        source: name of the file, for messages.

    Raises:
        CheckpointError: if a setting asks for what is not computed here, or nothing tells the activation or the heads.
        ValueError: if the activation given is unknown, or the image tower cannot have so many heads.
    """
    if given and given not in ACTIVATIONS:
        raise ValueError(f"activation is {given!r}; choose one of {', '.join(ACTIVATIONS)}")
    checkpoint = tensors if isinstance(tensors, Checkpoint) else Checkpoint("state dict")
    is_openais = checkpoint.kind == TORCHSCRIPT
    is_open_clips = dialect in ("OpenAI", "open_clip") and not is_openais
    told = Settings(preprocessing=default_preprocessing(config.text_tower))
    if "activation" in checkpoint.metadata:
        told = _in_metadata(checkpoint.metadata, config, source)
    elif dialect in _WITH_CONFIG or is_open_clips:
        told = _beside(checkpoint, config, dialect, source)
    elif not is_openais:
        _warn_of_unread(checkpoint, dialect, source)
    told = told._replace(vision_head_width=_head_width(heads, told, config, is_openais, source))
    if given:
        return told._replace(activation=given, told_by="request")
    if not told.activation and not default:
        raise CheckpointError(
            f"{source} is a file of {dialect} and does not tell the activation it was trained with: "
            "give activation='quickgelu' (OpenAI's weights) or activation='gelu' (most others)"
        )
    if told.activation:
        return told
    return told._replace(
        activation=default,
        told_by=f"{dialect}'s names",
        is_assumed=dialect in ("OpenAI", "PaddleNLP") and not is_openais,
    )


def _warn_of_unread(checkpoint: Checkpoint, dialect: str, source: str) -> None:
    """Warns of files that tell settings beside weights of which `paddle.save` kept no metadata."""
    folder = os.path.dirname(checkpoint.maps[0].path) if checkpoint.maps else None
    unread = [name for name in FILES if folder is not None and os.path.isfile(os.path.join(folder, name))]
    if unread:
        warnings.warn(
            f"{source}: {listed(unread)} beside it is not read, as the file is in {dialect}'s names and without "
            "metadata. If it tells of this model, convert the original file, or save the model with paddle_clip.save",
            stacklevel=2,
        )


def metadata_of(config: CLIPConfig, preprocessing: Preprocessing) -> dict[str, str]:
    """What a file's metadata say of a model's settings; `settings_of` reads it. OpenAI's are left out."""
    described = {"activation": config.activation}
    if config.vision_head_width != 64:
        described["vision_head_width"] = str(config.vision_head_width)
    if config.transformer_heads != config.transformer_width // 64:
        described["transformer_heads"] = str(config.transformer_heads)
    if config.eos_token_id is not None:
        described["eos_token_id"] = str(config.eos_token_id)
    if preprocessing != Preprocessing() or config.text_tower == "bert":
        described["preprocessing"] = json.dumps(preprocessing._asdict())
    return described


def preprocessing_of(described: Any, source: str) -> Preprocessing:
    """The preprocessing in a JSON object that `Preprocessing._asdict` made.

    Raises:
        CheckpointError: if it is none.
    """
    sheet = _Sheet("its preprocessing", source)
    found = _open_clip_preprocessing(sheet, described, None)
    sheet.close()
    return found


class _Sheet:
    """A file of settings, which collects those that are not computed here and those that are not known."""

    def __init__(self, file: str, source: str):
        self.file = file
        self.source = source
        self.wrong: list[str] = []
        self.unknown: list[str] = []

    def section(self, name: str, content: Any, expected: Expected, harmless: Container[str]) -> dict[str, Any]:
        """The settings that a section gives; null stands for the default."""
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{self.source}: {self.file} cannot be used: {name.rstrip('.') or 'it'} is not a JSON object"
            )
        given = {key: value for key, value in content.items() if value is not None}
        for key, value in given.items():
            if key in expected:
                self.require(f"{name}{key}", value, value in expected[key], expected[key])
            elif key not in harmless:
                self.unknown.append(f"{name}{key}")
        return given

    def require(self, name: str, value: Any, fits: bool, expected: Any) -> None:
        """Notes a setting that does not fit."""
        if not fits:
            if isinstance(expected, tuple):
                expected = " or ".join(map(str, expected[:2])) or "none"
            words = _WORDS.get(name.rpartition(".")[2])
            self.wrong.append(f"{name} is {brief(value)}, expected {expected}{f' ({words})' if words else ''}")

    def three(self, name: str, value: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Three numbers, of red, green and blue; one stands for all."""
        numbers = value if isinstance(value, (list, tuple)) else [value] * 3
        fits = len(numbers) == 3 and all(type(number) in (int, float) and abs(number) < 1e30 for number in numbers)
        if not fits or (default == STD and not all(numbers)):
            self.require(name, value, False, "three numbers" + (" that are not 0" if default == STD else ""))
            return default
        red, green, blue = map(float, numbers)
        return red, green, blue

    def part(self, name: str, value: Any, width: int) -> Optional[int]:
        """A number of heads, or their width, that divides a tower's width; None where there is no such tower."""
        fits = type(value) is int and value > 0 and width % value == 0
        self.require(name, value, fits or not width, f"a number that divides the width {width}")
        return value if fits and width else None

    def close(self) -> None:
        """Raises CheckpointError for what is not computed here, and warns of what is not known."""
        if self.wrong:
            shown = "; ".join(self.wrong[:_SHOWN])
            more = f"; and {len(self.wrong) - _SHOWN} more" if len(self.wrong) > _SHOWN else ""
            raise CheckpointError(
                f"{self.source}: {self.file} asks for what is not computed here, or does not fit the weights: "
                f"{shown}{more}. Such a model is no CLIP of OpenAI's form; where the file is wrong, mend it"
            )
        if self.unknown:
            warnings.warn(
                f"{self.source}: {self.file} has settings that are not known here: {listed(self.unknown)}. They are "
                "ignored; if one of them changes what the model computes, results are wrong",
                stacklevel=2,
            )


def _in_metadata(metadata: Mapping[str, Any], config: CLIPConfig, source: str) -> Settings:
    """The settings in the metadata of a file that this package wrote."""
    sheet = _Sheet("its metadata", source)
    activation, eos, pictures = (
        metadata["activation"],
        metadata.get("eos_token_id"),
        default_preprocessing(config.text_tower),
    )
    sheet.require("activation", activation, activation in ACTIVATIONS, ACTIVATIONS)
    fits = eos is None or (str(eos).isdecimal() and len(str(eos)) < 10 and int(eos) < config.vocab_size)
    sheet.require("eos_token_id", eos, fits, f"an id below {config.vocab_size}")
    if "preprocessing" in metadata:
        try:
            pictures = _open_clip_preprocessing(sheet, json.loads(metadata["preprocessing"]), None)
        except (RecursionError, TypeError, ValueError):
            raise CheckpointError(f"{source} is damaged: the preprocessing in its metadata cannot be read") from None
    parts = {"vision_head_width": _pooled_width(config), "transformer_heads": config.transformer_width}
    heads = {
        name: sheet.part(name, int(value) if str(value).isdecimal() and len(str(value)) < 10 else value, parts[name])
        for name, value in metadata.items()
        if name in parts
    }
    sheet.close()
    return Settings(activation, "the file's metadata", False, None if eos is None else int(eos), pictures, **heads)


def _beside(checkpoint: Checkpoint, config: CLIPConfig, dialect: str, source: str) -> Settings:
    """The settings in the files of Hugging Face or open_clip beside a checkpoint."""
    told = Settings()
    places = [("config.json", _hugging_face), ("open_clip_config.json", _open_clip)]
    own, other = places if dialect in _WITH_CONFIG else places[::-1]
    for file, read in (own, other):
        described = checkpoint.neighbour(file)
        if described is None:
            continue
        if file == other[0] and described.get("model_type") != "clip" and "model_cfg" not in described:
            continue  # it tells of something else
        sheet = _Sheet(file, source)
        told = read(sheet, described, config)._replace(told_by=f"the {file} beside it")
        sheet.close()
        break
    _check_tokenizer(checkpoint, config, source)
    return told._replace(preprocessing=_preprocessing_beside(checkpoint, config, dialect, source))


def _preprocessing_beside(checkpoint: Checkpoint, config: CLIPConfig, dialect: str, source: str) -> Preprocessing:
    """What the first of the files beside a checkpoint that tells it says: those of its own program come first."""
    places = [
        ("processor_config.json", "image_processor", _hugging_face_preprocessing),
        ("preprocessor_config.json", "", _hugging_face_preprocessing),
        ("open_clip_config.json", "preprocess_cfg", _open_clip_preprocessing),
    ]
    for file, section, read in places if dialect in _WITH_CONFIG else places[::-1]:
        described = checkpoint.neighbour(file)
        content = described.get(section) if described is not None and section else described
        if content is not None:
            sheet = _Sheet(file, source)
            found = read(sheet, content, config.image_resolution)
            sheet.close()
            return found
    return default_preprocessing(config.text_tower)


def _check_tokenizer(checkpoint: Checkpoint, config: CLIPConfig, source: str) -> None:
    """Checks that the tokenizer beside a checkpoint is the one of this package."""
    described = checkpoint.neighbour("tokenizer_config.json")
    if described is not None and config.transformer_width:
        sheet = _Sheet("tokenizer_config.json", source)
        expected = _BERT_TOKENIZER if config.text_tower == "bert" else _CLIP_TOKENIZER
        added = sheet.section("", described, expected, _TOKENIZER).get("added_tokens_decoder", {})
        for token in added.values() if isinstance(added, dict) else ():
            content = token.get("content") if isinstance(token, dict) else token
            if content not in _SPECIAL_TOKENS:
                sheet.unknown.append(f"the added token {brief(content)}")
        sheet.close()


def _pooled_width(config: CLIPConfig) -> int:
    """The width that the heads of the image tower share: the vision transformer's, or that of a ResNet's pool."""
    return config.vision_width if config.is_vit else config.vision_width * 32


def _head_width(heads: Optional[int], told: Settings, config: CLIPConfig, is_openais: bool, source: str) -> int:
    """The width of the image tower's heads: as the caller says, as told, by a published model of its sizes, or 64."""
    width = _pooled_width(config)
    if heads is not None:
        if not isinstance(heads, (int, np.integer)) or heads < 1 or width % heads:
            raise ValueError(f"heads is {heads!r}, and the image tower is {width} wide; give a number that divides it")
        return width // int(heads)
    if told.vision_head_width is not None:
        return told.vision_head_width
    published = preset_of(config)
    if published:
        return published.config.vision_head_width
    # Shapes do not tell the heads. Those of transformers wider than OpenAI's are not 64 wide in open_clip's models.
    if is_openais or not width or (width % 64 == 0 and (not config.is_vit or width <= _OPENAI_WIDEST)):
        return 64
    raise CheckpointError(
        f"{source} does not tell how many heads its image tower has, which is {width} wide: give them, such as "
        "heads=16 (ViT-H, ViT-g and ViT-bigG of open_clip), or put the model's config.json or open_clip_config.json "
        "beside it"
    )


def _square(side: Optional[int]) -> Container[Any]:
    return (side, [side, side])


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _hugging_face(sheet: _Sheet, described: dict[str, Any], config: CLIPConfig) -> Settings:
    """The activation, the end-of-text and the heads of a config.json."""
    is_chinese = config.text_tower == "bert" or str(described.get("model_type")).startswith("chinese_clip")
    kind = "chinese_clip" if is_chinese else "clip"
    kinds = {tower: (f"{kind}_{tower}_model",) for tower in ("text", "vision")}
    alone = next((tower for tower, names in kinds.items() if described.get("model_type") in names), None)
    if alone:  # one tower, whose settings are not in a section
        towers = {alone: described}
    else:
        expected = {"model_type": (kind,), "projection_dim": (config.embed_dim,), **_NONE}
        given = sheet.section("", described, expected, _HUGGING_FACE)
        # In files that have both, transformers takes the second alone.
        towers = {tower: given.get(f"{tower}_config_dict", given.get(f"{tower}_config", {})) for tower in kinds}
    defaults = {"text": 12 if is_chinese else 8, "vision": 12}  # transformers'
    heads = {"text": 0, "vision": 0}
    widths = {"text": config.transformer_width, "vision": config.vision_width}
    found = {}
    for tower, content in towers.items():
        name = "" if alone else f"{tower}_config."
        expected = {
            "model_type": kinds[tower],
            "layer_norm_eps": (1e-5,),
            **_NONE,
            **_hugging_face_sizes(tower, config),
            **(_BERT if is_chinese and tower == "text" else {}),
        }
        given = sheet.section(name, content, expected, _TOWER)
        number = given.get("num_attention_heads", defaults[tower])
        heads[tower] = sheet.part(f"{name}num_attention_heads", number, widths[tower]) or 0
        found[tower] = given
    if is_chinese:
        given = found.pop("text", {})  # BERT's activation is the exact GELU, which _BERT requires
        if not found:
            return Settings("quickgelu", transformer_heads=heads["text"] or None)
    acts = sorted({brief(given.get("hidden_act", "quick_gelu")) for given in found.values()})
    activations = {"quick_gelu": "quickgelu", "gelu": "gelu"}
    if len(acts) > 1 or acts[0] not in activations:
        raise CheckpointError(
            f"{sheet.source}: {sheet.file} has the activations {acts}; expected quick_gelu or gelu, one in both towers"
        )
    return Settings(
        activations[acts[0]],
        eos_token_id=_end_of_text(sheet, found["text"], config) if "text" in found else None,
        vision_head_width=config.vision_width // heads["vision"] if heads["vision"] else None,
        transformer_heads=heads["text"] or None,
    )


def _hugging_face_sizes(tower: str, config: CLIPConfig) -> Expected:
    width = config.transformer_width if tower == "text" else config.vision_width
    mlp_width = config.transformer_mlp_width if tower == "text" else config.vision_mlp_width
    sizes: dict[str, Container[Any]] = {"hidden_size": (width,), "intermediate_size": (mlp_width or 4 * width,)}
    if tower == "text":
        return {
            **sizes,
            "num_hidden_layers": (config.transformer_layers,),
            "vocab_size": (config.vocab_size,),
            "max_position_embeddings": (config.text_positions or config.context_length,),
        }
    return {
        **sizes,
        "num_hidden_layers": (config.vision_layers,),
        "image_size": _square(config.image_resolution),
        "patch_size": _square(config.vision_patch_size),
        "num_channels": (3,),
    }


def _end_of_text(sheet: _Sheet, text: dict[str, Any], config: CLIPConfig) -> Optional[int]:
    """The id whose first place is read, or None for the highest id of a text, which the last id of all is too."""
    eos = text.get("eos_token_id", _EOS)
    fits = type(eos) is int and eos >= 0
    sheet.require("text_config.eos_token_id", eos, fits, "the id of a token")
    if not fits or eos in (_LEGACY_EOS, config.vocab_size - 1):
        return None
    if eos < config.vocab_size:
        return int(eos)
    if "eos_token_id" in text:
        warnings.warn(
            f"{sheet.source}: {sheet.file} has the eos_token_id {eos}, which is no token of a vocabulary of "
            f"{config.vocab_size}: features of texts are read at their highest id",
            stacklevel=2,
        )
    return None


def _hugging_face_preprocessing(sheet: _Sheet, content: Any, size: int) -> Preprocessing:
    """The preprocessing of a preprocessor_config.json."""
    squash, square = {"height": size, "width": size}, {"shortest_edge": size}
    if isinstance(content, dict) and isinstance(content.get("size"), dict):
        content = {**content, "size": {key: side for key, side in content["size"].items() if side is not None}}
    expected: dict[str, Container[Any]] = {
        "crop_size": (size, squash),
        "default_to_square": (False,),
        "do_flip_channel_order": (False,),
        "do_pad": (False,),
        "do_rescale": (True,),
        "do_resize": (True,),
        "feature_extractor_type": _PROCESSORS,
        "image_processor_type": _PROCESSORS,
        "resample": (2, 3),  # PIL's numbers
        "size": (size, square, squash),
        "use_square_size": (False,),
    }
    if isinstance(content, dict) and content.get("do_center_crop") is False:
        del expected["crop_size"]
        expected["size"] = (squash,)
    given = sheet.section("", content, expected, _PROCESSOR)
    factor = given.get("rescale_factor", 1 / 255)
    fits = isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    sheet.require("rescale_factor", factor, fits, "1/255")
    normalize = given.get("do_normalize", True)
    return Preprocessing(
        sheet.three("image_mean", given.get("image_mean", MEAN), MEAN) if normalize else (0.0, 0.0, 0.0),
        sheet.three("image_std", given.get("image_std", STD), STD) if normalize else (1.0, 1.0, 1.0),
        "bilinear" if given.get("resample") == 2 else "bicubic",
        "squash" if given.get("size") == squash else "shortest",
    )


# ----------------------------------------------------------------------------------------------------------- open_clip


def _open_clip(sheet: _Sheet, described: dict[str, Any], config: CLIPConfig) -> Settings:
    """The activation, the end-of-text and the heads of an open_clip_config.json."""
    sheet.section("", described, {}, {"model_cfg", "preprocess_cfg"})
    expected: Expected = {
        "embed_dim": (config.embed_dim,),
        "init_logit_bias": (),
        "multimodal_cfg": (),
        "quick_gelu": (True, False),
    }
    model = sheet.section("model_cfg.", described.get("model_cfg"), expected, {*_OPEN_CLIP, "vision_cfg"})
    layers = config.vision_layers
    expected = {
        **_BLOCK,
        "attentional_pool": (False,),
        "global_average_pool": (False,),
        "image_size": _square(config.image_resolution),
        "input_patchnorm": (False,),
        "layers": (layers if isinstance(layers, int) else list(layers),),
        "no_ln_pre": (False,),
        "pool_type": ("tok",),
        "pos_embed_type": ("learnable",),
        "timm_model_name": ("",),
        "width": (config.vision_width,),
    }
    if config.is_vit:
        expected["patch_size"] = _square(config.vision_patch_size)
    harmless = {*_OPEN_CLIP_TOWER, "head_width", "mlp_ratio", "patch_size"}
    vision = sheet.section("vision_cfg.", model.get("vision_cfg", {}), expected, harmless)
    _require_mlp(sheet, "vision_cfg.", vision, config.vision_width, config.vision_mlp_width)
    head_width = sheet.part("vision_cfg.head_width", vision.get("head_width", 64), _pooled_width(config))
    eos, heads = _open_clip_text(sheet, model.get("text_cfg", {}), config)
    activation = "quickgelu" if model.get("quick_gelu", False) else "gelu"
    return Settings(activation, eos_token_id=eos, vision_head_width=head_width, transformer_heads=heads)


def _require_mlp(sheet: _Sheet, name: str, given: dict[str, Any], width: int, mlp_width: Optional[int]) -> None:
    """Notes a ratio of the MLPs' hidden width to the width that the weights do not have."""
    ratio, expected = given.get("mlp_ratio", 4), (mlp_width or 4 * width)
    fits = type(ratio) in (int, float) and math.isfinite(ratio) and int(width * ratio) == expected
    sheet.require(f"{name}mlp_ratio", ratio, fits or not width, f"{expected / max(width, 1):.5g}")


def _open_clip_text(sheet: _Sheet, content: Any, config: CLIPConfig) -> tuple[Optional[int], Optional[int]]:
    """Checks the text tower's settings and returns its end-of-text, see `CLIPConfig`, and its heads."""
    expected: Expected = {
        **_BLOCK,
        "context_length": (config.context_length,),
        "embed_cls": (False,),
        "hf_model_name": ("",),
        "layers": (config.transformer_layers,),
        "no_causal_mask": (False,),
        "pool_type": ("argmax", "eos"),
        "proj_bias": (False,),
        "proj_type": ("linear",),
        "tokenizer_kwargs": ({}, {"clean": "lower"}),
        "tokenizer_mode": ("",),
        "vocab_size": (config.vocab_size,),
        "width": (config.transformer_width,),
    }
    text = sheet.section("text_cfg.", content, expected, {*_OPEN_CLIP_TOWER, "heads", "mlp_ratio"})
    _require_mlp(sheet, "text_cfg.", text, config.transformer_width, config.transformer_mlp_width)
    heads = sheet.part("text_cfg.heads", text.get("heads", 8), config.transformer_width)
    # Repositories that hold OpenAI's tokenizer themselves are named for CLIP, and have its vocabulary.
    name = text.get("hf_tokenizer_name", "")
    fits = not name or ("clip" in str(name).lower() and config.vocab_size == _EOS + 1)
    sheet.require("text_cfg.hf_tokenizer_name", name, fits, "none")
    if text.get("pool_type") != "eos":
        return None, heads
    eos = text.get("eos_id", 2)
    sheet.require("text_cfg.eos_id", eos, type(eos) is int and 0 <= eos < config.vocab_size, "the id of a token")
    return None if eos == config.vocab_size - 1 else eos, heads


def _open_clip_preprocessing(sheet: _Sheet, content: Any, size: Optional[int]) -> Preprocessing:
    """The preprocessing of a preprocess_cfg; `size` is None where the section has none."""
    expected: dict[str, Container[Any]] = {
        "fill_color": range(256),
        "interpolation": (*INTERPOLATIONS, "random"),  # which is of training, and bicubic otherwise
        "mode": ("RGB",),
        "resize_mode": RESIZE_MODES,
    }
    if size:
        expected["size"] = _square(size)
    name = "preprocess_cfg." if size else ""
    given = sheet.section(name, content, expected, ("mean", "std"))
    return Preprocessing(
        sheet.three(f"{name}mean", given.get("mean", MEAN), MEAN),
        sheet.three(f"{name}std", given.get("std", STD), STD),
        "bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        given.get("resize_mode", RESIZE_MODES[0]),
        given.get("fill_color", 0),
    )
