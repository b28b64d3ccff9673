"""The published architectures: tables of frozen configs, and a factory function for each of OpenAI's."""

import difflib
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

from .config import ACTIVATIONS, CLIPConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model import CLIP

__all__ = [
    "ACTIVATIONS",
    "CHINESE",
    "OPEN_CLIP",
    "PRESETS",
    "CLIPConfig",
    "Preset",
    "build",
    "clip_cn_rn50",
    "clip_cn_vit_b_16",
    "clip_cn_vit_h_14",
    "clip_cn_vit_l_14",
    "clip_cn_vit_l_14_336",
    "clip_rn50",
    "clip_rn50x4",
    "clip_rn50x16",
    "clip_rn50x64",
    "clip_rn101",
    "clip_tiny",
    "clip_vit_b_16",
    "clip_vit_b_32",
    "clip_vit_l_14",
    "clip_vit_l_14_336px",
    "preset",
    "preset_of",
    "table",
]


@dataclass(frozen=True)
class Preset:
    """A row of the table: an architecture and its published file."""

    name: str  # its publisher's
    file: str  # name of OpenAI's file, "" for another publisher's
    sha256: Optional[str]  # SHA-256 of OpenAI's file
    parameters: int  # number of trainable numbers
    config: CLIPConfig


PRESETS = (
    Preset(
        "RN50",
        "RN50.pt",
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        102_007_137,
        CLIPConfig(1024, 224, (3, 4, 6, 3), 64, None, 512, 8),
    ),
    Preset(
        "RN101",
        "RN101.pt",
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        119_688_033,
        CLIPConfig(512, 224, (3, 4, 23, 3), 64, None, 512, 8),
    ),
    Preset(
        "RN50x4",
        "RN50x4.pt",
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        178_300_601,
        CLIPConfig(640, 288, (4, 6, 10, 6), 80, None, 640, 10),
    ),
    Preset(
        "RN50x16",
        "RN50x16.pt",
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        290_979_217,
        CLIPConfig(768, 384, (6, 8, 18, 8), 96, None, 768, 12),
    ),
    Preset(
        "RN50x64",
        "RN50x64.pt",
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        623_258_305,
        CLIPConfig(1024, 448, (3, 15, 36, 10), 128, None, 1024, 16),
    ),
    Preset(
        "ViT-B/32",
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        151_277_313,
        CLIPConfig(512, 224, 12, 768, 32, 512, 8),
    ),
    Preset(
        "ViT-B/16",
        "ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        149_620_737,
        CLIPConfig(512, 224, 12, 768, 16, 512, 8),
    ),
    Preset(
        "ViT-L/14",
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        427_616_513,
        CLIPConfig(768, 224, 24, 1024, 14, 768, 12),
    ),
    Preset(
        "ViT-L/14@336px",
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        427_944_193,
        CLIPConfig(768, 336, 24, 1024, 14, 768, 12),
    ),
)

# What LAION, DataComp, Apple (DFN) and Meta (MetaCLIP) published in OpenAI's architecture at other sizes, under
# open_clip's names. The sizes are those of its files under open_clip/model_configs.
OPEN_CLIP = (
    Preset("ViT-B-32-256", "", None, 151_288_833, CLIPConfig(512, 256, 12, 768, 32, 512, 8)),
    Preset("ViT-B-16-plus-240", "", None, 208_377_345, CLIPConfig(640, 240, 12, 896, 16, 640, 10)),
    Preset(
        "ViT-H-14",
        "",
        None,
        986_109_441,
        CLIPConfig(1024, 224, 32, 1280, 14, 1024, 16, 24, vision_head_width=80),
    ),
    Preset(
        "ViT-H-14-378",
        "",
        None,
        986_714_881,
        CLIPConfig(1024, 378, 32, 1280, 14, 1024, 16, 24, vision_head_width=80),
    ),
    Preset(
        "ViT-g-14",
        "",
        None,
        1_366_678_273,
        CLIPConfig(1024, 224, 40, 1408, 14, 1024, 16, 24, vision_head_width=88, vision_mlp_width=6144),
    ),
    Preset(
        "ViT-bigG-14",
        "",
        None,
        2_539_567_105,
        CLIPConfig(1280, 224, 48, 1664, 14, 1280, 20, 32, vision_head_width=104, vision_mlp_width=8192),
    ),
)

_BERT: dict[str, Any] = {"vocab_size": 21128, "context_length": 52, "text_tower": "bert", "text_positions": 512}

# Chinese-CLIP's, by the names of cn_clip's files, and with the sizes of its files under cn_clip/clip/model_configs.
CHINESE = (
    Preset(
        "clip_cn_rn50",
        "",
        None,
        76_989_537,
        CLIPConfig(1024, 224, (3, 4, 6, 3), 64, None, 768, 12, 3, **_BERT),
    ),
    Preset("clip_cn_vit-b-16", "", None, 188_262_913, CLIPConfig(512, 224, 12, 768, 16, 768, 12, **_BERT)),
    Preset("clip_cn_vit-l-14", "", None, 406_233_089, CLIPConfig(768, 224, 24, 1024, 14, 768, 12, **_BERT)),
    Preset("clip_cn_vit-l-14-336", "", None, 406_560_769, CLIPConfig(768, 336, 24, 1024, 14, 768, 12, **_BERT)),
    Preset(
        "clip_cn_vit-h-14",
        "",
        None,
        957_598_209,
        CLIPConfig(1024, 224, 32, 1280, 14, 1024, 16, 24, vision_head_width=80, **_BERT),
    ),
)

# Words in open_clip's and Hugging Face's names of OpenAI's models, and what stands there in OpenAI's.
_OTHER_WORDS = {"openai/clip-": "", "-quickgelu": "", "base-patch": "b", "large-patch": "l", "px": ""}

# The model in the package, which examples/train_tiny.py trained on pictures of coloured shapes.
TINY = Preset("tiny", "clip_tiny.pt", None, 3_886_911, CLIPConfig(64, 64, (2, 2, 2, 1), 10, None, 64, 1, 3))

# The same image tower beside a small BERT, which examples/train_tiny_cn.py trained on Chinese captions.
TINY_CN = Preset(
    "tiny_cn",
    "clip_tiny_cn.pt",
    None,
    2_075_519,
    CLIPConfig(64, 64, (2, 2, 2, 1), 10, None, 64, 1, 3, 52, 21128, text_tower="bert"),
)


def preset(name: str) -> Preset:
    """The row for a model's name: OpenAI's, such as "RN50", open_clip's, such as "ViT-H-14", or Chinese-CLIP's.

    OpenAI's models may be called as others call them: "vit-b/32", "ViT-B-32", "openai/clip-vit-base-patch32".

    Raises:
        ValueError: if there is no such model; the message lists the known ones.
    """
    rows = {_letters(row.name): row for row in (*PRESETS, *OPEN_CLIP, *CHINESE, TINY, TINY_CN)}
    if _letters(name) in rows:
        return rows[_letters(name)]
    nearest = difflib.get_close_matches(_letters(name), rows, 1)
    hint = f"did you mean {rows[nearest[0]].name}? " if nearest else ""
    raise ValueError(f"no model is called {name!r}; {hint}available: {', '.join(row.name for row in rows.values())}")


def _letters(name: str) -> str:
    """What the names of one model have in common: small letters and digits, without what others add."""
    name = name.lower()
    for theirs, ours in _OTHER_WORDS.items():
        name = name.replace(theirs, ours)
    return re.sub("[^a-z0-9]", "", name)


def preset_of(config: CLIPConfig) -> Optional[Preset]:
    """The row of the sizes that the shapes of `config`'s weights tell, or None: whatever its activation and heads."""
    rows = (*PRESETS, *OPEN_CLIP, *CHINESE, TINY, TINY_CN)
    return next((row for row in rows if _shape_sizes(row.config) == _shape_sizes(config)), None)


def _shape_sizes(config: CLIPConfig) -> CLIPConfig:
    """A config without what the shapes of weights do not tell."""
    heads = config.transformer_width // 64
    return replace(config, activation=ACTIVATIONS[0], eos_token_id=None, vision_head_width=64, transformer_heads=heads)


def build(config: CLIPConfig) -> "CLIP":
    """A `CLIP` of the given sizes with random weights, in train mode."""
    from .bert import ChineseCLIP  # imported here: reading the table and converting files need no Paddle
    from .model import CLIP

    arguments = asdict(config)
    return ChineseCLIP(**arguments) if arguments.pop("text_tower") == "bert" else CLIP(**arguments)


def clip_rn50() -> "CLIP":
    """RN50 with random weights: 102 M parameters, 224 px, embedding 1024."""
    return build(preset("RN50").config)


def clip_rn101() -> "CLIP":
    """RN101 with random weights: 120 M parameters, 224 px, embedding 512."""
    return build(preset("RN101").config)


def clip_rn50x4() -> "CLIP":
    """RN50x4 with random weights: 178 M parameters, 288 px, embedding 640."""
    return build(preset("RN50x4").config)


def clip_rn50x16() -> "CLIP":
    """RN50x16 with random weights: 291 M parameters, 384 px, embedding 768."""
    return build(preset("RN50x16").config)


def clip_rn50x64() -> "CLIP":
    """RN50x64 with random weights: 623 M parameters, 448 px, embedding 1024."""
    return build(preset("RN50x64").config)


def clip_vit_b_32() -> "CLIP":
    """ViT-B/32 with random weights: 151 M parameters, 224 px, embedding 512."""
    return build(preset("ViT-B/32").config)


def clip_vit_b_16() -> "CLIP":
    """ViT-B/16 with random weights: 150 M parameters, 224 px, embedding 512."""
    return build(preset("ViT-B/16").config)


def clip_vit_l_14() -> "CLIP":
    """ViT-L/14 with random weights: 428 M parameters, 224 px, embedding 768."""
    return build(preset("ViT-L/14").config)


def clip_vit_l_14_336px() -> "CLIP":
    """ViT-L/14@336px with random weights: 428 M parameters, 336 px, embedding 768."""
    return build(preset("ViT-L/14@336px").config)


def clip_cn_rn50() -> "CLIP":
    """Chinese-CLIP's RN50 with random weights: 77 M parameters, 224 px, embedding 1024."""
    return build(preset("clip_cn_rn50").config)


def clip_cn_vit_b_16() -> "CLIP":
    """Chinese-CLIP's ViT-B/16 with random weights: 188 M parameters, 224 px, embedding 512."""
    return build(preset("clip_cn_vit-b-16").config)


def clip_cn_vit_l_14() -> "CLIP":
    """Chinese-CLIP's ViT-L/14 with random weights: 406 M parameters, 224 px, embedding 768."""
    return build(preset("clip_cn_vit-l-14").config)


def clip_cn_vit_l_14_336() -> "CLIP":
    """Chinese-CLIP's ViT-L/14 for 336 px with random weights: 407 M parameters, embedding 768."""
    return build(preset("clip_cn_vit-l-14-336").config)


def clip_cn_vit_h_14() -> "CLIP":
    """Chinese-CLIP's ViT-H/14 with random weights: 958 M parameters, 224 px, embedding 1024."""
    return build(preset("clip_cn_vit-h-14").config)


def clip_tiny() -> "CLIP":
    """The sizes of `load("tiny")` with random weights: 3.9 M parameters, 64 px, embedding 64."""
    return build(TINY.config)


def table(rows: "Sequence[Preset]" = PRESETS) -> str:
    """Presets as aligned text: name, parameters, resolution in pixels, embedding width, OpenAI's file."""
    lines = [f"{'name':<16}{'parameters':>12}{'resolution':>12}{'embed dim':>11}  file"]
    for row in rows:
        sizes = row.config
        lines.append(
            f"{row.name:<16}{row.parameters:>12,}{sizes.image_resolution:>12}{sizes.embed_dim:>11}  {row.file}"
        )
    return "\n".join(lines)
