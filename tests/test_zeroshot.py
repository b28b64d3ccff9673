"""Zero-shot classification: prompts, ensembling against OpenAI's recipe, accuracy, and refusals."""

import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import paddle
import pytest
from PIL import Image

import ensemble
from paddle_clip import (
    IMAGENET_CLASSES,
    IMAGENET_TEMPLATES,
    available_prompts,
    classify,
    encode_texts,
    evaluate,
    image_transform,
    presets,
    prompts,
    tokenize,
    zero_shot_classifier,
    zeroshot,
)
from variants import TINY

# Bounds relative to the largest weight of a classifier; 3.2e-7 and 5.9e-16 were measured.
ENSEMBLE_BOUNDS = {"float32": 1e-5, "float64": 1e-9}
TEXTS = ["a dog", "", "a photo of the hard to see cat, in the rain and at night.", "dogs", "a dog", "two words"] * 3


@pytest.fixture(scope="module")
def model():
    """A very small model that knows all tokens, with logits spread so that no two labels tie."""
    paddle.seed(1)
    model = presets.build(replace(TINY["tiny_vit"], context_length=77, vocab_size=49408))
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            parameter.set_value(paddle.randn(parameter.shape))
    model.eval()
    return model


@pytest.fixture(scope="module")
def preprocess():
    return image_transform(32)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(12)]


def save(folder, images):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_all_there():
    assert len(IMAGENET_CLASSES) == 1000
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert (IMAGENET_CLASSES[0], IMAGENET_CLASSES[1], IMAGENET_CLASSES[999]) == ("tench", "goldfish", "toilet paper")
    sizes = {name: tuple(map(len, prompts(name))) for name in available_prompts()}
    assert len(sizes) == 26
    assert sizes["CIFAR100"] == (100, 18)
    assert sizes["SUN397"] == (397, 2)
    assert sizes["UCF101"] == (101, 48)
    assert prompts("cifar100")[0] == sorted(prompts("CIFAR100")[0])  # the order of its labels
    for name in sizes:
        classnames, templates = prompts(name)
        assert all("{}" in template for template in templates)
        assert len(set(templates)) == len(templates)
        assert len(set(map(str, classnames))) == len(classnames) or name == "ImageNet"  # ImageNet has two missiles
        tokenize([template.replace("{}", str(label)) for template in templates[:2] for label in classnames])  # they fit
    with pytest.raises(ValueError, match="no prompts for 'cifar'; available: ImageNet, "):
        prompts("cifar")


def test_prompts_are_not_shared():
    prompts("mnist")[0].clear()
    assert len(prompts("mnist")[0]) == 10


# --------------------------------------------------------------------------------------------------------- classifiers


def test_ensembling_is_openais(tmp_path, run):
    checkpoint = tmp_path / "model.pt"
    done = run("tests/tools/ensemble.py", checkpoint, "--make")
    assert done.returncode == 0, done.stderr
    differences = ensemble.compare(checkpoint)
    assert differences.keys() == ENSEMBLE_BOUNDS.keys()
    assert all(difference <= ENSEMBLE_BOUNDS[dtype] for dtype, difference in differences.items()), differences


@pytest.mark.parametrize(("batch_tokens", "at_once"), [(1, 1000), (30, 1000), (4096, 1000), (30, 4), (4096, 4)])
def test_texts_keep_their_order_in_any_batches(model, monkeypatch, batch_tokens, at_once):
    monkeypatch.setattr(zeroshot, "_TEXTS_AT_ONCE", at_once)
    with paddle.no_grad():
        expected = paddle.concat([model.encode_text(tokenize(text)) for text in TEXTS])
    found = encode_texts(model, TEXTS, batch_tokens=batch_tokens)
    assert found.stop_gradient
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_texts_of_like_length_are_encoded_together(model, monkeypatch):
    shapes = []
    encode_text = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: shapes.append(tokens.shape) or encode_text(tokens))
    encode_texts(model, TEXTS, batch_tokens=40)
    assert max(rows * length for rows, length in shapes) <= 40
    assert sum(rows * length for rows, length in shapes) < 1.2 * sum(len(t.split()) + 4 for t in TEXTS)


def test_no_texts(model):
    assert encode_texts(model, []).shape == [0, 8]


def test_a_class_with_several_names_is_their_average(model):
    found = zero_shot_classifier(model, [["happy", "smiling"], "sad"], ["a {} face", "they look {}"]).numpy()
    texts = ["a happy face", "they look happy", "a smiling face", "they look smiling"]
    features = encode_texts(model, texts).numpy()
    mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
    assert found.shape == (8, 2)
    np.testing.assert_allclose(found[:, 0], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)


def test_templates_may_be_functions_and_names_have_braces(model):
    names = ["dog", "{cat}", "{}"]
    expected = zero_shot_classifier(model, names, ["a {}.", "{} or {}"]).numpy()
    functions = [lambda name: "a " + name + ".", lambda name: name + " or " + name]
    np.testing.assert_array_equal(zero_shot_classifier(model, names, functions).numpy(), expected)
    one = zero_shot_classifier(model, names, "a {}.").numpy()
    np.testing.assert_array_equal(one, zero_shot_classifier(model, names, functions[0]).numpy())


def test_many_classes_are_encoded_some_at_a_time(model, monkeypatch):
    names = [f"class {index}" for index in range(11)]
    expected = zero_shot_classifier(model, names, ["a {}", "the {}"]).numpy()
    monkeypatch.setattr(zeroshot, "_TEXTS_AT_ONCE", 6)
    np.testing.assert_allclose(zero_shot_classifier(model, names, ["a {}", "the {}"]).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ([], ["a {}"], "there are no class names"),
        ([[]], ["a {}"], "there are no class names"),
        ("dog", ["a {}"], "found the string 'dog'"),
        (["dog", " "], ["a {}"], "not empty; found ' '"),
        (["dog", 3], ["a {}"], "found 3"),
        (["dog"], [], "there are no templates"),
        (["dog"], ["a {}", "a photo"], r"'a photo' has no \{\} for the class name"),
    ],
)
def test_bad_names_and_templates_are_refused(model, classnames, templates, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(model, classnames, templates)


def test_texts_too_long_are_refused(model):
    with pytest.raises(RuntimeError, match="context length is 77"):
        zero_shot_classifier(model, ["dog", "long " * 80], ["a {}"])


# ------------------------------------------------------------------------------------------------------------ classify


def test_probabilities_are_the_models(model, preprocess, images):
    labels = ["dog", "cat", "a bird", "fish"]
    with paddle.no_grad():
        pixels = paddle.stack([preprocess(image) for image in images])
        logits, _ = model(pixels, tokenize([f"a photo of a {label}." for label in labels]))
        expected = paddle.nn.functional.softmax(logits, axis=-1).numpy()
    found = classify(model, preprocess, images, labels, batch_size=5)
    assert len(found) == len(images)
    for row, probabilities in zip(found, expected):
        assert [labels.index(label) for label, _ in row] == np.argsort(-probabilities).tolist()
        np.testing.assert_allclose([p for _, p in row], np.sort(probabilities)[::-1], rtol=1e-4)
        assert sum(prediction.probability for prediction in row) == pytest.approx(1, rel=1e-5)
    one = classify(model, preprocess, images[3], labels, top_k=2)
    assert [prediction.label for prediction in one] == [prediction.label for prediction in found[3][:2]]


def test_images_of_every_kind(model, preprocess, images, tmp_path):
    save(tmp_path / "folder", images[:1])
    path = tmp_path / "folder" / "0.png"
    kinds = [path, str(path), Image.open(path), images[0]]
    results = classify(model, preprocess, kinds, ["dog", "cat"])
    for result in results:
        assert [label for label, _ in result] == [label for label, _ in results[0]]
        assert [share for _, share in result] == pytest.approx([share for _, share in results[0]], rel=1e-6)
    for kind, together in zip(kinds[1:], results[1:]):  # an image alone is rounded differently
        alone = classify(model, preprocess, kind, ["dog", "cat"])
        assert [label for label, _ in alone] == [label for label, _ in together]
        np.testing.assert_allclose([p for _, p in alone], [p for _, p in together], rtol=1e-5)


def test_ten_thousand_labels(model, preprocess, images):
    labels = [f"label {index}" for index in range(10_000)]
    (best, second) = classify(model, preprocess, images[0], labels, top_k=2)
    assert best.label in labels
    assert best.probability >= second.probability


def test_what_cannot_be_classified_is_refused(model, preprocess, images, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    for path in (tmp_path / "text.jpg", tmp_path / "none.jpg"):
        with pytest.raises(ValueError, match=f"image {path} cannot be used: cannot read {path} as an image: "):
            classify(model, preprocess, path, ["dog"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images: looked for"):
        classify(model, preprocess, tmp_path / "empty", ["dog"])
    with pytest.raises(ValueError, match=f"image {tmp_path / 'text.jpg'} cannot be used"):
        classify(model, preprocess, tmp_path, ["dog"])
    with pytest.raises(ValueError, match="there are no class names"):
        classify(model, preprocess, images[0], [])
    with pytest.raises(ValueError, match="top_k=0"):
        classify(model, preprocess, images[0], ["dog"], top_k=0)


# ------------------------------------------------------------------------------------------------------------ evaluate


@pytest.fixture
def ranked(model, preprocess, images):
    """Seven names, and for each image their indices, the most probable first."""
    names = ["dog", "cat", "bird", "fire truck", "fish", "tree", "house"]
    results = classify(model, preprocess, images, names, templates="a photo of the {}", top_k=7)
    return names, [[names.index(label) for label, _ in row] for row in results]


class Labelled(paddle.io.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def test_accuracy_of_a_data_set(model, preprocess, images, ranked):
    """Among twelve labels, five are ranked first, four fifth, and three sixth."""
    names, ranks = ranked
    labels = [order[0 if i < 5 else 4 if i < 9 else 5] for i, order in enumerate(ranks)]
    kinds = {
        "arrays": (images, labels),
        "pil": ([Image.fromarray(image) for image in images], [np.array(label, np.int64) for label in labels]),
        "tensors": ([preprocess(image) for image in images], [np.array([label]) for label in labels]),
    }
    for kind, pair in kinds.items():
        accuracy = evaluate(
            model, preprocess, Labelled(*pair), names, "a photo of the {}", batch_size=5, progress=False
        )
        assert accuracy == (5 / 12, 9 / 12, 12, []), kind


def test_accuracy_of_paddles_cifar100(model, preprocess, images, tmp_path):
    """Paddle's own class reads an archive in CIFAR-100's format, with and without a transform."""
    small, (names, templates) = [image[:32, :32] for image in images], prompts("cifar100")
    predictions = classify(model, preprocess, small, names, templates, top_k=6)
    ranks = [[names.index(label) for label, _ in row] for row in predictions]
    labels = [order[0 if i < 3 else 4 if i < 9 else 5] for i, order in enumerate(ranks)]
    data = np.stack(small).transpose(0, 3, 1, 2).reshape(12, 3072)
    content = pickle.dumps({b"data": data, b"fine_labels": labels})
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo("cifar-100-python/test")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    for transform in (None, preprocess):
        dataset = paddle.vision.datasets.Cifar100(str(archive), mode="test", transform=transform, backend="pil")
        accuracy = evaluate(model, preprocess, dataset, names, templates, progress=False)
        assert accuracy == (3 / 12, 9 / 12, 12, [])


def test_accuracy_of_folders(model, preprocess, images, ranked, tmp_path, monkeypatch):
    """Folders are read in alphabetical order, underscores as spaces; half the images are in another class's folder."""
    names, ranks = ranked
    wrong = 0
    for index, (image, order) in enumerate(zip(images, ranks)):
        wrong += index % 2
        folder = tmp_path / names[order[index % 2]].replace(" ", "_")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    for name in names:
        folder = tmp_path / name.replace(" ", "_")
        if not folder.exists():  # all seven classes need a folder
            folder.mkdir()
            Image.fromarray(images[0]).save(folder / "more.png")
            wrong += names.index(name) != ranks[0][0]
    accuracy = evaluate(model, preprocess, tmp_path, templates=["a photo of the {}"], progress=False)
    assert accuracy.top1 == pytest.approx(1 - wrong / accuracy.count)
    used, make = [], zeroshot._classifier
    monkeypatch.setattr(
        zeroshot, "_classifier", lambda _, names, *a, **b: used.append(names) or make(_, names, *a, **b)
    )
    assert evaluate(model, preprocess, tmp_path, templates=["a photo of the {}"], progress=False) == accuracy
    assert used == [sorted(names)]
    given = evaluate(model, preprocess, tmp_path, sorted(names), ["a photo of the {}"], progress=False)
    assert given == accuracy
    with pytest.raises(ValueError, match="has 7 folders, and there are 3 class names"):
        evaluate(model, preprocess, tmp_path, names[:3])


def test_fewer_than_five_classes(model, preprocess, images):
    accuracy = evaluate(model, preprocess, Labelled(images, [0] * 12), ["dog", "cat"], "{}", progress=False)
    assert accuracy.top5 == 1


def test_damaged_images_are_left_out_of_the_accuracy(model, preprocess, images, tmp_path):
    save(tmp_path / "data" / "dog", images[:3])
    (tmp_path / "data" / "dog" / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be used: .*on_error='skip' leaves out"):
        evaluate(model, preprocess, tmp_path / "data", progress=False)
    with pytest.warns(RuntimeWarning, match=r"1 images skipped: .*bad\.png"):
        accuracy = evaluate(model, preprocess, tmp_path / "data", on_error="skip", progress=False)
    assert accuracy.count == 3
    assert accuracy.damaged[0][0].endswith("bad.png")


def test_what_cannot_be_evaluated_is_refused(model, preprocess, images, tmp_path):
    def check(dataset, error, message, classnames=("dog", "cat")):
        with pytest.raises(error, match=message):
            evaluate(model, preprocess, dataset, classnames, "{}", progress=False)

    check(tmp_path / "none", FileNotFoundError, "none")
    check(tmp_path, ValueError, "expected one folder of images for each class")
    (tmp_path / "dog").mkdir()
    check(tmp_path, ValueError, "dog has no images", None)
    check(Labelled(images, [0] * 12), ValueError, "give classnames", None)
    check(Labelled(images, [2] * 12), ValueError, "item 0 of the data set has the label 2, and there are 2 class names")
    check(Labelled(images, [-1] * 12), ValueError, "the label -1")
    check(Labelled(images, ["dog"] * 12), ValueError, "the label a whole number; see item 0")
    check(images, ValueError, "the label a whole number; see item 0")
    check(Labelled([], []), ValueError, "there are no images")
