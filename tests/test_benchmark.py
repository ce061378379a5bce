"""The benchmark's arithmetic: equal budgets, paired differences, curves over all stages."""

import json
import re
from concurrent.futures import Future

import benchmark as b
import numpy as np
import pytest


@pytest.mark.parametrize("kind", {kind for _, _, kind in b.ROWS.values()})
def test_every_row_has_the_same_number_of_updates(kind):
    steps = b.steps_of(kind, stage1=400, stage2=800)
    spent = {
        "one stage": lambda: steps["num_steps"],
        "stage 1 alone": lambda: steps["num_steps_stage1"],
        "halves": lambda: 2 * steps["num_steps"],
        "two stages": lambda: steps["num_steps_stage1"] + steps["num_steps"],
    }[kind]
    assert spent() == 1200


def made(row, seed, acc, **more):
    return {"row": row, "seed": seed, "test_acc": acc, "test_acc_median20": acc - 1, "seconds": 10.0, **more}


def test_table_pairs_runs_by_seed():
    runs = [
        made("ZeroMatch", 0, 90.0),
        made("ZeroMatch", 1, 80.0),
        made("AdaMatch", 1, 83.0),
        made("AdaMatch", 0, 91.0),
    ]
    rows = {line.split("|")[1].strip(): line for line in b.table(runs, zero_shot=60.0).splitlines()}
    assert "| 87.0 ± 5.7 | +2.0 ± 1.4 | 86.0 | 10 |" in rows["AdaMatch"]  # differences 1 and 3
    assert "| 85.0 ± 7.1 |  | 84.0 | 10 |" in rows["ZeroMatch"]
    assert "60.0" in rows["zero-shot (the teacher itself)"]


def test_table_shows_the_outer_network_and_the_trusted_set():
    trusted = {"all": [100, 70.0], "confident": [60, 80.0], "trusted": [50, 90.0]}
    runs = [made("KD-FixMatch (CE)", s, 85.0, outer_acc=80.0 + s, trusted=trusted) for s in (0, 2)]
    text = b.table(runs, None)
    assert "| 81.0 ± 1.4 |" in text and "confident 60 (80.0 % right), trusted 50 (90.0 % right)" in text


def test_curves_add_the_steps_of_earlier_stages_and_leave_out_clustering():
    metrics = [
        {"stage": 1, "step": 10, "test/acc": 50.0}, {"stage": 1, "step": 20, "test/acc": 60.0},
        {"stage": 2, "step": 200, "train/agree": 0.9}, {"stage": 3, "step": 5, "test/acc": 55.0},
    ]  # fmt: skip
    points = b.continuous(metrics, "test/acc")
    assert [p for p in points if p[1] == p[1]] == [(10, 50.0), (20, 60.0), (25, 55.0)]
    assert len(points) == 4 and points[2][1] != points[2][1]  # a gap between the networks


class Here:
    """A pool without processes, which would not see what a test puts in place of a function."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(b.run_row(*args))
        return done


def test_finished_runs_are_kept_and_those_of_another_teacher_apart(tmp_path, monkeypatch):
    started = []

    def run_row(row, seed, *rest):
        started.append((row, seed))
        return made(row, seed, 90.0 + seed)

    monkeypatch.setattr(b, "run_row", run_row)
    monkeypatch.setattr(b, "ProcessPoolExecutor", Here)
    shared = {"dataset": "digits"}
    for seeds in ((0, 1), (0, 1, 2)):
        runs = b.finished_runs(tmp_path / "a.json", ("AdaMatch", "ZeroMatch"), seeds, shared, None, 1)
    assert started == [(row, seed) for seed in (0, 1, 2) for row in ("AdaMatch", "ZeroMatch")]  # none twice
    assert b.accuracies(runs)["AdaMatch"] == {0: 90.0, 1: 91.0, 2: 92.0}
    assert len(b.finished_runs(tmp_path / "b.json", ("AdaMatch",), (0,), shared, None, 1)) == 1 and len(started) == 7
    b.finished_runs(tmp_path / "a.json", ("AdaMatch",), (0,), shared, 700, 1)
    assert len(started) == 8  # with other numbers of steps it is another run
    folders = {b.run_folder(tmp_path / "a.json", row, seed) for row in b.ROWS | b.EXTENSIONS for seed in (0, 1)}
    assert len(folders) == 2 * len(b.ROWS | b.EXTENSIONS)


def test_intervals_are_those_of_students_t():
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), quantile 4.303 with two degrees of freedom
    assert b.with_interval(np.array([1.0, 2.0, 3.0])) == "+2.0 (-0.5 to +4.5)"


def test_the_table_of_extensions_pairs_by_seed_and_averages_over_cells(tmp_path, monkeypatch, capsys):
    def run_row(row, seed, shared, *rest):
        gain = 3.0 if shared["num_labels"] == 10 else 1.0
        acc = {"AdaMatch": 70.0, "ZeroMatch": 80.0 + seed, "ZeroMatch, agreement": 80.0 + seed + gain}[row]
        return made(row, seed, acc, teacher_acc=60.0, stage1_acc=65.0)

    monkeypatch.setattr(b, "run_row", run_row)
    monkeypatch.setattr(b, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(b.pseudolabel, "default_labels", lambda *given: None)
    b.extensions(("digits",), (0, 1), str(tmp_path), str(tmp_path), jobs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 6 + 1
    assert lines[1] == "| digits, 10 labels | glyphs | 60.0 | 65.0 | 70.0 | 80.5 | 83.5 | +3.0 (+3.0 to +3.0) |"
    assert lines[-1] == "| mean |  | 60.0 | 65.0 | 70.0 | 80.5 | 82.5 | +2.0 (+2.0 to +2.0) |"


def test_a_thinned_pool_falls_geometrically_and_keeps_the_test_part(tmp_path):
    data = b.common.load_data("digits", str(tmp_path))
    thin = b.thinned(data, 8.0)
    share = np.sort(np.bincount(thin.train.y) / np.bincount(data.train.y))
    assert share == pytest.approx(8.0 ** -np.linspace(1, 0, 10), abs=0.01) and thin.test is data.test
    assert b.thinned(data, 1) is data
    kept = b.kept_when_thinned(data.train.y, 8.0)
    assert np.array_equal(thin.train.x, data.train.x[kept]) and len(set(kept)) == len(kept) == len(thin.train)


def test_a_thinned_pool_trains_with_its_own_label_file_and_shares_and_is_measured_twice(tmp_path):
    b.teachers("digits", data_dir=str(tmp_path))
    data = b.common.load_data("digits", str(tmp_path))
    labels = f"{tmp_path}/labels/digits-{{}}-svm.jsonl".format
    files = b.thin_files(data, 8.0, labels, str(tmp_path / "shares.json"))
    thin = b.thinned(data, 8.0)
    y_zs, _ = b.pseudolabel.read_labels(files["pseudolabels"], thin, "train")
    assert (y_zs == thin.train.y).mean() > 0.95
    true = b.common.class_shares(files["shares"], data.classes, y_zs, y_zs, b.torch.device("cpu")).numpy()
    assert true == pytest.approx(np.bincount(thin.train.y) / len(thin.train))
    shared = {"dataset": "digits", "num_labels": 10, "data_dir": str(tmp_path), "imbalance": 8.0, "eval_every": 30}
    run = b.run_row(b.PRIOR_FILE, 0, shared | files, 10, 30, str(tmp_path / "run"))
    (folder,) = (tmp_path / "run").glob("*")
    assert json.loads((folder / "args.json").read_text())["prior"] == files["shares"]
    assert 0 < run["test_acc"] < 100 and 0 < run["pool_acc"] < 100
    # in a pool of three examples of one class and one of another, recall of the one counts three times as much
    student, _ = b.common.load_student(folder / "student")
    views = b.common.make_views(data.test, b.common.preset_of("digits"), "cnn", b.torch.device("cpu"))
    said = b.common.predict(student, views).argmax(dim=1).numpy()
    recalls = np.array([(said == k)[data.test.y == k].mean() for k in range(10)])
    high, low = recalls.argmax(), recalls.argmin()
    assert recalls[high] > recalls[low] + 0.05  # else the weights would not show
    pool = b.common.Split(data.test.x[:4], np.array([high, high, high, low]))
    expected = 100 * (0.75 * recalls[high] + 0.25 * recalls[low])
    assert b.accuracy_as_in(pool, data.test, folder / "student", "digits") == pytest.approx(expected)


def test_confusion_by_the_student_resembles_the_true_one_once_it_has_learned(tmp_path):
    b.teachers("digits", data_dir=str(tmp_path))
    at = str(tmp_path / "labels" / "digits-train-svm.jsonl")
    shared = {"dataset": "digits", "num_labels": 40, "data_dir": str(tmp_path), "pseudolabels": at, "eval_every": 120}
    b.run_row("ZeroMatch, agreement", 0, shared, 60, 120, str(tmp_path / "run"))
    student, true = b.learned_and_true(tmp_path / "run", "digits", str(tmp_path), at)
    assert np.allclose(student.sum(axis=1), 1) and np.allclose(true.sum(axis=1), 1)
    assert true.diagonal().min() > 0.9 and (student.argmax(axis=1) == np.arange(10)).mean() >= 0.8

def test_teachers_are_weak_and_strong_and_write_readable_labels(tmp_path, capsys):
    b.teachers("digits", data_dir=str(tmp_path))
    right = dict(re.findall(r"digits-test-(\w+)\.jsonl: ([\d.]+) %", capsys.readouterr().out))
    assert 55 < float(right["rows"]) < 75 and float(right["svm"]) > 97
    data = b.common.load_data("digits", str(tmp_path))
    labels, _ = b.pseudolabel.read_labels(str(tmp_path / "labels" / "digits-train-rows.jsonl"), data, "train")
    assert (labels[data.train.y == 1] == 1).mean() < 0.4  # it hardly knows a one, as it cannot see left from right
