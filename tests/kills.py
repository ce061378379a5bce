"""Kills short trainings at random moments, resumes them, and compares what they leave with that of
an uninterrupted training. Run by hand, on digits, with real processes and signals.

    python tests/kills.py                             20 cases of every signal, 15 minutes
    python tests/kills.py --signals SIGKILL --number 5 --script kd_fixmatch
    python tests/kills.py --twice                     two runs, or two resumes of one run, at once

Equal means: the student's weights byte for byte, the figures of result.json, and every row of
metrics.jsonl but its times.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIGNALS = ("SIGHUP", "SIGTERM", "SIGINT", "SIGKILL")
FLAGS = ["--device", "cpu", "--eval-every", "10", "--log-every", "1", "--warmup-steps", "5"]
STEPS = {
    "zeromatch": ["--num-steps", "60", "--num-steps-stage1", "60"],
    "adamatch": ["--num-steps", "120"],
    "kd_fixmatch": ["--num-steps", "60"],
}
STEP = re.compile(r"stage \d+ step \d+/")  # begins what a training prints at every step


def run_script(command: list[str], work: Path, out: int, error: int, moment: float) -> None:
    """In a child: a script's command line at a moment, in folder `work`. Signals act as in a
    terminal, although nohup, or & in a shell, make processes ignore some."""
    for name in SIGNALS[:2]:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.chdir(work)
    sys.argv = command
    time.sleep(max(0, moment - time.time()))
    runpy.run_path(command[0], run_name="__main__")


class Training:
    """A process that runs one of the scripts; forked, because imports take longer than training."""

    def __init__(self, script: str, work: Path, *flags: str, moment: float = 0) -> None:
        (out, to_out), (error, to_error) = os.pipe(), os.pipe()
        command = [str(ROOT / f"{script}.py"), *flags]
        self.out, self.error = os.fdopen(out), os.fdopen(error)
        self.process = multiprocessing.get_context("fork").Process(
            target=run_script, args=(command, work, to_out, to_error, moment)
        )
        self.process.start()
        os.close(to_out)
        os.close(to_error)

    def kill(self, number: int, at: int, delay: float) -> int:
        """Send a signal `delay` seconds after it has printed `at` steps; how it ended."""
        for line in self.out:
            at -= bool(STEP.match(line))
            if not at:
                break
        time.sleep(delay)
        os.kill(self.process.pid, number)  # if it has ended, nothing happens: it is not yet joined
        return self.end()[0]

    def end(self) -> tuple[int, str]:
        """Wait; (exit code, what it wrote to standard error)."""
        with self.out, self.error:
            self.out.read()
            said = self.error.read()
        self.process.join()
        return self.process.exitcode, said.strip()


def start(script: str, work: Path, name: str, moment: float = 0) -> Training:
    """A new run in the folder `name`."""
    return Training(script, work, *STEPS[script], *FLAGS, "--runs-dir", name, moment=moment)


def only_run(work: Path, name: str) -> Path:
    """The folder of the run in work/name."""
    (found,) = (work / name).glob("*/args.json")
    return found.parent


def left_by(run: Path) -> dict[str, object]:
    """What equal runs share; nothing, if the run has not ended."""
    if not (run / "result.json").exists():
        return {}
    result = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "student": (run / "student" / "model.safetensors").read_bytes(),
        "result": {k: v for k, v in result.items() if k not in ("seconds", "args")},
        "metrics": [{k: v for k, v in row.items() if "time/" not in k} for row in rows],
    }


def differing(run: Path, straight: dict[str, object]) -> list[str]:
    """Names of what is not as in the uninterrupted run."""
    mine = left_by(run)
    return [name for name in straight if mine.get(name) != straight[name]]


def killed(case: str, rng: random.Random, steps: int, pace: float, script: str, work: Path,
           name: str, straight: dict) -> tuple[list, list]:  # fmt: skip
    """A run is killed once or twice, each time resumed. (how it ended, what is wrong)."""
    ends, left, training = [], steps, start(script, work, name)
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(1, max(2, left - 1))
        ends.append(training.kill(getattr(signal, case), at, rng.uniform(0, 1.5 * pace)))
        left, run = left - at, only_run(work, name)
        training = Training(script, work, "--resume", str(run))
    code, said = training.end()
    wrong = [f"resume ends with {code}: {said[-200:]}"] if code else []
    return ends, wrong + differing(run, straight)


def same_second(script: str, work: Path, name: str, straight: dict) -> tuple[list, list]:
    """Two runs of one command begin at one moment, early in a second."""
    moment = int(time.time()) + 2.0
    ends = [one.end() for one in [start(script, work, name, moment) for _ in range(2)]]
    runs = sorted(at.parent for at in (work / name).glob("*/args.json"))
    print(f"{name}:", *(run.name for run in runs), file=sys.stderr)
    wrong = [said[-200:] for code, said in ends if code] + [f"{len(runs)} folder"] * (len(runs) < 2)
    wrong += [what for run in runs for what in differing(run, straight)]
    return [code for code, _ in ends], wrong


def two_resumes(script: str, work: Path, name: str, straight: dict) -> tuple[list, list]:
    """A run is interrupted; two resumes of it begin at one moment: one is to be refused."""
    start(script, work, name).kill(signal.SIGINT, 5, 0)
    run, moment = only_run(work, name), time.time() + 1
    pair = [Training(script, work, "--resume", str(run), moment=moment) for _ in range(2)]
    (code, said), (other, refusal) = sorted(one.end() for one in pair)
    print(f"{name}: {code} {said[-200:]} and {other} {refusal[-300:]}", file=sys.stderr)
    wrong = [] if code == 0 else [f"none continues: {said[-200:]}"]
    one_line = len(refusal.splitlines()) == 1 and run.name in refusal
    if other != 2 or not one_line or "could not write" in refusal:  # the first one's file
        wrong.append("none is refused in one line with the folder's name")
    return [code, other], wrong + differing(run, straight)


def main(
    script: Literal["zeromatch", "adamatch", "kd_fixmatch"] = "zeromatch",
    signals: tuple[str, ...] = SIGNALS, number: int = 20, seed: int = 0, twice: bool = False,
) -> None:  # fmt: skip
    """number: cases of each signal or kind. seed: decides the moments. twice: pairs at once."""
    importlib.import_module(script)
    importlib.import_module("sklearn.datasets")
    pairs = {"same second": same_second, "two resumes": two_resumes}
    with tempfile.TemporaryDirectory() as folder:
        work, straight = Path(folder), {}
        for name in ("first", "second"):  # the first one makes the teacher's labels
            training = start(script, work, name)
            times = [time.perf_counter() for line in training.out if STEP.match(line)]
            code, said = training.end()
            assert code == 0, said
            other, straight = straight, left_by(only_run(work, name))
        assert straight == other, "two uninterrupted runs differ"
        steps, pace = len(times), (times[-1] - times[0]) / len(times)
        print(f"{script}: {steps} steps, one every {1000 * pace:.0f} ms\n")
        print("case | n | equal | exit codes | what differed\n" + "--- | " * 4 + "---", flush=True)
        for case in pairs if twice else signals:
            codes, wrong, rng = Counter(), [], random.Random(f"{seed} {case}")
            check = pairs.get(case) or partial(killed, case, rng, steps, pace)
            for i in range(number):
                name = f"{case}-{i}".replace(" ", "-")
                ends, what = check(script, work, name, straight)
                codes.update(ends)
                wrong += [f"case {i}: {', '.join(what)}"] if what else []
            ended = ", ".join(f"{code} x{n}" for code, n in codes.items())
            row = case, number, number - len(wrong), ended, "; ".join(wrong) or "-"
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
