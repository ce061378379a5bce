"""What a run says about itself: the screen before training, the health line, warnings, names of what is measured."""

import json
import sys
import types

import numpy as np
import pytest
import torch

import common

CLASSES = ["cat", "dog", "cow"]


@pytest.fixture
def run(tmp_path, capsys):
    """A run on data whose labels are cat, cat, dog, cow; the pool holds two examples more."""
    run = common.Run(str(tmp_path), "test", {"resume": None}, torch.device("cpu"), None)
    part = common.Split(np.zeros((6, 1, 8, 8), np.uint8), np.array([0, 0, 1, 2, -1, -1]))
    args = {"num_steps": 1000, "batch_size": 2, "uratio": 3, "num_steps_stage1": 500}
    zero_shot = np.array([0, 1, 1, 2, -1, 1])
    run.describe(common.Data("pets", CLASSES, part, None), np.arange(4), args, "agreement", zero_shot)
    return run


def count(run, *labels, masked=()):
    labels, masked = torch.tensor([*labels, *masked]), len(masked)
    mask = (torch.arange(len(labels)) < len(labels) - masked).float()
    run.log(2, 0, 1000, 100, "", pseudo_label=labels, mask=mask, loss=torch.tensor(1.0))


def idle(run, steps, rate=0.0):
    for step in range(steps):
        run.log(2, step, 1000, 50, "", mask_rate=torch.tensor(rate))


def test_one_screen_says_what_will_be_done_with_what(run, capsys):
    out = capsys.readouterr().out
    for said in ("4 labeled, 6 unlabeled (labeled included), 0 test, 3 classes",
                 "labels of a class: cat 2, dog 1, cow 1",
                 "teacher's labels of a class: dog 3, cat 1, cow 1; none: 1",
                 "teacher right on labeled examples: 75.00 % (95 % interval 30.06 to 95.44) of 4",
                 "1000 steps x (2 labeled + 6 unlabeled): 500 passes over the labels, 1000.0 over the pool",
                 "plan: 500 steps of stage 1: 500.0 passes over the pool; then 1000", "no test part, agreement with the teacher"):  # fmt: skip
        assert said in out, said
    assert len(out.splitlines()) < 15


def test_class_drift_is_half_the_summed_difference_of_class_shares(run, capsys):
    count(run, 0, 0, 0, 1, masked=(2, 2, 2))  # shares 3/4, 1/4, 0; labels 1/2, 1/4, 1/4
    run.evaluated(2, 9, 50.0)
    row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train/class_drift"] == pytest.approx(0.25) and "health: class drift 0.25" in capsys.readouterr().out
    count(run, 0, 0, 1, 2)  # counted anew since the last evaluation, and just as the labels are
    run.evaluated(2, 19, 50.0)
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["train/class_drift"] == 0


def test_what_is_no_test_accuracy_is_not_called_one(run):
    run.evaluated(2, 9, 50.0)
    assert "train/agreement" in (run.folder / "metrics.jsonl").read_text()
    result = run.result(stage=2)
    assert result["agreement"] == 50 and result["agreement_median20"] == 50 and "test_acc" not in result


def test_a_threshold_that_nothing_reaches_is_warned_of_once(run, capsys):
    capsys.readouterr()
    idle(run, 200)
    assert "warning" not in capsys.readouterr().out
    idle(run, 200)
    out = capsys.readouterr().out
    assert out.count("warning: no unlabeled example has counted for 250 steps") == 1 and "--tau" in out
    assert out.count("warning") == 1


def test_examples_above_the_threshold_end_an_idle_stretch(run, capsys):
    for _ in range(4):
        idle(run, 200)
        idle(run, 50, rate=0.5)
        run.warned.clear()
    assert "warning" not in capsys.readouterr().out


def test_a_collapse_into_one_class_and_a_missing_class_are_warned_of(run, capsys):
    count(run, *[1] * 140, *[0] * 20)
    run.evaluated(2, 9, 50.0)
    out = capsys.readouterr().out
    assert "88 % of the pseudo-labels are 'dog', expected 25 %" in out
    assert "no pseudo-label of class cow counted" in out


def test_with_a_prior_pseudo_labels_are_compared_with_it(tmp_path, capsys):
    run = common.Run(str(tmp_path), "test", {"resume": None}, torch.device("cpu"), None)
    part = common.Split(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 0, 1, 2]))
    args, prior = {"num_steps": 1000, "batch_size": 2, "uratio": 3}, torch.tensor([0.1, 0.7, 0.2])
    run.describe(common.Data("pets", CLASSES, part, None), np.arange(4), args, "agreement", prior=prior)
    assert "expected of a class (--prior): dog 3, cow 1, cat 0" in capsys.readouterr().out
    count(run, *[1] * 140, *[0] * 20, *[2] * 40)
    run.evaluated(2, 9, 50.0)
    out = capsys.readouterr().out
    assert "class drift 0.00" in out and "warning" not in out


@pytest.mark.parametrize("top, warned", [(90, True), (70, False)])
def test_a_collapse_is_warned_of_with_two_classes_too(tmp_path, capsys, top, warned):
    run = common.Run(str(tmp_path), "test", {"resume": None}, torch.device("cpu"), None)
    part = common.Split(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 0, 1, 1]))
    args = {"num_steps": 1000, "batch_size": 2, "uratio": 3}
    run.describe(common.Data("pets", ["cat", "dog"], part, None), np.arange(4), args, "agreement")
    count(run, *[1] * 2 * top, *[0] * 2 * (100 - top))
    run.evaluated(2, 9, 50.0)
    assert ("training may be collapsing" in capsys.readouterr().out) == warned


def test_balanced_or_few_pseudo_labels_are_not_warned_of(run, capsys):
    count(run, *[0, 0, 1, 2] * 50)
    run.evaluated(2, 9, 50.0)
    count(run, *[1] * 20)
    run.evaluated(2, 19, 50.0)
    assert "warning" not in capsys.readouterr().out


def test_the_pseudo_labels_counted_since_the_last_evaluation_outlive_a_restart(run):
    count(run, 0, 0, 1)
    run.save(2, 4, {})
    again = common.Run("", "", {"resume": str(run.folder)}, torch.device("cpu"), None)
    part = common.Split(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 0, 1, 2]))
    args = {"num_steps": 1000, "batch_size": 2, "uratio": 3}
    again.describe(common.Data("pets", CLASSES, part, None), np.arange(4), args, "agreement")
    assert again.counts.tolist() == [2, 1, 0]


def test_tensorboard_gets_every_metric_where_it_is_installed(tmp_path, monkeypatch):
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *row: written.append(row))
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run = common.Run(str(tmp_path), "test", {"resume": None, "tensorboard": True}, torch.device("cpu"), None)
    run.log(1, 9, 10, 10, "", loss=torch.tensor(2.0))
    assert ("stage 1/train/loss", 2.0, 10) in written


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        common.Run(str(tmp_path), "test", {"resume": None, "tensorboard": True}, torch.device("cpu"), None)


def test_steps_a_second_count_the_steps_since_the_clock_was_set(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    run.mark, run.timed = now[0], 0
    for step in range(10):
        now[0] += 0.5
        run.log(2, step, 1000, 10, "", loss=torch.tensor(1.0))
        if step == 6:  # a checkpoint, which is not time of steps
            run.save(2, step, {})
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["time/step_per_s"] for row in rows if "time/step_per_s" in row] == [2.0]
