"""Converts Paddle weights back for PyTorch: `python convert/paddle2pt.py RN50.pdparams` writes RN50.pt.

The result is a plain state dict that OpenAI's `build_model` and `torch.load(weights_only=True)` take. Needs neither
framework.
"""

import argparse
import os
import signal
import sys
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed" is no news here

from paddle_clip.commands import describe_conversion, each, progress, require_different_outputs
from paddle_clip.converter import DTYPES, convert
from paddle_clip.presets import ACTIVATIONS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .pdparams or .safetensors file")
    parser.add_argument("-o", "--output", help="file to write, ending in .pt (default: FILE with that extension)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="of the result: keep (default) each tensor's, published: OpenAI's mix of float16 and float32",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of the model, where the file does not tell")
    parser.set_defaults(refuse=parser.error)
    arguments = parser.parse_args()
    require_different_outputs(arguments)
    if arguments.output and not arguments.output.endswith(".pt"):
        parser.error("-o must end in .pt; pt2paddle.py writes the other forms")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def converted(file):
        output = arguments.output or os.path.splitext(file)[0] + ".pt"
        if not arguments.output and os.path.lexists(output):  # perhaps the very file this one was made of
            raise ValueError(f"{output} is there already; name the output with -o, which may replace it")
        report = convert(file, output, arguments.dtype, arguments.activation, progress)
        return describe_conversion(file, report)

    return each(arguments.files, converted)


if __name__ == "__main__":
    sys.exit(main())
