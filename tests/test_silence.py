"""Nothing is printed that was not asked for: what reaches the file descriptors of a process, on good input."""

import json
import os
import pydoc
import subprocess
import sys

import pytest
from conftest import ROOT

import paddle_clip
from paddle_clip import extras
from paddle_clip.cli.main import build_parser

# Every public function, method and class; what needs an extra that is not installed is left out.
CALLS = """
import os, shutil
import paddle_clip
from paddle_clip import extras, plots

os.environ["PADDLE_CLIP_CACHE"] = "cache"
paddle_clip.available_models(), paddle_clip.available_prompts(), paddle_clip.prompts("CIFAR10")
paddle_clip.image_transform(64)
model, preprocess = paddle_clip.load("tiny")
chinese, chinese_preprocess = paddle_clip.load("tiny_cn")
samples = paddle_clip.samples()
image, text = preprocess(samples[0]).unsqueeze(0), paddle_clip.tokenize("a red circle")
paddle_clip.decode(text)
for engine in ("paddle", "openvino")[: 1 + extras.makes_openvino()]:
    paddle_clip.compile(model, engine=engine)(image, text)
paddle_clip.load_compiled("tiny", "paddle")
paddle_clip.export(model, "exported")
predictor = paddle_clip.Predictor("exported")
predictor(image, text)
for encoder, pictures in ((model, preprocess), (predictor, predictor.preprocess)):
    paddle_clip.classify(encoder, pictures, samples, ["red circle", "blue star"])
    paddle_clip.zero_shot_classifier(encoder, ["red circle"], ["a {}"])
    paddle_clip.encode_texts(encoder, ["a red circle"])
paddle_clip.classify(chinese, chinese_preprocess, samples, ["红色的圆形", "蓝色的星星"])
found = paddle_clip.embed(model, preprocess, samples, "samples.npy")
paddle_clip.search(model, preprocess, found.features, found.paths, "a red circle")
parts = [f"part-0000{i}-of-00002.npy" for i in range(2)]
for i in range(2):
    paddle_clip.embed(model, preprocess, samples, "part.npy", batch_size=4, shard=(i, 2))
paddle_clip.merge(parts, "whole.npy")
paddle_clip.load_features("whole.npy")
for name in ("red", "blue"):
    os.makedirs(f"classes/{name}")
    shutil.copy(samples[0], f"classes/{name}")
paddle_clip.evaluate(model, preprocess, "classes", templates=["a {}"])
pairs = paddle_clip.read_pairs("classes") * 4
paddle_clip.retrieval(model, preprocess, pairs)
before = paddle_clip.load("tiny")[0]
paddle_clip.finetune(model, pairs, "tuned.pdparams", batch_size=4, validation=pairs[:4], recompute=True)
paddle_clip.finetune(chinese, pairs, batch_size=4, lora=2)
paddle_clip.save(paddle_clip.interpolate(before, model), "between.safetensors")
paddle_clip.convert("tuned.pdparams", "tuned.pt")
paddle_clip.ContrastiveLoss()(model.encode_image(image), model.encode_text(text), model.logit_scale).backward()
paddle_clip.CLIP(32, 32, 2, 64, 16, 77, 49408, 64, 1, 2)(image[:, :, :32, :32], text)
paddle_clip.ChineseCLIP(32, 32, 2, 64, 16, 52, 21128, 64, 1, 2).encode_text(chinese.tokenize("圆形"))
model.set_state_dict(paddle_clip.clip_tiny().state_dict())
if extras.has("probe"):
    paddle_clip.linear_probe(found.features, list("aaaabbbb")).save("probe.npz")
    paddle_clip.LinearProbe.load("probe.npz").predict(found.features)
if extras.has("parquet"):
    paddle_clip.embed(model, preprocess, samples, "samples.parquet")
if extras.has("plot"):
    plots.similarity(samples, ["a shape"], found.features @ found.features[:1].T, "plot.png")
    paddle_clip.finetune(model, pairs, batch_size=4, plot="loss.png")
"""
# Those that need a cluster, and the full-sized models.
NOT_CALLED = {"embed_on_ray", *(name for name in paddle_clip.__all__ if name.startswith("clip_"))} - {"clip_tiny"}

COMMANDS = """
models --json
convert CLIP_TINY -o mine.pdparams --json
convert mine.pdparams --check --json
classify @samples --labels cross heart --model mine.pdparams --engine paddle --json
similarity @samples --texts cross --model mine.pdparams --json
embed @samples -o samples.npy --model mine.pdparams --json
embed @samples -o part.npy --shard 0/1 --model mine.pdparams --json
merge part-00000-of-00001.npy -o whole.npy --json
search samples.npy cross --model mine.pdparams --json
search samples.npy --image SAMPLE --model mine.pdparams --json
evaluate classes --model mine.pdparams --json
evaluate pairs.csv --model mine.pdparams --json
finetune pairs.csv -o tuned.pdparams --validation pairs.csv --model mine.pdparams --json
finetune classes -o tuned.pdparams --lora 2 --epochs 2 --model mine.pdparams --json
export exported --model mine.pdparams --json
classify @samples --labels cross heart --model exported --json
bench --repeat 1 --batch-size 1 --model exported --json
bench --repeat 1 --batch-size 1 --model mine.pdparams --json
cache --json
"""
WITH_EXTRAS = {
    "probe": "probe classes --C 1 -o probe.npz --model mine.pdparams --json",
    "plot": "similarity @samples --texts cross --plot x.png --model mine.pdparams --json",
}


@pytest.fixture
def printed(tmp_path):
    """A function running a script in a process of its own; returns its standard output. Its standard error is empty."""
    environment = {name: value for name, value in os.environ.items() if name != "GLOG_minloglevel"}
    environment.update(PYTHONPATH=ROOT, PADDLE_CLIP_CACHE=str(tmp_path / "cache"))

    def call(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return call


def documents(text):
    """The JSON documents that follow each other in a text."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def test_every_public_call(printed):
    assert printed("-c", CALLS) == ""


def test_no_public_call_is_forgotten():
    called = {name for name in paddle_clip._ROOM_OF if f"paddle_clip.{name}" in CALLS}
    values = {name: getattr(paddle_clip, name) for name in paddle_clip.__all__}
    results = {name for name, value in values.items() if hasattr(value, "_fields") or not callable(value)}
    others = results | {"CLIPConfig", "Encoder", "CheckpointError", "DownloadError"} | NOT_CALLED
    assert called | others == set(paddle_clip._ROOM_OF)


def test_every_command(printed, tmp_path):
    """All in one process; standard output holds nothing but their JSON."""
    (tmp_path / "classes" / "red").mkdir(parents=True)
    (tmp_path / "classes" / "blue").mkdir()
    sample = paddle_clip.samples()[0]
    for name in ("red", "blue"):
        os.symlink(sample, tmp_path / "classes" / name / "x.png")
    (tmp_path / "pairs.csv").write_text(f"image,caption\n{sample},cross\n{sample},a cross\n")
    tiny = os.path.join(os.path.dirname(paddle_clip.__file__), "data", "clip_tiny.pt")
    lines = COMMANDS.replace("CLIP_TINY", tiny).replace("SAMPLE", sample).strip().splitlines()
    lines += [line for extra, line in WITH_EXTRAS.items() if extras.has(extra)]
    code = f"from paddle_clip.cli import main\nfor line in {lines!r}:\n    assert main(line.split()) == 0, line"
    assert len(documents(printed("-c", code))) >= len(lines)


def test_no_command_is_forgotten():
    tried = {line.split()[0] for line in [*COMMANDS.strip().splitlines(), *WITH_EXTRAS.values()]}
    assert tried == set(build_parser()._subparsers._group_actions[0].choices)


def test_a_command_in_a_process_of_its_own(printed):
    assert len(documents(printed("-m", "paddle_clip", "bench", "--model", "tiny", "--repeat", "1", "--json"))) == 1
    assert printed("-m", "paddle_clip", "embed", "@samples", "-o", "x.npy", "--model", "tiny").count("\n") == 1


def test_help_is_short():
    """No signature spells out a long default, such as ImageNet's 80 templates."""
    for name in paddle_clip.__all__:
        value = getattr(paddle_clip, name)
        if callable(value):
            assert max(map(len, pydoc.plain(pydoc.render_doc(value)).splitlines())) < 1500, name
