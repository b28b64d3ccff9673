"""What people give: pictures in other forms, places, models in wrappers, and arguments that are slips."""

import functools
import io
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import paddle
import pytest
from PIL import Image, ImageOps

import paddle_clip
from paddle_clip import CheckpointError, Predictor, config, hub, image_transform, presets, transforms
from paddle_clip.checkpoints import files as checkpoint_files
from paddle_clip.training import finetune


@pytest.fixture(scope="module")
def tiny():
    return paddle_clip.load("tiny")


@pytest.fixture
def model(tiny):
    return tiny[0]


@pytest.fixture
def preprocess(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny"
    paddle_clip.export(tiny[0], folder)
    return folder


def picture(size=(80, 60), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def content_of(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------ pictures


def openais(image, resolution=64):
    """OpenAI's preprocessing: resized and cropped in the picture's own mode, then RGB."""
    short, (width, height) = min(image.size), image.size
    size = (int(resolution * width / short), int(resolution * height / short))
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in size)
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)).convert("RGB"), np.float32)
    mean, std = np.array(config.MEAN, np.float32), np.array(config.STD, np.float32)
    return ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)


FORMS = {
    "RGBA, huggingface/transformers#17101, openai/CLIP#244": ("RGBA", "PNG", {}),
    "CMYK, Cerebras/modelzoo#65": ("CMYK", "JPEG", {}),
    "CMYK of a TIFF": ("CMYK", "TIFF", {}),
    "grey with alpha, dmMaze/BallonsTranslator#1205": ("LA", "PNG", {}),
    "a palette with transparency, python-pillow/Pillow#6348": ("P", "PNG", {"transparency": bytes(range(256))}),
    "a palette with one transparent colour": ("P", "GIF", {"transparency": 0}),
    "colours of which one is transparent": ("RGB", "PNG", {"transparency": (1, 2, 3)}),
    "one bit": ("1", "PNG", {}),
    "YCbCr": ("YCbCr", "TIFF", {}),
    "two photos in one file": ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    "damaged EXIF": ("RGB", "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"}),
}


@pytest.mark.filterwarnings("ignore:.*(Transparency|EXIF)")
@pytest.mark.parametrize("form", FORMS)
def test_pictures_of_every_form_are_openais(preprocess, form):
    mode, format, options = FORMS[form]
    content = content_of(picture(mode=mode), format, **options)
    np.testing.assert_array_equal(preprocess.array(content), openais(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(
        image_transform(64, exif=True).array(content), openais(Image.open(io.BytesIO(content)))
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"<!DOCTYPE html><html>", r"none of the formats JPEG, PNG, .*; it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs", "it begins with b'version https://git-lfs'"),  # as Pillow#6583: not the picture
        (repr(Image.new("RGB", (9, 9))).encode(), "it begins with b'<PIL.Image.Image image m"),
        (b"folder/a.png", "it begins with b'folder/a.png'"),
        ("https://example.com/a.png", "addresses are not fetched: download it"),
        ("data:image/png;base64," + 1000 * "A", "addresses are not fetched: download it"),
        (np.zeros([9, 9, 3], np.float32) - 1.8, "what preprocess returned needs no second time"),
        (np.zeros([9, 9], bool), r"found bool \[9, 9\]"),
    ],
)
def test_what_stands_for_a_picture_is_named(preprocess, given, message):
    """python-pillow/Pillow#9094 and #6583 (pages of a server), #4757; RelevanceAI/vectorhub#97 (an address);
    justinpinkney/clip2latent#10 (normalised twice)."""
    with pytest.raises(ValueError, match=message) as error:
        preprocess(given)
    assert len(str(error.value)) < 700
    assert " at 0x" not in str(error.value)


def test_files_of_a_picture_that_cannot_be_used_are_skipped(tmp_path, model, preprocess, monkeypatch):
    """rom1504/clip-retrieval#257 (cut short); yurijmikhalevich/rclip#201, lightly-ai/lightly-studio#1765 (bombs)."""
    picture().save(tmp_path / "a.png")
    content = content_of(picture(), "JPEG")
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    picture((200, 200)).save(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_text("<html>")
    (tmp_path / "e.jpg").touch()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    with pytest.warns(RuntimeWarning, match="4 images skipped"):
        found = paddle_clip.embed(model, preprocess, tmp_path, on_error="skip", progress=False)
    assert found.paths == [str(tmp_path / "a.png")]
    for (path, reason), name, words in zip(
        found.damaged, "bcde", ("truncated", "set PIL.Image.MAX_IMAGE_PIXELS", "begins with b'<html>'", "with b''")
    ):
        assert path == str(tmp_path / f"{name}.jpg")
        assert words in reason


def crop(monkeypatch, image, resolution, whole):
    monkeypatch.setattr(transforms, "_RESIZED_WHOLE", 1 << 60 if whole else 0)
    return np.asarray(transforms.resize_and_crop(image, resolution).convert("RGB")).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(1000, 1), (1, 999), (1777, 5), (3, 400), (700, 33)])
def test_the_centre_of_a_long_picture_is_that_of_the_whole(monkeypatch, size, mode):
    """nagadomi/nunif#256: PIL takes the box in float32, so that one value in some thousands is rounded differently."""
    image = picture(size, mode)
    whole, centre = (crop(monkeypatch, image, 64, is_whole) for is_whole in (True, False))
    assert np.mean(whole != centre) < 3e-3
    assert np.abs(whole - centre).max() <= 2


def test_long_pictures_take_little_memory(tmp_path):
    """nagadomi/nunif#256, DepthAnything/Depth-Anything-V2#256, deepfates/memery#10."""
    script = (
        "import resource, sys, paddle_clip; from PIL import Image; transform = paddle_clip.image_transform(224); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "[transform.array(Image.new('RGB', size)) for size in ((100_000, 1), (2, 90_000), (400_000, 3))]; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = os.path.dirname(os.path.dirname(paddle_clip.__file__))
    done = subprocess.run([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 50_000  # KB


def test_bytes_and_files_are_pictures(tmp_path, model, preprocess):
    """jina-ai/clip-as-service#677, python-pillow/Pillow#1006: what a web server has."""
    content = content_of(picture())
    path = tmp_path / "图 片.png"
    path.write_bytes(content)
    expected = preprocess.array(picture())
    with open(path, "rb") as file:
        for given in (content, bytearray(content), memoryview(content), io.BytesIO(content), file, path, str(path)):
            np.testing.assert_array_equal(preprocess.array(given), expected)
    labels = ["red circle", "blue star"]
    best = paddle_clip.classify(model, preprocess, path, labels)
    assert paddle_clip.classify(model, preprocess, content, labels) == best
    both = paddle_clip.classify(model, preprocess, [io.BytesIO(content), content], labels)
    assert [found[0].label for found in both] == [best[0].label] * 2
    found = paddle_clip.embed(model, preprocess, [content, path], progress=False)
    assert found.paths == [0, str(path)]
    assert paddle_clip.embed(model, preprocess, content, progress=False).paths == [0]
    assert paddle_clip.search(model, preprocess, found.features, found.paths, content)[0].score > 0.999
    with open(path, encoding="latin-1") as file, pytest.raises(ValueError, match="open it with mode 'rb'"):
        preprocess(file)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(tmp_path, preprocess, format):
    first, second = picture(), Image.new("RGB", (80, 60), "red")
    content = content_of(first, format, save_all=True, append_images=[second])
    frame = Image.open(io.BytesIO(content))
    assert frame.n_frames == 2
    path = tmp_path / "x"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file left open, too
        np.testing.assert_array_equal(preprocess.array(path), preprocess.array(frame))


@pytest.mark.parametrize(
    ("pixels", "warned"),
    [
        (np.full([9, 9], 40_000, np.uint16), True),
        (np.full([9, 9], -5, np.int32), True),
        (np.full([9, 9], 0.5, np.float32), True),
        (np.full([9, 9], np.nan, np.float32), True),
        (np.full([9, 9], 200, np.uint16), False),
        (np.full([9, 9], 99.5, np.float32), False),
    ],
)
def test_deep_pictures_are_openais_and_said_to_be_cut_off(tmp_path, preprocess, pixels, warned):
    """python-pillow/Pillow#3011 and #5991: PIL clips 16-bit grey and does not scale it."""
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = preprocess.array(tmp_path / "x.tiff")
    assert [str(warning.message)[:17] for warning in caught] == ["a picture of mode"] * warned
    cut = np.asarray(Image.open(tmp_path / "x.tiff").resize((64, 64), Image.Resampling.BICUBIC).convert("RGB"))
    np.testing.assert_array_equal(found, preprocess.array(cut))


def test_exif_turns_if_it_is_asked_to():
    image = picture((60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    content = content_of(image, "JPEG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert turned.size == (40, 60)
    expected = image_transform(64).array(turned)
    np.testing.assert_array_equal(image_transform(64, exif=True).array(content), expected)
    assert (image_transform(64).array(content) != expected).any()


@pytest.mark.parametrize("given", [3, None, [[1]], {}, np.zeros([4, 4], np.int64)])
def test_what_is_no_picture_is_named(preprocess, given):
    name = "int64" if isinstance(given, np.ndarray) else type(given).__name__
    with pytest.raises(ValueError, match=f"an image is .*found {name}"):
        preprocess(given)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "TGA", "JPEG2000"])
def test_damaged_pictures_are_one_error(tmp_path, preprocess, format):
    content, random = content_of(picture(), format), np.random.default_rng(0)
    path = tmp_path / "x.bin"
    for _ in range(30):
        damaged = bytearray(content[: random.integers(1, len(content))])
        for place in random.integers(0, len(damaged), 4):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                preprocess(path)
            except ValueError as error:
                assert "x.bin" in str(error)
                assert len(str(error)) < 1000


# -------------------------------------------------------------------------------------------------------------- places


def test_home_folders_are_expanded(tmp_path, monkeypatch, model, preprocess):
    """huggingface/huggingface_hub#4292: a Dockerfile's ENV and a notebook expand no ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paddle_clip.save(model, "~/a.pdparams")
    paddle_clip.load("~/a.pdparams")
    paddle_clip.convert("~/a.pdparams", "~/b.safetensors")
    picture().save("p.png")
    paddle_clip.embed(model, preprocess, "~/p.png", "~/f.npy", progress=False)
    assert paddle_clip.load_features("~/f.npy").paths == [str(tmp_path / "p.png")]
    assert hub.cache_folder("~/cache") == str(tmp_path / "cache")
    monkeypatch.setenv("PADDLE_CLIP_CACHE", "~/other")
    assert hub.cache_folder() == str(tmp_path / "other")
    assert sorted(os.listdir()) == ["a.pdparams", "b.safetensors", "f.json", "f.npy", "p.png"]


@pytest.fixture
def read_only(monkeypatch):
    """A system that lets nobody write a lock; tests may run as root, whom no mode of a folder stops."""

    def refuse(lock):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(hub.FileLock, "acquire", refuse)


@pytest.mark.parametrize("name", ["ViT-B-32.pdparams", "ViT-B-32.pt"])
def test_a_read_only_cache_is_read(files, tmp_path, read_only, monkeypatch, name):
    """qdrant/fastembed#381, tenstorrent/tt-forge-models#10: caches in images of containers."""
    monkeypatch.setattr(hub, "_require_official", lambda row, path: None)
    if name.endswith(".pt"):
        (tmp_path / name).write_bytes((files / "vit.pt").read_bytes())
    else:
        paddle_clip.convert(files / "vit.pt", tmp_path / name)
    paddle_clip.load("ViT-B/32", cache_dir=tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_a_cache_that_cannot_be_made_is_named(tmp_path, read_only):
    """wkentaro/gdown#274: users of containers have no home."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", tmp_path / "empty"):
        with pytest.raises(OSError, match=f"the cache {folder} cannot be written.*cache_dir=.*PADDLE_CLIP_CACHE"):
            paddle_clip.load("ViT-B/32", cache_dir=folder)


def test_a_user_without_a_home_exports(tmp_path):
    """wkentaro/gdown#274, hscspring/hcgf#12: no home and no locale in a container. Paddle writes code there."""
    (tmp_path / "file").touch()
    picture().save(tmp_path / "图 片.png")
    script = (
        "import os, paddle_clip; model, preprocess = paddle_clip.load('tiny'); paddle_clip.export(model, 'x'); "
        "name = os.fsdecode('图 片.png'.encode()); predictor = paddle_clip.Predictor(b'x'); "
        "print(paddle_clip.embed(predictor, preprocess, name, progress=False).features.shape)"
    )
    (tmp_path / "script.py").write_text(f"# coding: utf-8\n{script}", encoding="utf-8")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LC_")},
        "HOME": str(tmp_path / "file" / "home"),
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": os.path.dirname(os.path.dirname(paddle_clip.__file__)),
    }
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 64)", done.stderr


def test_paths_in_bytes(tmp_path, model):
    path = os.fsencode(tmp_path / "x.pdparams")
    paddle_clip.save(model, path)
    assert paddle_clip.load(path)[0].config == model.config
    assert paddle_clip.convert(path, os.fsencode(tmp_path / "y.pt")).output == str(tmp_path / "y.pt")
    assert hub.cache_folder(path) == os.fsdecode(path)


def test_a_mirror(tmp_path, monkeypatch):
    """AUTOMATIC1111/stable-diffusion-webui#896 (a server of one's own), openai/CLIP#317 (which sent something else)."""
    row = presets.preset("RN50")
    mirror, cache = f"file://{tmp_path}/", tmp_path / "cache"
    (tmp_path / row.sha256).mkdir()
    (tmp_path / row.sha256 / "RN50.pt").write_bytes(b"something else")
    for load in (paddle_clip.load, paddle_clip.load_compiled):
        with pytest.raises(hub.DownloadError, match=rf"file://{tmp_path}/{row.sha256}/RN50.pt gave .* SHA-256"):
            load("RN50", cache_dir=cache, mirror=mirror)
    monkeypatch.setenv("PADDLE_CLIP_MIRROR", mirror)
    with pytest.raises(hub.DownloadError, match=rf"file://{tmp_path}/{row.sha256}/RN50.pt gave .* SHA-256"):
        paddle_clip.load("RN50", cache_dir=cache)
    monkeypatch.setenv("PADDLE_CLIP_MIRROR", "mirror.example")
    with pytest.raises(hub.DownloadError, match="PADDLE_CLIP_MIRROR"):
        paddle_clip.load("RN50", cache_dir=tmp_path / "cache")


def test_a_certificate_error_says_where_certificates_go(tmp_path, monkeypatch):
    """openai/CLIP#413 and #499: networks with certificates of their own."""
    import ssl
    import urllib.error

    def fail(*arguments, **options):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(hub.urllib.request, "urlopen", fail)
    with pytest.raises(hub.DownloadError, match="SSL_CERT_FILE"):
        paddle_clip.load("RN50", cache_dir=tmp_path)


def test_a_full_disk_names_the_file(tmp_path, model):
    """jayleicn/ClipBERT#7."""
    raised = pytest.raises(OSError, match=r"No space left on device: .*x\.npz")
    with raised, checkpoint_files.replacing(tmp_path / "x.npz"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_names_that_are_no_text(tmp_path, model, preprocess):
    """run-llama/llama_index#10369, kz26/dottorrent#9."""
    folder = os.path.join(os.fsencode(tmp_path), b"a \xff \xe5\x9b\xbe")
    os.mkdir(folder)
    path = os.path.join(os.fsdecode(folder), "x y.png")
    picture().save(path)
    found = paddle_clip.embed(model, preprocess, os.fsdecode(folder), tmp_path / "f.npy", progress=False)
    assert found.paths == paddle_clip.load_features(tmp_path / "f.npy").paths == [path]
    paddle_clip.save(model, path + ".pdparams")
    paddle_clip.load(path + ".pdparams")
    with pytest.raises(ValueError, match=r"is no text.*choose an \.npy"):
        paddle_clip.embed(model, preprocess, [path], tmp_path / "f.parquet", progress=False)


@pytest.mark.parametrize("dtype", [paddle.float32, np.float32, np.dtype("float32"), "paddle.float32"])
def test_a_dtype_of_paddle(dtype):
    assert paddle_clip.load("tiny", dtype)[0].dtype == paddle.float32


def test_the_default_dtype_changes_no_model(model, preprocess):
    """PaddlePaddle/Paddle#54778 and #51708: some layers follow it, and others do not."""
    paddle.set_default_dtype("float64")
    try:
        loaded, _ = paddle_clip.load("tiny")
        assert paddle.get_default_dtype() == "float64"
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {paddle.float32}
        tokens, image = paddle_clip.tokenize(["a red circle"]), preprocess(picture()).unsqueeze(0)
        with paddle.no_grad():
            for found, expected in zip(loaded(image, tokens), model(image, tokens)):
                assert found.dtype == paddle.float32
                np.testing.assert_array_equal(found.numpy(), expected.numpy())
    finally:
        paddle.set_default_dtype("float32")


def test_static_mode_is_named(tmp_path, model, preprocess):
    """PaddlePaddle/X2Paddle#534."""
    samples = paddle_clip.images.samples()[:2]
    calls = (
        lambda: paddle_clip.load("tiny"),
        lambda: paddle_clip.classify(model, preprocess, samples[0], ["a", "b"]),
        lambda: paddle_clip.embed(model, preprocess, samples, progress=False),
        lambda: paddle_clip.export(model, tmp_path / "x"),
        lambda: finetune(model, [(path, "a") for path in samples], batch_size=2),
    )
    paddle.enable_static()
    try:
        for call in calls:
            with pytest.raises(RuntimeError, match=r"paddle\.disable_static\(\)"):
                call()
    finally:
        paddle.disable_static()


# ----------------------------------------------------------------------------------------------------------- arguments

# openai/CLIP#208: a list of batches of one; #189: pictures of 32 x 32 pixels, which preprocess did not make.
IMAGES = [
    (Image.new("RGB", (64, 64)), r"preprocess\(image\)\.unsqueeze\(0\)"),
    ([Image.new("RGB", (64, 64))], r"a list of PIL\.Image; .*paddle\.stack"),
    ("x.png", "of the type str; .*preprocess"),
    (None, "of the type NoneType"),
    (np.zeros([3, 64, 64], np.float32), r"images\[None\]"),
    (np.zeros([2, 64, 64, 3], np.float32), r"takes \[N, 3, 64, 64\]"),
    (np.zeros([2, 3, 64, 64], np.uint8), "images are uint8; .*normalises"),
]
# openai/CLIP#212 and #110: tokenize with a longer context_length.
TOKENS = [
    (["a dog"], r"a list of str; .*tokenize\(texts\)"),
    ("a dog", "of the type str; .*tokenize"),
    (np.zeros([77], np.int64), r"tokens\[None\]"),
    (np.zeros([1, 100], np.int64), r"takes \[N, 1 to 77\]: model\.tokenize\(texts, truncate=True\)"),
    (np.zeros([1, 0], np.int64), r"takes \[N, 1 to 77\]"),
    (np.zeros([1, 1, 77], np.int64), r"takes \[N, 1 to 77\]"),
    (np.zeros([1, 77], np.float32), "tokens are float32; .*int64"),
    (np.full([1, 77], 50_000), "from 50000 to 50000; this model knows 0 to 49407"),
    (np.full([1, 77], -1), "from -1 to -1; this model knows"),
]


@pytest.fixture(scope="module")
def encoders(tiny, exported):
    return {"CLIP": tiny[0], "Predictor": Predictor(exported)}


@pytest.mark.parametrize("kind", ["CLIP", "Predictor"])
def test_slips_are_told_the_call_that_is_right(encoders, kind):
    encoder = encoders[kind]
    for encode, slips in ((encoder.encode_image, IMAGES), (encoder.encode_text, TOKENS)):
        for given, message in slips:
            arrays = [given, paddle.to_tensor(given)] if isinstance(given, np.ndarray) and given.size else [given]
            for value in arrays:
                with pytest.raises(ValueError, match=message):
                    encode(value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
@pytest.mark.parametrize("kind", ["CLIP", "Predictor"])
def test_ids_of_every_integer_type(encoders, kind, dtype):
    """RobertBiehl/CLIP-tf2#5 (int32); Paddle takes an array of uint16 for one of bfloat16."""
    ids, encoder = np.array([[49406, 320, 49407], [120, 7, 9]], np.int64)[:, ::-1], encoders[kind]
    ids = ids % 128 if dtype.endswith("8") or dtype == "int16" else ids
    expected = np.asarray(encoder.encode_text(ids))
    np.testing.assert_array_equal(np.asarray(encoder.encode_text(ids.astype(dtype))), expected)
    if dtype in ("int8", "uint8", "int16", "int32"):
        np.testing.assert_array_equal(np.asarray(encoder.encode_text(paddle.to_tensor(ids.astype(dtype)))), expected)


def test_tensors_of_other_libraries_are_named(model):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"images are of the type torch\.Tensor"):
        model.encode_image(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"images are a list of paddle\.Tensor; .*paddle\.stack"):
        model.encode_image([paddle.zeros([1, 3, 64, 64])] * 2)


@pytest.mark.parametrize("kind", ["CLIP", "Predictor"])
def test_texts_in_every_container(encoders, kind):
    """huggingface/transformers#21366, huggingface/sentence-transformers#1820: arrays, columns, None among them."""
    encoder, texts = encoders[kind], ["a red circle", "b"]
    expected = np.asarray(paddle_clip.encode_texts(encoder, texts))
    for several in (tuple(texts), iter(texts), np.array(texts), np.array(texts, object), dict.fromkeys(texts)):
        np.testing.assert_array_equal(np.asarray(paddle_clip.encode_texts(encoder, several)), expected)
    for one in ("b", np.str_("b"), np.array("b")[()], {"b"}):
        np.testing.assert_allclose(np.asarray(paddle_clip.encode_texts(encoder, one))[0], expected[1], atol=1e-5)
    functions = (paddle_clip.tokenize, encoder.tokenize, functools.partial(paddle_clip.encode_texts, encoder))
    for wrong in (None, 3, float("nan"), b"a", ["a", None], ["a", float("nan")], [["a"]], np.array([["a"]]), [b"a"]):
        for function in functions:
            with pytest.raises(TypeError, match="texts are a string or a list of strings; found "):
                function(wrong)


@pytest.mark.parametrize("length", [-1, 0, 1, 77.0, "77", None, True])
def test_context_lengths_that_cannot_be(length):
    with pytest.raises(ValueError, match=f"context_length is {length!r}; it is a number of tokens"):
        paddle_clip.tokenize("a", length, truncate=True)


@pytest.mark.parametrize("ids", [[-1], [49408], 3, "a", None, [[[3]]], [True]])
def test_ids_that_are_no_text(ids):
    with pytest.raises(ValueError, match="decode takes ids"):
        paddle_clip.decode(ids)


@pytest.mark.parametrize("kind", ["CLIP", "Predictor"])
def test_arrays_are_encoded(encoders, kind):
    random, encoder = np.random.default_rng(0), encoders[kind]
    image, tokens = random.standard_normal([2, 3, 64, 64]), paddle_clip.tokenize(["a", "b c"])
    for encode, array in ((encoder.encode_image, image.astype("float32")), (encoder.encode_text, tokens.numpy())):
        found, expected = encode(array), encode(paddle.to_tensor(array))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("kind", ["CLIP", "Predictor"])
def test_nothing_gives_nothing(encoders, preprocess, tmp_path, kind):
    encoder = encoders[kind]
    no_images, no_texts = paddle.zeros([0, 3, 64, 64]), paddle_clip.tokenize([])
    assert list(encoder.encode_image(no_images).shape) == [0, 64]
    assert list(encoder.encode_text(no_texts).shape) == [0, 64]
    assert [list(logits.shape) for logits in encoder(no_images, paddle_clip.tokenize("a"))] == [[0, 1], [1, 0]]
    assert list(paddle_clip.encode_texts(encoder, []).shape) == [0, 64]
    assert paddle_clip.classify(encoder, preprocess, [], ["a", "b"]) == []
    for output in (None, tmp_path / "x.npy", tmp_path / "x.parquet"):
        found = paddle_clip.embed(encoder, preprocess, [], output, progress=False)
        assert (found.features.shape, found.paths, found.damaged) == ((0, 64), [], [])


@pytest.mark.parametrize("wrap", [paddle.DataParallel, paddle.jit.to_static])
def test_wrapped_models(tmp_path, preprocess, wrap):
    """openai/CLIP#36."""
    model, _ = paddle_clip.load("tiny")
    wrapped, image = wrap(model), picture()
    image.save(tmp_path / "x.png")
    paddle_clip.save(wrapped, tmp_path / "x.pdparams")
    assert paddle_clip.load(tmp_path / "x.pdparams")[0].config == model.config
    labels = ["red circle", "blue star"]
    assert paddle_clip.classify(wrapped, preprocess, image, labels) == paddle_clip.classify(
        model, preprocess, image, labels
    )
    found = paddle_clip.embed(wrapped, preprocess, [image], progress=False)
    assert paddle_clip.encode_texts(wrapped, ["a"]).shape == [1, 64]
    assert paddle_clip.search(wrapped, preprocess, found.features, found.paths, "a dog")[0].path == 0
    assert len(finetune(wrapped, zip([image, image], ["a", "b"]), batch_size=2)) == 1


def test_what_is_no_model_is_named(tiny, preprocess, tmp_path):
    with pytest.raises(ValueError, match=r"found tuple; load returns \(model, preprocess\)"):
        paddle_clip.encode_texts(tiny, ["a"])
    with pytest.raises(ValueError, match=r"save\(model, path\), or .*paddle\.save"):
        paddle_clip.save(tiny[0].state_dict(), tmp_path / "x.pdparams")


def test_one_array_is_one_picture(model, preprocess):
    """jina-ai/clip-as-service#677: an array [H, W, 3] is no batch of H grey pictures."""
    image = np.asarray(picture())
    prepared = preprocess(image)
    for one in (image, image / 255, paddle.to_tensor(image), prepared, prepared.numpy(), image.transpose(2, 0, 1)):
        found = paddle_clip.embed(model, preprocess, one, progress=False)
        assert found.paths == [0]
        np.testing.assert_array_equal(found.features, paddle_clip.embed(model, preprocess, [one], progress=False)[0])
        assert len(paddle_clip.classify(model, preprocess, one, ["a", "b"])) == 2
    assert paddle_clip.embed(model, preprocess, image[..., 0], progress=False).paths == [0]
    for several in (np.stack([image, image]), paddle.stack([prepared, prepared]), np.stack([image[..., 0]] * 2)):
        assert paddle_clip.embed(model, preprocess, several, progress=False).paths == [0, 1]


def test_numbers_of_numpy_are_numbers(tmp_path, model, preprocess):
    """From a configuration, or the result of a computation."""
    paths, two = paddle_clip.images.samples()[:2], np.int64(2)
    found = paddle_clip.embed(model, preprocess, paths, tmp_path / "x.npy", two, workers=two, progress=False)
    assert found.features.shape == (2, 64)
    found = paddle_clip.search(model, preprocess, found.features.tolist(), iter(paths), Image.open(paths[1]), two)
    assert (found[0].path, len(found)) == (paths[1], 2)
    other, _ = paddle_clip.load("tiny", resolution=np.int64(96), heads=np.int32(5))
    paddle_clip.save(other, tmp_path / "x.safetensors")
    config = paddle_clip.load(tmp_path / "x.safetensors")[0].config
    assert (config.image_resolution, config.vision_head_width) == (96, 64)
    assert {type(config.image_resolution), type(config.vision_head_width)} == {int}
    pairs = [(path, "a") for path in paths]
    assert len(finetune(other, pairs, batch_size=two, epochs=two, learning_rate=np.float32(1e-6), seed=two)) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 2.0}, "batch_size=2.0 and workers=None; each must be a whole number"),
        ({"batch_size": "2"}, "batch_size='2' and"),
        ({"workers": 1.5}, "workers=1.5; each must be a whole number"),
        ({"workers": 0}, "workers=0; each must be"),
    ],
)
def test_numbers_that_cannot_be(model, preprocess, given, message):
    with pytest.raises(ValueError, match=message):
        paddle_clip.embed(model, preprocess, paddle_clip.images.samples()[:2], progress=False, **given)


class Column:
    """A column of pandas after filtering: its labels are not 0, 1, 2."""

    def __init__(self, items):
        self.items = dict(zip((3, 7, 8, 11), items))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, label):
        return self.items[label]

    def __iter__(self):
        return iter(self.items.values())


def test_paths_keep_their_names(model, preprocess):
    """mlfoundations/open_clip#144, mids/W207#1."""
    paths = paddle_clip.images.samples()[:3]
    kinds = (np.array, lambda paths: np.array(paths, object)[:, None], Column, iter, tuple, set, dict.fromkeys)
    for kind in kinds:
        found = paddle_clip.embed(model, preprocess, kind(paths), progress=False)
        assert sorted(found.paths) == paths, kind
    pairs = [(path, 0) for path in paths]
    assert paddle_clip.embed(model, preprocess, pairs, progress=False).paths == paths
    assert len(paddle_clip.classify(model, preprocess, np.array(paths), ["red circle", "blue star"])) == 3
    pictures = Column([Image.open(path) for path in paths])
    assert paddle_clip.embed(model, preprocess, pictures, progress=False).paths == [0, 1, 2]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("x.png", float("nan")), "the caption of pair 1 is nan, of the type float"),
        (("x.png", None), "the caption of pair 1 is None"),
        (("x.png", b"a"), "the caption of pair 1 is b'a', of the type bytes"),
        (("x.png", "\ud83d"), "the caption of pair 1 .* no text in Unicode"),
        ("x.png", "pair 1 is 'x.png'; expected"),
        (("x.png", "a", "b"), "pair 1 is .*; expected"),
    ],
)
def test_captions_that_are_no_text_are_named(model, pair, message):
    with pytest.raises(ValueError, match=message):
        finetune(model, [("x.png", "a"), pair], batch_size=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embed_dim", 65, r"embed_dim 65, and the program gives \[-1, 64\]"),
        ("context_length", 10**9, "context_length 1000000000, and the program has no"),
        ("context_length", 78, "context_length 78, and the program has no"),
        ("image_resolution", 96, r"image_resolution 96, and the program takes \[-1, 3, 64, 64\]"),
        ("logit_scale", float("nan"), "no sound value for, logit_scale"),
        ("vocab_size", -3, "no sound value for, vocab_size"),
    ],
)
def test_an_export_is_what_its_config_says(exported, tmp_path, name, value, message):
    path = exported / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), name: value}))
    try:
        with pytest.raises(CheckpointError, match=message):
            Predictor(exported)
    finally:
        path.write_text(before)
