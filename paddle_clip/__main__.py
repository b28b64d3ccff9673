"""`python -m paddle_clip` is `paddle-clip`."""

from .cli import console

if __name__ == "__main__":
    console()
