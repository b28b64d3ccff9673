"""Preprocessing, bit for bit, against the steps of OpenAI's transform in PIL and PyTorch."""

import io
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
import torch
from PIL import Image

from paddle_clip import image_transform, transforms

SIZES = [(1, 1000), (1000, 1), (3, 2), (1, 1), (224, 224), (225, 224), (640, 480), (333, 500), (96, 97), (224, 301)]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "La", "RGBX", "RGBa"]


def reference(image, resolution):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, with OpenAI's conversion to RGB between."""
    width, height = image.size
    if width <= height:
        size = (resolution, int(resolution * height / width))
    else:
        size = (int(resolution * width / height), resolution)
    image = image.resize(size, Image.BICUBIC)
    top, left = round((size[1] - resolution) / 2.0), round((size[0] - resolution) / 2.0)
    image = image.crop((left, top, left + resolution, top + resolution)).convert("RGB")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean = torch.as_tensor((0.48145466, 0.4578275, 0.40821073), dtype=torch.float32)
    std = torch.as_tensor((0.26862954, 0.26130258, 0.27577711), dtype=torch.float32)
    return tensor.sub_(mean[:, None, None]).div_(std[:, None, None]).numpy()


def make(mode, size):
    random = np.random.default_rng(size[0])
    shape = (size[1], size[0])
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 1 << 16, shape).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(random.integers(0, 400, shape).astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray(random.integers(0, 256, (*shape, 4), dtype=np.uint8))
    if mode == "HSV" or mode == "LAB":
        return Image.merge(mode, image.split()[:3])
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode in ("CMYK", "RGBX"):
        return Image.merge(mode, image.split())
    return image.convert(mode if mode in ("LA", "RGBA", "RGBa") else "RGB").convert(mode)


def check(image, resolution=224):
    result = image_transform(resolution)(image)
    assert isinstance(result, paddle.Tensor)
    np.testing.assert_array_equal(result.numpy(), reference(image, resolution), strict=True)


@pytest.mark.parametrize(("mode", "size"), list(itertools.product(MODES, SIZES)))
def test_every_mode_and_size(mode, size):
    try:
        image = make(mode, size)
        reference(image, 224)
    except (ValueError, OSError) as error:
        with pytest.raises(type(error)):  # an image that PIL refuses fails here as in OpenAI's code
            image_transform(224)(make(mode, size))
    else:
        check(image)


@pytest.mark.parametrize("resolution", [224, 288, 336, 384, 448])
def test_every_resolution(resolution):
    check(make("RGB", (641, 427)), resolution)


def test_palette_with_transparency():
    image = make("RGB", (120, 80)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 3
    check(image)
    content = io.BytesIO()
    image.save(content, "PNG", transparency=3)
    check(Image.open(content))


def test_exif_rotation_is_left_as_openai_leaves_it(tmp_path):
    image = make("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    opened = Image.open(tmp_path / "x.jpg")
    assert opened.size == (60, 40)
    expected = reference(opened, 224)
    np.testing.assert_array_equal(image_transform(224)(tmp_path / "x.jpg").numpy(), expected)
    np.testing.assert_array_equal(image_transform(224)(str(tmp_path / "x.jpg")).numpy(), expected)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_files(tmp_path, format):
    make("RGB", (120, 81)).save(tmp_path / f"x.{format}")
    expected = reference(Image.open(tmp_path / f"x.{format}"), 224)
    np.testing.assert_array_equal(image_transform(224)(tmp_path / f"x.{format}").numpy(), expected)


def test_arrays():
    for shape in ((90, 130, 3), (90, 130, 4), (90, 130)):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = reference(Image.fromarray(array), 224)
        np.testing.assert_array_equal(image_transform(224)(array).numpy(), expected)
        np.testing.assert_array_equal(image_transform(224)(paddle.to_tensor(array)).numpy(), expected)


@pytest.mark.parametrize("array", [np.zeros([9, 9, 3], np.int64), np.zeros([9, 9, 2], np.uint8), np.zeros(9, np.uint8)])
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match=r"a path, or an array or Tensor .*found"):
        image_transform(224)(array)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_images_without_pixels_are_refused(shape):
    with pytest.raises(ValueError, match="nothing to see"):
        image_transform(224)(np.zeros(shape, np.uint8))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    content = io.BytesIO()
    make("RGB", (120, 80)).save(content, "PNG")
    (tmp_path / "short.png").write_bytes(content.getvalue()[:2000])
    for name in ("text.png", "short.png", "none.png"):
        with pytest.raises(ValueError, match=f"cannot read .*{name} as an image: "):
            image_transform(224)(tmp_path / name)


def test_bombs_are_refused_as_unreadable(tmp_path, monkeypatch):
    make("RGB", (120, 80)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read .*x\.png as an image: .*bomb.* set PIL\.Image\.MAX"):
        image_transform(224)(tmp_path / "x.png")


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"qoif\0\0\0\1\0\0\0\1\3\0" + bytes(20)]
)
def test_formats_that_are_not_read(tmp_path, content):
    """PIL would give PostScript to Ghostscript, whatever the file's name."""
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*cat\.png as an image: it is in none of the formats"):
        image_transform(8)(tmp_path / "cat.png")


def test_large_pictures_wait_for_each_other(monkeypatch):
    """Threads decode no more pixels at once than there is room for; what is larger than all is decoded alone."""
    monkeypatch.setattr(transforms, "_ROOM", transforms._Room(40 * 40))
    running, most, lock = 0, {}, threading.Lock()
    resize = transforms.ImageTransform._resize

    def watched(self, picture):
        nonlocal running
        with lock:
            running += 1
            most[picture.size] = max(most.get(picture.size, 0), running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return resize(self, picture)

    monkeypatch.setattr(transforms.ImageTransform, "_resize", watched)
    preprocess = image_transform(8)
    for side in (20, 60):
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, "PNG")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(preprocess.array, [file.getvalue()] * 16))
    assert most[20, 20] == 4 and most[60, 60] == 1
    assert transforms._ROOM.free == 40 * 40
