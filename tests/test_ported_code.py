"""What code written for other models does, done with ours: arguments, names, workers, pickles, adapters."""

import copy
import pickle

import numpy as np
import paddle
import pytest

import paddle_clip
from paddle_clip import extras, hub, presets

TOLERANCE = 1e-5  # of the largest number; measured 2e-6
ENGINES = ["paddle"] + (["openvino"] if extras.makes_openvino() else [])
LOADER = """
import paddle_clip, paddle
model, preprocess = paddle_clip.load("tiny")

class Pictures(paddle.io.Dataset):
    paths = paddle_clip.samples() * 2
    def __len__(self): return len(self.paths)
    def __getitem__(self, index): return preprocess(self.paths[index]), paddle_clip.tokenize("a circle")[0]

for run in range(20):
    for images, tokens in paddle.io.DataLoader(Pictures(), batch_size=4, num_workers=2):
        assert isinstance(images, paddle.Tensor) and images.shape == [4, 3, 64, 64] and tokens.shape == [4, 77]
assert (images[-1] == preprocess(Pictures.paths[-1])).all()
print("done")
"""


@pytest.fixture(scope="module")
def tiny():
    return paddle_clip.load("tiny")


def features(model, picture, text="a red circle"):
    with paddle.no_grad():
        return [np.asarray(model.encode_image(picture)), np.asarray(model.encode_text(model.tokenize(text)))]


@pytest.fixture
def picture(tiny):
    return tiny[1](paddle_clip.samples()[6]).unsqueeze(0)


# ----------------------------------------------------------------------------------------------------------- arguments


def test_arguments_of_openais_load(tiny, tmp_path):
    model, _ = paddle_clip.load("tiny", device="cpu", jit=False, download_root=tmp_path)
    assert model.config == tiny[0].config
    with pytest.raises(ValueError, match=r"paddle_clip\.compile\(model\)"):
        paddle_clip.load("tiny", jit=True)
    with pytest.raises(ValueError, match=r"load\(name, device='cuda'\)"):
        paddle_clip.load("tiny", "cuda")


def test_download_root_is_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_cached", lambda row, folder, mirror: pytest.fail(f"{row.name} in {folder}"))
    with pytest.raises(pytest.fail.Exception, match=f"RN50 in {tmp_path}"):
        paddle_clip.load("RN50", download_root=tmp_path)


@pytest.mark.skipif(paddle.device.is_compiled_with_cuda(), reason="this build of Paddle has CUDA")
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:0"])
def test_a_gpu_that_paddle_was_not_built_for(device):
    with pytest.raises(ValueError, match=r"no CUDA: use device='cpu', or install a build"):
        paddle_clip.load("tiny", device=device)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("ViT-B-32", "ViT-B/32"),
        ("vit-b/32", "ViT-B/32"),
        ("openai/clip-vit-base-patch32", "ViT-B/32"),
        ("rn50", "RN50"),
        ("rn50X16", "RN50x16"),
        ("ViT-L-14-336", "ViT-L/14@336px"),
        ("openai/clip-vit-large-patch14-336", "ViT-L/14@336px"),
        ("ViT-B-16-quickgelu", "ViT-B/16"),
        ("vit-h-14", "ViT-H-14"),
    ],
)
def test_names_that_others_give(name, official):
    assert presets.preset(name).name == official


def test_no_two_models_share_a_name():
    rows = (*presets.PRESETS, *presets.OPEN_CLIP, presets.TINY)
    assert [presets.preset(row.name) for row in rows] == list(rows)


@pytest.mark.parametrize(("name", "meant"), [("ViT-B/23", "ViT-B/32"), ("RN5O", "RN50"), ("ViT-B-32.pt", "ViT-B/32")])
def test_a_slip_is_told_the_name_that_is_right(name, meant):
    with pytest.raises(ValueError, match=f"did you mean {meant}"):
        paddle_clip.load(name)


def test_a_model_that_is_not_openais_is_not_fetched():
    with pytest.raises(ValueError, match="ViT-H-14 is none of OpenAI's models"):
        paddle_clip.load("ViT-H-14")


def test_a_file_comes_before_a_name_that_others_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open("rn50", "wb").close()
    assert hub.find("rn50") == "rn50"


# ------------------------------------------------------------------------------------------------------------- workers


def test_a_dataset_of_preprocessed_pictures_is_read_by_workers(run):
    done = run("-W", "ignore", "-c", LOADER)
    assert done.stdout == "done\n", done.stderr


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_models_are_copied(tiny, picture, copied):
    model = paddle_clip.CLIP(32, 32, 2, 64, 16, 77, 49408, 64, 1, 2)
    model.eval()
    model.logit_scale.trainable = False
    again = copied(model)
    image = paddle.ones([1, 3, 32, 32])
    for one, other in zip(features(model, image), features(again, image)):
        assert np.array_equal(one, other)
    assert not again.training and not again.logit_scale.trainable and again.config == model.config
    optimizer = paddle.optimizer.SGD(parameters=again.parameters())
    before = model.visual.proj.numpy()
    again.encode_image(image).sum().backward()
    optimizer.step()
    assert np.array_equal(model.visual.proj.numpy(), before)
    assert not np.array_equal(again.visual.proj.numpy(), before)
    resnet = copied(tiny[0])  # batch norms have buffers, which a program must hold
    np.testing.assert_allclose(
        features(paddle_clip.compile(resnet, engine="paddle"), picture)[0], features(tiny[0], picture)[0], atol=1e-4
    )


def test_predictors_are_copied(tiny, picture, tmp_path):
    paddle_clip.export(tiny[0], tmp_path / "exported")
    predictor = paddle_clip.Predictor(tmp_path / "exported", threads=1)
    for again in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert again.threads == 1
        assert np.array_equal(features(again, picture)[0], features(predictor, picture)[0])
    with pytest.raises(TypeError, match="export the model"):
        pickle.dumps(paddle_clip.compile(tiny[0], engine="paddle"))


def test_representations_can_be_read(tiny):
    _, preprocess = tiny
    from paddle_clip.transforms import ImageTransform

    again = eval(repr(preprocess), {"ImageTransform": ImageTransform})
    assert repr(again) == repr(preprocess) == repr(pickle.loads(pickle.dumps(preprocess)))
    assert np.array_equal(again.array(paddle_clip.samples()[0]), preprocess.array(paddle_clip.samples()[0]))
    assert "embed_dim=64" in repr(paddle_clip.compile(tiny[0], engine="paddle"))


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.skipif(paddle.get_device() != "cpu", reason="Paddle computes on a GPU")
def test_mixed_precision_on_the_cpu_warns_and_changes_nothing(tiny, picture):
    with pytest.warns(UserWarning, match="no effect"), paddle.amp.auto_cast(dtype="bfloat16"):
        found = features(tiny[0], picture)
    for one, other in zip(found, features(tiny[0], picture)):
        assert np.array_equal(one, other)


# ------------------------------------------------------------------------------------------------- pictures as numbers


def test_arrays_and_tensors_are_pictures(tiny):
    _, preprocess = tiny
    pixels = np.random.default_rng(0).integers(0, 256, [60, 80, 3], dtype=np.uint8)
    expected = preprocess.array(pixels)
    scaled = (pixels / 255).astype(np.float32)
    for given in (pixels, scaled, pixels.transpose(2, 0, 1), scaled.transpose(2, 0, 1)):
        assert np.array_equal(preprocess.array(given), expected)
        assert np.array_equal(preprocess.array(paddle.to_tensor(given)), expected)
        assert np.array_equal(paddle_clip.embed(*tiny, [given]).features, paddle_clip.embed(*tiny, [pixels]).features)
    with pytest.raises(ValueError, match=r"numbers from 0 to 1; found -.* no second time"):
        preprocess(preprocess(pixels))
    with pytest.raises(ValueError, match=r"found float32 \[1, 3, 60, 80\]"):
        preprocess(paddle.to_tensor(scaled.transpose(2, 0, 1)[None]))


# ------------------------------------------------------------------------------------------------------------ adapters


class Adapted(paddle.nn.Layer):
    """A projection, or a convolution, and a low-rank one beside it."""

    def __init__(self, projection):
        super().__init__()
        self.projection = projection
        if type(projection) is paddle.nn.Linear:
            inputs, outputs = projection.weight.shape
            self.down = paddle.nn.Linear(inputs, 4, bias_attr=False)
            self.up = paddle.nn.Linear(4, outputs, bias_attr=False)
        else:
            outputs, inputs, *window = projection.weight.shape
            places = projection._stride, projection._padding
            self.down = paddle.nn.Conv2D(inputs, 4, window, *places, bias_attr=False)
            self.up = paddle.nn.Conv2D(4, outputs, 1, bias_attr=False)

    def forward(self, x):
        return self.projection(x) + self.up(self.down(x))


ADAPTED = {  # {model: names of the layers that are replaced, and how many there are in all}
    "vit": ({"conv1", "in_proj", "out_proj", "c_fc", "c_proj"}, 1 + 16),
    "tiny": (
        {"conv1", "conv2", "conv3", "0", "k_proj", "q_proj", "v_proj", "c_proj", "in_proj", "out_proj", "c_fc"},
        16 + 28,
    ),
    "tiny_cn": (
        {"conv1", "conv2", "conv3", "0", "k_proj", "q_proj", "v_proj", "c_proj", "query", "key", "value", "dense"},
        22 + 28,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_of_every_projection_are_compiled(kind, engine):
    model = paddle_clip.CLIP(32, 32, 2, 64, 16, 77, 49408, 64, 1, 2) if kind == "vit" else paddle_clip.load(kind)[0]
    model.eval()
    places = [(layer, name) for layer in model.sublayers() for name in list(layer._sub_layers)]
    places = [place for place in places if type(getattr(*place)) in (paddle.nn.Linear, paddle.nn.Conv2D)]
    assert ({name for _, name in places}, len(places)) == ADAPTED[kind]
    for place in places:
        setattr(*place, Adapted(getattr(*place)))
    for tower, name in ((model.visual, "proj"), (model, "text_projection")):  # parameters, where there are any
        if name in tower._parameters:
            weight = getattr(tower, name)
            delattr(tower, name)
            setattr(tower, name, weight + paddle.randn([weight.shape[0], 4]) @ paddle.randn([4, weight.shape[1]]) / 10)
    side = model.config.image_resolution
    image = paddle.to_tensor(np.random.default_rng(0).standard_normal([3, 3, side, side]).astype(np.float32))
    compiled = paddle_clip.compile(model, engine=engine)
    for eager, fast in zip(features(model, image), features(compiled, image)):
        assert np.abs(eager - fast).max() < TOLERANCE * np.abs(eager).max()
