"""What only a GPU can show. Skipped where there is none; see tests/RESULTS.md for where it ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import digits_labels, only_run
from torch.nn import functional as F

import adamatch
import common
import zeromatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ROOT, GPU, CPU = Path(__file__).parents[1], torch.device("cuda"), torch.device("cpu")
SHORT = {"num_steps": 20, "eval_every": 10, "log_every": 5, "device": "cuda"}


@pytest.mark.parametrize("dataset, side", [("digits", 8), ("cifar10", 32), ("flowers102", 256)])
def test_views_are_those_of_the_cpu(dataset, side):
    preset = common.preset_of(dataset)
    x = np.random.RandomState(0).randint(0, 256, (64, len(preset.mean), side, side), np.uint8)
    split, idx, made = common.Split(x, np.zeros(64, np.int64)), torch.arange(63, -1, -1), []
    for device in (CPU, GPU):
        views = common.Views(split, preset, "cnn", device)
        common.seed_step(0, "stage", 7)
        made.append([view(idx).cpu() for view in (views.weak, views.strong, views.plain)])
    for name, one, other in zip(("weak", "strong", "plain"), *made, strict=True):
        level = 1 / (255 * min(preset.std))
        off = (one - other).abs() > 1.01 * level  # the order of a sum may round a level away
        assert off.float().mean() < (0.001 if name == "strong" else 1e-9), name


def step_of(backbone, preset, dtype, device, compiled=False):
    """(loss, gradients by name) of one step of cross-entropy on made-up images."""
    torch.manual_seed(0)
    student = common.build_student(backbone, preset, 10, weights="none").eval()
    x = torch.randn(8, len(preset.mean), preset.size, preset.size)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    student, x = student.to(device, kind), x.to(device, kind)
    if compiled:
        student.compile()
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype, enabled=half):
        logits, _, _ = student(x)
    loss = F.cross_entropy(logits.to(kind), torch.arange(8, device=device))
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in student.named_parameters()}
    return loss.double().item(), gradients


def distance(one, other):
    """Norm of the difference of all gradients over the norm of the second ones."""
    pairs = [(one[name] - other[name], other[name]) for name in other]
    norms = torch.tensor([[a.norm(), b.norm()] for a, b in pairs]).norm(dim=0)
    return (norms[0] / norms[1]).item()


@pytest.mark.parametrize("dtype, near", [
    (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02),
])  # fmt: skip
@pytest.mark.parametrize("backbone, dataset", [
    ("cnn", "digits"), ("wrn_28_2", "cifar10"), ("vit_small_patch2_32", "cifar100"),
])  # fmt: skip
def test_a_step_is_near_the_reference_in_float64(backbone, dataset, dtype, near):
    torch.set_float32_matmul_precision("highest")
    preset = common.preset_of(dataset)
    exact = step_of(backbone, preset, torch.float64, CPU)
    with torch.backends.cudnn.flags(allow_tf32=False):
        loss, gradients = step_of(backbone, preset, dtype, GPU)
    assert loss == pytest.approx(exact[0], rel=near) and distance(gradients, exact[1]) < near


@pytest.mark.parametrize("backbone, dataset", [
    ("cnn", "digits"), ("vit_small_patch2_32", "cifar100"),
])  # fmt: skip
def test_the_compiled_student_equals_the_eager_one(backbone, dataset):
    preset = common.preset_of(dataset)
    eager, compiled = (
        step_of(backbone, preset, torch.float32, GPU, compiled=how) for how in (False, True)
    )
    assert compiled[0] == pytest.approx(eager[0], rel=1e-3)
    assert distance(compiled[1], eager[1]) < 1e-2


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_resumed_run_is_close_to_an_uninterrupted_one(tmp_path, monkeypatch, amp):
    own = SHORT | {"amp": amp, "data_dir": str(tmp_path)}
    whole = adamatch.main(adamatch.Args(**own, runs_dir=str(tmp_path / "a")))
    save = common.Run.save

    def stop(self, stage, step, *given, **state):
        save(self, stage, step, *given, **state)
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", stop)
        adamatch.main(adamatch.Args(**own, runs_dir=str(tmp_path / "b")))
    folder = only_run(tmp_path / "b")
    saved = json.loads((folder / "args.json").read_text()) | {"resume": str(folder)}
    resumed = adamatch.main(adamatch.Args(**saved))
    assert resumed["test_acc"] == pytest.approx(whole["test_acc"], abs=5)


def test_one_process_under_torchrun_trains_by_nccl(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(ROOT / "adamatch.py"), "--num-steps", "5", "--runs-dir", str(tmp_path / "r")]
    command += ["--data-dir", str(tmp_path), "--device", "cuda"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_step_of_the_headline_recipe(tmp_path, monkeypatch):
    x = np.random.RandomState(0).randint(0, 256, (400, 3, 32, 32), np.uint8)
    part = common.Split(x, np.arange(400) % 100)
    data = common.Data("cifar100", [f"class {k}" for k in range(100)], part, part)
    monkeypatch.setattr(zeromatch, "load_data", lambda *given: data)
    monkeypatch.setattr(zeromatch, "read_labels", lambda *given: (part.y, None))
    result = zeromatch.main(zeromatch.Args(
        **SHORT | {"num_steps": 3}, dataset="cifar100", num_steps_stage1=3, weights="none",
        pseudolabels=digits_labels(tmp_path)["pseudolabels"], runs_dir=str(tmp_path / "runs"),
    ))  # fmt: skip
    rows = (only_run(tmp_path / "runs") / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]
    assert len(losses) >= 2 and np.isfinite(losses).all() and 0 <= result["test_acc"] <= 100
