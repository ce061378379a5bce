"""adamatch.py: what it adds to the functions it shares with zeromatch.py, and whole short runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import adamatch
import common
import pseudolabel

SHORT = dict(num_steps=12, eval_every=6, log_every=3, warmup_steps=2, batch_size=8, uratio=2)


def test_unlabeled_weight_warms_up_over_the_first_half():
    assert adamatch.mu_at(0, 100) == 0 and adamatch.mu_at(25, 100) == pytest.approx(0.5)
    assert adamatch.mu_at(50, 100) == 1 and adamatch.mu_at(99, 100) == 1


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
    for step, probs in enumerate(batches[:2]):
        window = adamatch.update_window(window, probs, step)
    expected = (batches[:2].mean(dim=1).sum(dim=0) + 126 / 3) / 128
    assert torch.allclose(window.mean(dim=0), expected, atol=1e-6)
    for step, probs in enumerate(batches[2:], start=2):
        window = adamatch.update_window(window, probs, step)
    assert torch.allclose(window.mean(dim=0), batches[-128:].mean(dim=(0, 1)), atol=1e-6)


class FakeRun:
    autocast = staticmethod(common.nullcontext)


def test_a_forgotten_pass_keeps_statistics_and_gradients():
    torch.manual_seed(0)
    student = common.build_student("cnn", 1, 8, 10).train()
    before = {name: b.clone() for name, b in student.named_buffers()}
    x = torch.randn(6, 1, 8, 8)
    logits = adamatch.forward_and_forget(student, x, None, torch.arange(6), FakeRun)
    assert all(torch.equal(b, before[name]) for name, b in student.named_buffers())
    joint = adamatch.forward(student, torch.cat([x, x + 1]), None, torch.arange(12), FakeRun)[:6]
    assert any(not torch.equal(b, before[name]) for name, b in student.named_buffers())
    assert not torch.allclose(logits, joint, atol=1e-3)  # batch statistics make the passes differ
    (logits + joint).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_without_batch_statistics_interpolation_would_change_nothing():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    encoder.num_features, encoder.batch_statistics = 5, False
    student = common.Student(encoder, 3)
    x = torch.randn(4, 1, 8, 8)
    alone = adamatch.forward(student, x, None, torch.arange(4), FakeRun)
    joint = adamatch.forward(student, torch.cat([x, x + 1]), None, torch.arange(8), FakeRun)[:4]
    assert torch.allclose(adamatch.interpolate_logits(joint, alone, torch.rand(4, 3)), alone, atol=1e-6)


def weights_of(tmp_path):
    (folder,) = tmp_path.glob("adamatch-*")
    return torch.load(folder / "checkpoint.pt", weights_only=True), folder


def labels_of_digits(folder):
    data, rng, paths = common.load_data("digits", "data"), np.random.RandomState(0), []
    for split in ("train", "test"):
        probs = rng.dirichlet(np.ones(10), len(data.part(split)))
        paths.append(folder / f"{split}.jsonl")
        pseudolabel.write_labels(paths[-1], pseudolabel.header_of(data, split, "made up", "none"), probs)
    return dict(pseudolabels=str(paths[0]), pseudolabels_test=str(paths[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "original"},
        {"supervised_only": True},
        {"feature_input": True},
        {"lambda_u": 0.3},
        {"tau": 0.5},
    ],
)
def test_every_variant_and_baseline_runs_differs_from_adamatch_and_resumes_exactly(tmp_path, monkeypatch, changes):
    changes = changes | (labels_of_digits(tmp_path) if "feature_input" in changes else {})
    args = adamatch.Args(data_dir=str(tmp_path), **(SHORT | changes))
    result = adamatch.main(replace(args, runs_dir=str(tmp_path / "a")))
    assert 0 <= result["test_acc"] <= 100
    state, folder = weights_of(tmp_path / "a")
    tau = json.loads((folder / "args.json").read_text())["tau"]
    assert tau == changes.get("tau", 0.9 if changes.get("variant") == "original" else 0.95)
    if changes:
        adamatch.main(replace(adamatch.Args(data_dir=str(tmp_path), **SHORT), runs_dir=str(tmp_path / "plain")))
        plain, _ = weights_of(tmp_path / "plain")
        first = "encoder.0.0.weight"
        assert not torch.equal(state["model"][first], plain["model"][first])

    real = common.Run.log

    def dying(self, stage, step, *rest, **values):
        if step == 8:
            raise RuntimeError("killed")
        return real(self, stage, step, *rest, **values)

    monkeypatch.setattr(common.Run, "log", dying)
    with pytest.raises(RuntimeError):
        adamatch.main(replace(args, runs_dir=str(tmp_path / "b")))
    monkeypatch.undo()
    _, folder = weights_of(tmp_path / "b")
    saved = adamatch.Args(**json.loads((folder / "args.json").read_text()))
    adamatch.main(replace(saved, resume=str(folder)))
    resumed, _ = weights_of(tmp_path / "b")
    assert all(torch.equal(state[p][k], v) for p in ("model", "ema") for k, v in resumed[p].items())
    assert torch.equal(state["window"], resumed["window"])


@pytest.mark.parametrize("variant", ["zeromatch", "original"])
def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, variant):
    """One step, its losses recomputed in NumPy from the same weights and views."""
    own = {"num_steps": 1, "log_every": 1, "batch_size": 8, "uratio": 4, "tau": 0.92, "variant": variant}
    adamatch.main(adamatch.Args(runs_dir=str(tmp_path), data_dir=str(tmp_path), **own))
    logged = json.loads(next(tmp_path.glob("*/metrics.jsonl")).read_text().splitlines()[0])

    data = common.load_data("digits", "data")
    views = common.Views(data.train, common.preset_of("digits"), torch.device("cpu"))
    lb = torch.from_numpy(common.draw_labeled(data.train.y, 10, 10, 0)[common.batch_at(10, 8, 0, 0)])
    ulb = common.batch_at(len(views), 32, 0, 0)
    common.seed_step(0, "weights", 0)
    student = common.build_student("cnn", 1, 8, 10).train()
    common.seed_step(0, "adamatch", 0)
    original = variant == "original"
    x_lb = torch.cat([views.weak(lb), views.strong(lb)]) if original else views.weak(lb)
    rows, y = len(x_lb), np.tile(data.train.y[lb], 2 if original else 1)
    logits = student(torch.cat([x_lb, views.weak(ulb), views.strong(ulb)]))[0].detach().double()
    logits_lb = logits[:rows]
    if original:  # random logit interpolation
        lam = torch.cat([torch.rand(8, 10), torch.rand(8, 10)]).double()
        logits_lb = logits_lb + lam * (student(x_lb)[0].detach().double() - logits_lb)
    soft = lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)  # noqa: E731
    probs_lb, weak, strong = (soft(z.numpy()) for z in (logits_lb, logits[rows:-32], logits[-32:]))
    loss_s = -np.log(probs_lb[np.arange(rows), y]).mean()
    decay = 0.99
    p_lb = decay * 0.1 + (1 - decay) * probs_lb[:8].mean(axis=0)
    p_ulb = (127 * 0.1 + weak.mean(axis=0)) / 128 if original else weak.mean(axis=0)
    aligned = weak * (p_lb + 1e-6) / (p_ulb + 1e-6)
    aligned /= aligned.sum(axis=1, keepdims=True)
    kept = aligned.max(axis=1) >= 0.92 * probs_lb[:8].max(axis=1).mean()
    loss_u = -(np.log(strong[np.arange(32), aligned.argmax(axis=1)]) * kept).mean()
    assert [logged["train/loss_s"], logged["train/loss_u"]] == pytest.approx([loss_s, loss_u], rel=1e-4)
    assert logged["train/loss"] == pytest.approx(loss_s + (0 if original else loss_u), rel=1e-4)  # mu_0 = 0
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize("changes", [{}, {"variant": "original"}])
def test_shuffling_the_hidden_labels_changes_no_weight(tmp_path, monkeypatch, changes):
    real = common.load_data
    drawn = common.draw_labeled(real("digits", "").train.y, 10, 10, seed=0)

    def shuffled(*args):
        data = real(*args)
        hidden = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.train.y[hidden] = np.random.RandomState(1).permutation(data.train.y[hidden])
        return data

    args = adamatch.Args(data_dir=str(tmp_path), **(SHORT | changes))
    adamatch.main(replace(args, runs_dir=str(tmp_path / "a")))
    monkeypatch.setattr(adamatch, "load_data", shuffled)
    monkeypatch.setattr(adamatch, "draw_labeled", lambda *given: drawn)
    adamatch.main(replace(args, runs_dir=str(tmp_path / "b")))
    (one, _), (other, _) = (weights_of(tmp_path / name) for name in "ab")
    assert all(torch.equal(one["model"][k], v) for k, v in other["model"].items())


def test_supervised_only_never_reads_an_unlabeled_image(tmp_path, monkeypatch):
    seen = []
    real = common.Views.pixels
    monkeypatch.setattr(common.Views, "pixels", lambda self, idx: (seen.append((len(self), idx)), real(self, idx))[1])
    adamatch.main(adamatch.Args(supervised_only=True, runs_dir=str(tmp_path), data_dir=str(tmp_path), **SHORT))
    data = common.load_data("digits", "data")
    labeled = set(common.draw_labeled(data.train.y, 10, 10, 0).tolist())
    trained_on = {int(i) for n, idx in seen if n == len(data.train) for i in idx}
    assert trained_on and trained_on <= labeled


def test_default_hyper_parameters_are_zeromatchs():
    import zeromatch

    ours, theirs = adamatch.Args(), zeromatch.Args()
    for name in vars(ours).keys() & vars(theirs).keys() - {"tau"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.tau == 0.95  # and adamatch.main resolves to it: below


def two_class_data(imbalance, n=400):
    """Two classes of 8x8 images, bright on the left or on the right; `imbalance` is class 0's share."""
    rng = np.random.RandomState(0)
    y = (rng.rand(n) >= imbalance).astype(np.int64)
    x = rng.randint(0, 60, (n, 1, 8, 8))
    x[:, :, :, :3] += (150 * (y == 0))[:, None, None, None]
    x[:, :, :, 5:] += (150 * (y == 1))[:, None, None, None]
    x = x.astype(np.uint8)
    half = n // 2
    return common.Data("digits", ["left", "right"], common.Split(x[:half], y[:half]), common.Split(x[half:], y[half:]))


def test_two_classes_and_an_imbalanced_pool_and_labeled_set_work(tmp_path, monkeypatch):
    data = two_class_data(0.85)
    monkeypatch.setattr(adamatch, "load_data", lambda *args: data)
    labeled = np.concatenate([np.flatnonzero(data.train.y == 0)[:6], np.flatnonzero(data.train.y == 1)[:2]])  # 3 to 1
    monkeypatch.setattr(adamatch, "draw_labeled", lambda *args: labeled)
    args = adamatch.Args(num_labels=8, num_steps=60, eval_every=30, runs_dir=str(tmp_path), ema_decay=0.9)
    assert adamatch.main(args)["test_acc"] > 90
    p_lb = weights_of(tmp_path)[0]["p_lb"]
    assert p_lb[0] > 0.55  # the labeled marginals are learned, not assumed uniform
