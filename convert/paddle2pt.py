"""Converts Paddle weights back for PyTorch: `python convert/paddle2pt.py RN50.pdparams` writes RN50.pt.

The result is a plain state dict that OpenAI's `build_model` and `torch.load(weights_only=True)` take. The
script needs neither framework.
"""

import argparse
import os
import signal
import sys
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed" does not matter here

from paddle_clip.checkpoints.conversion import TARGET_DTYPES, convert
from paddle_clip.cli.conversion import describe_conversion, for_each, progress, require_different_outputs
from paddle_clip.cli.shared import add_activation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .pdparams or .safetensors file")
    parser.add_argument("-o", "--output", help="file to write, ending in .pt (default: FILE with that extension)")
    parser.add_argument(
        "--dtype",
        choices=TARGET_DTYPES,
        default="keep",
        help="dtype of the output: keep (default) for each tensor's, published for OpenAI's mix of float16 and float32",
    )
    add_activation(parser)
    parser.set_defaults(parser=parser)
    arguments = parser.parse_args()
    require_different_outputs(arguments)
    if arguments.output and not arguments.output.endswith(".pt"):
        parser.error("-o must end in .pt; pt2paddle.py writes the other forms")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work(file: str) -> str:
        output = arguments.output or os.path.splitext(file)[0] + ".pt"
        if not arguments.output and os.path.lexists(output):  # it may be the file that this one was converted from
            raise ValueError(f"{output} exists; name the output with -o to replace it")
        report = convert(file, output, arguments.dtype, arguments.activation, progress)
        return describe_conversion(file, report)

    return for_each(arguments.files, work, parser)


if __name__ == "__main__":
    sys.exit(main())
