"""What pre-training a ViT-B/32 and embedding five billion pictures take, by formulas: the figures of docs/scale.md.

python benchmarks/scale.py

Nothing is measured here but what the constants say. Change them to those of your machines.
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddle_clip.presets import PRESETS

CONFIG = next(preset for preset in PRESETS if preset.name == "ViT-B/32").config
PARAMETERS = 151_277_313
BATCH, EPOCHS, PAIRS = 32_768, 32, 400_000_000  # the paper's, section 2.5
PICTURES = 5_000_000_000
FLOAT = 4  # bytes

# Assumed.
GPU_FLOPS = 312e12 * 0.35  # an A100 in bfloat16, and the part of it that trainings of this size reach
GPU_FAILURES = 419 / (54 * 24 * 16_384)  # in an hour, of one GPU: Llama 3's training (arXiv:2407.21783, section 3.3.4)
DISK = 0.5e9  # bytes a second, to write a checkpoint
RESTART = 300  # seconds
PAIR_BYTES, PATH_BYTES = 40_000, 100  # of a picture of 256 pixels as JPEG with its caption; of a path
# Measured: docs/speed.md, OpenVINO in float32 on two cores, batches of 32.
IMAGES_OF_CORE = 24.7 / 2


def transformer(tokens: int, width: int, layers: int) -> float:
    """FLOPs of the products of one sequence: 12 width² weights a layer and token, and attention."""
    return 2 * layers * tokens * (12 * width**2 + 2 * tokens * width)


def image_flops() -> float:
    patches = (CONFIG.image_resolution // CONFIG.vision_patch_size) ** 2
    embedding = 2 * patches * 3 * CONFIG.vision_patch_size**2 * CONFIG.vision_width
    return embedding + transformer(patches + 1, CONFIG.vision_width, CONFIG.vision_layers)


def text_flops() -> float:
    return transformer(CONFIG.context_length, CONFIG.transformer_width, CONFIG.transformer_layers)


def loss_flops(batch: int) -> float:
    """Forward and backward: every process computes the whole matrix of cosines."""
    return 3 * 2 * batch**2 * CONFIG.embed_dim


def gathered(ranks: int, batch: int, embed_dim: int = CONFIG.embed_dim) -> float:
    """Bytes of features that a process receives in a step: those of all others, of both towers."""
    return 2 * batch * (ranks - 1) / ranks * embed_dim * FLOAT


def reduced(ranks: int, parameters: int = PARAMETERS) -> float:
    """Bytes of gradients that a process sends in a step, around a ring."""
    return 2 * (ranks - 1) / ranks * parameters * FLOAT


def state(parameters: int = PARAMETERS) -> int:
    """Bytes of weights, gradients, and AdamW's two moments."""
    return 4 * parameters * FLOAT


def activations() -> float:
    """Bytes that a pair keeps for its gradients in half precision (Korthikanti et al. 2022, arXiv:2205.05198)."""

    def kept(tokens: int, width: int, layers: int, heads: int) -> float:
        return layers * tokens * width * (34 + 5 * heads * tokens / width)

    patches = (CONFIG.image_resolution // CONFIG.vision_patch_size) ** 2
    image = kept(patches + 1, CONFIG.vision_width, CONFIG.vision_layers, CONFIG.vision_width // 64)
    return image + kept(
        CONFIG.context_length, CONFIG.transformer_width, CONFIG.transformer_layers, CONFIG.transformer_heads
    )


def interval(ranks: int) -> float:
    """Seconds between checkpoints that lose the least (Young 1974): √(2 · cost of one · time between failures)."""
    return math.sqrt(2 * checkpoint() / DISK * 3600 / (GPU_FAILURES * ranks))


def checkpoint() -> int:
    """Bytes of the weights and both moments."""
    return 3 * PARAMETERS * FLOAT


def lost(ranks: int) -> float:
    """Part of the time that checkpoints, repeated work and restarts take."""
    seconds, failures = interval(ranks), GPU_FAILURES * ranks / 3600
    return checkpoint() / DISK / seconds + failures * (seconds / 2 + RESTART)


def main() -> None:
    pair = image_flops() + text_flops()
    steps = EPOCHS * (PAIRS // BATCH)
    print(f"an image {image_flops() / 1e9:.2f} GFLOPs, a text of 77 tokens {text_flops() / 1e9:.2f} GFLOPs, forward")
    print(f"steps {steps:,}; pairs {steps * BATCH:.3g}")
    for name, passes in (("one part a step", 3), ("accumulate", 4)):
        towers = steps * BATCH * pair * passes
        print(f"towers, {name}: {towers:.3g} FLOPs, {towers / GPU_FLOPS / 3600:,.0f} GPU hours")
    print(f"loss of a step, on every process: {loss_flops(BATCH) / 1e12:.1f} TFLOPs")
    print(f"one matrix of the loss [{BATCH}, {BATCH}]: {BATCH**2 * FLOAT / 1e9:.1f} GB")
    print(f"weights, gradients, moments: {state() / 1e9:.2f} GB; checkpoint {checkpoint() / 1e9:.2f} GB")
    print(f"activations of a pair: {activations() / 1e6:.0f} MB, of 512 pairs {512 * activations() / 1e9:.0f} GB")
    print(f"all features of a step: {2 * BATCH * CONFIG.embed_dim * FLOAT / 1e6:.0f} MB")
    print(f"pairs on disk: {PAIRS * PAIR_BYTES / 1e12:.0f} TB; one order of an epoch {PAIRS * 8 / 1e9:.1f} GB")
    print("ranks, gathered MB, reduced MB, computing s a step, network GB/s if as long, days, checkpoint min, lost %")
    for ranks in (2, 8, 64, 256):
        computing = (3 * BATCH / ranks * pair + loss_flops(BATCH)) / GPU_FLOPS
        wire = gathered(ranks, BATCH) + reduced(ranks)
        print(
            f"{ranks}, {gathered(ranks, BATCH) / 1e6:.0f}, {reduced(ranks) / 1e6:.0f}, {computing:.2f}, "
            f"{wire / computing / 1e9:.2f}, {steps * computing / 86400:.1f}, {interval(ranks) / 60:.0f}, "
            f"{100 * lost(ranks):.2f}"
        )
    flops = PICTURES * image_flops()
    print(f"embedding: {flops:.3g} FLOPs, {flops / GPU_FLOPS / 3600:,.0f} GPU hours")
    years = PICTURES / IMAGES_OF_CORE / 86400 / 365
    print(f"or {years:.1f} core years: {years * 365 / 1000:.1f} days on 1,000 cores")
    row = CONFIG.embed_dim * FLOAT
    print(f"features {PICTURES * row / 1e12:.1f} TB, paths {PICTURES * PATH_BYTES / 1e12:.1f} TB")
    print(f"a shard of 10,000: {10_000 / IMAGES_OF_CORE / 60:.0f} core minutes, {10_000 * row / 1e6:.0f} MB")
    print(f"shards: {PICTURES // 10_000:,}; pictures {PICTURES * PAIR_BYTES / 1e12:.0f} TB")


if __name__ == "__main__":
    main()
