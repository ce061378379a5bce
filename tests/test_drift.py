"""What several scripts share is the same text in each of them."""

import ast
import inspect
from dataclasses import MISSING, fields
from itertools import combinations

import pytest

import adamatch
import kd_fixmatch
import zeromatch

SCRIPTS = [zeromatch, adamatch, kd_fixmatch]
OWN = {"main", "forward"}  # same name, another job
METHOD_DEFAULTS = {"tau"}  # the field's default may differ between methods
SAME_WORDS = (
    "dataset test_file text_column label_column num_labels seed data_dir runs_dir resume device "
    "amp compile log_every track eval_every backbone weights freeze batch_size optimizer lr "
    "weight_decay layer_decay ema_decay lambda_u"
).split()
each_script = pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
PAIRS = list(combinations(SCRIPTS, 2))
each_pair = pytest.mark.parametrize("a, b", PAIRS, ids=lambda m: m.__name__)


def functions(module):
    own = {name: f for name, f in vars(module).items() if inspect.isfunction(f)}
    return {name: f for name, f in own.items() if f.__module__ == module.__name__}


@each_pair
def test_functions_of_the_same_name_are_the_same_text(a, b):
    shared = (functions(a).keys() & functions(b).keys()) - OWN
    assert {"lr_at", "hard_labels", "loss_consistency"} <= shared
    for name in shared:
        assert inspect.getsource(getattr(a, name)) == inspect.getsource(getattr(b, name)), name


def described_fields(module):
    """{field: its help: the comment beside it, or the docstring under it} of Args."""
    tree, lines = ast.parse(inspect.getsource(module)), inspect.getsource(module).splitlines()
    (args,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    found = {}
    for node, following in zip(args.body, args.body[1:] + [ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign):
            _, _, comment = lines[node.end_lineno - 1].partition("  # ")
            under = following.value.value if isinstance(following, ast.Expr) else ""
            found |= {node.target.id: comment or under} if comment or under else {}
    return found


@each_script
def test_every_field_is_documented_and_has_a_default(module):
    assert described_fields(module).keys() == {f.name for f in fields(module.Args)}
    assert all(f.default is not MISSING for f in fields(module.Args))


@each_pair
def test_shared_fields_have_the_same_type_default_and_words(a, b):
    one, other = ({f.name: f for f in fields(m.Args)} for m in (a, b))
    for name in (one.keys() & other.keys()) - METHOD_DEFAULTS:
        assert one[name].type == other[name].type, name
        assert one[name].default == other[name].default, name
    words = [described_fields(module) for module in (a, b)]
    assert [name for name in SAME_WORDS if words[0][name] != words[1][name]] == []


@each_script
def test_a_script_imports_no_other_method_script(module):
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not names & ({m.__name__ for m in SCRIPTS} - {module.__name__})
