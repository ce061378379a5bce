"""kd_fixmatch.py: robust losses, deep embedded clustering, the trusted set, and whole runs that die and go on."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from torch import nn

import common
import kd_fixmatch as kd

# ---------------------------------------------------------------------------- losses

P = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
Y = torch.tensor([0, 2])
LN = math.log


def test_sce_matches_a_calculation_by_hand():
    expected = [
        2.0 * -LN(0.7) + 0.5 * -LN(1e-4) * (0.2 + 0.1),
        2.0 * -LN(0.1) + 0.5 * -LN(1e-4) * (0.7 + 0.2),
    ]
    assert kd.sce(P.log(), Y, alpha=2.0, beta=0.5).tolist() == pytest.approx(expected, rel=1e-5)


def test_mae_matches_a_calculation_by_hand():
    assert kd.mae(P.log(), Y).tolist() == pytest.approx([0.3 + 0.2 + 0.1, 0.7 + 0.2 + 0.9], rel=1e-5)


def test_nce_matches_a_calculation_by_hand():
    total = LN(0.7) + LN(0.2) + LN(0.1)
    assert kd.nce(P.log(), Y).tolist() == pytest.approx([LN(0.7) / total, LN(0.1) / total], rel=1e-5)


def test_gce_matches_a_calculation_by_hand():
    expected = [(1 - 0.7**0.7) / 0.7, (1 - 0.1**0.7) / 0.7]
    assert kd.gce(P.log(), Y).tolist() == pytest.approx(expected, rel=1e-5)


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
        "gce": (1 - (probs[target]) ** 0.7) / 0.7,
    }


@pytest.mark.parametrize("name", ["ce", "sce", "mae", "nce", "gce"])
def test_a_loss_agrees_with_a_slow_loop_and_divides_by_the_whole_batch(name):
    rng = np.random.RandomState(3)
    logits, target, counts = 2 * rng.randn(9, 5), rng.randint(0, 5, 9), rng.randint(0, 2, 9)
    assert 0 < counts.sum() < 9
    slow = sum(c * slow_losses(row, y)[name] for row, y, c in zip(logits, target, counts, strict=True)) / 9
    fast = kd.loss_robust(
        name, torch.tensor(logits).float(), torch.tensor(target), torch.tensor(counts).float(), 1.5, 0.3
    )
    assert fast.item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("name", ["ce", "sce", "mae", "nce", "gce"])
def test_a_loss_and_its_gradient_are_finite_at_any_confidence(name):
    for size in (0.0, 1.0, 30.0, 1e3, 1e4):
        for target in (0, 1):
            logits = torch.tensor([[size, -size, 0.0]], requires_grad=True)
            loss = kd.loss_robust(name, logits, torch.tensor([target]), torch.ones(1), 1.0, 0.1)
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all(), (size, target)


@pytest.mark.parametrize("name", ["ce", "sce", "mae", "nce", "gce"])
def test_a_loss_falls_towards_its_target_and_a_row_that_does_not_count_has_no_gradient(name):
    logits = torch.tensor([[0.5, 0.0, -0.5], [0.5, 0.0, -0.5]], requires_grad=True)
    kd.loss_robust(name, logits, torch.tensor([1, 1]), torch.tensor([1.0, 0.0]), 1.0, 0.1).backward()
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]
    assert torch.equal(logits.grad[1], torch.zeros(3))


# ---------------------------------------------------------------------------- heuristic 1


@pytest.mark.parametrize(
    "own, confident, outer, target, counts",
    [
        (3, 1, -1, 3, 1),  # confident, not in T_u: its own label
        (3, 1, 5, 3, 1),  # confident: its own overrides
        (3, 0, 5, 5, 1),  # not confident: the trusted label
        (3, 0, 0, 0, 1),  # class 0 is a label like any other
        (3, 0, -1, None, 0),  # neither: does not count
    ],
)
def test_heuristic_1(own, confident, outer, target, counts):
    got_target, got_counts = kd.heuristic_1(
        torch.tensor([own]), torch.tensor([float(confident)]), torch.tensor([outer])
    )
    assert got_counts.item() == counts and got_counts.dtype == torch.float32
    assert target is None or got_target.item() == target
    assert got_target.item() >= 0  # a class number also where the row does not count: losses gather by it


@pytest.mark.parametrize("n", range(1, 20))
def test_without_trusted_labels_heuristic_1_is_fixmatch(n):
    torch.manual_seed(n)
    label, mask = torch.randint(5, (n,)), torch.randint(2, (n,)).float()
    target, counts = kd.heuristic_1(label, mask, torch.full_like(label, -1))
    assert torch.equal(target, label) and torch.equal(counts, mask)


# ---------------------------------------------------------------------------- deep embedded clustering


def test_assignment_target_and_kl_match_a_calculation_by_hand():
    q = kd.soft_assignment(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]]))
    # kernels 1, 1/10 and 1/2, 1/5
    torch.testing.assert_close(q, torch.tensor([[10 / 11, 1 / 11], [5 / 7, 2 / 7]]))
    p = kd.target_distribution(q)
    # f = 125/77, 29/77; row 1: 0.8 against 1/29, row 2: 0.2 against 4/29
    expected = torch.tensor([[23.2 / 24.2, 1 / 24.2], [5.8 / 9.8, 4 / 9.8]])
    torch.testing.assert_close(p, expected)
    kl = sum(
        p_ik * LN(p_ik / q_ik) for p_ik, q_ik in zip(expected.flatten().tolist(), q.flatten().tolist(), strict=True)
    )
    assert kd.loss_dec(q, p).item() == pytest.approx(kl / 2, rel=1e-4)


def test_assignment_target_and_kl_agree_with_slow_loops():
    rng = np.random.RandomState(0)
    z, c = rng.randn(40, 6), rng.randn(4, 6)
    q = np.array([[1 / (1 + sum((a - b) ** 2)) for b in c] for a in z])
    q = np.array([row / sum(row) for row in q])
    f = [sum(q[i, k] for i in range(40)) for k in range(4)]
    p = np.array([[q[i, k] ** 2 / f[k] for k in range(4)] for i in range(40)])
    p = np.array([row / sum(row) for row in p])
    kl = np.mean([sum(p[i, k] * LN(p[i, k] / q[i, k]) for k in range(4)) for i in range(40)])
    fast_q = kd.soft_assignment(torch.tensor(z).float(), torch.tensor(c).float())
    np.testing.assert_allclose(fast_q, q, rtol=1e-3)
    np.testing.assert_allclose(kd.target_distribution(fast_q), p, rtol=1e-3)
    assert kd.loss_dec(fast_q, kd.target_distribution(fast_q)).item() == pytest.approx(kl, rel=1e-3)


@pytest.fixture
def run(tmp_path):
    return common.Run(str(tmp_path), "run", {"resume": None}, torch.device("cpu"), None)


def blobs(classes=(2, 5, 7), each=60, dim=8, distance=10.0):
    """Separable blobs: (features [n, dim], true class [n])."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor(classes).repeat_interleave(each)
    centers = distance * torch.eye(dim)[: len(classes)].repeat_interleave(each, dim=0)
    return centers + torch.randn(len(truth), dim, generator=generator), truth


def cluster(how, features, label, run):
    if how == "kmeans":
        return kd.cluster_kmeans(features, label, seed=0)
    return kd.cluster_dec(features, label, nn.Linear(1, 1), kd.Args(), run)


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
    again = common.Run(str(tmp_path), "again", {"resume": None}, torch.device("cpu"), None)
    assert torch.equal(cluster("dec", 64 * features + 256, label, again), expected)


def numpy_kl(features, projection, centroids, p):
    """KL(p || q) in float64 for a fixed target p."""
    z = features @ projection
    q = 1 / (1 + ((z[:, None] - centroids[None]) ** 2).sum(axis=2))
    q /= q.sum(axis=1, keepdims=True)
    p = q**2 / q.sum(axis=0) if p is None else p
    p = p / p.sum(axis=1, keepdims=True)
    return (p * np.log(p / q)).sum() / len(p), p, q


def test_a_step_of_clustering_goes_down_the_slope_of_the_kl_towards_a_fixed_target(run, monkeypatch):
    monkeypatch.setattr(kd, "DEC_STEPS", 1)
    features, truth = blobs(distance=3.0, dim=5)
    cluster("dec", features, truth, run)
    dec = checkpoint(run.folder)["dec"]
    f = features.double().numpy()
    f = f - f.mean(axis=0)
    f = f / np.sqrt((f**2).sum(axis=1).mean())
    start = [np.eye(5), np.stack([f[truth == k].mean(axis=0) for k in (2, 5, 7)])]
    kl, p, _ = numpy_kl(f, *start, None)
    for number, name in enumerate(("projection", "centroids")):
        moved = (start[number] - dec[name].numpy()) / kd.DEC_LR
        for at in ((0, 0), (1, 3), (2, 2)):
            nudged = [part.copy() for part in start]
            nudged[number][at] += 1e-5
            assert moved[at] == pytest.approx((numpy_kl(f, *nudged, p)[0] - kl) / 1e-5, rel=0.02, abs=1e-4)


def test_clustering_makes_assignments_surer_and_returns_the_surest(run):
    features, truth = blobs(distance=3.0)
    found = cluster("dec", features, truth, run)
    state = checkpoint(run.folder)
    assert (state["stage"], state["step"]) == (2, kd.DEC_STEPS)
    f = (features - features.mean(dim=0)).double().numpy()
    f = f / np.sqrt((f**2).sum(axis=1).mean())
    _, _, before = numpy_kl(f, np.eye(8), np.stack([f[truth == k].mean(axis=0) for k in (2, 5, 7)]), None)
    _, _, after = numpy_kl(f, *(state["dec"][name].double().numpy() for name in ("projection", "centroids")), None)
    assert after.max(axis=1).mean() > before.max(axis=1).mean() + 0.1
    assert np.array_equal(np.array([2, 5, 7])[after.argmax(axis=1)], found)


# ---------------------------------------------------------------------------- the trusted set


class Table(nn.Module):
    """An outer network that knows the logits and features of every example by heart."""

    def __init__(self, probs, features):
        super().__init__()
        self.logits, self.features = torch.tensor(probs).log(), features

    def forward(self, idx):
        return self.logits[idx], None, self.features[idx]


class Pool:
    """Stands for Views: the plain view of an example is its number."""

    def __init__(self, y):
        self.y = torch.tensor(y)

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
    assert "trusted        76 labels, 100.00 % right" in capsys.readouterr().out


def test_without_a_second_filter_confidence_alone_decides(run):
    features, truth = blobs(classes=(0, 1, 2, 3), each=5)
    probs = [sure_of(1) for _ in truth]
    probs[0] = sure_of(1, 0.801)
    probs[1] = sure_of(1, 0.799)
    labels, report = trusted_of(run, probs, features, truth.tolist(), clustering="none")
    assert labels == [1, -1] + [1] * 18 and report["trusted"] == report["confident"]


@pytest.mark.parametrize("how", ["dec", "kmeans", "none"])
def test_where_no_label_is_confident_nothing_is_trusted(run, how, capsys):
    features, truth = blobs(classes=(0, 1, 2, 3), each=5)
    labels, report = trusted_of(run, [sure_of(1, 0.5)] * 20, features, [-1] * 20, clustering=how)
    assert labels == [-1] * 20 and report == {"all": [20, None], "confident": [0, None], "trusted": [0, None]}
    assert "no label of class [0, 1, 2, 3] reaches --tau-select 0.8" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_a_class_without_survivors_has_no_cluster_and_the_others_are_filtered(run, how, capsys):
    features, truth = blobs(classes=(0, 1, 3), each=20)
    label = truth.clone()
    label[:3] = 3
    labels, _ = trusted_of(run, [sure_of(int(k)) for k in label], features, truth.tolist(), clustering=how)
    assert labels == [-1] * 3 + truth.tolist()[3:]
    out = capsys.readouterr().out
    assert "no label of class [2] reaches" in out and "no second filter" not in out


@pytest.mark.parametrize("how", ["dec", "kmeans"])
@pytest.mark.parametrize("survivors, second", [([2], False), ([2, 2], False), ([2, 0], True)])
def test_fewer_survivors_than_classes_are_trusted_as_far_as_they_go(run, how, survivors, second, capsys):
    features, truth = blobs(classes=(0, 1, 2, 3), each=5)
    probs = [sure_of(k) for k in survivors] + [sure_of(1, 0.4)] * (20 - len(survivors))
    labels, _ = trusted_of(run, probs, features, truth.tolist(), clustering=how)
    assert labels == survivors + [-1] * (20 - len(survivors))
    assert ("there is no second filter" in capsys.readouterr().out) is not second


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("how", ["dec", "kmeans"])
def test_an_empty_cluster_is_named_and_none_of_its_labels_is_trusted(run, how, capsys):
    probs = [sure_of(0)] * 6 + [sure_of(1)] * 4
    labels, _ = trusted_of(run, probs, torch.ones(10, 3), [0] * 10, clustering=how)  # all in one place
    assert labels == [0] * 6 + [-1] * 4
    assert "the cluster of class [1] is empty" in capsys.readouterr().out


# ---------------------------------------------------------------------------- whole runs

SHORT = dict(
    num_labels=40, num_steps=20, eval_every=10, log_every=5, warmup_steps=2, batch_size=8, uratio=2, ema_decay=0.5,
    tau=0.5, tau_select=0.3, tau_inner=0.6, device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_clustering(request, monkeypatch):
    if "tmp_path" in request.fixturenames and "run" not in request.fixturenames:
        monkeypatch.setattr(kd, "DEC_STEPS", 20)


def go(folder, **changes):
    result = kd.main(kd.Args(**{"runs_dir": str(folder), "data_dir": str(folder), **SHORT, **changes}))
    return only_run(folder), result


def only_run(folder):
    (made,) = folder.glob("kd_fixmatch-*")
    return made


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights(folder):
    state = checkpoint(folder)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}


def metrics(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: (its folder, its result)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "DEC_STEPS", 20)
        return go(tmp_path_factory.mktemp("straight"))


def test_a_run_reports_the_inner_network_the_outer_one_and_the_trusted_set(straight):
    folder, result = straight
    written = json.loads((folder / "result.json").read_text())
    assert {"test_acc", "test_acc_median20", "outer_acc", "seconds", "args", "trusted", "measured"} == set(written)
    assert written["args"].keys() == vars(kd.Args()).keys()
    inner, outer = ([r["test/acc"] for r in metrics(folder) if r["stage"] == s and "test/acc" in r] for s in (3, 1))
    assert len(inner) == len(outer) == 2
    assert result["test_acc"] == inner[-1] and result["outer_acc"] == outer[-1]
    assert result["test_acc_median20"] == np.median(inner)
    sizes = [result["trusted"][name][0] for name in ("all", "confident", "trusted")]
    assert sizes[0] == 1297 > sizes[1] > sizes[2] > 0  # both filters had something to do
    y_outer, data = checkpoint(folder)["y_outer"], common.load_data("digits", "data")
    kept = (y_outer >= 0).numpy()
    assert kept.sum() == sizes[2]
    right = 100 * (y_outer.numpy() == data.train.y)[kept].mean()
    assert result["trusted"]["trusted"][1] == pytest.approx(right, abs=1e-3)
    used = [r["train/outer_rate"] for r in metrics(folder) if r["stage"] == 3 and "train/outer_rate" in r]
    assert max(used) > 0


def test_the_saved_student_is_the_averaged_inner_network(straight):
    folder, result = straight
    student, _ = common.load_student(folder / "student")
    views = common.Views(common.load_data("digits", "data").test, common.preset_of("digits"), torch.device("cpu"))
    assert common.accuracy(common.predict(student, views), views.y) == result["test_acc"]
    assert torch.equal(student.head.weight, checkpoint(folder)["ema"]["head.weight"])


def test_outer_only_is_the_first_stage_of_the_whole_run(straight, tmp_path, capsys):
    folder, result = go(tmp_path, outer_only=True)
    assert {row["stage"] for row in metrics(folder)} == {1}
    assert metrics(folder) == [row for row in metrics(straight[0]) if row["stage"] == 1]
    assert result["test_acc"] == result["outer_acc"] == straight[1]["outer_acc"] and result["trusted"] is None
    table = capsys.readouterr().out.splitlines()[-2:]
    assert "outer network (FixMatch)" in table[1] and "inner" not in table[1]


def test_the_first_logged_losses_are_what_the_equations_say(tmp_path, monkeypatch):
    """One step of each network, its loss recomputed in NumPy from the same weights and views."""
    y_outer = np.maximum(np.arange(1297) % 20 - 10, -1)  # a label for every other example

    def trusted(outer, train, args, run):
        run.write_json("trusted.json", {})
        return torch.from_numpy(y_outer)

    monkeypatch.setattr(kd, "select_trusted", trusted)
    folder, _ = go(
        tmp_path, num_steps=1, log_every=1, tau=0.14, tau_inner=0.15, unsup_loss="mae", lambda_u=0.7, uratio=4
    )
    data = common.load_data("digits", "data")
    views = common.Views(data.train, common.preset_of("digits"), torch.device("cpu"))
    labeled = common.draw_labeled(data.train.y, 40, 10, 0)[common.batch_at(40, 8, 0, 0)]
    idx = common.batch_at(len(views), 32, 0, 0)
    logged = {row["stage"]: row["train/loss"] for row in metrics(folder) if "train/loss" in row}
    for stage, name, tau in ((1, "weights", 0.14), (3, "inner weights", 0.15)):
        common.seed_step(0, name, 0)
        student = common.build_student("cnn", 1, 8, 10).train()
        common.seed_step(0, f"stage {stage}", 0)
        x = [views.weak(torch.from_numpy(labeled)), views.weak(idx), views.strong(idx)]
        probs = student(torch.cat(x))[0].softmax(dim=1).detach().numpy()
        loss, branches = -np.log(probs[np.arange(8), data.train.y[labeled]]).mean(), set()
        for i, weak, strong in zip(idx, probs[8:40], probs[40:], strict=True):
            own, outer = weak.max() >= tau, stage == 3 and y_outer[i] >= 0
            branches.add("own" if own else "outer" if outer else "none")
            target = weak.argmax() if own else y_outer[i]
            if own or outer:
                loss += 0.7 / 32 * (-np.log(strong[target]) if stage == 1 else 2 * (1 - strong[target]))
        assert branches == ({"own", "none"} if stage == 1 else {"own", "outer", "none"})
        assert logged[stage] == pytest.approx(loss, rel=1e-4)


def test_shuffling_the_hidden_labels_changes_no_weight(straight, tmp_path, monkeypatch):
    real = common.load_data
    drawn = common.draw_labeled(real("digits", "").train.y, 40, 10, seed=0)

    def shuffled(*args):
        data = real(*args)
        hidden = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.train.y[hidden] = np.random.RandomState(1).permutation(data.train.y[hidden])
        return data

    monkeypatch.setattr(kd, "load_data", shuffled)
    monkeypatch.setattr(kd, "draw_labeled", lambda *args: drawn)
    folder, result = go(tmp_path)
    assert same_weights(folder, straight[0])
    assert torch.equal(checkpoint(folder)["y_outer"], checkpoint(straight[0])["y_outer"])
    losses = [[r.get("train/loss") for r in metrics(f)] for f in (folder, straight[0])]
    assert losses[0] == losses[1]
    assert result["trusted"]["trusted"] != straight[1]["trusted"]["trusted"]  # only what is printed


@pytest.mark.parametrize("changes", [dict(unsup_loss=k) for k in ("ce", "mae", "nce", "gce")] + [
    dict(sce_alpha=0.5), dict(sce_beta=0.01), dict(tau=0.4), dict(tau_inner=0.9), dict(tau_select=0.5),
    dict(lambda_u=0.5), dict(clustering="kmeans"), dict(clustering="none"),
])  # fmt: skip
def test_every_option_of_the_method_changes_the_inner_network(straight, tmp_path, changes):
    folder, _ = go(tmp_path, **changes)
    assert not same_weights(folder, straight[0])


def test_a_run_without_any_trusted_label_goes_on_as_fixmatch(tmp_path, capsys):
    folder, result = go(tmp_path, tau_select=1.0, unsup_loss="ce", tau_inner=0.5)
    assert result["trusted"]["confident"][0] == 0 and result["test_acc"] is not None
    assert "there is no second filter" in capsys.readouterr().out
    rates = [r["train/outer_rate"] for r in metrics(folder) if r["stage"] == 3 and "train/outer_rate" in r]
    assert set(rates) == {0.0}


@pytest.mark.parametrize("how", ["killed", "signal"])
@pytest.mark.parametrize("stage, step", [(1, 12), (1, 19), (2, 0), (2, 12), (2, 19), (3, 0), (3, 13)])
def test_a_run_stopped_anywhere_resumes_to_the_same_weights(straight, tmp_path, monkeypatch, capsys, how, stage, step):
    """killed: dies in that step, after the update, before anything is written. signal: SIGTERM came in that step."""
    real = common.Run.log

    def stopping(self, at_stage, at_step, *args, **values):
        if (at_stage, at_step) == (stage, step) and how == "killed":
            raise KeyboardInterrupt
        real(self, at_stage, at_step, *args, **values)
        if (at_stage, at_step) == (stage, step):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", stopping)
        go(tmp_path)
    folder = only_run(tmp_path)
    saved = kd.Args(**json.loads((folder / "args.json").read_text()))
    capsys.readouterr()
    result = kd.main(kd.replace(saved, resume=str(folder)))
    if how == "signal":
        assert f"going on in stage {stage} after step {step + 1}\n" in capsys.readouterr().out
    assert same_weights(folder, straight[0])
    assert torch.equal(checkpoint(folder)["y_outer"], checkpoint(straight[0])["y_outer"])
    assert metrics(folder) == metrics(straight[0])
    assert {k: v for k, v in result.items() if k != "seconds"} == {
        k: v for k, v in straight[1].items() if k != "seconds"
    }


def test_the_checkpoint_in_the_middle_of_clustering_holds_projection_centroids_and_step(tmp_path, monkeypatch):
    real = common.Run.log

    def stopping(self, at_stage, at_step, *args, **values):
        real(self, at_stage, at_step, *args, **values)
        if (at_stage, at_step) == (2, 7):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(common.Run, "log", stopping)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    state = checkpoint(only_run(tmp_path))
    assert (state["stage"], state["step"]) == (2, 8)
    assert state["dec"]["projection"].shape == (64, 64) and state["dec"]["centroids"].shape[1] == 64
    assert not torch.equal(state["dec"]["projection"], torch.eye(64)) and "head.weight" in state["outer"]


@pytest.mark.parametrize("how", ["kmeans", "none"])
def test_the_other_filters_resume_too(tmp_path, monkeypatch, how):
    whole, _ = go(tmp_path / "whole", clustering=how)
    real = common.Run.log

    def dying(self, at_stage, at_step, *args, **values):
        if (at_stage, at_step) == (3, 2):
            raise KeyboardInterrupt
        real(self, at_stage, at_step, *args, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", dying)
        go(tmp_path / "cut", clustering=how)
    folder = only_run(tmp_path / "cut")
    kd.main(kd.replace(kd.Args(**json.loads((folder / "args.json").read_text())), resume=str(folder)))
    assert same_weights(folder, whole)


def test_a_checkpoint_of_another_run_in_the_clustering_stage_is_refused(tmp_path):
    settings = dict(num_steps=2, eval_every=2, outer_only=True, runs_dir=str(tmp_path), data_dir=str(tmp_path))
    kd.main(kd.Args(**settings))
    (path,) = tmp_path.glob("kd*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"stage": 2, "outer": {"other": torch.zeros(1)}}, path)
    with pytest.raises(common.UserError, match="is not of this run"):
        kd.main(kd.Args(**settings, resume=str(path.parent)))
