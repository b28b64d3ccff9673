"""The drawn world of the tiny model: scenes, their pictures and their captions.

A scene has one to three objects of a colour and a shape. A fifth of the colour-shape combinations is never trained on:
pictures of these show whether a model understands the words or remembers the combinations.
"""

import math
import os
from collections import defaultdict
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw

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


def regular(corners, *radii):
    """A polygon with its first corner on top and its corners at these radii in turn."""
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) / 16


# Outlines in the unit circle, y downwards: the first is filled, the second is cut out of it.
SHAPES = {
    "circle": [_circle(0.95)],
    "square": [regular(4, 1.1) @ (np.array([[1, 1], [-1, 1]]) * 0.5**0.5)],
    "triangle": [regular(3, 1.1)],
    "star": [regular(10, 1.1, 0.45)],
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
MOST_PAIRS = len(SEEN) * 2 // 3  # pairs in a batch of plain captions, which all differ


class Scene(NamedTuple):
    """The content of a picture: one large object in the middle, or small objects anywhere."""

    colour: str
    shape: str
    background: str
    count: int = 1
    size: Optional[str] = None  # size of one object
    position: Optional[str] = None  # position of one small object

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
        # The shape is listed twice: it is the hardest to see.
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
    """A picture of a scene: colours, size, place, tilt and light vary; `noise` is its largest noise, in grey levels."""
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
    """The centre and radius of each object; the side of the picture is 1."""
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
        if tries % 50 == 0:  # no room is left for the next object: begin again
            places = []
    return places


# ---- Captions ------------------------------------------------------------------------------------------------------

KINDS = ("", "good ", "bad ", "bright ", "dark ", "blurry ", "cropped ", "close-up ", "low resolution ", "clean ")
MEDIA = ("photo", "picture", "image", "drawing", "painting", "sketch", "rendering", "illustration", "cartoon", "doodle")
OTHERS = ("{}", "{}", "there is {}", "this is {}", "i see {}", "look at {}", "art of {}", "itap of {}", "an icon of {}")

# Templates of zero-shot classification (paper, section 3.1.4), for pictures of one object and of several.
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
    """A caption of a scene: colour, shape, one object or several, and the attributes mentioned."""
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


def name(colour, shape):
    """What an object is called."""
    return f"{colour} {shape}"


def plural(colour, shape):
    """What several objects are called."""
    return f"{colour} {PLURALS[shape]}"


def about(scene, attribute, value):
    """A caption of a scene: colour, shape, and one more attribute, with the given value."""
    thing, things = f"{scene.colour} {scene.shape}", f"{scene.colour} {PLURALS[scene.shape]}"
    if attribute == "count":
        return f"a photo of {COUNTS[value]} {thing if value == 1 else things}."
    if attribute == "size":
        return f"a photo of a {value} {thing}."
    if attribute == "position":
        return f"a photo of a {thing} {_where(value)}."
    return f"a photo of {'some ' + things if scene.plural else 'a ' + thing} on a {value} background."


class Pair(NamedTuple):
    """A picture and a caption of a batch, before they are drawn and written."""

    scene: Scene
    mentioned: set  # attributes in the caption beside colour, shape, and one object or several
    plain: bool  # whether the caption has no words beyond these

    def fits(self, scene):
        """Whether the caption is true of a scene."""
        attributes = ("colour", "shape", "plural", *self.mentioned)
        return all(getattr(scene, name) == getattr(self.scene, name) for name in attributes)


def random_pairs(random, number, variety=1.0, combinations=SEEN):
    """A batch of pairs. No caption is true of another pair's scene: the loss would call the two a mismatch.

    The pairs come in twos that differ in one attribute, which both captions mention: if colour and shape alone told
    them apart, the other attributes would not be learned. `variety` is the share of pairs that are not plain.
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


# ---- Samples --------------------------------------------------------------------------------------------------------

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
