"""The equations of zeromatch.py: by hand, by a slow loop, and by their limits."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import pseudolabel
import zeromatch as zm


def test_learning_rate_warms_up_from_zero_and_ends_at_a_fifth():
    assert zm.lr_at(0, 100, 10) == 0 and zm.lr_at(5, 100, 10) == 0.5 and zm.lr_at(10, 100, 10) == 1
    assert zm.lr_at(55, 100, 10) == pytest.approx(math.cos(7 * math.pi / 32))
    assert zm.lr_at(100, 100, 10) == pytest.approx(0.19509, abs=1e-5)
    assert zm.lr_at(0, 10, 0) == 1


def test_alpha_runs_linearly_from_zero_to_one_or_stays_one():
    assert [zm.alpha_at(t, 5, "linear") for t in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [zm.alpha_at(t, 5, "none") for t in range(5)] == [1] * 5
    assert zm.alpha_at(0, 1, "linear") == 0  # a single step does not divide by zero


def test_marginal_starts_at_the_batch_mean_and_moves_by_the_decay():
    probs = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    assert torch.allclose(zm.update_marginal(None, probs, 0.9), torch.tensor([0.6, 0.4]))
    moved = zm.update_marginal(torch.tensor([0.5, 0.5]), probs, 0.9)
    assert torch.allclose(moved, torch.tensor([0.51, 0.49]))


def test_alignment_by_hand():
    probs = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    aligned = zm.align(probs, torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
    # row 1: 0.5 * 0.5 / 0.8 = 0.3125 and 0.5 * 0.5 / 0.2 = 1.25, normalized 0.2 and 0.8
    assert torch.allclose(aligned[0], torch.tensor([0.2, 0.8]), atol=1e-4)
    assert torch.allclose(aligned[1], torch.tensor([0.5625, 0.25]) / 0.8125, atol=1e-4)


def test_alignment_is_not_a_noop_for_skewed_marginals_and_is_one_for_equal_ones():
    probs = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    uniform = torch.full((7,), 1 / 7)
    skewed = torch.tensor([7.0, 1, 1, 1, 1, 1, 1]).softmax(dim=0)
    assert torch.allclose(zm.align(probs, skewed, skewed), probs, atol=1e-6)
    changed = zm.align(probs, uniform, skewed)
    assert (changed - probs).abs().max() > 0.05
    assert (changed[:, 0] < probs[:, 0]).all()  # the over-predicted class loses in every row
    assert torch.allclose(changed.sum(dim=1), torch.ones(50), atol=1e-6)
    assert zm.align(probs, uniform, torch.eye(7)[0]).isfinite().all()  # classes never predicted so far


def test_threshold_and_hard_labels_by_hand():
    probs_lb = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.7]])
    c_tau = zm.relative_threshold(probs_lb, 0.95)
    assert c_tau.item() == pytest.approx(0.95 * 0.8)
    label, mask = zm.hard_labels(torch.tensor([[0.1, 0.77, 0.13], [0.75, 0.2, 0.05], [0.0, 0.0, 1.0]]), c_tau)
    assert label.tolist() == [1, 0, 2] and mask.tolist() == [1, 0, 1]
    assert zm.hard_labels(probs_lb, 0.0)[1].tolist() == [1, 1]  # tau 0 keeps all
    assert zm.hard_labels(torch.tensor([[0.95, 0.05]]), 0.95)[1].tolist() == [1]  # reaching is enough


def test_consistency_loss_divides_by_all_rows_kept_or_not():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    loss = zm.loss_consistency(logits, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) / 2)
    assert zm.loss_consistency(logits, torch.tensor([0, 0]), torch.zeros(2)).item() == 0


def test_distillation_loss_of_an_abstaining_teacher_is_zero_and_counts():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = zm.loss_distillation(logits, torch.tensor([0, -1]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) / 2)
    loss.backward()
    assert logits.grad[1].abs().sum() == 0 and logits.grad[0].abs().sum() > 0
    assert zm.loss_distillation(logits.detach(), torch.tensor([-1, -1])).item() == 0  # not NaN


def reference_step(
    logits_lb, logits_w, logits_s, kd_lb, kd_w, y, zs_lb, zs_ulb, p_lb, p_ulb, decay, tau, ramp, agreement=False,
    prior=None,
):  # fmt: skip
    """One stage-2 step row by row in float64, written from the description of the published code."""
    soft = lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum()  # noqa: E731
    ce = lambda row, k: -np.log(soft(row)[k])  # noqa: E731
    probs_lb, probs_w = [soft(r) for r in logits_lb], [soft(r) for r in logits_w]
    p_lb = decay * p_lb + (1 - decay) * np.mean(probs_lb, axis=0)
    p_ulb = np.mean(probs_w, axis=0) if p_ulb is None else decay * p_ulb + (1 - decay) * np.mean(probs_w, axis=0)
    threshold = tau * np.mean([p.max() for p in probs_lb])
    unsup = 0.0
    for weak, strong, zs in zip(probs_w, logits_s, zs_ulb):
        aligned = weak * ((p_lb if prior is None else prior) + 1e-6) / (p_ulb + 1e-6)
        aligned = aligned / aligned.sum()
        if aligned.max() >= threshold or (agreement and aligned.argmax() == zs):
            unsup += ce(strong, aligned.argmax()) / len(logits_s)
    sup = np.mean([ce(r, k) for r, k in zip(logits_lb, y)])
    kd = np.mean([ce(r, k) for r, k in zip(np.concatenate([kd_lb, kd_w]), np.concatenate([zs_lb, zs_ulb]))])
    return sup, unsup, kd, sup + unsup + ramp * kd, p_lb, p_ulb


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_stage_2_losses_and_marginals_equal_a_slow_second_opinion(seed, first):
    rng = np.random.RandomState(seed)
    B, B_u, K = 6, 15, 5
    a, w, s, ka, kw = (rng.randn(n, K) * 3 for n in (B, B_u, B_u, B, B_u))
    y, zs_lb, zs_ulb = rng.randint(K, size=B), rng.randint(K, size=B), rng.randint(K, size=B_u)
    p_lb, p_ulb = np.full(K, 1 / K), None if first else rng.dirichlet(np.ones(K))
    expected = reference_step(a, w, s, ka, kw, y, zs_lb, zs_ulb, p_lb, p_ulb, 0.999, 0.7, 0.3)

    t = lambda v: (  # noqa: E731
        torch.from_numpy(np.asarray(v)).float() if np.asarray(v).dtype.kind == "f" else torch.from_numpy(v)
    )  # noqa: E731
    probs_lb, probs_w = t(a).softmax(dim=1), t(w).softmax(dim=1)
    q_lb = zm.update_marginal(t(p_lb), probs_lb, 0.999)
    q_ulb = zm.update_marginal(None if first else t(p_ulb), probs_w, 0.999)
    label, mask = zm.hard_labels(zm.align(probs_w, q_lb, q_ulb), zm.relative_threshold(probs_lb, 0.7))
    assert 0 < mask.mean() < 1  # the case is not a trivial one
    ours = [
        F.cross_entropy(t(a), t(y)).item(),
        zm.loss_consistency(t(s), label, mask).item(),
        zm.loss_distillation(torch.cat([t(ka), t(kw)]), torch.cat([t(zs_lb), t(zs_ulb)])).item(),
    ]
    assert ours == pytest.approx(expected[:3], rel=1e-5)
    assert ours[0] + ours[1] + 0.3 * ours[2] == pytest.approx(expected[3], rel=1e-5)
    assert np.allclose(q_lb, expected[4], atol=1e-6) and np.allclose(q_ulb, expected[5], atol=1e-6)


def test_consistency_gradient_is_softmax_minus_one_hot_on_kept_rows_only():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label, mask = torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    zm.loss_consistency(logits, label, mask).backward()
    expected = (logits.detach().softmax(dim=1) - F.one_hot(label, 3)) * mask[:, None] / 4
    assert torch.allclose(logits.grad, expected, atol=1e-7)


def test_agreement_counts_what_the_teacher_says_too_by_the_ramp_and_nothing_else():
    label, y_zs = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 2, 1, -1])
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    assert zm.with_agreement(mask, label, y_zs, 0.25).tolist() == [0.25, 0, 1, 1, 0]
    assert zm.with_agreement(mask, label, y_zs, 1.0).tolist() == [1, 0, 1, 1, 0]
    assert mask.tolist() == [0, 0, 1, 1, 0]  # the threshold's own mask stays what it was


def test_agreement_with_a_teacher_that_repeats_the_student_keeps_all_and_with_a_silent_one_changes_nothing():
    probs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    label, mask = zm.hard_labels(probs, 0.6)
    assert 0 < mask.mean() < 1
    assert zm.with_agreement(mask, label, label, 1.0).mean() == 1
    assert torch.equal(zm.with_agreement(mask, label, label, 0.0), mask)  # the first step
    assert torch.equal(zm.with_agreement(mask, label, torch.full((50,), -1), 1.0), mask)


@pytest.mark.parametrize("anneal, agreement, prior", [
    ("none", False, None), ("none", True, None), ("linear", True, None), ("none", False, np.arange(20, 30) / 245),
])  # fmt: skip
def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, anneal, agreement, prior):
    """The first step of stage 2, its losses recomputed row by row from the same weights, labels and views."""
    alpha_t = 1.0 if anneal == "none" else 0.0  # at the first step; then agreement counts nothing
    data = common.load_data("digits", "data")
    y_zs = np.random.RandomState(0).randint(0, 10, len(data.train))
    path = tmp_path / "labels.jsonl"
    pseudolabel.write_labels(path, pseudolabel.header_of(data, "train", "made up", "none"), np.eye(10)[y_zs])
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps({str(k): k + 20 for k in range(10)}))
    zm.main(zm.Args(
        stages="2", num_steps=1, log_every=1, batch_size=8, uratio=4, anneal=anneal, lambda_p=0.5, lambda_u=1.0,
        tau=0.92, agreement=agreement, prior="labeled" if prior is None else str(shares),
        pseudolabels=str(path), runs_dir=str(tmp_path), data_dir=str(tmp_path),
    ))  # fmt: skip
    (metrics,) = tmp_path.glob("zeromatch-*/metrics.jsonl")
    logged = json.loads(metrics.read_text().splitlines()[0])

    views = common.Views(data.train, common.preset_of("digits"), torch.device("cpu"))
    lb = torch.from_numpy(common.draw_labeled(data.train.y, 10, 10, 0)[common.batch_at(10, 8, 0, 0)])
    ulb = common.batch_at(len(views), 32, 0, 0)
    common.seed_step(0, "weights", 0)
    student = common.build_student("cnn", 1, 8, 10)
    common.seed_step(0, "auxiliary head", 0)
    student.add_kd_head()
    common.seed_step(0, "stage 2", 0)
    x = torch.cat([views.weak(lb), views.weak(ulb), views.strong(ulb)])
    logits, kd = (out.detach().double().numpy() for out in student.train()(x)[:2])
    start = np.full(10, 0.1)
    *expected, _, _ = reference_step(
        logits[:8], logits[8:40], logits[40:], kd[:8], kd[8:40], data.train.y[lb], y_zs[lb], y_zs[ulb], start, None,
        0.99, 0.92, 0.5 * alpha_t, agreement and alpha_t, prior,
    )  # fmt: skip
    names = ("train/loss_s", "train/loss_u", "train/loss_kd", "train/loss")
    assert [logged[name] for name in names] == pytest.approx(expected, rel=1e-4)
    assert 0 < logged["train/mask_rate"] < 1  # the case is not a trivial one


def test_a_label_file_that_was_found_without_one_of_the_test_part_is_read(tmp_path, monkeypatch):
    data = common.load_data("digits", "data")
    path = tmp_path / "digits-train-clip.jsonl"
    pseudolabel.write_labels(path, pseudolabel.header_of(data, "train", "clip", "none"), np.eye(10)[data.train.y])
    monkeypatch.setattr(zm, "default_labels", lambda *given: (path, None))
    result = zm.main(zm.Args(num_steps=1, runs_dir=str(tmp_path), data_dir=str(tmp_path)))
    assert result["teacher_acc"] is None and 0 <= result["test_acc"] <= 100
