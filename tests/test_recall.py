"""Recall of images and captions, validation while training, and the picture of the loss."""

import contextlib
import dataclasses
import json

import numpy as np
import paddle
import pytest
from PIL import Image

import paddle_clip
from paddle_clip import ContrastiveLoss, cli, finetune, plots, presets, retrieval
from paddle_clip.recall import RECALLS, recalls
from variants import SMALL, assert_equal, state_of

ARGUMENTS = {"epochs": 3, "batch_size": 6, "learning_rate": 1e-3}


@pytest.fixture
def model():
    paddle.seed(1)
    return presets.build(SMALL)


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    images = [np.tile(random.integers(0, 256, 3, dtype=np.uint8), [32, 32, 1]) for _ in range(12)]  # of one colour each
    return [(image, f"thing number {index}") for index, image in enumerate(images)]


def by_definition(images, texts, image_of, k):
    """clip_benchmark's: a query counts if one of its own is among the k most similar items."""
    scores = texts @ images.T
    found_images = [image_of[row] in np.argsort(-scores[row])[:k] for row in range(len(texts))]
    found_texts = [any(image_of[best] == row for best in np.argsort(-scores[:, row])[:k]) for row in range(len(images))]
    return np.mean(found_texts), np.mean(found_images)


def test_recalls_are_those_of_the_definition():
    random = np.random.default_rng(0)
    for _ in range(100):
        count = random.integers(3, 40)
        image_of = random.permutation([*range(count), *random.integers(0, count, random.integers(0, 3 * count))])
        images = random.normal(size=[count, 8])
        texts = images[image_of] + random.normal(size=[len(image_of), 8]) * random.uniform(0.2, 3)
        to_texts, to_images = recalls(images, texts, image_of)
        for k in RECALLS:
            assert (to_texts[k], to_images[k]) == pytest.approx(by_definition(images, texts, image_of, k), abs=1e-12)


def test_features_that_are_all_the_same_find_nothing():
    same = np.ones([20, 4])
    to_texts, to_images = recalls(same, same, np.arange(20))
    assert set(to_texts.values()) | set(to_images.values()) == {0.0}


def test_many_rows(monkeypatch):
    random = np.random.default_rng(0)
    images, image_of = random.normal(size=[50, 8]), random.permutation([*range(50)] * 2)
    texts = images[image_of] + random.normal(size=[100, 8])
    at_once = recalls(images, texts, image_of)
    monkeypatch.setattr("paddle_clip.recall._ROWS", 7)
    assert recalls(images, texts, image_of) == at_once


def test_retrieval_of_the_tiny_model(model, pairs):
    tiny, preprocess = paddle_clip.load("tiny")
    samples = [(path, path.rsplit("/", 1)[-1][:-4].replace("-", " ")) for path in paddle_clip.samples()]
    found = retrieval(tiny, preprocess, [*samples, (samples[0][0], "a picture of " + samples[0][1])])
    assert (found.images, found.texts) == (8, 9)
    assert found.image_to_text[1] >= 0.75
    assert found.text_to_image[5] >= found.text_to_image[1] >= 0.75
    assert found.image_to_text[10] == 1
    with pytest.raises(ValueError, match="there are no pairs"):
        retrieval(tiny, preprocess, [])


def test_the_loss_is_that_of_training(model, pairs):
    model.eval()
    preprocess = paddle_clip.image_transform(32)
    found = retrieval(model, preprocess, pairs, batch_size=12)
    images = paddle.stack([preprocess(image) for image, _ in pairs])
    tokens = paddle_clip.tokenize([caption for _, caption in pairs], 12)
    loss = ContrastiveLoss()(model.encode_image(images), model.encode_text(tokens), model.logit_scale)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert retrieval(model, preprocess, pairs, batch_size=5).loss < found.loss  # fewer to be told apart
    cut = [(image, caption + " and more words than there are places for" * 3) for image, caption in pairs]
    assert retrieval(model, preprocess, cut).texts == 12


def test_each_epoch_is_validated_and_the_best_weights_are_kept(model, pairs, tmp_path):
    """The images of the validation have each other's captions: what is learned makes its loss rise."""
    wrong = [(image, pairs[(index + 5) % 12][1]) for index, (image, _) in enumerate(pairs)]
    after_steps = []
    history = finetune(
        model,
        pairs,
        tmp_path / "x.pdparams",
        validation=wrong,
        on_step=lambda step: after_steps.append((step, state_of(model))),
        **{**ARGUMENTS, "epochs": 6},
    )
    losses = [step.validation.loss for step in history if step.validation]
    assert [step.step for step in history if step.validation] == [2, 4, 6, 8, 10, 12]
    best = int(np.argmin(losses))
    assert best < 5, losses
    assert_equal(state_of(model), after_steps[2 * best + 1][1])
    assert_equal(state_of(paddle_clip.load(tmp_path / "x.pdparams")[0]), state_of(model))


class Killed(BaseException):
    """An end as sudden as a signal's."""


def kill(step):
    if step.step == 10:
        raise Killed


@pytest.mark.parametrize("lora", [None, 2])
def test_a_resumed_training_has_the_same_best_weights(pairs, tmp_path, lora):
    wrong = [(image, pairs[(index + 5) % 12][1]) for index, (image, _) in enumerate(pairs)]
    arguments = {**ARGUMENTS, "validation": wrong, "lora": lora, "epochs": 6, "save_every": 1}

    def begun():
        paddle.seed(1)
        return presets.build(SMALL)

    whole, resumed = begun(), begun()
    expected = finetune(whole, pairs, **arguments)
    with contextlib.suppress(Killed):
        finetune(begun(), pairs, tmp_path / "x.pdparams", on_step=kill, **arguments)
    assert (tmp_path / "x.pdparams").is_file()  # the best weights so far
    history = finetune(resumed, pairs, tmp_path / "x.pdparams", resume=True, **arguments)
    assert history == expected[10:]
    assert_equal(state_of(resumed), state_of(whole))
    losses = [step.validation.loss for step in expected if step.validation]
    assert lora or np.argmin(losses) < 5  # the best weights are older than the kill


def test_commands(tmp_path, capsys, pairs):
    for index, (image, _) in enumerate(pairs):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{index % 12}.png,thing {index}\n" for index in range(14)))
    output, picture = tmp_path / "x.pdparams", tmp_path / "loss.png"
    command = ["finetune", table, "-o", output, "--model", "tiny", "--batch-size", 7, "--validation", table]
    options = ["--plot", picture, "--lora", 2, "--freeze", "visual.layer1", "--unfreeze", "token_embedding"]
    assert cli.main([*map(str, [*command, *options, "--recompute"])]) == 0
    assert "validation: loss" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["evaluate", str(table), "--model", str(output), "--engine", "eager"]) == 0
    assert capsys.readouterr().out.endswith("of 12 images and 14 captions\n")
    assert cli.main(["evaluate", str(table), "--model", str(output), "--engine", "eager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_to_text"].keys() == {"1", "5", "10"}
    assert cli.main(["evaluate", str(table), "--model", "tiny", "--labels", "a"]) == 1
    assert "has captions of its own" in capsys.readouterr().err


def test_the_picture_of_the_loss(model, pairs, tmp_path):
    history = finetune(model, pairs, validation=pairs, plot=tmp_path / "loss.svg", **ARGUMENTS)
    svg = (tmp_path / "loss.svg").read_text()
    assert "validation" in svg or svg.count("<path") > 10
    with pytest.raises(ValueError, match=r"x\.txt is no picture's name"):
        finetune(model, pairs, plot=tmp_path / "x.txt", on_step=lambda step: pytest.fail("it trained"), **ARGUMENTS)
    plots.training(history[:1], tmp_path / "one.pdf")
    assert (tmp_path / "one.pdf").stat().st_size


def test_training_from_random_weights(tmp_path, monkeypatch):
    table, outputs = tmp_path / "pairs.csv", [tmp_path / name for name in ("a.pdparams", "b.pdparams")]
    rows = [f"{path},picture {index}\n" for index, path in enumerate(paddle_clip.samples())]
    table.write_text("image,caption\n" + "".join(rows))
    row = presets.preset("ViT-B/32")
    monkeypatch.setattr(presets, "preset", lambda name: dataclasses.replace(row, config=SMALL))
    for output in outputs:
        command = ["finetune", table, "-o", output, "--from-scratch", "--model", "ViT-B/32", "--batch-size", 8]
        assert cli.main([*map(str, command)]) == 0
    first, second = (paddle_clip.load(output)[0] for output in outputs)
    assert first.config == SMALL
    assert_equal(state_of(first), state_of(second))  # the seed draws the weights
    resnet = presets.CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 1, 12)
    monkeypatch.setattr(presets, "preset", lambda name: dataclasses.replace(row, config=resnet))
    assert cli.main([*map(str, command)]) == 0
    assert (paddle_clip.load(outputs[1])[0].visual.bn1._mean != 0).all()  # it took the pictures' statistics
