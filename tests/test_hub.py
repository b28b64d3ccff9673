"""Loading by path, and by name from an HTTP server on loopback."""

import dataclasses
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import save_file

import paddle_clip
from paddle_clip import CheckpointError, DownloadError, convert, hub, layers, presets
from paddle_clip.checkpoints import dialects
from variants import RESNET, VIT


class Server(http.server.ThreadingHTTPServer):
    """A server of one file, with ranges, that misbehaves as its attributes say."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.requests = []  # the Range header of each request
        self.close_after = None  # bytes sent before the connection is closed
        self.ignore_ranges = False
        self.status = None
        self.delay = 0  # seconds before answering


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and not server.ignore_ranges else 0
        time.sleep(server.delay)
        if server.status:
            return self.send_error(server.status)
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.close_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(files, monkeypatch):
    """The vision transformer's archive, published as ViT-B/32 on a server of this machine."""
    content = (files / "vit.pt").read_bytes()
    row = dataclasses.replace(presets.preset("ViT-B/32"), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(hub, "find_preset", lambda name: row)
    with Server(content) as server:
        monkeypatch.setattr(hub, "BASE_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("variant", "config"), [("resnet", RESNET), ("vit", VIT)])
def test_every_form_of_a_file_gives_the_same_model(files, tmp_path, variant, config, arrays_of):
    state = arrays_of(variant)
    expected = dialects.from_checkpoint(state).arrays
    save_file(state, tmp_path / "openai.safetensors")
    save_file({name: array.copy(order="C") for name, array in expected.items()}, tmp_path / "ours.safetensors")
    convert(files / f"{variant}.pt", tmp_path / "ours.pdparams")
    convert(files / f"{variant}.pt", tmp_path / "converted.safetensors", dtype="keep")
    paths = [files / f"{variant}.pt", files / f"{variant}_state_dict.pt", *sorted(tmp_path.iterdir())]
    assert len(paths) == 6
    for path in paths:
        model, preprocess = paddle_clip.load(path)
        assert not model.training
        assert preprocess(Image.new("RGB", (50, 70))).shape == [3, config.image_resolution, config.image_resolution]
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == paddle.float32
            np.testing.assert_array_equal(tensor.numpy(), expected[name].astype(np.float32), err_msg=str(path))


def test_a_pdparams_saved_by_paddle_loads(tmp_path):
    model = presets.build(VIT)
    paddle.save(model.state_dict(), str(tmp_path / "tuned.pdparams"))
    loaded, _ = paddle_clip.load(str(tmp_path / "tuned.pdparams"))
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), tensor.numpy())


def test_float64(files):
    model, _ = paddle_clip.load(files / "vit.pt", dtype="float64")
    assert model.dtype == paddle.float64
    assert {tensor.dtype for tensor in model.state_dict().values()} == {paddle.float64}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell the peak of memory")
def test_loading_does_not_hold_the_weights_twice(run, tmp_path):
    """Neither as pages of the file beside the model's own: of 2.5 billion numbers both would take 20 GB."""
    with layers.undrawn():
        model = presets.build(presets.CLIPConfig(64, 32, 4, 768, 16, 64, 1, 1, vocab_size=500))
    paddle_clip.save(model, tmp_path / "x.pdparams")
    done = run(
        "-c",
        "import paddle_clip\n"
        "def peak():  # not getrusage's, which begins with that of the process before this one\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "paddle_clip.load('tiny')\n"
        "before = peak()\n"
        f"paddle_clip.load({str(tmp_path / 'x.pdparams')!r})\n"
        "print(peak() - before)",
    )
    assert done.returncode == 0, done.stderr
    size = os.path.getsize(tmp_path / "x.pdparams") / 1024
    assert 0.5 * size < int(done.stdout) < 1.1 * size, int(done.stdout) / size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_refused_on_the_cpu(files, dtype):
    with pytest.raises(ValueError, match=f"{dtype} does not run on the CPU.*Use dtype='float32'"):
        paddle_clip.load(files / "vit.pt", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(files, dtype, monkeypatch):
    """Half precision casts these tensors; its results are tested on a GPU, in test_parity.py."""
    monkeypatch.setattr(hub, "require_dtype", lambda dtype, device: None)
    model, _ = paddle_clip.load(files / "resnet.pt", dtype=dtype)
    reference, _ = paddle_clip.load(files / "resnet.pt")
    half = getattr(paddle, dtype)
    assert model.dtype == half
    layers = dict(model.named_sublayers(include_self=True))
    for name, tensor in model.state_dict().items():
        layer = layers[name.rpartition(".")[0]]
        assert tensor.dtype == (half if isinstance(layer, (paddle.nn.Linear, paddle.nn.Conv2D)) else paddle.float32)
        expected = reference.state_dict()[name].astype(tensor.dtype)
        np.testing.assert_array_equal(tensor.numpy(), expected.numpy())


def test_bad_arguments(tmp_path):
    with pytest.raises(
        ValueError, match=r"'RN51' is neither a file nor a model: .*did you mean RN50.*available: RN50, .*\.pt"
    ):
        paddle_clip.load("RN51")
    with pytest.raises(ValueError, match="dtype is 'fp16'; choose one of float32, float64"):
        paddle_clip.load("RN50", dtype="fp16")
    (tmp_path / "x.pt").write_text("no")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        paddle_clip.load(tmp_path / "x.pt")


def test_available_models():
    names = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]
    assert paddle_clip.available_models() == names


def test_the_urls_are_openais():
    row = presets.preset("ViT-B/32")
    assert hub.url_of(row) == (
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"
    )


def test_a_name_is_downloaded_and_converted_once(server, tmp_path, monkeypatch):
    model, _ = paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert server.requests == [None]
    assert (tmp_path / "ViT-B-32.pt").read_bytes() == server.content
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".pdparams", ".pt"]
    monkeypatch.setenv("PADDLE_CLIP_CACHE", str(tmp_path))
    again, _ = paddle_clip.load("ViT-B/32")
    assert server.requests == [None]
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("ignore_ranges", [False, True])
def test_an_interrupted_download_is_continued(server, tmp_path, ignore_ranges):
    server.close_after = 100_000
    with pytest.raises(DownloadError, match=r"closed after 100,000 of .* Run it again to continue"):
        paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert (tmp_path / "ViT-B-32.pt.partial").stat().st_size == 100_000
    server.close_after, server.ignore_ranges = None, ignore_ranges
    paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert server.requests == [None, "bytes=100000-"]
    assert (tmp_path / "ViT-B-32.pt").read_bytes() == server.content


def test_a_complete_partial_file_is_taken(server, tmp_path):
    (tmp_path / "ViT-B-32.pt.partial").write_bytes(server.content)
    paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert not (tmp_path / "ViT-B-32.pt.partial").exists()


def test_a_wrong_download_is_deleted(server, tmp_path):
    server.content = b"something else"
    with pytest.raises(DownloadError, match=r"gave a file with SHA-256 .*, expected [0-9a-f]{64}; run it again"):
        paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])


def test_a_file_put_into_the_cache_needs_no_network(server, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(server.content)
    paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert server.requests == []


def test_a_wrong_file_in_the_cache_is_left_alone(server, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"is not OpenAI's ViT-B-32\.pt: its SHA-256 is .*Delete it"):
        paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert (tmp_path / "ViT-B-32.pt").read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("status", [404, 503, None])
def test_without_a_server_the_error_says_what_to_do(server, tmp_path, monkeypatch, status):
    server.status = status
    if status is None:  # a port nobody listens on
        monkeypatch.setattr(hub, "BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as error:
        paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    message = str(error.value)
    assert re.search(r"http://127\.0\.0\.1:\d+/[0-9a-f]{64}/ViT-B-32\.pt", message)
    assert str(tmp_path) in message
    assert "or load it by its path" in message


def test_processes_take_turns(server, tmp_path):
    """Four processes ask for one model: it is downloaded once, and all get it."""
    script = (
        "import dataclasses, sys; from paddle_clip import hub, presets; "
        "row = dataclasses.replace(presets.preset('ViT-B/32'), sha256=sys.argv[2]); "
        "hub.find_preset = lambda name: row; hub.BASE_URL = sys.argv[1]; "
        "hub.load('ViT-B/32', cache_dir=sys.argv[3])"
    )
    server.delay = 3  # seconds in which the others start too
    sha256 = hashlib.sha256(server.content).hexdigest()
    command = [sys.executable, "-W", "ignore", "-c", script, hub.BASE_URL, sha256, str(tmp_path)]
    root = os.path.dirname(os.path.dirname(paddle_clip.__file__))
    running = [subprocess.Popen(command, cwd=root) for _ in range(4)]
    assert [process.wait() for process in running] == [0, 0, 0, 0]
    assert server.requests == [None]


def test_a_file_changed_since_it_was_converted_is_refused(files, tmp_path):
    convert(files / "vit.pt", tmp_path / "x.pdparams")
    content = bytearray((tmp_path / "x.pdparams").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pdparams").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .* changed since it was written; convert it again"):
        paddle_clip.load(tmp_path / "x.pdparams")


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
@pytest.mark.parametrize("extension", [".pdparams", ".safetensors", ".pt"])
def test_what_is_saved_is_what_is_loaded(tmp_path, extension, activation):
    model = presets.build(dataclasses.replace(VIT, activation=activation))
    paddle_clip.save(model, tmp_path / f"x{extension}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the file tells the activation
        loaded, _ = paddle_clip.load(tmp_path / f"x{extension}")
    assert loaded.config.activation == activation
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), loaded.state_dict()[name].numpy(), err_msg=name)
