"""The benchmark's arithmetic: equal budgets, paired differences, curves over all stages."""

import re
from concurrent.futures import Future

import benchmark as b
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


def test_finished_runs_are_kept_and_those_of_another_teacher_apart(tmp_path, monkeypatch):
    started = []

    def run_row(row, seed, *rest):
        started.append((row, seed))
        return made(row, seed, 90.0 + seed)

    class Here:  # a pool without processes, which would not see the function above
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


def test_teachers_are_weak_and_strong_and_write_readable_labels(tmp_path, capsys):
    b.teachers("digits", data_dir=str(tmp_path))
    right = dict(re.findall(r"digits-test-(\w+)\.jsonl: ([\d.]+) %", capsys.readouterr().out))
    assert 55 < float(right["rows"]) < 75 and float(right["svm"]) > 97
    data = b.common.load_data("digits", str(tmp_path))
    labels, _ = b.pseudolabel.read_labels(str(tmp_path / "labels" / "digits-train-rows.jsonl"), data, "train")
    assert (labels[data.train.y == 1] == 1).mean() < 0.4  # it hardly knows a one, as it cannot see left from right
