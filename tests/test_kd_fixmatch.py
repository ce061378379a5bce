"""kd_fixmatch.py: robust losses, clustering, the trusted set, whole runs, exact resume."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import (
    checkpoint, column, differences, digits_views, dying_at, metrics, new_student, only_run,
    other_hidden_labels, shuffled,
)  # fmt: skip
from sklearn.cluster import KMeans
from torch import nn

import common
import kd_fixmatch as kd

# ---------------------------------------------------------------------------- losses

LN, LOSSES = math.log, ["ce", "sce", "mae", "nce"]


def slow_losses(logits, target):
    """Each loss of one row by its definition over all classes, in float64."""
    probs = np.exp(logits) / np.exp(logits).sum()
    e = np.eye(len(logits))[target]
    ce = lambda k: -sum(np.eye(len(logits))[k] * np.log(probs))  # noqa: E731
    return {
        "ce": ce(target),
        "sce": 1.5 * ce(target) + 0.3 * -sum(probs * np.log(np.maximum(e, 1e-4))),
        "mae": np.abs(probs - e).sum(),
        "nce": ce(target) / sum(ce(k) for k in range(len(logits))),
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_agrees_with_a_slow_loop_and_divides_by_the_whole_batch(name):
    rng = np.random.RandomState(3)
    logits, target, used = 2 * rng.randn(9, 5), rng.randint(0, 5, 9), rng.randint(0, 2, 9)
    assert 0 < used.sum() < 9
    rows = zip(logits, target, used, strict=True)
    slow = sum(u * slow_losses(row, y)[name] for row, y, u in rows) / 9
    tensors = torch.tensor(logits).float(), torch.tensor(target), torch.tensor(used).float()
    assert kd.loss_robust(name, *tensors, 1.5, 0.3).item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_falls_towards_its_target_and_is_finite_at_any_confidence(name):
    logits = torch.tensor([[0.5, 0.0, -0.5], [0.5, 0.0, -0.5]], requires_grad=True)
    used = torch.tensor([1.0, 0.0])
    kd.loss_robust(name, logits, torch.tensor([1, 1]), used, 1.0, 0.1).backward()
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]
    assert torch.equal(logits.grad[1], torch.zeros(3))  # a row that is not used
    for size in (0.0, 1.0, 30.0, 1e3, 1e4):
        for target in (0, 1):
            logits = torch.tensor([[size, -size, 0.0]], requires_grad=True)
            loss = kd.loss_robust(name, logits, torch.tensor([target]), torch.ones(1), 1.0, 0.1)
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all(), (size, target)


# ---------------------------------------------------------------------------- heuristic 1


@pytest.mark.parametrize("own, sure, outer, target, used", [
    (3, 1, -1, 3, 1),  # sure, not in T_u: its own label
    (3, 1, 5, 3, 1),  # sure: its own overrides
    (3, 0, 5, 5, 1),  # not sure: the trusted label
    (3, 0, 0, 0, 1),  # class 0 is a label like any other
    (3, 0, -1, None, 0),  # neither: no target
])  # fmt: skip
def test_heuristic_1(own, sure, outer, target, used):
    mask = torch.tensor([float(sure)])
    got, got_used = kd.heuristic_1(torch.tensor([own]), mask, torch.tensor([outer]))
    assert got_used.item() == used and got_used.dtype == torch.float32
    assert target is None or got.item() == target
    assert got.item() >= 0  # a class number in any case: losses gather by it


def test_without_trusted_labels_heuristic_1_is_fixmatch():
    label, mask = torch.arange(20) % 5, (torch.arange(20) % 3 > 0).float()
    target, used = kd.heuristic_1(label, mask, torch.full_like(label, -1))
    assert torch.equal(target, label) and torch.equal(used, mask)


# ---------------------------------------------------------------------------- clustering


def test_assignment_target_and_kl_match_a_calculation_by_hand():
    q = kd.soft_assignment(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]]))
    # kernels 1, 1/10 and 1/2, 1/5
    torch.testing.assert_close(q, torch.tensor([[10 / 11, 1 / 11], [5 / 7, 2 / 7]]))
    p = kd.target_distribution(q)
    # f = 125/77, 29/77; row 1: 0.8 against 1/29, row 2: 0.2 against 4/29
    expected = torch.tensor([[23.2 / 24.2, 1 / 24.2], [5.8 / 9.8, 4 / 9.8]])
    torch.testing.assert_close(p, expected)
    pairs = zip(expected.flatten().tolist(), q.flatten().tolist(), strict=True)
    kl = sum(p_ik * LN(p_ik / q_ik) for p_ik, q_ik in pairs)
    assert kd.loss_dec(q, p).item() == pytest.approx(kl / 2, rel=1e-4)


def new_run(folder):
    args = {"runs_dir": str(folder), "resume": None, "track": None}
    args |= {"log_every": 20, "eval_every": 20}
    run = common.Run("run", args, torch.device("cpu"), None)
    run.counts = torch.zeros(8)
    return run


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


def blobs(classes=(2, 5, 7), each=60, dim=8, distance=10.0):
    """Separable blobs: (features [n, dim], true class [n])."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor(classes).repeat_interleave(each)
    centers = distance * torch.eye(dim)[: len(classes)].repeat_interleave(each, dim=0)
    return centers + torch.randn(len(truth), dim, generator=generator), truth


def cluster(how, features, label, run):
    return kd.cluster_dec(features, label, nn.Linear(1, 1), kd.Args(clustering=how), run)


@pytest.mark.parametrize("how", ["dec", "kmeans"])
@pytest.mark.parametrize("wrong", [0, 20])
def test_separable_blobs_are_clustered_perfectly_whatever_a_few_labels_say(run, how, wrong):
    features, truth = blobs()
    label = truth.clone()
    label[:wrong] = 7  # of 60 of class 2
    assert torch.equal(cluster(how, features, label, run), truth)


def test_clusters_are_the_same_for_features_in_any_unit_and_place(run, tmp_path):
    features, truth = blobs(distance=3.0)
    label = truth.clone()
    label[:20] = 7
    expected = cluster("dec", features, label, run)
    assert (expected != label).any()
    assert torch.equal(cluster("dec", 64 * features + 256, label, new_run(tmp_path)), expected)


@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_the_clusters_do_not_depend_on_the_labels_that_they_check(run, tmp_path, how):
    features, truth = blobs(distance=3.0)
    swapped = truth.flip(0)  # classes 2 and 7 change places, with them every mean
    expected = cluster(how, features, truth, run)
    found = cluster(how, features, swapped, new_run(tmp_path))
    assert torch.equal(found, torch.where(expected == 5, 5, 9 - expected))
    some_wrong = truth.clone()
    some_wrong[:25] = 7
    assert torch.equal(cluster(how, features, some_wrong, new_run(tmp_path / "b")), expected)


def test_a_cluster_gets_the_class_that_most_of_its_rows_have_each_class_once():
    label = torch.tensor([3, 3, 8, 8, 8, 5])
    assert kd.class_of(torch.tensor([1, 1, 0, 0, 0, 2]), label).tolist() == label.tolist()
    # cluster 0 holds 3 of class 8 and 2 of class 3, cluster 1 only 2 of class 8: 3 + 0 < 2 + 2
    label = torch.tensor([8, 8, 8, 3, 3, 8, 8])
    assert kd.class_of(torch.tensor([0, 0, 0, 0, 0, 1, 1]), label).tolist() == [3] * 5 + [8] * 2


def scaled(features):
    """Features in float64 as A4 says."""
    f = features.double().numpy()
    f = f - f.mean(axis=0)
    return f / np.sqrt((f**2).sum(axis=1).mean())


def numpy_kl(f, projection, centroids, p):
    """(KL(p || q), p, q) in float64 for a fixed target p, or for q's own."""
    q = 1 / (1 + (((f @ projection)[:, None] - centroids[None]) ** 2).sum(axis=2))
    q /= q.sum(axis=1, keepdims=True)
    p = q**2 / q.sum(axis=0) if p is None else p
    p = p / p.sum(axis=1, keepdims=True)
    return (p * np.log(p / q)).sum() / len(p), p, q


def test_a_step_of_clustering_goes_down_the_slope_of_the_kl_towards_a_fixed_target(
    run, monkeypatch
):
    monkeypatch.setattr(kd, "DEC_STEPS", 1)
    features, truth = blobs(distance=3.0, dim=5)
    cluster("dec", features, truth, run)
    dec, f = checkpoint(run.folder)["dec"], scaled(features)
    kmeans = KMeans(3, n_init=10, random_state=0).fit(f.astype(np.float32))
    start = [np.eye(5), kmeans.cluster_centers_.astype(np.float64)]
    kl, p, _ = numpy_kl(f, *start, None)
    for number, name in enumerate(("projection", "centroids")):
        moved = (start[number] - dec[name].numpy()) / kd.DEC_LR
        for at in ((0, 0), (1, 3), (2, 2)):
            nudged = [part.copy() for part in start]
            nudged[number][at] += 1e-5
            slope = (numpy_kl(f, *nudged, p)[0] - kl) / 1e-5
            assert moved[at] == pytest.approx(slope, rel=0.02, abs=1e-4)


# ---------------------------------------------------------------------------- the trusted set


class Table(nn.Module):
    """An outer network that knows the logits and features of every example by heart."""

    def __init__(self, probs, features):
        super().__init__()
        self.logits, self.features = torch.tensor(probs).log(), features

    def forward(self, idx, extra):
        return self.logits[idx], None, self.features[idx]


class Pool:
    """In place of Views: the plain view of an example is its number."""

    def __init__(self, y):
        self.y, self.batch, self.order = torch.tensor(y), 500, torch.arange(len(y))
        self.extra = torch.zeros(len(y), 0)

    def __len__(self):
        return len(self.y)

    def plain(self, idx):
        return idx


def sure_of(label, confidence=0.97, num_classes=4):
    """Probabilities of one example."""
    row = [(1 - confidence) / (num_classes - 1)] * num_classes
    row[label] = confidence
    return row


def trusted_of(run, probs, features, y, **changes):
    labels = kd.select_trusted(Table(probs, features), Pool(y), kd.Args(**changes), run)
    return labels.tolist(), json.loads((run.folder / "trusted.json").read_text())


@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_both_filters_and_their_report(run, how, capsys):
    features, truth = blobs(classes=(0, 1, 2, 3), each=20)
    label = truth.clone()
    label[:3] = 1  # confident, wrong, in the cluster of class 0
    probs = [sure_of(int(k)) for k in label]
    probs[30] = sure_of(3, 0.79)  # not confident and wrong
    y = truth.tolist()
    y[79] = -1  # unknown truth is left out of the percentages
    labels, report = trusted_of(run, probs, features, y, clustering=how)
    expected = truth.tolist()
    expected[0:3], expected[30] = [-1] * 3, -1
    assert labels == expected
    assert report["all"] == [80, pytest.approx(100 * 75 / 79)]
    assert report["confident"] == [79, pytest.approx(100 * 75 / 78)]
    assert report["trusted"] == [76, 100.0]
    assert "76 labels, 100.00 % right" in capsys.readouterr().out


def test_without_a_second_filter_confidence_alone_decides(run):
    features, truth = blobs(classes=(0, 1, 2, 3), each=5)
    probs = [sure_of(1, 0.801), sure_of(1, 0.799)] + [sure_of(1)] * 18
    labels, report = trusted_of(run, probs, features, truth.tolist(), clustering="none")
    assert labels == [1, -1] + [1] * 18 and report["trusted"] == report["confident"]


@pytest.mark.parametrize("how", ["dec", "kmeans", "none"])
def test_where_no_label_is_confident_nothing_is_trusted(run, how, capsys):
    features, _ = blobs(classes=(0, 1, 2, 3), each=5)
    probs = [sure_of(1, 0.5)] * 20
    labels, report = trusted_of(run, probs, features, [-1] * 20, clustering=how)
    assert labels == [-1] * 20
    assert report == {"all": [20, None], "confident": [0, None], "trusted": [0, None]}
    out = capsys.readouterr().out
    assert "class [0, 1, 2, 3]" in out and "--tau-select" in out


@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_a_class_without_survivors_has_no_cluster_and_the_others_are_filtered(run, how, capsys):
    features, truth = blobs(classes=(0, 1, 3), each=20)
    label = truth.clone()
    label[:3] = 3
    probs = [sure_of(int(k)) for k in label]
    labels, _ = trusted_of(run, probs, features, truth.tolist(), clustering=how)
    assert labels == [-1] * 3 + truth.tolist()[3:]
    out = capsys.readouterr().out
    assert "class [2]" in out


@pytest.mark.parametrize("how", ["dec", "kmeans"])
@pytest.mark.parametrize("survivors", [[2], [2, 2], [2, 0]])
def test_fewer_survivors_than_classes_are_trusted_as_far_as_they_go(run, how, survivors):
    features, truth = blobs(classes=(0, 1, 2, 3), each=5)
    rest = 20 - len(survivors)
    probs = [sure_of(k) for k in survivors] + [sure_of(1, 0.4)] * rest
    labels, _ = trusted_of(run, probs, features, truth.tolist(), clustering=how)
    assert labels == survivors + [-1] * rest


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_an_empty_cluster_is_named_and_none_of_its_labels_is_trusted(run, how, capsys):
    probs, one_place = [sure_of(0)] * 6 + [sure_of(1)] * 4, torch.ones(10, 3)
    labels, _ = trusted_of(run, probs, one_place, [0] * 10, clustering=how)
    assert labels == [0] * 6 + [-1] * 4
    assert "class [1] is empty" in capsys.readouterr().out


# ---------------------------------------------------------------------------- whole runs

SHORT = dict(
    num_labels=40, num_steps=20, eval_every=10, log_every=5, warmup_steps=2, batch_size=8,
    uratio=2, ema_decay=0.5, tau=0.5, tau_select=0.3, tau_inner=0.6, device="cpu",
)  # fmt: skip


def go(folder, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "DEC_STEPS", 20)
        result = kd.main(kd.Args(**{"runs_dir": str(folder), **SHORT, **changes}))
    return only_run(folder), result


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: (its folder, its result)."""
    return go(tmp_path_factory.mktemp("straight"))


def test_a_run_reports_the_inner_network_the_outer_one_and_the_trusted_set(straight):
    folder, result = straight
    written = json.loads((folder / "result.json").read_text())
    assert set(written) == {"test_acc", "test_acc_median20", "outer_acc", "seconds", "args",
                            "trusted", "measured", "by_class", "calibration_error"}  # fmt: skip
    inner, outer = (column(folder, "test/acc", stage) for stage in (3, 1))
    assert len(inner) == len(outer) == 2
    assert result["test_acc"] == inner[-1] and result["outer_acc"] == outer[-1]
    assert result["test_acc_median20"] == np.median(inner)
    sizes = [result["trusted"][name][0] for name in ("all", "confident", "trusted")]
    assert sizes[0] == 1297 > sizes[1] > sizes[2] > 0  # both filters had something to do
    y_outer, data = checkpoint(folder)["y_outer"].numpy(), common.load_data("digits", "data")
    kept, hidden = y_outer >= 0, np.ones(1297, bool)
    hidden[common.draw_labeled(data.train.y, 40, 10, 0)] = False
    right = 100 * (y_outer == data.train.y)[kept & hidden].mean()
    assert result["trusted"]["trusted"] == [kept.sum(), pytest.approx(right, abs=1e-3)]
    assert max(column(folder, "train/outer_rate", stage=3)) > 0
    student, _ = common.load_student(folder / "student")
    assert torch.equal(student.head.weight, checkpoint(folder)["ema"]["module.head.weight"])


def test_metrics_have_the_names_the_readme_gives(straight):
    train = {"loss", "loss_s", "lambda_u", "loss_u", "mask_rate", "outer_rate", "lr", "pl_acc",
             "pl_acc_masked"}  # fmt: skip
    expected = {"test/acc", "stage", "step"} | {f"train/{name}" for name in train}
    for stage in (1, 3):
        rows = (row for row in metrics(straight[0]) if row["stage"] == stage)
        assert set().union(*rows) == expected
    clustering = [row for row in metrics(straight[0]) if row["stage"] == 2]
    assert set().union(*clustering) == {"stage", "step", "train/loss", "train/agree"}


def test_outer_only_is_the_first_stage_of_the_whole_run(straight, tmp_path, capsys):
    folder, result = go(tmp_path, outer_only=True)
    assert metrics(folder) == [row for row in metrics(straight[0]) if row["stage"] == 1]
    assert result["test_acc"] == result["outer_acc"] == straight[1]["outer_acc"]
    assert result["trusted"] is None
    table = capsys.readouterr().out.splitlines()[-2:]
    assert "outer" in table[1] and "inner" not in table[1]


def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, monkeypatch):
    """One step of each network, its loss recomputed in NumPy from the same weights and views."""
    y_outer = np.maximum(np.arange(1297) % 20 - 10, -1)  # a label for every other example

    def trusted(outer, train, args, run):
        common.write_atomically(run.folder / "trusted.json", {})
        return torch.from_numpy(y_outer)

    monkeypatch.setattr(kd, "select_trusted", trusted)
    own = {"tau": 0.14, "tau_inner": 0.15, "unsup_loss": "mae", "lambda_u": 0.7, "uratio": 4}
    folder, _ = go(tmp_path, num_steps=1, log_every=1, warmup_steps=0, **own)
    data, views = common.load_data("digits", "data"), digits_views()
    drawn = common.draw_labeled(data.train.y, 40, 10, 0)
    for stage, name, tau in ((1, "weights", 0.14), (3, "inner weights", 0.15)):
        student = new_student(name)
        labeled = drawn[common.batch_at(40, 8, 0, f"stage {stage} labeled", 0)]
        idx = common.batch_at(len(views), 32, 0, f"stage {stage}", 0)
        common.seed_step(0, f"stage {stage}", 0)
        x = [views.weak(torch.from_numpy(labeled)), views.weak(idx), views.strong(idx)]
        probs = student(torch.cat(x))[0].softmax(dim=1).detach().numpy()
        loss, branches = -np.log(probs[np.arange(8), data.train.y[labeled]]).mean(), set()
        for i, weak, strong in zip(idx, probs[8:40], probs[40:], strict=True):
            own, outer = weak.max() >= tau, stage == 3 and y_outer[i] >= 0
            branches.add("own" if own else "outer" if outer else "none")
            target = weak.argmax() if own else y_outer[i]
            if own or outer:
                term = -np.log(strong[target]) if stage == 1 else 2 * (1 - strong[target])
                loss += 0.7 / 32 * term
        assert branches == ({"own", "none"} if stage == 1 else {"own", "outer", "none"})
        assert column(folder, "train/loss", stage) == [pytest.approx(loss, rel=1e-4)]


def test_shuffling_the_hidden_labels_changes_no_weight(straight, tmp_path, monkeypatch):
    other_hidden_labels(monkeypatch, kd, 40, shuffled)
    folder, result = go(tmp_path)
    assert differences(folder, straight[0]) == ["metrics"]  # only what is printed
    assert column(folder, "train/loss") == column(straight[0], "train/loss")
    assert result["trusted"]["trusted"] != straight[1]["trusted"]["trusted"]


@pytest.mark.parametrize("changes", [
    *({"unsup_loss": name} for name in ("ce", "mae", "nce")),
    {"sce_alpha": 0.5}, {"sce_beta": 0.01}, {"tau": 0.4}, {"tau_inner": 0.1}, {"tau_select": 0.5},
    {"lambda_u": 0.5}, {"clustering": "kmeans"}, {"clustering": "none"},
], ids=str)  # fmt: skip
def test_every_option_of_the_method_changes_the_inner_network(straight, tmp_path, changes):
    folder, _ = go(tmp_path, **changes)
    assert "model.head.weight" in differences(folder, straight[0])


def test_a_run_without_any_trusted_label_continues_as_fixmatch(tmp_path):
    folder, result = go(tmp_path, tau_select=1.0, unsup_loss="ce", tau_inner=0.5)
    assert result["trusted"]["confident"][0] == 0 and result["test_acc"] is not None
    assert set(column(folder, "train/outer_rate", stage=3)) == {0.0}


def killed_and_resumed(folder, monkeypatch, stage, step, **changes):
    """(folder, result) of a run that died in that step, before it wrote anything."""
    monkeypatch.setattr(kd, "DEC_STEPS", 20)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(common.Run, "log", dying_at(stage, step))
        go(folder, **changes)
    saved = kd.Args(**json.loads((only_run(folder) / "args.json").read_text()))
    return only_run(folder), kd.main(replace(saved, resume=str(only_run(folder))))


@pytest.mark.parametrize("stage, step", [
    (1, 12), (1, 19), (2, 0), (2, 12), (2, 19), (3, 0), (3, 13),
])  # fmt: skip
def test_a_run_stopped_anywhere_resumes_to_the_same_run(
    straight, tmp_path, monkeypatch, stage, step
):
    folder, result = killed_and_resumed(tmp_path, monkeypatch, stage, step)
    assert differences(folder, straight[0]) == []
    assert result | {"seconds": 0} == straight[1] | {"seconds": 0}


@pytest.mark.parametrize("how", ["kmeans", "none"])
def test_the_other_filters_resume_too(tmp_path, monkeypatch, how):
    whole, _ = go(tmp_path / "whole", clustering=how)
    folder, _ = killed_and_resumed(tmp_path / "cut", monkeypatch, 3, 2, clustering=how)
    assert differences(folder, whole) == []
