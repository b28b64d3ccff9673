"""The command line: each command's output, and one line and an exit code for bad input.

Most commands run in this process, which has Paddle already; the tests about processes start one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image

import paddle_clip
from paddle_clip import cli, features, plots, presets
from paddle_clip.cli import chinese
from paddle_clip.cli.main import build_parser

SMALL = presets.CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1)  # with the full vocabulary
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pdparams"
    paddle.seed(0)
    paddle_clip.save(presets.build(SMALL), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data set of one folder per class: six images in three folders."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(2):
            Image.new("RGB", (40 + 10 * number, 40), colour).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def cli_run(capsys, model):
    """A function running a command; returns its exit code, its standard output and its standard error."""

    def call(*arguments, with_model=True):
        arguments = [*map(str, arguments), *(["--model", str(model)] if with_model else [])]
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def succeeds(cli_run):
    """A function running a command that must succeed; returns what it printed, parsed if it is JSON."""

    def call(*arguments, **options):
        code, out, err = cli_run(*arguments, **options)
        assert (code, err) == (0, ""), err
        return json.loads(out) if "--json" in arguments else out

    return call


@pytest.fixture
def fails(cli_run):
    """A function running a command that must fail with one line that has all these words, and no other output."""

    def call(*arguments, words, code=1, **options):
        found, out, err = cli_run(*arguments, **options)
        assert found == code, err
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert all(word in err for word in words), err
        return True

    return call


# ---------------------------------------------------------------------------------------------------------- good input


def test_models(succeeds):
    listed = succeeds("models", "--json", with_model=False)
    assert [row["name"] for row in listed] == [*paddle_clip.available_models(), "tiny_cn", "tiny"]
    assert listed[0]["parameters"] == 102_007_137
    assert listed[0]["image_resolution"] == 224
    assert succeeds("models", with_model=False).splitlines()[-1].split()[0] == "tiny"


def test_convert(succeeds, model, tmp_path):
    output = tmp_path / "x.safetensors"
    report = succeeds("convert", model, "-o", output, "--json", with_model=False)
    assert report["output"] == str(output)
    assert report["config"]["embed_dim"] == 8
    assert output.exists()
    assert "checksums" in succeeds("convert", output, "--check", with_model=False)
    report = succeeds("convert", output, "--check", "--json", with_model=False)
    assert report["nan"] == 0
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_classify(succeeds, photos, tmp_path):
    found = succeeds("classify", photos, "--labels", "cat", "dog", "犬", "--json")
    assert [entry["image"] for entry in found] == [str(path) for path in sorted(photos.glob("*/*.png"))]
    for entry in found:
        assert sorted(best["label"] for best in entry["labels"]) == ["cat", "dog", "犬"]
        assert sum(best["probability"] for best in entry["labels"]) == pytest.approx(1, abs=1e-5)
    image = photos / "red" / "0.png"
    out = succeeds("classify", image, "--labels", "cat", "dog", "--top-k", 1)
    assert out.splitlines()[0] == str(image)
    best = max(
        succeeds("classify", image, "--labels", "cat", "dog", "--json")[0]["labels"], key=lambda b: b["probability"]
    )
    assert out.splitlines()[1:] == [f"  {best['probability']:7.2%}  {best['label']}"]


def test_classify_among_ten_thousand_labels(succeeds, photos, tmp_path, model):
    (tmp_path / "labels.txt").write_text("\n".join(f"thing {number}\n" for number in range(10_000)))
    found = succeeds("classify", photos / "red" / "0.png", "--labels-file", tmp_path / "labels.txt", "--json")
    assert len(found[0]["labels"]) == 5
    expected = paddle_clip.classify(
        *paddle_clip.load(model), photos / "red" / "0.png", [f"thing {n}" for n in range(10_000)]
    )
    assert [best["label"] for best in found[0]["labels"]] == [best.label for best in expected]


def test_tables_and_json_are_for_readers_of_chinese(cli_run, photos, tmp_path, monkeypatch):
    common = ["similarity", photos / "red" / "0.png", "--texts", "红", "一只猫", "a cat", "猫" * 40]
    common += ["--model", "tiny_cn"]
    _, out, _ = cli_run(*common, with_model=False)
    lines = [line.removesuffix("  <") for line in out.splitlines()[1:]]
    assert {plots.text_width(line) for line in lines} == {2 + 60 + 2 + 6}
    assert lines[3].startswith("  " + "猫" * 29 + "… ")
    _, out, _ = cli_run(*common, "--json", with_model=False)
    assert "一只猫" in out
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((photos / "red" / "0.png").read_bytes())
    code, out, _ = cli_run("classify", tmp_path, "--labels", "红", "--json", "--model", "tiny_cn", with_model=False)
    assert code == 0 and out.isascii()
    assert json.loads(out)[0]["labels"][0]["label"] == "红"


def test_similarity_and_its_plot(succeeds, photos, tmp_path):
    paths = sorted(photos.glob("*/*.png"))
    texts = [
        "red for $5 \\by $9",
        "a text that is much longer than a line of the plot, and is wrapped for it, and then cut" * 2,
    ]
    (tmp_path / "texts.txt").write_text(texts[1] + "\n\n", encoding="utf-8")
    arguments = ["similarity", *paths, "--texts", texts[0], "--texts-file", tmp_path / "texts.txt"]
    found = succeeds(*arguments, "--json", "--plot", tmp_path / "x.png")
    assert found["texts"] == texts
    assert np.shape(found["similarity"]) == (6, 2)
    assert np.abs(found["similarity"]).max() <= 1
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size[0] > 6 * 100
        # Each thumbnail is there: text and lines have fewer pixels of its colour.
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in COLOURS.values():
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) <= 2).sum() > 10_000
    lines = succeeds(*arguments).splitlines()
    assert lines[0] == str(paths[0])
    assert f"{found['similarity'][0][0]:.3f}" in lines[1]


def test_texts_are_by_default_the_names_of_the_images(succeeds, photos, tmp_path):
    paths = [tmp_path / "a_red-square.png", tmp_path / "犬.png"]
    for path in paths:
        os.link(photos / "red" / "0.png", path)
    assert succeeds("similarity", *paths, "--json")["texts"] == ["a red square", "犬"]


def test_embed_and_search(succeeds, photos, tmp_path, model):
    output = tmp_path / "x.npy"
    assert succeeds("embed", photos, "-o", output) == f"{output}: 6 features of 8 numbers\n"
    expected = paddle_clip.embed(*paddle_clip.load(model), photos)
    np.testing.assert_array_equal(np.load(output), expected.features)
    image = photos / "blue" / "1.png"
    found = succeeds("search", output, "--image", image, "--top-k", 2, "--json")
    assert {match["path"] for match in found} == {str(image), str(image.with_name("0.png"))}  # they have one colour
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    lines = succeeds("search", output, "something blue").splitlines()
    assert len(lines) == 6
    assert sorted(line.split()[1] for line in lines) == sorted(expected.paths)


def test_damaged_images_are_fatal_or_skipped(cli_run, fails, photos, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"not an image")
    output = tmp_path / "x.npy"
    assert fails("embed", tmp_path / "in", "-o", output, words=["bad.png", "cannot", "--on-error skip leaves out"])
    assert not output.exists()
    code, out, err = cli_run("embed", tmp_path / "in", "-o", output, "--on-error", "skip", "--json", "--no-resume")
    assert code == 0
    assert json.loads(out)["count"] == 1
    assert json.loads(out)["damaged"][0][0].endswith("bad.png")
    assert err.startswith("warning: 1 images skipped: ")
    assert err.count("\n") == 1


def test_what_embed_is_asked_for(cli_run, photos, monkeypatch, tmp_path):
    asked = {}

    def embed(*arguments, **options):
        asked.update(options)
        raise ValueError("differs; run it as it was, or with resume=False to start anew")

    monkeypatch.setattr(features, "embed", embed)
    defaults = {"batch_size": 64, "workers": None, "on_error": "raise", "normalize": True}
    defaults.update(resume=True, shard=None)
    _, _, err = cli_run("embed", photos, "-o", tmp_path / "x.npy")
    assert asked == defaults
    assert err == "error: differs; run it as it was, or with --no-resume to start anew\n"
    for skip, anew in (
        (["--on-error", "skip"], "--no-resume"),
        (["--skip-damaged"], "--restart"),
    ):  # the older spelling
        cli_run("embed", photos, "-o", tmp_path / "x.npy", "--batch-size", 3, "--workers", 2, *skip, "--raw", anew)
        expected = {"batch_size": 3, "workers": 2, "on_error": "skip", "normalize": False, "resume": False}
        assert asked == {**expected, "shard": None}


def test_evaluate(succeeds, photos):
    found = succeeds("evaluate", photos, "--json")
    assert found["count"] == 6
    assert found["top5"] == 1
    out = succeeds("evaluate", photos, "--labels", "blue", "green", "red", "--template", "{}", "--template", "some {}")
    assert out.startswith("top-1 ")
    assert out.endswith("of 6 images\n")


def test_probe(succeeds, photos, tmp_path):
    found = succeeds("probe", photos, "--test", photos, "--C", 100, "-o", tmp_path / "x.npz", "--json")
    assert found == {"images": 6, "classes": 3, "C": 100, "train": 1, "test": 1}
    assert list(paddle_clip.LinearProbe.load(tmp_path / "x.npz").classes) == ["blue", "green", "red"]


def test_probe_takes_one_folder_per_class(fails, photos):
    fails("probe", photos / "red", words=["has no folders"])


def test_finetune(succeeds, fails, photos, tmp_path, model):
    output = tmp_path / "x.pdparams"
    arguments = ["finetune", photos, "-o", output, "--batch-size", 3, "--learning-rate", 1e-3]
    code_lines = succeeds(*arguments, "--epochs", 2).splitlines()
    assert [line.split(":")[0] for line in code_lines[:-1]] == ["epoch 1, step 2 of 4", "epoch 2, step 4 of 4"]
    assert code_lines[-1] == f"{output}: trained on 6 pairs"
    before, after = (paddle_clip.load(path)[0] for path in (model, output))
    assert not np.array_equal(before.visual.proj.numpy(), after.visual.proj.numpy())


def test_finetune_takes_small_sets_and_other_columns(succeeds, photos, tmp_path):
    table = tmp_path / "x.csv"
    table.write_text(f"pic,words\n{photos}/red/0.png,red\n{photos}/blue/0.png,blue\n")
    columns = ["--image-column", "pic", "--caption-column", "words"]
    assert "trained on 2 pairs" in succeeds("finetune", table, "-o", tmp_path / "x.pdparams", *columns)


def test_finetune_prints_a_line_of_json_per_step(cli_run, photos, tmp_path):
    arguments = ["--batch-size", 2, "--accumulate", 3, "--epochs", 3, "--freeze", "text", "--json"]
    code, out, err = cli_run("finetune", photos, "-o", tmp_path / "x.pdparams", *arguments)
    assert (code, err) == (0, "")
    assert [json.loads(line)["step"] for line in out.splitlines()] == [1, 2, 3]


def test_export(succeeds, fails, model, tmp_path):
    out = succeeds("export", tmp_path / "out")
    assert out == f"{tmp_path / 'out'}: load it with paddle_clip.Predictor('{tmp_path / 'out'}')\n"
    images = np.random.default_rng(0).random([2, 3, 32, 32], np.float32)
    expected = paddle_clip.load(model)[0].encode_image(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(paddle_clip.Predictor(tmp_path / "out").encode_image(images), expected, atol=1e-4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert fails("export", tmp_path / "mine", words=["not an empty folder"])


def test_bench(succeeds, fails):
    rows = succeeds("bench", "--batch-size", 1, 3, "--repeat", 2, "--json")
    assert [(row["encoder"], row["batch"]) for row in rows] == [("image", 1), ("text", 1), ("image", 3), ("text", 3)]
    assert all(row["eager_ms"] > 0 and row["compiled_ms"] > 0 for row in rows)
    lines = succeeds("bench", "--batch-size", 1, "--repeat", 1, "--threads", 1).splitlines()
    assert lines[0].split() == ["encoder", "batch", "eager", "ms", "compiled", "ms", "speed-up"]
    assert [line.split()[:2] for line in lines[1:]] == [["image", "1"], ["text", "1"]]
    assert fails("bench", "--repeat", 0, words=["--repeat and --batch-size must be at least 1"])


def test_an_export_in_place_of_a_model(succeeds, fails, photos, tmp_path):
    succeeds("export", tmp_path / "out")
    options = {"with_model": False}
    exported = ["--model", tmp_path / "out"]
    red = photos / "red" / "0.png"
    succeeds("classify", red, "--labels", "a", "b", *exported, **options)
    succeeds("similarity", red, "--texts", "a", *exported, **options)
    succeeds("embed", photos, "-o", tmp_path / "x.npy", *exported, **options)
    succeeds("search", tmp_path / "x.npy", "a", *exported, **options)
    succeeds("evaluate", photos, *exported, **options)
    succeeds("probe", photos, "--C", 1, *exported, **options)
    rows = succeeds("bench", "--batch-size", 1, "--repeat", 1, "--json", *exported, **options)
    assert [sorted(row) for row in rows] == [["batch", "compiled_ms", "encoder"]] * 2
    assert "speed-up" not in succeeds("bench", "--batch-size", 1, "--repeat", 1, *exported, **options)
    for command in (["export", tmp_path / "again"], ["finetune", photos, "-o", tmp_path / "x.pdparams"]):
        assert fails(*command, *exported, words=["give the checkpoint it was made of"], **options)


def test_hints(cli_run, photos, tmp_path):
    red = photos / "red" / "0.png"
    cli_run("embed", photos, "-o", tmp_path / "x.npy")
    for arguments, hint in (
        (["classify", red, "--labels", "red,blue"], "'red,blue' is one label"),
        (["classify", red, "--labels", "红色", "蓝色"], "trained on English texts"),
        (["similarity", red, "--texts", "красный"], "trained on English texts"),
        (["search", tmp_path / "x.npy", "红色"], "trained on English texts"),
        (["evaluate", photos, "--labels", "蓝色", "绿色", "红色"], "trained on English texts"),
    ):
        code, _, err = cli_run(*arguments)
        assert code == 0 and hint in err and err.count("\n") == 1
    code, _, err = cli_run("similarity", red, "--texts", "naïve café, 5 €")
    assert (code, err) == (0, "")
    for text, hint in (("red", "'red': the model was trained on Chinese texts"), ("iPhone 手机", "")):
        code, _, err = cli_run("similarity", red, "--texts", text, "--model", "tiny_cn", with_model=False)
        assert code == 0 and hint in err and err.count("\n") == bool(hint)


@pytest.mark.parametrize("font", ["WenQuanYi Zen Hei", None])
def test_a_font_for_chinese_is_looked_for(font, cli_run, photos, tmp_path, monkeypatch):
    from matplotlib import font_manager

    fonts = [*font_manager.fontManager.ttflist, *([font_manager.FontEntry(name=font)] if font else [])]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(plots, "_draw", lambda *arguments: families.extend(arguments[-1]))
    families = []
    arguments = ["similarity", photos / "red" / "0.png", "--texts", "犬", "--plot", tmp_path / "x.png"]
    code, _, err = cli_run(*arguments)
    assert code == 0 and families == (["sans-serif", font] if font else ["sans-serif"])
    assert err == "" if font else "fonts-noto-cjk" in err


def test_a_font_for_chinese_need_not_be_bold(photos, tmp_path, monkeypatch, caplog):
    """Most have one weight alone, and matplotlib would tell of each one it lacks."""
    drawn = []
    monkeypatch.setattr(plots, "_CHINESE_FONTS", ("DejaVu Sans Display",))  # matplotlib's own, in one weight
    monkeypatch.setattr(plots, "_save", lambda figure, output: figure.savefig(output) or drawn.append(figure))
    plots.similarity([photos / "red" / "0.png"], ["红" * 31], [[0.5]], tmp_path / "x.png", "标题")
    assert [record.message for record in caplog.records if "DejaVu Sans Display" in record.message] == []
    assert drawn[0].axes[0].get_yticklabels()[0].get_text() == "\n".join(["红" * 15, "红" * 15, "红"])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_files_that_are_not_there(fails, tmp_path, photos):
    missing = tmp_path / "missing"
    out = ["-o", tmp_path / "x.npy"]
    words = ["missing", "No such file"]
    assert fails("classify", missing, "--labels", "a", words=words)
    assert fails("classify", photos, "--labels-file", missing, words=words)
    assert fails("similarity", missing, "--texts", "a", words=words)
    assert fails("embed", missing, *out, words=words)
    assert fails("search", missing, "a", words=words)
    assert fails("evaluate", missing, words=words)
    assert fails("probe", missing, words=words)
    assert fails("finetune", missing, "-o", tmp_path / "x.pdparams", words=words)
    assert fails("convert", missing, with_model=False, words=words)
    assert fails("embed", photos, "-o", tmp_path / "no" / "x.npy", words=["does not exist"])
    assert fails("similarity", photos, "--texts", "a", "--plot", tmp_path / "no" / "x.png", words=["No such file"])
    assert fails(
        "classify", photos, "--labels", "a", "--model", missing, with_model=False, words=["neither a file nor"]
    )
    assert os.listdir(tmp_path) == []


def test_no_images(fails, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    assert fails("classify", tmp_path / "text.png", "--labels", "a", words=["text.png", "cannot"])
    (tmp_path / "empty").mkdir()
    words = ["empty has no images"]
    assert fails("classify", tmp_path / "empty", "--labels", "a", words=words)
    assert fails("embed", tmp_path / "empty", "-o", tmp_path / "x.npy", words=words)
    assert fails("finetune", tmp_path / "empty", "-o", tmp_path / "x.pdparams", words=words)
    assert fails("evaluate", tmp_path / "empty", words=["has no folders"])
    assert fails("probe", tmp_path / "empty", words=["has no folders"])


def test_features_that_are_none(fails, tmp_path):
    (tmp_path / "text.npy").write_text("no features")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, problem in (("text.npy", "is not a file of features: expected what `embed`"), ("empty.npy", "is empty")):
        assert fails("search", tmp_path / name, "a", words=[f"{name} {problem}"])


def test_what_would_fail_late_fails_at_once(fails, succeeds, photos, tmp_path, monkeypatch):
    succeeds("embed", photos, "-o", tmp_path / "x.npy")
    for loader in ("features.load_encoder", "finetuning.load_model", "deployment.load_model"):
        monkeypatch.setattr(f"paddle_clip.cli.{loader}", lambda *_: pytest.fail("the model was loaded"))
    assert fails("search", tmp_path / "x.npy", "--image", photos, words=["has 6 images: --image takes one"])
    for command, name in (("probe", "x.npz"), ("embed", "x.npy"), ("finetune", "x.pdparams")):
        missing = tmp_path / "none" / name
        assert fails(command, photos, "-o", missing, words=["the folder of the output", "does not exist"])
    assert fails("export", photos, words=["is not an empty folder"])
    assert fails("export", tmp_path / "exported", "--dtype", "float64", words=["export takes float32"])


def test_no_labels_and_no_texts(fails, photos, tmp_path):
    assert fails("classify", photos, words=["there are no labels: give --labels"])
    (tmp_path / "labels.txt").write_text("\n \n")
    assert fails("classify", photos, "--labels-file", tmp_path / "labels.txt", words=["is empty"])
    assert fails("classify", photos, "--labels-file", photos / "red" / "0.png", words=["not a text in UTF-8"])
    assert fails("classify", photos, "--labels", "a", "--template", "b", words=["'b' has no {}"])
    assert fails("classify", photos, "--labels", "a " * 100, words=["tokens long"])
    assert fails("classify", photos, "--prompts", "none", words=["no prompts for 'none'"])
    assert fails("evaluate", photos, "--labels", "a", words=["3 folders", "1 class names"])


def test_values_out_of_range(fails, photos, tmp_path):
    assert fails("classify", photos, "--labels", "a", "--top-k", 0, words=["--top-k 0; it must"])
    assert fails("classify", photos, "--labels", "a", "--dtype", "float16", words=["float16 does not run on the CPU"])
    assert fails("classify", photos, "--labels", "a", "--batch-size", 0, words=["--batch-size 0 and"])
    assert fails("embed", photos, "-o", tmp_path / "x.txt", words=["ends with .npy or .parquet"])
    assert fails("similarity", photos, "--texts", "a", "--plot", tmp_path / "x.txt", words=["end it with .png"])
    arguments = ["finetune", photos, "-o", tmp_path / "x.pdparams"]
    assert fails(*arguments, "--batch-size", 7, words=["6 pairs do not fill one batch of 7"])
    assert fails(*arguments, "--batch-size", 2, "--amp", "float16", words=["needs a GPU"])
    assert fails(*arguments, "--template", "a", words=["has no {}"])
    assert fails("convert", photos / "red" / "0.png", "--dtype", "int8", with_model=False, words=["dtype is 'int8'"])
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_not_there(fails, photos):
    assert fails("classify", photos, "--labels", "a", "--device", "toaster", words=["like 'cpu', 'gpu'"])
    if not paddle.device.is_compiled_with_cuda():
        remedy = ["no CUDA: use --device cpu, or install a build"]
        assert fails("classify", photos, "--labels", "a", "--device", "gpu", words=remedy)


def test_wrong_arguments_end_with_2_and_name_the_help(fails, photos):
    for arguments in ([], ["nothing"], ["classify"], ["search", "x.npy"], ["classify", photos, "--top-k", "many"]):
        assert fails(*arguments, with_model=False, code=2, words=["--help"])
    assert fails("search", "x.npy", "a", "--image", "b", with_model=False, code=2, words=["not allowed with"])
    assert fails("convert", "a.pt", "b.pt", "-o", "c", with_model=False, code=2, words=["convert several files"])


def test_an_unreadable_folder(fails, photos, monkeypatch, tmp_path):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)  # root, who may run this, is never refused
    words = [f"{photos}: Permission denied"]
    assert fails("embed", photos, "-o", tmp_path / "x.npy", words=words)
    assert fails("classify", photos, "--labels", "a", words=words)
    assert fails("evaluate", photos, words=words)
    assert fails("finetune", photos, "-o", tmp_path / "x.pdparams", words=words)


def test_our_faults_keep_their_traceback(monkeypatch, photos):
    def broken(*arguments):
        raise KeyError("a fault of ours")

    monkeypatch.setattr("paddle_clip.cli.conversion.table", broken)
    with pytest.raises(KeyError):
        cli.main(["models"])


def test_warnings_are_one_line_and_those_of_libraries_none(capsys, monkeypatch):
    import warnings

    def warn(rows):
        warnings.warn("of\nours", UserWarning, stacklevel=2)
        warnings.warn_explicit("of another", UserWarning, "/elsewhere/library.py", 1)
        return "table"

    monkeypatch.setattr("paddle_clip.cli.conversion.table", warn)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr() == ("table\n", "warning: of ours\n")


# ------------------------------------------------------------------------------------------------------------ processes


def start(*arguments, **options):
    command = [sys.executable, "-m", "paddle_clip", *map(str, arguments)]
    # A user's environment lacks this variable; importing Paddle has set it here.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **{**pipes, **options})


def test_help_needs_neither_numpy_nor_paddle(run):
    script = (
        "import sys; sys.modules.update(numpy=None, paddle=None); from paddle_clip.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: sys.exit(end.code)"
    )
    for command in ((), ("classify",), ("finetune",)):
        done = run("-W", "ignore", "-c", script, *command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: paddle-clip")
        assert "examples:" in done.stdout or not command


def test_help_in_chinese(run, monkeypatch):
    done = run("-m", "paddle_clip", "embed", "--help", LC_ALL="zh_CN.UTF-8", PYTHONUTF8="1")
    assert all(words in done.stdout for words in ("提取图像的特征", "例子：", "读取图像的线程数"))
    english, translated = (help_texts(locale, monkeypatch) for locale in ("en_GB.UTF-8", "zh_CN.UTF-8"))
    assert english == chinese.catalogue().keys(), "change data/help_zh.tsv with the help"
    assert translated == set(chinese.catalogue().values())


def help_texts(locale, monkeypatch):
    """All texts of the help in a locale, but for the examples."""
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("LC_ALL", locale)
    parser = build_parser()
    commands = parser._subparsers._group_actions[0]
    parsers = [parser, *commands.choices.values()]
    assert all(each.format_help() for each in parsers)  # whatever stands for %(default)s
    actions = [action for each in parsers for action in each._actions] + commands._choices_actions
    return {parser.description, parser.epilog, *(action.help for action in actions)} - {None, argparse.SUPPRESS}


def test_conversion_needs_no_paddle(run, model, tmp_path):
    script = "import sys; sys.modules['paddle'] = None; from paddle_clip.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run("-W", "ignore", "-c", script, "convert", model, "-o", tmp_path / "x.pdparams")
    assert done.returncode == 0, done.stderr
    console = (
        "import sys; sys.modules['paddle'] = None; sys.argv[0] = 'paddle-clip'; from paddle_clip.cli import console"
    )
    for command in (["--version"], ["models"], ["convert", model, "--check"]):
        done = run("-c", f"{console}; console()", *command)
        assert (done.returncode, done.stderr) == (0, ""), command
    done = run("-W", "ignore", "-c", script, "classify", ROOT, "--labels", "a")
    assert done.returncode == 1
    assert done.stderr.startswith("error: paddle_clip needs PaddlePaddle")


def test_a_closed_pipe_is_quiet():
    process = start("models", "--json", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_embedding_goes_on_where_it_was(number, model, tmp_path):
    picture = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, [40, 40, 3], np.uint8)).save(picture)
    (tmp_path / "in").mkdir()
    for index in range(1500):
        os.link(picture, tmp_path / "in" / f"{index:04}.png")
    arguments = ["embed", tmp_path / "in", "-o", tmp_path / "x.npy", "--model", model, "--batch-size", "1"]
    process = start(*arguments)
    journal = tmp_path / ".x.npy.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n"))  # it has begun
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "error: interrupted; run it again as it was to go on from there\n"
    assert not (tmp_path / "x.npy").exists()
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert len(np.load(tmp_path / "x.npy")) == 1500


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_interrupted_training_resumes(model, photos, tmp_path, succeeds):
    def training(*more, output):
        arguments = ["--epochs", "8", "--batch-size", "3", "--learning-rate", "1e-4", "--model", model]
        return start("finetune", photos, "-o", output, *arguments, *more)

    process = training("--save-every", "1", output=tmp_path / "x.pdparams")
    assert process.stdout.readline() != ""  # the first epoch is over
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted; run it again with --resume to go on from the last checkpoint\n"
    assert os.listdir(tmp_path) == ["x.checkpoint.safetensors"]
    again = training("--resume", output=tmp_path / "x.pdparams")
    uninterrupted = training(output=tmp_path / "y.pdparams")
    assert again.wait() == uninterrupted.wait() == 0, again.stderr.read()
    assert (tmp_path / "x.pdparams").read_bytes() == (tmp_path / "y.pdparams").read_bytes()
