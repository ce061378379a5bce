"""README and docstrings say what the code does: commands parse, metrics exist, copies run."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = ["zeromatch", "adamatch", "kd_fixmatch", "pseudolabel"]


def commands():
    """Every `python SCRIPT.py ...` of README (up to a #) and docstrings (up to three blanks); a | b are two commands."""
    docs = [re.sub(r"(python .*?) {3,}.*", r"\1", importlib.import_module(s).__doc__) for s in SCRIPTS]
    texts = [ROOT.joinpath("README.md").read_text(), *docs]
    found = set()
    for match in re.finditer(r"python (\w+)\.py((?: [^\n`#]*)?)", "\n".join(texts).replace("\\\n", " ")):
        script, rest = match.group(1), match.group(2) or ""
        if script not in SCRIPTS or "$" in rest or "<" in rest or "..." in rest:
            continue
        rest = re.sub(r"[;&)].*", "", rest)
        found |= {(script, one.strip()) for one in rest.split(" | ")}
    return sorted(found)


@pytest.mark.parametrize("script, arguments", commands())
def test_every_command_in_the_documentation_parses(script, arguments):
    args = tyro.cli(importlib.import_module(script).Args, args=shlex.split(arguments))
    assert args is not None


def test_there_are_commands_to_check():
    assert {script for script, _ in commands()} == set(SCRIPTS)


def test_the_readme_lists_the_metrics_that_are_logged_and_no_others(tmp_path):
    own = {"zeromatch": {"stages": "2", "pseudolabels": made_up_labels(tmp_path)}, "adamatch": {"variant": "original"},
           "kd_fixmatch": {"tau_select": 0.1, "num_labels": 40, "num_steps": 40, "ema_decay": 0.5}}  # fmt: skip
    logged = set()
    for script, options in own.items():
        module = importlib.import_module(script)
        args = module.Args(num_steps=4, eval_every=2, log_every=2, data_dir=str(tmp_path), runs_dir=str(tmp_path))
        module.main(replace(args, **options))
        (metrics,) = tmp_path.glob(f"{script}-*/metrics.jsonl")
        logged |= {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
    listed = set(re.findall(r"`((?:train|test|time)/\w+)`", ROOT.joinpath("README.md").read_text()))
    assert logged - {"stage", "step"} == listed - {"train/agreement", "train/labeled_acc"}  # which need own data


def made_up_labels(folder):
    import numpy as np

    import common
    import pseudolabel

    data = common.load_data("digits", str(folder))
    path = folder / "made-up.jsonl"
    pseudolabel.write_labels(path, pseudolabel.header_of(data, "train", "made up", ""), np.eye(10)[data.train.y * 0])
    return str(path)


@pytest.mark.parametrize("script", ["adamatch", "kd_fixmatch", "zeromatch"])
def test_a_script_copied_with_common_into_an_empty_folder_runs(script, tmp_path):
    needed = [script, "common"] + (["pseudolabel"] if "from pseudolabel" in (ROOT / f"{script}.py").read_text() else [])
    for name in needed:
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    extra = ["--pseudolabels", made_up_labels(tmp_path)] if script == "zeromatch" else []
    command = [sys.executable, f"{script}.py", "--num-steps", "2", *extra]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/student/model.safetensors"))


@pytest.mark.parametrize("script", ["zeromatch", "adamatch", "kd_fixmatch"])
def test_the_method_functions_pasted_elsewhere_need_only_torch(script):
    source = (ROOT / f"{script}.py").read_text()
    (method,) = re.findall(r"# -+ the method\n(.*?)# -+ ", source, flags=re.S)
    pasted = (
        "from __future__ import annotations\nimport math\nfrom typing import Any\nimport torch\n"
        f"import torch.nn.functional as F\nfrom torch import Tensor, nn\n{method}\n"
    )
    names = {}
    exec(compile(pasted, script, "exec"), names)
    import torch

    label, mask = names["hard_labels"](torch.tensor([[0.9, 0.1]]), 0.5)
    assert names["loss_consistency"](torch.zeros(1, 2), label, mask).item() == pytest.approx(0.6931, abs=1e-3)
    assert names["lr_at"](5, 10, 10) == 0.5
    for loss in ("ce", "sce", "mae", "nce", "gce") if script == "kd_fixmatch" else ():
        assert names["loss_robust"](loss, torch.zeros(1, 2), label, mask, 1.0, 0.1) > 0


def test_line_budgets_hold():
    budgets = {"zeromatch.py": 392, "adamatch.py": 380, "kd_fixmatch.py": 420, "README.md": 260}
    for name, most in budgets.items():
        assert len((ROOT / name).read_text().splitlines()) <= most, name
