"""Runs commands on full disks, in read-only folders, and two at once: `python tests/tools/unkind.py [COMMAND …]`.

It takes root, who may mount a disk in memory of any size. A command ends with exit code 1 and one line that says why;
what was there before stays, and nothing else but what a command keeps to go on from. Of two at once, one at least must
succeed, and the output be whole. Otherwise the script exits 1.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from commands import COMMANDS, outcome, prepare, start
from kill import finish, results

SHARES = (0, 0.05, 0.3, 0.6, 0.95)  # of the space that a command needs
TWICE = 4  # times that two are run at once
KEPT = ("embed", "embed-parquet", "finetune")  # they go on from what they leave
CAUSES = ("No space left on device", "Read-only file system", "cannot be written to", "another process")


@contextlib.contextmanager
def disk(folder, options):
    """A disk in memory, as a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def failure(running, folder):
    """The one line of a command that fails; None if it succeeds."""
    code, errors = outcome(running, folder)
    if code == 0:
        return None
    assert code == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors[-2000:]
    assert any(cause in errors for cause in CAUSES), errors
    return errors


def required_space(command, folder):
    """The most bytes that a command takes on a disk, in whole pages, and what it makes."""
    most, out = 0, folder / "out"
    with disk(out, "size=1g"):
        running = start(command, folder)
        while running.is_alive():
            space = os.statvfs(out)
            most = max(most, (space.f_blocks - space.f_bfree) * space.f_frsize)
            time.sleep(0.001)
        finish(running, folder)
        return most, results(out)


def put_before(command, out):
    """Puts something small where the outputs will be."""
    for name in command.outputs:
        if "." in name:
            (out / name).write_bytes(b"from before")
        else:
            (out / name).mkdir()
    return results(out)


def full_disks(name, folder, found):
    """A command on disks of all sizes that are too small for it; on half of them there is something already."""
    command, out = COMMANDS[name], folder / "out"
    most, complete = required_space(command, folder)
    for share in SHARES:
        for is_there in (False, True):
            with disk(out, f"size={max(8192, int(most * share))}"):
                before = put_before(command, out) if is_there else {}
                error = failure(start(command, folder), folder)
                if error is None:
                    assert results(out) == complete
                    found["done, as it needed less"] += 1
                    continue
                left = {file for file in os.listdir(out) if file not in before}
                assert not left or name in KEPT, f"left behind: {left}"
                now = results(out)
                now.pop(command.kept, None)
                assert now == before, "what was there before has changed"
                found["disk full: one line"] += 1


def read_only(name, folder, found):
    with disk(folder / "out", "ro"):
        assert failure(start(COMMANDS[name], folder), folder) is not None
        found["read-only: one line"] += 1


def two_at_once(name, folder, found):
    command, out = COMMANDS[name], folder / "out"
    with disk(out, "size=1g"):
        finish(start(command, folder), folder)
        complete = results(out)
    for _ in range(TWICE):
        with disk(out, "size=1g"):
            errors = [failure(running, folder) for running in [start(command, folder), start(command, folder)]]
            assert None in errors, errors
            found["both succeed" if errors == [None, None] else "one is told of the other"] += 1
            assert results(out) == complete and set(os.listdir(out)) == set(complete), os.listdir(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; by default all")
    for name in parser.parse_args().commands or COMMANDS:
        found = collections.Counter()
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            prepare(folder)
            for situation in (full_disks, read_only, two_at_once):
                situation(name, folder, found)
        print(f"{name}: " + ", ".join(f"{number} {what}" for what, number in found.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
