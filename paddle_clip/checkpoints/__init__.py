"""Reads checkpoint files as {name: array} under our names, and writes them, with neither Paddle nor torch.

`files` maps, checks and replaces files. `pickles` reads pickles as data, `torch_files` reads PyTorch's files, `reading`
recognises every form. `casting` converts dtypes, `writing` writes files. `finding` finds the models in a file,
`dialects` translates the names other programs give to CLIP's weights. `shapes` derives a model's sizes from the
weights, `positions` resizes its image positions. `conversion` joins them for `convert`.
"""

from .dialects import to_openai, to_paddle
from .shapes import config_from_shapes, parameter_shapes

__all__ = ["config_from_shapes", "parameter_shapes", "to_openai", "to_paddle"]
