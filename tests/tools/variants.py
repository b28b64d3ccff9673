"""Small models with every part of the published ones. No two sizes that could be confused are equal. Their states."""

import numpy as np

from paddle_clip.presets import CLIPConfig

RESNET = CLIPConfig(96, 96, (2, 1, 3, 2), 16, None, 128, 2, 3, 16, 300)
VIT = CLIPConfig(64, 48, 3, 128, 16, 192, 3, 2, 12, 200)
VARIANTS = {"resnet": RESNET, "vit": VIT}

_BERT = {"context_length": 52, "vocab_size": 150, "text_tower": "bert", "text_positions": 60}
OTHERS = {
    "chinese_vit": CLIPConfig(64, 48, 2, 128, 16, 192, 3, 3, transformer_mlp_width=320, **_BERT),
    "chinese_resnet": CLIPConfig(96, 96, (1, 1, 2, 1), 16, None, 128, 2, 2, **_BERT),
    "wide": CLIPConfig(48, 48, 2, 160, 16, 192, 3, 2, 12, 200, "gelu", None, 32, 352),  # as open_clip's ViT-g
}

# The smallest there can be, for fuzzing.
TINY = {
    "tiny_resnet": CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 1, 4, 20),
    "tiny_vit": CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1, 4, 20),
}

SMALL = CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1, 12)  # for training on texts, with the full vocabulary


def state_of(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
