"""README and docstrings say what the code does; the files stay within their budgets."""

import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from runs import write_labels

import common
import pseudolabel

ROOT = Path(__file__).parent.parent
METHODS = ["zeromatch", "adamatch", "kd_fixmatch"]
SCRIPTS = [*METHODS, "pseudolabel"]
BUDGETS = {  # file: (lines, code tokens)
    "common.py": (1500, 15_000),
    "pseudolabel.py": (1000, 10_500),
    "zeromatch.py": (420, 3_000),
    "adamatch.py": (420, 3_000),
    "kd_fixmatch.py": (440, 3_500),
}


def code_tokens(source: str) -> int:
    """Tokens without comments, docstrings, newlines and indents; an f-string is one token."""
    nodes = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    docs = {(n.lineno, n.col_offset) for n in nodes if isinstance(getattr(n, "value", None), str)}
    space = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        depth -= name == "FSTRING_END"  # Python 3.12 and later cut f-strings up
        count += name not in space and token.start not in docs and depth == 0
        depth += name == "FSTRING_START"
    return count


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_stays_within_its_budget(name, capsys):
    source = (ROOT / name).read_text()
    lines, tokens = len(source.splitlines()), code_tokens(source)
    widest = max(map(len, source.splitlines()))
    with capsys.disabled():
        print(f"\n{name}: {lines} lines, {tokens} code tokens, widest line {widest}", end=" ")
    assert lines <= BUDGETS[name][0] and tokens <= BUDGETS[name][1] and widest <= 100


def test_code_tokens_leave_out_comments_and_docstrings():
    source = '"""Doc."""\nx = f"{1}"  # why\n\n\ndef f():\n    """Doc."""\n    return x\n'
    assert code_tokens(source) == 10  # x = f"{1}" | def f ( ) : | return x


def test_the_readme_stays_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1700 and len(text.splitlines()) <= 170


def test_no_line_of_the_tests_is_wider_than_100_columns():
    wide = [
        f"{path.name}:{number}"
        for path in Path(__file__).parent.glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_inline_metadata_are_the_requirements(script):
    source = (ROOT / f"{script}.py").read_text()
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    rows = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["dependencies"] == [row for row in rows if row and not row.startswith("#")]
    assert metadata["requires-python"] == ">=3.11" and source.startswith("# /// script")


def commands() -> list[tuple[str, str]]:
    """Every `python SCRIPT.py ...` of README, RESULTS and docstrings (up to three blanks or a #);
    a | b are two commands."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "tests/RESULTS.md")]
    for script in SCRIPTS:
        doc = importlib.import_module(script).__doc__
        texts.append(re.sub(r"(python .*?) {3,}.*", r"\1", doc))
    found = set()
    text = "\n".join(texts).replace("\\\n", " ")
    for script, rest in re.findall(r"python (\w+)\.py((?: [^\n`#]*)?)", text):
        if script in SCRIPTS and not re.search(r"[$<]|\.\.\.", rest):
            rest = re.sub(r"[;&)].*", "", rest)
            found |= {(script, one.strip()) for one in rest.split(" | ")}
    return sorted(found)


@pytest.mark.parametrize("script, arguments", commands())
def test_every_command_in_the_documentation_parses(script, arguments):
    args = tyro.cli(importlib.import_module(script).Args, args=shlex.split(arguments))
    assert args is not None


def test_there_are_commands_to_check():
    assert {script for script, _ in commands()} == set(SCRIPTS)


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    data = common.load_data("digits", "data")
    path = tmp_path_factory.mktemp("labels") / "made-up.jsonl"
    header = pseudolabel.header_of(data, "train", "made up", "")
    write_labels(path, header, np.eye(10)[data.train.y * 0])
    return str(path)


def test_the_readme_lists_the_metrics_that_are_logged_and_no_others(tmp_path, labels):
    own = {
        "zeromatch": {"stages": "2", "pseudolabels": labels},
        "adamatch": {"variant": "paper"},
        "kd_fixmatch": {"tau_select": 0.1, "num_labels": 40, "num_steps": 40, "ema_decay": 0.5},
    }
    logged = set()
    for script, options in own.items():
        module = importlib.import_module(script)
        folders = {"data_dir": str(tmp_path), "runs_dir": str(tmp_path)}
        args = module.Args(num_steps=4, eval_every=2, log_every=2, **folders)
        module.main(replace(args, **options))
        (metrics,) = tmp_path.glob(f"{script}-*/metrics.jsonl")
        logged |= {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"`((?:train|test|time)/\w+)`", readme))
    assert logged - {"stage", "step"} == listed - {"train/labeled_acc"}


@pytest.mark.parametrize("script", METHODS)
def test_a_script_copied_into_an_empty_folder_runs(script, tmp_path, labels):
    """adamatch.py and kd_fixmatch.py need common.py alone beside them."""
    for name in [script, "common", *(["pseudolabel"] if script == "zeromatch" else [])]:
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    extra = ["--pseudolabels", labels] if script == "zeromatch" else []
    command = [sys.executable, f"{script}.py", "--num-steps", "2", *extra]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/student/model.safetensors"))


@pytest.mark.parametrize("script", METHODS)
def test_the_method_functions_pasted_elsewhere_need_only_torch(script):
    source = (ROOT / f"{script}.py").read_text()
    (method,) = re.findall(r"# -+ the method\n(.*?)# -+ ", source, flags=re.S)
    pasted = (
        "from __future__ import annotations\nimport math\nfrom typing import Any\nimport torch\n"
        f"import torch.nn.functional as F\nfrom torch import Tensor, nn\n{method}\n"
    )
    names = {}
    exec(compile(pasted, script, "exec"), names)
    label, mask = names["hard_labels"](torch.tensor([[0.9, 0.1]]), 0.5)
    loss = names["loss_consistency"](torch.zeros(1, 2), label, mask)
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)
    assert names["lr_at"](5, 10, 10) == 0.5
    for name in ("ce", "sce", "mae", "nce") if script == "kd_fixmatch" else ():
        assert names["loss_robust"](name, torch.zeros(1, 2), label, mask, 1.0, 0.1) > 0
