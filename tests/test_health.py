"""What a run says and keeps: the screen before training, evaluations, scalars, whole files."""

import json
import os
import re
import sys
import types

import numpy as np
import pytest
import torch

import common

CLASSES = ["cat", "dog", "cow"]
STUDENT = types.SimpleNamespace(config={})
TWO = types.SimpleNamespace(y=torch.tensor([0, 1]))  # views of a cat and a dog


def new_run(folder, y=(0, 0, 1, 2, -1, -1), zero_shot=(0, 1, 1, 2, -1, 1), **args):
    """A run on data whose first four labels are drawn; the pool holds two examples more."""
    defaults = {"runs_dir": str(folder), "resume": None, "track": None, "log_every": 100}
    args = defaults | {"eval_every": 10**6} | args
    run = common.Run("test", args, torch.device("cpu"), None)
    part = common.Split(np.zeros((6, 1, 8, 8), np.uint8), np.array(y))
    data = common.Data("pets", CLASSES, part, None)
    run.restore(9, {})  # as each stage does, of a checkpoint that is of another one
    run.describe(data, np.arange(4), np.array(zero_shot))
    return run


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


@pytest.fixture(autouse=True)
def one_evaluation(monkeypatch):
    """Half of two examples are right, whatever the network."""
    said = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    monkeypatch.setattr(common, "predict", lambda *given: (said, None))


def evaluate(run, step):
    run.evaluate(2, step, step + 1, None, TWO)
    return rows_of(run)[-1]


def rows_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def step(run, number=0):
    run.log(2, number, 1000, "", loss=torch.tensor(1.0))


def test_one_screen_says_what_will_be_done_with_what(run, capsys):
    new_run(run.folder / "again", lr=0.25, test_file=None)
    out = capsys.readouterr().out
    for said in ("4 labeled, 6 unlabeled (with labeled), 0 test", "cat 2, dog 1, cow 1", "lr 0.25"):
        assert said in out, said
    assert "test_file" not in out and len(out.splitlines()) < 15


def test_what_is_no_test_accuracy_is_not_called_one(run, monkeypatch):
    row = evaluate(run, 9)
    assert row["train/labeled_acc"] == 50 and "test/acc" not in row
    monkeypatch.setattr(common, "save_student", lambda *given: None)
    run.args |= {"dataset": "pets", "backbone": "cnn"}
    result = run.finish(STUDENT, TWO, {"any": 50.0})
    assert result["labeled_acc"] == result["labeled_acc_median20"] == 50
    assert result["measured"] == "labeled_acc" and "test_acc" not in result


@pytest.mark.parametrize("restarted", [False, True])
def test_the_end_reports_every_class_and_says_what_to_do_next(
    run, tmp_path, monkeypatch, capsys, restarted
):
    evaluate(run, 9)
    if restarted:  # after the last step, before the result was written
        run.save(2, 9, 10, {})
        run.metrics.close()
        run = new_run(tmp_path, resume=str(run.folder))
    monkeypatch.setattr(common, "save_student", lambda *given: None)
    run.args |= {"dataset": "pets", "backbone": "cnn"}
    capsys.readouterr()
    result = run.finish(STUDENT, TWO, {"teacher": None, "stage 1": 62.0, "stage 2": 50})
    out = capsys.readouterr().out
    assert f"--student {run.folder}/student" in out
    report = (run.folder / "report.txt").read_text()
    assert report in out and "[[1 0 0]\n [1 0 0]\n [0 0 0]]" in report
    assert re.search(r"cat +0\.50 +1\.00", report) and re.search(r"dog +0\.00 +0\.00", report)
    assert result["by_class"]["cat"]["recall"] == 1 and result["by_class"]["dog"]["recall"] == 0
    assert result["by_class"]["cow"]["support"] == 0


def test_the_calibration_error_is_that_of_ten_bins(run, monkeypatch):
    """sum over bins of |right - confidence|, in percent of the examples; confidence 1 included."""
    sure, right = [1.0, 0.95, 0.92, 0.55, 0.51, 0.34], [1, 0, 1, 1, 0, 1]
    probs = torch.tensor([[p, (1 - p) / 2, (1 - p) / 2] for p in sure])
    monkeypatch.setattr(common, "predict", lambda *given: (probs, None))
    monkeypatch.setattr(common, "save_student", lambda *given: None)
    run.args |= {"dataset": "pets", "backbone": "cnn"}
    y = torch.tensor([0 if one else 1 for one in right])
    run.history = {1: [50.0]}
    result = run.finish(STUDENT, types.SimpleNamespace(y=y), {})
    bins = [1 - 1.0], [0 - 0.95, 1 - 0.92], [1 - 0.55, 0 - 0.51], [1 - 0.34]
    expected = 100 * sum(abs(sum(gaps)) for gaps in bins) / 6
    assert result["calibration_error"] == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_right_after_a_restart_remembers_where_metrics_end(run, tmp_path):
    """Killed after lines that no checkpoint knows, and stopped again before the next line."""
    step(run)
    evaluate(run, 9)
    run.save(2, 9, 10, {})
    evaluate(run, 19)
    with pytest.raises(common.UserError, match="another process trains in this folder"):
        new_run(tmp_path, resume=str(run.folder))
    run.metrics.close()
    again = new_run(tmp_path, resume=str(run.folder))
    again.save(2, 10, 11, {})
    again.metrics.close()
    last = new_run(tmp_path, resume=str(run.folder))
    assert [row["step"] for row in rows_of(last)] == [10]
    step(last)
    assert evaluate(last, 11)["step"] == 12 and len(rows_of(last)) == 2


def test_a_line_has_means_since_the_last_line_or_checkpoint(run):
    run.args["log_every"] = 4
    for number, (loss, rate) in enumerate([(9.0, 1.0), (1.0, float("nan")), (3.0, 0.5)], 1):
        run.log(2, number, 1000, "{loss}", loss=torch.tensor(loss), rate=torch.tensor(rate))
        if number == 1:
            run.save(2, number, 2, {})
    row = rows_of(run)[-1]
    assert row["train/loss"] == 2 and row["train/rate"] == 0.5  # of one step, the other has none


def test_tensorboard_gets_every_metric_where_it_is_installed(tmp_path, monkeypatch):
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *row: written.append(row), close=None)
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run = new_run(tmp_path, track="tensorboard")
    run.log(1, 9, 10, "", loss=torch.tensor(2.0))
    evaluate(run, 9)
    assert ("stage 1/train/loss", 2.0, 10) in written
    assert ("stage 2/train/labeled_acc", 50.0, 10) in written


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_get_every_metric_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch, name):
    """Against a stand-in with the calls that both packages have: init and log."""
    begun, logged = [], []
    board = types.SimpleNamespace(log=logged.append)
    fake = types.SimpleNamespace(init=lambda **given: begun.append(given) or board)
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    run = new_run(tmp_path, track=name)
    run.log(1, 9, 10, "", loss=torch.tensor(2.0))
    evaluate(run, 19)
    first, second = logged
    assert first["stage 1/train/loss"] == 2 and first["time/step"] == 10
    assert second["stage 2/train/labeled_acc"] == 50 and second["time/step"] == 20
    run.metrics.close()
    new_run(tmp_path, track=name, resume=str(run.folder))
    names = {given["name"] for given in begun}
    assert names == {run.folder.name} == {os.environ["WANDB_RUN_ID"]}
    assert [given["resume"] for given in begun] == ["allow"] * 2
    assert begun[0]["config"]["log_every"] == 100


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_without_its_package_one_line_says_what_to_install(tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(common.UserError, match=f"--track {name} .*pip install tensorboard, "):
        new_run(tmp_path, track=name)


def test_two_runs_begun_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    assert new_run(tmp_path).folder != new_run(tmp_path).folder
    noon = types.SimpleNamespace(strftime=lambda form: "noon")
    monkeypatch.setattr(common, "datetime", types.SimpleNamespace(now=lambda: noon))
    new_run(tmp_path)
    with pytest.raises(FileExistsError):  # never into one folder
        new_run(tmp_path)


def test_a_run_is_continued_with_the_same_examples_and_labels_or_not_at_all(run, tmp_path):
    run.metrics.close()
    resume = str(run.folder)
    for changed in ({"y": (0, 0, 1, 1, -1, -1)}, {"zero_shot": (0, 1, 1, 2, 2, 1)}):
        with pytest.raises(common.UserError, match="examples or labels have changed"):
            new_run(tmp_path, resume=resume, **changed)
    new_run(tmp_path, resume=resume).metrics.close()
    env = json.loads((run.folder / "env.json").read_text())
    assert len(env["resumed"]) == 1 and env["command"] == env["resumed"][0]["command"] == sys.argv
    saved = json.loads((run.folder / "args.json").read_text())
    assert saved["amp"] == "off" and saved["device"] == "cpu"


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path, monkeypatch, fails):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[fails], full)
    with pytest.raises(OSError, match="No space left on device"):
        common.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_run_that_an_older_version_began_is_continued(run, tmp_path):
    run.metrics.close()
    (run.folder / "env.json").write_text('{"command": []}')
    again = new_run(tmp_path, resume=str(run.folder))
    env = json.loads((again.folder / "env.json").read_text())
    assert env["command"] == [] and len(env["resumed"]) == 1 and env["data"]


def test_two_signals_of_different_kinds_save_and_the_same_twice_stops(monkeypatch):
    for waits, signals, stops in ((True, [2, 15], False), (True, [2, 2], True), (False, [2], True)):
        monkeypatch.setattr(common, "STOP", {"signal": 0, "waits": waits})
        try:
            for number in signals:
                common.note_signal(number, None)
            assert not stops and common.STOP["signal"] == signals[-1]
        except KeyboardInterrupt:
            assert stops
