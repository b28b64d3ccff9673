"""The command line `paddle-clip`: what can be asked, and what an error looks like. `commands` does what is asked.

Nothing here imports numpy or Paddle: help answers at once.
"""

import argparse
import os
import signal
import sys
import warnings

from . import _NO_PADDLE, __version__
from .presets import ACTIVATIONS

DEFAULT_MODEL = "ViT-B/32"
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows does not have
# What messages written for Python say, and what does the same here.
OPTIONS = {
    "on_error='skip'": "--skip-damaged",
    "resume=False": "--restart",
    "dtype='float32'": "--dtype float32",
    "paddle.set_device('gpu')": "--device gpu",
    "clip_norm=1": "--clip-norm 1",
}
# What libraries raise for input they cannot use. Anything else is a fault of ours and shows its traceback.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)


def main(argv=None):
    """Runs one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 after one line that says what is wrong, 130 after an interruption, 141 where nobody reads
        the output any more. Arguments that argparse refuses raise `SystemExit` with 2, and `--help` with 0.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if _NO_PADDLE and arguments.run not in ("models", "convert"):
                raise ImportError(_NO_PADDLE)
            from . import commands

            code = getattr(commands, arguments.run)(arguments)
            sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            return PIPE_CLOSED
        except KeyboardInterrupt:
            print(f"error: interrupted{arguments.after_interruption}", file=sys.stderr)
            return INTERRUPTED
        except ERRORS as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 1


def console():
    """The program `paddle-clip`, with a process to itself."""
    os.environ.setdefault("GLOG_minloglevel", "2")  # no chatter of Paddle's on standard error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written is deleted then, too
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # file names that are no text are written as they are
    sys.exit(main())


def one_line(error):
    """The message of an exception, in one line, with options where it names arguments."""
    if isinstance(error, OSError) and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    for python, option in OPTIONS.items():
        text = text.replace(python, option)
    return text


def _show_warning(message, category, filename, lineno, file=None, line=None):
    """One line for warnings of our own; those of the libraries beneath are none of the user's business."""
    if os.path.dirname(filename) == os.path.dirname(__file__):
        print(f"warning: {one_line(message)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def build_parser():
    """The parser of everything `paddle-clip` takes."""
    parser = _Parser(
        prog="paddle-clip",
        description="OpenAI's CLIP on PaddlePaddle.",
        epilog="paddle-clip COMMAND --help shows the command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"paddle-clip {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, help, examples, after_interruption=""):
        child = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        child.set_defaults(run=name, after_interruption=after_interruption)
        return child

    child = add("models", "list the models", ["paddle-clip models", "paddle-clip models --json"])
    _add_json(child)

    child = add(
        "convert",
        "convert checkpoints of PyTorch and others to Paddle weights, or back",
        [
            "paddle-clip convert RN50.pt                     # writes RN50.pdparams",
            "paddle-clip convert RN50.pt --check             # tells what it is and writes nothing",
            "paddle-clip convert RN50.pdparams -o back.pt --dtype published",
        ],
    )
    add_convert_arguments(child)
    _add_json(child)

    child = add(
        "classify",
        "tell which of some labels fits an image best",
        [
            "paddle-clip classify photo.jpg --labels dog cat horse",
            "paddle-clip classify photos/ --prompts imagenet --top-k 3 --json",
            "paddle-clip classify @samples --labels 'red circle' 'blue star' --model tiny    # offline",
        ],
    )
    _add_images(child)
    _add_labels(child)
    child.add_argument("--top-k", type=int, default=5, metavar="K", help="labels shown of each image (default: 5)")
    _add_batch_size(child)
    _add_model(child)
    _add_json(child)

    child = add(
        "similarity",
        "show the cosine similarity of each image with each text",
        [
            "paddle-clip similarity a.jpg b.jpg --texts 'a dog on a beach' 'a bowl of soup'",
            "paddle-clip similarity photos/ --texts-file captions.txt --json",
            "paddle-clip similarity @samples --model tiny --plot similarity.png    # offline",
        ],
    )
    _add_images(child)
    child.add_argument("--texts", nargs="+", metavar="TEXT", default=[], help="(default: the images' names)")
    child.add_argument("--texts-file", metavar="FILE", help="a file with one text per line")
    child.add_argument("--plot", metavar="FILE", help="draw the matrix to a .png, .pdf or .svg; needs matplotlib")
    _add_batch_size(child)
    _add_model(child)
    _add_json(child)

    child = add(
        "embed",
        "compute the features of images and write them to a file",
        [
            "paddle-clip embed photos/ -o photos.npy         # and photos.json with their paths",
            "paddle-clip embed photos/ -o photos.parquet --skip-damaged",
        ],
        after_interruption="; run it again as it was to go on from there",
    )
    _add_images(child)
    child.add_argument("-o", "--output", metavar="FILE", required=True, help="file to write, .npy or .parquet")
    child.add_argument("--skip-damaged", action="store_true", help="leave out images that cannot be read")
    child.add_argument("--restart", action="store_true", help="start anew where an earlier run was interrupted")
    child.add_argument("--raw", action="store_true", help="do not normalise the features")
    _add_batch_size(child)
    _add_workers(child)
    _add_model(child)
    _add_json(child)

    child = add(
        "search",
        "find the images nearest to a text or an image, among features of `embed`",
        [
            "paddle-clip search photos.npy 'a dog on a beach'",
            "paddle-clip search photos.npy --image dog.jpg --top-k 3",
        ],
    )
    child.add_argument("features", metavar="FEATURES", help="a file that `paddle-clip embed` wrote")
    query = child.add_mutually_exclusive_group(required=True)
    query.add_argument("text", metavar="TEXT", nargs="?", help="what to look for")
    query.add_argument("--image", metavar="FILE", help="an image to look for the like of")
    child.add_argument("--top-k", type=int, default=10, metavar="K", help="images shown (default: 10)")
    _add_model(child)
    _add_json(child)

    child = add(
        "evaluate",
        "measure zero-shot accuracy on a folder with one folder of images per class",
        [
            "paddle-clip evaluate imagenet/val --prompts imagenet",
            "paddle-clip evaluate animals/ --template 'a photo of a {}, a type of animal.'",
        ],
    )
    child.add_argument("folder", metavar="FOLDER", help="its folders, sorted, are the classes")
    _add_labels(child, "class names in the order of the sorted folders; by default the folders' names")
    child.add_argument("--skip-damaged", action="store_true", help="leave out images that cannot be read")
    _add_batch_size(child)
    _add_workers(child)
    _add_model(child)
    _add_json(child)

    child = add(
        "probe",
        "fit a linear probe on features of labelled images; needs scikit-learn",
        [
            "paddle-clip probe animals/train --test animals/test",
            "paddle-clip probe animals/train --C 0.316 -o animals.npz",
        ],
    )
    child.add_argument("train", metavar="TRAIN", help="a folder with one folder of images per class")
    child.add_argument("--test", metavar="FOLDER", help="the like, to measure accuracy on")
    child.add_argument("-o", "--output", metavar="FILE", help="write the probe to this .npz")
    child.add_argument(
        "--C", type=float, metavar="C", help="inverse regularisation (default: chosen on held-out images)"
    )
    _add_batch_size(child)
    _add_workers(child)
    _add_model(child)
    _add_json(child)

    child = add(
        "finetune",
        "train a model further on images and captions",
        [
            "paddle-clip finetune captions.csv -o mine.pdparams --epochs 5",
            "paddle-clip finetune flowers/ --template 'a photo of a {}, a type of flower.' -o flowers.pdparams",
            "paddle-clip finetune captions.csv -o mine.pdparams --epochs 5 --resume",
        ],
        after_interruption="; run it again with --resume to go on from the last checkpoint",
    )
    _add_finetune(child)
    _add_model(child, dtype=False)
    _add_json(child, "print one line of JSON per step")

    child = add(
        "export",
        "write a model for deployment without its Python code",
        ["paddle-clip export vit-b-32/", "paddle-clip export mine/ --model mine.pdparams --openvino"],
    )
    child.add_argument("output", metavar="DIRECTORY", help="folder to write")
    child.add_argument("--onnx", action="store_true", help="write ONNX files too, for ONNX Runtime and TensorRT")
    child.add_argument("--openvino", action="store_true", help="write OpenVINO's files too, which are faster on a CPU")
    _add_model(child)
    _add_json(child)

    child = add(
        "bench",
        "time both encoders, on texts of 7 tokens, as they are and compiled",
        ["paddle-clip bench", "paddle-clip bench --model tiny --batch-size 1 32 --threads 2"],
    )
    child.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="(default: 1 8)")
    child.add_argument("--repeat", type=int, default=10, metavar="N", help="runs, whose median counts (default: 10)")
    child.add_argument("--threads", type=int, metavar="N", help="threads of the compiled model")
    _add_model(child)
    _add_json(child)
    return parser


def add_convert_arguments(parser):
    """What the command `convert` and the script convert/pt2paddle.py both take."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a checkpoint of OpenAI, open_clip, Hugging Face, paddleclip 1.0 or paddle_clip, told by its content",
    )
    parser.add_argument(
        "-o", "--output", help="file to write, by extension .pdparams (default), .safetensors or .pt (for PyTorch)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the result: float32 (default), float16, bfloat16, published (OpenAI's mix of both) or keep",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of the model, where the file does not tell")
    parser.add_argument("--check", action="store_true", help="report on the files and write nothing")
    parser.set_defaults(refuse=parser.error)


def _add_finetune(parser):
    parser.add_argument(
        "pairs",
        metavar="PAIRS",
        help="a CSV file with the columns image and caption; or a folder of images, each with a .txt of its name; or a "
        "folder with one folder of images per class",
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file for the trained weights")
    parser.add_argument("--template", default="a photo of a {}.", help="caption of a class (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the pairs (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs at once (default: 64)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="such batches to a step (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, metavar="X", help="its peak (default: 1e-5)")
    parser.add_argument("--warmup", type=float, default=0.1, metavar="X", help="part of all steps (default: 0.1)")
    parser.add_argument("--weight-decay", type=float, default=0.2, metavar="X", help="of matrices (default: 0.2)")
    parser.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of the gradients")
    parser.add_argument("--freeze", choices=("image", "text"), help="the tower that is not trained")
    parser.add_argument("--amp", choices=("float16", "bfloat16"), help="mixed precision, on a GPU")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the pairs (default: 0)")
    parser.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: an epoch)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--logdir", metavar="FOLDER", help="folder for VisualDL's log; needs visualdl")
    _add_workers(parser)


def _add_images(parser):
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, or @samples: the pictures that come with the model tiny",
    )


def _add_labels(parser, what="labels"):
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", nargs="+", metavar="LABEL", help=what)
    labels.add_argument("--labels-file", metavar="FILE", help="a file with one of them per line")
    labels.add_argument("--prompts", metavar="DATASET", help="class names and templates of the paper, such as imagenet")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="text with {} for the label, 'a photo of a {}.' by default; several times for several, which are averaged",
    )


def _add_batch_size(parser):
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")


def _add_workers(parser):
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that read images (default: one per core, up to 8)"
    )


def _add_model(parser, dtype=True):
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|FILE",
        help="of `paddle-clip models`, which is downloaded once; or a checkpoint (default: %(default)s)",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of the model, where a checkpoint does not tell")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, gpu or gpu:1 (default: a GPU, if Paddle can use it)")
    if dtype:
        parser.add_argument(
            "--dtype", default="float32", help="float32 (default), float64, or on a GPU float16 or bfloat16"
        )


def _add_json(parser, help="print JSON"):
    parser.add_argument("--json", action="store_true", help=help)
