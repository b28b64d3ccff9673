"""`python presets.py` prints the nine presets; `from presets import clip_rn50` works beside a clone."""

from paddle_clip.presets import *  # noqa: F403
from paddle_clip.presets import table

if __name__ == "__main__":
    print(table())
