"""Fine-tuning on (image, caption) pairs: the data, the schedule, gradients of large batches, the loop."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

import numpy as np
import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

from .checkpoints import files
from .checkpoints.conversion import save
from .checkpoints.files import StrPath
from .checks import unwrapped
from .defaults import ACCUMULATE, BATCH_SIZE, EPOCHS, LEARNING_RATE, SEED, WARMUP, WEIGHT_DECAY
from .distributed import Ranks, join, slice_of
from .encoding import HALF_DTYPES
from .extras import require
from .images import Batch, batches
from .layers import float32_if_half
from .losses import ContrastiveLoss
from .model import CLIP
from .resumption import differences, resume_checkpoint, save_checkpoint
from .transforms import image_transform

TOWERS = ("image", "text")
ALONE = Ranks()
# The paper's values for vision transformers (table 18).
ADAM_BETAS = (0.9, 0.98)
ADAM_EPSILON = 1e-6


class Step(NamedTuple):
    """The result of one optimiser step."""

    step: int  # counted from 1, over all epochs
    steps: int  # number of steps of the training
    epoch: int  # counted from 1
    loss: float  # loss of the whole batch before the step
    learning_rate: float
    logit_scale: float  # value after the step


def finetune(
    model: CLIP,
    pairs: Sequence[tuple[Any, str]],
    output: Optional[StrPath] = None,
    *,
    preprocess: Optional[Callable[[Any], Any]] = None,
    epochs: int = EPOCHS,
    batch_size: Optional[int] = None,
    accumulate: int = ACCUMULATE,
    learning_rate: float = LEARNING_RATE,
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    clip_norm: Optional[float] = None,
    freeze: Optional[str] = None,
    amp: Optional[str] = None,
    seed: int = SEED,
    save_every: Optional[int] = None,
    resume: bool = False,
    workers: Optional[int] = None,
    logdir: Optional[StrPath] = None,
    on_step: Optional[Callable[[Step], None]] = None,
) -> list[Step]:
    """Trains a model further with CLIP's own loss (paper, section 2.3), in place.

    Each epoch draws the pairs in an order that depends on `seed` and the epoch alone, and drops the last ones if they
    do not fill a batch. Captions longer than the model's context are cut. Batch norms stay in eval mode, so that small
    batches do not shift their statistics and a batch may be processed in parts; their gains and biases are trained. The
    optimiser is AdamW with the paper's betas; the learning rate rises linearly and falls along a cosine.

    In a script that `paddle.distributed.launch` started, the processes train one model together: each takes its slice
    of every batch, and the result is that of one process but for rounding. They start with the weights of the first
    process, which alone writes files and calls `on_step`; an error of one stops all.

    Args:
        model: a float32 `CLIP`, or one in `paddle.DataParallel`, which is not needed. It is in eval mode afterwards.
        pairs: a list of (image, caption), as `pairs.read_pairs` returns it; an image is whatever `preprocess` takes.
        output: path for the trained weights, see `save`. While training, a checkpoint is kept beside it, at `output`
            with the extension `.checkpoint.safetensors`; `load` reads it too.
        preprocess: image -> Tensor [3, R, R]; by default the model's own. If it draws random numbers, a resumed
            training is not identical to an uninterrupted one.
        epochs: number of passes over the pairs.
        batch_size: number of pairs that go through the model at once; by default 64, or all if there are fewer.
        accumulate: number of such batches of each process that make up the batch of one step. The loss compares each
            pair with all others of the step, as if they were on the device together, for the time of one more forward
            pass.
        learning_rate: highest learning rate.
        warmup: share of all steps, from 0 to 1, over which the learning rate rises.
        weight_decay: decay of all parameters but gains, biases, the class embedding and `logit_scale`.
        clip_norm: largest norm of all gradients together; None does not limit it.
        freeze: tower that is not trained, "image" or "text"; None trains both.
        amp: dtype of matrix products on a GPU, "float16" or "bfloat16"; weights stay float32.
        seed: seed of the order of the pairs.
        save_every: number of steps between checkpoints; by default one epoch.
        resume: whether to continue from the checkpoint, if there is one. The result equals that of an uninterrupted
            training bit for bit; on a GPU only if the environment sets FLAGS_cudnn_deterministic and
            FLAGS_embedding_deterministic to 1. Another number of processes may go on with a batch of the same size, to
            rounding.
        workers: number of threads that read and prepare images; by default one per core, eight at most.
        logdir: folder for VisualDL's log (the extra `visualdl`).
        on_step: function called with each `Step`.

    Returns:
        The steps that this call did, without those before a resumption.

    Raises:
        ValueError: if an argument is out of range, a caption is no text, there are fewer pairs than one batch takes,
            an image cannot be read, or there is a checkpoint that `resume` does not ask for, or one with other
            arguments or pairs.
        CheckpointError: if the checkpoint cannot be used.
        FileNotFoundError: if there is no folder for the output.
        FloatingPointError: if the loss is not finite. The last checkpoint remains.
        ImportError: if `logdir` is given and VisualDL is missing.
    """
    ranks = join()
    model, seed = unwrapped(model), int(seed)
    pairs = pairs.tolist() if isinstance(pairs, np.ndarray) else pairs
    pairs = pairs if hasattr(pairs, "__len__") else list(pairs)
    output = files.expanded(output) if output else output
    checkpoint = f"{os.path.splitext(output)[0]}.checkpoint.safetensors" if output else None
    batch_size = _fitting(len(pairs), accumulate * ranks.count) if batch_size is None else batch_size
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "ranks": ranks.count,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "freeze": freeze,
        "amp": amp,
        "seed": seed,
    }

    def require_sound() -> str:
        _require_sound(model, settings, pairs, save_every)
        _require_free(output, checkpoint, resume)
        return f"{len(pairs)} with SHA-256 {_digest(pairs)}"

    settings["pairs"] = ranks.together(require_sound)
    pairs_of_rank = batch_size * accumulate  # in one step
    steps_of_epoch = len(pairs) // (pairs_of_rank * ranks.count)
    steps = epochs * steps_of_epoch

    model.eval()
    history: list[Step] = []
    with contextlib.ExitStack() as stack:
        optimizer = _optimizer(_trained(model, freeze), weight_decay, clip_norm)
        model.clear_gradients()
        scaler = paddle.amp.GradScaler(enable=amp == "float16")
        start = 0
        if resume and checkpoint:
            start = ranks.together(lambda: resume_checkpoint(checkpoint, model, optimizer, scaler, settings))
        _begin_alike(ranks, model, {**settings, "steps done": start})
        log = stack.enter_context(_visualdl(logdir)) if logdir and ranks.rank == 0 else None
        drawn = _drawn(pairs, steps, pairs_of_rank, seed, ranks)
        names = _Lazy(len(drawn), lambda index: drawn[index][0])
        preprocess = preprocess or image_transform(model.config.image_resolution, *model.preprocessing)
        read_ahead = batches(preprocess, names, drawn, pairs_of_rank, workers, None, start * pairs_of_rank)
        stack.enter_context(contextlib.closing(read_ahead))
        for step in range(start, steps):
            batch = ranks.together(lambda: next(read_ahead))
            optimizer.set_lr(schedule(step, steps, learning_rate, warmup))
            loss = _step(model, optimizer, scaler, batch, batch_size, freeze, amp, ranks)
            done = Step(step + 1, steps, step // steps_of_epoch + 1, loss, optimizer.get_lr(), float(model.logit_scale))
            history.append(done)
            if checkpoint and (done.step == steps or done.step % (save_every or steps_of_epoch) == 0):
                state = (checkpoint, model, optimizer, scaler, settings, done.step)
                ranks.first(lambda: save_checkpoint(*state))  # noqa: B023  it is called here
            if ranks.rank == 0:
                _report(done, log, on_step)
    if output and checkpoint:
        ranks.first(lambda: _finish(model, output, checkpoint))
    return history


def _fitting(pairs: int, batches: int) -> int:
    """The usual number of pairs in a batch, or fewer, so that there are enough for the batches of a step."""
    return max(1, min(BATCH_SIZE, pairs // max(1, batches)))


def _begin_alike(ranks: Ranks, model: CLIP, settings: dict[str, Any]) -> None:
    """Gives all processes the weights of the first one, or raises ValueError if they would train differently."""
    for rank, told in enumerate(ranks.tell(json.dumps(settings, default=lambda number: number.item()))):
        different = differences(json.loads(told), settings)
        if different:
            raise ValueError(
                f"process {rank} has other arguments or files than process {ranks.rank}: {different}. Start all with "
                "the same, and keep the checkpoint where all machines see it"
            )
    ranks.make_alike(model.state_dict().values())


def _report(step: Step, log: Any, on_step: Optional[Callable[[Step], None]]) -> None:
    if log:
        for name in ("loss", "learning_rate", "logit_scale"):
            log.add_scalar(name, getattr(step, name), step.step)
    if on_step:
        on_step(step)


def _finish(model: CLIP, output: StrPath, checkpoint: str) -> None:
    """Writes the trained weights and deletes the checkpoint."""
    save(model, output)
    if os.path.exists(checkpoint):
        os.unlink(checkpoint)


class _Lazy:
    """A sequence that makes its items when they are read."""

    def __init__(self, length: int, item: Callable[[int], Any]):
        self.length, self.item = length, item

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def _drawn(pairs: Sequence[tuple[Any, str]], steps: int, pairs_of_rank: int, seed: int, ranks: Ranks) -> _Lazy:
    """The pairs of all steps that this process takes, one after the other.

    All processes together draw what one process with a batch of that size draws; each takes its slice of every batch.
    """
    pairs_of_step = pairs_of_rank * ranks.count
    pairs_of_epoch = len(pairs) // pairs_of_step * pairs_of_step

    def pair(index: int) -> tuple[Any, str]:
        epoch, place = divmod(slice_of(index, ranks.rank, pairs_of_rank, ranks.count), pairs_of_epoch)
        return pairs[_order(len(pairs), seed, epoch)[place]]

    return _Lazy(steps * pairs_of_rank, pair)


@functools.lru_cache(2)  # batches that are read ahead may belong to the next epoch
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes the pairs."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


# ----------------------------------------------------------------------------------------------------------- one step


def _step(
    model: CLIP,
    optimizer: Optimizer,
    scaler: paddle.amp.GradScaler,
    batch: Batch,
    batch_size: int,
    freeze: Optional[str],
    amp: Optional[str],
    ranks: Ranks,
) -> float:
    """Makes one step of the optimiser and returns the loss before it."""
    tokens = model.tokenize(batch.labels, truncate=True)  # [W, L]
    parts = [slice(first, first + batch_size) for first in range(0, len(batch.labels), batch_size)]
    loss_function = ContrastiveLoss()
    loss = backward(
        model,
        loss_function,
        [(paddle.to_tensor(batch.pixels[part]), tokens[part]) for part in parts],
        freeze,
        lambda: paddle.amp.auto_cast(
            enable=bool(amp), dtype="bfloat16" if amp == "bfloat16" else "float16", level="O1"
        ),
        scaler.scale,
        ranks,
    )
    with paddle.utils.unique_name.guard():  # the numbers Paddle appends to names of moments start at 0
        scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad()
    loss_function.clamp(model.logit_scale)
    return loss


def schedule(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step counted from 0: a linear rise to the peak, then half a cosine towards 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def backward(
    model: CLIP,
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    parts: Sequence[tuple[Tensor, Tensor]],
    freeze: Optional[str] = None,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ranks: Ranks = ALONE,
) -> float:
    """Computes the gradients of the loss over one batch, with one part of it in memory at a time.

    The features of all parts are computed first, without gradients, and those of all processes gathered; the loss over
    them gives the gradient of each feature; then each part goes through the model again, forward and backward (Gao et
    al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", arXiv:2101.06983). A single
    part keeps what its gradients need and goes through once. At last the processes add up their gradients. No operation
    between processes has a gradient of its own: every process computes the whole loss, and its rows of the gradient.

    Args:
        model: a `CLIP` in eval mode, whose parameters have no gradients yet.
        loss_function: function of image features, text features and `logit_scale`.
        parts: images [B, 3, R, R] and tokens [B, L] of each part of this process.
        freeze: tower that needs no gradients, "image" or "text", or None.
        autocast: function that makes the context the towers run in.
        scale: function applied to the loss before the gradients are computed.
        ranks: the processes whose parts make up the batch, each with as many rows; by default this one alone.

    Returns:
        The loss over the whole batch.

    Raises:
        FloatingPointError: if the loss is not finite; no gradient is computed then.
    """

    def encode(inputs: Tensor, tower: str) -> Tensor:
        with autocast():
            return (model.encode_image if tower == "image" else model.encode_text)(inputs)

    trained = [tower for tower in TOWERS if tower != freeze]
    kept: dict[str, Tensor] = {}  # features of a single part, with what their gradients need
    features: dict[str, Tensor] = {}
    for tower, inputs in zip(TOWERS, zip(*parts)):
        if tower in trained and len(parts) == 1:
            kept[tower] = encode(inputs[0], tower)  # [B, E]
            own = float32_if_half(kept[tower].detach())
        else:
            with paddle.no_grad():
                own = paddle.concat([float32_if_half(encode(part, tower)) for part in inputs])  # [W, E]
        features[tower] = ranks.gather(own)  # [W * ranks, E]
        features[tower].stop_gradient = tower not in trained
    loss = loss_function(features["image"], features["text"], model.logit_scale)
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value}. Try a lower learning rate, a longer warm-up, clip_norm=1, or amp='bfloat16' or none "
            "in place of amp='float16'; and check that the weights were finite before"
        )
    scale(loss).backward()
    for tower in trained:
        gradient_of_all = features[tower].grad  # [W * ranks, E]
        assert gradient_of_all is not None
        for part, gradient in zip(parts, ranks.own(gradient_of_all).split(len(parts))):
            feature = kept[tower] if kept else encode(part[TOWERS.index(tower)], tower)  # [B, E]
            paddle.autograd.backward([feature], [gradient.astype(feature.dtype)])
    ranks.add_gradients(model.parameters(), complete=model.logit_scale)
    return value


def decays(parameter: Tensor) -> bool:
    """Whether a parameter decays: matrices and kernels do; gains, biases, class embedding and temperature do not."""
    return len(parameter.shape) > 1


def _trained(model: CLIP, freeze: Optional[str]) -> list[Tensor]:
    """The parameters that are not frozen; `logit_scale` is always among them."""
    frozen: set[int] = set()
    if freeze:
        image = {id(parameter) for parameter in model.visual.parameters()}
        text = {id(parameter) for parameter in model.parameters()} - image - {id(model.logit_scale)}
        frozen = {"image": image, "text": text}[freeze]
    return [parameter for parameter in model.parameters() if id(parameter) not in frozen]


def _optimizer(parameters: list[Tensor], weight_decay: float, clip_norm: Optional[float]) -> Optimizer:
    decayed = {parameter.name for parameter in parameters if decays(parameter)}
    return paddle.optimizer.AdamW(
        learning_rate=0.0,  # set before each step
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        epsilon=ADAM_EPSILON,
        parameters=parameters,
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
    )


# --------------------------------------------------------------------------------------------------------------- checks


def _require_sound(
    model: CLIP, settings: dict[str, Any], pairs: Sequence[tuple[Any, str]], save_every: Optional[int]
) -> None:
    for name in ("epochs", "batch_size", "accumulate"):
        _require(settings[name] >= 1, name, settings[name], "it must be at least 1")
    _require(save_every is None or save_every >= 1, "save_every", save_every, "it must be at least 1")
    _require(settings["learning_rate"] > 0, "learning_rate", settings["learning_rate"], "it must be above 0")
    for name in ("weight_decay", "seed"):
        _require(settings[name] >= 0, name, settings[name], "it must be at least 0")
    clip_norm, warmup = settings["clip_norm"], settings["warmup"]
    _require(clip_norm is None or clip_norm > 0, "clip_norm", clip_norm, "it must be above 0, or None for no limit")
    _require(0 <= warmup <= 1, "warmup", warmup, "it must be a share of all steps, between 0 and 1")
    for name, choices in (("freeze", TOWERS), ("amp", HALF_DTYPES)):
        if settings[name] is not None and settings[name] not in choices:
            raise ValueError(f"{name} is {settings[name]!r}; choose one of {', '.join(choices)}, or None")
    if settings["amp"] and paddle.get_device() == "cpu":
        raise ValueError(
            f"amp={settings['amp']!r} needs a GPU: on the CPU Paddle has no kernels for it. Leave it out, which trains "
            "in float32, or use a GPU build of Paddle with paddle.set_device('gpu')"
        )
    if model.dtype != paddle.float32:
        raise ValueError(f"the model is in {model.dtype}; fine-tuning takes float32: load(…, dtype='float32')")
    batch = settings["batch_size"] * settings["accumulate"] * settings["ranks"]
    if len(pairs) < batch:
        processes = f" x {settings['ranks']} processes" if settings["ranks"] > 1 else ""
        raise ValueError(
            f"{len(pairs)} pairs do not fill one batch of {batch} (batch_size={settings['batch_size']} x "
            f"accumulate={settings['accumulate']}{processes}); lower these"
        )


def _require_free(output: Optional[StrPath], checkpoint: Optional[str], resume: bool) -> None:
    """Raises unless the output can be written, and no checkpoint lies there that nobody asks for."""
    if output:
        files.require_place(output)
    if checkpoint and os.path.exists(checkpoint) and not resume:
        raise ValueError(
            f"{checkpoint} is of an unfinished training: give resume=True to continue, or delete the file to start anew"
        )


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}; {rule}")


def _digest(pairs: Sequence[tuple[Any, str]]) -> str:
    digest = hashlib.sha256()
    for row, pair in enumerate(pairs):
        image, caption = _sound_pair(row, pair)
        name = os.path.basename(image) if isinstance(image, (str, os.PathLike)) else ""
        digest.update(f"{name}\0{caption}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sound_pair(row: int, pair: Any) -> tuple[Any, str]:
    """An (image, caption), or a ValueError that names the row: training would stop at it after hours."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"pair {row} is {pair!r:.80}; expected (image, caption)")
    image, caption = pair
    if not isinstance(caption, str):
        raise ValueError(f"the caption of pair {row} is {caption!r:.80}, of the type {type(caption).__name__}; a text")
    try:
        caption.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"the caption of pair {row} is {caption!a:.80}, which is no text in Unicode") from None
    return image, caption


def _visualdl(logdir: StrPath) -> AbstractContextManager[Any]:
    require("visualdl")
    from visualdl import LogWriter

    return LogWriter(logdir=files.expanded(logdir))
