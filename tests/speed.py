"""What `python tests/benchmark.py speed` measures, in processor seconds of one thread, the compared
things in turn within one run: A B A B ... Tables give medians, and half the interquartile range
behind ±. A ratio says how many times as fast ours is.

  views      weak + strong pairs a second, against torchvision's and Pillow's per-image pipeline
  step       a step of the shipped training loop in the precision of --amp auto, against forward,
             backward and update on a ready-made batch in the same precision
  published  the same step, against a plain transcription of the published code, in float32
  pool       memory over the steps, on memory-mapped pools of several sizes
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import adamatch
import common
import kd_fixmatch
import zeromatch

CPU = torch.device("cpu")


def in_turn(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Processor seconds [repeats] of each function, called in turn after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def said(values: np.ndarray, digits: int = 2) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


# ---------------------------------------------------------------------------- views


def photos(n: int, size: int, channels: int = 3, classes: int = 10) -> common.Split:
    """n made-up pictures: coarse color fields, which resemble photographs more than noise does."""
    rng = np.random.RandomState(0)
    coarse = torch.from_numpy(rng.randint(0, 256, (n, channels, 5, 5)).astype(np.uint8))
    x = F.interpolate(coarse, (size, size), mode="bilinear").numpy()
    return common.Split(x, rng.randint(0, classes, n))


class PillowViews:
    """The published pipeline, image by image: torchvision's crop and flip, Pillow's operations."""

    def __init__(self, split: common.Split, preset: common.Preset) -> None:
        from PIL import Image
        from test_views import PILLOW
        from torchvision import transforms as t

        self.images = [Image.fromarray(x.transpose(1, 2, 0).squeeze()) for x in split.x]
        self.operations, self.size = list(PILLOW.items()), preset.size
        flip = [t.RandomHorizontalFlip()] if preset.flip else []
        border = {"padding": preset.pad, "padding_mode": "reflect"} if preset.pad else {}
        crop = t.RandomCrop(preset.size, **border)
        part = crop if preset.pad else t.RandomResizedCrop(preset.size)
        tail = [t.ToTensor(), t.Normalize(preset.mean, preset.std)]
        self.weak_one = t.Compose([crop, *flip, *tail])
        self.strong_one = t.Compose([part, *flip, self.rand_augment, *tail])

    def rand_augment(self, image: Any) -> Any:
        """Three operations of the fourteen, then Cutout."""
        for number in np.random.randint(len(self.operations), size=3):
            name, operation = self.operations[number]
            low, high, _ = common.RAND_AUGMENT[name]
            image = operation(image, np.random.uniform(low, high))
        half, center = np.random.uniform(0, 0.25) * self.size, np.random.uniform(0, self.size, 2)
        box = [*(max(0, int(at - half)) for at in center), *(int(at + half) for at in center)]
        image.paste(common.CUTOUT_FILL if image.mode == "RGB" else 123, tuple(box))
        return image

    def weak(self, idx: Tensor) -> Tensor:
        return torch.stack([self.weak_one(self.images[i]) for i in idx.tolist()])

    def strong(self, idx: Tensor) -> Tensor:
        return torch.stack([self.strong_one(self.images[i].copy()) for i in idx.tolist()])


def measure_views(preset: str, stored: int, pairs: int, repeats: int) -> dict[str, Any]:
    """Seconds a batch of pairs, ours and the per-image pipeline's.

    output: seconds to turn ready bytes into the two normalized batches, which nothing can save."""
    split, recipe = photos(max(64, pairs), stored), common.PRESETS[preset]
    ours, theirs = common.Views(split, recipe, "cnn", CPU), PillowViews(split, recipe)
    idx = torch.arange(pairs)
    ready = torch.randint(256, (pairs, 3, recipe.size, recipe.size), dtype=torch.uint8)
    return in_turn({
        "ours": lambda: (ours.weak(idx), ours.strong(idx)),
        "per image": lambda: (theirs.weak(idx), theirs.strong(idx)),
        "output": lambda: [ours.normalized(ready) for _ in "ws"],
    }, repeats)  # fmt: skip


# ---------------------------------------------------------------------------- steps

VIT, TEXTS = "vit_small_patch2_32", "BERT-base, 4 + 4 + 4 texts of about 50 tokens"
CASES = {  # title, script, data set of the preset, backbone, classes, B, uratio
    "cnn": ("small CNN, digits, 16 + 64 + 64: ZeroMatch", zeromatch, "digits", "cnn", 10, 16, 4),
    "vit": ("ViT-S/2, 32 pixels, 4 + 4 + 4: ZeroMatch", zeromatch, "cifar100", VIT, 100, 4, 1),
    "vit, AdaMatch": ("the same: AdaMatch", adamatch, "cifar100", VIT, 100, 4, 1),
    "wrn": ("WRN-28-2, 4 + 28 + 28: FixMatch", kd_fixmatch, "cifar10", "wrn_28_2", 10, 4, 7),
    "bert": (TEXTS + ": ZeroMatch", zeromatch, "ag_news", "", 4, 4, 1),
    "bert, AdaMatch": ("the same: AdaMatch", adamatch, "ag_news", "", 4, 4, 1),
}


def make_case(name: str, folder: str) -> SimpleNamespace:
    """Student, views, and arguments of one preset, on made-up data. few: views of two examples."""
    _, script, dataset, backbone, K, B, uratio = CASES[name]
    if dataset == "ag_news":
        from tiny_models import tokenizer
        from transformers import BertConfig

        backbone, rng = folder, np.random.RandomState(0)
        BertConfig(vocab_size=len(tokenizer(folder, "ends")[0])).save_pretrained(folder)
        texts = ["x" * rng.randint(40, 60) for _ in range(64)]  # a token a letter
        split = common.Split(np.array(texts, object), rng.randint(0, K, 64))
    else:
        preset = common.PRESETS[dataset]
        split = photos(256, preset.size, len(preset.mean), K)
    preset = common.preset_of(dataset, backbone)
    given = {"dataset": dataset, "backbone": backbone, "batch_size": B, "uratio": uratio}
    given |= {"tau": 0.95} if script is adamatch else {}  # of its variant, which `main` sets
    args = script.Args(runs_dir=folder, **given)
    args = replace(args, **common.resolve(vars(args), preset))
    parts = (split, split.take(np.arange(2)))
    views, few = (common.make_views(part, preset, backbone, CPU) for part in parts)
    torch.manual_seed(0)
    student = common.build_student(backbone, preset, K)
    if script is zeromatch:
        student.add_kd_head()
    _, dtype = common.setup_device("cpu", "auto", backbone)
    return SimpleNamespace(
        script=script, dtype=dtype, args=args, preset=preset, views=views, few=few, split=split,
        K=K, student=student, y=views.y, B=B, B_u=uratio * B,
    )  # fmt: skip


def shipped_steps(case: SimpleNamespace, num_steps: int) -> None:
    """Train as the script does, with its Run, log and averages; evaluated at the end on few."""
    args = replace(case.args, num_steps=num_steps, eval_every=10**9)
    run, labeled = common.Run("speed", vars(args), CPU, case.dtype), torch.arange(2 * case.B)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing here is worth a checkpoint
    data = common.Data("speed", list(map(str, range(case.K))), case.split, None)
    run.save = lambda *given, **parts: None  # checkpoints are written every few thousand steps
    first, rest = (case.student, labeled, case.y[labeled]), (case.views, case.few)
    with contextlib.redirect_stdout(io.StringIO()):
        run.describe(data, labeled.numpy())
        if case.script is zeromatch:
            zeromatch.train_stage2(*first, case.y, *rest, None, args, run)
        elif case.script is adamatch:
            adamatch.train_adamatch(*first, *rest, args, run)
        else:
            kd_fixmatch.train_fixmatch(1, *first, *rest, args, run)
    run.metrics.close()


def parts_of(case: SimpleNamespace, views: Any) -> list[Tensor]:
    """A step's batches: labeled, unlabeled weak, unlabeled strong."""
    idx = torch.arange(case.B_u)
    return [views.weak(torch.arange(case.B)), views.weak(idx), views.strong(idx)]


def optimizer_of(case: SimpleNamespace, **options: Any) -> torch.optim.Optimizer:
    """Ours; with options, torch's own with these."""
    a, lr = case.args, case.args.lr * 1e-3
    if not options:
        return common.optimizer_of(case.student, a.optimizer, lr, a.weight_decay, a.layer_decay)
    optimizer = common.optimizer_of(case.student, "sgd", lr, a.weight_decay, a.layer_decay)
    groups = optimizer.param_groups
    if a.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    return torch.optim.AdamW(groups, **options)


def bare_steps(case: SimpleNamespace, num_steps: int) -> None:
    """Forward, backward and update on one ready-made batch: no views, threshold, averages, logs."""
    x, optimizer = common.join(parts_of(case, case.views)), optimizer_of(case)
    y = torch.arange(len(x)) % case.K
    case.student.train()
    for _ in range(num_steps):
        with torch.autocast("cpu", case.dtype, enabled=case.dtype is not None):
            logits, logits_kd, _ = case.student(x)
        loss = F.cross_entropy(logits.float(), y)
        if logits_kd is not None:
            loss = loss + F.cross_entropy(logits_kd.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def published_steps(case: SimpleNamespace, num_steps: int) -> None:
    """As the published code: views image by image, for texts three forwards of padded batches, for
    images one, gradient through the weak view throughout, float32, an update parameter by
    parameter, and an average of all weights whether it is read or not."""
    average = [p.detach().clone() for p in case.student.parameters()]
    optimizer, texts = optimizer_of(case, foreach=False), case.split.is_text
    views, B = case.views if texts else PillowViews(case.split, case.preset), case.B
    case.student.train()
    for _ in range(num_steps):
        parts = parts_of(case, views)
        outputs = [case.student(x)[:2] for x in (parts if texts else [torch.cat(parts)])]
        logits = torch.cat([out[0] for out in outputs])
        logits_lb, logits_w, logits_s = logits.split([B, case.B_u, case.B_u])
        sure_lb = logits_lb.detach().softmax(dim=1).max(dim=1).values.mean()
        sure, label = logits_w.detach().softmax(dim=1).max(dim=1)
        mask = (sure >= 0.95 * sure_lb).float()
        loss = F.cross_entropy(logits_lb, case.y[:B])
        loss = loss + (F.cross_entropy(logits_s, label, reduction="none") * mask).mean()
        if outputs[0][1] is not None:
            logits_kd = torch.cat([out[1] for out in outputs])[: B + case.B_u]
            loss = loss + F.cross_entropy(logits_kd, case.y[: B + case.B_u])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for mean, p in zip(average, case.student.parameters(), strict=True):
            mean.mul_(0.999).add_(p.detach(), alpha=0.001)


KINDS = {"ours": shipped_steps, "bare": bare_steps, "published": published_steps}


def seconds_a_step(
    kinds: dict[str, Callable], case: SimpleNamespace, steps: int, repeats: int
) -> dict[str, np.ndarray]:
    """Processor seconds a step [repeats] of each kind: of `steps` more ones after the first, which
    leaves out what a run does once."""
    runs = {}
    for name, kind in kinds.items():
        runs |= {(name, n): lambda kind=kind, n=n: kind(case, n) for n in (1, 1 + steps)}
    seconds = in_turn(runs, repeats)
    return {name: (seconds[name, 1 + steps] - seconds[name, 1]) / steps for name in kinds}


# ---------------------------------------------------------------------------- pool

POOL = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
import common
x = np.memmap(sys.argv[2], np.uint8, "r").reshape(-1, 3, 32, 32)
split = common.Split(x, np.zeros(len(x), np.int64))
views = common.Views(split, common.PRESETS["cifar10"], "cnn", torch.device("cpu"))
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
for step in range(int(sys.argv[3]) + 5):
    idx = common.batch_at(len(x), 64, 0, "stage 1", step)
    views.weak(idx), views.strong(idx)
    before = resident() if step < 5 else before  # the first steps load what they need
print(before, resident())
"""


def pool_memory(images: int, steps: int) -> tuple[float, float]:
    """Resident MiB of a process before and after `steps` batches of 64 from a memory-mapped pool of
    32x32 images, without the pages of the file, which the system takes back when it needs them.

    A pool of up to 1 GiB would be held in memory; a sparse file may have any size."""
    with tempfile.TemporaryDirectory() as folder:
        path, root = f"{folder}/pool.raw", str(Path(__file__).parent.parent)
        np.memmap(path, np.uint8, "w+", shape=(images, 3, 32, 32))
        command = [sys.executable, "-c", POOL, root, path, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    return before, after


# ---------------------------------------------------------------------------- the command


def table(header: str, rows: list[list[Any]]) -> None:
    print(f"\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def report_views(repeats: int) -> None:
    rows = []
    cases = (("cifar100", 32, 448), ("cifar100", 32, 48), ("flowers102", 256, 64))
    for preset, stored, pairs in cases:
        result = measure_views(preset, stored, pairs, repeats)
        rates = [said(pairs / result[name], 0) for name in ("ours", "per image")]
        theirs = np.median(result["per image"])
        ratios = [f"{theirs / np.median(result[name]):.1f}" for name in ("ours", "output")]
        title = f"{common.PRESETS[preset].size} pixels, {pairs} pairs"
        rows.append([title, *rates, *ratios])
    table("views | pairs a second, ours | per image | ratio | of writing the output alone", rows)


def report_steps(other: Literal["bare", "published"], repeats: int) -> None:
    rows, bare = [], other == "bare"
    for name, (title, *_) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, folder)
            steps, rounds = (40, repeats) if name == "cnn" else (2, min(repeats, 3))
            compared = {kind: KINDS[kind] for kind in ("ours", other)}
            result = seconds_a_step(compared, case, steps, rounds)
        ours, theirs = (1e3 * result[kind] for kind in ("ours", other))
        ratio = np.median(theirs) / np.median(ours)
        last = f"{100 / ratio - 100:+.0f} %" if bare else f"{ratio:.2f}"
        precision = "float32" if case.dtype is None else "bfloat16"
        rows.append([title, precision, said(ours, 1), said(theirs, 1), last])
    theirs = "bare, ms | on top" if bare else "published way, float32, ms | ratio"
    table(f"full step | precision | ours, ms | {theirs}", rows)


def report_pool(repeats: int) -> None:
    rows = [[f"{n:,}", *map(round, pool_memory(n, 300))] for n in (400_000, 1_000_000, 4_000_000)]
    table("images in a memory-mapped pool | MiB at first | after 300 batches of 64", rows)


def speed(
    only: Literal["views", "step", "published", "pool"] | None = None, repeats: int = 7
) -> None:
    """Time views and steps, each against its reference, on one thread; measure memory.

    Args:
        only: One part alone.
        repeats: Rounds of what is compared; large models take three.
    """
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "threads": 1, "repeats": repeats}))
    parts = {
        "views": report_views,
        "step": lambda repeats: report_steps("bare", repeats),
        "published": lambda repeats: report_steps("published", repeats),
        "pool": report_pool,
    }
    for part in parts if only is None else [only]:
        parts[part](repeats)
