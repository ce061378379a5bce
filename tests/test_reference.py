"""Every training loop against a slow reference in float64, step by step over whole short runs.

The reference is written from the formulas of the papers and of the published code. It has its own
optimizers, averages, losses and targets, and shares with the scripts only the made-up network and
data, the seeds and the numbers of the examples of a batch, which have tests of their own."""

import copy
import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import adamatch as am
import common
import kd_fixmatch as kd
import pseudolabel
import zeromatch as zm

K, N, B, B_u, SEED = 4, 60, 6, 18, 3  # classes, examples, labeled and unlabeled ones a step
NEAR = {"rtol": 0, "atol": 1e-8}  # the rest is rounding
POWERS = {  # of --layer-decay: three below the heads is what comes before the first block
    "encoder.pos_embedding": 3, "encoder.stem": 3, "encoder.layers.0": 2, "encoder.layers.1": 1,
    "encoder.norm": 1,
}  # fmt: skip

# ---------------------------------------------------------------------------- stand-ins


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """The loops cast to float32 by .float(); here both sides stay in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Encoder(nn.Module):
    """Two blocks of a channel mix, with batch statistics or without."""

    num_features = 6

    def __init__(self, statistics):
        super().__init__()
        norm = nn.BatchNorm2d if statistics else lambda channels: nn.GroupNorm(2, channels)
        block = lambda: nn.Sequential(nn.Conv2d(6, 6, 1), norm(6), nn.Tanh())  # noqa: E731
        self.pos_embedding = nn.Parameter(0.3 * torch.randn(1, 6, 1, 1))
        self.stem, self.layers = nn.Conv2d(5, 6, 1), nn.ModuleList([block(), block()])
        self.norm = norm(6)

    def forward(self, x):
        x = self.stem(x) + self.pos_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(dim=(2, 3))


class Views:
    """Three views of an example that no two calls can confuse."""

    def __init__(self, split, *_):
        self.x, self.y, self.batch = torch.from_numpy(split.x), torch.tensor(split.y), 50
        self.extra, self.order = torch.zeros(len(self.y), 0), torch.arange(len(self.y))

    def __len__(self):
        return len(self.y)

    def plain(self, idx):
        return self.x[idx]

    def weak(self, idx):
        return self.x[idx] + 0.3 * torch.sin(7 * self.x[idx])

    def strong(self, idx):
        return 0.8 * self.x[idx] + 0.5 * torch.cos(5 * self.x[idx])


class Run:
    """Notes what a loop hands over at each step, and writes no checkpoint."""

    def __init__(self, folder):
        self.folder, self.device, self.state, self.steps = folder, "cpu", {"stage": 0}, {}
        self.history = {}

    def __call__(self, *_):  # in place of the class: the run of main
        return self

    def describe(self, data, labeled, *_):
        self.labeled = torch.from_numpy(labeled)
        return data.test

    def autocast(self):
        return nullcontext()

    def scaler(self):
        return torch.amp.GradScaler("cpu", enabled=False)

    def restore(self, stage, parts):
        self.steps[stage] = []
        return 0, {}

    def log(self, stage, step, num_steps, line, **values):
        assert step == len(self.steps[stage])
        line.format(**{name: float(torch.as_tensor(x).detach()) for name, x in values.items()})
        self.noted = values

    def evaluate(self, stage, step, num_steps, student, test):
        assert len(test) == len(test.extra) == 5
        self.evaluated = student

    def save(self, stage, step, num_steps, parts, **state):
        if stage == 2 and "dec" in parts:
            self.noted |= parts["dec"]
        else:
            assert parts["ema"].module is self.evaluated
            groups = parts["optimizer"].param_groups
            rates = {id(p): group["lr"] for group in groups for p in group["params"]}
            named = parts["model"].named_parameters()
            self.noted |= {f"lr of {name}": rates[id(p)] for name, p in named} | state
            self.noted |= weights_of(parts["model"], self.evaluated.state_dict())
            for name in state:  # or each would keep the graphs of all steps before
                assert not getattr(state[name], "requires_grad", False), name
        noted = {k: torch.as_tensor(v) for k, v in self.noted.items() if v is not None}
        self.steps[stage].append({k: v.detach().clone() for k, v in noted.items()})

    def accuracy(self, stage):
        return None

    def finish(self, evaluated, *_, **facts):
        return evaluated


def weights_of(net, average):
    """Trained and averaged weights and batch statistics, but for the count of batches."""
    named = {f"model {k}": w for k, w in net.state_dict().items()}
    named |= {f"average {k}": w for k, w in average.items()}
    return {k: w.detach().clone() for k, w in named.items() if w.is_floating_point()}


def made_up(statistics, monkeypatch, script, folder):
    """(run, data, the teacher's labels, new student): stand-ins for all that `main` reads."""
    rng = np.random.RandomState(5)
    y = rng.permutation(np.repeat(np.arange(K), (24, 18, 12, 6)))  # skewed, so alignment matters
    y = np.append(y, [0, 1, 2, 3, 0])
    x = 1.1 * rng.randn(K, 5)[y][:, :, None, None] + 0.5 * rng.randn(N + 5, 5, 2, 2)
    train, test = (common.Split(x[at], y[at]) for at in (slice(N), slice(N, N + 5)))
    data = SimpleNamespace(name="made up", classes=list("abcd"), train=train, test=test)
    y_zs = np.where(rng.rand(N + 5) < 0.7, y, rng.randint(0, K, N + 5))
    y_zs[rng.rand(N + 5) < 0.15] = -1
    y_zs = {"train": y_zs[:N], "test": y_zs[N:]}

    def student(backbone, preset, num_classes, num_extra=0, weights="none", parts=()):
        return common.Student(Encoder(statistics), num_classes, num_extra)

    run = Run(folder)
    monkeypatch.setattr(script, "load_data", lambda *_: data)
    monkeypatch.setattr(script, "build_student", student)
    monkeypatch.setattr(script, "make_views", Views)
    monkeypatch.setattr(script, "Run", run)
    for module in {script, pseudolabel} - {am, kd}:
        monkeypatch.setattr(module, "read_labels", lambda path, data, part, *_: (y_zs[part], None))
    return run, data, torch.from_numpy(y_zs["train"]), student


COMMON = dict(
    num_labels=8, seed=SEED, device="cpu", amp="off", backbone="cnn", weights="none", num_steps=9,
    eval_every=1, batch_size=B, uratio=3, lr=0.2, weight_decay=0.05, layer_decay=1.0,
    warmup_steps=2, ema_decay=0.3, optimizer="sgd", lambda_u=0.7,
)  # fmt: skip
ADAMW = dict(optimizer="adamw", lr=0.03, layer_decay=0.5, ema_decay=0.0)

# ---------------------------------------------------------------------------- the reference


def softmax(z):
    e = (z - z.detach().max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)


def ce(z, label):
    """Cross-entropy of each row; 0 where the label is -1."""
    own = softmax(z)[torch.arange(len(z)), label.clamp(min=0)]
    return -own.log() * (label >= 0)


class Learner:
    """A network, its optimizer and its average, tensor by tensor."""

    def __init__(self, net, a):
        self.net, self.a, self.t, self.v, self.s = net.train(), a, 0, {}, {}

    def rate(self, name, lr):
        powers = [power for start, power in POWERS.items() if name.startswith(start)]
        return lr * self.a.layer_decay ** sum(powers)

    def update(self, loss, steps):
        """One of `steps` steps down the slope; returns what to compare."""
        warmup, named = self.a.warmup_steps, dict(self.net.named_parameters())
        lr = self.a.lr * self.t / max(warmup, 1)
        if self.t >= warmup:
            lr = self.a.lr * math.cos(7 * math.pi * (self.t - warmup) / (16 * (steps - warmup)))
        grads = torch.autograd.grad(loss, named.values(), allow_unused=True)
        for (name, p), g in zip(named.items(), grads, strict=True):
            rate, decays = self.rate(name, lr), p.ndim > 1 and "pos_emb" not in name
            decay = self.a.weight_decay if decays else 0.0
            if g is None:  # a head that nothing trains
                continue
            if self.a.optimizer == "sgd":  # Nesterov
                g = g + decay * p.detach()
                self.v[name] = 0.9 * self.v.get(name, 0.0) + g
                p.data = p.data - rate * (g + 0.9 * self.v[name])
            else:  # AdamW
                self.v[name] = 0.9 * self.v.get(name, 0.0) + 0.1 * g
                self.s[name] = 0.999 * self.s.get(name, 0.0) + 0.001 * g**2
                v = self.v[name] / (1 - 0.9 ** (self.t + 1))
                s = self.s[name] / (1 - 0.999 ** (self.t + 1))
                p.data = p.data * (1 - rate * decay) - rate * v / (s.sqrt() + 1e-8)
        now = {k: w.clone() for k, w in self.net.state_dict().items()}
        d = min(self.a.ema_decay, (1 + self.t) / (10 + self.t)) if self.t else 0.0
        old = self.average if self.t else now
        mean = lambda k, w: d * old[k] + (1 - d) * w if w.is_floating_point() else w  # noqa: E731
        self.average = {k: mean(k, w) for k, w in now.items()}
        self.t += 1
        rates = {f"lr of {name}": self.rate(name, lr) for name in named}
        return {"loss": loss, "lr": lr} | rates | weights_of(self.net, self.average)


def averaged(learner):
    net = copy.deepcopy(learner.net)
    net.load_state_dict(learner.average)
    return net


def aligned_labels(probs_lb, weak, tau, target, p_ulb):
    """(c_tau, argmax of the aligned probabilities, whether their maximum reaches c_tau)."""
    c_tau = tau * sum(max(row) for row in probs_lb.tolist()) / B
    aligned = weak * (target + 1e-6) / (p_ulb + 1e-6)
    rows = [[value / sum(row) for value in row] for row in aligned.tolist()]
    label = torch.tensor([row.index(max(row)) for row in rows])
    return torch.tensor(c_tau), label, torch.tensor([float(max(row) >= c_tau) for row in rows])


def compare(ours, expected):
    """Every step and every value that the reference has; and that it is no trivial case."""
    assert len(ours) == len(expected) >= 5
    for step, (mine, reference) in enumerate(zip(ours, expected, strict=True)):
        for name, value in reference.items():
            value = torch.as_tensor(value).detach().to(mine[name])
            assert mine[name].shape == value.shape, (step, name)
            assert torch.allclose(mine[name], value, **NEAR), (step, name, mine[name], value)
    if "mask_rate" in expected[0]:
        assert 0.05 < sum(row["mask_rate"] for row in expected) / len(expected) < 0.95
    assert not torch.allclose(expected[-1]["model head.weight"], expected[0]["model head.weight"])


def batches(labeled, keys, t):
    """Numbers of the labeled and of the unlabeled examples of step t."""
    lb = labeled[common.batch_at(8, B, SEED, keys[0], t)]
    return lb, common.batch_at(N, B_u, SEED, keys[1], t)


def new(student, key, *given):
    common.seed_step(SEED, key, 0)
    return student("cnn", None, K, *given)


# ---------------------------------------------------------------------------- zeromatch.py


@pytest.mark.parametrize("statistics, changes", [
    (True, {}), (False, ADAMW | {"anneal": "none", "tau": 0.9}),
    (True, {"agreement": True, "prior": "teacher", "tau": 1.0, "stages": "2"}),
], ids=str)  # fmt: skip
def test_zeromatch(tmp_path, monkeypatch, statistics, changes):
    """Both stages through main. Stage 2 inherits encoder and main head of the AVERAGED network;
    auxiliary head, optimizer, averages, schedule and marginals are new."""
    run, data, zs, student = made_up(statistics, monkeypatch, zm, tmp_path)
    own = dict(num_steps_stage1=7, lambda_p=1.3, marginal_decay=0.8, pseudolabels="given")
    a = zm.Args(**COMMON | own | changes)
    result, views = zm.main(copy.copy(a)), Views(data.train)
    net, expected, y = new(student, "weights"), [], torch.from_numpy(data.train.y)
    if a.stages == "both":
        learner = Learner(net, a)
        for t in range(7):
            idx = common.batch_at(N, B_u, SEED, "stage 1", t)
            loss = ce(learner.net(views.weak(idx))[0], zs[idx]).sum() / B_u
            expected.append(learner.update(loss, 7))
        compare(run.steps[1], expected)
        net = averaged(learner)
    common.seed_step(SEED, "auxiliary head", 0)
    net.kd_head = nn.Linear(6, K)
    learner, expected, moved = Learner(net, a), [], 0
    p_lb, p_ulb, shares = torch.full((K,), 1 / K), None, None
    if a.prior == "teacher":
        answers = torch.tensor([(zs == k).sum() / (zs >= 0).sum() for k in range(K)])
        shares = answers / 2 + 1 / K / 2  # there are equally many labels of each class
    for t in range(9):
        lb, ulb = batches(run.labeled, ("labeled", "unlabeled"), t)
        x = torch.cat([views.weak(lb), views.weak(ulb), views.strong(ulb)])
        z, z_kd, _ = learner.net(x)
        z_lb, z_w, z_s = z[:B], z[B:-B_u], z[-B_u:]
        probs_lb, weak = softmax(z_lb).detach(), softmax(z_w).detach()
        p_lb = 0.8 * p_lb + 0.2 * probs_lb.mean(dim=0)
        p_ulb = weak.mean(dim=0) if t == 0 else 0.8 * p_ulb + 0.2 * weak.mean(dim=0)
        target = p_lb if shares is None else shares
        c_tau, label, mask = aligned_labels(probs_lb, weak, a.tau, target, p_ulb)
        moved += int((label != weak.argmax(dim=1)).sum())
        alpha_t = t / 8 if a.anneal == "linear" else 1.0
        if a.agreement:
            mask = torch.where((label == zs[ulb]) & (mask == 0), alpha_t, mask)
        loss_s, loss_u = ce(z_lb, y[lb]).sum() / B, (ce(z_s, label) * mask).sum() / B_u
        loss_kd = ce(z_kd[:-B_u], zs[torch.cat([lb, ulb])]).sum() / (B + B_u)
        loss = loss_s + 0.7 * loss_u + 1.3 * alpha_t * loss_kd
        expected.append(learner.update(loss, 9) | dict(
            loss_s=loss_s, loss_u=loss_u, loss_kd=loss_kd, c_tau=c_tau, alpha_t=alpha_t,
            mask_rate=mask.mean(), p_lb=p_lb, p_ulb=p_ulb, lambda_u=0.7,
            kd_weight=1.3 * alpha_t,
        ))  # fmt: skip
    compare(run.steps[2], expected)
    assert moved and result is run.evaluated  # alignment changed labels


# ---------------------------------------------------------------------------- adamatch.py


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("changes", [
    {}, {"variant": "paper"}, {"variant": "paper", "marginal_decay": 0.8, "lambda_u": 1.7},
    {"supervised_only": True}, {"feature_input": True, "tau": 0.9},
], ids=str)  # fmt: skip
def test_adamatch(tmp_path, monkeypatch, statistics, changes):
    """Both variants and both baselines through main, with what main fills in."""
    run, data, zs, student = made_up(statistics, monkeypatch, am, tmp_path)
    paper, extra = changes.get("variant") == "paper", changes.get("feature_input", False)
    own = {} if paper else {"marginal_decay": 0.8}
    given = {"pseudolabels": "a", "pseudolabels_test": "b"} if extra else {}
    changes = changes | given | ({} if statistics else ADAMW)
    result = am.main(am.Args(**COMMON | own | changes))
    # What the variants leave unset: USB's 0.95, for the paper 0.9 and a decay of 0.999.
    defaults = {"tau": 0.9 if paper else 0.95, "marginal_decay": 0.999}
    a = am.Args(**defaults | COMMON | own | changes)
    views, y = Views(data.train), torch.from_numpy(data.train.y)
    learner = Learner(new(student, "weights", K if extra else 0), a)
    one_hot = torch.tensor([[float(k == label) for k in range(K)] for label in zs])
    p_lb, means, expected = torch.full((K,), 1 / K), [torch.full((K,), 1 / K)] * 128, []

    def logits(x, idx):
        return learner.net(x, one_hot[idx] if extra else None)[0]

    for t in range(9):
        lb, ulb = batches(run.labeled, ("labeled", "unlabeled"), t)
        if a.supervised_only:
            loss = ce(logits(views.weak(lb), lb), y[lb]).sum() / B
            expected.append(learner.update(loss, 9) | {"loss_s": loss})
            continue
        x_lb, idx = views.weak(lb), lb
        if paper:
            x_lb, idx = torch.cat([x_lb, views.strong(lb)]), torch.cat([lb, lb])
        x = torch.cat([x_lb, views.weak(ulb), views.strong(ulb)])
        z = logits(x, torch.cat([idx, ulb, ulb]))
        z_lb, z_w, z_s = z[: -2 * B_u], z[-2 * B_u : -B_u], z[-B_u:]
        if paper and statistics:  # random logit interpolation; its pass leaves no trace
            buffers = {k: b.clone() for k, b in learner.net.named_buffers()}
            z_alone = torch.func.functional_call(learner.net, buffers, (x_lb,))[0]
            common.seed_step(SEED, "adamatch", t)
            lam = torch.cat([torch.rand(B, K), torch.rand(B, K)])
            z_lb = (1 - lam) * z_lb + lam * z_alone
        probs_lb, weak = softmax(z_lb[:B]).detach(), softmax(z_w).detach()
        p_lb = a.marginal_decay * p_lb + (1 - a.marginal_decay) * probs_lb.mean(dim=0)
        if paper:
            means = means[1:] + [weak.mean(dim=0)]
            p_ulb = sum(means) / 128
            half = 0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * t / 9))
            after = 0.5 + 0.5 * math.cos(max(math.pi, 2 * math.pi * t / 9))
            u_weight = half + (a.lambda_u - 1) * after
        else:
            p_ulb = weak.mean(dim=0) if t == 0 else 0.8 * p_ulb + 0.2 * weak.mean(dim=0)
            u_weight = a.lambda_u
        c_tau, label, mask = aligned_labels(probs_lb, weak, a.tau, p_lb, p_ulb)
        loss_s = ce(z_lb, y[idx]).sum() / len(idx)
        loss_u = (ce(z_s, label) * mask).sum() / B_u
        expected.append(learner.update(loss_s + u_weight * loss_u, 9) | dict(
            loss_s=loss_s, loss_u=loss_u, u_weight=u_weight, c_tau=c_tau, p_lb=p_lb,
            p_ulb=p_ulb, mask_rate=mask.mean(),
        ))  # fmt: skip
    compare(run.steps[1], expected)
    assert result is run.evaluated


# ---------------------------------------------------------------------------- kd_fixmatch.py


def robust(name, z, label, a):
    """The loss of each row, by its definition over all classes."""
    p, e = softmax(z), torch.tensor([[float(k == y) for k in range(K)] for y in label])
    if name == "sce":
        rce = -(p.clamp(min=1e-7) * e.clamp(min=1e-4).log()).sum(dim=1)
        return a.sce_alpha * ce(z, label) + a.sce_beta * rce
    if name == "mae":
        return (p - e).abs().sum(dim=1)
    return ce(z, label) / (1 if name == "ce" else -p.log().sum(dim=1))


def named(cluster, label, present):
    """A class for each cluster, one to one: of all such names those with which most rows agree."""
    names = (np.array(order) for order in itertools.permutations(present))
    return max((order[cluster] for order in names), key=lambda row: (row == label).sum())


def dec(features, label, steps):
    """[(loss, agreement, projection, centroids) of each step], the classes of the last clusters.
    NumPy; the gradient by the formula of the paper of DEC, for a fixed target."""
    f, present = features - features.mean(axis=0), np.unique(label)
    f = f / np.sqrt((f**2).sum() / len(f))
    start = KMeans(len(present), n_init=10, random_state=SEED).fit(f)  # it knows no label
    w, c = np.eye(f.shape[1]), start.cluster_centers_
    v_w, v_c, rows = 0.0, 0.0, []
    for t in range(steps + 1):
        apart = (f @ w)[:, None] - c[None]
        kernel = 1 / (1 + (apart**2).sum(axis=2))
        q = kernel / kernel.sum(axis=1, keepdims=True)
        found = named(q.argmax(axis=1), label, present)
        if t == steps:
            return rows, found
        p = q**2 / q.sum(axis=0)
        p = p / p.sum(axis=1, keepdims=True)
        slope = 2 / len(f) * (kernel * (p - q))[:, :, None] * apart
        v_w, v_c = 0.9 * v_w + f.T @ slope.sum(axis=1), 0.9 * v_c - slope.sum(axis=0)
        w, c = w - 3 * v_w, c - 3 * v_c
        loss, agree = (p * np.log(p / q)).sum() / len(f), (found == label).mean()
        rows.append(dict(loss=loss, agree=agree, projection=w, centroids=c))


@pytest.mark.parametrize("statistics, changes", [
    (True, {}), (True, {"unsup_loss": "mae"}),
    (False, {"unsup_loss": "nce", "tau": 0.5, "tau_inner": 0.55, "tau_select": 0.45}),
    (False, ADAMW | dict(unsup_loss="ce", lr=0.1, tau=0.38, tau_inner=0.52, tau_select=0.5)),
], ids=str)  # fmt: skip
def test_kd_fixmatch(tmp_path, monkeypatch, statistics, changes):
    """All three stages through main: the outer network's AVERAGE labels plain views, and nothing
    but its trusted labels reaches the new inner network."""
    monkeypatch.setattr(kd, "DEC_STEPS", 6)
    run, data, _, student = made_up(statistics, monkeypatch, kd, tmp_path)
    own = dict(tau=0.75, tau_inner=0.7, tau_select=0.48, sce_alpha=0.8, sce_beta=0.3)
    a = kd.Args(**COMMON | own | changes)
    result, views = kd.main(copy.copy(a)), Views(data.train)
    y, y_outer = torch.from_numpy(data.train.y), torch.full((N,), -1)
    for stage, key, tau in ((1, "weights", a.tau), (3, "inner weights", a.tau_inner)):
        learner, expected, branches = Learner(new(student, key), a), [], set()
        for t in range(9):
            lb, ulb = batches(run.labeled, (f"stage {stage} labeled", f"stage {stage}"), t)
            x = torch.cat([views.weak(lb), views.weak(ulb), views.strong(ulb)])
            z, rows = learner.net(x)[0], []
            for row, outer in zip(softmax(z[B:-B_u]).detach(), y_outer[ulb], strict=True):
                if row.max() >= tau:
                    rows.append((int(row.argmax()), 1.0, "own"))
                elif stage == 3 and outer >= 0:
                    rows.append((int(outer), 1.0, "outer"))
                else:
                    rows.append((int(row.argmax()), 0.0, "none"))
            label, used = (torch.tensor([row[at] for row in rows]) for at in (0, 1))
            branches |= {row[2] for row in rows}
            each = robust(a.unsup_loss if stage == 3 else "ce", z[-B_u:], label, a)
            loss_s, loss_u = ce(z[:B], y[lb]).sum() / B, (each * used).sum() / B_u
            by_outer = sum(row[2] == "outer" for row in rows) / B_u
            expected.append(learner.update(loss_s + 0.7 * loss_u, 9) | dict(
                loss_s=loss_s, loss_u=loss_u, lambda_u=0.7,
                mask_rate=used.mean(), outer_rate=by_outer, y_outer=y_outer,
            ))  # fmt: skip
        compare(run.steps[stage], expected)
        assert branches == ({"own", "none"} if stage == 1 else {"own", "outer", "none"})
        if stage == 1:
            z, _, features = averaged(learner).eval()(views.plain(torch.arange(N)))
            confidence, label = softmax(z).detach().max(dim=1)
            kept = confidence >= a.tau_select
            rows, found = dec(features.detach().numpy()[kept], label.numpy()[kept], 6)
            for mine, reference in zip(run.steps[2], rows, strict=True):
                for name, value in reference.items():
                    assert np.allclose(mine[name], value, **NEAR), name
            trusted = kept.clone()
            trusted[kept] = torch.from_numpy(found) == label[kept]
            assert N > kept.sum() >= trusted.sum() > 8
            assert kept.sum() > trusted.sum() or not statistics  # the second filter rejects some
            y_outer = torch.where(trusted, label, -1)
    assert result is run.evaluated


# ---------------------------------------------------------------------------- edges


@pytest.mark.parametrize("script", [zm, am, kd])
def test_a_confidence_that_just_reaches_the_threshold_is_enough(tmp_path, monkeypatch, script):
    """A head of zeros gives each of four classes exactly 0.25, aligned or not."""
    run, _, _, student = made_up(True, monkeypatch, script, tmp_path)

    def flat(*given, **more):
        net = student(*given, **more)
        nn.init.zeros_(net.head.weight), nn.init.zeros_(net.head.bias)
        return net

    own = {zm: {"stages": "2", "pseudolabels": "given"}, am: {}, kd: {"outer_only": True}}[script]
    own |= {"tau": 0.25 if script is kd else 1.0, "num_steps": 1, "eval_every": 1}
    own["warmup_steps"] = 1
    monkeypatch.setattr(script, "build_student", flat)
    script.main(script.Args(**COMMON | own))
    assert run.steps[2 if script is zm else 1][0]["mask_rate"] == 1


def test_an_empty_class_and_a_sharp_prediction_meet_the_published_constants():
    probs, p_lb = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0.0, 0.3, 0.7])
    p_ulb = torch.tensor([0.4, 0.0, 0.6])
    raw = torch.tensor([0.5 * 1e-6 / (0.4 + 1e-6), 0.5 * (0.3 + 1e-6) / 1e-6, 0.0])
    for script in (zm, am):
        aligned = script.align(probs, p_lb, p_ulb)[0]
        assert torch.allclose(aligned, raw / raw.sum(), rtol=1e-9, atol=0)
    # Clamped, p is (1, 1e-7, 1e-7), and the target 0 is (1, 1e-4, 1e-4).
    rce = kd.sce(torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([0]), 0.0, 1.0)
    assert rce.item() == pytest.approx(-2e-7 * math.log(1e-4), rel=1e-6)
