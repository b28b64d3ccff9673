"""Checkpoint files -> {name: array} under our names, and back, with neither Paddle nor torch.

`files` maps, checks and replaces files. `pickles` reads pickles as data, `torch_files` PyTorch's files, `reading` all
forms there are. `casting` has the dtypes, `writing` the forms we write. `dialects` has the names other programs give to
CLIP's weights, `shapes` the sizes those weights tell. `conversion` joins them: it is what `paddle_clip.convert` does.
"""

from .dialects import to_openai, to_paddle
from .shapes import config_from_shapes, parameter_shapes

__all__ = ["config_from_shapes", "parameter_shapes", "to_openai", "to_paddle"]
