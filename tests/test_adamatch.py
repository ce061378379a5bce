"""adamatch.py: what it adds to the functions it shares with zeromatch.py, and whole short runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import (
    checkpoint, column, differences, digits_labels, digits_views, dying_at, new_student, only_run,
    other_hidden_labels, shuffled, weights,
)  # fmt: skip

import adamatch
import common

SHORT = dict(num_steps=12, eval_every=6, log_every=3, warmup_steps=2, batch_size=8, uratio=2)


def args_of(folder, **changes):
    return adamatch.Args(**{"data_dir": "data", "runs_dir": str(folder), **SHORT, **changes})


def go(folder, **changes):
    adamatch.main(args_of(folder, **changes))
    return only_run(folder)


@pytest.mark.parametrize("lambda_u, weights", [
    (1, [0, 0.5, 1, 1, 1]), (3, [0, 0.5, 1, 2, 3]), (0, [0, 0.5, 1, 0.5, 0]),
])  # fmt: skip
def test_the_weight_of_loss_u_reaches_1_at_half_time_and_lambda_u_at_the_end(lambda_u, weights):
    found = [adamatch.u_weight_at(step, 100, lambda_u) for step in range(0, 101, 25)]
    assert found == pytest.approx(weights)


def test_interpolated_logits_lie_between_both_passes_and_carry_both_gradients():
    joint = torch.tensor([[1.0, 2.0]], requires_grad=True)
    alone = torch.tensor([[3.0, -2.0]], requires_grad=True)
    out = adamatch.interpolate_logits(joint, alone, torch.tensor([[0.25, 0.5]]))
    assert out.tolist() == [[1.5, 0.0]]
    out.sum().backward()
    assert joint.grad.tolist() == [[0.75, 0.5]] and alone.grad.tolist() == [[0.25, 0.5]]


def test_window_holds_the_last_128_batch_means():
    window = torch.full((128, 3), 1 / 3)
    batches = torch.rand(300, 5, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    for step, probs in enumerate(batches):
        window = adamatch.update_window(window, probs, step)
        if step == 1:
            expected = (batches[:2].mean(dim=1).sum(dim=0) + 126 / 3) / 128
            assert torch.allclose(window.mean(dim=0), expected, atol=1e-6)
    assert torch.allclose(window.mean(dim=0), batches[-128:].mean(dim=(0, 1)), atol=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return digits_labels(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with the default method."""
    return go(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("changes", [
    {}, {"variant": "paper"}, {"supervised_only": True}, {"feature_input": True},
    {"lambda_u": 0.3}, {"tau": 0.5},
], ids=str)  # fmt: skip
def test_every_variant_runs_differs_from_adamatch_and_resumes_exactly(
    tmp_path, monkeypatch, plain, teacher, changes
):
    changes = changes | (teacher if "feature_input" in changes else {})
    folder = go(tmp_path / "a", **changes)
    assert 0 <= json.loads((folder / "result.json").read_text())["test_acc"] <= 100
    tau = json.loads((folder / "args.json").read_text())["tau"]
    assert tau == changes.get("tau", 0.9 if changes.get("variant") == "paper" else 0.95)
    first = "model.encoder.0.0.weight"
    assert torch.equal(weights(folder)[first], weights(plain)[first]) == (not changes)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(common.Run, "log", dying_at(1, 8))
        go(tmp_path / "b", **changes)
    killed = only_run(tmp_path / "b")
    saved = adamatch.Args(**json.loads((killed / "args.json").read_text()))
    adamatch.main(replace(saved, resume=str(killed)))
    assert differences(folder, killed) == []


@pytest.mark.parametrize("variant", ["usb", "paper"])
def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, variant):
    """One step, its losses and running statistics recomputed from the same weights and views."""
    own = {"num_steps": 1, "warmup_steps": 0, "log_every": 1, "uratio": 4, "tau": 0.8}
    own["variant"] = variant
    run, paper = go(tmp_path, **own), variant == "paper"
    data, views = common.load_data("digits", "data"), digits_views()
    drawn = torch.from_numpy(common.draw_labeled(data.train.y, 10, 10, 0))
    lb = drawn[common.batch_at(10, 8, 0, "labeled", 0)]
    ulb = common.batch_at(len(views), 32, 0, "unlabeled", 0)
    student = new_student()
    common.seed_step(0, "adamatch", 0)
    x_lb = torch.cat([views.weak(lb), views.strong(lb)]) if paper else views.weak(lb)
    rows, y = len(x_lb), np.tile(data.train.y[lb], 2 if paper else 1)
    logits = student(torch.cat([x_lb, views.weak(ulb), views.strong(ulb)]))[0].detach().double()
    statistics = {name: buffer.clone() for name, buffer in student.named_buffers()}
    logits_lb = logits[:rows]
    if paper:  # random logit interpolation
        lam = torch.cat([torch.rand(8, 10), torch.rand(8, 10)]).double()
        alone = student(x_lb)[0].detach().double()
        assert not torch.allclose(alone, logits_lb, atol=1e-3)  # batch statistics differ
        logits_lb = logits_lb + lam * (alone - logits_lb)
    soft = lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)  # noqa: E731
    parts = (logits_lb, logits[rows:-32], logits[-32:])
    probs_lb, weak, strong = (soft(part.numpy()) for part in parts)
    loss_s = -np.log(probs_lb[np.arange(rows), y]).mean()
    decay = 0.999 if paper else 0.99
    p_lb = decay * 0.1 + (1 - decay) * probs_lb[:8].mean(axis=0)
    p_ulb = (127 * 0.1 + weak.mean(axis=0)) / 128 if paper else weak.mean(axis=0)
    aligned = weak * (p_lb + 1e-6) / (p_ulb + 1e-6)
    aligned /= aligned.sum(axis=1, keepdims=True)
    kept = aligned.max(axis=1) >= 0.8 * probs_lb[:8].max(axis=1).mean()
    loss_u = -(np.log(strong[np.arange(32), aligned.argmax(axis=1)]) * kept).mean()
    loss = loss_s + (0 if paper else loss_u)  # its weight starts at 0
    logged = [column(run, f"train/{name}")[0] for name in ("loss_s", "loss_u", "loss")]
    assert logged == pytest.approx([loss_s, loss_u, loss], rel=1e-4) and 0 < kept.mean() < 1
    state = checkpoint(run)["model"]  # the extra pass moves no running statistics
    assert all(torch.allclose(state[name].double(), b.double()) for name, b in statistics.items())


@pytest.mark.parametrize("changes", [{}, {"variant": "paper"}], ids=str)
def test_shuffling_the_hidden_labels_changes_no_weight(tmp_path, monkeypatch, changes):
    one = go(tmp_path / "a", **changes)
    other_hidden_labels(monkeypatch, adamatch, 10, shuffled)
    other = go(tmp_path / "b", **changes)
    assert differences(one, other) == ["metrics"]  # only what is printed
    assert column(one, "train/loss") == column(other, "train/loss")


def test_supervised_only_never_reads_an_unlabeled_image(tmp_path, monkeypatch):
    seen, real = set(), common.Views.pixels

    def noting(self, idx):
        seen.update((len(self), int(i)) for i in idx)
        return real(self, idx)

    monkeypatch.setattr(common.Views, "pixels", noting)
    go(tmp_path, supervised_only=True)
    data = common.load_data("digits", "data")
    labeled = set(common.draw_labeled(data.train.y, 10, 10, 0).tolist())
    trained_on = {i for n, i in seen if n == len(data.train)}
    tried = {0, len(data.train) - 1}  # by `build_student`, for whether the network works at all
    assert trained_on - tried and trained_on - tried <= labeled
