"""Trains the CLIP that ships in the package, from scratch, on the CPU, on pictures it draws itself.

    python examples/train_tiny.py

writes paddle_clip/data/clip_tiny.pt (OpenAI's names and format, half precision), clip_tiny.json beside it (what it was
trained on and how well it does) and the pictures in paddle_clip/data/samples. A picture shows one to three objects of a
colour and a shape; a fifth of the colour-shape combinations is never trained on, and tells whether the model
understands the words or remembers the combinations.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from typing import NamedTuple, Optional

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
sys.path.insert(0, ROOT)
if __name__ == "__main__":
    # Paddle reads these when it is imported: without them it computes on one core, and on AMD processors slowly.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(os.cpu_count()))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import paddle_clip  # before paddle
from paddle_clip import archives, weights, writers

# isort: split
import paddle

# ---- What there is to see ------------------------------------------------------------------------------------------

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (125, 50, 165),
    "pink": (245, 140, 190),
    "brown": (115, 70, 35),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "cyan": (60, 205, 215),
}
BACKGROUNDS = ("white", "black", "gray", "yellow", "green", "blue")
COUNTS = {1: "one", 2: "two", 3: "three"}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
POSITIONS = {
    "top left": (0, 0),
    "top": (0.5, 0),
    "top right": (1, 0),
    "left": (0, 0.5),
    "middle": (0.5, 0.5),
    "right": (1, 0.5),
    "bottom left": (0, 1),
    "bottom": (0.5, 1),
    "bottom right": (1, 1),
}


def _circle(radius=1.0, x=0.0):
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _regular(corners, *radii):
    """A polygon with its first corner on top, whose corners are at these radii in turn."""
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) / 16


# Outlines in the unit circle, y downwards: what is filled, then what is cut out of it.
SHAPES = {
    "circle": [_circle(0.95)],
    "square": [_regular(4, 1.1) @ (np.array([[1, 1], [-1, 1]]) * 0.5**0.5)],
    "triangle": [_regular(3, 1.1)],
    "star": [_regular(10, 1.1, 0.45)],
    "heart": [_heart()],
    "cross": [
        np.array(
            [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
        )
        / 3
    ],
    "ring": [_circle(), _circle(0.58)],
    "diamond": [np.array([(0, -1.1), (0.65, 0), (0, 1.1), (-0.65, 0)])],
}
PLURALS = {shape: shape + ("es" if shape.endswith("ss") else "s") for shape in SHAPES}

COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# Every colour is seen with six or seven of the eight shapes, every shape with nine or ten of the twelve colours.
HELD_OUT = [
    (colour, shape) for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES) if (2 * i + j) % 5 == 0
]
SEEN = [pair for pair in COMBINATIONS if pair not in HELD_OUT]
MOST_PAIRS = len(SEEN) * 2 // 3  # in a batch of plain captions, all different


class Scene(NamedTuple):
    """What a picture shows. One large object is in the middle; several are small, anywhere."""

    colour: str
    shape: str
    background: str
    count: int = 1
    size: Optional[str] = None  # of one object
    position: Optional[str] = None  # of one small object

    @property
    def plural(self):
        return self.count > 1


def choose(random, values, without=()):
    values = [value for value in values if value not in without]
    return values[random.integers(len(values))]


def random_scene(random, combinations, plain=False):
    """A scene of one of the (colour, shape) pairs; a plain one shows one large object."""
    colour, shape = choose(random, combinations)
    scene = Scene(colour, shape, choose(random, BACKGROUNDS, [colour]))
    if plain:
        return scene._replace(size="large")
    if random.random() < 0.4:
        return scene._replace(count=choose(random, COUNTS, [1]))
    return _sized(random, scene, choose(random, SIZES))


def _sized(random, scene, size):
    position = choose(random, POSITIONS) if size == "small" else None
    return scene._replace(count=1, size=size, position=position)


def changed(random, scene, combinations, plain=False):
    """The scene with one attribute changed, colour or shape if it is plain, and the name of that attribute."""
    attributes = ["colour", "shape"]
    if not plain:
        # The shape twice, as it is the hardest to see.
        attributes += ["shape", "background", "count", *(name for name in ("size", "position") if getattr(scene, name))]
    attribute = choose(random, attributes)
    if attribute == "colour":
        colours = [colour for colour, shape in combinations if shape == scene.shape]
        return scene._replace(colour=choose(random, colours, [scene.colour, scene.background])), attribute
    if attribute == "shape":
        shapes = [shape for colour, shape in combinations if colour == scene.colour]
        return scene._replace(shape=choose(random, shapes, [scene.shape])), attribute
    if attribute == "background":
        background = choose(random, BACKGROUNDS, [scene.colour, scene.background])
        return scene._replace(background=background), attribute
    if attribute == "count":
        count = choose(random, COUNTS, [scene.count])
        if count == 1:
            return _sized(random, scene, "small"), attribute
        return scene._replace(count=count, size=None, position=None), attribute
    if attribute == "size":
        return _sized(random, scene, choose(random, SIZES, [scene.size])), attribute
    return scene._replace(position=choose(random, POSITIONS, [scene.position])), attribute


# ---- Pictures ------------------------------------------------------------------------------------------------------


def draw(scene, random, side=64, noise=6.0):
    """A picture of a scene: colours, size, place, tilt and light vary; `noise` is the most it has, in grey levels."""
    fine = Image.new("L", (4 * side, 4 * side))
    for x, y, radius in _places(scene, random):
        tilt = random.uniform(-0.35, 0.35)  # ±20°: a square does not become a diamond
        turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        for outline, value in zip(SHAPES[scene.shape], (255, 0)):
            corners = (outline @ turn * radius + (x, y)) * 4 * side
            ImageDraw.Draw(fine).polygon([tuple(corner) for corner in corners], fill=value)
    mask = np.asarray(fine.reduce(4), np.float32) / 255
    colour, background = (
        np.float32(COLOURS[name]) + random.uniform(-14, 14, 3).astype(np.float32)
        for name in (scene.colour, scene.background)
    )
    pixels = background + mask[..., None] * (colour - background)  # [S, S, 3]
    slope = random.uniform(-0.1, 0.1, 2).astype(np.float32)
    across = np.linspace(-1, 1, side, dtype=np.float32)
    pixels *= 1 + (slope[0] * across + slope[1] * across[:, None])[..., None]
    if noise:
        pixels += random.standard_normal(pixels.shape, np.float32) * np.float32(random.uniform(0, noise))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _places(scene, random):
    """The centre and radius of each object, the side of the picture being 1."""
    if scene.count == 1:
        radius = random.uniform(0.21, 0.25) if scene.size == "small" else random.uniform(0.31, 0.4)
        centre = [0.29 + 0.42 * at for at in POSITIONS[scene.position or "middle"]]
        return [(*(centre + random.uniform(-0.03, 0.03, 2)), radius)]
    places, tries = [], 0
    least = 0.21 if scene.count == 2 else 0.18
    while len(places) < scene.count:
        x, y, radius = (*random.uniform(0.23, 0.77, 2), random.uniform(least, least + 0.03))
        if all(math.hypot(x - u, y - v) > 1.1 * (radius + r) for u, v, r in places):
            places.append((x, y, radius))
        tries += 1
        if tries % 50 == 0:  # no room is left for the next: begin again
            places = []
    return places


# ---- Captions ------------------------------------------------------------------------------------------------------

KINDS = ("", "good ", "bad ", "bright ", "dark ", "blurry ", "cropped ", "close-up ", "low resolution ", "clean ")
MEDIA = ("photo", "picture", "image", "drawing", "painting", "sketch", "rendering", "illustration", "cartoon", "doodle")
OTHERS = ("{}", "{}", "there is {}", "this is {}", "i see {}", "look at {}", "art of {}", "itap of {}", "an icon of {}")

# With these a class is looked for, as in section 3.1.4 of the paper: in pictures of one object, and of several.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a bright photo of the {}.",
    "this is a {}.",
    "a {}",
)
PLURAL_TEMPLATES = ("a photo of some {}.", "a picture of the {}.", "a drawing of several {}.", "some {}")


def caption(scene, mentioned, plain, random):
    """A text on a scene that tells its colour, its shape, whether it is one, and the attributes mentioned."""
    thing = f"{_colour(scene.colour, random)} {scene.shape}"
    if scene.plural:
        thing = f"{_colour(scene.colour, random)} {PLURALS[scene.shape]}"
        thing = f"{COUNTS[scene.count] if 'count' in mentioned else choose(random, ('some', 'the', 'several'))} {thing}"
    else:
        if "size" in mentioned:
            thing = f"{choose(random, SIZES[scene.size])} {thing}"
        thing = f"{_article(choose(random, ('a', 'a', 'the', 'one')), thing)} {thing}"
    if plain:
        return thing
    phrases = []
    if "position" in mentioned:
        phrases.append(_where(scene.position))
    if "background" in mentioned:
        phrase = choose(random, ("on a {} background", "against a {} background", "on {}", "in front of {}"))
        phrases.append(phrase.format(_colour(scene.background, random)))
    if random.random() < 0.5:
        phrases.reverse()
    sentence = " ".join([thing, *phrases])
    template = choose(random, OTHERS)
    if random.random() < 0.6:
        medium = choose(random, KINDS) + choose(random, MEDIA)
        template = f"{_article(choose(random, ('a', 'the')), medium)} {medium} of {{}}"
    return template.format(sentence) + choose(random, ("", "."))


def _article(article, word):
    return "an" if article == "a" and word[0] in "aeiou" else article


def _where(position):
    return f"{'at' if position in ('left', 'right', 'top', 'bottom') else 'in'} the {position}"


def _colour(name, random):
    return choose(random, ("gray", "grey")) if name == "gray" else name


class Pair(NamedTuple):
    """A picture and a text of a batch, before they are drawn and written."""

    scene: Scene
    mentioned: set  # attributes that the caption tells beside colour, shape and whether it is one
    plain: bool  # whether the caption tells no more, in no more words than it takes

    def fits(self, scene):
        """Whether the caption is true of a scene."""
        told = ("colour", "shape", "plural", *self.mentioned)
        return all(getattr(scene, name) == getattr(self.scene, name) for name in told)


def random_pairs(random, number, variety=1.0, combinations=SEEN):
    """A batch. No caption is true of another's scene: the loss would call the two a mismatch.

    The pairs come in twos that differ in one attribute, which both captions mention: told apart by colour and shape
    alone, the other attributes would not be learned. `variety` is the share of those that are not plain.
    """
    batch, taken = [], defaultdict(list)
    while len(batch) < number:
        plain = bool(random.random() >= variety)
        scene = random_scene(random, combinations, plain)
        other, attribute = changed(random, scene, combinations, plain)
        news = []
        for one in (scene, other):
            optional = [name for name in ("background", "size", "position", "count") if getattr(one, name)]
            mentioned = {name for name in optional if name == attribute or random.random() < 0.3}
            news.append(Pair(one, set() if plain else mentioned, plain))
        rivals = [(new, old) for new in news for old in taken[new.scene[:2]]]
        if any(a.fits(b.scene) or b.fits(a.scene) for a, b in [news, *rivals]):
            continue
        for new in news:
            taken[new.scene[:2]].append(new)
        batch += news
    return batch[:number]


# ---- Training ------------------------------------------------------------------------------------------------------


def variety(progress):
    """What `random_pairs` takes at a point of the training, from 0 to 1.

    While no shape is recognised, the loss falls if the texts forget the shapes, and then none ever is. In plain pairs
    there is little else, and large objects are the easiest: these come first, and some remain to the end.
    """
    return min(0.85, max(0.0, (progress - 0.05) * 6))


class Batches(paddle.io.Dataset):
    """`steps` batches of images [B, 3, R, R] and tokens [B, L], each drawn from its own seed."""

    def __init__(self, steps, size, resolution, seed):
        self.steps, self.size, self.seed = steps, size, seed
        self.preprocess = paddle_clip.image_transform(resolution)
        self.resolution = resolution

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        random = np.random.default_rng([self.seed, index])
        pairs = random_pairs(random, self.size, variety(index / self.steps))
        images = [self.preprocess(draw(pair.scene, random, self.resolution)).numpy() for pair in pairs]
        tokens = paddle_clip.tokenize([caption(*pair, random) for pair in pairs]).numpy()
        length = (tokens != 0).sum(axis=1).max()  # what follows the end of text changes nothing
        return np.stack(images), tokens[:, :length]


def train(model, steps, seed, batch_size=48, rate=2e-3, log_every=100):
    """Trains a model in place and returns [(step, mean loss since the last)]."""
    batches = Batches(steps, batch_size, model.visual.input_resolution, seed)
    loader = paddle.io.DataLoader(batches, batch_size=None, num_workers=1, use_shared_memory=False)
    warmup = max(1, min(100, steps // 10))
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(rate, max(1, steps - warmup)), warmup, 0.0, rate
    )
    matrices = {parameter.name for parameter in model.parameters() if parameter.ndim > 1}
    optimizer = paddle.optimizer.AdamW(
        schedule,
        beta2=0.98,
        weight_decay=0.05,
        apply_decay_param_fun=lambda name: name in matrices,
        parameters=model.parameters(),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    contrastive = paddle_clip.ContrastiveLoss()
    seen = np.zeros([model.vocab_size, 1], np.float32)
    log, losses = [], []
    model.train()
    for step, (images, tokens) in enumerate(tqdm(loader, total=steps, disable=None), 1):
        seen[tokens.numpy()] = 1
        loss = contrastive(model.encode_image(images), model.encode_text(tokens), model.logit_scale)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        contrastive.clamp(model.logit_scale)
        schedule.step()
        losses.append(loss.item())
        if step % log_every == 0 or step == steps:
            log.append((step, round(float(np.mean(losses)), 4)))
            print("step {}  loss {}".format(*log[-1]), flush=True)
            losses = []
    model.eval()
    # A word it has never read says nothing: zeros, not the noise it began with.
    model.token_embedding.weight.set_value(model.token_embedding.weight * paddle.to_tensor(seen))
    return log


def save(model, path):
    """Writes OpenAI's state dict as `torch.save` would, in half precision but for norms and small embeddings."""
    arrays = dict(weights.to_openai(name, tensor.numpy()) for name, tensor in model.state_dict().items())

    def dtype_of(name):
        return "float16" if name == "token_embedding.weight" else weights.published_dtype(name)

    writers.write(path, arrays, dtype_of, lambda checksums: {"activation": "quickgelu", "crc32": checksums})


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def encode_images(model, images, batch=200):
    with paddle.no_grad():
        features = [model.encode_image(paddle.stack(images[at : at + batch])) for at in range(0, len(images), batch)]
    features = paddle.concat(features).numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def encode_texts(model, *several):
    """Normalised features [N, E] of N classes, each the mean over lists of N texts (paper, section 3.1.4)."""
    with paddle.no_grad():
        features = [model.encode_text(paddle_clip.tokenize(texts)).numpy() for texts in several]
    mean = sum(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_pictures(combinations, number, seed, side=64):
    """`number` scenes and their pictures, of each combination in turn; none is one of the training's.

    Every other one shows one large object, the next anything.
    """
    random = np.random.default_rng([seed, 10**9])
    each = len(combinations)
    scenes = [
        random_scene(random, [combinations[index % each]], plain=index // each % 2 == 0) for index in range(number)
    ]
    return scenes, [draw(scene, random, side) for scene in scenes]


def evaluate(model, preprocess, scenes, pictures):
    """Zero-shot accuracies, in percent: of colour and shape among all combinations, and of each other attribute.

    A combination is asked for as one object and as several, and the nearest text counts, unless said otherwise.
    """
    images = encode_images(model, [preprocess(picture) for picture in pictures])
    labels = np.array([COMBINATIONS.index(scene[:2]) for scene in scenes])

    def classes(templates, names):
        return encode_texts(model, *([template.format(name) for name in names] for template in templates))

    one = classes(TEMPLATES, [f"{colour} {shape}" for colour, shape in COMBINATIONS])
    several = classes(PLURAL_TEMPLATES, [f"{colour} {PLURALS[shape]}" for colour, shape in COMBINATIONS])
    similarity = images @ np.concatenate([one, several]).T  # [N, 2 * classes]
    best = similarity.argmax(axis=1) % len(COMBINATIONS)
    as_one = similarity[:, : len(COMBINATIONS)].argmax(axis=1)

    def percent(right):
        return round(100 * float(np.mean(right)), 2)

    accuracies = {
        "colour and shape": percent(best == labels),
        "colour": percent([COMBINATIONS[index][0] == scene.colour for index, scene in zip(best, scenes)]),
        "shape": percent([COMBINATIONS[index][1] == scene.shape for index, scene in zip(best, scenes)]),
        "colour and shape, asked for one object": percent(as_one == labels),
    }
    large = np.array([scene.size == "large" for scene in scenes])
    accuracies["colour and shape of one large object, asked for one"] = percent((as_one == labels)[large])
    alternatives = {"count": COUNTS, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}
    for attribute, values in alternatives.items():
        asked = [(image, scene) for image, scene in zip(images, scenes) if getattr(scene, attribute)]
        if not asked:
            continue
        texts = [[_about(scene, attribute, value) for value in values] for _, scene in asked]
        distinct = sorted({text for row in texts for text in row})
        features = dict(zip(distinct, encode_texts(model, distinct)))
        truth = [_about(scene, attribute, getattr(scene, attribute)) for _, scene in asked]
        best = [max(row, key=lambda text: features[text] @ image) for (image, _), row in zip(asked, texts)]
        accuracies[attribute] = percent(np.array(best) == truth)
    return accuracies


def _about(scene, attribute, value):
    """A caption of a scene that mentions one attribute more than colour and shape, with the given value."""
    thing, things = f"{scene.colour} {scene.shape}", f"{scene.colour} {PLURALS[scene.shape]}"
    if attribute == "count":
        return f"a photo of {COUNTS[value]} {thing if value == 1 else things}."
    if attribute == "size":
        return f"a photo of a {value} {thing}."
    if attribute == "position":
        return f"a photo of a {thing} {_where(value)}."
    return f"a photo of {'some ' + things if scene.plural else 'a ' + thing} on a {value} background."


# ---- What is in the package ----------------------------------------------------------------------------------------

# Pictures to try the model on, by file name. The first five are of combinations it was never trained on.
SAMPLES = {
    "red-circle": Scene("red", "circle", "white", size="large"),
    "orange-star": Scene("orange", "star", "blue", size="large"),
    "green-heart": Scene("green", "heart", "yellow", size="large"),
    "blue-triangle": Scene("blue", "triangle", "gray", size="large"),
    "black-cross": Scene("black", "cross", "green", size="large"),
    "yellow-diamond": Scene("yellow", "diamond", "black", size="large"),
    "purple-square": Scene("purple", "square", "white", size="large"),
    "pink-ring": Scene("pink", "ring", "blue", size="large"),
}


def save_samples(folder):
    os.makedirs(folder, exist_ok=True)
    for index, (name, scene) in enumerate(SAMPLES.items()):
        draw(scene, np.random.default_rng(index), 224, noise=0).save(os.path.join(folder, f"{name}.png"), optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4700, help="batches to train on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=48, help="pairs in each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1200, help="in each of the two tests (default: %(default)s)")
    package = os.path.normpath(os.path.join(ROOT, "paddle_clip", "data"))
    parser.add_argument("--output", default=package, help="folder to write into (default: the package's data)")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.batch_size, arguments.pictures) < 1:
        parser.error("--steps, --batch-size and --pictures must be 1 or more")
    if arguments.batch_size > MOST_PAIRS:
        parser.error(f"--batch-size must be {MOST_PAIRS} or less: plain captions are all different in a batch")
    os.makedirs(arguments.output, exist_ok=True)
    start = time.perf_counter()
    paddle.seed(arguments.seed)
    model = paddle_clip.clip_tiny()
    log = train(model, arguments.steps, arguments.seed, arguments.batch_size)
    trained = time.perf_counter()
    path = os.path.join(arguments.output, "clip_tiny.pt")
    save(model, path)

    model, preprocess = paddle_clip.load(path)  # what is tested is the file
    accuracy = {}
    for name, combinations in (("held out", HELD_OUT), ("seen", SEEN)):
        scenes, pictures = test_pictures(combinations, arguments.pictures, arguments.seed)
        accuracy[name] = evaluate(model, preprocess, scenes, pictures)
        print(f"{name}: " + ", ".join(f"{what} {percent} %" for what, percent in accuracy[name].items()), flush=True)
    done = time.perf_counter()
    record = {
        "file": os.path.basename(path),
        "sha256": archives.sha256(path),
        "bytes": os.path.getsize(path),
        "parameters": sum(parameter.size for parameter in model.parameters()),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch size": arguments.batch_size,
        "seconds": {"training": round(trained - start), "in all": round(done - start)},
        "paddle": paddle.__version__,
        "pictures in each test": arguments.pictures,
        "choices": len(COMBINATIONS),
        "templates": [*TEMPLATES, *PLURAL_TEMPLATES],
        "held out": [" ".join(pair) for pair in HELD_OUT],
        "accuracy in percent": accuracy,
        "loss": log,
    }
    partial = os.path.join(arguments.output, "clip_tiny.json.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    os.replace(partial, os.path.join(arguments.output, "clip_tiny.json"))
    save_samples(os.path.join(arguments.output, "samples"))
    print(f"{path}: {record['bytes']:,} bytes, {record['seconds']['in all']} s")


if __name__ == "__main__":
    main()
