"""torchrun with two processes on one machine (gloo) gives what one process gives, within float error."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import common
import pseudolabel

ROOT = Path(__file__).parent.parent
# a small learning rate: rounding grows from step to step at the preset's
SHORT = "--num-steps 6 --log-every 1 --eval-every 3 --lr 0.01 --device cpu".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
VIT = "--backbone VIT --weights none --optimizer adamw --lr 1e-4 --amp off".split()
CASES = {  # the small CNN couples the rows by batch statistics, a ViT (VIT: a tiny one without dropout) does not
    "zeromatch": ["zeromatch.py", "--num-steps-stage1", "3", "--agreement", "--prior", "teacher"],
    "adamatch": ["adamatch.py"],
    "adamatch original": ["adamatch.py", "--variant", "original"],
    "kd_fixmatch": ["kd_fixmatch.py", "--tau", "0.3", "--tau-select", "0.15", "--log-every", "2"],
    "zeromatch, ViT": ["zeromatch.py", "--num-steps-stage1", "3", *VIT],
    "adamatch, ViT": ["adamatch.py", *VIT],
    "kd_fixmatch, ViT": ["kd_fixmatch.py", "--tau", "0.1", "--outer-only", *VIT],
}


def flags(case, folder, labels):
    script, *own = CASES[case]
    if "VIT" in own:
        own[own.index("VIT")] = tiny_vit(folder.parent / "vit")
    teacher = ["--pseudolabels", labels] if script == "zeromatch.py" else []
    return script, [*SHORT, *teacher, "--runs-dir", str(folder), *own]


def tiny_vit(folder):
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=8, patch_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def command(case, folder, labels):
    script, own = flags(case, folder, labels)
    return [*TORCHRUN, str(ROOT / script), *own]


def environment():
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def metrics(folder):
    (run,) = folder.iterdir()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    data = common.load_data("digits", "data")
    rng = np.random.RandomState(0)
    path = tmp_path_factory.mktemp("labels") / "train.jsonl"
    header = pseudolabel.header_of(data, "train", "made up", "none")
    pseudolabel.write_labels(path, header, rng.dirichlet(np.ones(10), len(data.train)))
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, tmp_path, labels):
    script, alone = flags(case, tmp_path / "1", labels)
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(tyro.cli(module.Args, args=alone))
    shared = command(case, tmp_path / "2", labels)
    for _ in range(2):
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        done = subprocess.run(shared, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        # about one run in a hundred ended so, from a thread that is not Python's; the cause was not found
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) >= 8
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # a pseudo-label's accuracy is a ratio, whose mean over halves is another one
        for name in (n for n in a if n.startswith("train/") and "pl_acc" not in n):
            assert b[name] == pytest.approx(a[name], abs=1e-4), (name, a["stage"], a["step"])
    assert len(list((tmp_path / "2").iterdir())) == 1  # one process wrote
    loaded = [common.load_student(next((tmp_path / n).iterdir()) / "student")[0].state_dict() for n in "12"]
    assert all(torch.allclose(loaded[0][k], loaded[1][k], atol=1e-3) for k in loaded[0] if "tracked" not in k)


def test_two_processes_stop_with_a_checkpoint_and_one_goes_on(tmp_path, labels):
    long = [*command("zeromatch", tmp_path / "runs", labels), "--num-steps", "80", "--eval-every", "40"]
    run = subprocess.Popen(long, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) or len(metrics(tmp_path / "runs")) < 8:
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0].decode()
    assert "stopped; training goes on with --resume" in said
    (folder,) = (tmp_path / "runs").iterdir()
    stopped = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (stopped["stage"], stopped["step"]) >= (1, 4)
    resumed = [sys.executable, str(ROOT / "zeromatch.py"), "--resume", str(folder)]
    assert subprocess.run(resumed, cwd=tmp_path, env=environment(), capture_output=True).returncode == 0
    assert (folder / "result.json").exists()


def test_a_batch_that_processes_cannot_share_is_refused_in_one_line(tmp_path, labels):
    odd = [*command("adamatch", tmp_path, labels), "--batch-size", "15"]
    done = subprocess.run(odd, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "adamatch.py: error:" in line]
    assert said == ["adamatch.py: error: --batch-size 15: expected a multiple of 2, the processes"]


def test_batches_and_random_numbers_of_processes_are_the_rows_of_one(monkeypatch):
    def draw(rank, processes, batch):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "PROCESSES", processes)
        common.seed_step(0, "stage", 5)
        return common.batch_at(37, batch, 3, 5), common.uniform(batch, 2, 3)

    whole, *parts = draw(0, 1, 24), draw(0, 3, 8), draw(1, 3, 8), draw(2, 3, 8)
    for at in (0, 1):
        assert torch.equal(torch.cat([part[at] for part in parts]), whole[at])


def test_one_process_never_touches_torch_distributed(monkeypatch):
    def forbidden(*args, **options):
        raise AssertionError("torch.distributed was used")

    for name in ("all_reduce", "all_gather", "broadcast_object_list", "init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, forbidden)
    student = torch.nn.Linear(2, 2)
    assert common.data_parallel(student) is student and common.agreed(True) and not common.agreed(False)
    x = torch.rand(3)
    assert common.mean_over_processes(x) is x
