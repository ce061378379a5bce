"""Kills at random moments, a full disk, bad and hostile input: nothing is lost, executed, or said in more than a line.

Runs are children of a process that holds the imports (multiprocessing's forkserver): one costs a few milliseconds,
has standard streams of its own, and can be killed. `pytest -s` shows the figures."""

import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  held for the children, as load_digits needs it
import torch
import torch._dynamo  # noqa: F401  held as well: the first optimizer imports it
from PIL import Image

import common
import kd_fixmatch
import pseudolabel

ROOT = Path(__file__).parent.parent
FILLED = 1000  # bytes that a file may have on the disk that is full


def child(script, flags, place, full_after, slow):
    """Run a script's command line at `place`; its output goes to the files out and err there."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(place) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(place)
    torch.set_num_threads(1)
    real_save, real_append, saves = common.Run.save, pseudolabel.append, []

    def save(*args, **values):
        saves.append(1)
        if len(saves) == full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILLED, FILLED))
        real_save(*args, **values)

    def append(file, row):
        time.sleep(slow)
        real_append(file, row)

    common.Run.save, pseudolabel.append = save, append
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    common.cli(module.Args, module.main)


@pytest.fixture(scope="module")
def start():
    """start(script, flags, place) -> the running process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    patch.delenv("OPENAI_API_KEY", raising=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reliability", "zeromatch", "adamatch", "transformers"])

    def start(script, flags, place, full_after=0, slow=0.0):
        Path(place).mkdir(exist_ok=True, parents=True)
        process = context.Process(target=child, args=(script, list(map(str, flags)), place, full_after, slow))
        process.start()
        return process

    yield start
    patch.undo()


def ended(process, place):
    """(exit code, lines on standard error) of a process."""
    process.join(120)
    assert process.exitcode is not None, (place / "out").read_text()
    return process.exitcode, (place / "err").read_text().splitlines()


# ---------------------------------------------------------------------------- training that is killed

PHASES = {  # {stage: its steps}
    "zeromatch": {1: 50, 2: 70}, "kd_fixmatch": {1: 45, 2: kd_fixmatch.DEC_STEPS, 3: 45}, "adamatch": {1: 40},
}  # fmt: skip
SHORT = "--data-dir data --runs-dir runs --eval-every 10 --log-every 1 --warmup-steps 5 --batch-size 8 --uratio 2"
FLAGS = {
    "zeromatch": f"{SHORT} --num-steps-stage1 50 --num-steps 70 --pseudolabels labels.jsonl",
    "kd_fixmatch": f"{SHORT} --num-steps 45 --tau-select 0 --ema-decay 0.8",
    "adamatch": f"{SHORT} --num-steps 40",
}


@pytest.fixture(scope="module")
def digits_labels(tmp_path_factory):
    """A label file of the digits' training part from a made-up teacher."""
    data, path = common.load_data("digits", ""), tmp_path_factory.mktemp("labels") / "labels.jsonl"
    probs = np.random.RandomState(0).dirichlet(np.ones(10), len(data.train))
    pseudolabel.write_labels(path, pseudolabel.header_of(data, "train", "made up", "none"), probs)
    return path


def place_for(tmp_path, digits_labels):
    (tmp_path / "labels.jsonl").write_bytes(digits_labels.read_bytes())
    return tmp_path


def the_run(place):
    return next((path.parent for path in place.glob("runs/*/args.json")), None)


def command(script, place):
    """What the user types: the run's flags, or --resume once there is a run."""
    folder = the_run(place)
    return FLAGS[script].split() if folder is None else ["--resume", str(folder)]


def metrics(folder):
    """Whole lines of a run's metrics, without times."""
    text = (folder / "metrics.jsonl").read_text() if folder and (folder / "metrics.jsonl").exists() else ""
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def steps_done(script, stage, step):
    return sum(steps for at, steps in PHASES[script].items() if at < stage) + step


def progress(script, place):
    """(stage, steps of all stages so far) of the last whole line of metrics."""
    rows = metrics(the_run(place))
    stage, step = (rows[-1]["stage"], rows[-1]["step"]) if rows else (1, 0)
    return stage, steps_done(script, stage, step)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def saved_steps(script, place):
    path = the_run(place) and the_run(place) / "checkpoint.pt"
    state = checkpoint(path.parent) if path and path.exists() else {"stage": 1, "step": 0}
    return steps_done(script, state["stage"], state["step"])


def wait_until(process, reached):
    end = time.monotonic() + 60
    while process.is_alive() and not reached():
        assert time.monotonic() < end
        time.sleep(0.002)


def differences(one, other):
    """What two runs do not share: names of weights (also averaged) and of other state, lines of metrics."""
    states = [checkpoint(folder) for folder in (one, other)]
    flat = [{f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()} for state in states]
    names = [name for name in flat[0] | flat[1] if not torch.equal(flat[0][name], flat[1][name])]
    names += [key for key in states[0] if key in ("p_lb", "p_ulb", "y_outer") and not torch.equal(states[0][key], states[1][key])]
    names += [] if metrics(one) == metrics(other) else ["metrics"]
    names += [] if states[0]["history"] == states[1]["history"] else ["history"]
    same = (one / "student" / "model.safetensors").read_bytes() == (other / "student" / "model.safetensors").read_bytes()
    return names + ([] if same else ["student"])


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory, digits_labels):
    """straight(script) -> folder of a run that nothing disturbed."""
    made = {}

    def straight(script):
        if script not in made:
            place = place_for(tmp_path_factory.mktemp(script), digits_labels)
            assert ended(start(script, FLAGS[script].split(), place), place) == (0, [])
            made[script] = the_run(place)
        return made[script]

    return straight


@pytest.mark.parametrize("script, seed", [("zeromatch", 1), ("kd_fixmatch", 2)])
def test_training_killed_at_ten_random_moments_ends_with_the_same_weights(
    start, straight, digits_labels, tmp_path, script, seed
):
    rng, place, killed_in, lost, began = random.Random(seed), place_for(tmp_path, digits_labels), [], [], time.time()
    phases = PHASES[script]
    per_phase = {stage: 10 // len(phases) + (stage <= 10 % len(phases)) for stage in phases}
    moments = [steps_done(script, s, rng.randrange(phases[s] - 5)) for s, n in per_phase.items() for _ in range(n)]
    for moment in sorted(moments):
        process = start(script, command(script, place), place)
        wait_until(process, lambda moment=moment: progress(script, place)[1] >= moment)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (place / "err").read_text()
        stage, done = progress(script, place)
        killed_in.append(stage)
        lost.append(done - saved_steps(script, place))
    assert ended(start(script, command(script, place), place), place) == (0, [])
    assert set(killed_in) == set(phases)
    assert differences(straight(script), the_run(place)) == []
    print(f"\n{script}: {len(lost)} kills, in stages {killed_in}, steps done again at most {max(lost)}, ", end="")
    print(f"{time.time() - began:.1f} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["zeromatch", "kd_fixmatch", "adamatch"])
def test_after_a_signal_not_one_step_is_lost(start, straight, digits_labels, tmp_path, script, number):
    place, last = place_for(tmp_path, digits_labels), max(PHASES[script])
    for moment in (7, steps_done(script, last, 17)):  # in the first stage and in the last one
        process = start(script, command(script, place), place)
        wait_until(process, lambda moment=moment: progress(script, place)[1] >= moment)
        os.kill(process.pid, number)
        code, said = ended(process, place)
        assert code == 130 and len(said) == 1 and "--resume" in said[0]
        assert saved_steps(script, place) == progress(script, place)[1] >= moment
    assert ended(start(script, command(script, place), place), place) == (0, [])
    assert differences(straight(script), the_run(place)) == []


# ---------------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_up_loses_no_checkpoint(start, straight, digits_labels, tmp_path):
    """From the second save on, no file can grow beyond a kilobyte."""
    place = place_for(tmp_path, digits_labels)
    code, said = ended(start("zeromatch", FLAGS["zeromatch"].split(), place, full_after=2), place)
    assert code == 2 and len(said) == 1 and "File too large" in said[0] and "go on" in said[0]
    assert saved_steps("zeromatch", place) == 10
    assert ended(start("zeromatch", command("zeromatch", place), place), place) == (0, [])
    assert differences(straight("zeromatch"), the_run(place)) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint, not for two."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("a small file system cannot be made here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_small_file_system_that_is_full_loses_no_checkpoint(start, straight, digits_labels, small_disk):
    place = small_disk
    (place / "labels.jsonl").symlink_to(digits_labels)
    code, said = ended(start("zeromatch", FLAGS["zeromatch"].split(), place), place)
    assert code == 2 and len(said) == 1 and "No space left" in said[0] and saved_steps("zeromatch", place) == 10
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    assert ended(start("zeromatch", command("zeromatch", place), place), place) == (0, [])
    assert differences(straight("zeromatch"), the_run(place)) == []


# ---------------------------------------------------------------------------- labeling that is killed


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Folder of a student for digits, untrained."""
    torch.manual_seed(0)
    folder, preset = tmp_path_factory.mktemp("run") / "student", common.preset_of("digits")
    network = common.build_student("cnn", 1, 8, 10).eval()
    common.save_student(folder, network, common.student_config("digits", "cnn", preset, [str(d) for d in range(10)]))
    return folder


def test_labeling_killed_at_ten_random_moments_ends_with_the_same_file(start, student, tmp_path):
    rng, began, at_death = random.Random(3), time.time(), []
    flags = ["--teacher", "student", "--student", student, "--output", "labels.jsonl", "--device", "cpu"]
    assert ended(start("pseudolabel", flags, tmp_path / "straight"), tmp_path / "straight") == (0, [])
    place = tmp_path / "killed"
    place.mkdir()

    def rows():
        path = place / "labels.jsonl"
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0

    for moment in sorted(rng.sample(range(1290), 9)) + [1290]:
        process = start("pseudolabel", flags, place, slow=0.0002)
        wait_until(process, lambda moment=moment: rows() >= moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        at_death.append(rows())
    process = start("pseudolabel", flags, place)
    assert ended(process, place) == (0, [])
    assert (place / "labels.jsonl").read_bytes() == (tmp_path / "straight" / "labels.jsonl").read_bytes()
    assert len(set(at_death)) > 5  # at different rows
    print(f"\nlabeling: {len(at_death)} kills at rows {at_death}, no row lost, {time.time() - began:.1f} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_labeling_stopped_by_a_signal_says_how_to_go_on(start, student, tmp_path, number):
    path, flags = tmp_path / "labels.jsonl", ["--teacher", "student", "--student", student, "--output", "labels.jsonl"]
    process = start("pseudolabel", flags, tmp_path, slow=0.001)
    wait_until(process, lambda: path.exists() and path.read_bytes().count(b"\n") > 50)
    os.kill(process.pid, number)
    code, said = ended(process, tmp_path)
    assert code == 130 and len(said) == 1 and "same command again" in said[0]
    assert "labeled, 0 abstentions" in (tmp_path / "out").read_text()
    assert ended(start("pseudolabel", flags, tmp_path), tmp_path) == (0, [])
    assert path.read_bytes().count(b"\n") == 1298
