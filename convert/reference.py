"""The publishers' own PyTorch code as the reference: checkpoints of their form with random weights, and their outputs.

    python convert/reference.py make RN50 RN50.pt

writes a checkpoint of the form OpenAI publishes (a TorchScript archive, fp16 where theirs is) in which every parameter
and buffer is random. OpenAI's `model.py` is loaded from the installed `clip-anytorch` by its path, since that package
does not import without torchvision: pip install torch; pip install --no-deps clip-anytorch. So is cn_clip's, for models
of Chinese-CLIP (pip install --no-deps cn-clip); models with other heads or MLPs than OpenAI's are open_clip's
(pip install --no-deps open_clip_torch).
"""

import argparse
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import sys
import types
import warnings
import zipfile
from dataclasses import asdict

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import numpy as np
import torch

from paddle_clip.checkpoints import dialects, reading
from paddle_clip.presets import preset
from parity import digest, has_gradient


def located(distribution, path, install):
    """The path of a file of an installed distribution."""
    try:
        return importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"error: {distribution} is not installed: pip install --no-deps {install}") from None


def openai(name):
    """OpenAI's module `name` ("model" or "simple_tokenizer"), loaded by file path."""
    path = located("clip-anytorch", f"clip/{name}.py", "clip-anytorch==2.6.0, and torch, ftfy, regex")
    spec = importlib.util.spec_from_file_location(f"openai_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cn_clip(name):
    """cn_clip's module `name`, such as "model", without its package's own start, which takes torchvision."""
    folder = str(located("cn-clip", "cn_clip", "cn-clip==1.6.0, and six"))
    for package, path in (("cn_clip", folder), ("cn_clip.clip", os.path.join(folder, "clip"))):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [path]
            sys.modules[package]._tokenizer = types.SimpleNamespace(vocab={"[PAD]": 0})
    return importlib.import_module(f"cn_clip.clip.{name}")


class Anything(type):
    """A metaclass whose classes have every attribute."""

    def __getattr__(cls, name):
        return name


class Stub(types.ModuleType):
    """A stand-in for a module of torchvision, which open_clip needs for images only and which has no CPU-only build."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


def open_clip():
    """The package open_clip, without torchvision."""
    located("open_clip_torch", "", "open_clip_torch==3.3.0")
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops.misc"):
        sys.modules[name] = sys.modules.get(name) or Stub(name)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, sys.modules[name])
    return importlib.import_module("open_clip")


def is_openais(config):
    """Whether OpenAI's code can build a model of these sizes: heads of 64, and MLPs four times as wide."""
    heads = config.vision_head_width == 64 and config.transformer_heads == config.transformer_width // 64
    return heads and config.text_tower == "clip" and not (config.vision_mlp_width or config.transformer_mlp_width)


def build(config):
    """The publisher's model of these sizes."""
    if config.text_tower == "bert":
        return _build_chinese(config)
    return openai("model").CLIP(**sizes(config)) if is_openais(config) else build_open(config)


def _build_chinese(config):
    """cn_clip's model."""
    shared = (
        "embed_dim",
        "image_resolution",
        "vision_layers",
        "vision_width",
        "vision_patch_size",
        "vision_head_width",
    )
    return cn_clip("model").CLIP(
        **{name: getattr(config, name) for name in shared},
        vocab_size=config.vocab_size,
        text_attention_probs_dropout_prob=0.0,  # left out here: Paddle-CLIP has no dropout
        text_hidden_act="gelu",
        text_hidden_dropout_prob=0.0,
        text_hidden_size=config.transformer_width,
        text_initializer_range=0.02,
        text_intermediate_size=config.transformer_mlp_width or 4 * config.transformer_width,
        text_max_position_embeddings=config.text_positions or config.context_length,
        text_num_attention_heads=config.transformer_heads,
        text_num_hidden_layers=config.transformer_layers,
        text_type_vocab_size=2,
    )


def build_open(config):
    """open_clip's model."""
    mlp_width = config.vision_mlp_width or 4 * config.vision_width
    vision = {
        "image_size": config.image_resolution,
        "layers": config.vision_layers,
        "width": config.vision_width,
        "patch_size": config.vision_patch_size,
        "head_width": config.vision_head_width,
        "mlp_ratio": (mlp_width + 0.5) / config.vision_width,  # which open_clip rounds down
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.transformer_width,
        "heads": config.transformer_heads,
        "layers": config.transformer_layers,
    }
    quick = config.activation == "quickgelu"
    return open_clip().CLIP(config.embed_dim, vision, text, quick_gelu=quick, output_dict=False)


def sizes(config):
    """A config as arguments of OpenAI's CLIP, which has no others: one activation, one end-of-text, heads of 64."""
    arguments = inspect.signature(openai("model").CLIP).parameters
    return {name: size for name, size in asdict(config).items() if name in arguments}


def random_model(config, seed=0):
    """The publisher's model of these sizes with every parameter and buffer random.

    One of OpenAI's sizes is in the published fp16/fp32 mix.

    A fresh model would hide bugs: its norms are ones and zeros, and each ResNet block ends in a zeroed norm. The scales
    here keep activations of every depth near one, so that each layer shows in the output and no softmax is saturated:
    where it is, the error of the output is that of its closest tie. Residual branches add up, so the deeper the ResNet,
    the smaller they are.
    """
    torch.manual_seed(seed)
    depth = sum(config.vision_layers) if isinstance(config.vision_layers, tuple) else 0  # residual branches of a ResNet
    model = build(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(torch.randint(1, 1000, []))
            elif name == "logit_scale":
                tensor.uniform_(2.5, math.log(100))
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bn3.weight") and "layer" in name:  # the end of a residual branch
                tensor.uniform_(0.1, 0.6).mul_(min(1, 8 / depth))
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:  # biases, running means, the class embedding
                tensor.normal_(0, 0.2)
            elif tensor.ndim == 4:
                tensor.normal_(0, math.sqrt(2 / tensor[0].numel()))
            elif "embedding" in name:
                tensor.normal_(0, 0.3)
    if is_openais(config):
        openai("model").convert_weights(model)
    return model.eval()


def save_archive(model, path):
    """Saves a model in OpenAI's format: a TorchScript archive with three sizes as 0-d int64 buffers.

    The model is traced in float32, as float16 convolutions take minutes on a CPU, and its weights are rounded to the
    published mix afterwards: the tensors have OpenAI's dtypes; the traced program, which nobody runs, is in float32.
    """
    resolution, length = model.visual.input_resolution, model.context_length
    extras = {"input_resolution": resolution, "context_length": length, "vocab_size": model.vocab_size}
    for name, size in extras.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    image, text = torch.zeros(1, 3, resolution, resolution), torch.zeros(1, length, dtype=torch.int64)
    inputs = {"forward": (image, text), "encode_image": image, "encode_text": text}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns about the model's asserts
        traced = torch.jit.trace_module(model.float(), inputs, check_trace=False)
        openai("model").convert_weights(model)
        torch.jit.save(traced, path)


def save_state_dict(model, path):
    """Saves a model as cn_clip publishes its models, or, if it is another's, as open_clip does."""
    state_dict = model.state_dict()
    if any(name.startswith("bert.") for name in state_dict):
        state_dict = {"epoch": 15, "state_dict": {f"module.{name}": tensor for name, tensor in state_dict.items()}}
    torch.save(state_dict, path)


def read(path):
    """The state dict in a TorchScript archive or in a file of `torch.save`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError:
        # Mapped, unless it is of the old form: a large model is not held twice.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state_dict = content.get("state_dict", content)
        return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def load(path, dtype="float32", activation="quickgelu", heads=None):
    """The publisher's model with the weights of a TorchScript archive or state dict, on the CPU, in eval mode.

    For float64, `nn.LayerNorm` replaces its LayerNorm, which computes in float32 whatever its input. For the activation
    "gelu", GELU replaces its QuickGELU, as in open_clip.
    """
    config = dialects.from_checkpoint(reading.read(path), path, activation, heads=heads).config
    if not is_openais(config):
        code = cn_clip("model") if config.text_tower == "bert" else open_clip().transformer
        code.LayerNorm.forward = torch.nn.LayerNorm.forward  # in the dtype of its input
        model = build(config).to(getattr(torch, dtype))
        model.load_state_dict(read(path))
        return model.eval()
    code, state_dict = openai("model"), read(path)
    if activation == "gelu":
        code.QuickGELU.forward = lambda _module, x: torch.nn.functional.gelu(x)
    if dtype == "float64":
        code.LayerNorm.forward = torch.nn.LayerNorm.forward
    # build_model rounds the weights to fp16; loading them once more restores the precision of the file.
    model = code.build_model(dict(state_dict)).to(getattr(torch, dtype))
    model.load_state_dict({name: tensor for name, tensor in state_dict.items() if name in model.state_dict()})
    return model


def run(path):
    """PyTorch's side of `parity.compare`: the outputs of the publisher's model and of the modules named in each run.

    Args:
        path: of the .json file that `parity.compare` writes.
    """
    with open(path) as file:
        job = json.load(file)
    for each in job["runs"]:
        np.savez(each["inputs"] + ".torch", **_outputs(job, each))


def _outputs(job, run):
    """{name: array}, tokens batch first."""
    inputs = np.load(run["inputs"] + ".npz")
    model = load(job["checkpoint"], run["dtype"], job["activation"], job["heads"]).train(run["train"])
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            outputs[name] = output.transpose(0, 1) if "resblocks" in name else output

        return hook

    modules = dict(model.named_modules())
    for name in run["stages"]:
        modules[name].register_forward_hook(keep(name))
    images = torch.from_numpy(inputs["images"]).to(getattr(torch, run["dtype"]))
    tokens = torch.from_numpy(inputs["tokens"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(has_gradient(run, name))
    outputs["logits_per_image"], outputs["logits_per_text"] = logits(model, images, tokens)
    if not run["train"]:  # running the towers twice would update the batch norms twice
        with torch.no_grad():
            outputs["image_features"], outputs["text_features"] = model.encode_image(images), model.encode_text(tokens)
    if run["gradients"]:
        labels = torch.arange(len(images))
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(outputs["logits_per_image"], labels) + cross_entropy(outputs["logits_per_text"], labels)
        (loss / 2).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if has_gradient(run, name)}
        outputs.update({f"grad.{name}": gradient for name, gradient in gradients.items()})
    if run["digests"]:
        for name, tensor in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                outputs[f"digest.{name}"] = torch.tensor(digest(tensor.numpy()))
    return {name: output.detach().numpy() for name, output in outputs.items()}


def logits(model, images, tokens):
    """logits_per_image and logits_per_text; cn_clip's and open_clip's models return features and the scale instead."""
    image, text, *scale = model(images, tokens)
    if not scale:
        return image, text
    per_image = scale[0] * image @ text.t()
    return per_image, per_image.t()


def same(original, back):
    """Compares a checkpoint with one that went to Paddle and back, in PyTorch.

    Returns:
        The number of tensors that are equal bit for bit and in dtype, and the number of OpenAI's parameters and
        buffers, without the counters that no weights depend on.

    Raises:
        RuntimeError: if the publisher's code does not load the second strictly.
    """
    expected = {name: tensor for name, tensor in read(original).items() if not dialects.DROPPED.fullmatch(name)}
    found = read(back)
    config = dialects.from_checkpoint(reading.read(back), back, "quickgelu").config
    built = (openai("model").build_model(dict(found)) if is_openais(config) else load(back)).state_dict()
    equal = sum(
        name in found and found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        # build_model rounds to the published mix: a tensor that had its dtype must be unchanged.
        and (tensor.dtype != built[name].dtype or torch.equal(built[name], tensor))
        for name, tensor in expected.items()
    )  # fmt: skip
    return equal - len(found.keys() - expected.keys()), len(expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a checkpoint with random weights")
    make.add_argument("preset", help="a model's name, such as RN50, ViT-H-14 or clip_cn_vit-b-16")
    make.add_argument("output", help="file to write")
    make.add_argument("--seed", type=int, default=0)
    commands.add_parser("run", help="used by parity.py").add_argument("job")
    compare = commands.add_parser("same", help="compare a checkpoint with one that went to Paddle and back")
    compare.add_argument("original")
    compare.add_argument("back")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.job)
    if arguments.command == "same":
        equal, count = same(arguments.original, arguments.back)
        print(f"{equal} of {count} tensors are bit for bit the original's, and the publisher's code loads them")
        return int(equal != count)
    try:
        config = preset(arguments.preset).config
        save = save_archive if is_openais(config) else save_state_dict
        save(random_model(config, arguments.seed), arguments.output)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.output}: {arguments.preset} with random weights, {os.path.getsize(arguments.output):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
