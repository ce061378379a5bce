"""torchrun with two processes on one machine (gloo): what one gives, one folder, one stop."""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from runs import checkpoint, digits_labels, metrics, only_run

import common

ROOT = Path(__file__).parent.parent
# a small learning rate: rounding grows from step to step at the preset's
SHORT = "--num-steps 6 --log-every 1 --eval-every 3 --lr 0.01 --device cpu --data-dir data"
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
VIT = "--backbone VIT --weights none --optimizer adamw --lr 1e-4 --amp off"  # no batch statistics
ALIKE = {  # one process and two train to the same weights
    "zeromatch": f"zeromatch.py --num-steps-stage1 3 --agreement --prior teacher --tau 0.9 {VIT}",
    "adamatch": f"adamatch.py {VIT}",
    "kd_fixmatch": f"kd_fixmatch.py --tau 0.1 --outer-only {VIT}",
}
COUPLED = {  # the small CNN: batch statistics are those of each process  # C7
    "zeromatch": "zeromatch.py --num-steps-stage1 3",
    "kd_fixmatch": "kd_fixmatch.py --tau 0.3 --tau-select 0.15 --log-every 2",
}


def tiny_vit(folder):
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "image_size": 8, "patch_size": 2}
    config = ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """flags_of(command line, folder of runs) -> (script, its flags)."""
    made = tmp_path_factory.mktemp("made")
    labels, vit = digits_labels(made)["pseudolabels"], tiny_vit(made / "vit")

    def flags_of(line, runs):
        script, *own = line.replace("VIT", vit).split()
        teacher = ["--pseudolabels", labels] if script == "zeromatch.py" else []
        return script, [*SHORT.split(), *teacher, "--runs-dir", str(runs), *own]

    return flags_of


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1"}


def by_two(script, flags, place):
    """The folder of a run by two processes; one process has written it."""
    command, runs = [*TORCHRUN, str(ROOT / script), *flags], place / "2"
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = runs.iterdir()
    return folder


@pytest.mark.parametrize("case", ALIKE)
def test_two_processes_train_as_one(case, tmp_path, flags_of):
    script, alone = flags_of(ALIKE[case], tmp_path / "1")
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(tyro.cli(module.Args, args=alone))
    one, two = only_run(tmp_path / "1"), by_two(*flags_of(ALIKE[case], tmp_path / "2"), tmp_path)
    assert len(metrics(one)) == len(metrics(two)) >= 8
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        # a pseudo-label's accuracy is a ratio, whose mean over halves is another one
        for name in (n for n in a if n.startswith("train/") and not re.search("acc|agree", n)):
            assert b[name] == pytest.approx(a[name], abs=1e-4), (name, a["stage"], a["step"])
    a, b = (common.load_student(run / "student")[0].state_dict() for run in (one, two))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


@pytest.mark.parametrize("case", COUPLED)
def test_two_processes_train_the_small_cnn(case, tmp_path, flags_of):
    folder = by_two(*flags_of(COUPLED[case], tmp_path / "2"), tmp_path)
    steps = [row for row in metrics(folder) if "train/loss" in row]
    assert len(steps) >= 6 and all(math.isfinite(row["train/loss"]) for row in steps)
    state = checkpoint(folder)
    assert all(w.isfinite().all() for w in state["ema"].values()) and state["step"] == 6
    if "kd" not in case:
        assert all(state[name].isfinite().all() for name in ("p_lb", "p_ulb"))
        rows = [row["train/c_tau"] for row in steps if "train/c_tau" in row]
        assert len(rows) == 6 and all(0.1 * 0.9 <= c_tau <= 1 for c_tau in rows)
    assert (folder / "result.json").exists()


def test_two_processes_stop_with_a_checkpoint_and_one_continues(tmp_path, flags_of):
    script, flags = flags_of(COUPLED["zeromatch"], tmp_path / "runs")
    long = [*TORCHRUN, str(ROOT / script), *flags, "--num-steps", "80", "--eval-every", "40"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.Popen(long, cwd=tmp_path, env=environment(), **pipes)
    deadline = time.time() + 120
    while not any(at.read_text().count("\n") > 8 for at in tmp_path.glob("runs/*/metrics.jsonl")):
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0].decode()
    folder = only_run(tmp_path / "runs")
    assert "stopped" in said and f"--resume {folder}" in said
    stopped = checkpoint(folder)
    assert (2, 80) > (stopped["stage"], stopped["step"]) >= (1, 4)
    resumed = [sys.executable, str(ROOT / script), "--resume", str(folder)]
    assert subprocess.run(resumed, cwd=tmp_path, env=environment()).returncode == 0
    assert (folder / "result.json").exists()
    steps = [(row["stage"], row["step"]) for row in metrics(folder) if "train/loss" in row]
    assert steps == [(1, step + 1) for step in range(3)] + [(2, step + 1) for step in range(80)]


def test_a_batch_that_processes_cannot_share_is_refused_in_one_line(tmp_path, flags_of):
    script, flags = flags_of("adamatch.py --batch-size 15", tmp_path)
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / script), *flags], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "adamatch.py: error:" in line]
    assert len(said) == 1 and "--batch-size" in said[0] and "multiple of 2" in said[0]


@pytest.mark.parametrize("batch", [24, 96])  # of a set of 37: also more than a pass
def test_batches_and_random_numbers_of_processes_are_the_rows_of_one(monkeypatch, batch):
    def draw(rank, processes):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "PROCESSES", processes)
        common.seed_step(0, "stage", 5)
        return common.batch_at(37, batch, 3, "a", 5), common.uniform(batch // processes, 2, 3)

    whole, *parts = draw(0, 1), draw(0, 3), draw(1, 3), draw(2, 3)
    for at in (0, 1):
        assert torch.equal(torch.cat([part[at] for part in parts]), whole[at])


def test_one_process_never_touches_torch_distributed(monkeypatch):
    def forbidden(*args, **options):
        raise AssertionError("torch.distributed was used")

    for name in ("all_reduce", "broadcast_object_list", "init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, forbidden)
    student, x = torch.nn.Linear(2, 2), torch.rand(3)
    assert common.data_parallel(student) is student
    assert torch.equal(common.mean_over_processes(x), x)
    assert common.from_first_process("value") == "value"
    with common.first_process_first():
        pass
