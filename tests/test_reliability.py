"""Kills at random moments, a full disk, bad and hostile input: nothing is lost or executed.

Runs are children of a process that holds the imports (multiprocessing's forkserver): one costs a
few milliseconds, has standard streams of its own, and can be killed."""

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
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  held for the children, as load_digits needs it
import torch
import torch._dynamo  # noqa: F401  held as well: the first optimizer imports it
from PIL import Image
from runs import checkpoint, differences, digits_labels, metrics, save_untrained

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
    real_write, saves = common.write_atomically, []

    def write(path, content):
        saves.extend([path] if path.name == "checkpoint.pt" else [])
        if full_after and len(saves) == full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILLED, FILLED))
        real_write(path, content)

    class SlowBar(pseudolabel.tqdm):
        def update(self, *args):  # called after every row
            time.sleep(slow)
            return super().update(*args)

    common.write_atomically, pseudolabel.tqdm = write, SlowBar
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    common.cli(module.Args, module.main)


@pytest.fixture(scope="module")
def start():
    """start(script, flags, place) -> the running process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.delenv("OPENAI_API_KEY", raising=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reliability", "zeromatch", "adamatch", "transformers"])

    def start(script, flags, place, full_after=0, slow=0.0):
        Path(place).mkdir(exist_ok=True, parents=True)
        args = (script, list(map(str, flags)), place, full_after, slow)
        process = context.Process(target=child, args=args)
        process.start()
        return process

    yield start
    patch.undo()


def ended(process, place):
    """(exit code, lines on standard error) of a process."""
    process.join(120)
    assert process.exitcode is not None, (place / "out").read_text()
    return process.exitcode, (place / "err").read_text().splitlines()


# ---------------------------------------------------------------------------- killed training

PHASES = {  # {stage: its steps}
    "zeromatch": {1: 35, 2: 45}, "adamatch": {1: 40},
    "kd_fixmatch": {1: 35, 2: kd_fixmatch.DEC_STEPS, 3: 35},
}  # fmt: skip
SHORT = "--data-dir data --runs-dir runs --eval-every 10 --log-every 1 --warmup-steps 5"
FLAGS = {
    "zeromatch": f"{SHORT} --num-steps-stage1 35 --num-steps 45 --pseudolabels labels.jsonl",
    "kd_fixmatch": f"{SHORT} --num-steps 35 --tau-select 0 --ema-decay 0.8",
    "adamatch": f"{SHORT} --num-steps 40",
}


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """A label file of the digits' training part from a made-up teacher."""
    return Path(digits_labels(tmp_path_factory.mktemp("labels"))["pseudolabels"])


@pytest.fixture
def place(tmp_path, digits_file):
    (tmp_path / "labels.jsonl").symlink_to(digits_file)
    return tmp_path


def the_run(place):
    return next((path.parent for path in place.glob("runs/*/args.json")), None)


def command(script, place):
    """What the user types: the run's flags, or --resume once there is a run."""
    folder = the_run(place)
    own = f"{FLAGS[script]} --batch-size 8 --uratio 2".split()
    return own if folder is None else ["--resume", str(folder)]


def goes_on(start, script, place):
    assert ended(start(script, command(script, place), place), place) == (0, [])
    return the_run(place)


def steps_done(script, stage, step):
    return sum(steps for at, steps in PHASES[script].items() if at < stage) + step


def progress(script, place):
    """(stage, steps of all stages so far) of the last whole line of metrics."""
    folder = the_run(place)
    rows = metrics(folder) if folder and (folder / "metrics.jsonl").exists() else []
    stage, step = (rows[-1]["stage"], rows[-1]["step"]) if rows else (1, 0)
    return stage, steps_done(script, stage, step)


def saved_steps(script, place):
    folder = the_run(place)
    if not folder or not (folder / "checkpoint.pt").exists():
        return 0
    state = checkpoint(folder)
    return steps_done(script, state["stage"], state["step"])


def wait_until(process, reached):
    end = time.monotonic() + 60
    while process.is_alive() and not reached():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory, digits_file):
    """straight(script) -> folder of a run that nothing disturbed."""
    made = {}

    def straight(script):
        if script not in made:
            place = tmp_path_factory.mktemp(script)
            (place / "labels.jsonl").symlink_to(digits_file)
            made[script] = goes_on(start, script, place)
        return made[script]

    return straight


@pytest.mark.parametrize("script, seed", [("zeromatch", 1), ("kd_fixmatch", 2)])
def test_training_killed_at_ten_random_moments_ends_as_if_it_never_was(
    start, straight, place, script, seed
):
    rng, killed_in, phases = random.Random(seed), set(), PHASES[script]
    moments = [
        steps_done(script, stage, rng.randrange(phases[stage] - 5))
        for stage in phases
        for _ in range(10 // len(phases) + (stage <= 10 % len(phases)))
    ]
    for moment in sorted(moments):
        process = start(script, command(script, place), place)
        wait_until(process, lambda moment=moment: progress(script, place)[1] >= moment)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (place / "err").read_text()
        killed_in.add(progress(script, place)[0])
    assert differences(straight(script), goes_on(start, script, place)) == []
    assert killed_in == set(phases)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("script", PHASES)
def test_after_a_signal_not_one_step_is_lost(start, straight, place, script, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as nohup does, and the scripts respect that")
    for stage, step in [(1, 7), (2, 20), (3, 17)] if script != "adamatch" else [(1, 7), (1, 17)]:
        if stage not in PHASES[script]:
            continue
        moment = steps_done(script, stage, step)
        process = start(script, command(script, place), place)
        wait_until(process, lambda moment=moment: progress(script, place)[1] >= moment)
        os.kill(process.pid, number)
        code, said = ended(process, place)
        assert code == 130 and len(said) == 1 and f"--resume {the_run(place)}"[-40:] in said[0]
        assert saved_steps(script, place) == progress(script, place)[1] >= moment
        if stage < max(PHASES[script]):  # it did not wait for the end of the stage
            assert saved_steps(script, place) < steps_done(script, stage + 1, 0)
    assert differences(straight(script), goes_on(start, script, place)) == []


# ---------------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_up_loses_no_checkpoint(start, straight, place):
    """From the second save on, no file can grow beyond a kilobyte."""
    flags = command("zeromatch", place)
    code, said = ended(start("zeromatch", flags, place, full_after=2), place)
    assert code == 2 and len(said) == 1 and "File too large" in said[0]
    assert saved_steps("zeromatch", place) == 10
    assert differences(straight("zeromatch"), goes_on(start, "zeromatch", place)) == []


# ---------------------------------------------------------------------------- killed labeling


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Folder of a student for digits, untrained."""
    folder = tmp_path_factory.mktemp("run") / "student"
    torch.manual_seed(0)
    save_untrained(folder, "cnn", common.PRESETS["digits"], list("0123456789"))
    return folder


def labeling(student):
    return ["--teacher", "student", "--student", student, "--output", "labels.jsonl"]


def test_labeling_killed_at_ten_random_moments_ends_with_the_same_file(start, student, tmp_path):
    rng, at_death, flags = random.Random(3), [], labeling(student)
    places = tmp_path / "straight", tmp_path / "killed"
    assert ended(start("pseudolabel", flags, places[0]), places[0]) == (0, [])
    whole, path = (place / "labels.jsonl" for place in places)

    def rows():
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0

    for moment in sorted(rng.sample(range(1290), 9)) + [1290]:
        process = start("pseudolabel", flags, places[1], slow=0.0002)
        wait_until(process, lambda moment=moment: rows() >= moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        at_death.append(rows())
    assert ended(start("pseudolabel", flags, places[1]), places[1]) == (0, [])
    assert path.read_bytes() == whole.read_bytes()
    assert len(set(at_death)) > 5  # at different rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_labeling_stopped_by_a_signal_says_how_to_go_on(start, student, tmp_path, number):
    path, flags = tmp_path / "labels.jsonl", labeling(student)
    process = start("pseudolabel", flags, tmp_path, slow=0.001)
    wait_until(process, lambda: path.exists() and path.read_bytes().count(b"\n") > 50)
    os.kill(process.pid, number)
    code, said = ended(process, tmp_path)
    assert code == 130 and len(said) == 1 and "same command" in said[0]
    assert ended(start("pseudolabel", flags, tmp_path), tmp_path) == (0, [])
    assert path.read_bytes().count(b"\n") == 1298


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, digits_file, student):
    """A folder with good, damaged and misplaced files of every kind."""
    place, labels = tmp_path_factory.mktemp("shelf"), digits_file.read_bytes()
    texts = "".join(f"{word} {i},{word}\n" for word in ("tea", "sea") for i in range(4))
    files = {
        "labels.jsonl": labels, "half.jsonl": labels[: len(labels) // 2],
        "damaged.jsonl": labels[:9000] + labels, "notes.txt": "no placeholder", "empty": "",
        "other.jsonl": labels.replace(b'"order"', b'"odd"', 1), "columns.csv": "a,b\n1,2\n",
        "my.csv": f"text,label\n{texts}", "same.csv": f"text,label\n{texts}", "empty.csv": "",
        "unlabeled.csv": "text,label\none,\ntwo,\n", "commas.csv": "text,label\none, two,a\n",
        "latin.csv": b"text,label\n\xfc,a\n", "bad.jsonl": '{"text": "one", "label": 1}\n{"text',
        "list.jsonl": "[1]\n", "stranger.csv": "text,label\nnew,coffee\n",
        "garbage.pt": b"PK garbage", "run/args.json": '{"num_labels": 10}', "run/env.json": "{}",
        "damaged/args.json": "{",
        "other/args.json": json.dumps({"variant": "paper"}), "run/checkpoint.pt": b"garbage",
        "cut/model.safetensors": b"\x09\x00\x00", "odd/model.safetensors": b"",
        "cut/config.json": (student / "config.json").read_bytes(), "odd/config.json": "[]",
        "model/config.json": '{"model_type": "nothing"}', "flat/a.txt": "", "shares.json": "{}",
        "unread/train/a/1.png": b"no picture", "unread/train/b/1.png": b"no picture",
    }  # fmt: skip
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    folders = ("one/train/a", "extra/train/a", "extra/train/b", "extra/test/c")
    for number, name in enumerate(folders):
        (place / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / name / "1.png")
    torch.save({"conv1.weight": torch.zeros(3)}, place / "misfit.pt")
    torch.save([torch.zeros(3)], place / "list.pt")
    torch.save({"model": 3}, place / "number.pt")
    np.save(place / "ten.npy", np.arange(10))
    (place / "student").symlink_to(student)
    return place


IMPORT, STUDENT = "pseudolabel --teacher import --input", "pseudolabel --teacher student --student"
TEXT = "pseudolabel --dataset my.csv --teacher text"
BAD_NUMBERS = {  # of scripts: what is out of range
    "zeromatch": "lr -1, lr nan, lr inf, tau 1.5, lambda-p -1, lambda-u nan, seed -1, num-steps 0, "
    "num-steps-stage1 0, warmup-steps -1, eval-every 0, log-every 0, batch-size 0, uratio 0, "
    "ema-decay 1, layer-decay 2, weight-decay -0.1, marginal-decay 2, num-labels 15, "
    "num-labels -10, num-labels 9990",
    "kd_fixmatch": "tau-select 2, tau-inner -1, sce-alpha -1, sce-beta nan",
    "pseudolabel": "dry-run 0, batch-size -1, temperature nan, timeout inf, price-in -1",
}
NUMBERS = [  # (command line; what its one line names)
    (f"{script} --{flag}", f"--{flag.split()[0]}.*expected")
    for script, flags in BAD_NUMBERS.items()
    for flag in flags.split(", ")
]
BAD_INPUT = [
    # options that do not go together, or need another one
    ("zeromatch --agreement --stages 1", "--agreement"),
    ("zeromatch --prior teacher --stages 1", "--prior"),
    ("zeromatch --prior nowhere.json", "--prior nowhere.json"),
    ("zeromatch --prior shares.json", "--prior .*shares.json.*expected"),
    ("adamatch --pseudolabels labels.jsonl", "--pseudolabels.*--feature-input"),
    ("adamatch --feature-input --pseudolabels labels.jsonl", "--feature-input needs.*test"),
    ("zeromatch --device mps", "--device mps"),
    ("zeromatch --test-file my.csv", "--test-file.*digits"),
    ("adamatch --backbone vit_small_patch16_224", "--backbone vit_small_patch16_224.*8 pixels"),
    # files and folders of a wrong kind, damaged, or of something else
    ("zeromatch --dataset no_such", "--dataset no_such: expected digits, "),
    ("zeromatch --dataset nowhere.csv", "nowhere.csv.*No such file"),
    ("zeromatch --dataset flat", "flat: found classes ..; expected 2 in train/<class>/"),
    ("zeromatch --dataset one", "one: found classes .'a'.; expected 2"),
    ("zeromatch --dataset extra", "extra/test: has labels .'c'"),
    ("zeromatch --dataset unread", "unread.*none of the 2"),
    ("zeromatch --dataset columns.csv", "found columns a, b; expected text,ori.*--text-column"),
    ("zeromatch --dataset commas.csv", "commas.csv.*row 1.*quote"),
    ("zeromatch --dataset latin.csv", "latin.csv.*utf-8"),
    ("zeromatch --dataset empty.csv", "empty.csv: found classes ..; expected 2"),
    ("zeromatch --dataset unlabeled.csv", "unlabeled.csv: found classes ..; expected 2"),
    ("zeromatch --dataset bad.jsonl", "bad.jsonl.*row 2"),
    ("zeromatch --dataset list.jsonl", "list.jsonl.*row 1"),
    ("zeromatch --dataset my.csv --test-file nowhere.csv", "nowhere.csv.*No such file"),
    ("zeromatch --dataset my.csv --test-file same.csv --num-labels 4", "--num-labels 4"),
    ("zeromatch --dataset my.csv --test-file stranger.csv", "stranger.csv.*coffee"),
    ("zeromatch --dataset my.csv --num-labels 4", "labels of my.*--pseudolabels"),
    ("zeromatch --pseudolabels nowhere.jsonl", "nowhere.jsonl"),
    ("zeromatch --pseudolabels flat", "flat"),
    ("zeromatch --pseudolabels empty", "empty"),
    ("zeromatch --pseudolabels my.csv", "my.csv"),
    ("zeromatch --pseudolabels half.jsonl", "half.jsonl"),
    ("zeromatch --pseudolabels damaged.jsonl", "damaged.jsonl: line"),
    ("zeromatch --pseudolabels other.jsonl", "other.jsonl.*order"),
    ("zeromatch --pseudolabels labels.jsonl --pseudolabels-test labels.jsonl", "jsonl.*test"),
    ("zeromatch --resume nowhere", "--resume nowhere.*folder of a run"),
    ("zeromatch --resume damaged", "--resume damaged.*folder of a run"),
    ("zeromatch --resume other", "--resume other.*folder of a run"),
    ("adamatch --resume run --num-labels 20", "--num-labels 20: the run has 10"),
    ("adamatch --resume run", "run/checkpoint.pt is damaged"),
    ("zeromatch --runs-dir notes.txt --pseudolabels labels.jsonl", "notes.txt|Not a directory"),
    ("adamatch --backbone resnet_1", "--backbone resnet_1.*expected cnn, "),
    ("adamatch --backbone model", "--backbone .*model.*expected cnn, "),
    ("adamatch --dataset my.csv --backbone flat --num-labels 4", "flat"),
    ("adamatch --dataset my.csv --backbone no_such --num-labels 4", "no_such"),
    *((f"adamatch --weights {name}", f"--weights .*{name}.*--weights none") for name in (
        "nowhere.pt", "garbage.pt", "list.pt", "number.pt", "misfit.pt", "cut/model.safetensors")),
    *((f"{IMPORT} {name}", name) for name in ("nowhere.npy", "garbage.pt", "list.pt", "ten.npy")),
    *((f"{STUDENT} {name}", name) for name in ("nowhere", "cut", "odd")),
    (f"{STUDENT} student --dataset my.csv", "--student student"),
    *((f"{TEXT} --prompt {name}", name) for name in ("nowhere", "notes.txt", "latin.csv")),
]  # fmt: skip


@pytest.mark.parametrize("line, expected", NUMBERS + BAD_INPUT, ids=lambda value: value[:60])
def test_bad_input_is_one_line_and_exit_code_2(start, shelf, line, expected):
    script, *flags = shlex.split(line)
    code, said = ended(start(script, flags, shelf), shelf)
    assert code == 2 and len(said) == 1, (code, said, (shelf / "out").read_text()[-2000:])
    assert said[0].startswith(f"{script}.py: error: ") and re.search(expected, said[0]), said[0]


@pytest.mark.parametrize("line, named", [
    ("zeromatch --lr abc", "abc"), ("zeromatch --lr", "--lr"), ("zeromatch --lrr 0.1", "--lrr"),
    ("zeromatch --stages 3", "--stages"), ("zeromatch digits", "digits"),
    ("kd_fixmatch --pseudolabels x", "--pseudolabels"), ("pseudolabel --teacher gpt", "gpt"),
])  # fmt: skip
def test_a_command_line_that_cannot_be_parsed_names_the_option(start, shelf, line, named):
    script, *flags = shlex.split(line)
    code, said = ended(start(script, flags, shelf), shelf)
    assert code == 2 and named in "".join(said) and "Traceback" not in "".join(said)


@pytest.mark.parametrize("script", ["zeromatch", "adamatch", "kd_fixmatch", "pseudolabel"])
def test_help_is_whole_and_exit_code_0(start, tmp_path, script):
    assert ended(start(script, ["--help"], tmp_path), tmp_path) == (0, [])
    fields, said = importlib.import_module(script).Args.__dataclass_fields__, tmp_path / "out"
    assert not [n for n in fields if f"--{n.replace('_', '-')}" not in said.read_text()]


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
    ("w.pth", "adamatch --backbone wrn_28_2 --weights w.pth"),
    ("w.safetensors", "adamatch --weights w.safetensors"),
    ("bert/pytorch_model.bin", "adamatch --dataset my.csv --num-labels 4 --backbone bert"),
    ("bert/config.json", "adamatch --dataset my.csv --num-labels 4 --backbone bert"),
    ("vit/pytorch_model.bin", "adamatch --backbone vit"), ("in.pt", f"{IMPORT} in.pt"),
    ("in.npy", f"{IMPORT} in.npy"), ("in.csv", f"{IMPORT} in.csv"),
    ("student/model.safetensors", f"{STUDENT} student"),
    ("student/config.json", f"{STUDENT} student"), ("my.csv", "zeromatch --dataset my.csv"),
    ("my.jsonl", "zeromatch --dataset my.jsonl"),
    ("l.jsonl", "zeromatch --pseudolabels l.jsonl"), ("ask.txt", f"{TEXT} --prompt ask.txt"),
    ("p.json", "zeromatch --prior p.json"),
]  # fmt: skip


def fill_place(place, student):
    """Files that make every command line of PLACES get as far as the hostile one."""
    import tiny_models

    for name in ("run", "vit"):
        (place / name).mkdir()
    vit = {"model_type": "vit", "hidden_size": 12, "num_attention_heads": 2, "image_size": 8}
    vit |= {"num_hidden_layers": 1, "patch_size": 4, "intermediate_size": 12}
    (place / "vit" / "config.json").write_text(json.dumps(vit))
    texts = "".join(f"{w} {i},{w}\n" for w in ("tea", "sea") for i in range(4))
    (place / "my.csv").write_text(f"text,label\n{texts}")
    tiny_models.encoder(place / "bert")
    (place / "bert" / "model.safetensors").unlink()
    (place / "student").mkdir()
    for name in ("model.safetensors", "config.json"):
        (place / "student" / name).write_bytes((student / name).read_bytes())


@pytest.mark.parametrize("name, line", PLACES, ids=lambda value: value[:60])
def test_a_hostile_pickle_is_one_line_and_executes_nothing(
    start, student, digits_file, tmp_path, name, line
):
    fill_place(tmp_path, student)
    mark, (script, *flags) = tmp_path / "executed", shlex.split(line)
    saved = {"runs_dir": "runs"}
    saved |= {"pseudolabels": str(digits_file)} if script == "zeromatch" else {}
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved))
    hostile = Hostile(mark)
    content = {"stage": 1, "step": 1, "seconds": 0.0, "history": [], "pending": {},
               "metrics_bytes": 0, "model": hostile, "probs": hostile}  # fmt: skip
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
        assert not mark.exists() and code == 2, (code, said)
        assert "error: " in said[-1] and "Traceback" not in "".join(said), said  # torch may warn


@pytest.mark.parametrize("line", [
    "adamatch --backbone remote", "adamatch --dataset my.csv --num-labels 4 --backbone remote",
    f"{STUDENT} student", f"{TEXT} --model remote", "pseudolabel --teacher clip --model remote",
])  # fmt: skip
def test_code_that_a_model_folder_brings_is_not_executed(start, student, tmp_path, line):
    fill_place(tmp_path, student)
    (tmp_path / "student" / "encoder").symlink_to(tmp_path / "remote")
    (tmp_path / "remote").mkdir()
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForCausalLM")
    config = {"model_type": "evil", "auto_map": {name: f"evil.{name}" for name in kinds}}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    (tmp_path / "remote" / "evil.py").write_text("open('executed', 'w')\n")
    script, *flags = shlex.split(line)
    code, said = ended(start(script, flags, tmp_path), tmp_path)
    assert not (tmp_path / "executed").exists()
    assert code == 2 and len(said) == 1, (code, said, (tmp_path / "out").read_text()[-2000:])


# ---------------------------------------------------------------------------- damaged files


def damaged(rng, content):
    """The content cut, or with bytes flipped, inserted, lost, doubled or zeroed, here and there."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(content) + 1), rng.randint(1, 30)
        rest, some = content[at:], rng.randbytes(length)
        signs = bytes(rng.choices(b'0123456789{}[]",:.-\n\r\\ e', k=rng.randint(1, 4)))
        flipped = bytes([rest[0] ^ 1 << rng.randrange(8)] if rest else [])
        content = content[:at] + rng.choice([
            b"", some + rest, some + rest[length:], signs + rest, signs + rest[len(signs) :],
            rest[length:], rest[:length] + rest, bytes(length) + rest[length:], flipped + rest[1:],
        ])  # fmt: skip
    return content


@pytest.fixture
def small_labels(tmp_path):
    """(data of 12 pictures and 3 classes, arguments that import labels, lines of the file)."""
    x = np.random.RandomState(0).randint(0, 256, (12, 1, 2, 2)).astype(np.uint8)
    data = common.Data("pictures", ["a", "b", "c"], common.Split(x, np.arange(12) % 3), None)
    np.save(tmp_path / "in.npy", [*np.random.RandomState(1).randint(0, 3, 11).tolist(), -1])
    given = {"input": str(tmp_path / "in.npy"), "output": str(tmp_path / "l.jsonl")}
    args = pseudolabel.Args(teacher="import", **given)
    pseudolabel.label(data, args)
    return data, args, (tmp_path / "l.jsonl").read_bytes().splitlines(keepends=True)


def test_a_damaged_label_file_is_refused_or_keeps_every_whole_label(tmp_path, small_labels):
    """Also when labeling goes on with it; a refused file stays as it is."""
    rng, outcomes = random.Random(4), {"refused": 0, "read": 0, "finished": 0}
    (data, args, (header, *lines)), path = small_labels, tmp_path / "l.jsonl"
    rows = [json.loads(line) for line in lines]
    labels = [-1 if row["label"] is None else row["label"] for row in rows]
    for row in rows[::2]:
        row["probs"] = np.eye(3)[row["label"]].tolist()
    lines = [(json.dumps(row) + "\n").encode() for row in rows]
    for trial in range(600):
        content = damaged(rng, header + b"".join(lines))
        path.write_bytes(content)
        kept = [i for i, line in enumerate(lines) if line in content.splitlines(keepends=True)]
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
            assert all(found[i] == labels[i] for i in kept), trial
            assert found.shape == (12,) and (-1 <= found).all() and (found < 3).all(), trial
            assert probs is None or (probs.shape == (12, 3) and np.isfinite(probs).all()), trial
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_damaged_text_file_is_refused_or_read_row_by_row(tmp_path, suffix):
    rng, outcomes, path = random.Random(5), {"refused": 0, "read": 0}, tmp_path / f"my.{suffix}"
    texts = ['tea, "hot"', "na\u00efve \U0001f600", "two\nlines", "plain", "7", "x" * 50]
    rows = [(f"{text} {i}", label) for i, text in enumerate(texts) for label in ("a", "b", "")]
    if suffix == "csv":
        quoted = ('"' + text.replace('"', '""') + f'",{label}' for text, label in rows)
        lines = [f"{line}\n" for line in ("text,label", *quoted)]
    else:
        given = (dict(zip(("text", "label"), row, strict=True)) for row in rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in given]
    for trial in range(601):
        content = "".join(lines).encode()
        path.write_bytes(content := damaged(rng, content) if trial else content)
        try:
            read = common.read_own(str(path), "train")
        except common.UserError as error:
            assert "\n" not in str(error), trial
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(read.x) == len(read.y) and all(read.x), trial
        found = list(zip(read.x, read.y, strict=True))
        assert trial or found == rows
        if suffix == "jsonl":  # a line means the same whatever is around it
            kept = content.decode().splitlines(keepends=True)
            kept = {row for row, line in zip(rows, lines, strict=True) if line in kept}
            assert kept <= set(found), trial
    assert min(outcomes.values()) > 10
