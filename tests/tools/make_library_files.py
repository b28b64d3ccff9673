"""Writes the small models of make_files.py with the code of other libraries, and their outputs in float64."""

import os
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert"), HERE]

import numpy as np
from transformers import CLIPConfig, CLIPModel

import parity
import reference
from variants import RESNET, VARIANTS, VIT

open_clip = reference.open_clip()
from open_clip.model import convert_to_custom_text_state_dict


def hugging_face(state, config):
    """CLIPModel with the weights of an OpenAI state dict, copied module by module."""
    towers = {
        "text_config": {
            "hidden_size": config.transformer_width,
            "intermediate_size": 4 * config.transformer_width,
            "num_hidden_layers": config.transformer_layers,
            "num_attention_heads": config.transformer_heads,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "eos_token_id": config.vocab_size - 1,
            "bos_token_id": 0,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_width // 64,
            "image_size": config.image_resolution,
            "patch_size": config.vision_patch_size,
        },
    }
    model = CLIPModel(CLIPConfig(**towers, projection_dim=config.embed_dim)).eval()

    def put(target, name):
        for part in ("weight", "bias"):
            getattr(target, part).copy_(state[f"{name}.{part}"])

    with torch.no_grad():
        for tower, prefix in ((model.text_model, "transformer"), (model.vision_model, "visual.transformer")):
            for index, layer in enumerate(tower.encoder.layers):
                block, attention = f"{prefix}.resblocks.{index}", layer.self_attn
                for part in ("weight", "bias"):
                    thirds = state[f"{block}.attn.in_proj_{part}"].chunk(3)
                    for projection, third in zip((attention.q_proj, attention.k_proj, attention.v_proj), thirds):
                        getattr(projection, part).copy_(third)
                put(attention.out_proj, f"{block}.attn.out_proj")
                put(layer.layer_norm1, f"{block}.ln_1")
                put(layer.mlp.fc1, f"{block}.mlp.c_fc")
                put(layer.mlp.fc2, f"{block}.mlp.c_proj")
                put(layer.layer_norm2, f"{block}.ln_2")
        text, vision = model.text_model, model.vision_model
        text.embeddings.token_embedding.weight.copy_(state["token_embedding.weight"])
        text.embeddings.position_embedding.weight.copy_(state["positional_embedding"])
        put(text.final_layer_norm, "ln_final")
        vision.embeddings.class_embedding.copy_(state["visual.class_embedding"])
        vision.embeddings.patch_embedding.weight.copy_(state["visual.conv1.weight"])
        vision.embeddings.position_embedding.weight.copy_(state["visual.positional_embedding"])
        put(vision.pre_layrnorm, "visual.ln_pre")
        put(vision.post_layernorm, "visual.ln_post")
        model.text_projection.weight.copy_(state["text_projection"].T)
        model.visual_projection.weight.copy_(state["visual.proj"].T)
        model.logit_scale.copy_(state["logit_scale"])
    return model


def open_clip_model(state, config, custom, quick_gelu):
    """open_clip's model of these sizes with the weights of an OpenAI state dict."""
    vision = {"image_size": config.image_resolution, "layers": config.vision_layers, "width": config.vision_width}
    if config.vision_patch_size:
        vision["patch_size"] = config.vision_patch_size
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.transformer_width,
        "heads": config.transformer_heads,
        "layers": config.transformer_layers,
    }
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(config.embed_dim, vision, text, quick_gelu=quick_gelu).eval()
    model.load_state_dict(convert_to_custom_text_state_dict(state) if custom else state)
    return model


def main(folder):
    os.chdir(folder)
    states = {variant: torch.load(f"{variant}_state_dict.pt") for variant in VARIANTS}
    states = {v: {name: t.float() if t.is_floating_point() else t for name, t in s.items()} for v, s in states.items()}
    outputs = {}

    def keep(name, config, model, image, text):
        inputs = parity.random_inputs(config)
        with torch.no_grad():
            model = model.double()
            outputs[f"{name}.image"] = image(model)(torch.from_numpy(inputs["images"])).numpy()
            outputs[f"{name}.text"] = text(model)(torch.from_numpy(inputs["tokens"])).numpy()

    model = hugging_face(states["vit"], VIT)
    model.save_pretrained("hugging_face")
    model.save_pretrained("hugging_face_sharded", max_shard_size="1MB")
    os.makedirs("hugging_face_bin", exist_ok=True)
    torch.save(model.state_dict(), "hugging_face_bin/pytorch_model.bin")
    keep("hugging_face", VIT, model,
         lambda m: lambda x: m.visual_projection(m.vision_model(x).pooler_output),
         lambda m: lambda x: m.text_projection(m.text_model(x).pooler_output))  # fmt: skip

    for variant, config in (("vit", VIT), ("resnet", RESNET)):
        for custom in (False, True):
            for quick_gelu in (False, True):
                model = open_clip_model(states[variant], config, custom, quick_gelu)
                name = f"open_clip_{variant}_{'custom' if custom else 'flat'}_{'quickgelu' if quick_gelu else 'gelu'}"
                torch.save(model.state_dict(), f"{name}.pt")
                keep(name, config, model, lambda m: m.encode_image, lambda m: m.encode_text)

    # A training checkpoint of a wrapped and compiled model, with its optimizer.
    model = open_clip_model(states["vit"], VIT, False, True)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    state = {f"module._orig_mod.{name}": tensor for name, tensor in states["vit"].items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}, "training.pt")
    np.savez("libraries.npz", **outputs)


if __name__ == "__main__":
    main(sys.argv[1])
