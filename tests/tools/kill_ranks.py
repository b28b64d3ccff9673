"""Kills what works in several processes: `python tests/tools/kill_ranks.py rank launcher actor node [--count 8]`.

Of a training of two processes, one of them or their launcher is killed; of an embedding on a Ray cluster of two nodes,
both on this machine, an actor or a node: at random moments, by SIGKILL. A minute later at most, no process of the
training may be left, and the embedding must be done. No file under a final name may be incomplete. The training that is
resumed, and the embedding, must give what they give if nobody kills them. Otherwise the script exits 1.
"""

import argparse
import collections
import contextlib
import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import numpy as np
from PIL import Image

import paddle_clip
from paddle_clip.checkpoints.files import sha256

MINUTE = 60
COMMAND = "import sys\nfrom paddle_clip.cli import main\nsys.exit(main())\n"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": ROOT,
    "GLOG_minloglevel": "2",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


def of_process(pid, what):
    """What /proc tells of a process; "" if there is none."""
    try:
        with open(f"/proc/{pid}/{what}") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def runs(pid):
    return of_process(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def children(pid):
    return [int(child) for child in of_process(pid, f"task/{pid}/children").split()]


def wait_until(condition, complaint):
    """Waits until something holds, a minute at most, and returns the seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < MINUTE, complaint
        time.sleep(0.05)
    return time.monotonic() - start


class Command:
    """A command that is run again and again in a folder."""

    def __init__(self, folder, launcher, *arguments):
        self.folder = folder
        script = os.path.join(folder, "command.py")
        with open(script, "w") as file:
            file.write(COMMAND)
        self.line = [sys.executable, *launcher, script, *arguments]

    def start(self):
        with open(os.path.join(self.folder, "said"), "w") as said:
            return subprocess.Popen(self.line, cwd=self.folder, env=ENVIRONMENT, stdout=said, stderr=said)

    def end(self, running, seconds):
        """Waits for the end of a run that must succeed."""
        try:
            code = running.wait(seconds)
        finally:
            running.kill()
        with open(os.path.join(self.folder, "said")) as said:
            assert code == 0, said.read()

    def seconds(self):
        """How long a run takes that nobody kills."""
        start = time.monotonic()
        self.end(self.start(), 10 * MINUTE)
        return time.monotonic() - start


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """A training of two processes, with a checkpoint after every step."""

    def __init__(self, folder):
        self.folder, self.moments = folder, random.Random(0)
        os.mkdir(os.path.join(folder, "out"))
        self.output = os.path.join(folder, "out", "x.pdparams")
        table = os.path.join(folder, "captions.csv")
        with open(table, "w", newline="", encoding="utf-8") as file:
            rows = [(path, f"picture {number}") for number, path in enumerate(paddle_clip.samples())]
            csv.writer(file).writerows([("image", "caption"), *rows])
        log = os.path.join(folder, "log")
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", log]
        settings = ["--model", "tiny", "--batch-size", "4", "--epochs", "12", "--save-every", "1", "--resume"]
        self.command = Command(folder, launcher, "finetune", table, "-o", self.output, *settings)
        self.seconds = self.command.seconds()
        self.expected = sha256(self.output)

    def kill(self, kind):
        """Kills once, checks, resumes and checks; returns what there was after the kill."""
        os.unlink(self.output)
        launcher = self.command.start()
        time.sleep(self.moments.uniform(0, self.seconds))
        wait_until(lambda: len(children(launcher.pid)) == 2 or launcher.poll() is not None, "there are no processes")
        ranks = children(launcher.pid)
        victim = self.moments.choice(ranks or [launcher.pid]) if kind == "rank" else launcher.pid
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: launcher.poll() is not None and not any(map(runs, ranks)), "processes are left")
        outcome = self.outcome()
        self.command.end(self.command.start(), self.seconds + MINUTE)
        assert sha256(self.output) == self.expected, "the training that was resumed differs"
        assert os.listdir(os.path.dirname(self.output)) == ["x.pdparams"], "files are left"
        return outcome

    def outcome(self):
        if os.path.exists(self.output):
            assert sha256(self.output) == self.expected, "a partial or wrong file has the final name"
            return "complete"
        checkpoint = os.path.splitext(self.output)[0] + ".checkpoint.safetensors"
        if not os.path.exists(checkpoint):
            return "before the first checkpoint"
        paddle_clip.load(checkpoint)  # compares its checksums
        return "with a checkpoint"

    def close(self):
        pass


# ----------------------------------------------------------------------------------------------------------- embedding


class Embedding:
    """An embedding on a cluster of two nodes, each with two CPUs, of six tar shards."""

    SHARDS, IMAGES = 6, 400

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        self.folder, self.moments = folder, random.Random(0)
        self.output = os.path.join(folder, "out")
        shards = os.path.join(folder, "shards")
        os.mkdir(shards)
        for shard in range(self.SHARDS):
            self.write_shard(os.path.join(shards, f"{shard}.tar"), np.random.default_rng(shard))
        os.environ.update(ENVIRONMENT)  # which the nodes, and through them the actors, inherit
        self.sizes = {"num_cpus": 2, "object_store_memory": 100_000_000}
        self.cluster = Cluster(initialize_head=True, head_node_args={**self.sizes, "include_dashboard": False})
        self.node = self.cluster.add_node(**self.sizes)
        self.cluster.wait_for_nodes()
        options = ["-o", self.output, "--ray", self.cluster.address, "--model", "tiny", "--engine", "eager"]
        self.command = Command(folder, [], "embed", shards, *options)
        self.seconds = self.command.seconds()
        self.expected = self.features()

    def write_shard(self, path, generator):
        with tarfile.open(path, "w") as shard:
            for number in range(self.IMAGES):
                image = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, [64, 64, 3], np.uint8)).save(image, "bmp")
                header = tarfile.TarInfo(f"{number}.bmp")
                header.size = image.tell()
                image.seek(0)
                shard.addfile(header, image)

    def kill(self, kind):
        """Kills once, checks the result, and that nothing is left to do; returns how many parts there were."""
        shutil.rmtree(self.output)
        running = self.command.start()
        time.sleep(self.moments.uniform(0, self.seconds))
        if kind == "node":
            self.cluster.remove_node(self.node, allow_graceful=False)
        else:
            wait_until(lambda: self.actors() or running.poll() is not None, "there are no actors")
            for actor in self.actors()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(actor, signal.SIGKILL)
        parts = len(self.features())
        self.command.end(running, self.seconds + MINUTE)
        self.same()
        before = {part: os.stat(part).st_mtime_ns for part in self.parts()}
        self.command.end(self.command.start(), self.seconds + MINUTE)
        assert {part: os.stat(part).st_mtime_ns for part in self.parts()} == before, "parts were made again"
        if kind == "node":
            self.node = self.cluster.add_node(**self.sizes)
            self.cluster.wait_for_nodes()
        return f"with {parts} of {self.SHARDS} parts"

    def same(self):
        found = self.features()
        assert found.keys() == self.expected.keys(), "parts are missing"
        for part, (features, paths) in found.items():
            np.testing.assert_array_equal(features, self.expected[part][0])
            assert paths == self.expected[part][1]
        assert len(self.parts()) == len(os.listdir(self.output)), os.listdir(self.output)

    def parts(self):
        names = os.listdir(self.output) if os.path.isdir(self.output) else []
        return [os.path.join(self.output, name) for name in sorted(names) if name.startswith("part-")]

    def features(self):
        """{part: its features and paths}; a part that is not complete cannot be read."""
        return {part: paddle_clip.load_features(part)[:2] for part in self.parts()}

    def actors(self):
        nodes = [node.all_processes["raylet"][0].process.pid for node in self.cluster.list_all_nodes()]
        workers = [child for node in nodes for child in children(node)]
        workers = [child for child in workers if "_Worker" in of_process(child, "cmdline")]
        self.moments.shuffle(workers)
        return workers

    def close(self):
        self.cluster.shutdown()


KINDS = {"rank": Training, "launcher": Training, "actor": Embedding, "node": Embedding}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="what is killed")
    parser.add_argument("--count", type=int, default=8, help="kills of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            work = KINDS[kind](folder)
            work.moments.seed(f"{kind} {arguments.seed}")
            try:
                outcomes = collections.Counter(work.kill(kind) for _ in range(arguments.count))
            finally:
                work.close()
        found = ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()))
        print(f"{arguments.count} times {kind} killed: {found}", flush=True)


if __name__ == "__main__":
    main()
