"""Small models with every part of the published ones. No two sizes that could be confused are equal."""

from paddle_clip.presets import CLIPConfig

RESNET = CLIPConfig(96, 96, (2, 1, 3, 2), 16, None, 128, 2, 3, 16, 300)
VIT = CLIPConfig(64, 48, 3, 128, 16, 192, 3, 2, 12, 200)
VARIANTS = {"resnet": RESNET, "vit": VIT}

# The smallest there can be, for fuzzing.
TINY = {
    "tiny_resnet": CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 1, 4, 20),
    "tiny_vit": CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1, 4, 20),
}
