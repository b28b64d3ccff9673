"""Linear probe: logistic regression on image features (paper, section 3.2)."""

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np

from .checkpoints.files import StrPath, expanded, open_regular, reading, replacing
from .errors import CheckpointError
from .extras import require

_MOST_EXPANSION = 8  # bytes of arrays for each byte of a probe's file; those that `save` writes have one


class LinearProbe:
    """A linear classifier on image features; `linear_probe` makes one.

    Attributes:
        weight: [E, K], in the dtype of the features it was fitted on, float32 or float64.
        bias: [K].
        classes: the K labels, strings or whole numbers.
        C: inverse of the regularisation it was fitted with.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, classes: np.ndarray, C: float):
        self.weight, self.bias, self.classes, self.C = weight, bias, classes, C

    def predict_proba(self, features: Any) -> np.ndarray:
        """Probabilities [N, K] of features [N, E], in the order of `classes`."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.weight):
            raise ValueError(f"features are {list(features.shape)}; this probe takes [N, {len(self.weight)}]")
        logits = features @ self.weight + self.bias  # [N, K]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def predict(self, features: Any) -> np.ndarray:
        """The most probable labels [N] of features [N, E]."""
        return self.classes[self.predict_proba(features).argmax(axis=1)]

    def score(self, features: Any, labels: Any) -> float:
        """The share of features [N, E] whose label the probe finds most probable."""
        return float(np.mean(self.predict(features) == np.asarray(labels)))

    def save(self, path: StrPath) -> None:
        """Writes the probe to an `.npz` file, which holds nothing but arrays.

        Raises:
            CheckpointError: if `path` is something other than a file, or another process is writing it.
            OSError: if the system refuses to write; an existing file is untouched.
        """
        content = io.BytesIO()  # on a full disk, NumPy 1 leaves a zip open, which would complain later
        np.savez(content, weight=self.weight, bias=self.bias, classes=self.classes, C=self.C)
        with replacing(path) as (file, _):
            file.write(content.getbuffer())

    @classmethod
    def load(cls, path: StrPath) -> "LinearProbe":
        """Reads a probe that `save` wrote; nothing in the file is run.

        Raises:
            CheckpointError: if the file is not a probe.
            OSError: if the file cannot be read.
        """
        path = expanded(path)
        with open_regular(path) as file, reading(path, "a linear probe: expected what `LinearProbe.save` writes"):
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > _MOST_EXPANSION * os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{path} is not a linear probe: its arrays are said to have {size:,} bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                probe = cls(arrays["weight"], arrays["bias"], arrays["classes"], float(arrays["C"]))
            shapes = [array.shape for array in (probe.weight, probe.bias, probe.classes)]
            kinds = "".join(array.dtype.kind for array in (probe.weight, probe.bias, probe.classes))
            width, count = probe.weight.shape
            if shapes[1:] != [(count,), (count,)] or kinds not in ("ffi", "ffu", "ffU") or not width * count:
                raise ValueError(f"its arrays have the shapes {shapes} and the dtypes {kinds}")
            return probe


def linear_probe(
    features: Any,
    labels: Any,
    C: Optional[float] = None,
    validation: Union[float, Sequence[Any]] = 0.2,
    max_iter: int = 1000,
    seed: int = 0,
) -> LinearProbe:
    """Fits logistic regression on image features (paper, section 3.2 and appendix A.3), with scikit-learn's L-BFGS.

    Without a `C`, the best one for held-out images is chosen as in the paper: first among seven values from 1e-6 to
    1e6, then around the best one in steps halved down to an eighth of a decade. The probe is then fitted on all images.
    The features are those of `encode_image`, as in OpenAI's example; the paper takes them before the projection.

    Args:
        features: [N, E], as `embed` returns them.
        labels: N strings or whole numbers.
        C: inverse of the regularisation, as in scikit-learn; None chooses it.
        validation: share of the images held out to choose C, drawn alike from every class; or a pair (features, labels)
            held out by the caller.
        max_iter: largest number of L-BFGS iterations.
        seed: seed of the draw of held-out images.

    Returns:
        The probe.

    Raises:
        ValueError: if labels and features differ in number, or there are fewer than two classes, or too few images of a
            class to hold some out.
        ImportError: if scikit-learn is missing, which the extra `probe` installs.
    """
    require("probe")
    from sklearn.exceptions import ConvergenceWarning

    features, labels = np.asarray(features), np.asarray(labels)
    _require_sound(features, labels)
    require_classes(labels, C is None and isinstance(validation, (int, float)))
    if C is None:
        if isinstance(validation, (int, float)):
            train, held_out = _hold_out(features, labels, validation, seed)
        else:
            train, held_out = (features, labels), tuple(validation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # for values of C that will hardly be chosen
            C = _best_C(lambda C: _fit(*train, C, max_iter).score(*held_out))
    return _fit(features, labels, C, max_iter)


def _require_sound(features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.dtype.kind not in "iuU":
        raise ValueError(
            f"features are {list(features.shape)} and labels {labels.dtype} {list(labels.shape)}; expected [N, E], and "
            "N strings or whole numbers"
        )
    if not len(labels):
        raise ValueError("there are no features")


def require_classes(labels: Any, holds_out: bool) -> None:
    """Raises ValueError for labels that no probe is fitted to, which can be seen before there are features.

    Args:
        labels: N strings or whole numbers, N at least 1.
        holds_out: whether some are held out to choose C.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) == 1:
        raise ValueError(f"the labels are all {classes.tolist()[0]!r}: a probe needs at least two classes")
    if holds_out and counts.min() < 2:
        raise ValueError(
            f"one image alone has the label {classes.tolist()[counts.argmin()]!r}: none can be held out to "
            "choose C; give C, or a validation set"
        )


def _hold_out(features: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[tuple[Any, Any], ...]:
    """(features, labels) to fit on and (features, labels) to choose C by, drawn alike from every class."""
    from sklearn.model_selection import train_test_split

    count = max(round(share * len(labels)), len(np.unique(labels)))
    split = train_test_split(features, labels, test_size=count, stratify=labels, random_state=seed)
    return (split[0], split[2]), (split[1], split[3])


def _fit(features: Any, labels: Any, C: float, max_iter: int) -> LinearProbe:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, max_iter=max_iter).fit(features, labels)
    weight, bias = model.coef_.T, model.intercept_  # [E, K], [K]
    if weight.shape[1] == 1:  # for two classes scikit-learn has one column, that of the second
        weight, bias = np.concatenate([0 * weight, weight], axis=1), np.concatenate([0 * bias, bias])
    return LinearProbe(weight, bias, model.classes_, C)


def _best_C(score: Callable[[float], float]) -> float:
    """The power of ten with the highest score, to an eighth of a decade (paper, appendix A.3)."""
    scores: dict[float, float] = {}

    def best(exponents: Iterable[float]) -> float:
        for exponent in exponents:
            if exponent not in scores:
                scores[exponent] = score(10.0**exponent)
        # Of equal scores, the C nearest to 1 wins.
        return max(scores, key=lambda exponent: (scores[exponent], -abs(exponent)))

    peak = best(range(-6, 7, 2))
    for step in (1, 0.5, 0.25, 0.125):
        peak = best([max(peak - step, -6), min(peak + step, 6)])
    return 10.0**peak
