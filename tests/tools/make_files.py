"""Writes the checkpoints the tests read, with PyTorch and OpenAI's code, in a process of its own."""

import os
import pickle
import sys
import zipfile

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert"), HERE]

import numpy as np

import reference
from paddle_clip.presets import PRESETS
from variants import OTHERS, TINY, VARIANTS


class Evil:
    """A pickle that would run a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def main(folder):
    os.chdir(folder)
    for name, config in {**VARIANTS, **TINY}.items():
        model = reference.random_model(config)
        torch.save(model.state_dict(), f"{name}_state_dict.pt")
        np.savez(f"{name}.npz", **{key: tensor.numpy() for key, tensor in model.state_dict().items()})
        reference.save_archive(model, f"{name}.pt")

    for name, config in OTHERS.items():
        reference.save_state_dict(reference.random_model(config), f"{name}.pt")

    # Storages: one shared by three tensors, views with strides and offsets, all dtypes.
    base = torch.randn(6, 8)
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "part": base[1:4, 2:7:2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(3, 5).half(),
        "double": torch.randn(3, 5, dtype=torch.float64),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "int64": torch.tensor([2**40, -1]),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "nested": {"list": [torch.ones(2), "text", None, 1.5]},
        "on_gpu": torch.randn(4),
    }
    torch.save(tensors, "tensors.pt")
    rename_location("tensors.pt")
    tensors["bfloat16"] = tensors["bfloat16"].float()
    nested = tensors.pop("nested")
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    np.savez("tensors.npz", **arrays, **{"nested.list.0": nested["list"][0].numpy()})

    state = torch.load("vit_state_dict.pt")
    torch.save(state, "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.load("tiny_vit_state_dict.pt"), "tiny_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"weights": Evil("touch executed")}, "evil.pt")
    with open("evil.pdparams", "wb") as file:
        pickle.dump({"weights": Evil("touch executed")}, file, protocol=4)

    # Names and shapes of OpenAI's models at full size.
    code = reference.openai("model")
    with torch.device("meta"):
        for row in PRESETS:
            shapes = {name: list(t.shape) for name, t in code.CLIP(**reference.sizes(row.config)).state_dict().items()}
            with open(f"{row.file}.shapes", "w") as file:
                file.writelines(f"{name} {' '.join(map(str, shape))}\n" for name, shape in shapes.items())

    # OpenAI's initialisation: mean, standard deviation and largest value of each parameter.
    for file in ("RN50.pt", "ViT-B-32.pt"):
        config = next(row.config for row in PRESETS if row.file == file)
        torch.manual_seed(0)
        parameters = code.CLIP(**reference.sizes(config)).named_parameters()
        statistics = {
            name: [p.mean().item(), p.std(correction=0).item(), p.abs().max().item()] for name, p in parameters
        }
        np.savez(f"{file}.init.npz", **statistics)


def rename_location(path):
    """Marks the storages of a torch zip as on cuda:0, as OpenAI's are."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(name, content)


if __name__ == "__main__":
    main(sys.argv[1])
