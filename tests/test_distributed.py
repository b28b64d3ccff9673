"""Training over processes: gradients and weights are those of one process, and what stops one stops all."""

import json
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT

import ranks as worker
from paddle_clip import distributed
from paddle_clip.distributed import Ranks, slice_of

GRADIENT_ERROR = 1e-12  # of a tensor's largest gradient, in float64
WEIGHT_ERROR = 1e-6  # of the length of all weights, after twelve steps in float32; 2e-7 was measured


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders with what two and four processes found, by their number."""
    made = {}
    for count, options in ((2, ["--more"]), (4, [])):
        folder = made[count] = tmp_path_factory.mktemp(f"ranks{count}")
        (folder / "broken.png").write_bytes(b"not an image")
        environment = {**os.environ, "GLOG_minloglevel": "2", "GLOO_SOCKET_IFNAME": "lo"}
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(count), "--log_dir", str(folder / "log")]
        script = os.path.join(ROOT, "tests", "tools", "ranks.py")
        done = subprocess.run(
            [sys.executable, *launcher, script, str(folder), *options],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def results(folders):
    """What the first process of each launch found; the others found the same bits."""
    first = {}
    for count, folder in folders.items():
        first[count] = dict(np.load(folder / "0.npz"))
        for rank in range(1, count):
            other = dict(np.load(folder / f"{rank}.npz"))
            assert other.keys() == first[count].keys()
            for name in (name for name in other if not name.startswith("sliced/")):
                np.testing.assert_array_equal(other[name], first[count][name], err_msg=name)
    return first


@pytest.fixture(scope="module")
def told(folders):
    return [json.loads((folders[2] / f"{rank}.json").read_text()) for rank in range(2)]


def of(found, prefix):
    return {name[len(prefix) + 1 :]: array for name, array in found.items() if name.startswith(f"{prefix}/")}


def error(ours, theirs):
    """The largest difference of two sets of arrays, each relative to its array's largest number."""
    assert ours.keys() == theirs.keys()
    # The gradient of a key's bias is 0 but for rounding.
    return max(np.abs(ours[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-4) for name in ours)


def distance(ours, theirs):
    """The distance of two models' weights, relative to their length.

    Not tensor by tensor: the bias of a key has no gradient but rounding, which AdamW makes as large as any other.
    """
    assert ours.keys() == theirs.keys()
    squares = sum(np.square(ours[name] - theirs[name], dtype=np.float64).sum() for name in ours)
    return (squares / sum(np.square(array, dtype=np.float64).sum() for array in theirs.values())) ** 0.5


@pytest.mark.parametrize("case", worker.CASES, ids=str)
def test_gradients_are_those_of_one_process(results, case):
    expected = worker.gradients(*case, Ranks())
    for found in results.values():
        assert error(of(found, "/".join(map(str, case))), expected) < GRADIENT_ERROR


def test_a_gather_that_slices_is_noticed(results):
    assert error(of(results[2], "sliced"), worker.gradients("vit", 1, None, Ranks())) > 1e6 * GRADIENT_ERROR


@pytest.mark.parametrize("variant", sorted(worker.SMALL))
def test_weights_and_losses_are_those_of_one_process(results, variant):
    weights, history = worker.trained(variant, Ranks(), accumulate=1)
    assert len(history) == 12
    for found in results.values():
        np.testing.assert_allclose(found[f"losses/{variant}"], [step.loss for step in history], rtol=1e-5)
        assert distance(of(found, f"trained/{variant}"), weights) < WEIGHT_ERROR


def test_statistics_of_batch_norms_are_those_of_the_first(results):
    """`results` compares the processes, whose pictures have statistics of their own."""
    assert (of(results[2], "norms")["visual.bn1._mean"] != 0).all()


def test_a_resumed_training_is_bit_identical(results, told):
    assert {every["resumed at"] for every in told} == {3}
    resumed, whole = of(results[2], "resumed"), of(results[2], "trained/vit")
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(results, folders):
    output = folders[2] / "other.pdparams"
    weights, history = worker.trained("vit", Ranks(), accumulate=1, output=output, save_every=2, resume=True)
    assert history[0].step == 3
    assert distance(weights, of(results[2], "trained/vit")) < WEIGHT_ERROR


def test_the_first_process_alone_writes_and_reports(folders, told):
    assert [every["calls of on_step"] for every in told] == [10, 0]
    assert (folders[2] / "same.pdparams").is_file()
    assert not (folders[2] / "same.checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("damaged", "broken.png cannot be used"),
        ("other arguments", "learning_rate was"),
        ("output", "the output"),
    ],
)
def test_what_stops_one_stops_all(told, case, message):
    assert all(message in every[case] for every in told), told
    if case != "other arguments":  # each names the processes that differ from it
        assert len({every[case].partition(": ")[2] for every in told}) == 1, told


def test_gradients_of_any_size_and_strides_are_added(monkeypatch):
    """Large ones are sent as they lie, which gloo refuses if they have strides; small ones share a message."""

    def doubled(tensor):
        assert tensor.is_contiguous()
        sent.append(tensor.size)
        tensor.set_value(tensor * 2)

    sent, before = [], {}
    monkeypatch.setattr(distributed.dist, "all_reduce", doubled)
    parameters = [paddle.create_parameter(shape, "float32") for shape in ([600, 500], [500, 600], [3, 4], [5], [1])]
    for parameter in parameters:
        gradient = paddle.rand(parameter.shape[::-1]).t()
        assert gradient.is_contiguous() == (len(parameter.shape) == 1)
        parameter.grad, before[id(parameter)] = gradient, gradient.numpy()
    Ranks(0, 2).add_gradients(parameters, complete=parameters[-1])
    assert sorted(sent) == [3 * 4 + 5 + 1, 600 * 500, 600 * 500]
    for parameter in parameters:
        factor = 1 if parameter is parameters[-1] else 2
        np.testing.assert_array_equal(parameter.grad.numpy(), factor * before[id(parameter)])


def test_processes_stop_if_their_launcher_has_died(monkeypatch):
    """Nobody would stop them if one failed, and whoever repeats the command would train beside them."""
    monkeypatch.setattr(Ranks, "tell", lambda self, text: ["", text])
    done = []
    Ranks(1, 2, launcher=os.getppid()).together(lambda: done.append("work"))
    Ranks(1, 2).together(lambda: done.append("work"))  # nobody launched it
    with pytest.raises(ChildProcessError, match=r"the launcher of the training has died.*resume=True"):
        Ranks(1, 2, launcher=os.getpid()).together(lambda: done.append("never"))
    assert done == ["work", "work"]


def test_processes_take_slices_of_the_batch_one_process_draws():
    taken = [[slice_of(place, rank, 3, 2) for place in range(6)] for rank in range(2)]
    assert taken == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


def test_the_command_prints_once(folders, told):
    assert all(every["command"] == [0, 1] for every in told)
    assert (folders[2] / "tiny.pdparams").is_file()
    logs = [(folders[2] / "log" / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert [log.count("trained on 8 pairs") for log in logs] == [1, 0]
    assert [log.count("cannot read") for log in logs] == [1, 1]  # in each log; the launcher shows the first one
    assert "Traceback" not in "".join(logs)
