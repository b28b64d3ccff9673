"""Linear probe: logistic regression on image features (paper, section 3.2)."""

import contextlib
import os
import warnings
import zipfile

import numpy as np


class LinearProbe:
    """A linear classifier on image features; `linear_probe` makes one.

    Attributes:
        weight: [E, K], float32 or float64, as the features it was fitted on.
        bias: [K].
        classes: the K labels, strings or whole numbers.
        C: the inverse of the regularisation it was fitted with.
    """

    def __init__(self, weight, bias, classes, C):
        self.weight, self.bias, self.classes, self.C = weight, bias, classes, C

    def predict_proba(self, features):
        """Probabilities [N, K] of features [N, E], in the order of `classes`."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.weight):
            raise ValueError(f"features are {list(features.shape)}; this probe takes [N, {len(self.weight)}]")
        logits = features @ self.weight + self.bias  # [N, K]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def predict(self, features):
        """The most probable labels [N] of features [N, E]."""
        return self.classes[self.predict_proba(features).argmax(axis=1)]

    def score(self, features, labels):
        """The share of features [N, E] whose label is the most probable one."""
        return float(np.mean(self.predict(features) == np.asarray(labels)))

    def save(self, path):
        """Writes the probe to an `.npz` file, which holds arrays alone."""
        path = os.fspath(path)
        temporary = f"{path}.partial"
        try:
            with open(temporary, "wb") as file:
                np.savez(file, weight=self.weight, bias=self.bias, classes=self.classes, C=self.C)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote; nothing in the file is run.

        Raises:
            ValueError: if the file is not a probe.
            OSError: if it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["weight"], arrays["bias"], arrays["classes"], float(arrays["C"]))
        except (AttributeError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a linear probe: {error}") from error


def linear_probe(features, labels, C=None, validation=0.2, max_iter=1000, seed=0):
    """Fits logistic regression on image features (paper, section 3.2 and appendix A.3), with scikit-learn's L-BFGS.

    Without a `C`, the one that classifies held-out images best is sought as in the paper: first at seven values from
    1e-6 to 1e6, then around the best one in steps that are halved down to an eighth of a decade. The probe is fitted on
    all images at the end. The paper takes features from before the final projection, OpenAI's example those of
    `encode_image`, which are these.

    Args:
        features: [N, E], as `embed` returns them.
        labels: N strings or whole numbers.
        C: the inverse of the regularisation, as in scikit-learn; None to choose it.
        validation: share of the images held out to choose C, drawn alike from every class; or a pair (features, labels)
            held out by the caller.
        max_iter: L-BFGS iterations at most.
        seed: of the draw.

    Returns:
        `LinearProbe`.

    Raises:
        ValueError: if there are not as many labels as features, fewer than two classes, or too few images of a class to
            hold some out.
        ImportError: if scikit-learn is missing: pip install scikit-learn.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError("linear_probe needs scikit-learn: pip install scikit-learn") from None

    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.dtype.kind not in "iuU":
        raise ValueError(
            f"features are {list(features.shape)} and labels {labels.dtype} {list(labels.shape)}; expected [N, E], and "
            "N strings or whole numbers"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the labels are all {classes.tolist()[0]!r}: a probe needs at least two classes"
            if len(classes)
            else "there are no features"
        )

    def fit(C, features, labels):
        model = LogisticRegression(C=C, max_iter=max_iter).fit(features, labels)
        weight, bias = model.coef_.T, model.intercept_  # [E, K], [K]
        if weight.shape[1] == 1:  # scikit-learn has one column for two classes, for the second
            weight, bias = np.concatenate([0 * weight, weight], axis=1), np.concatenate([0 * bias, bias])
        return LinearProbe(weight, bias, model.classes_, C)

    if C is None:
        if isinstance(validation, (tuple, list)):
            split = features, labels, *validation
        else:
            if counts.min() < 2:
                raise ValueError(
                    f"one image alone has the label {classes.tolist()[counts.argmin()]!r}: none can be held out to "
                    "choose C; give C, or a validation set"
                )
            held_out = max(round(validation * len(labels)), len(classes))
            halves = train_test_split(features, labels, test_size=held_out, stratify=labels, random_state=seed)
            split = halves[0], halves[2], halves[1], halves[3]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of values of C that will hardly be chosen
            C = _best_C(lambda C: fit(C, *split[:2]).score(*split[2:]))
    return fit(C, features, labels)


def _best_C(score):
    """The power of ten of the highest score, to an eighth of a decade (paper, appendix A.3)."""
    scores = {}

    def best(exponents):
        for exponent in exponents:
            if exponent not in scores:
                scores[exponent] = score(10.0**exponent)
        return max(
            scores, key=lambda exponent: (scores[exponent], -abs(exponent))
        )  # of equal ones that nearest to C = 1

    peak = best(range(-6, 7, 2))
    for step in (1, 0.5, 0.25, 0.125):
        peak = best([max(peak - step, -6), min(peak + step, 6)])
    return 10.0**peak
