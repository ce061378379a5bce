"""The equations of zeromatch.py: by hand, by a slow loop, and by their limits."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import column, digits_views, new_student, only_run, write_labels

import common
import pseudolabel
import zeromatch as zm


def test_learning_rate_warms_up_from_zero_and_ends_at_a_fifth():
    assert [zm.lr_at(t, 100, 10) for t in (0, 5, 10)] == [0, 0.5, 1] and zm.lr_at(0, 10, 0) == 1
    assert zm.lr_at(55, 100, 10) == pytest.approx(math.cos(7 * math.pi / 32))
    assert zm.lr_at(100, 100, 10) == pytest.approx(0.19509, abs=1e-5)


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


def test_alignment_moves_skewed_marginals_only():
    probs = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    uniform = torch.full((7,), 1 / 7)
    skewed = torch.tensor([7.0, 1, 1, 1, 1, 1, 1]).softmax(dim=0)
    assert torch.allclose(zm.align(probs, skewed, skewed), probs, atol=1e-6)
    changed = zm.align(probs, uniform, skewed)
    assert (changed - probs).abs().max() > 0.05
    assert (changed[:, 0] < probs[:, 0]).all()  # the over-predicted class loses in every row
    assert torch.allclose(changed.sum(dim=1), torch.ones(50), atol=1e-6)
    assert zm.align(probs, uniform, torch.eye(7)[0]).isfinite().all()  # classes never predicted


def test_threshold_and_hard_labels_by_hand():
    probs_lb = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.7]])
    c_tau = zm.relative_threshold(probs_lb, 0.95)
    assert c_tau.item() == pytest.approx(0.95 * 0.8)
    probs = torch.tensor([[0.1, 0.77, 0.13], [0.75, 0.2, 0.05], [0.0, 0.0, 1.0]])
    label, mask = zm.hard_labels(probs, c_tau)
    assert label.tolist() == [1, 0, 2] and mask.tolist() == [1, 0, 1]
    assert zm.hard_labels(probs_lb, 0.0)[1].tolist() == [1, 1]  # tau 0 keeps all
    assert zm.hard_labels(torch.tensor([[0.95, 0.05]]), 0.95)[1].tolist() == [1]  # reaching it


def test_consistency_loss_and_gradient_divide_by_all_rows_kept_or_not():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    label, mask = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    loss = zm.loss_consistency(logits, label, mask)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) / 2)
    loss.backward()
    expected = (logits.detach().softmax(dim=1) - F.one_hot(label, 2)) * mask[:, None] / 2
    assert torch.allclose(logits.grad, expected, atol=1e-7)
    assert zm.loss_consistency(logits, label, torch.zeros(2)).item() == 0


def test_a_row_without_the_teachers_answer_has_no_loss_but_is_part_of_the_mean():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = zm.loss_distillation(logits, torch.tensor([0, -1]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) / 2)
    loss.backward()
    assert logits.grad[1].abs().sum() == 0 and logits.grad[0].abs().sum() > 0
    assert zm.loss_distillation(logits.detach(), torch.tensor([-1, -1])).item() == 0  # not NaN


def test_agreement_raises_what_the_teacher_says_too_by_the_ramp_and_nothing_else():
    label, y_zs = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 2, 1, -1])
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    assert zm.with_agreement(mask, label, y_zs, 0.25).tolist() == [0.25, 0, 1, 1, 0]
    assert zm.with_agreement(mask, label, y_zs, 1.0).tolist() == [1, 0, 1, 1, 0]
    assert zm.with_agreement(mask, label, y_zs, 0.0).tolist() == mask.tolist()  # the first step
    silent = torch.full((5,), -1)
    assert zm.with_agreement(mask, label, silent, 1.0).tolist() == mask.tolist()


def test_the_teachers_shares_are_half_its_answers_and_half_the_labels():
    y_zs, y_lb = torch.tensor([0, 0, 1, -1, -1]), torch.tensor([0, 1, 2, 2])
    expected = [(2 / 3 + 1 / 4) / 2, (1 / 3 + 1 / 4) / 2, (0 + 2 / 4) / 2]
    assert zm.teacher_shares(y_zs, y_lb, 3).tolist() == pytest.approx(expected)
    silent = zm.teacher_shares(torch.tensor([-1]), y_lb, 3)
    assert silent.isfinite().all() and silent.argmax() == 2


@pytest.mark.parametrize("content", [
    '{"a": 1, "b": 3}', '\ufeff{"b": 0.75, "a": 0.25}', '{"a": "1", "b": 3}',
])  # fmt: skip
def test_shares_or_sizes_of_the_classes_are_read_from_a_file(tmp_path, content):
    (tmp_path / "shares.json").write_text(content, encoding="utf-8")
    assert zm.prior_from_file(str(tmp_path / "shares.json"), ["a", "b"]).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("content", [
    "", "[1, 2]", "3", '{"a": 1}', '{"a": 1, "b": 0}', '{"a": 1, "b": -1}', '{"a": 1, "b": "x"}',
    '{"a": 1, "b": NaN}', '{"a": 1, "b": 1e400}', '{"a": 1, "b": 1, "c": 1}', '{"a": [], "b": 1}',
    "[" * 100_000, '{"a": 1, "b": null}',
], ids=lambda content: content[:24])  # fmt: skip
def test_a_bad_file_of_shares_is_refused_by_name(tmp_path, content):
    (tmp_path / "shares.json").write_text(content)
    with pytest.raises(common.UserError, match="--prior .*shares.json"):
        zm.prior_from_file(str(tmp_path / "shares.json"), ["a", "b"])


def reference_step(
    logits_lb, logits_w, logits_s, kd_lb, kd_w, y, zs_lb, zs_ulb, p_lb, p_ulb, decay, tau, ramp,
    agreement=False, prior=None,
):  # fmt: skip
    """One stage-2 step row by row in float64, from the description of the published code."""
    soft = lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum()  # noqa: E731
    ce = lambda row, k: -np.log(soft(row)[k])  # noqa: E731
    probs_lb, probs_w = [soft(r) for r in logits_lb], [soft(r) for r in logits_w]
    p_lb, mean = decay * p_lb + (1 - decay) * np.mean(probs_lb, axis=0), np.mean(probs_w, axis=0)
    p_ulb = mean if p_ulb is None else decay * p_ulb + (1 - decay) * mean
    threshold = tau * np.mean([p.max() for p in probs_lb])
    unsup = 0.0
    for weak, strong, zs in zip(probs_w, logits_s, zs_ulb):
        aligned = weak * ((p_lb if prior is None else prior) + 1e-6) / (p_ulb + 1e-6)
        aligned = aligned / aligned.sum()
        if aligned.max() >= threshold or (agreement and aligned.argmax() == zs):
            unsup += ce(strong, aligned.argmax()) / len(logits_s)
    sup = np.mean([ce(r, k) for r, k in zip(logits_lb, y)])
    both = zip(np.concatenate([kd_lb, kd_w]), np.concatenate([zs_lb, zs_ulb]))
    kd = np.mean([ce(r, k) for r, k in both])
    return sup, unsup, kd, sup + unsup + ramp * kd, p_lb, p_ulb


@pytest.mark.parametrize("anneal, agreement, prior", [
    ("none", False, None), ("none", True, None), ("linear", True, None),
    ("none", False, np.arange(20, 30) / 245),
])  # fmt: skip
def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, anneal, agreement, prior):
    """The first step of stage 2, recomputed row by row from the same weights, labels and views."""
    alpha_t = 1.0 if anneal == "none" else 0.0  # at the first step; then agreement adds nothing
    data, shares = common.load_data("digits", "data"), tmp_path / "shares.json"
    y_zs = np.random.RandomState(0).randint(0, 10, len(data.train))
    header = pseudolabel.header_of(data, "train", "made up", "none")
    write_labels(tmp_path / "labels.jsonl", header, np.eye(10)[y_zs])
    shares.write_text(json.dumps({str(k): k + 20 for k in range(10)}))
    zm.main(zm.Args(
        stages="2", num_steps=1, log_every=1, batch_size=8, uratio=4, anneal=anneal, lambda_p=0.5,
        tau=0.8, agreement=agreement, prior="labeled" if prior is None else str(shares),
        pseudolabels=str(tmp_path / "labels.jsonl"), runs_dir=str(tmp_path), data_dir=str(tmp_path),
    ))  # fmt: skip

    views, drawn = digits_views(), common.draw_labeled(data.train.y, 10, 10, 0)
    lb = torch.from_numpy(drawn)[common.batch_at(10, 8, 0, "labeled", 0)]
    ulb = common.batch_at(1297, 32, 0, "unlabeled", 0)
    student = new_student()
    common.seed_step(0, "auxiliary head", 0)
    student.add_kd_head()
    common.seed_step(0, "stage 2", 0)
    x = torch.cat([views.weak(lb), views.weak(ulb), views.strong(ulb)])
    logits, kd = (out.detach().double().numpy() for out in student.train()(x)[:2])
    *expected, _, _ = reference_step(
        logits[:8], logits[8:40], logits[40:], kd[:8], kd[8:40], data.train.y[lb], y_zs[lb],
        y_zs[ulb], np.full(10, 0.1), None, 0.99, 0.8, 0.5 * alpha_t, agreement and alpha_t, prior,
    )  # fmt: skip
    run, names = only_run(tmp_path), ("loss_s", "loss_u", "loss_kd", "loss")
    logged = [column(run, f"train/{name}")[0] for name in names]
    assert logged == pytest.approx(expected, rel=1e-4)
    assert 0 < column(run, "train/mask_rate")[0] < 1  # the case is not a trivial one


@pytest.mark.parametrize("found", [True, False])
def test_the_teachers_accuracy_is_known_where_it_labels_the_test_part(tmp_path, monkeypatch, found):
    data, paths = common.load_data("digits", "data"), [None, None]
    for at, split in enumerate(("train", "test")[: 1 + found]):
        paths[at], y = tmp_path / f"{split}.jsonl", data.part(split).y.copy()
        y[: len(y) // 4] = (y[: len(y) // 4] + 1) % 10
        header = pseudolabel.header_of(data, split, "three in four", "none")
        write_labels(paths[at], header, np.eye(10)[y])
    monkeypatch.setattr(zm, "default_labels", lambda *given: [p and str(p) for p in paths])
    result = zm.main(zm.Args(num_steps=1, runs_dir=str(tmp_path), data_dir=str(tmp_path)))
    assert result["teacher_acc"] == (75 if found else None) and 0 <= result["test_acc"] <= 100
