"""Zero-shot classification, by texts instead of training (paper, section 3.1): prompts, classifiers, accuracy.

For example:

    classify(model, preprocess, "photo.jpg", ["a dog", "a cat"], templates="a photo of {}.")
    evaluate(model, preprocess, "imagenet/val", *prompts("ImageNet"))
"""

import contextlib
import json
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from tqdm import tqdm

from .arrays import as_tensor
from .checkpoints.files import StrPath, expanded
from .checks import unwrapped
from .defaults import BATCH_SIZE, CHINESE_TEMPLATE, LABELS_SHOWN, TEMPLATE
from .encoding import (
    Encoder,
    encode_images,
    encode_tokens,
    inference,
    logit_factor,
    progress_bar,
    takes_arrays,
    tokenized,
    unit,
)
from .images import Name, as_images, batches, image_files, is_one_image, warn_of_damage
from .tokenizer import listed_texts

ClassNames = Iterable[Union[str, Sequence[str]]]  # a class with several names is a list of them
Template = Union[str, Callable[[str], str]]  # a text with {} for the name, or a function of the name
Templates = Union[Template, Sequence[Template]]

_DATA = os.path.join(os.path.dirname(__file__), "data")
_PROMPTS = {"en": "prompts.json", "zh": "prompts_zh.json"}
_ENGLISH_VOCABULARY = 49_408  # ids of OpenAI's tokenizer
_TEXTS_AT_ONCE = 1 << 14  # texts that are tokenized and held as features together


class Prediction(NamedTuple):
    """A label and its probability."""

    label: str
    probability: float


class Accuracy(NamedTuple):
    """Zero-shot accuracy on labelled images.

    Attributes:
        top1: share of images whose class came first.
        top5: share of images whose class was among the first five.
        count: number of images.
        damaged: (name, reason) of each image that was skipped.
    """

    top1: float
    top5: float
    count: int  # type: ignore[assignment]  # it hides the method of tuples
    damaged: list[tuple[Name, str]]


# ------------------------------------------------------------------------------------------------------------- prompts


@lru_cache(2)
def _prompts(language: str) -> dict[str, Any]:
    if language not in _PROMPTS:
        raise ValueError(f"language is {language!r}; choose one of {', '.join(_PROMPTS)}")
    with open(os.path.join(_DATA, _PROMPTS[language]), encoding="utf-8") as file:
        return json.load(file)


def available_prompts(language: str = "en") -> list[str]:
    """The names of the data sets that `prompts` knows in a language."""
    return list(_prompts(language))


def prompts(name: str, language: str = "en") -> tuple[list[Union[str, list[str]]], list[str]]:
    """The class names and templates OpenAI published for a data set of the paper (its table 9; data/README.md here).

    Args:
        name: one of `available_prompts()`, such as "ImageNet" or "CIFAR100", in upper or lower case.
        language: "en", or "zh" for those that Chinese-CLIP was evaluated with, of ImageNet alone.

    Returns:
        A list of class names, in the order of the data set's labels as OpenAI lists them, and a list of templates with
        `{}` for the name. A class with several names is a list of them, as `zero_shot_classifier` takes it.

    Raises:
        ValueError: if there is no such language or data set; the message lists the known ones.
    """
    for known, found in _prompts(language).items():
        if known.lower() == name.lower():
            return list(found["classes"]), list(found["templates"])
    raise ValueError(f"no prompts for {name!r}; available: {', '.join(available_prompts(language))}")


IMAGENET_CLASSES: tuple[Union[str, list[str]], ...] = tuple(prompts("imagenet")[0])
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(prompts("imagenet")[1])


# --------------------------------------------------------------------------------------------------------- classifiers


def encode_texts(
    model: Encoder, texts: Sequence[str], batch_tokens: int = 1024, progress: Optional[bool] = False
) -> Any:
    """Encodes any number of texts.

    Texts of like length are encoded together, and a batch is no longer than its longest text: since attention is
    causal, tokens after the end of a text do not change its feature.

    Args:
        model: from `load`.
        texts: N texts.
        batch_tokens: number of tokens encoded at once, padding included; 1024 was the fastest on a CPU.
        progress: whether to show a bar; None shows it where standard error is a terminal.

    Returns:
        Features [N, E] in the order of the texts, in the model's dtype, not normalised; [0, E] for no texts.

    Raises:
        RuntimeError: if a text is too long.
        TypeError: if a text is not a string.
    """
    texts = listed_texts(texts)
    with progress_bar(progress, total=len(texts), unit="text") as bar:
        features = as_tensor(text_features(model, texts, batch_tokens, bar))
    # numpy lacks bfloat16: half precision became float32 on the way.
    model = unwrapped(model)
    return features if takes_arrays(model) else features.astype(getattr(model, "dtype", features.dtype))


def text_features(
    model: Encoder,
    texts: Sequence[str],
    batch_tokens: int = 1024,
    bar: "Optional[tqdm[Any]]" = None,
    truncate: bool = False,
) -> np.ndarray:
    """The features of `encode_texts` as an array [N, E]; float32 from half precision."""
    with inference(model) as model:
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        parts = [_encode(model, texts[start : start + _TEXTS_AT_ONCE], batch_tokens, bar, truncate) for start in starts]
        return np.concatenate(parts) if parts else np.zeros([0, model.embed_dim], np.float32)


def _encode(
    model: Encoder, texts: Sequence[str], batch_tokens: int, bar: "Optional[tqdm[Any]]", truncate: bool = False
) -> np.ndarray:
    """The features [N, E] of N texts that are all tokenized at once."""
    _warn_of_script(model, texts)
    tokens = tokenized(model, texts, truncate)  # [N, L]
    lengths = tokens.shape[1] - (tokens[:, ::-1] != 0).argmax(axis=-1)  # [N], without padding
    order = np.argsort(-lengths, kind="stable")
    features, first = [], 0
    while first < len(order):
        length = int(lengths[order[first]])
        chosen = order[first : first + max(1, batch_tokens // length)]
        features.append(encode_tokens(model, tokens[chosen, :length]))  # [B, E]
        first += len(chosen)
        if bar:
            bar.update(len(chosen))
    return np.concatenate(features)[np.argsort(order)]


def _warn_of_script(model: Encoder, texts: Sequence[str]) -> None:
    """Warns of texts in another script than the model read: Latin with OpenAI's vocabulary, Chinese with BERT's."""
    if getattr(model, "text_tower", None) == "bert" and texts and not any(map(_has_chinese, texts)):
        warnings.warn(
            f"{texts[0]!r:.80}: the model was trained on Chinese texts, and no text here has Chinese letters. "
            "Write them in Chinese",
            RuntimeWarning,
            stacklevel=2,
        )
    if getattr(model, "vocab_size", None) != _ENGLISH_VOCABULARY:
        return
    for text in texts:
        letters = [] if text.isascii() else filter(str.isalpha, text)
        if sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters) > 1:
            warnings.warn(
                f"{text!r:.80}: the model was trained on English texts, and what it gives for this script is chance. "
                "Write it in English",
                RuntimeWarning,
                stacklevel=2,
            )
            return


def _has_chinese(text: str) -> bool:
    return not text.isascii() and any(unicodedata.name(letter, "").startswith("CJK") for letter in text)


def zero_shot_classifier(
    model: Encoder,
    classnames: ClassNames,
    templates: Optional[Templates] = None,
    batch_tokens: int = 1024,
    progress: Optional[bool] = False,
) -> Any:
    """Makes the weights of a linear classifier of normalised image features from texts (paper, section 3.1.4).

    Each class name is put into each template; the features of these texts are normalised, averaged, and normalised
    again, as in OpenAI's Prompt_Engineering_for_ImageNet notebook.

    Args:
        model: from `load`.
        classnames: names of K classes; a class with several names is a list of them, whose texts are all averaged.
        templates: one or more strings with `{}` for the name, or functions of the name that return a text; by default
            `IMAGENET_TEMPLATES`, the 80 of the paper, or for Chinese-CLIP those of `prompts("ImageNet", "zh")`.
        batch_tokens: see `encode_texts`.
        progress: see `encode_texts`.

    Returns:
        [E, K] in the model's dtype, float32 for half precision. With `image_features` normalised,
        `model.logit_scale.exp() * image_features @ classifier` are the logits.

    Raises:
        ValueError: if there are no names or no templates, or a template has no `{}`.
        RuntimeError: if a text is too long.
    """
    return as_tensor(_classifier(model, classnames, templates, batch_tokens, progress))


def _classifier(
    model: Encoder,
    classnames: ClassNames,
    templates: Optional[Templates],
    batch_tokens: int = 1024,
    progress: Optional[bool] = False,
) -> np.ndarray:
    """The weights of `zero_shot_classifier` as an array [E, K]."""
    names, fill = class_names(classnames), _templates(_imagenet_templates(model) if templates is None else templates)
    texts = [[template(name) for name in of_class for template in fill] for of_class in names]
    classes_at_once = max(1, _TEXTS_AT_ONCE // max(map(len, texts)))
    columns = []
    with inference(model) as model, progress_bar(progress, total=sum(map(len, texts)), unit="text") as bar:
        for start in range(0, len(texts), classes_at_once):
            chosen = texts[start : start + classes_at_once]
            features = unit(_encode(model, [text for of_class in chosen for text in of_class], batch_tokens, bar))
            for of_class in np.split(features, np.cumsum([len(of_class) for of_class in chosen[:-1]])):
                columns.append(unit(of_class.mean(axis=0)))  # [E]
    return np.stack(columns, axis=1)  # [E, K]


def default_template(model: Encoder) -> str:
    """The template of a label in the language of a model."""
    return CHINESE_TEMPLATE if _reads_chinese(model) else TEMPLATE


def _imagenet_templates(model: Encoder) -> Sequence[str]:
    return prompts("imagenet", "zh")[1] if _reads_chinese(model) else IMAGENET_TEMPLATES


def _reads_chinese(model: Encoder) -> bool:
    return getattr(unwrapped(model), "text_tower", "clip") == "bert"


def class_names(classnames: ClassNames) -> list[list[str]]:
    """A list of names for each class; raises ValueError if `classnames` has another form."""
    if isinstance(classnames, str):
        raise ValueError(f"class names are a list of strings; found the string {classnames!r}")
    names: list[list[Any]] = [list(name) if isinstance(name, (list, tuple)) else [name] for name in classnames]
    if not names or not all(names):
        raise ValueError("there are no class names: give at least one, and at least one for each class")
    for name in (name for of_class in names for name in of_class):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a class name is a string that is not empty; found {name!r}")
    return names


def _templates(templates: Templates) -> list[Callable[[str], str]]:
    """The templates as functions that put a name into a text."""
    given = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    if not given:
        raise ValueError(f"there are no templates: give at least one, such as {TEMPLATE!r}")
    return [template if callable(template) else _filled(template) for template in given]


def _filled(template: str) -> Callable[[str], str]:
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} for the class name, as {TEMPLATE!r} has")
    return lambda name: template.replace("{}", name)


def classify(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    images: Any,
    labels: ClassNames,
    templates: Optional[Templates] = None,
    top_k: int = LABELS_SHOWN,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """Finds the labels that fit images best.

    Args:
        model: from `load`.
        preprocess: from `load`.
        images: one image, as a path, a PIL image, the bytes of a file or an open one, or a uint8 array; or several of
            them, as `embed` takes them.
        labels: class names, see `zero_shot_classifier`; a class with several names is shown by its first.
        templates: see `zero_shot_classifier`; by default "a photo of a {}.", or for Chinese-CLIP "一张{}的照片".
        top_k: largest number of labels to return for an image.
        batch_size: images encoded at once.

    Returns:
        The labels of one image, the most probable first, or a list of them for a list of images. Probabilities are over
        all labels and add up to 1.

    Raises:
        ValueError: if there are no labels, a template has no `{}`, or an image cannot be read.
        RuntimeError: if a text is too long.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; it must be at least 1")
    many = not is_one_image(images)
    names, items = as_images(images if many else [images])
    classes = class_names(labels)
    results = []
    with inference(model) as model:
        chosen = default_template(model) if templates is None else templates
        classifier = _classifier(model, classes, chosen)  # [E, K]
        with contextlib.closing(batches(preprocess, names, items, batch_size, on_error=None)) as read:
            for batch in read:
                for row in _softmax(_logits(model, batch.pixels, classifier)):  # [K]
                    best = np.argsort(-row, kind="stable")[:top_k]
                    results.append([Prediction(classes[index][0], float(row[index])) for index in best])
    return results if many else results[0]


def _logits(model: Encoder, pixels: np.ndarray, classifier: np.ndarray) -> np.ndarray:
    return logit_factor(model) * (unit(encode_images(model, pixels)) @ classifier)  # [B, K]


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))  # [B, K]
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def evaluate(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    dataset: Any,
    classnames: Optional[ClassNames] = None,
    templates: Optional[Templates] = None,
    batch_size: int = BATCH_SIZE,
    workers: Optional[int] = None,
    on_error: str = "raise",
    progress: Optional[bool] = None,
) -> Accuracy:
    """Measures zero-shot accuracy on labelled images, as in the paper's section 3.1.

        cifar100 = paddle.vision.datasets.Cifar100(mode="test", backend="pil")
        evaluate(model, preprocess, cifar100, *prompts("cifar100"))

    Args:
        model: from `load`.
        preprocess: from `load`.
        dataset: a folder with one folder of images per class; or a `paddle.io.Dataset` of (image, label), with PIL
            images, paths, uint8 arrays or preprocessed Tensors, and the class's index as an int or an array of one.
        classnames: names of K classes, in the order of the labels or of the sorted folders, see `zero_shot_classifier`;
            by default the names of the folders, with spaces for underscores.
        templates: see `zero_shot_classifier`.
        batch_size: images encoded at once.
        workers: number of threads that decode; by default one per core, eight at most.
        on_error: "raise", or "skip" to leave out images that cannot be read, list them in the result and warn.
        progress: whether to show bars; by default where standard error is a terminal.

    Returns:
        The accuracy, and the damaged images that were skipped.

    Raises:
        ValueError: if there are no images or no names, names and folders differ in number, a label has no name, or an
            image cannot be read and `on_error` is "raise".
        OSError: if a folder cannot be read.
        RuntimeError: if a text is too long.
    """
    names, items, classnames = _labelled(dataset, classnames)
    if not names:
        raise ValueError("there are no images to measure on: the data set is empty")
    first, five, count = 0, 0, 0
    damaged: list[tuple[Name, str]] = []
    with inference(model) as model:
        classifier = _classifier(model, classnames, templates, progress=progress)  # [E, K]
        classes = classifier.shape[1]
        bar = progress_bar(progress, total=len(names), unit="image")
        read = batches(preprocess, names, items, batch_size, workers, on_error)
        with bar, contextlib.closing(read):
            for batch in read:
                if batch.indices:
                    labels = [_label(*pair, classes) for pair in zip(batch.indices, batch.labels)]
                    best = np.argsort(-_logits(model, batch.pixels, classifier), axis=1, kind="stable")[:, :5]  # [B, 5]
                    hits = best == np.array(labels)[:, None]  # [B, 5]
                    first, five, count = first + hits[:, 0].sum(), five + hits.sum(), count + len(hits)
                damaged += batch.damaged
                bar.update(len(batch.indices) + len(batch.damaged))
    if not count:
        raise ValueError(f"none of the {len(names)} images can be read; {damaged[0][1]}")
    warn_of_damage(damaged)
    return Accuracy(float(first / count), float(five / count), count, damaged)


def _labelled(dataset: Any, classnames: Optional[ClassNames]) -> tuple[Any, Any, ClassNames]:
    """The names of the images, the images with their labels, and the names of the classes."""
    if isinstance(dataset, (str, os.PathLike)):
        names, items, folders = labelled_files(dataset)
        if classnames is None:
            return names, items, [folder.replace("_", " ") for folder in folders]
        classnames = list(classnames)
        if len(classnames) != len(folders):
            raise ValueError(f"{dataset} has {len(folders)} folders, and there are {len(classnames)} class names")
        return names, items, classnames
    if classnames is None:
        raise ValueError("give classnames: a data set that is not a folder does not tell the names of its classes")
    return (*as_images(dataset), classnames)


def labelled_files(folder: StrPath) -> tuple[list[str], list[tuple[str, int]], list[str]]:
    """The image paths of a folder with one folder per class, the same with labels, and the sorted folder names."""
    folder = expanded(folder)
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{folder} has no folders: expected one folder of images for each class")
    items = [(path, label) for label, name in enumerate(folders) for path in image_files(os.path.join(folder, name))]
    return [path for path, _ in items], items, folders


def _label(index: int, label: Any, classes: int) -> int:
    label = np.asarray(label).reshape(-1)
    if label.size != 1 or label.dtype.kind not in "iu":
        raise ValueError(f"an item of a data set must be (image, label), the label a whole number; see item {index}")
    if not 0 <= label[0] < classes:
        raise ValueError(f"item {index} of the data set has the label {label[0]}, and there are {classes} class names")
    return int(label[0])
