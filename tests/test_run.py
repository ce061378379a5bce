"""Whole runs of zeromatch.py on digits: what they leave, exact resume, options, honest labels."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    checkpoint, column, differences, digits_labels, digits_views, dying_at, metrics, only_run,
    other_hidden_labels, weights,
)  # fmt: skip

import common
import pseudolabel
import zeromatch

ROOT = Path(__file__).parent.parent
SHORT = dict(num_steps=30, num_steps_stage1=20, eval_every=10, log_every=5, warmup_steps=2)


@pytest.fixture(scope="session")
def labels(tmp_path_factory):
    """A label file of the digits' training part from a made-up but repeatable teacher."""
    return digits_labels(tmp_path_factory.mktemp("labels"))["pseudolabels"]


def run_args(folder, labels, **changes):
    places = {"pseudolabels": labels, "runs_dir": str(folder), "data_dir": str(folder)}
    return zeromatch.Args(**places | SHORT | changes)


def go(folder, labels, **changes):
    zeromatch.main(run_args(folder, labels, **changes))
    return only_run(folder)


@pytest.fixture(scope="session")
def straight(tmp_path_factory, labels):
    """An uninterrupted run: (its folder, its result)."""
    folder = tmp_path_factory.mktemp("straight")
    result = zeromatch.main(run_args(folder, labels))
    return only_run(folder), result


def test_a_run_leaves_everything_the_readme_names(straight):
    folder, result = straight
    for name in ("args.json", "env.json", "labeled_idx.txt", "metrics.jsonl", "checkpoint.pt",
                 "result.json", "report.txt", "review.csv", "student/model.safetensors",
                 "student/config.json"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    written = json.loads((folder / "result.json").read_text())
    assert {name: value for name, value in written.items() if name != "args"} == result
    assert set(result) == {"test_acc", "test_acc_median20", "measured", "seconds", "teacher_acc",
                           "stage1_acc", "by_class", "calibration_error"}  # fmt: skip
    assert set(written["args"]) == set(vars(zeromatch.Args()))
    assert None not in [written["args"][k] for k in ("lr", "backbone", "num_steps", "ema_decay")]
    drawn = np.loadtxt(folder / "labeled_idx.txt", dtype=int)
    assert sorted(common.load_data("digits", "data").train.y[drawn]) == list(range(10))


def test_metrics_have_the_names_the_readme_gives_and_the_last_evaluation_is_reported(straight):
    folder, result = straight
    evaluated = {"test/acc"}
    logged = {"loss", "loss_s", "lambda_u", "loss_u", "kd_weight", "loss_kd", "mask_rate", "c_tau",
              "alpha_t", "lr", "pl_acc", "pl_acc_masked", "agree_teacher"}  # fmt: skip
    names = {stage: set() for stage in (1, 2)}
    for row in metrics(folder):
        names[row["stage"]] |= row.keys() - {"stage", "step"}
    assert names[2] == evaluated | {f"train/{name}" for name in logged}
    assert names[1] == {"test/acc", "train/loss", "train/lr"}
    accs = column(folder, "test/acc", stage=2)
    assert len(accs) == 3 and result["test_acc"] == accs[-1] and len(set(accs)) > 1
    assert result["test_acc_median20"] == np.median(accs)
    assert result["stage1_acc"] == column(folder, "test/acc", stage=1)[-1]


def test_the_saved_student_predicts_what_the_result_says(straight):
    student, _ = common.load_student(straight[0] / "student")
    views = digits_views("test")
    right = common.predict(student, views)[0].argmax(dim=1) == views.y
    assert 100 * right.float().mean().item() == straight[1]["test_acc"]
    ema = checkpoint(straight[0])["ema"]
    assert torch.equal(student.head.weight, ema["module.head.weight"])


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(straight, tmp_path, labels):
    assert differences(straight[0], go(tmp_path / "same", labels)) == []
    other = weights(go(tmp_path / "other", labels, seed=1))
    assert not torch.equal(weights(straight[0])["model.head.weight"], other["model.head.weight"])


@pytest.mark.parametrize("stage, step", [(1, 13), (1, 19), (2, 0), (2, 17)])
def test_a_run_stopped_anywhere_resumes_to_the_same_run(
    straight, tmp_path, labels, monkeypatch, stage, step
):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(common.Run, "log", dying_at(stage, step))
        go(tmp_path, labels)
    folder = only_run(tmp_path)
    saved = zeromatch.Args(**json.loads((folder / "args.json").read_text()))
    zeromatch.main(replace(saved, resume=str(folder)))
    assert differences(straight[0], folder) == []


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_compiled_student_trains_to_the_same_weights(tmp_path, labels, monkeypatch, ema_decay):
    short = {"num_steps": 3, "num_steps_stage1": 2, "ema_decay": ema_decay}
    plain = go(tmp_path / "plain", labels, **short)
    compiled, real = [], torch.nn.Module.compile

    def eagerly(module):  # the code that torch.compile runs, without a C++ compiler
        compiled.append(module)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    assert differences(plain, go(tmp_path / "compiled", labels, compile=True, **short)) == []
    assert len(compiled) == 1


@pytest.mark.parametrize("prior", ["labeled", "teacher"])
def test_other_hidden_labels_change_no_weight(tmp_path, labels, monkeypatch, prior):
    a = go(tmp_path / "a", labels, prior=prior)
    other_hidden_labels(monkeypatch, zeromatch, 10, lambda y: y // 2)  # also other class sizes
    b = go(tmp_path / "b", labels, prior=prior)
    assert not [name for name in differences(a, b) if name != "metrics"]
    assert column(a, "train/loss") == column(b, "train/loss")
    assert column(a, "train/pl_acc") != column(b, "train/pl_acc")  # only what is printed


@pytest.mark.parametrize("changes", [
    {"stages": "1"}, {"stages": "2"}, {"lambda_p": 0.0}, {"anneal": "none"}, {"tau": 0.2},
    {"lambda_u": 0.3}, {"lambda_p": 0.3}, {"lr": 0.01}, {"uratio": 1}, {"batch_size": 8},
    {"marginal_decay": 0.5}, {"weight_decay": 0.5}, {"warmup_steps": 1}, {"ema_decay": 0.05},
    {"optimizer": "adamw"}, {"agreement": True}, {"prior": "teacher"}, {"amp": "bf16"},
    {"backbone": "wrn_28_2", "batch_size": 2, "uratio": 2},
], ids=str)  # fmt: skip
def test_every_option_of_the_method_runs_and_changes_the_weights(tmp_path, labels, changes):
    base = {"num_steps": 6, "num_steps_stage1": 2, "eval_every": 6, "lr": 0.004, "tau": 0.9}
    changed, plain = go(tmp_path, labels, **base | changes), go(tmp_path / "plain", labels, **base)
    one, other = weights(changed), weights(plain)
    assert one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one)
    expected = {"1": {1}, "2": {2}}.get(changes.get("stages"), {1, 2})
    assert {row["stage"] for row in metrics(changed)} == expected
    result = json.loads((changed / "result.json").read_text())
    assert (result["stage1_acc"] is None) == (expected == {2}) and 0 <= result["test_acc"] <= 100


def test_a_loss_that_is_not_finite_names_term_and_step_and_keeps_the_checkpoint(
    tmp_path, labels, monkeypatch
):
    real, calls = zeromatch.loss_consistency, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 13 else 1)

    monkeypatch.setattr(zeromatch, "loss_consistency", broken)
    with pytest.raises(common.UserError, match="(loss|loss_u) is not finite at stage 2 step"):
        go(tmp_path, labels)
    state = checkpoint(only_run(tmp_path))
    assert (state["stage"], state["step"]) == (2, 10)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import zeromatch"
    command = [sys.executable, "-c", f"{code}; assert 'transformers' not in sys.modules", str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


def test_the_glyph_teacher_knows_digits_it_never_saw_and_is_made_once(tmp_path, monkeypatch):
    """A shorter training than the shipped one: far above chance, and wrong in its own ways."""
    real = pseudolabel.train_glyph_teacher
    short = lambda: real(num_steps=60, batch=64)  # noqa: E731
    monkeypatch.setattr(pseudolabel, "train_glyph_teacher", short)
    data = common.load_data("digits", str(tmp_path))
    train, test = pseudolabel.default_labels(data, str(tmp_path))
    zero_shot, probs = pseudolabel.read_labels(train, data, "train")
    assert 0.35 < (zero_shot == data.train.y).mean() < 0.9
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-3)
    assert np.array_equal(probs.argmax(axis=1), zero_shot)
    assert pseudolabel.read_labels(test, data, "test")[0].shape == (500,)
    before = os.stat(train).st_mtime_ns
    assert pseudolabel.default_labels(data, str(tmp_path))[0] == train
    assert os.stat(train).st_mtime_ns == before
