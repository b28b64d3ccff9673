"""What test_distributed.py runs in several processes: python ranks.py FOLDER, started by paddle.distributed.launch.

Every case is a function that writes what it found to FOLDER, or returns the message of what stopped it.
"""

import dataclasses
import itertools
import json
import os
import sys

import numpy as np

sys.path[:0] = [
    os.path.dirname(os.path.abspath(__file__)),
    os.path.join(os.path.dirname(__file__), os.pardir, os.pardir),
]

import paddle_clip  # isort: skip  before paddle, see extras.ZLIB_IS_BROKEN
import paddle

from paddle_clip import ContrastiveLoss, cli, finetune, presets, training
from paddle_clip.distributed import Ranks, join

BATCH = 8  # of all processes together
CASES = list(itertools.product(("resnet", "vit"), (1, 2), (None, "image", "text")))
SMALL = {
    "vit": presets.CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1, 12),
    "resnet": presets.CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 1, 12),
}


def gradients(variant, accumulate, freeze, ranks):
    """The gradients in float64 of one batch of all processes: {name: array}, and the loss."""
    paddle.seed(1)
    config = dataclasses.replace(SMALL[variant], vocab_size=200)
    model = presets.build(config).to(dtype="float64")
    model.eval()
    random = np.random.default_rng(0)
    images = random.normal(size=[BATCH, 3, config.image_resolution, config.image_resolution])
    tokens = random.integers(1, config.vocab_size, [BATCH, config.context_length])
    size = BATCH // ranks.count // accumulate
    first = ranks.rank * size * accumulate
    starts = range(first, first + size * accumulate, size)
    parts = [tuple(paddle.to_tensor(of[start : start + size]) for of in (images, tokens)) for start in starts]
    loss = training.backward(model, ContrastiveLoss(), parts, freeze, ranks=ranks)
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": np.float64(loss), **found}


def pairs():
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, [32, 32, 3], dtype=np.uint8), f"thing number {index}") for index in range(27)]


def trained(variant, ranks, accumulate=2, output=None, **arguments):
    """A model after ten steps of AdamW, or as many as `epochs` takes, and the history."""
    paddle.seed(1 + ranks.rank)  # the first process's weights are everybody's
    model = presets.build(SMALL[variant])
    given = arguments.pop("pairs", pairs())
    arguments = {"epochs": 4, "learning_rate": 1e-3, "clip_norm": 1.0, **arguments}  # 3 steps in an epoch
    size = BATCH // ranks.count // accumulate
    history = finetune(model, given, output, batch_size=size, accumulate=accumulate, **arguments)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, history


class Killed(BaseException):
    """An end as sudden as a signal's."""


def interrupted(ranks, output):
    """A training that stops on all processes after the checkpoint of its second step."""
    ends = itertools.count(1)
    step = training._step

    def stopping(*arguments):
        if next(ends) > 2:
            raise Killed
        return step(*arguments)

    training._step = stopping
    try:
        trained("vit", ranks, output=output, save_every=2)
    except Killed:
        pass
    finally:
        training._step = step


def message_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def command(folder):
    """The exit codes of the command, for pairs it can train on and for damaged ones."""
    codes = []
    for name, paths in (("whole", paddle_clip.samples()), ("damaged", ["broken.png"] * 8)):
        table = os.path.join(folder, f"{name}{os.getpid()}.csv")
        with open(table, "w", encoding="utf-8") as file:
            file.write("image,caption\n" + "".join(f"{path},picture {index}\n" for index, path in enumerate(paths)))
        size = str(BATCH // int(os.environ["PADDLE_TRAINERS_NUM"]))
        output = os.path.join(folder, "tiny.pdparams")
        codes.append(cli.main(["finetune", table, "-o", output, "--model", "tiny", "--batch-size", size]))
    return codes


def sliced(self, rows):
    """A gather that forgets the others' rows."""
    return paddle.concat([rows] * self.count)


def main(folder):
    ranks = join()
    found = {}
    for case in CASES:
        for name, array in gradients(*case, ranks).items():
            found["/".join(map(str, (*case, name)))] = array
    for variant in SMALL:
        weights, history = trained(variant, ranks)
        for name, array in weights.items():
            found[f"trained/{variant}/{name}"] = array
        found[f"losses/{variant}"] = np.array([step.loss for step in history])
    if "--more" in sys.argv:
        more(folder, ranks, found)
    np.savez(os.path.join(folder, f"{ranks.rank}.npz"), **found)


def more(folder, ranks, found):
    """A wrong gather, a resumption, what stops a training, and the command."""
    gather, Ranks.gather = Ranks.gather, sliced
    for name, array in gradients("vit", 1, None, ranks).items():
        found[f"sliced/{name}"] = array
    Ranks.gather = gather

    weights, _ = trained("resnet", ranks, epochs=1, train_norms=True)
    for name, array in weights.items():
        found[f"norms/{name}"] = array

    told, steps = {}, []
    output = os.path.join(folder, "same.pdparams")
    interrupted(ranks, output)
    weights, history = trained("vit", ranks, output=output, save_every=2, resume=True, on_step=steps.append)
    told["resumed at"], told["calls of on_step"] = history[0].step, len(steps)
    for name, array in weights.items():
        found[f"resumed/{name}"] = array
    interrupted(ranks, os.path.join(folder, "other.pdparams"))

    damaged = pairs()
    damaged[training._order(len(damaged), 0, 0)[BATCH - 1]] = (
        os.path.join(folder, "broken.png"),
        "of the last process",
    )
    told["damaged"] = message_of(trained, "vit", ranks, pairs=damaged)
    told["other arguments"] = message_of(trained, "vit", ranks, learning_rate=1e-3 * (1 + ranks.rank))
    told["output"] = message_of(trained, "vit", ranks, output=os.path.join(folder, f"{'none/' * ranks.rank}x.pdparams"))
    told["command"] = command(folder)
    with open(os.path.join(folder, f"{ranks.rank}.json"), "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(sys.argv[1])
