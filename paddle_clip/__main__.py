"""`python -m paddle_clip` is `paddle-clip`."""

from .cli import console

console()
