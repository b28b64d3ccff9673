"""Fine-tuning on (image, caption) pairs: the data, the schedule, gradients of large batches, checkpoints, the loop."""

import contextlib
import functools
import hashlib
import json
import math
import os
from typing import NamedTuple

import numpy as np
import paddle

from . import archives, writers
from .errors import CheckpointError
from .hub import activation_of, save
from .images import batches
from .losses import ContrastiveLoss
from .tokenizer import tokenize
from .transforms import image_transform

TOWERS = ("image", "text")
AMP = ("float16", "bfloat16")
BETAS = (0.9, 0.98)  # and the epsilon, the paper's for vision transformers (table 18)
EPSILON = 1e-6


class Step(NamedTuple):
    """What one optimiser step did."""

    step: int  # counted from 1, over all epochs
    steps: int  # of the whole training
    epoch: int  # counted from 1
    loss: float  # of the whole batch, before the step
    learning_rate: float
    logit_scale: float  # after the step


def finetune(
    model,
    pairs,
    output=None,
    *,
    preprocess=None,
    epochs=1,
    batch_size=64,
    accumulate=1,
    learning_rate=1e-5,
    warmup=0.1,
    weight_decay=0.2,
    clip_norm=None,
    freeze=None,
    amp=None,
    seed=0,
    save_every=None,
    resume=False,
    workers=None,
    logdir=None,
    on_step=None,
):
    """Trains a model further with CLIP's own loss (paper, section 2.3), in place.

    Each epoch draws the pairs in an order that `seed` and the epoch alone tell, and drops the last ones where they do
    not fill a batch. Captions longer than the model's context are cut. Batch norms stay in eval mode, so that small
    batches do not shift their statistics and a batch may be worked through in parts; their gains and biases are
    trained. The optimiser is AdamW with the paper's betas, the learning rate rises linearly and falls along a cosine.

    Args:
        model: a float32 `CLIP`. It is in eval mode afterwards.
        pairs: a list of (image, caption), as `pairs.read_pairs` returns it; an image is whatever `preprocess` takes.
        output: file for the trained weights, see `save`. Beside it, and only while training, is a checkpoint,
            `output` with the extension `.checkpoint.safetensors`, which `load` takes too.
        preprocess: image -> Tensor [3, R, R]; by default OpenAI's preprocessing. Where it draws random numbers, a
            resumed training is not identical to an uninterrupted one.
        epochs: passes over the pairs.
        batch_size: pairs that go through the model at once.
        accumulate: how many times as many pairs make up the batch of one step. The loss compares each pair of them
            with all others, as if they were on the device together, for the time of one more forward pass.
        learning_rate: its peak.
        warmup: the part of all steps over which it rises, between 0 and 1.
        weight_decay: of everything but gains, biases, the class embedding and `logit_scale`.
        clip_norm: the largest norm of all gradients together; None does not limit it.
        freeze: "image" or "text", the tower that is not trained; None trains both.
        amp: "float16" or "bfloat16", on a GPU: what matrix products are computed in; weights stay float32.
        seed: of the order of the pairs.
        save_every: steps between checkpoints; by default one epoch.
        resume: go on from the checkpoint, if there is one. The result is bit for bit that of a training nobody
            interrupted; on a GPU, only if the environment sets FLAGS_cudnn_deterministic and
            FLAGS_embedding_deterministic to 1.
        workers: threads that read and prepare images; by default one per core, eight at most.
        logdir: folder for VisualDL's log (`pip install visualdl`).
        on_step: called with a `Step` after each one.

    Returns:
        The list of `Step`s done; those before a resumption are not in it.

    Raises:
        ValueError: if an argument is out of range, there are fewer pairs than one batch takes, an image cannot be
            read, or there is a checkpoint that `resume` does not ask for, or one of other arguments or pairs.
        CheckpointError: if the checkpoint cannot be used.
        FileNotFoundError: if there is no folder for the output.
        FloatingPointError: if the loss is not finite. The last checkpoint remains.
    """
    whole, seed = batch_size * accumulate, int(seed)
    per_epoch = len(pairs) // whole if whole > 0 else 0
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "freeze": freeze,
        "amp": amp,
        "seed": int(seed),
    }
    _require_sound(model, settings, pairs, per_epoch, save_every)
    if output:
        writers.require_place(os.fspath(output))
    settings["pairs"] = f"{len(pairs)} with SHA-256 {_digest(pairs)}"
    steps = epochs * per_epoch
    preprocess = preprocess or image_transform(model.visual.input_resolution)
    checkpoint = f"{os.path.splitext(os.fspath(output))[0]}.checkpoint.safetensors" if output else None
    if checkpoint and os.path.exists(checkpoint) and not resume:
        raise ValueError(f"{checkpoint} is of an unfinished training: resume it (--resume), or delete it to start anew")

    model.eval()
    loss_function, history = ContrastiveLoss(), []
    with contextlib.ExitStack() as stack:
        optimizer = _optimizer(_trained(model, freeze), weight_decay, clip_norm)
        model.clear_gradients()
        scaler = paddle.amp.GradScaler(enable=amp == "float16")
        start = _resume(checkpoint, model, optimizer, scaler, settings) if resume and checkpoint else 0
        log = stack.enter_context(_visualdl(logdir)) if logdir else None
        drawn = _Lazy(steps * whole, lambda index: pairs[_row(index, len(pairs), per_epoch * whole, seed)])
        names = _Lazy(len(drawn), lambda index: drawn[index][0])
        read = batches(preprocess, names, drawn, whole, workers, on_error=None, start=start * whole)
        for step, batch in enumerate(stack.enter_context(contextlib.closing(read)), start):
            tokens = tokenize(batch.labels, model.context_length, truncate=True)  # [W, L]
            parts = [slice(first, first + batch_size) for first in range(0, whole, batch_size)]
            rate = schedule(step, steps, learning_rate, warmup)
            optimizer.set_lr(rate)
            loss = backward(
                model,
                loss_function,
                [(paddle.to_tensor(batch.pixels[part]), tokens[part]) for part in parts],
                freeze,
                lambda: paddle.amp.auto_cast(enable=bool(amp), dtype=amp or "float16", level="O1"),
                scaler.scale,
            )
            with paddle.utils.unique_name.guard():  # what Paddle appends to the names of moments counts from 0
                scaler.step(optimizer)
            scaler.update()
            optimizer.clear_grad()
            loss_function.clamp(model.logit_scale)
            history.append(Step(step + 1, steps, step // per_epoch + 1, loss, rate, model.logit_scale.item()))
            if checkpoint and (step + 1 == steps or (step + 1) % (save_every or per_epoch) == 0):
                _save_checkpoint(checkpoint, model, optimizer, scaler, settings, step + 1)
            if log:
                for name in ("loss", "learning_rate", "logit_scale"):
                    log.add_scalar(name, getattr(history[-1], name), step + 1)
            if on_step:
                on_step(history[-1])
    if output:
        save(model, output)
        if os.path.exists(checkpoint):
            os.unlink(checkpoint)
    return history


class _Lazy:
    """A sequence whose items are made when they are asked for."""

    def __init__(self, length, item):
        self.length, self.item = length, item

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.item(index)


def _row(index, count, per_epoch, seed):
    """Which of `count` pairs is the one drawn at `index`, counted over all epochs of `per_epoch` pairs."""
    epoch, place = divmod(index, per_epoch)
    return _order(count, seed, epoch)[place]


@functools.lru_cache(2)  # the batches read ahead may be of the next epoch
def _order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


# ----------------------------------------------------------------------------------------------------------- one step


def schedule(step, steps, peak, warmup):
    """The learning rate of a step counted from 0: a linear rise to the peak, then half a cosine towards 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def backward(model, loss_function, parts, freeze=None, autocast=contextlib.nullcontext, scale=lambda loss: loss):
    """Adds to the parameters the gradients of the loss over one batch, of which one part at a time is on its way.

    The features of all parts are computed first, without what their gradients would need; the loss over them gives
    the gradient of each feature; then each part goes through the model again, and back (Gao et al. 2021, "Scaling deep
    contrastive learning batch size under memory limited setup", arXiv:2101.06983).

    Args:
        model: a `CLIP` in eval mode.
        loss_function: of image features, text features and `logit_scale`.
        parts: a list of (images [B, 3, R, R], tokens [B, L]).
        freeze: "image", "text" or None, the tower that needs no gradients.
        autocast: makes the context the towers run in.
        scale: is applied to the loss before the gradients are computed.

    Returns:
        The loss, a float.

    Raises:
        FloatingPointError: if it is not finite; no gradient is computed then.
    """

    def encode(inputs, tower):
        with autocast():
            return (model.encode_image if tower == "image" else model.encode_text)(inputs)

    trained = [tower for tower in TOWERS if tower != freeze]
    features = {}
    for tower, inputs in zip(TOWERS, zip(*parts)):
        if tower in trained and len(parts) == 1:
            features[tower] = encode(inputs[0], tower)  # [B, E], the loss leads straight back
            continue
        with paddle.no_grad():
            features[tower] = paddle.concat([encode(part, tower).astype("float32") for part in inputs])  # [W, E]
        features[tower].stop_gradient = tower not in trained
    loss = loss_function(features["image"], features["text"], model.logit_scale)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value}. What helps: a lower learning rate, a longer warm-up, clip_norm=1; with "
            "amp='float16', amp='bfloat16' or none. Or the weights were not finite to begin with"
        )
    scale(loss).backward()
    if len(parts) > 1:
        for tower in trained:
            gradients = features[tower].grad.split(len(parts))
            for part, gradient in zip(parts, gradients):
                again = encode(part[TOWERS.index(tower)], tower)
                paddle.autograd.backward([again], [gradient.astype(again.dtype)])
    return value


def decays(parameter):
    """Whether weight decay applies: to matrices and kernels, not to gains, biases, class embedding and temperature."""
    return len(parameter.shape) > 1


def _trained(model, freeze):
    """The parameters of what is not frozen; `logit_scale` always is among them."""
    image = {id(parameter) for parameter in model.visual.parameters()}
    text = {id(parameter) for parameter in model.parameters()} - image - {id(model.logit_scale)}
    frozen = {"image": image, "text": text, None: set()}[freeze]
    return [parameter for parameter in model.parameters() if id(parameter) not in frozen]


def _optimizer(parameters, weight_decay, clip_norm):
    decayed = {parameter.name for parameter in parameters if decays(parameter)}
    return paddle.optimizer.AdamW(
        learning_rate=0.0,  # set before each step
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        parameters=parameters,
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
    )


# -------------------------------------------------------------------------------------------------------- checkpoints
# One safetensors file: the model's tensors as model.*, the optimiser's as optimizer.*, the rest in its metadata.


def _save_checkpoint(path, model, optimizer, scaler, settings, step):
    arrays = {f"model.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    ours = {parameter.name: name for name, parameter in model.named_parameters()}
    for key, tensor in optimizer.state_dict().items():
        if isinstance(tensor, paddle.Tensor):  # named parameter_moment1_0 by Paddle, whose names change from run to run
            theirs = next(name for name in ours if key.startswith(f"{name}_"))
            arrays[f"optimizer.{ours[theirs]}.{key[len(theirs) + 1 :]}"] = tensor.numpy()
    told = {name: _plain(value) for name, value in scaler.state_dict().items()}
    state = json.dumps({"step": step, "settings": settings, "scaler": told})
    activation = activation_of(model)
    writers.write(
        path,
        arrays,
        lambda name: "keep",
        lambda checksums: {"activation": activation, "training": state, "crc32": checksums},
    )


def _plain(value):
    return np.asarray(value).tolist()


def _resume(path, model, optimizer, scaler, settings):
    """Puts a checkpoint's state into model, optimiser and scaler; returns how many steps it has done."""
    if not os.path.exists(path):
        return 0
    checkpoint = archives.read(path)
    writers.verify_checksums(checkpoint, path)
    try:
        state = json.loads(checkpoint.metadata["training"])
        step, told, scaling = int(state["step"]), dict(state["settings"]), dict(state["scaler"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of a training ({error!r}); delete it to start anew"
        ) from None
    different = sorted(name for name in settings if told.get(name) != settings[name])
    if different:
        listed = ", ".join(f"{name} was {told.get(name)} and is {settings[name]}" for name in different)
        raise ValueError(f"{path} is of another training: {listed}. Resume with what was, or delete it to start anew")

    def part(prefix):
        return {name[len(prefix) :]: array for name, array in checkpoint.items() if name.startswith(prefix)}

    model.set_state_dict(part("model."))
    parameters = dict(model.named_parameters())
    accumulators = {}
    for name, array in part("optimizer.").items():
        parameter, _, accumulator = name.rpartition(".")
        if parameter not in parameters:
            raise CheckpointError(f"{path} has an optimiser's {name}, which this model has not; delete it")
        accumulators[f"{parameters[parameter].name}_{accumulator}"] = paddle.to_tensor(np.array(array))
    optimizer.set_state_dict(accumulators)
    if scaling:
        scaler.load_state_dict(scaling)
    return step


# --------------------------------------------------------------------------------------------------------------- checks


def _require_sound(model, settings, pairs, per_epoch, save_every):
    for name in ("epochs", "batch_size", "accumulate"):
        if settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]}; it must be at least 1")
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}; it must be at least 1")
    if not settings["learning_rate"] > 0:
        raise ValueError(f"learning_rate is {settings['learning_rate']}; it must be above 0")
    for name in ("weight_decay", "seed"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} is {settings[name]}; it must be at least 0")
    if settings["clip_norm"] is not None and not settings["clip_norm"] > 0:
        raise ValueError(f"clip_norm is {settings['clip_norm']}; it must be above 0, or None for no limit")
    if not 0 <= settings["warmup"] <= 1:
        raise ValueError(f"warmup is {settings['warmup']}; it is a part of all steps, between 0 and 1")
    for name, choices in (("freeze", TOWERS), ("amp", AMP)):
        if settings[name] is not None and settings[name] not in choices:
            raise ValueError(f"{name} is {settings[name]!r}; choose one of {', '.join(choices)}, or None")
    if settings["amp"] and paddle.get_device() == "cpu":
        raise ValueError(
            f"amp={settings['amp']!r} needs a GPU: on the CPU Paddle has no kernels for it. Leave it out, which trains "
            "in float32, or use a GPU build of Paddle with paddle.set_device('gpu')"
        )
    if model.dtype != paddle.float32:
        raise ValueError(f"the model is in {model.dtype}; fine-tuning takes float32: load(…, dtype='float32')")
    if not per_epoch:
        raise ValueError(
            f"{len(pairs)} pairs do not fill one batch of {settings['batch_size'] * settings['accumulate']} "
            f"(batch_size {settings['batch_size']} x accumulate {settings['accumulate']}); lower these"
        )


def _digest(pairs):
    digest = hashlib.sha256()
    for image, caption in pairs:
        name = os.path.basename(image) if isinstance(image, (str, os.PathLike)) else ""
        digest.update(f"{name}\0{caption}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _visualdl(logdir):
    try:
        from visualdl import LogWriter
    except ImportError:
        raise ValueError("logging to VisualDL needs it: pip install visualdl") from None
    return LogWriter(logdir=os.fspath(logdir))
