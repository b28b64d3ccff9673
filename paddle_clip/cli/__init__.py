"""The command line `paddle-clip`: a file for each family of commands, with its arguments and what it does.

Nothing here imports numpy or Paddle before a command runs: help answers at once. Nobody outside imports this package.
"""

from .main import console, main

__all__ = ["console", "main"]
