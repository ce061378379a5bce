"""The benchmark's arithmetic: equal budgets, paired differences, curves over all stages."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import benchmark as b
import numpy as np
import pytest


@pytest.mark.parametrize("kind, spent", [
    ("one stage", lambda steps: steps["num_steps"]),
    ("halves", lambda steps: 2 * steps["num_steps"]),
    ("stage 1 alone", lambda steps: steps["num_steps_stage1"]),
    ("two stages", lambda steps: steps["num_steps_stage1"] + steps["num_steps"]),
])  # fmt: skip
def test_every_row_has_the_same_number_of_updates(kind, spent):
    assert spent(b.steps_of(kind, stage1=400, stage2=800)) == 1200
    assert kind in {row[2] for row in b.ROWS.values()}


def made(row, seed, acc, **more):
    run = {"row": row, "seed": seed, "test_acc": acc, "test_acc_median20": acc - 1}
    return run | {"seconds": 10.0} | more


def test_table_pairs_runs_by_seed():
    runs = [made("ZeroMatch", 0, 90.0), made("ZeroMatch", 1, 80.0)]
    runs += [made("AdaMatch", 1, 83.0), made("AdaMatch", 0, 91.0)]
    lines = b.table(runs, zero_shot=60.0).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines}
    assert "| 87.0 ± 5.7 | +2.0 ± 1.4 | 86.0 | 10 |" in rows["AdaMatch"]  # differences 1 and 3
    assert "| 85.0 ± 7.1 |  | 84.0 | 10 |" in rows["ZeroMatch"]
    assert "60.0" in rows["zero-shot (the teacher itself)"]


def test_table_shows_the_outer_network_and_the_trusted_set():
    trusted = {"all": [100, 70.0], "confident": [60, 80.0], "trusted": [50, 90.0]}
    own = [{"outer_acc": 80.0 + seed, "trusted": trusted} for seed in (0, 2)]
    runs = [made("KD-FixMatch (CE)", seed, 85.0, **own[seed // 2]) for seed in (0, 2)]
    text = b.table(runs, None)
    own[0]["trusted"] = {name: [0, None] for name in trusted}  # nothing was trusted
    assert "nan % right" in b.table([made("KD-FixMatch (CE)", 0, 85.0, **own[0])], None)
    assert "| 81.0 ± 1.4 |" in text
    assert "confident 60 (80.0 % right), trusted 50 (90.0 % right)" in text


def test_curves_add_the_steps_of_earlier_stages_and_leave_out_clustering():
    points = b.continuous([
        {"stage": 1, "step": 10, "test/acc": 50.0}, {"stage": 1, "step": 20, "test/acc": 60.0},
        {"stage": 2, "step": 200, "train/agree": 0.9}, {"stage": 3, "step": 5, "test/acc": 55.0},
    ], "test/acc")  # fmt: skip
    assert points[:2] + points[3:] == [(10, 50.0), (20, 60.0), (25, 55.0)]
    assert len(points) == 4 and math.isnan(points[2][1])  # a gap between the networks


def test_finished_runs_are_kept_and_those_of_another_teacher_apart(tmp_path, monkeypatch):
    started, both = [], ("AdaMatch", "ZeroMatch")

    def run_row(row, seed, *rest):
        started.append((row, seed))
        return made(row, seed, 90.0 + seed)

    def finished(file, rows, seeds, num_steps=None):
        return b.finished_runs(tmp_path / file, rows, seeds, {"dataset": "digits"}, num_steps, 1)

    monkeypatch.setattr(b, "run_row", run_row)
    monkeypatch.setattr(b, "ProcessPoolExecutor", ThreadPoolExecutor)
    finished("a.json", both, (0, 1))
    runs = finished("a.json", both, (0, 1, 2))
    assert started == [(row, seed) for seed in (0, 1, 2) for row in both]  # none twice
    assert b.accuracies(runs)["AdaMatch"] == {0: 90.0, 1: 91.0, 2: 92.0}
    assert len(finished("b.json", both[:1], (0,))) == 1 and len(started) == 7
    finished("a.json", both[:1], (0,), 700)
    assert len(started) == 8  # with other numbers of steps it is another run
    rows = b.ROWS | b.EXTENSIONS
    folders = {b.run_folder(tmp_path / "a.json", row, seed) for row in rows for seed in (0, 1)}
    assert len(folders) == 2 * len(rows)


def test_intervals_are_those_of_students_t():
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), quantile 4.303 with two degrees of freedom
    assert b.with_interval(np.array([1.0, 2.0, 3.0])) == "+2.0 (-0.5 to +4.5)"


def test_the_table_of_extensions_pairs_by_seed_and_averages_over_cells(
    tmp_path, monkeypatch, capsys
):
    def run_row(row, seed, shared, *rest):
        gain = 3.0 if shared["num_labels"] == 10 else 1.0
        accs = {"AdaMatch": 70.0, "ZeroMatch": 80.0 + seed, b.AGREEMENT: 80.0 + seed + gain}
        return made(row, seed, accs[row], teacher_acc=60.0, stage1_acc=65.0)

    monkeypatch.setattr(b, "run_row", run_row)
    monkeypatch.setattr(b, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(b, "label_files", lambda *given: None)
    b.extensions(("digits",), (0, 1), str(tmp_path), str(tmp_path), jobs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    means = "60.0 | 65.0 | 70.0 | 80.5"
    assert len(lines) == 1 + 6 + 1
    assert lines[1] == f"| digits, 10 labels | glyphs | {means} | 83.5 | +3.0 (+3.0 to +3.0) |"
    assert lines[-1] == f"| mean |  | {means} | 82.5 | +2.0 (+2.0 to +2.0) |"


def test_a_thinned_pool_falls_geometrically_and_keeps_the_test_part(tmp_path):
    data = b.common.load_data("digits", str(tmp_path))
    thin = b.thinned(data, 8.0)
    share = np.sort(np.bincount(thin.train.y) / np.bincount(data.train.y))
    assert share == pytest.approx(8.0 ** -np.linspace(1, 0, 10), abs=0.01)
    assert thin.test is data.test and b.thinned(data, 1) is data
    kept = b.kept_when_thinned(data.train.y, 8.0)
    assert np.array_equal(thin.train.x, data.train.x[kept]) and len(set(kept)) == len(thin.train)


def test_teachers_are_weak_and_strong_and_a_thinned_pool_trains_with_their_labels(tmp_path, capsys):
    b.teachers("digits", data_dir=str(tmp_path))
    said = re.findall(r"digits-test-(\w+)\.jsonl: ([\d.]+) %", capsys.readouterr().out)
    assert 55 < float(dict(said)["rows"]) < 75 and float(dict(said)["svm"]) > 97
    labels = f"{tmp_path}/labels/digits-{{}}-svm.jsonl".format
    data = b.common.load_data("digits", "")
    rows, _ = b.pseudolabel.read_labels(labels("train").replace("svm", "rows"), data, "train")
    assert (rows[data.train.y == 1] == 1).mean() < 0.4  # it cannot see left from right

    files = b.thin_files(data, 8.0, labels, str(tmp_path / "shares.json"))
    thin = b.thinned(data, 8.0)
    y_zs, _ = b.pseudolabel.read_labels(files["pseudolabels"], thin, "train")
    assert (y_zs == thin.train.y).mean() > 0.95
    true = b.zeromatch.prior_from_file(files["shares"], data.classes).numpy()
    assert true == pytest.approx(np.bincount(thin.train.y) / len(thin.train))
    shared = {"dataset": "digits", "num_labels": 10, "data_dir": str(tmp_path), "eval_every": 30}
    shared |= files | {"imbalance": 8.0}
    run = b.run_row(b.PRIOR_FILE, 0, shared, 10, 30, str(tmp_path / "r"))
    (folder,) = (tmp_path / "r").glob("*")
    assert json.loads((folder / "args.json").read_text())["prior"] == files["shares"]
    assert 0 < run["test_acc"] < 100 and 0 < run["pool_acc"] < 100
    # in a pool of three examples of one class and one of another, the one's recall weighs thrice
    student, _ = b.common.load_student(folder / "student")
    views = b.common.Views(data.test, b.common.PRESETS["digits"], b.torch.device("cpu"))
    answers = b.common.predict(student, views).argmax(dim=1).numpy()
    recalls = np.array([(answers == k)[data.test.y == k].mean() for k in range(10)])
    high, low = recalls.argmax(), recalls.argmin()
    assert recalls[high] > recalls[low] + 0.05  # else the weights would not show
    pool = b.common.Split(data.test.x[:4], np.array([high, high, high, low]))
    expected = 100 * (0.75 * recalls[high] + 0.25 * recalls[low])
    found = b.accuracy_as_in(pool, data.test, folder / "student", "digits")
    assert found == pytest.approx(expected)
