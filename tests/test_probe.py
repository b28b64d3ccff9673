"""The linear probe, against scikit-learn, and its file."""

import io
import pickle
import random
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import fuzz
from paddle_clip import CheckpointError, LinearProbe, linear_probe
from paddle_clip.probe import _best_C


@pytest.fixture
def clusters():
    """Features of three overlapping classes, to fit and to test."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    centres = random.standard_normal((3, 6))
    features = centres[labels] + random.standard_normal((400, 6)) * 0.8
    return features[:300], labels[:300], features[300:], labels[300:]


@pytest.mark.parametrize("classes", [2, 3])
def test_predictions_are_scikit_learns(clusters, classes):
    features, labels, others, truth = clusters
    chosen = labels < classes
    features, labels = features[chosen], labels[chosen]
    names = np.array(["red", "green", "blue"])
    probe = linear_probe(features, names[labels], C=0.3)
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(features, names[labels])
    assert probe.classes.tolist() == expected.classes_.tolist()
    np.testing.assert_allclose(probe.predict_proba(others), expected.predict_proba(others), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(probe.predict(others), expected.predict(others))
    assert probe.score(others, names[truth]) == expected.score(others, names[truth])


def test_C_is_chosen_by_held_out_images(clusters):
    """Most numbers of a feature are noise here: a weak regularisation fits it and does worse on other images."""
    random = np.random.default_rng(1)
    features, labels, others, truth = clusters
    features, others = (np.concatenate([f, random.standard_normal((len(f), 200))], axis=1) for f in (features, others))
    probe = linear_probe(features, labels)
    assert probe.C < 1
    assert probe.score(others, truth) > linear_probe(features, labels, C=1e6).score(others, truth)
    given = linear_probe(features, labels, validation=[others, truth])
    scores = [linear_probe(features, labels, C=10.0**e).score(others, truth) for e in range(-6, 7, 2)]
    assert given.score(others, truth) >= max(scores) - 1e-9


def test_the_search_for_C_is_the_papers():
    """Seven powers of ten, then the interval around the peak halved to an eighth of a decade: 15 fits at most."""
    for peak in (-6, -3.36, 0.64, 5.1, 6):
        tried = []
        found = _best_C(lambda C: tried.append(C) or -abs(np.log10(tried[-1]) - peak))  # noqa: B023
        assert abs(np.log10(found) - peak) <= 0.0625 + 1e-9
        assert len(tried) <= 15
        np.testing.assert_allclose(tried[:7], 10.0 ** np.arange(-6, 7, 2))
        assert all(1e-6 <= C <= 1e6 for C in tried)
    assert _best_C(lambda C: 1) == 1


@pytest.mark.parametrize("names", [np.array(["dog", "ca t", "ß"]), np.array([3, 7, 11])])
def test_probes_are_saved_and_loaded(clusters, names, tmp_path):
    features, labels, others, truth = clusters
    probe = linear_probe(features, names[labels], C=1)
    probe.save(tmp_path / "x.npz")
    loaded = LinearProbe.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(loaded.predict_proba(others), probe.predict_proba(others))
    np.testing.assert_array_equal(loaded.predict(others), probe.predict(others))
    assert (loaded.C, loaded.score(others, names[truth])) == (1, probe.score(others, names[truth]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_class_all_of_whose_images_are_held_out(monkeypatch):
    features, labels = np.random.default_rng(0).standard_normal((24, 4)), np.repeat([0, 1, 2], [2, 2, 20])
    columns, predict_proba = set(), LinearProbe.predict_proba

    def spy(probe, features):
        columns.add((probe.weight.shape[1], len(probe.classes)))
        return predict_proba(probe, features)

    monkeypatch.setattr(LinearProbe, "predict_proba", spy)
    linear_probe(features, labels, validation=0.8)
    assert columns == {(2, 2)}


def test_files_that_are_no_probes_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object))
    for content in (b"", b"PK no zip", b"text", pickle.dumps([1]), b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is not a linear probe|is empty"):
            LinearProbe.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("weight", "bias", "classes", "C"):
            archive.writestr(f"{name}.npy", pickled.getvalue())
    with pytest.raises(ValueError, match="is not a linear probe"):
        LinearProbe.load(path)
    np.save(path.with_suffix(".npy"), np.zeros(2))
    with pytest.raises(ValueError, match="is not a linear probe"):
        LinearProbe.load(path.with_suffix(".npy"))
    np.savez(path, weight=np.zeros([2, 2]))
    with pytest.raises(ValueError, match="is not a linear probe"):
        LinearProbe.load(path)
    with pytest.raises(FileNotFoundError):
        LinearProbe.load(tmp_path / "none.npz")


def test_a_small_file_does_not_become_a_large_array(tmp_path):
    """A compressed file of 2 MB holds 1.9 GB of zeros."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, weight=np.zeros([10, 100_000]), bias=np.zeros(2), classes=np.arange(2), C=1.0)
    with pytest.raises(CheckpointError, match=r"its arrays are said to have 8,0\d\d,\d{3} bytes"):
        LinearProbe.load(path)


def test_two_writers(tmp_path):
    """A reader finds one of the two probes, whole, at any time; a writer that comes second is told so."""
    path, done, refused = tmp_path / "x.npz", threading.Event(), []
    probes = [LinearProbe(np.full([300, 2], C), np.full(2, C), np.arange(2), C) for C in (1.0, 2.0)]
    probes[0].save(path)

    def write(probe):
        while not done.is_set():
            try:
                probe.save(path)
            except CheckpointError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(write, probe) for probe in probes]
        for _ in range(300):
            found = LinearProbe.load(path)
            assert (found.weight == found.C).all()
        done.set()
        for writer in running:
            writer.result()
    assert all("another process" in message for message in refused)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_mutants_are_read_or_refused(tmp_path):
    path, source = tmp_path / "x.npz", random.Random(0)
    LinearProbe(np.ones([3, 2], np.float32), np.ones(2, np.float32), np.array(["a", "b"]), 1.0).save(path)
    content, read = path.read_bytes(), 0
    for _ in range(1000):
        change = source.choice([fuzz.bytes_level, fuzz.zip_records])
        path.write_bytes(change(bytearray(content), source))
        try:
            probe = LinearProbe.load(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            read += 1
            assert probe.predict_proba(np.ones([1, len(probe.weight)])).shape == (1, len(probe.classes))
    assert 100 < read < 900


def test_what_cannot_be_fitted_is_refused(clusters):
    features, labels, *_ = clusters
    for arguments, message in (
        ((features, labels[:-1]), r"features are \[300, 6\] and labels int64 \[299\]"),
        ((features[0], labels), r"features are \[6\]"),
        ((features, labels / 2), "labels float64"),
        ((features, labels * 0), "the labels are all 0: a probe needs at least two classes"),
        ((features[:0], labels[:0]), "there are no features"),
        ((features, [*labels[:-1], 9]), "one image alone has the label 9: none can be held out"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_probe(*arguments)
    linear_probe(features, [*labels[:-1], 9], C=1)
    with pytest.raises(ValueError, match=r"features are \[300, 5\]; this probe takes \[N, 6\]"):
        linear_probe(features, labels, C=1).predict(features[:, 1:])
