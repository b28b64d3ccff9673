"""`paddle-clip finetune`."""

import argparse
import json
from typing import TYPE_CHECKING

from ..defaults import ACCUMULATE, BATCH_SIZE, EPOCHS, LEARNING_RATE, SEED, TEMPLATE, WARMUP, WEIGHT_DECAY
from .messages import retrieval_in_words
from .shared import Parser, add_command, add_json, add_model, add_workers, load_model

if TYPE_CHECKING:
    from ..model import CLIP
    from ..training import Step
    from ..transforms import ImageTransform
    from .shared import Commands

# Options that `training.finetune` takes under the same names.
SETTINGS = (
    "epochs",
    "batch_size",
    "accumulate",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip_norm",
    "freeze",
    "lora",
    "unfreeze",
    "recompute",
    "amp",
    "seed",
    "shuffle",
    "save_every",
    "resume",
    "logdir",
    "plot",
    "workers",
)


def add_finetune(commands: "Commands") -> None:
    """Adds the command `finetune`."""
    parser = add_command(
        commands,
        finetune,
        "train a model further on images and captions",
        [
            "captions.csv -o mine.pdparams --epochs 5",
            "flowers/ --template 'a photo of a {}, a type of flower.' -o flowers.pdparams",
            "captions.csv -o mine.pdparams --epochs 5 --resume",
            "captions.csv -o new.pdparams --from-scratch --learning-rate 5e-4 --epochs 32",
            "'shards/{00000..00331}.tar' -o mine.pdparams --batch-size 256",
        ],
        after_interruption="; run it again with --resume to go on from the last checkpoint",
    )
    parser.add_argument(
        "pairs",
        nargs="+",
        metavar="PAIRS",
        help="a table with the columns image and caption: .csv, .jsonl or .parquet; a folder of images, each with a "
        ".txt of its name; a folder with one folder of images per class; or tar shards, by files, patterns or folder",
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file for the trained weights")
    parser.add_argument(
        "--validation",
        metavar="PAIRS",
        help="pairs to measure loss and recall on after each epoch; the weights with the lowest loss are kept",
    )
    parser.add_argument("--template", default=TEMPLATE, help="caption of a class (default: %(default)s)")
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images (default: image, filepath or file_name)"
    )
    parser.add_argument(
        "--caption-column", metavar="NAME", help="column of the captions (default: caption, title or text)"
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="begin with random weights, in the sizes of a model by name"
    )
    _add_settings(parser)
    add_workers(parser)
    add_model(parser, dtype=False)
    add_json(parser, "print one line of JSON per step")


def _add_settings(parser: Parser) -> None:
    def add(name: str, kind: type, metavar: str, help: str, default: object = None) -> None:
        shown = f"{help} (default: %(default)s)" if default is not None else help
        parser.add_argument(name, type=kind, metavar=metavar, default=default, help=shown)

    add("--epochs", int, "N", "passes over the pairs", EPOCHS)
    add("--batch-size", int, "N", f"pairs at once (default: {BATCH_SIZE}, or all if there are fewer)")
    add("--accumulate", int, "N", "batches that make one step together", ACCUMULATE)
    add("--learning-rate", float, "X", "highest learning rate", LEARNING_RATE)
    add("--warmup", float, "X", "part of all steps over which the learning rate rises", WARMUP)
    add("--weight-decay", float, "X", "weight decay of matrices", WEIGHT_DECAY)
    add("--clip-norm", float, "X", "largest norm of the gradients (default: no limit)")
    parser.add_argument(
        "--freeze", nargs="+", metavar="NAME", help="what is not trained: image or text for a tower, or names of layers"
    )
    add("--lora", int, "RANK", "train what LoRA adds to the weights, which forgets less; with a higher learning rate")
    parser.add_argument(
        "--unfreeze",
        nargs="+",
        metavar="NAME",
        default=(),
        help="what is trained nevertheless: for words that are new, token_embedding",
    )
    parser.add_argument(
        "--recompute", action="store_true", help="compute blocks twice, in the memory of one block's gradients"
    )
    parser.add_argument("--amp", choices=("float16", "bfloat16"), help="mixed precision, on a GPU")
    add("--seed", int, "N", "number that tells the order of the pairs", SEED)
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the pairs in an order of its own in each epoch (default: --shuffle)",
    )
    add("--save-every", int, "N", "steps between checkpoints (default: an epoch)")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="go on from the checkpoint, if there is one (default: --no-resume)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the loss to a .png, .pdf or .svg; needs matplotlib")
    parser.add_argument("--logdir", metavar="FOLDER", help="folder for VisualDL's log; needs visualdl")


def _random_model(arguments: argparse.Namespace) -> "tuple[CLIP, ImageTransform]":
    """A model of the sizes of --model with random weights, drawn from the seed, and its preprocessing."""
    import paddle

    from ..presets import build, preset
    from ..transforms import image_transform

    config = preset(arguments.model).config
    if arguments.device:
        paddle.set_device(arguments.device)
    paddle.seed(arguments.seed)
    model = build(config)
    return model, image_transform(config.image_resolution, *model.preprocessing)


def finetune(arguments: argparse.Namespace) -> None:
    """Trains a model and prints the loss."""
    from ..checkpoints.writing import require_output
    from ..pairs import read_pairs

    columns = (arguments.template, arguments.image_column, arguments.caption_column)
    sources = arguments.pairs
    pairs = read_pairs(sources[0] if len(sources) == 1 else sources, *columns)
    validation = read_pairs(arguments.validation, *columns) if arguments.validation else None
    require_output(arguments.output)
    model, preprocess = _random_model(arguments) if arguments.from_scratch else load_model(arguments)

    from tqdm import tqdm

    from .. import training
    from ..distributed import join

    is_first = join().rank == 0  # of the processes that a launcher started, the one that prints
    steps: list[Step] = []

    def on_step(step: "Step") -> None:
        steps.append(step)
        bar.total, bar.initial = step.steps, steps[0].step - 1
        bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
        bar.update(step.step - bar.n)
        if arguments.json:
            found = step.validation._asdict() if step.validation else None
            print(json.dumps({**step._asdict(), "validation": found}), flush=True)
        elif len(steps) > 1 and step.epoch > steps[-2].epoch:
            print_loss(steps[-2])

    def print_loss(step: "Step") -> None:
        with bar.external_write_mode():
            print(f"epoch {step.epoch}, step {step.step} of {step.steps}: loss {step.loss:.4f}", flush=True)
            if step.validation:
                print(f"  validation: {retrieval_in_words(step.validation)}", flush=True)

    settings = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    settings["train_norms"] = arguments.from_scratch  # whose norms have no statistics yet
    with tqdm(unit="step", disable=None if is_first else True) as bar:
        training.finetune(
            model, pairs, arguments.output, preprocess=preprocess, validation=validation, on_step=on_step, **settings
        )
        if steps and not arguments.json:
            print_loss(steps[-1])
    if is_first and not arguments.json:
        print(f"{arguments.output}: trained on {len(pairs):,} pairs")
