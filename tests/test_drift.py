"""What stands in several scripts stands there word for word."""

import ast
import inspect
from dataclasses import MISSING, fields

import pytest

import adamatch
import kd_fixmatch
import zeromatch

SCRIPTS = [zeromatch, adamatch, kd_fixmatch]
OWN = {"main", "forward"}  # same name, another job
METHOD_DEFAULTS = {"tau"}  # the field's default may differ between methods


def functions(module):
    return {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}


def pairs():
    return [(a, b) for i, a in enumerate(SCRIPTS) for b in SCRIPTS[i + 1 :]]


@pytest.mark.parametrize("a, b", pairs(), ids=lambda m: m.__name__)
def test_functions_of_the_same_name_are_the_same_text(a, b):
    shared = (functions(a).keys() & functions(b).keys()) - OWN
    assert {"lr_at", "hard_labels", "loss_consistency"} <= shared
    for name in shared:
        assert inspect.getsource(getattr(a, name)) == inspect.getsource(getattr(b, name)), name


def described_fields(module):
    """{field: the docstring under it} of Args."""
    tree = ast.parse(inspect.getsource(module))
    (args,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    return {
        node.target.id: following.value.value
        for node, following in zip(args.body, args.body[1:] + [ast.Pass()], strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr)
    }


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_every_field_is_documented_and_has_a_default(module):
    assert described_fields(module).keys() == {f.name for f in fields(module.Args)}
    assert all(f.default is not MISSING for f in fields(module.Args))


@pytest.mark.parametrize("a, b", pairs(), ids=lambda m: m.__name__)
def test_shared_fields_have_the_same_type_and_default(a, b):
    one, other = ({f.name: f for f in fields(m.Args)} for m in (a, b))
    for name in (one.keys() & other.keys()) - METHOD_DEFAULTS:
        assert one[name].type == other[name].type and one[name].default == other[name].default, name


@pytest.mark.parametrize("a, b", pairs(), ids=lambda m: m.__name__)
def test_run_and_model_fields_are_described_in_the_same_words(a, b):
    one, other = described_fields(a), described_fields(b)
    for name in ("dataset", "num_labels", "seed", "data_dir", "runs_dir", "resume", "device", "amp", "compile", "log_every",
                 "eval_every", "backbone", "batch_size", "optimizer", "lr", "weight_decay", "layer_decay", "ema_decay"):  # fmt: skip
        assert one[name] == other[name], name


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_a_script_imports_no_other_method_script(module):
    names = {
        alias.name
        for n in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(n, ast.Import)
        for alias in n.names
    }
    names |= {n.module for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.ImportFrom)}
    assert not names & ({m.__name__ for m in SCRIPTS} - {module.__name__})
