"""Compares Paddle with the publisher's PyTorch code on one checkpoint: `python convert/parity.py RN50.pt`.

The script converts the checkpoint; then PyTorch runs the original and Paddle runs the result on the same inputs, in two
processes (their GPU builds clash in one): in float64, to see whether they compute the same function, and in float32, to
see how they round. It exits 1 if a difference is past its bound. It needs torch and clip-anytorch, or for other models
cn-clip or open_clip, see reference.py.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed": the process that needs it says so

import numpy as np

from paddle_clip import convert
from paddle_clip.checkpoints import dialects, reading
from paddle_clip.presets import ACTIVATIONS, PRESETS, preset_of

OUTPUTS = ("image_features", "text_features", "logits_per_image", "logits_per_text")
# Largest difference in float64, relative to the largest value of each output. Only the order of sums differs: 1.2e-13
# was measured at worst over the nine architectures, and 1e-12 of the gradients, which pass through every layer twice
# and through sums that cancel.
FLOAT64_BOUND = 1e-10
# Largest ratio of Paddle's float32 error to PyTorch's, both against PyTorch's float64 result.
FLOAT32_RATIO = 3.0


class ParityError(RuntimeError):
    """One of the two sides did not run; the message is the last line it printed."""


def random_inputs(config, batch=4, seed=0):
    """Images [B, 3, R, R] and tokens [B, L] whose end-of-text stands at a different place in each row."""
    random = np.random.default_rng(seed)
    images = random.standard_normal((batch, 3, config.image_resolution, config.image_resolution))
    tokens = np.zeros((batch, config.context_length), np.int64)
    # The highest id, whatever the model reads for end-of-text: OpenAI's classes read no other.
    end = config.vocab_size - 1 if config.eos_token_id is None else config.eos_token_id
    for row, length in zip(tokens, np.linspace(config.context_length, 3, batch).astype(int)):
        row[0] = end - 1
        row[1 : length - 1] = random.integers(1, max(2, end - 1), length - 2)
        row[length - 1] = end
    return {"images": images, "tokens": tokens}


def ones_inputs(config):
    """One grey image and one text of ones, whose logits with the official files are published."""
    resolution = config.image_resolution
    return {
        "images": np.full((1, 3, resolution, resolution), 0.5),
        "tokens": np.ones((1, config.context_length), np.int64),
    }


def stages(config):
    """Names of the modules to compare, from the stem on."""
    if config.vision_patch_size is None:
        vision = ["visual.avgpool", *(f"visual.layer{stage}" for stage in (1, 2, 3, 4)), "visual.attnpool"]
    else:
        blocks = (f"visual.transformer.resblocks.{index}" for index in range(config.vision_layers))
        vision = ["visual.conv1", "visual.ln_pre", *blocks, "visual.ln_post"]
    if config.text_tower == "bert":
        return [*vision, "bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(config.transformer_layers))]
    blocks = (f"transformer.resblocks.{index}" for index in range(config.transformer_layers))
    return [*vision, *blocks, "ln_final"]


def digest(array):
    """SHA-256 of an array's shape and float32 numbers, as a list of integers."""
    content = str(array.shape).encode() + np.ascontiguousarray(array, np.float32).tobytes()
    return list(hashlib.sha256(content).digest())


class Run(NamedTuple):
    """One run of both sides.

    Args:
        inputs: {"images": [B, 3, R, R], "tokens": [B, L]}.
        dtype: "float64" or "float32".
        stages: names of modules whose outputs are returned too, see `stages`.
        gradients: pattern of the names of parameters whose gradients of the contrastive loss are returned, as
            "grad.<our name>"; None: of no parameter.
        digests: whether to return the `digest` of every parameter and buffer, in OpenAI's layout, as
            "digest.<OpenAI's name>".
        train: whether batch norms use the batch's statistics.
    """

    inputs: dict
    dtype: str
    stages: Sequence = ()
    gradients: Optional[str] = None
    digests: bool = False
    train: bool = False


def compare(checkpoint, converted, *runs, device="cpu"):
    """Runs both sides on the same inputs, each side in one process.

    Args:
        checkpoint: path of the file OpenAI's code loads.
        converted: path of the file Paddle loads.
        runs: what to compute, each a `Run`.
        device: Paddle's device; PyTorch runs on the CPU.

    Returns:
        For each run two dicts {name: array}, Paddle's and PyTorch's.

    Raises:
        ParityError: if a side fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, str(number)) for number in range(len(runs))]
        for path, run in zip(paths, runs):
            np.savez(path, **run.inputs)
        config = dialects.from_checkpoint(reading.read(converted), converted).config
        job = {"runs": [run._replace(inputs=path)._asdict() for path, run in zip(paths, runs)], "device": device}
        job.update(activation=config.activation, heads=config.vision_heads)
        _side([os.path.join(HERE, "parity.py"), "--run"], folder, "paddle", checkpoint=converted, **job)
        _side([os.path.join(HERE, "reference.py"), "run"], folder, "torch", checkpoint=checkpoint, **job)
        # Read when both processes have ended, whose memory the gradients of a large model need.
        return [(_read(path + ".paddle.npz"), _with_our_gradients(_read(path + ".torch.npz"))) for path in paths]


def _read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def _with_our_gradients(outputs):
    """PyTorch's outputs with the gradients under our names and in our layout."""
    for name in [name for name in outputs if name.startswith("grad.")]:
        ours, gradient = dialects.to_paddle(name[len("grad.") :], outputs.pop(name), dialects.CHINESE_CLIP)
        outputs[f"grad.{ours}"] = gradient
    return outputs


def _side(command, folder, name, **job):
    path = os.path.join(folder, f"{name}.json")
    with open(path, "w") as file:
        json.dump(job, file)
    # TF32 would round the float32 products of newer GPUs to 10 bits.
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", "GLOG_minloglevel": "2"}
    done = subprocess.run([sys.executable, *command, path], env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = [*done.stderr.strip().splitlines(), f"it ended with {done.returncode}"][-1]
        raise ParityError(f"the {name} side failed: {last}")


def run(path):
    """Paddle's side of `compare`: the counterpart of `reference.run`."""
    import paddle

    with open(path) as file:
        job = json.load(file)
    paddle.set_device(job["device"])
    for each in job["runs"]:
        np.savez(each["inputs"] + ".paddle", **_outputs(job, each))  # which makes one array after the other


def _outputs(job, run):
    import paddle

    import paddle_clip

    inputs = np.load(run["inputs"] + ".npz")
    model, _ = paddle_clip.load(job["checkpoint"], run["dtype"])
    if run["train"]:
        model.train()
    outputs = {}

    def keep(name):
        def hook(_layer, _inputs, output):
            outputs[name] = output

        return hook

    layers = dict(model.named_sublayers())
    for name in run["stages"]:
        layers[name].register_forward_post_hook(keep(name))
    images, tokens = paddle.to_tensor(inputs["images"]).astype(run["dtype"]), paddle.to_tensor(inputs["tokens"])
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not has_gradient(run, name)
    outputs["logits_per_image"], outputs["logits_per_text"] = model(images, tokens)
    if not run["train"]:
        with paddle.no_grad():
            outputs["image_features"] = model.encode_image(images)
            outputs["text_features"] = model.encode_text(tokens, trim=False)  # untrimmed, as PyTorch's blocks take it
    if run["gradients"]:
        labels = paddle.arange(len(images))
        cross_entropy = paddle.nn.functional.cross_entropy
        loss = cross_entropy(outputs["logits_per_image"], labels) + cross_entropy(outputs["logits_per_text"], labels)
        (loss / 2).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if has_gradient(run, name)}
        outputs.update({f"grad.{name}": gradient for name, gradient in gradients.items()})
    if run["digests"]:
        outputs.update(_digests(model))
    return outputs


def _digests(model):
    """{"digest." and the publisher's name: digest of a tensor in the publisher's layout}."""
    import paddle

    layers = model.named_sublayers()
    linears = {f"{name}.weight" for name, layer in layers if isinstance(layer, paddle.nn.Linear)}
    digests = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().T if name in linears else tensor.numpy()
        for ours, openai in (("._mean", ".running_mean"), ("._variance", ".running_var"), ("in_proj.", "in_proj_")):
            name = name.replace(ours, openai)
        digests[f"digest.{name}"] = paddle.to_tensor(digest(array))
    return digests


def has_gradient(run, name):
    """Whether a run asks for the gradient of the parameter of this name, ours or the publisher's."""
    return run["gradients"] is not None and re.match(run["gradients"], name) is not None


def difference(ours, theirs):
    """The largest absolute difference of two arrays, and its ratio to the largest absolute value of the second."""
    absolute = float(np.max(np.abs(ours - theirs)))
    return absolute, absolute / max(float(np.max(np.abs(theirs))), np.finfo(np.float64).tiny)


def gradient_difference(ours, theirs):
    """The largest difference of two sides' gradients, relative to the largest value of the parameter's, and its name.

    Some gradients are nothing but rounding, such as that of a key's bias: where all of a parameter's numbers are below
    1e-4 of the largest of all, they are measured by that.
    """
    names = [name for name in theirs if name.startswith("grad.")]
    least = 1e-4 * max(np.max(np.abs(theirs[name])) for name in names)
    differences = {
        name: float(np.max(np.abs(ours[name] - theirs[name])) / max(np.max(np.abs(theirs[name])), least))
        for name in names
    }
    return max((value, name[len("grad.") :]) for name, value in differences.items())


def error_ratio(ours, theirs, truth):
    """Our largest float32 error over theirs, in all the numbers of one output, both against the float64 truth.

    Args:
        ours: our arrays, one for each input. They are judged together: PyTorch may have the single logit of one input
            nearly right by luck.
        theirs: PyTorch's arrays, in the same order.
        truth: PyTorch's float64 arrays, in the same order.

    Returns:
        The ratio. Their error counts as half a unit in the last place of the largest value, if luck made it smaller.
    """
    ours, theirs, truth = (np.concatenate([array.ravel() for array in side]) for side in (ours, theirs, truth))
    unit = np.spacing(np.float32(np.max(np.abs(truth)))) / 2
    return difference(ours, truth)[0] / max(difference(theirs, truth)[0], unit)


def measure(checkpoint, converted=None, activation=None, device="cpu", show_stages=False, heads=None, gradients=False):
    """Prints the parity rows of a checkpoint and returns the list of bounds that do not hold.

    Args:
        checkpoint: path of a checkpoint; one in other names than OpenAI's is rewritten for PyTorch.
        converted: path of the file Paddle loads; by default the checkpoint is converted.
        activation: activation of the model, where the checkpoint does not tell it.
        device: Paddle's device.
        show_stages: whether to print and check every stage and block too.
        heads: number of the image tower's heads, where the checkpoint does not tell it.
        gradients: whether to compare the gradients of every parameter too, in float64.
    """
    found = dialects.from_checkpoint(reading.read(checkpoint), checkpoint, activation, heads=heads)
    config = found.config
    row = preset_of(config)
    model = row.name if row else os.path.basename(checkpoint)
    failures = []
    float32 = {name: ([], [], []) for name in OUTPUTS}  # ours, theirs and the truth for each input
    with tempfile.TemporaryDirectory() as folder:
        if found.dialect not in ("OpenAI", "Chinese-CLIP") or (found.prefix and config.text_tower == "clip"):
            original, checkpoint = checkpoint, os.path.join(folder, "openai.pt")
            convert(original, checkpoint, "keep", activation, heads=heads)
        if converted is None:
            converted = os.path.join(folder, "converted.pdparams")
            published = all(array.dtype == dialects.published_dtype(name) for name, array in found.arrays.items())
            dtype = "float32" if published else "keep"
            convert(checkpoint, converted, dtype, config.activation, heads=config.vision_heads)
            failures += _there_and_back(model, checkpoint, converted, "published" if published else "keep")
        names = stages(config) if show_stages else ()
        # Eight rows give 64 logits: the ratio of the largest errors of 16 was 0.8, 1.3 or 2.3 by luck.
        inputs = {"ones": ones_inputs(config), "random": random_inputs(config, batch=8)}
        double = [Run(each, "float64", names) for each in inputs.values()]
        single = [Run(each, "float32", digests=kind == "ones") for kind, each in inputs.items()]
        results = compare(checkpoint, converted, *double, *single, device=device)
        for kind, (ours64, truth), (ours, theirs) in zip(inputs, results[:2], results[2:]):
            _row(f"{model}, {kind}, float64", ours64, truth, OUTPUTS)
            for name in names:
                _row(f"  {name}", ours64, truth, [name])
            for name in (*names, *OUTPUTS):
                relative = difference(ours64[name], truth[name])[1]
                if not relative <= FLOAT64_BOUND:  # a NaN fails
                    failures.append(f"{model}, {kind}: {name} differs by {relative:.1e} in float64 > {FLOAT64_BOUND}")
            if kind == "ones":
                failures += _compare_digests(model, ours, theirs)
            _row(f"{model}, {kind}, float32", ours, theirs, OUTPUTS)
            for name, sides in float32.items():
                for side, outputs in zip(sides, (ours, theirs, truth)):
                    side.append(outputs[name])
        if gradients:
            failures += _compare_gradients(model, checkpoint, converted, config, device)
    ratios = {name: error_ratio(*sides) for name, sides in float32.items()}
    worst = max(ratios, key=ratios.get)
    if not ratios[worst] <= FLOAT32_RATIO:
        failures.append(f"{model}: float32 error of {worst} is {ratios[worst]:.2f} x PyTorch's > {FLOAT32_RATIO}")
    label = "  float32 error over PyTorch's"
    print(f"{label:<42} | {ratios[worst]:>10.2f} at worst ({worst})")
    return failures


def _there_and_back(model, checkpoint, converted, dtype):
    """Converts back for PyTorch, compares the result with the original there, and returns the failures."""
    back = f"{converted}.pt"
    convert(converted, back, dtype)
    command = [sys.executable, os.path.join(HERE, "reference.py"), "same", checkpoint, back]
    done = subprocess.run(command, capture_output=True, text=True)
    os.unlink(back)
    print(f"  there and back, {done.stdout.strip() or 'PyTorch does not load it'}")
    return [f"{model} is not the same there and back. {done.stderr[-300:]}"] if done.returncode else []


def _compare_digests(model, ours, theirs):
    names = {name for name in (*ours, *theirs) if name.startswith("digest.")}
    wrong = sorted(name[len("digest.") :] for name in names if not np.array_equal(ours.get(name), theirs.get(name)))
    print(f"  {len(names) - len(wrong)} of {len(names)} tensors equal PyTorch's name for name and bit for bit")
    return [f"{model}: {', '.join(wrong)} differ from PyTorch's"] if wrong else []


def _compare_gradients(model, checkpoint, converted, config, device):
    """Prints the largest difference of each tower's gradients, one tower after the other for the sake of memory."""
    inputs, failures = random_inputs(config), []
    for tower, pattern in (("image tower", "visual"), ("text tower", "(?!visual)")):
        run = Run(inputs, "float64", gradients=pattern)
        [(ours, theirs)] = compare(checkpoint, converted, run, device=device)
        worst, name = gradient_difference(ours, theirs)
        count = sum(output.startswith("grad.") for output in theirs)
        print(f"{f'{model}, {tower}, {count} gradients':<68} | {'':>12} | {worst:>12.1e}", flush=True)
        if not worst <= FLOAT64_BOUND:
            failures.append(f"{model}: the gradient of {name} differs by {worst:.1e} in float64 > {FLOAT64_BOUND}")
    return failures


def _row(label, ours, theirs, names):
    differences = [difference(ours[name], theirs[name]) for name in names]
    absolute, relative = (max(column) for column in zip(*differences))
    values = [side[names[-1]].flat[0] for side in (ours, theirs)]
    print(f"{label:<42} | {values[0]:>10.4f} | {values[1]:>10.4f} | {absolute:>12.1e} | {relative:>12.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="OpenAI .pt checkpoints")
    parser.add_argument("--all", action="store_true", help="make and compare all nine presets, with random weights")
    parser.add_argument("--device", default="cpu", help="Paddle's device: cpu (default), gpu, gpu:1, …")
    parser.add_argument("--stages", action="store_true", help="print a row for each stage and block too")
    parser.add_argument("--gradients", action="store_true", help="compare the gradients of every parameter too")
    parser.add_argument("--converted", help="the file Paddle loads (default: FILE is converted)")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="model's activation, where the file does not tell")
    parser.add_argument("--heads", type=int, help="heads of the image tower, where nothing beside the file tells them")
    parser.add_argument("--run", metavar="JOB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run(arguments.run)
    if not arguments.files and not arguments.all:
        parser.error("name a checkpoint, such as RN50.pt, or --all")

    print(f"{'Model':<42} | {'Paddle':>10} | {'PyTorch':>10} | {'max abs diff':>12} | {'max rel diff':>12}")
    if arguments.device != "cpu":
        print(f"(Paddle on {arguments.device}, TF32 off)")
    failures = []
    for file in arguments.files:
        failures += _measure_or_fail(file, arguments)
    if arguments.all:
        with tempfile.TemporaryDirectory() as folder:
            for row in PRESETS:
                path = os.path.join(folder, row.file)
                reference = os.path.join(HERE, "reference.py")
                subprocess.run([sys.executable, reference, "make", row.name, path], check=True, stdout=sys.stderr)
                failures += _measure_or_fail(path, arguments)
                os.unlink(path)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


def _measure_or_fail(file, arguments):
    try:
        chosen = (arguments.converted, arguments.activation, arguments.device, arguments.stages, arguments.heads)
        return measure(file, *chosen, arguments.gradients)
    except (ValueError, OSError, ParityError) as error:
        return [" ".join(str(error).split())]


if __name__ == "__main__":
    sys.exit(main())
