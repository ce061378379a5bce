"""What `python tests/benchmark.py speed` measures. Everything is timed in processor seconds of one thread,
the compared things in turn within one run: A B A B ... Tables give medians, and half the interquartile
range behind ±. A ratio says how many times as fast ours is.

  views      weak + strong pairs a second, against torchvision's and Pillow's per-image pipeline
  step       a step of the shipped training loop in the precision of --amp auto, against forward, backward and
             update on a ready-made batch in the same precision
  published  the same step, against a plain transcription of how the published code spends its time, in float32
  scaling    step time over batch, image side, classes, length of texts; memory over the size of the pool
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """The published pipeline, image by image: torchvision's crop and flip, Pillow's operations, ToTensor, Normalize."""

    def __init__(self, split: common.Split, preset: common.Preset) -> None:
        from PIL import Image
        from test_views import PILLOW
        from torchvision import transforms

        self.images = [Image.fromarray(x.transpose(1, 2, 0).squeeze()) for x in split.x]
        self.operations, self.size = list(PILLOW.items()), preset.size
        flip = [transforms.RandomHorizontalFlip()] if preset.flip else []
        border = {"padding": preset.pad, "padding_mode": "reflect"} if preset.pad else {}
        crop = transforms.RandomCrop(preset.size, **border)
        part = crop if preset.pad else transforms.RandomResizedCrop(preset.size)
        tail = [transforms.ToTensor(), transforms.Normalize(preset.mean, preset.std)]
        self.weak_one = transforms.Compose([crop, *flip, *tail])
        self.strong_one = transforms.Compose([part, *flip, self.rand_augment, *tail])

    def rand_augment(self, image: Any) -> Any:
        """Three operations of the fourteen, then Cutout."""
        for number in np.random.randint(len(self.operations), size=3):
            name, operation = self.operations[number]
            low, high, _ = common.RAND_AUGMENT[name]
            image = operation(image, np.random.uniform(low, high))
        side, (row, col) = np.random.uniform(0, 0.5) * self.size, np.random.uniform(0, self.size, 2)
        box = [int(max(0, at - side / 2)) for at in (col, row)] + [int(at + side / 2) for at in (col, row)]
        image.paste(common.CUTOUT_FILL if image.mode == "RGB" else 123, tuple(box))
        return image

    def weak(self, idx: Tensor) -> Tensor:
        return torch.stack([self.weak_one(self.images[i]) for i in idx.tolist()])

    def strong(self, idx: Tensor) -> Tensor:
        return torch.stack([self.strong_one(self.images[i].copy()) for i in idx.tolist()])


class Launches(TorchDispatchMode):
    """Counts the tensor operations that would start a kernel on a GPU, views of memory left out."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = ("view", "expand", "slice", "select", "split", "unbind", "permute", "transpose", "as_strided", "detach",
                "squeeze", "empty", "alias", "lift", "unfold", "flatten", "t.default")  # fmt: skip
        self.count += not any(word in str(function) for word in free)
        return function(*args, **(kwargs or {}))


def measure_views(preset: str, stored: int, pairs: int, repeats: int) -> dict[str, Any]:
    """Seconds a batch of pairs, ours and the per-image pipeline's; launches of one batch of ours.

    output: seconds to turn ready bytes into the two normalized batches, which no way of making views can save."""
    split, size = photos(max(64, pairs), stored), common.PRESETS[preset].size
    both = {
        "ours": common.Views(split, common.PRESETS[preset], CPU),
        "per image": PillowViews(split, common.PRESETS[preset]),
    }
    idx, ready = torch.arange(pairs), torch.randint(256, (pairs, 3, size, size), dtype=torch.uint8)
    functions: dict[str, Callable[[], Any]] = {n: lambda v=v: (v.weak(idx), v.strong(idx)) for n, v in both.items()}
    functions["output"] = lambda: [both["ours"].augmented(idx, lambda x, u, *_: ready[: len(x)], idx) for _ in "ws"]
    result = in_turn(functions, repeats)
    cache, common.CACHE_BYTES = common.CACHE_BYTES, 2**40  # all at once, as on a GPU
    with Launches() as mode:
        both["ours"].weak(idx), both["ours"].strong(idx)
    common.CACHE_BYTES = cache
    return result | {"launches": mode.count}


# ---------------------------------------------------------------------------- steps

VIT, TEXTS = "vit_small_patch2_32", "BERT-base, 4 + 4 + 4 texts of about 50 tokens"
CASES = {  # title, script, data set of the preset, backbone, classes, labeled examples a step, uratio
    "cnn": ("small CNN, digits, 16 + 64 + 64: ZeroMatch", zeromatch, "digits", "cnn", 10, 16, 4),
    "vit": ("ViT-S/2, 32 pixels, 4 + 4 + 4: ZeroMatch", zeromatch, "cifar100", VIT, 100, 4, 1),
    "vit, AdaMatch": ("the same: AdaMatch", adamatch, "cifar100", VIT, 100, 4, 1),
    "wrn": ("WRN-28-2, 4 + 28 + 28: FixMatch", kd_fixmatch, "cifar10", "wrn_28_2", 10, 4, 7),
    "bert": (TEXTS + ": ZeroMatch", zeromatch, "ag_news", "", 4, 4, 1),
    "bert, AdaMatch": ("the same: AdaMatch", adamatch, "ag_news", "", 4, 4, 1),
}


def make_case(name: str, folder: str) -> SimpleNamespace:
    """A student, views, and arguments of one preset, on made-up data. batch: rows of (labeled, weak, strong)."""
    _, script, dataset, backbone, K, B, uratio = CASES[name]
    if dataset == "ag_news":
        from test_text import WORDS, make_bert

        backbone = make_bert(folder, with_weights=False)
        rng, words = np.random.RandomState(0), sum(WORDS.values(), [])
        texts = [" ".join(rng.choice(words, rng.randint(35, 50))) for _ in range(64)]
        split: Any = common.TextSplit(texts, None, rng.randint(0, K, 64))
    else:
        size, channels = common.PRESETS[dataset].size, len(common.PRESETS[dataset].mean)
        split = photos(256, size, channels, K)
    preset = common.preset_of(dataset, backbone)
    args = script.Args(dataset=dataset, backbone=backbone, batch_size=B, uratio=uratio, runs_dir=folder, device="cpu")
    args = zeromatch.replace(args, **common.fill_from_preset(vars(args), preset))
    if script is adamatch:
        args.tau = 0.95  # of its variant, which `main` sets
    views = common.make_views(split, preset, backbone, CPU)
    torch.manual_seed(0)
    student = common.build_student(backbone, len(preset.mean), preset.size, K)
    if script is zeromatch:
        student.add_kd_head()
    labeled = torch.arange(2 * B)
    _, dtype = common.setup_device("cpu", "auto", backbone)
    return SimpleNamespace(
        name=name, script=script, dtype=dtype, args=args, preset=preset, views=views, split=split, K=K, folder=folder,
        student=student, labeled=labeled, y_lb=views.y[labeled], y_zs=views.y, B=B, B_u=uratio * B,
    )  # fmt: skip


def shipped_steps(case: SimpleNamespace, num_steps: int) -> None:
    """Train as the script does, with its Run, log and averaged weights; the evaluation at the end sees two examples."""
    args = zeromatch.replace(case.args, num_steps=num_steps, eval_every=10**9)
    run = common.Run(case.folder, "speed", vars(args) | {"resume": None}, CPU, case.dtype)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing here is worth a checkpoint
    few = case.views.__class__.__new__(case.views.__class__)
    few.__dict__ = case.views.__dict__ | {"y": case.views.y[:2]}  # the evaluation at the end sees two examples
    few.__class__ = type("Few", (case.views.__class__,), {"__len__": lambda self: 2})
    few.by_length = lambda: torch.arange(2)
    with contextlib.redirect_stdout(io.StringIO()):
        run.describe(common.Data("speed", list(map(str, range(case.K))), case.split, None), case.labeled.numpy(),
                     vars(args), "agreement")  # fmt: skip
        run.save = lambda *a, **k: None  # checkpoints are written every few thousand steps
        if case.script is zeromatch:
            zeromatch.train_stage2(case.student, case.labeled, case.y_lb, case.y_zs, case.views, few, None, args, run)
        elif case.script is adamatch:
            adamatch.train_adamatch(case.student, case.labeled, case.y_lb, case.views, few, args, run)
        else:
            kd_fixmatch.train_fixmatch(1, case.student, case.labeled, case.y_lb, case.views, few, args, run)
    run.metrics.close()


def ready_batch(case: SimpleNamespace) -> Tensor:
    idx_lb, idx = torch.arange(case.B), torch.arange(case.B_u)
    return common.join([case.views.weak(idx_lb), case.views.weak(idx), case.views.strong(idx)])


def make_optimizer(case: SimpleNamespace, **options: Any) -> torch.optim.Optimizer:
    """Ours; with options, torch's own with these (published code: parameter by parameter, the default on CPUs)."""
    a = case.args
    if not options:
        return common.build_optimizer(case.student, a.optimizer, a.lr * 1e-3, a.weight_decay, a.layer_decay)
    groups = common.param_groups(case.student, a.lr * 1e-3, a.weight_decay, a.layer_decay)
    if a.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    return torch.optim.AdamW(groups, **options)


def bare_steps(case: SimpleNamespace, num_steps: int) -> None:
    """Forward, backward and update on one ready-made batch of the same size: no views, thresholds, averages, logs."""
    x, optimizer = ready_batch(case), make_optimizer(case)
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
    """As the published code: views image by image, for texts three forwards of padded batches, for images one,
    gradient through the weak view throughout, float32, and an average of all weights whether it is read or not."""
    average = [p.detach().clone() for p in case.student.parameters()]
    optimizer, texts = make_optimizer(case, foreach=False), isinstance(case.split, common.TextSplit)
    views = case.views if texts else PillowViews(case.split, case.preset)
    idx_lb, idx = torch.arange(case.B), torch.arange(case.B_u)
    case.student.train()
    for _ in range(num_steps):
        parts = [views.weak(idx_lb), views.weak(idx), views.strong(idx)]
        batches = parts if texts else [torch.cat(parts)]
        outputs = [case.student(x)[:2] for x in batches]
        logits = torch.cat([out[0] for out in outputs])
        logits_lb, logits_w, logits_s = logits.split([case.B, case.B_u, case.B_u])
        probs = logits_w.detach().softmax(dim=1)
        mask = (probs.max(dim=1).values >= 0.95 * logits_lb.detach().softmax(dim=1).max(dim=1).values.mean()).float()
        loss = F.cross_entropy(logits_lb, case.y_lb[: case.B])
        loss = loss + (F.cross_entropy(logits_s, probs.argmax(dim=1), reduction="none") * mask).mean()
        if outputs[0][1] is not None:
            logits_kd = torch.cat([out[1] for out in outputs])[: case.B + case.B_u]
            loss = loss + F.cross_entropy(logits_kd, case.y_zs[: case.B + case.B_u])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for mean, p in zip(average, case.student.parameters(), strict=True):
            mean.mul_(0.999).add_(p.detach(), alpha=0.001)


def seconds_a_step(
    kinds: dict[str, Callable], case: SimpleNamespace, steps: int, repeats: int
) -> dict[str, np.ndarray]:
    """Processor seconds a step [repeats] of each kind of steps: the time of `steps` more ones after the first,
    which leaves out what a run does once."""
    runs = {}
    for name, kind in kinds.items():
        runs |= {(name, n): lambda kind=kind, n=n: kind(case, n) for n in (1, 1 + steps)}
    seconds = in_turn(runs, repeats)
    return {name: (seconds[name, 1 + steps] - seconds[name, 1]) / steps for name in kinds}


def peak_flops(dtype: torch.dtype | None, side: int = 1536) -> float:
    """Floating-point operations a second of a large matrix product on this thread, float32 or dtype."""
    a = torch.randn(side, side).to(dtype or torch.float32)
    return 2 * side**3 / np.median(in_turn({"product": lambda: a @ a}, 5)["product"])


def flops_of(function: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products, convolutions and attention, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def flops_a_step(case: SimpleNamespace) -> tuple[float, float]:
    """(as published, ours): where nothing couples the rows and nothing learns from the weak view, ours has no
    backward pass there."""
    case.student.eval()
    x = case.views.weak(torch.arange(2))
    with torch.no_grad():
        forward = flops_of(lambda: case.student(x)) / 2
    both = flops_of(lambda: sum(out.sum() for out in case.student(x)[:2] if out is not None).backward()) / 2
    published = (case.B + 2 * case.B_u) * both
    learns = case.script is zeromatch or case.student.encoder.batch_statistics
    return published, published if learns else published - case.B_u * (both - forward)


# ---------------------------------------------------------------------------- scaling

POOL = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
import common
x = np.lib.format.open_memmap(sys.argv[2], mode="r")
views = common.Views(common.Split(x, np.zeros(len(x), np.int64)), common.PRESETS["cifar10"], torch.device("cpu"))
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
views.weak(common.batch_at(len(x), 64, 0, 0))
before = resident()
for step in range(int(sys.argv[3])):
    idx = common.batch_at(len(x), 64, 0, step)
    views.weak(idx), views.strong(idx)
print(before, resident())
"""


def pool_memory(images: int, steps: int) -> tuple[float, float]:
    """Resident MiB of a process before and after `steps` batches of 64 from a memory-mapped pool of 32x32 images.

    A pool of up to 1 GiB would be held in memory; the test forces the map by a sparse file of any size."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/pool.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(images, 3, 32, 32))
        command = [sys.executable, "-c", POOL, str(Path(__file__).parent.parent), path, str(steps)]
        before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(before), float(after)


def scaled_steps(batch: int, size: int, classes: int, repeats: int = 5) -> float:
    """Milliseconds of a bare step of the small CNN."""
    student = common.build_student("cnn", 3, size, classes).train()
    optimizer = common.build_optimizer(student, "sgd", 1e-3, 0.0, 1.0)
    x, y = torch.randn(batch, 3, size, size), torch.arange(batch) % classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(student(x)[0], y).backward()
        optimizer.step()

    return 1e3 * float(np.median(in_turn({"step": step}, repeats)["step"]))


def text_steps(length: int, batch: int = 8, repeats: int = 5) -> float:
    """Milliseconds of forward and backward of a two-layer BERT of width 256."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=1024)  # fmt: skip
    model, ids = BertModel(config), torch.randint(1000, (batch, length))

    def step() -> None:
        model(input_ids=ids).last_hidden_state.mean().backward()

    return 1e3 * float(np.median(in_turn({"step": step}, repeats)["step"]))


# ---------------------------------------------------------------------------- the command

Part = Literal["views", "step", "published", "scaling"]


def table(header: str, rows: list[list[Any]]) -> None:
    print(f"\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def report_views(repeats: int) -> None:
    rows = []
    for preset, stored, pairs in (("cifar100", 32, 448), ("cifar100", 32, 48), ("flowers102", 256, 64)):
        result = measure_views(preset, stored, pairs, repeats)
        speed = {name: pairs / result[name] for name in ("ours", "per image")}
        ratio, most = (np.median(result["per image"]) / np.median(result[name]) for name in ("ours", "output"))
        size = common.PRESETS[preset].size
        rows.append([f"{size} pixels, {pairs} pairs", *(said(s, 0) for s in speed.values()), f"{ratio:.1f}",
                     f"{most:.1f}", result["launches"]])  # fmt: skip
    table("views | pairs a second, ours | per image | ratio | ratio of writing the output alone | operations a batch",
          rows)  # fmt: skip


def report_steps(other: Literal["bare", "published"], repeats: int, cases: tuple[str, ...] = tuple(CASES)) -> None:
    rows: list[list[Any]] = []
    kinds = {"ours": shipped_steps, "bare": bare_steps, "published": published_steps}
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, folder)
            few = repeats if name == "cnn" else min(repeats, 3)
            compared = {kind: kinds[kind] for kind in ("ours", other)}
            result = seconds_a_step(compared, case, 40 if name == "cnn" else 2, few)
            ours, theirs = (1e3 * result[kind] for kind in ("ours", other))
            ratio = np.median(theirs) / np.median(ours)
            last = f"{100 / ratio - 100:+.0f} %" if other == "bare" else f"{ratio:.2f}"
            precision = "float32" if case.dtype is None else "bfloat16"
            row = [CASES[name][0], precision, said(ours, 1), said(theirs, 1), last]
            at = np.median(theirs) / 1e3 / (1 if other == "bare" else 2.5)
            share = flops_a_step(case)[other == "published"] / at / peak_flops(case.dtype)
            rows.append([*row, f"{100 * share:.0f} %"])
    if other == "bare":
        peaks = [peak_flops(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)]
        print(f"\na large matrix product, Gflop a second: float32 {peaks[0]:.0f}, bfloat16 {peaks[1]:.0f}")
        table("full step | precision | ours, ms | bare, ms | on top | of a matrix product's speed, bare", rows)
    else:
        table("full step | precision | ours, ms | published way, float32, ms | ratio | of a matrix product's speed, "
              "2.5 times as fast", rows)  # fmt: skip


def report_scaling(repeats: int) -> None:
    grown = {
        "batch, small CNN, 32 pixels": {n: scaled_steps(n, 32, 10, repeats) for n in (16, 64, 256)},
        "image side, batch 64": {side: scaled_steps(64, side, 10, repeats) for side in (16, 32, 64)},
        "classes, batch 64": {k: scaled_steps(64, 32, k, repeats) for k in (10, 100, 1000)},
        "tokens, 8 texts, two layers": {n: text_steps(n, repeats=repeats) for n in (32, 128, 512)},
    }
    for what, steps in grown.items():
        table(f"{what} | ms a step", [[size, f"{ms:.1f}"] for size, ms in steps.items()])
    sizes = [(n, *pool_memory(n, 300)) for n in (10_000, 100_000, 1_000_000)]
    table("images in a memory-mapped pool | MiB resident at first | after 300 batches of 64",
          [[f"{n:,}", f"{before:.0f}", f"{after:.0f}"] for n, before, after in sizes])  # fmt: skip


def report_flops() -> None:
    rows = []
    for name, (title, *_) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append([title, *(f"{flops / 1e9:.2f}" for flops in flops_a_step(make_case(name, folder)))])
    table("Gflop a step | as published | ours", rows)


def speed(only: Part | None = None, flops: bool = False, repeats: int = 7) -> None:
    """Time views, steps and how they grow, each against its reference, on one thread.

    Args:
        only: One part alone.
        flops: Floating-point operations a step instead, which no machine changes.
        repeats: Rounds of what is compared; large models take three.
    """
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": repeats}))
    if flops:
        report_flops()
        return
    if only in (None, "views"):
        report_views(repeats)
    if only in (None, "step"):
        report_steps("bare", repeats)
    if only in (None, "published"):
        report_steps("published", repeats)
    if only in (None, "scaling"):
        report_scaling(repeats)
