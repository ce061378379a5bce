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
    "zeromatch": {1: 35, 2: 45}, "kd_fixmatch": {1: 35, 2: kd_fixmatch.DEC_STEPS, 3: 35}, "adamatch": {1: 40},
}  # fmt: skip
SHORT = "--data-dir data --runs-dir runs --eval-every 10 --log-every 1 --warmup-steps 5 --batch-size 8 --uratio 2"
FLAGS = {
    "zeromatch": f"{SHORT} --num-steps-stage1 35 --num-steps 45 --pseudolabels labels.jsonl",
    "kd_fixmatch": f"{SHORT} --num-steps 35 --tau-select 0 --ema-decay 0.8",
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
    kept = [key for key in ("p_lb", "p_ulb", "y_outer") if key in states[0]]
    names += [key for key in kept if not torch.equal(states[0][key], states[1][key])]
    names += [] if metrics(one) == metrics(other) else ["metrics"]
    names += [] if states[0]["history"] == states[1]["history"] else ["history"]
    students = [(folder / "student" / "model.safetensors").read_bytes() for folder in (one, other)]
    return names + ([] if students[0] == students[1] else ["student"])


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
@pytest.mark.parametrize("script", ["kd_fixmatch", "adamatch"])
def test_after_a_signal_not_one_step_is_lost(start, straight, digits_labels, tmp_path, script, number):
    place = place_for(tmp_path, digits_labels)
    for stage, step in [(1, 7), (1, 17)] if script == "adamatch" else [(1, 7), (2, 20), (3, 17)]:
        moment = steps_done(script, stage, step)
        process = start(script, command(script, place), place)
        wait_until(process, lambda moment=moment: progress(script, place)[1] >= moment)
        os.kill(process.pid, number)
        code, said = ended(process, place)
        assert code == 130 and len(said) == 1 and "--resume" in said[0]
        assert saved_steps(script, place) == progress(script, place)[1] >= moment
        if stage == 2:  # clustering has no save of its own before its end
            assert saved_steps(script, place) < steps_done(script, 3, 0)
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


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, digits_labels, student):
    """A folder with good, damaged and misplaced files of every kind."""
    place = tmp_path_factory.mktemp("shelf")
    labels = digits_labels.read_bytes()
    texts = "".join(f"{word} {i},{word}\n" for word in ("tea", "sea") for i in range(4))
    files = {
        "labels.jsonl": labels, "half.jsonl": labels[: len(labels) // 2], "damaged.jsonl": labels[:9000] + labels,
        "other.jsonl": labels.replace(b'"order"', b'"odd"', 1), "notes.txt": "no placeholder", "empty": "",
        "my.csv": f"text,label\n{texts}", "same.csv": f"text,label\n{texts}", "columns.csv": "a,b\n1,2\n",
        "unlabeled.csv": "text,label\none,\ntwo,\n", "commas.csv": "text,label\none, two,a\n", "empty.csv": "",
        "latin.csv": b"text,label\n\xfc,a\n", "bad.jsonl": '{"text": "one", "label": 1}\n{"text', "list.jsonl": "[1]\n",
        "stranger.csv": "text,label\nnew,coffee\n", "ten.csv": "label\n" + "1\n" * 10, "names.csv": "label\ncat\n",
        "garbage.pt": b"PK garbage", "garbage.npy": b"garbage", "run/args.json": "{}", "damaged/args.json": "{",
        "other/args.json": json.dumps({"variant": "original"}), "run/checkpoint.pt": b"garbage",
        "cut/model.safetensors": b"\x09\x00\x00", "cut/config.json": (student / "config.json").read_bytes(),
        "odd/model.safetensors": b"", "odd/config.json": "[]", "model/config.json": '{"model_type": "nothing"}',
        "flat/a.txt": "", "unread/train/a/1.png": b"no picture", "unread/train/b/1.png": b"no picture",
    }  # fmt: skip
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for number, name in enumerate(("one/train/a", "extra/train/a", "extra/train/b", "extra/test/c")):
        (place / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / name / "1.png")
    torch.save({"conv1.weight": torch.zeros(3)}, place / "misfit.pt")
    torch.save([torch.zeros(3)], place / "list.pt")
    torch.save({"model": 3}, place / "number.pt")
    np.save(place / "ten.npy", np.arange(10))
    (place / "student").symlink_to(student)
    return place


IMPORT, STUDENT = "pseudolabel --teacher import --input", "pseudolabel --teacher student --student"
CHAT = "pseudolabel --teacher chat --base-url http://127.0.0.1:9 --dataset my.csv"
BAD_INPUT = [  # (command line; what its one line names)
    # the command line itself
    ("zeromatch --lr abc", "--lr abc: expected a number; see zeromatch.py --help"),
    ("zeromatch --lr", "--lr without a value: expected a number"),
    ("zeromatch --num-labels 1.5", "--num-labels 1.5: expected a whole number"),
    ("zeromatch --lrr 0.1", "--lrr: .*perhaps --lr;"),
    ("zeromatch --stages 3", "--stages 3: expected one of 'both', '1', '2'"),
    ("zeromatch --anneal=cosine", "--anneal cosine: expected one of 'linear', 'none'"),
    ("zeromatch --optimizer sdg", "--optimizer sdg: expected one of 'adamw', 'sgd'"),
    ("zeromatch --amp fp8", "--amp fp8: expected one of"),
    ("zeromatch --device gpu", "--device gpu: expected one of"),
    ("zeromatch digits", "digits: there is no such option"),
    ("zeromatch --compile yes", "yes: there is no such option"),
    ("zeromatch --variant original", "--variant: there is no such option"),
    (f"zeromatch --optimizer {'s' * 300}", "--optimizer s+: expected one of"),
    ("adamatch --variant new", "--variant new: expected one of 'zeromatch', 'original'"),
    ("adamatch --supervised", "--supervised: .*perhaps --supervised-only"),
    ("kd_fixmatch --clustering em", "--clustering em: expected one of 'dec', 'kmeans', 'none'"),
    ("kd_fixmatch --unsup-loss l2", "--unsup-loss l2: expected one of"),
    ("kd_fixmatch --pseudolabels labels.jsonl", "--pseudolabels: there is no such option"),
    ("pseudolabel --teacher gpt", "--teacher gpt: expected one of"),
    ("pseudolabel --split dev", "--split dev: expected one of 'train', 'test'"),
    ("pseudolabel --order-swaps 3", "--order-swaps 3: expected one of 1, 2"),
    ("pseudolabel --timeout soon", "--timeout soon: expected a number"),
    # numbers out of their range
    ("zeromatch --lr -1", "--lr -1.0: expected a number of at least 0"),
    ("zeromatch --lr nan", "--lr nan: expected"),
    ("zeromatch --lr inf", "--lr inf: expected"),
    ("zeromatch --tau 1.5", "--tau 1.5: expected a number from 0 to 1"),
    ("zeromatch --lambda-p -1", "--lambda-p -1.0"),
    ("zeromatch --agreement --stages 1", "--agreement and --prior change stage 2 only"),
    ("zeromatch --prior teacher --stages 1", "--agreement and --prior change stage 2 only"),
    ("zeromatch --lambda-u nan", "--lambda-u nan"),
    ("zeromatch --seed -1", "--seed -1: expected a number from 0"),
    ("zeromatch --num-steps 0", "--num-steps 0"),
    ("zeromatch --num-steps-stage1 0", "--num-steps-stage1 0"),
    ("zeromatch --warmup-steps -1", "--warmup-steps -1"),
    ("zeromatch --eval-every 0", "--eval-every 0"),
    ("zeromatch --log-every 0", "--log-every 0"),
    ("zeromatch --batch-size 0", "--batch-size 0"),
    ("zeromatch --uratio 0", "--uratio 0"),
    ("zeromatch --ema-decay 1", "--ema-decay 1.0"),
    ("zeromatch --layer-decay 0", "--layer-decay 0.0"),
    ("zeromatch --weight-decay -0.1", "--weight-decay -0.1"),
    ("zeromatch --marginal-decay 2", "--marginal-decay 2.0"),
    ("zeromatch --num-labels 15", "--num-labels 15: expected a multiple of 10"),
    ("zeromatch --num-labels -10", "--num-labels -10: expected a multiple of 10"),
    ("zeromatch --num-labels 9990", "--num-labels 9990: class 0 has .* examples"),
    ("kd_fixmatch --tau-select 2", "--tau-select 2.0"),
    ("kd_fixmatch --tau-inner -1", "--tau-inner -1.0"),
    ("kd_fixmatch --sce-alpha -1", "--sce-alpha -1.0"),
    ("kd_fixmatch --sce-beta nan", "--sce-beta nan"),
    ("pseudolabel --dry-run 0", "--dry-run 0: expected a number above 0"),
    ("pseudolabel --batch-size -1", "--batch-size -1"),
    ("pseudolabel --temperature nan", "--temperature nan"),
    ("pseudolabel --timeout inf", "--timeout inf"),
    ("pseudolabel --price-in -1", "--price-in -1.0"),
    (f"{CHAT} --model m --concurrency 0", "--concurrency 0"),
    # options that do not go together, or need another one
    ("zeromatch --device cpu --amp fp16 --pseudolabels labels.jsonl", "--amp fp16 needs a GPU; .*--amp bf16 or off"),
    ("adamatch --pseudolabels labels.jsonl", "--pseudolabels is read with --feature-input only"),
    ("zeromatch --device mps", "--device mps: torch sees no Apple GPU"),
    ("zeromatch --test-file my.csv", "--test-file my.csv: digits has a test part of its own"),
    ("zeromatch --pseudolabels-test labels.jsonl", "--pseudolabels-test needs --pseudolabels"),
    ("adamatch --backbone vit_small_patch16_224", "8 pixels cannot be cut into patches of 16"),
    ("adamatch --feature-input --pseudolabels labels.jsonl", "--feature-input needs label files of both parts"),
    ("pseudolabel --teacher import", "--teacher import needs --input"),
    ("pseudolabel --teacher student", "--teacher student needs --student"),
    ("pseudolabel --teacher chat", "--teacher chat needs --model"),
    ("pseudolabel --teacher text", "--teacher text does not label images"),
    ("pseudolabel --teacher clip --dataset my.csv", "--teacher clip does not label texts"),
    ("pseudolabel --teacher glyphs --dataset my.csv", "--teacher glyphs knows digits only"),
    ("pseudolabel --dataset my.csv --split test --teacher text", "my has no test part"),
    (f"{CHAT} --model m --max-cost 1", "--max-cost needs --price-in and --price-out"),
    (f"{CHAT} --model m --logprobs --json-schema", "--logprobs --json-schema: .*leave one out"),
    (f"{CHAT} --model m --base-url ftp://x", "--base-url ftp://x: expected http://HOST"),
    (f"{CHAT} --model m --key-variable NO_SUCH", "variable NO_SUCH: expected the API key"),
    # files and folders of a wrong kind, damaged, or of something else
    ("zeromatch --dataset no_such", "--dataset no_such: expected one of digits, .*a folder .*a file"),
    ("zeromatch --dataset nowhere.csv", "nowhere.csv: could not be read .*No such file"),
    ("zeromatch --dataset flat", "--dataset flat: expected at least two folders train/<class>/.*found 0"),
    ("zeromatch --dataset one", "--dataset one: expected at least two folders .*found 1"),
    ("zeromatch --dataset extra", "--dataset extra: .*wrong: c"),
    ("zeromatch --dataset unread", "2 labeled pictures cannot be read: .*1.png"),
    ("zeromatch --dataset columns.csv", "columns.csv: .*expected fields text and label"),
    ("zeromatch --dataset commas.csv", "commas.csv: .*row 1: .*quotes around"),
    ("zeromatch --dataset latin.csv", "latin.csv: could not be read .*utf-8"),
    ("zeromatch --dataset empty.csv", "the labels name 0 classes"),
    ("zeromatch --dataset unlabeled.csv", "the labels name 0 classes"),
    ("zeromatch --dataset bad.jsonl", "bad.jsonl: could not be read at row 2"),
    ("zeromatch --dataset list.jsonl", "list.jsonl: .*expected fields text and label"),
    ("zeromatch --dataset my.csv --test-file nowhere.csv", "nowhere.csv: could not be read .*No such file"),
    ("zeromatch --dataset my.csv --test-file same.csv", "same.csv: 8 of its 8 texts also stand in my.csv"),
    ("zeromatch --dataset my.csv --test-file stranger.csv", "stranger.csv: has labels .*coffee"),
    ("zeromatch --dataset my.csv --num-labels 4", "no labels of my in .*give --pseudolabels"),
    ("zeromatch --pseudolabels nowhere.jsonl", "--pseudolabels nowhere.jsonl: no such file; make it"),
    ("zeromatch --pseudolabels flat", "--pseudolabels flat: no such file"),
    ("zeromatch --pseudolabels empty", "empty: expected a first line with format"),
    ("zeromatch --pseudolabels my.csv", "my.csv: line 1 is not a JSON object"),
    ("zeromatch --pseudolabels half.jsonl", "half.jsonl: .* examples have no label yet"),
    ("zeromatch --pseudolabels damaged.jsonl", "damaged.jsonl: line .* damaged"),
    ("zeromatch --pseudolabels other.jsonl", "other.jsonl: made for the same examples in another order"),
    ("zeromatch --pseudolabels labels.jsonl --pseudolabels-test labels.jsonl", "split 'train', expected 'test'"),
    ("zeromatch --resume nowhere", "--resume nowhere: there is no args.json; expected the folder of a run"),
    ("zeromatch --resume damaged", "--resume damaged: args.json is damaged or of another script"),
    ("zeromatch --resume other", "--resume other: args.json is damaged or of another script"),
    ("adamatch --resume run --num-labels 20", "--num-labels 20: the run to resume has 10"),
    ("adamatch --resume run", "run/checkpoint.pt cannot be read as a checkpoint"),
    ("zeromatch --runs-dir notes.txt --pseudolabels labels.jsonl", "notes.txt/.*: Not a directory"),
    ("adamatch --weights nowhere.pt", "nowhere.pt cannot be read as weights of cnn"),
    ("adamatch --weights garbage.pt", "garbage.pt cannot be read as weights of cnn"),
    ("adamatch --weights list.pt", "list.pt cannot be read as weights of cnn"),
    ("adamatch --weights number.pt", "number.pt cannot be read as weights of cnn"),
    ("adamatch --weights misfit.pt", "misfit.pt does not fit cnn .*--weights none"),
    ("adamatch --weights cut/model.safetensors", "model.safetensors cannot be read as weights"),
    ("adamatch --backbone resnet_1", "--backbone resnet_1: expected cnn, "),
    ("adamatch --backbone model", "--backbone model: expected cnn, "),
    ("adamatch --dataset my.csv --backbone flat --num-labels 4", "flat: .*could not load it"),
    ("adamatch --dataset my.csv --backbone no_such --num-labels 4", "no_such: .*could not load it"),
    (f"{IMPORT} nowhere.npy", "there is no file nowhere.npy"),
    (f"{IMPORT} garbage.npy", "--input garbage.npy: could not be read"),
    (f"{IMPORT} garbage.pt", "--input garbage.pt: could not be read"),
    (f"{IMPORT} list.pt", "--input list.pt: could not be read"),
    (f"{IMPORT} ten.npy", "--input ten.npy: 10 labels, but digits's train part has 1297"),
    (f"{IMPORT} ten.csv", "--input ten.csv: 10 labels"),
    (f"{IMPORT} names.csv", "--input names.csv: could not be read: .*names or numbers of classes"),
    (f"{IMPORT} columns.csv", "--input columns.csv: could not be read"),
    (f"{STUDENT} nowhere", "there is no file nowhere/model.safetensors"),
    (f"{STUDENT} cut", "cut cannot be read as a student"),
    (f"{STUDENT} odd", "odd cannot be read as a student"),
    (f"{STUDENT} student --dataset my.csv", "--student student: was trained for other classes"),
    (f"{STUDENT} student --output notes.txt", "notes.txt: .*expected a first line with format"),
    (f"{STUDENT} student --output flat", "flat: Is a directory"),
    ("pseudolabel --dataset my.csv --teacher text --prompt nowhere", "--prompt nowhere: could not be read"),
    ("pseudolabel --dataset my.csv --teacher text --prompt notes.txt", "notes.txt: expected the placeholder {text}"),
    ("pseudolabel --dataset my.csv --teacher embedding --prompt notes.txt", "expected {label} in every line"),
    ("pseudolabel --dataset my.csv --teacher text --prompt latin.csv", "--prompt latin.csv: could not be read"),
    ("pseudolabel --dataset my.csv --teacher text --model flat", "flat: .*could not load it"),
]  # fmt: skip


@pytest.mark.parametrize("line, expected", BAD_INPUT, ids=[line[:70] for line, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(start, shelf, line, expected):
    script, *flags = shlex.split(line)
    code, said = ended(start(script, flags, shelf), shelf)
    assert code == 2 and len(said) == 1, (code, said, (shelf / "out").read_text()[-2000:])
    assert said[0].startswith(f"{script}.py: error: ") and re.search(expected, said[0]), said[0]


@pytest.mark.parametrize("script", ["zeromatch", "adamatch", "kd_fixmatch", "pseudolabel"])
def test_help_is_whole_and_exit_code_0(start, tmp_path, script):
    assert ended(start(script, ["--help"], tmp_path), tmp_path) == (0, [])
    fields = importlib.import_module(script).Args.__dataclass_fields__
    assert not [name for name in fields if f"--{name.replace('_', '-')}" not in (tmp_path / "out").read_text()]


# ---------------------------------------------------------------------------- hostile files


class Hostile:
    """A pickle that makes a file when it is read by an unsafe reader."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


PLACES = [  # (file, what a command line does with it)
    ("run/checkpoint.pt", "zeromatch --resume run"), ("run/args.json", "zeromatch --resume run"),
    ("run/checkpoint.pt", "kd_fixmatch --resume run"), ("w.pt", "adamatch --weights w.pt"),
    ("w.pth", "adamatch --backbone wrn_28_2 --weights w.pth"), ("w.safetensors", "adamatch --weights w.safetensors"),
    ("bert/pytorch_model.bin", "adamatch --dataset my.csv --num-labels 4 --backbone bert"),
    ("bert/config.json", "adamatch --dataset my.csv --num-labels 4 --backbone bert"),
    ("vit/pytorch_model.bin", "adamatch --backbone vit"), ("in.pt", f"{IMPORT} in.pt"), ("in.npy", f"{IMPORT} in.npy"),
    ("in.csv", f"{IMPORT} in.csv"), ("student/model.safetensors", f"{STUDENT} student"),
    ("student/config.json", f"{STUDENT} student"), ("my.csv", "zeromatch --dataset my.csv"),
    ("my.jsonl", "zeromatch --dataset my.jsonl"), ("l.jsonl", "zeromatch --pseudolabels l.jsonl"),
    ("ask.txt", "pseudolabel --dataset my.csv --teacher text --prompt ask.txt"),
]  # fmt: skip


def fill_place(place, student):
    """Files that make every command line of PLACES get as far as the hostile one."""
    import tiny_models

    for name in ("run", "vit"):
        (place / name).mkdir()
    (place / "run" / "args.json").write_text(json.dumps({"runs_dir": "runs"}))
    vit = {"model_type": "vit", "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 8}
    (place / "vit" / "config.json").write_text(json.dumps(vit | {"patch_size": 4, "intermediate_size": 12}))
    (place / "my.csv").write_text("text,label\n" + "".join(f"{w} {i},{w}\n" for w in ("tea", "sea") for i in range(4)))
    tiny_models.encoder(place / "bert")
    (place / "bert" / "model.safetensors").unlink()
    (place / "student").mkdir()
    for name in ("model.safetensors", "config.json"):
        (place / "student" / name).write_bytes((student / name).read_bytes())


@pytest.mark.parametrize("name, line", PLACES, ids=[f"{line[:60]} {name}" for name, line in PLACES])
def test_a_hostile_pickle_is_one_line_and_executes_nothing(start, student, digits_labels, tmp_path, name, line):
    fill_place(tmp_path, student)
    mark, (script, *flags) = tmp_path / "executed", shlex.split(line)
    saved = {"runs_dir": "runs"} | ({"pseudolabels": str(digits_labels)} if script == "zeromatch" else {})
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved))
    hostile = Hostile(mark)
    content = {"stage": 1, "step": 1, "seconds": 0.0, "history": [], "pending": [], "model": hostile, "probs": hostile}
    offered = [pickle.dumps(content)]
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
        torch.save(content, tmp_path / "made", **options)
        offered.append((tmp_path / "made").read_bytes())
    np.save(tmp_path / "made.npy", np.array([hostile], dtype=object), allow_pickle=True)
    offered.append((tmp_path / "made.npy").read_bytes())
    pickle.loads(offered[0])
    assert mark.exists()  # it is hostile
    mark.unlink()
    for content in offered if name.endswith((".pt", ".npy")) else offered[:2]:
        (tmp_path / name).write_bytes(content)
        code, said = ended(start(script, flags, tmp_path), tmp_path)
        assert not mark.exists()
        assert code == 2 and len(said) == 1, (code, said, (tmp_path / "out").read_text()[-2000:])


@pytest.mark.parametrize("line", [
    "adamatch --backbone remote", "adamatch --dataset my.csv --num-labels 4 --backbone remote", f"{STUDENT} student",
    "pseudolabel --dataset my.csv --teacher text --model remote", "pseudolabel --teacher clip --model remote",
])  # fmt: skip
def test_code_that_a_model_folder_brings_is_not_executed(start, student, tmp_path, line):
    fill_place(tmp_path, student)
    (tmp_path / "student" / "encoder").symlink_to(tmp_path / "remote")
    (tmp_path / "remote").mkdir()
    auto = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForCausalLM")}
    (tmp_path / "remote" / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (tmp_path / "remote" / "evil.py").write_text("open('executed', 'w')\n")
    script, *flags = shlex.split(line)
    code, said = ended(start(script, flags, tmp_path), tmp_path)
    assert not (tmp_path / "executed").exists()
    assert code == 2 and len(said) == 1, (code, said, (tmp_path / "out").read_text()[-2000:])


# ---------------------------------------------------------------------------- damaged files


def damaged(rng, content):
    """The content cut, with flipped, inserted, missing, doubled or zeroed bytes, at one to three random places."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(content) + 1), rng.randint(1, 30)
        rest, some = content[at:], rng.randbytes(length)
        signs = bytes(rng.choices(b'0123456789{}[]",:.-\n\r\\ e', k=rng.randint(1, 4)))
        content = content[:at] + rng.choice([
            b"", some + rest, some + rest[length:], signs + rest, signs + rest[len(signs) :], rest[length:],
            rest[:length] + rest, bytes(length) + rest[length:],
            bytes([rest[0] ^ 1 << rng.randrange(8)] if rest else []) + rest[1:],
        ])  # fmt: skip
    return content


def test_a_damaged_label_file_is_refused_or_keeps_every_whole_label(tmp_path):
    """Also when labeling goes on with it; a refused file stays as it is."""
    rng, outcomes = random.Random(4), {"refused": 0, "read": 0, "finished": 0}
    x = np.random.RandomState(0).randint(0, 256, (12, 1, 2, 2)).astype(np.uint8)
    data = common.Data("pictures", ["cat", "dog", "cow"], common.Split(x, np.arange(12) % 3), None)
    path, labels = tmp_path / "l.jsonl", [*np.random.RandomState(1).randint(0, 3, 11).tolist(), None]
    np.save(tmp_path / "labels.npy", [-1 if label is None else label for label in labels])
    args = pseudolabel.Args(teacher="import", input=str(tmp_path / "labels.npy"), output=str(path))
    pseudolabel.label(data, args)
    header, *lines = path.read_bytes().splitlines(keepends=True)
    lines = [json.loads(line) for line in lines]
    for line in lines[::2]:
        line["probs"] = np.eye(3)[line["label"]].tolist()
    lines = [header, *((json.dumps(line) + "\n").encode() for line in lines)]
    for trial in range(600):
        content = damaged(rng, b"".join(lines))
        path.write_bytes(content)
        kept = [i for i, line in enumerate(lines[1:]) if line in content.splitlines(keepends=True)]
        for step in ("read", "finished"):
            try:
                if step == "finished":
                    pseudolabel.label(data, args)
                found, probs = pseudolabel.read_labels(path, data, "train")
            except common.UserError as error:
                assert "\n" not in str(error) and path.read_bytes() == content, trial
                outcomes["refused"] += 1
                continue
            outcomes[step] += 1
            assert all(found[i] == (-1 if labels[i] is None else labels[i]) for i in kept), trial
            assert found.shape == (12,) and (-1 <= found).all() and (found < 3).all(), trial
            assert probs is None or (probs.shape == (12, 3) and np.isfinite(probs).all()), trial
    print(f"\nlabel files: 600 damaged ones, {outcomes}")
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("row", [
    {"index": [0], "label": 0}, {"index": 3, "label": 0, "usage": 5}, {"usage": [1]}, {"usage": None},
    {"index": 3, "label": 0, "probs": [1e400, 0, 0]}, {"index": 3, "label": 0, "probs": [10**400, 0, 0]},
    {"index": 3, "label": 0, "probs": [float("nan"), 0, 0]}, {"index": 3, "label": 0, "probs": [-1, 1, 1]}, "deep",
])  # fmt: skip
def test_an_impossible_row_is_refused_before_anything_is_added(tmp_path, row):
    x = np.zeros((4, 1, 2, 2), np.uint8)
    data, path = common.Data("p", ["a", "b", "c"], common.Split(x, np.zeros(4, int)), None), tmp_path / "l.jsonl"
    np.save(tmp_path / "labels.npy", np.zeros(4, int))
    args = pseudolabel.Args(teacher="import", input=str(tmp_path / "labels.npy"), output=str(path))
    pseudolabel.label(data, args)
    lines = path.read_text().splitlines(keepends=True)[:-1]
    lines.append("[" * 100_000 + "\n" if row == "deep" else json.dumps(row) + "\n")
    path.write_text("".join(lines))
    for act in (lambda: pseudolabel.read_labels(path, data, "train"), lambda: pseudolabel.label(data, args)):
        with pytest.raises(common.UserError, match="damaged"):
            act()
    assert path.read_text() == "".join(lines)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_damaged_text_file_is_refused_or_read_row_by_row(tmp_path, suffix, capsys):
    rng, outcomes, path = random.Random(5), {"refused": 0, "read": 0}, tmp_path / f"my.{suffix}"
    texts = ['tea, "hot"', "na\u00efve \U0001f600", "two\nlines", "plain", "7", "x" * 50]
    rows = [{"text": f"{text} {i}", "label": label} for i, text in enumerate(texts) for label in ("a", "b", "")]
    if suffix == "csv":
        quote = lambda value: '"' + value.replace('"', '""') + '"'  # noqa: E731
        lines = ["text,label\n", *(f"{quote(row['text'])},{row['label']}\n" for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    whole = "".join(lines).encode()
    path.write_bytes(whole)
    read, classes = common.read_texts(path)
    assert read.texts == [row["text"] for row in rows] and classes == ["a", "b"]
    for trial in range(600):
        content = damaged(rng, whole)
        path.write_bytes(content)
        try:
            read, classes = common.read_texts(path)
        except common.UserError as error:
            assert "\n" not in str(error), trial
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(read.texts) == len(read.y) and all(read.texts) and (-1 <= read.y).all(), trial
        assert (read.y < len(classes)).all() and all(len(column) == len(read) for column in read.aug or []), trial
        if suffix == "jsonl":  # a line means the same whatever stands around it
            seen = {(text, classes[y] if y >= 0 else "") for text, y in zip(read.texts, read.y, strict=True)}
            found = content.decode().splitlines(keepends=True)
            kept = [(row["text"], row["label"]) for row, line in zip(rows, lines, strict=True) if line in found]
            assert set(kept) <= seen, trial
    capsys.readouterr()
    with capsys.disabled():
        print(f"\n{suffix} files: 600 damaged ones, {outcomes}")
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("name, content", [
    ("deep.jsonl", b"[" * 100_000), ("deep.json", b'{"1": ' * 100_000), ("nul.csv", bytes(50) + b"\n1\n"),
    ("long.csv", b"text,label\none," + b"9" * 5000 + b"\ntwo,8\n"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_odd_text_files_are_read_or_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        assert len(common.read_texts(tmp_path / name)[1]) == 2
    except common.UserError as error:
        assert "\n" not in str(error) and name != "long.csv"


def test_a_file_of_metrics_damaged_by_a_power_cut_does_not_stop_a_resumed_run(start, straight, digits_labels, tmp_path):
    place = place_for(tmp_path, digits_labels)
    process = start("adamatch", FLAGS["adamatch"].split(), place)
    wait_until(process, lambda: progress("adamatch", place)[1] >= 25)
    process.kill()
    process.join()
    with open(the_run(place) / "metrics.jsonl", "ab") as file:
        file.write(bytes(100) + b'\n{"stage": 1}\n[1]\n{"stage')
    assert ended(start("adamatch", command("adamatch", place), place), place) == (0, [])
    assert differences(straight("adamatch"), the_run(place)) == []
