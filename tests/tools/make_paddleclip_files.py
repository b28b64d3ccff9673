"""Writes the small models of make_files.py with paddleclip 1.0.0, and its outputs in float64.

paddleclip installs a top-level package `clip`, as clip-anytorch does, so it is read from a separate folder.
"""

import os
import sys
import types

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert"), HERE]

import numpy as np
import paddle

import parity
from variants import VARIANTS


def main(folder, packages):
    os.chdir(folder)
    package = types.ModuleType("clip")
    package.__path__ = [os.path.join(packages, "clip")]
    sys.modules["clip"] = package
    from clip.model import CLIP

    outputs = {}
    for variant, config in VARIANTS.items():
        paddle.set_default_dtype("float64")  # its mask has the default dtype, and cannot follow the model's
        model = CLIP(
            config.embed_dim,
            config.image_resolution,
            config.vision_layers,
            config.vision_width,
            config.vision_patch_size,
            config.context_length,
            config.vocab_size,
            config.transformer_width,
            config.transformer_heads,
            config.transformer_layers,
        )
        paddle.set_default_dtype("float32")
        model.eval()
        with np.load(f"{variant}.npz") as source:
            state = {name: array.astype(np.float64) for name, array in source.items()}
        for name, tensor in model.state_dict().items():
            tensor.set_value(of_openai(state, name).reshape(tensor.shape))
        paddle.save({n: t.astype("float32") for n, t in model.state_dict().items()}, f"paddleclip_{variant}.pdparams")
        inputs = parity.random_inputs(config)
        with paddle.no_grad():
            outputs[f"paddleclip_{variant}.image"] = model.encode_image(paddle.to_tensor(inputs["images"])).numpy()
            outputs[f"paddleclip_{variant}.text"] = model.encode_text(paddle.to_tensor(inputs["tokens"])).numpy()
    np.savez("paddleclip.npz", **outputs)


def of_openai(state, name):
    """The array of an OpenAI state dict that paddleclip calls `name`, in Paddle's layout."""
    linear = name.endswith(("_proj.weight", "c_fc.weight", "c_proj.weight"))
    openai = name.replace("._mean", ".running_mean").replace("._variance", ".running_var")
    if name.startswith("visual.attnpool.attn"):
        openai = name.replace(".attn.", ".").replace("out_proj", "c_proj")
    for index, letter in enumerate("qkv"):
        if f"attn.{letter}_proj." in name and "attnpool" not in name:
            fused = state[name.replace(f"attn.{letter}_proj.", "attn.in_proj_")]
            third = np.split(fused, 3)[index]
            return third.T if linear else third
    return state[openai].T if linear else state[openai]


if __name__ == "__main__":
    main(*sys.argv[1:])
