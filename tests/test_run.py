"""Whole runs of zeromatch.py on digits: exact resume after any death, one-line errors, honest labels."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import pseudolabel
import zeromatch

ROOT = Path(__file__).parent.parent
SHORT = dict(num_steps=30, num_steps_stage1=20, eval_every=10, log_every=5, warmup_steps=2)


@pytest.fixture(scope="session")
def labels(tmp_path_factory):
    """A label file of the digits' training part from a made-up but repeatable teacher."""
    data = common.load_data("digits", "data")
    rng = np.random.RandomState(0)
    probs = rng.dirichlet(np.ones(10), len(data.train)) + 0.5 * np.eye(10)[rng.randint(0, 10, len(data.train))]
    path = tmp_path_factory.mktemp("labels") / "train.jsonl"
    pseudolabel.write_labels(
        path, pseudolabel.header_of(data, "train", "made up", "none"), probs / probs.sum(1, keepdims=True)
    )
    return str(path)


def run_args(tmp_path, labels, **changes):
    return zeromatch.Args(
        **{"pseudolabels": labels, "runs_dir": str(tmp_path), "data_dir": str(tmp_path), **SHORT, **changes}
    )


def only_run(tmp_path):
    (folder,) = tmp_path.glob("zeromatch-*")
    return folder


def final_weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}, state


def assert_same_run(one, other):
    (a, state_a), (b, state_b) = final_weights(one), final_weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(state_a["p_lb"], state_b["p_lb"]) and torch.equal(state_a["p_ulb"], state_b["p_ulb"])
    assert state_a["history"] == state_b["history"]
    drop = lambda rows: [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]  # noqa: E731
    metrics = [drop(map(json.loads, (f / "metrics.jsonl").read_text().splitlines())) for f in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="session")
def straight(tmp_path_factory, labels):
    """An uninterrupted run: (its folder, its result)."""
    folder = tmp_path_factory.mktemp("straight")
    result = zeromatch.main(run_args(folder, labels))
    return only_run(folder), result


def test_a_run_leaves_everything_the_readme_names(straight):
    folder, result = straight
    for name in ("args.json", "env.json", "labeled_idx.txt", "metrics.jsonl", "checkpoint.pt", "result.json",
                 "student/model.safetensors", "student/config.json"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    written = json.loads((folder / "result.json").read_text())
    assert written["test_acc"] == result["test_acc"] and set(written["args"]) == set(vars(zeromatch.Args()))
    assert None not in [written["args"][k] for k in ("lr", "backbone", "num_steps", "ema_decay")]  # resolved values
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accs = [r["test/acc"] for r in rows if r["stage"] == 2 and "test/acc" in r]
    assert result["test_acc"] == accs[-1] and result["test_acc_median20"] == np.median(accs[-20:])
    data = common.load_data("digits", "data")
    idx = np.loadtxt(folder / "labeled_idx.txt", dtype=int)
    assert sorted(data.train.y[idx]) == list(range(10))


def test_the_saved_student_predicts_what_the_result_says(straight):
    folder, result = straight
    student, config = common.load_student(folder / "student")
    data = common.load_data("digits", "data")
    views = common.Views(data.test, common.preset_of(config["dataset"]), torch.device("cpu"))
    assert common.accuracy(common.predict(student, views), views.y) == result["test_acc"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(straight, tmp_path, labels):
    zeromatch.main(run_args(tmp_path / "same", labels))
    assert_same_run(straight[0], only_run(tmp_path / "same"))
    zeromatch.main(run_args(tmp_path / "other", labels, seed=1))
    a, b = final_weights(straight[0])[0], final_weights(only_run(tmp_path / "other"))[0]
    assert not torch.equal(a["model.head.weight"], b["model.head.weight"])


@pytest.mark.parametrize("stage, step", [(1, 13), (1, 19), (2, 0), (2, 17)])
def test_a_run_stopped_anywhere_resumes_to_the_same_weights(straight, tmp_path, labels, monkeypatch, stage, step):
    """Dies without notice at the given step, after its update and before anything is written."""
    real = common.Run.log

    def dying(self, at_stage, at_step, *args, **values):
        if (at_stage, at_step) == (stage, step):
            raise RuntimeError("killed")
        return real(self, at_stage, at_step, *args, **values)

    monkeypatch.setattr(common.Run, "log", dying)
    with pytest.raises(RuntimeError, match="killed"):
        zeromatch.main(run_args(tmp_path, labels))
    monkeypatch.undo()
    folder = only_run(tmp_path)
    saved = zeromatch.Args(**json.loads((folder / "args.json").read_text()))
    zeromatch.main(zeromatch.replace(saved, resume=str(folder)))
    assert_same_run(straight[0], folder)


def start(tmp_path, labels, *flags):
    """zeromatch.py as a process of its own, with the settings of the straight run."""
    short = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, ROOT / "zeromatch.py", "--runs-dir", tmp_path, "--data-dir", tmp_path]
    given = [] if "--resume" in flags else [*short, "--pseudolabels", labels]
    return subprocess.Popen(
        [*map(str, command), *given, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read()}")


@pytest.mark.parametrize(
    "stage, number", [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGTERM), (1, signal.SIGINT)]
)
def test_a_killed_process_resumes_to_the_same_weights(straight, tmp_path, labels, stage, number):
    process = start(tmp_path, labels)
    wait_for(process, f"stage {stage} step 15")
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    folder = only_run(tmp_path)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and "--resume" in error and len(error.splitlines()) == 1
    resumed = start(tmp_path, labels, "--resume", str(folder))
    output, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert f"stage {stage} step 5/" not in output  # it went on, it did not begin again
    assert_same_run(straight[0], folder)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_compiled_student_trains_to_the_same_weights(tmp_path, labels, monkeypatch, ema_decay):
    short = {"num_steps": 3, "num_steps_stage1": 2, "ema_decay": ema_decay}
    zeromatch.main(run_args(tmp_path / "plain", labels, **short))
    compiled, real = [], torch.nn.Module.compile

    def eagerly(module):  # the code that torch.compile runs, without a C++ compiler
        compiled.append(module)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    zeromatch.main(run_args(tmp_path / "compiled", labels, compile=True, **short))
    one, other = (final_weights(only_run(tmp_path / name))[0] for name in ("plain", "compiled"))
    assert len(compiled) == 1 and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_agreement_lets_more_examples_count(straight, tmp_path, labels):
    zeromatch.main(run_args(tmp_path, labels, agreement=True))
    more, plain = (
        [row["train/mask_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()
         if "train/mask_rate" in (row := json.loads(line))]
        for folder in (only_run(tmp_path), straight[0])
    )  # fmt: skip
    assert len(more) == len(plain) and sum(more) > sum(plain)


@pytest.mark.parametrize("prior", ["labeled", "teacher"])
def test_other_hidden_labels_change_no_weight(tmp_path, labels, monkeypatch, prior):
    real = common.load_data

    def halved(*args):
        data = real(*args)
        drawn = common.draw_labeled(data.train.y, 10, 10, seed=0)
        data.train.y[np.setdiff1d(np.arange(len(data.train)), drawn)] //= 2  # also other sizes of the classes
        return data

    zeromatch.main(run_args(tmp_path / "as it is", labels, prior=prior))
    monkeypatch.setattr(zeromatch, "load_data", halved)
    monkeypatch.setattr(
        zeromatch,
        "draw_labeled",
        lambda y, n, k, seed: common.draw_labeled(real("digits", "").train.y, n, k, seed),
    )
    zeromatch.main(run_args(tmp_path / "halved", labels, prior=prior))
    a, b = (final_weights(only_run(tmp_path / name))[0] for name in ("as it is", "halved"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(stages="1"), "no stage 2"), (dict(stages="2"), "no stage 1"), (dict(lambda_p=0.0), ""), (dict(anneal="none"), ""),
        (dict(optimizer="sgd", lr=0.03, ema_decay=0.0), ""), (dict(amp="bf16"), ""), (dict(backbone="wrn_28_2", batch_size=2), ""),
    ],
)  # fmt: skip
def test_ablations_and_options_run_and_change_the_weights(straight, tmp_path, labels, changes, parts):
    result = zeromatch.main(run_args(tmp_path, labels, num_steps=3, num_steps_stage1=2, **changes))
    stages = {json.loads(line)["stage"] for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()}
    zeromatch.main(run_args(tmp_path / "plain", labels, num_steps=3, num_steps_stage1=2))
    changed, plain = (final_weights(only_run(at))[0] for at in (tmp_path, tmp_path / "plain"))
    assert any(k not in plain or plain[k].shape != v.shape or not torch.equal(plain[k], v) for k, v in changed.items())
    assert stages == {"no stage 2": {1}, "no stage 1": {2}, "": {1, 2}}[parts]
    assert (result["stage1_acc"] is None) == (parts == "no stage 1") and 0 <= result["test_acc"] <= 100


def test_every_number_of_the_method_changes_the_outcome(tmp_path, labels):
    base = dict(num_steps=6, num_steps_stage1=2, eval_every=6)
    weights = {}
    for name, change in {
        "none": {}, "tau": {"tau": 0.2}, "lambda_u": {"lambda_u": 0.3}, "lambda_p": {"lambda_p": 0.3},
        "lr": {"lr": 0.01}, "anneal": {"anneal": "none"}, "uratio": {"uratio": 1},
        "marginal_decay": {"marginal_decay": 0.5, "tau": 0.9},
        "weight_decay": {"weight_decay": 0.5}, "warmup_steps": {"warmup_steps": 5}, "ema_decay": {"ema_decay": 0.5},
        "batch_size": {"batch_size": 8}, "agreement": {"agreement": True}, "prior": {"prior": "teacher"},
    }.items():  # fmt: skip
        zeromatch.main(run_args(tmp_path / name, labels, **{**base, "lr": 0.004, "tau": 0.9, **change}))
        weights[name] = final_weights(only_run(tmp_path / name))[0]
    same = [
        n
        for n, w in weights.items()
        if n != "none" and all(torch.equal(w[k], v) for k, v in weights["none"].items() if k in w)
    ]
    assert same == []


def fails_with_one_line(tmp_path, labels, *flags):
    process = start(tmp_path, labels, *flags)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    return error


def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, labels):
    for flags, expected in [
        (["--dataset", "no_such_set"], "no_such_set.*expected"),
        (["--num-labels", "15"], "15.*multiple of 10"),
        (["--num-labels", "9990"], "9990.*examples"),
        (["--pseudolabels", "nowhere.jsonl"], "nowhere.jsonl.*no such file"),
        (["--lr", "-1"], "--lr.*-1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--backbone", "resnet_1"], "resnet_1"),
        (["--device", "cuda"], "cuda.*cpu") if not torch.cuda.is_available() else (["--uratio", "0"], "--uratio 0"),
        (["--resume", str(tmp_path / "none")], "--resume.*args.json"),
    ]:
        assert re.search(expected, fails_with_one_line(tmp_path, labels, *flags)), flags


def test_resuming_with_another_argument_is_refused(straight, tmp_path, labels):
    error = fails_with_one_line(tmp_path, labels, "--resume", str(straight[0]), "--lr", "0.5")
    assert "--lr 0.5" in error and "new run" in error


def test_a_loss_that_is_not_finite_names_term_and_step_and_keeps_the_checkpoint(tmp_path, labels, monkeypatch):
    real, calls = zeromatch.loss_consistency, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 13 else 1)

    monkeypatch.setattr(zeromatch, "loss_consistency", broken)
    with pytest.raises(common.UserError, match="(loss|loss_u) became nan at stage 2 step 13"):
        zeromatch.main(run_args(tmp_path, labels))
    state = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (2, 10)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_checkpoints_hold_tensors_and_plain_python_only(straight):
    torch.load(straight[0] / "checkpoint.pt", weights_only=True)


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import zeromatch; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and list(tmp_path.iterdir()) == [], done.stderr


def test_the_glyph_teacher_knows_digits_it_never_saw(tmp_path, monkeypatch):
    """A shorter training than the shipped one: far above chance, and wrong in its own ways."""
    real = pseudolabel.train_glyph_teacher
    monkeypatch.setattr(pseudolabel, "train_glyph_teacher", lambda: real(num_steps=60, batch=64))
    data = common.load_data("digits", str(tmp_path))
    started = time.time()
    train, test = pseudolabel.default_labels(data, str(tmp_path))
    zero_shot, probs = pseudolabel.read_labels(train, data, "train")
    assert 0.35 < (zero_shot == data.train.y).mean() < 0.9
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-3) and np.array_equal(probs.argmax(axis=1), zero_shot)
    assert pseudolabel.read_labels(test, data, "test")[0].shape == (500,)
    before = train.stat().st_mtime_ns
    pseudolabel.default_labels(data, str(tmp_path))
    assert train.stat().st_mtime_ns == before and time.time() - started < 60  # made once
