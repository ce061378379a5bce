"""The benchmark's arithmetic: equal budgets, paired differences, curves over all stages."""

import io
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import benchmark as b
import numpy as np
import pytest


@pytest.mark.parametrize("kind, spent", [
    ("one stage", lambda steps: steps["num_steps"]),
    ("halves", lambda steps: 2 * steps["num_steps"]),
    ("stage 1 alone", lambda steps: steps["num_steps_stage1"]),
    ("two stages", lambda steps: steps["num_steps_stage1"] + steps["num_steps"]),
    ("stage 2 alone", lambda steps: steps["num_steps"]),
])  # fmt: skip
def test_every_row_has_the_same_number_of_updates(kind, spent):
    assert spent(b.steps_of(kind, stage1=400, stage2=800)) == 1200
    assert kind in {row[2] for row in b.ALL.values()}


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
    rows = b.ALL
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
    views = b.common.Views(data.test, b.common.PRESETS["digits"], "cnn", b.torch.device("cpu"))
    answers = b.common.predict(student, views)[0].argmax(dim=1).numpy()
    recalls = np.array([(answers == k)[data.test.y == k].mean() for k in range(10)])
    high, low = recalls.argmax(), recalls.argmin()
    assert recalls[high] > recalls[low] + 0.05  # else the weights would not show
    pool = b.common.Split(data.test.x[:4], np.array([high, high, high, low]))
    expected = 100 * (0.75 * recalls[high] + 0.25 * recalls[low])
    found = b.accuracy_as_in(pool, data.test, folder / "student", "digits")
    assert found == pytest.approx(expected)


# ---- the README's table, from summaries of finished runs

KEPT = json.loads(b.RESULTS.read_text())


def test_the_readme_shows_the_table_of_the_kept_runs():
    readme = (b.RESULTS.parent.parent / "README.md").read_text()
    shown = re.findall(r"<!-- results -->\n(.*?)\n<!-- end -->", readme, flags=re.S)
    assert shown in ([], [b.readme_table(KEPT)])  # [] until the README has the two marks


def test_the_tables_of_results_are_those_of_the_kept_runs(capsys):
    written = (b.RESULTS.parent / "RESULTS.md").read_text()
    b.tables()
    printed = capsys.readouterr().out
    assert b.readme_table(KEPT) in printed
    for cell in KEPT["cells"]:
        assert b.cell_table(KEPT, cell) in written, f"print it with: benchmark.py tables ({cell})"
    for table_of in (b.ablation_table, b.teachers_table, b.ideas_table, b.pays_table):
        table = table_of(KEPT)
        assert table in printed and table in written, table_of.__name__


def test_the_kept_runs_are_compact_and_complete():
    text = b.RESULTS.read_text()
    assert len(text.encode()) <= 200_000 and not re.search(r"/(tmp|home|work)\b", text)
    for name, settings in KEPT["cells"].items():
        assert settings == b.settings_of(name)
    known = {(r["cell"], r["row"], r["seed"]) for r in KEPT["runs"]}
    assert len(known) == len(KEPT["runs"])  # none twice
    for run in KEPT["runs"]:
        assert run["cell"] in KEPT["cells"] and run["row"] in b.TITLES
        assert 0 < run["test_acc"] < 100 and run["seconds"] > 0 and len(run["commit"]) == 7


def kept_of(accs):
    runs = [
        {"cell": "digits, 10", "row": row, "seed": seed, "test_acc": acc, "seconds": 9.0}
        for row, values in accs.items() for seed, acc in enumerate(values)
    ]  # fmt: skip
    runs[-1]["teacher_acc"] = 60.0
    blocks = {"cells": {"digits, 10": b.settings_of("digits, 10")}, "shown": ["digits, 10"]}
    return blocks | {"runs": runs, "pays": {}, "labels": {}}


def test_tables_of_kept_runs_pair_by_seed():
    kept = kept_of({"AdaMatch": [80.0, 84.0], "ZeroMatch": [81.0, 87.0, 90.0]})
    lines = b.cell_table(kept, "digits, 10").splitlines()
    # differences -1 and -3: mean -2, standard error 1, Student's quantile 12.7
    assert lines[2] == "| teacher alone | | 60.0 | | |"
    assert lines[3] == "| AdaMatch (usb) | 2 | 82.0 ± 2.8 | -2.0 (-14.7 to +10.7) | 9 |"
    assert lines[4] == "| ZeroMatch | 3 | 86.0 ± 4.6 | | 9 |"
    row = b.readme_table(kept).splitlines()[-1]
    assert row == "| digits, 10 (2 to 3) | 60.0 | | 82.0 ± 2.8 | | 86.0 ± 4.6 | |"


def test_signs_of_ablations_agree_disagree_or_stay_open():
    kept = kept_of({
        "ZeroMatch": [80.0, 90.0], "no warm-up": [70.0, 79.9], "lambda_p 0": [85.0, 95.1],
        "no annealing": [80.0, 91.0], "AdaMatch": [75.0],
    })  # fmt: skip
    lines = b.ablation_table(kept).splitlines()
    assert lines[0] == "| minus ZeroMatch | paper | digits, 10 labels (n) | agree |"
    assert lines[2] == "| no warm-up | below 0 | -10.0 (-10.7 to -9.4) (2) | yes |"
    assert [line.split(" | ")[-1] for line in lines[3:5]] == ["no |", "open |"]
    assert lines[6] == "| AdaMatch (usb) | -16.6 | -5.0 (1) | open |"
    assert "no warm-up" not in b.cell_table(kept, "digits, 10")


def test_gains_of_ideas_pair_by_seed_and_average_over_cells():
    kept = kept_of({"ZeroMatch": [80.0, 90.0], b.AGREEMENT: [81.0], b.BY_MASK: [83.0, 91.0]})
    kept["runs"][2]["both_heads"] = 81.5  # agreement
    lines = b.ideas_table(kept).splitlines()
    assert lines[2] == "| digits, 10 labels | +1.0 (1) | +2.0 (2) | +2.0 (1) |  | +0.5 (1) |  |  |"
    assert lines[3] == "| mean of a column | +1.0 | +2.0 | +2.0 |  | +0.5 |  |  |"


def test_groups_of_cells_by_what_the_teacher_leads_by():
    rows = ("teacher", "AdaMatch", "ZeroMatch", b.AGREEMENT)
    points = {"a": (60.0, 90.0, 89.0, 91.0), "b": (70.0, 71.0, 73.0, 70.0)}
    pays = {name: dict(zip(rows, values, strict=True)) for name, values in points.items()}
    lines = b.pays_table({"pays": pays, "cells": {}, "runs": []}).splitlines()
    ends = ["-1.0 (-1.0 to -1.0) | 0 | +1.0 (+1.0 to +1.0) | 1 |"]
    ends += ["+2.0 (+2.0 to +2.0) | 1 | -1.0 (-1.0 to -1.0) | 0 |"]
    assert lines[2:] == [f"| -30 to -30 | 1 | {ends[0]}", f"| -1 to -1 | 1 | {ends[1]}"]


def test_a_table_of_teachers_shows_what_zeromatch_gains_over_adamatch():
    kept = kept_of({"AdaMatch": [80.0, 84.0], "ZeroMatch": [81.0, 87.0]})
    for run in kept["runs"]:
        run["cell"] = "AG News, 40"
    kept["cells"] = {"AG News, 40": b.settings_of("AG News, 40")}
    row = b.teachers_table(kept).splitlines()[2]
    expected = "| classes described | 60.0 | 82.0 ± 2.8 (2) |  | 84.0 ± 4.2 (2) | "
    assert row.startswith(f"{expected}+2.0 (-10.7 to +14.7) |")


def test_a_kept_run_is_not_repeated_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    started, file = [], tmp_path / "results.json"

    def finished(path, rows, seeds, shared, *steps):
        started.extend((row, seeds[0]) for row in rows)
        return [made(row, seeds[0], 90.123, stage1_acc=None) for row in rows]

    def run(*rows):
        b.real("", ("digits, 40",), (0, 1), rows, str(tmp_path), str(tmp_path), str(file))

    monkeypatch.setattr(b, "finished_runs", finished)
    run("AdaMatch")
    run("AdaMatch", "ZeroMatch")
    assert started == [("AdaMatch", 0), ("AdaMatch", 1), ("ZeroMatch", 0), ("ZeroMatch", 1)]
    assert "| ZeroMatch | 2 | 90.1 ± 0.0 |" in capsys.readouterr().out
    kept = json.loads(file.read_text())
    assert kept["runs"][0]["test_acc"] == 90.12 and "metrics" not in kept["runs"][0]
    monkeypatch.setitem(b.CELLS, "digits, 40", b.CELLS["digits, 40"]._replace(stage1=9))
    with pytest.raises(SystemExit, match="other settings"):
        run("AdaMatch")


def test_pictures_and_labels_are_read_from_the_folder(tmp_path):
    rng, arrays = np.random.RandomState(0), {"classes": np.array(["ant", "bee"])}
    for part, n in (("train", 3), ("test", 2)):
        files = []
        for _ in range(n):
            file = io.BytesIO()
            b.Image.fromarray(rng.randint(0, 256, (32, 32, 3), np.uint8)).save(file, "jpeg")
            files.append(file.getvalue())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_y"] = np.arange(n) % 2
    np.savez(tmp_path / "cifar10_24k_jpeg.npz", **arrays)
    probs = {"train_p": np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), "test_p": np.eye(2)}
    np.savez(tmp_path / "cifar10_teacher.npz", **probs)
    data = b.cifar10_of(str(tmp_path))
    assert data.train.x.shape == (3, 3, 32, 32) and data.test.y.tolist() == [0, 1]
    last = b.Image.open(io.BytesIO(files[-1]))
    assert np.array_equal(data.test.x[1].transpose(1, 2, 0), np.array(last))
    train, _ = b.cifar10_labels(str(tmp_path), str(tmp_path))
    assert b.pseudolabel.read_labels(train, data, "train")[0].tolist() == [0, 1, 1]


def test_short_texts_and_their_labels_are_made_once(tmp_path, monkeypatch):
    made = []

    def make(data_dir):
        made.append("texts")
        file = Path(data_dir) / "fortunes" / "test.csv"
        file.parent.mkdir()
        file.write_text("text,label\n")

    def label(args):
        made.append(args.split)
        Path(args.output).write_text("")

    monkeypatch.setattr(b, "fortunes", make)
    monkeypatch.setattr(b.pseudolabel, "main", label)
    (tmp_path / "labels").mkdir()
    for _ in range(2):
        shared = b.shared_of(b.CELLS["short texts, 40"], "", str(tmp_path))
    assert made == ["texts", "train", "test"]
    assert shared["dataset"] == f"{tmp_path}/fortunes/fortunes.csv" and shared["lr"] == 1e-4
    assert shared["pseudolabels_test"] == f"{tmp_path}/labels/fortunes-test-embedding.jsonl"


def test_labels_at_the_ends_of_lines_do_not_touch():
    assert b.apart([1.0, 9.0, 5.0], 1.0) == [1.0, 9.0, 5.0]
    assert b.apart([5.0, 5.0], 2.0) == [4.0, 6.0]


def test_the_picture_of_when_it_pays_has_a_point_a_cell(tmp_path):
    accs = {"AdaMatch": [80.0, 0.0], "ZeroMatch": [81.0, 9.0], b.AGREEMENT: [82.0]}
    points = b.pays_points(kept_of(accs) | {"pays": {"old": {"teacher": 50.0}}})
    assert points["old"] == {"teacher": 50.0}
    assert points["digits, 10"] == {"teacher": 60.0} | {row: accs[row][0] for row in accs}
    pytest.importorskip("matplotlib")
    b.pays(plot=str(tmp_path / "pays.svg"))
    assert (tmp_path / "pays.svg").read_text().count("<svg") == 1
