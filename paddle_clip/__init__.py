"""OpenAI's CLIP on PaddlePaddle."""

import importlib
import importlib.util
import sys
import warnings
import zlib  # noqa: F401  before Paddle, see ZLIB_IS_BROKEN

__version__ = "0.1.0"

# Public names by the file they live in. They are imported when first used: converting files needs no Paddle.
_PLACES = {
    "deploy": ["Predictor", "compile", "export"],
    "errors": ["CheckpointError"],
    "features": ["Features", "Match", "embed", "load_features", "search"],
    "hub": ["DownloadError", "available_models", "load", "save"],
    "losses": ["ContrastiveLoss"],
    "model": ["CLIP"],
    "pairs": ["read_pairs"],
    "presets": [
        "CLIPConfig",
        "clip_rn50",
        "clip_rn101",
        "clip_rn50x4",
        "clip_rn50x16",
        "clip_rn50x64",
        "clip_vit_b_32",
        "clip_vit_b_16",
        "clip_vit_l_14",
        "clip_vit_l_14_336px",
        "clip_tiny",
    ],
    "probe": ["LinearProbe", "linear_probe"],
    "tokenizer": ["decode", "tokenize"],
    "training": ["finetune"],
    "transforms": ["image_transform"],
    "zeroshot": [
        "IMAGENET_CLASSES",
        "IMAGENET_TEMPLATES",
        "Accuracy",
        "Prediction",
        "available_prompts",
        "classify",
        "encode_texts",
        "evaluate",
        "prompts",
        "zero_shot_classifier",
    ],
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = sorted(_PLACE_OF)

# Paddle 2's library exports a zlib of its own. Loaded before Python's, it takes that one's place, and whatever
# decompresses then crashes the process, Pillow's PNG reader too.
ZLIB_IS_BROKEN = getattr(sys.modules.get("paddle"), "__version__", "").startswith("2.")
if ZLIB_IS_BROKEN:
    warnings.warn(
        "paddle was imported before paddle_clip: Paddle 2 then crashes Pillow on PNG images. Import paddle_clip first",
        RuntimeWarning,
        stacklevel=2,
    )
_NO_PADDLE = importlib.util.find_spec("paddle") is None and (
    "paddle_clip needs PaddlePaddle, which is not installed. On a CPU: pip install paddlepaddle. "
    "On an NVIDIA GPU: pip install paddlepaddle-gpu"
)
if _NO_PADDLE:
    warnings.warn(_NO_PADDLE, RuntimeWarning, stacklevel=2)


def __getattr__(name):
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _NO_PADDLE and name != "CheckpointError":
        raise ImportError(_NO_PADDLE)
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
