"""Fine-tuning on (image, caption) pairs: the data, the schedule, gradients of large batches, the loop."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

from . import plots
from .adapting import TOWERS, adapted, frozen_names, frozen_tower, merged_state, recomputed
from .checkpoints import files
from .checkpoints.conversion import save, save_weights
from .checkpoints.files import StrPath
from .checkpoints.writing import require_output
from .checks import unwrapped
from .defaults import ACCUMULATE, BATCH_SIZE, EPOCHS, LEARNING_RATE, SEED, WARMUP, WEIGHT_DECAY
from .distributed import Ranks, join, slice_of
from .encoding import HALF_DTYPES, require_dynamic_mode
from .errors import CheckpointError
from .extras import require
from .hub import load
from .images import Batch, batches
from .layers import BatchNorm2D, float32_if_half
from .losses import ContrastiveLoss
from .model import CLIP
from .pairs import ShardPairs
from .recall import Retrieval, measured
from .resumption import differences, resume_checkpoint, save_checkpoint
from .transforms import image_transform

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
    validation: Optional[Retrieval] = None  # after the last step of an epoch


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
    validation: Optional[Sequence[tuple[Any, str]]] = None,
    freeze: Union[str, Sequence[str], None] = None,
    lora: Optional[int] = None,
    unfreeze: Sequence[str] = (),
    train_norms: bool = False,
    recompute: bool = False,
    amp: Optional[str] = None,
    seed: int = SEED,
    shuffle: bool = True,
    save_every: Optional[int] = None,
    resume: bool = False,
    workers: Optional[int] = None,
    logdir: Optional[StrPath] = None,
    plot: Optional[StrPath] = None,
    on_step: Optional[Callable[[Step], None]] = None,
) -> list[Step]:
    """Trains a model further with CLIP's own loss (paper, section 2.3), in place.

    Each epoch draws the pairs in an order that depends on `seed` and the epoch alone, and drops the last ones if they
    do not fill a batch. Captions longer than the model's context are cut. Batch norms keep their statistics, which
    small batches would shift; their gains and biases are trained. The optimiser is AdamW with the paper's betas; the
    learning rate rises linearly and falls along a cosine.

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
        validation: pairs that are not trained on. After each epoch the loss and `retrieval` on them are measured, and
            at the end the model has the weights with the lowest loss; `output` has them from the first epoch on.
        freeze: what is not trained: a tower, "image" or "text"; or a list of towers, layers and parameters by their
            names, such as "visual.transformer.resblocks.0".
        lora: rank of what LoRA trains beside the weights of all linear layers that are not frozen; 8 is usual, with ten
            times the learning rate. The weights themselves stay, the model forgets less, and the optimiser needs less
            memory. At the end what was trained is merged into the weights.
        unfreeze: what is trained though `freeze` or LoRA would freeze it, by names as in `freeze`: for words that are
            new, "token_embedding".
        train_norms: whether the batch norms of a ResNet take the statistics of the pictures that go through at once,
            and average them for later: random weights need that. Processes do so each by itself, and their number and
            `accumulate` then change the result; the first one's averages are kept.
        recompute: whether the blocks are computed again for their gradients, which takes the memory of one block and
            the time of one more forward pass.
        amp: dtype of matrix products on a GPU, "float16" or "bfloat16"; weights stay float32.
        seed: seed of the order of the pairs.
        shuffle: whether each epoch takes the pairs in an order of its own. False keeps theirs, where pairs that are
            hard to tell apart were put side by side to be in one batch.
        save_every: number of steps between checkpoints; by default one epoch.
        resume: whether to continue from the checkpoint, if there is one. The result equals that of an uninterrupted
            training bit for bit; on a GPU only if the environment sets FLAGS_cudnn_deterministic and
            FLAGS_embedding_deterministic to 1. Another number of processes may go on with a batch of the same size, to
            rounding.
        workers: number of threads that read and prepare images; by default one per core, eight at most.
        logdir: folder for VisualDL's log (the extra `visualdl`).
        plot: .png, .pdf or .svg to draw the loss to at the end, from the steps of this call (the extra `plot`).
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
        ImportError: if `logdir` or `plot` is given and VisualDL or matplotlib is missing.
        RuntimeError: if Paddle is in static mode.
    """
    ranks, model, seed = join(), unwrapped(model), int(seed)
    pairs, validation = _listed(pairs), _listed(validation or ())
    output = files.expanded(output) if output else None
    checkpoint = f"{os.path.splitext(output)[0]}.checkpoint.safetensors" if output else None
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": _fitting(len(pairs), accumulate * ranks.count) if batch_size is None else batch_size,
        "accumulate": accumulate,
        "ranks": ranks.count,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "freeze": freeze if isinstance(freeze, str) else list(freeze or ()),
        "lora": lora,
        "unfreeze": list(unfreeze),
        "train_norms": train_norms,
        "amp": amp,
        "seed": seed,
        "in_order": not shuffle,  # so named as checkpoints that do not tell are of shuffled pairs
    }

    def checked() -> dict[str, Any]:
        _require_sound(model, settings, pairs, save_every)
        frozen_names(model, settings["freeze"], unfreeze)
        _require_free(output, checkpoint, resume)
        if plot:
            plots.require_writable(plot)
        given = {"pairs": pairs, "validation": validation}
        return {name: f"{len(of)} with SHA-256 {_digest(of)}" if len(of) else None for name, of in given.items()}

    history: list[Step] = []
    with _alone(ranks, output):
        settings |= ranks.together(checked)
        settings |= _begin_alike(ranks, model, settings)
        preprocess = preprocess or image_transform(model.config.image_resolution, *model.preprocessing)

        model.eval()
        with contextlib.ExitStack() as stack:
            trained = stack.enter_context(adapted(model, settings["freeze"], lora, unfreeze, seed))
            stack.enter_context(recomputed(model) if recompute else contextlib.nullcontext())
            log = stack.enter_context(_visualdl(logdir)) if logdir and ranks.rank == 0 else None
            training = _Training(model, ranks, settings, trained, output, checkpoint)
            if resume and checkpoint:
                ranks.together(training.resume)
            _require_alike(ranks, {**settings, "steps done": training.step})
            steps = training.steps(preprocess, pairs, validation, workers, save_every)
            for done in stack.enter_context(contextlib.closing(steps)):
                history.append(done)
                _report(ranks, done, log, on_step)
        training.finish()
    if plot and ranks.rank == 0:
        plots.training(history, plot)
    return history


@contextlib.contextmanager
def _alone(ranks: Ranks, output: Optional[StrPath]) -> Iterator[None]:
    """Keeps other trainings from the same output while the block lasts; the first process holds it."""
    with contextlib.ExitStack() as stack:
        if output:
            ranks.first(lambda: stack.enter_context(files.held(output)))
        yield


def _fitting(pairs: int, batches: int) -> int:
    """The usual number of pairs in a batch, or fewer, so that there are enough for the batches of a step."""
    return max(1, min(BATCH_SIZE, pairs // max(1, batches)))


def _listed(pairs: Any) -> Any:
    pairs = pairs.tolist() if isinstance(pairs, np.ndarray) else pairs
    return pairs if hasattr(pairs, "__len__") else list(pairs)


def _begin_alike(ranks: Ranks, model: CLIP, settings: dict[str, Any]) -> dict[str, Any]:
    """Gives all processes the weights of the first one; returns what a checkpoint must know of them."""
    _require_alike(ranks, {**settings, "model": str(model.config)})
    ranks.make_alike(model.state_dict().values())
    return {"weights": _digest_of_weights(model)} if settings["lora"] else {}


def _require_alike(ranks: Ranks, settings: dict[str, Any]) -> None:
    """Raises ValueError if the processes would train differently."""
    for rank, told in enumerate(ranks.tell(json.dumps(settings, default=lambda number: number.item()))):
        different = differences(json.loads(told), settings)
        if different:
            raise ValueError(
                f"process {rank} has other arguments or files than process {ranks.rank}: {different}. Start all with "
                "the same, and keep the checkpoint where all machines see it"
            )


def _report(ranks: Ranks, step: Step, log: Any, on_step: Optional[Callable[[Step], None]]) -> None:
    if ranks.rank:
        return
    if log:
        for name in ("loss", "learning_rate", "logit_scale"):
            log.add_scalar(name, getattr(step, name), step.step)
        if step.validation:
            log.add_scalar("validation_loss", step.validation.loss, step.step)
    if on_step:
        on_step(step)


class _Training:
    """The state of a training: the model, the optimiser, the number of steps done, and the best weights so far."""

    def __init__(
        self,
        model: CLIP,
        ranks: Ranks,
        settings: dict[str, Any],
        trained: list[Tensor],
        output: Optional[StrPath],
        checkpoint: Optional[str],
    ):
        self.model, self.ranks, self.settings, self.output, self.checkpoint = model, ranks, settings, output, checkpoint
        self.trained, self.frozen = trained, frozen_tower(model, trained)
        self.norms = _trained_norms(model) if settings["train_norms"] else []
        self.optimizer = _optimizer(trained, settings["weight_decay"], settings["clip_norm"])
        self.scaler = paddle.amp.GradScaler(enable=settings["amp"] == "float16")
        self.step = 0
        self.best: Optional[float] = None  # loss on the validation's pairs
        self.best_weights: dict[str, Any] = {}
        model.clear_gradients()

    def steps(
        self,
        preprocess: Callable[[Any], Any],
        pairs: Sequence[tuple[Any, str]],
        validation: Sequence[tuple[Any, str]],
        workers: Optional[int],
        save_every: Optional[int],
    ) -> Generator[Step, None, None]:
        """Makes the steps that are left, with checkpoints and validations, and yields each."""
        ranks, settings = self.ranks, self.settings
        batch_size, pairs_of_rank = settings["batch_size"], settings["batch_size"] * settings["accumulate"]
        steps_of_epoch = len(pairs) // (pairs_of_rank * ranks.count)
        steps = settings["epochs"] * steps_of_epoch
        if self.step > steps:
            told = f"{self.checkpoint} is of step {self.step!s:.40}, and the training has {steps}"
            raise CheckpointError(f"{told}; delete it to start anew")
        seed = None if settings["in_order"] else settings["seed"]
        drawn = _drawn(pairs, steps, pairs_of_rank, seed, ranks)
        names = _Lazy(len(drawn), lambda index: drawn[index][0])
        read_ahead = batches(preprocess, names, drawn, pairs_of_rank, workers, None, self.step * pairs_of_rank)
        with contextlib.closing(read_ahead):
            while self.step < steps:
                batch = ranks.together(lambda: next(read_ahead))
                rate = schedule(self.step, steps, float(settings["learning_rate"]), settings["warmup"])
                self.optimizer.set_lr(rate)
                amp = settings["amp"]
                with _in_training(self.norms):
                    loss = _step(self.model, self.optimizer, self.scaler, batch, batch_size, self.frozen, amp, ranks)
                self.step += 1
                epoch, within = divmod(self.step, steps_of_epoch)
                found = None
                if validation and not within:
                    self._agree()
                    all_pairs = pairs_of_rank * ranks.count
                    try:
                        found = measured(self.model, preprocess, validation, batch_size, workers, all_pairs, ranks)
                    except Exception:  # such as a damaged picture; the epoch need not be trained again
                        if self.checkpoint:
                            ranks.first(self.save)
                        raise
                    self._keep_if_best(found.loss)
                if self.checkpoint and (self.step == steps or self.step % (save_every or steps_of_epoch) == 0):
                    ranks.first(self.save)
                yield Step(self.step, steps, epoch + bool(within), loss, rate, float(self.model.logit_scale), found)

    def _agree(self) -> None:
        """Gives all processes the statistics that the first one's batch norms averaged."""
        self.ranks.make_alike(buffer for norm in self.norms for buffer in norm.buffers())

    def _keep_if_best(self, loss: float) -> None:
        """Keeps the weights, in the output too, if no loss on the validation's pairs was lower."""
        if self.best is None or loss < self.best:
            self.best, self.best_weights = loss, merged_state(self.model)
            output = self.output
            if output:
                self.ranks.first(lambda: save_weights(self.best_weights, self.model, output))

    def save(self) -> None:
        """Writes the checkpoint."""
        assert self.checkpoint is not None
        state = {"step": self.step, "best": self.best, "settings": self.settings}
        save_checkpoint(self.checkpoint, self.model, self.optimizer, self.scaler, state)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        assert self.checkpoint is not None and self.output is not None
        if os.path.exists(self.checkpoint):
            state = resume_checkpoint(
                self.checkpoint, self.model, self.optimizer, self.trained, self.scaler, self.settings
            )
            self.step, self.best = state["step"], state.get("best")
        if self.best is not None:  # the output has these weights
            self.best_weights = load(self.output)[0].state_dict()

    def finish(self) -> None:
        """Gives the model the best weights, writes the output and deletes the checkpoint."""
        self._agree()
        if self.best_weights:
            self.model.set_state_dict(self.best_weights)
        self.ranks.first(self._write)

    def _write(self) -> None:
        if self.output and self.checkpoint:
            save(self.model, self.output)
            if os.path.exists(self.checkpoint):
                os.unlink(self.checkpoint)


class _Lazy:
    """A sequence that makes its items when they are read."""

    def __init__(self, length: int, item: Callable[[int], Any]):
        self.length, self.item = length, item

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def _drawn(
    pairs: Sequence[tuple[Any, str]], steps: int, pairs_of_rank: int, seed: Optional[int], ranks: Ranks
) -> _Lazy:
    """The pairs of all steps that this process takes, one after the other; without a seed in their own order.

    All processes together draw what one process with a batch of that size draws; each takes its slice of every batch.
    """
    pairs_of_step = pairs_of_rank * ranks.count
    pairs_of_epoch = len(pairs) // pairs_of_step * pairs_of_step

    def pair(index: int) -> tuple[Any, str]:
        epoch, place = divmod(slice_of(index, ranks.rank, pairs_of_rank, ranks.count), pairs_of_epoch)
        if seed is None:
            return pairs[place]
        order = pairs.order if isinstance(pairs, ShardPairs) else functools.partial(_order, len(pairs))
        return pairs[order(seed, epoch)[place]]

    return _Lazy(steps * pairs_of_rank, pair)


@functools.lru_cache(2)  # batches that are read ahead may belong to the next epoch
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes the pairs."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


# ----------------------------------------------------------------------------------------------------------- one step


def _trained_norms(model: CLIP) -> list[BatchNorm2D]:
    norms = (layer for layer in model.sublayers() if isinstance(layer, BatchNorm2D))
    return [norm for norm in norms if norm.weight is not None and not norm.weight.stop_gradient]


@contextlib.contextmanager
def _in_training(norms: Sequence[BatchNorm2D]) -> Iterator[None]:
    """Has batch norms take the statistics of what goes through them while the block lasts."""
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()


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
    require_dynamic_mode()
    for name in ("epochs", "batch_size", "accumulate"):
        _require(settings[name] >= 1, name, settings[name], "it must be at least 1")
    _require(save_every is None or save_every >= 1, "save_every", save_every, "it must be at least 1")
    _require(settings["learning_rate"] > 0, "learning_rate", settings["learning_rate"], "it must be above 0")
    for name in ("weight_decay", "seed"):
        _require(settings[name] >= 0, name, settings[name], "it must be at least 0")
    clip_norm, warmup = settings["clip_norm"], settings["warmup"]
    _require(clip_norm is None or clip_norm > 0, "clip_norm", clip_norm, "it must be above 0, or None for no limit")
    _require(0 <= warmup <= 1, "warmup", warmup, "it must be a share of all steps, between 0 and 1")
    amp, lora = settings["amp"], settings["lora"]
    _require(lora is None or lora >= 1, "lora", lora, "it is a rank, at least 1, or None")
    if amp is not None and amp not in HALF_DTYPES:
        raise ValueError(f"amp is {amp!r}; choose one of {', '.join(HALF_DTYPES)}, or None")
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
        require_output(output)
    if checkpoint and os.path.exists(checkpoint) and not resume:
        raise ValueError(
            f"{checkpoint} is of an unfinished training: give resume=True to continue, or delete the file to start anew"
        )


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}; {rule}")


def _digest(pairs: Sequence[tuple[Any, str]]) -> str:
    if isinstance(pairs, ShardPairs):
        return pairs.digest()
    digest = hashlib.sha256()
    for row, pair in enumerate(pairs):
        image, caption = _sound_pair(row, pair)
        name = os.path.basename(image) if isinstance(image, (str, os.PathLike)) else ""
        digest.update(f"{name}\0{caption}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digest_of_weights(model: CLIP) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return f"SHA-256 {digest.hexdigest()}"


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
