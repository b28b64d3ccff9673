"""Trains the CLIP that ships in the package, from scratch, on the CPU, on pictures it draws itself.

    python examples/train_tiny.py

writes paddle_clip/data/clip_tiny.pt (OpenAI's names and format, half precision), clip_tiny.json beside it (what it was
trained on and how well it does) and the pictures in paddle_clip/data/samples. A picture shows one to three objects of a
colour and a shape. A fifth of the colour-shape combinations is never trained on: pictures of these show whether the
model understands the words or remembers the combinations.
"""

import argparse
import json
import os
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
if "paddle" not in sys.modules:
    # Paddle reads these when it is imported: without them it computes on one core, and slowly on AMD processors.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(os.cpu_count()))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")

import numpy as np
from tqdm import tqdm

import paddle_clip  # before paddle
import tiny_world
from paddle_clip.checkpoints import conversion, dialects, settings, writing
from paddle_clip.checkpoints.files import replacing, sha256
from tiny_world import (
    BACKGROUNDS,
    COMBINATIONS,
    COUNTS,
    HELD_OUT,
    MOST_PAIRS,
    POSITIONS,
    SEEN,
    SIZES,
    caption,
    draw,
    random_pairs,
    random_scene,
    save_samples,
)

# isort: split
import paddle

# ---- Training ------------------------------------------------------------------------------------------------------


def variety(progress):
    """The `variety` of `random_pairs` at a point of the training, from 0 to 1.

    As long as no shape is recognised, the loss falls if the texts forget the shapes, and then none is ever learned.
    Plain pairs show little else, and large objects are the easiest: these come first, and some remain to the end.
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
        pictures, captions = self.drawn(index)
        images = [self.preprocess(picture).numpy() for picture in pictures]
        tokens = paddle_clip.tokenize(captions).numpy()
        length = (tokens != 0).sum(axis=1).max()  # tokens after the end of text change nothing
        return np.stack(images), tokens[:, :length]

    def drawn(self, index):
        """The pictures and the captions of a batch."""
        random = np.random.default_rng([self.seed, index])
        pairs = random_pairs(random, self.size, variety(index / self.steps))
        pictures = [draw(pair.scene, random, self.resolution) for pair in pairs]
        return pictures, [caption(*pair, random) for pair in pairs]


def train(model, steps, seed, batch_size=48, rate=2e-3, log_every=100):
    """Trains a model in place and returns [(step, mean loss since the step before)]."""
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
    # Words it has never read get zeros in place of their initial noise.
    model.token_embedding.weight.set_value(model.token_embedding.weight * paddle.to_tensor(seen))
    return log


def save(model, path):
    """Writes OpenAI's state dict as `torch.save` would, in half precision but for norms and small embeddings."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    metadata = settings.metadata_of(model.config, model.preprocessing)

    def dtype_of(name):
        return "float16" if name == "token_embedding.weight" else dialects.published_dtype(name)

    writing.write(path, conversion.layout(arrays, path), dtype_of, lambda checksums: {**metadata, "crc32": checksums})


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def encode_images(model, images, batch=200):
    with paddle.no_grad():
        features = [model.encode_image(paddle.stack(images[at : at + batch])) for at in range(0, len(images), batch)]
    features = paddle.concat(features).numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def encode_texts(model, *several):
    """Normalised features [N, E] of N classes, each the mean over lists of N texts (paper, section 3.1.4)."""
    with paddle.no_grad():
        features = [model.encode_text(model.tokenize(texts)).numpy() for texts in several]
    mean = sum(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_pictures(combinations, number, seed, side=64):
    """`number` scenes and their pictures, of each combination in turn; training drew none of them.

    In one round each combination is one large object, in the next anything.
    """
    random = np.random.default_rng([seed, 10**9])
    each = len(combinations)
    scenes = [
        random_scene(random, [combinations[index % each]], plain=index // each % 2 == 0) for index in range(number)
    ]
    return scenes, [draw(scene, random, side) for scene in scenes]


def evaluate(model, preprocess, scenes, pictures, words=tiny_world):
    """Zero-shot accuracies, in percent: of colour and shape among all combinations, and of each other attribute.

    Unless said otherwise, each combination has a text for one object and one for several, and the nearest counts.
    The texts are those of a module, in English or in Chinese.
    """
    images = encode_images(model, [preprocess(picture) for picture in pictures])
    labels = np.array([COMBINATIONS.index(scene[:2]) for scene in scenes])

    def classes(templates, names):
        return encode_texts(model, *([template.format(name) for name in names] for template in templates))

    one = classes(words.TEMPLATES, [words.name(*pair) for pair in COMBINATIONS])
    several = classes(words.PLURAL_TEMPLATES, [words.plural(*pair) for pair in COMBINATIONS])
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
        texts = [[words.about(scene, attribute, value) for value in values] for _, scene in asked]
        distinct = sorted({text for row in texts for text in row})
        features = dict(zip(distinct, encode_texts(model, distinct)))
        truth = [words.about(scene, attribute, getattr(scene, attribute)) for _, scene in asked]
        best = [max(row, key=lambda text: features[text] @ image) for (image, _), row in zip(asked, texts)]
        accuracies[attribute] = percent(np.array(best) == truth)
    return accuracies


def parse(description, steps):
    """The arguments of the command line; `steps` is the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="batches to train on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=48, help="pairs in each batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pairs (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1200, help="pictures in each test (default: %(default)s)")
    package = os.path.normpath(os.path.join(ROOT, "paddle_clip", "data"))
    parser.add_argument("--output", default=package, help="folder to write into (default: the package's data)")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.batch_size, arguments.pictures) < 1:
        parser.error("--steps, --batch-size and --pictures must be 1 or more")
    if arguments.batch_size > MOST_PAIRS:
        parser.error(f"--batch-size must be {MOST_PAIRS} or less: plain captions are all different in a batch")
    os.makedirs(arguments.output, exist_ok=True)
    return arguments


def test_and_record(path, words, arguments, log, start):
    """Tests the model in a file, in the language of a module, and writes the record of its training beside it."""
    trained = time.perf_counter()
    model, preprocess = paddle_clip.load(path)
    accuracy = {}
    for name, combinations in (("held out", HELD_OUT), ("seen", SEEN)):
        scenes, pictures = test_pictures(combinations, arguments.pictures, arguments.seed)
        accuracy[name] = evaluate(model, preprocess, scenes, pictures, words)
        print(f"{name}: " + ", ".join(f"{what} {percent} %" for what, percent in accuracy[name].items()), flush=True)
    done = time.perf_counter()
    record = {
        "file": os.path.basename(path),
        "sha256": sha256(path),
        "bytes": os.path.getsize(path),
        "parameters": sum(parameter.size for parameter in model.parameters()),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch size": arguments.batch_size,
        "seconds": {"training": round(trained - start), "in all": round(done - start)},
        "paddle": paddle.__version__,
        "pictures in each test": arguments.pictures,
        "choices": len(COMBINATIONS),
        "templates": [*words.TEMPLATES, *words.PLURAL_TEMPLATES],
        "held out": [" ".join(pair) for pair in HELD_OUT],
        "accuracy in percent": accuracy,
        "loss": log,
    }
    with replacing(os.path.splitext(path)[0] + ".json") as (file, _):
        file.write(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
    print(f"{path}: {record['bytes']:,} bytes, {record['seconds']['in all']} s")


def main():
    arguments = parse(__doc__.split("\n")[0], steps=4700)
    start = time.perf_counter()
    paddle.seed(arguments.seed)
    model = paddle_clip.clip_tiny()
    log = train(model, arguments.steps, arguments.seed, arguments.batch_size)
    path = os.path.join(arguments.output, "clip_tiny.pt")
    save(model, path)
    test_and_record(path, tiny_world, arguments, log, start)
    save_samples(os.path.join(arguments.output, "samples"))


if __name__ == "__main__":
    main()
