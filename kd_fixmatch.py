"""KD-FixMatch: FixMatch whose second network starts from what the first one is sure of.

Paper: "KD-FixMatch: Knowledge Distillation Siamese Neural Networks", ICIP 2023, arXiv:2309.05826. Its
authors published no code. No teacher's labels are used here: the only teacher is the outer network.

Stage 1 trains an OUTER network by FixMatch. Stage 2 labels every unlabeled example with it and keeps a
trusted set T_u: confident labels that deep embedded clustering (DEC) of the features agrees with.
Stage 3 trains an INNER network, from new weights, on labeled, unlabeled and trusted examples:

    loss = loss_s + lambda_u * loss_u

    loss_s   cross-entropy on labeled weak views
    loss_u   on unlabeled STRONG views, mean over the whole unlabeled batch; a row whose target is not
             known counts as 0. Target in stage 1: the network's own hard label of the WEAK view, if its
             confidence reaches tau. In stage 3 (Heuristic 1): its own, if that reaches tau_inner; else
             the outer network's, if the example is in T_u. Cross-entropy, in stage 3 a robust loss.

The inner network's averaged weights predict. The reported accuracy is that of the last evaluation (and
the median of the last 20), never the best one.

    python kd_fixmatch.py                                  handwritten digits, 10 labels, two minutes on a laptop
    python kd_fixmatch.py --outer-only                     plain FixMatch
    python kd_fixmatch.py --unsup-loss ce                  KD-FixMatch-CE of the paper's table
    python kd_fixmatch.py --sce-beta 0.01                  KD-FixMatch-SCE-1.0-0.01 (default: SCE-1.0-0.1)
    python kd_fixmatch.py --clustering kmeans | none       another second filter | only the first

What is known. From the abstract: the three phases, the inner network's new start, the two filters. From
summaries by others: tau 0.95, tau_select 0.80, DEC on the features before the softmax, Heuristic 1, SCE
with alpha 1 and beta 0.1 or 0.01 in the inner network's unlabeled term. The rest is assumed:
  A1  T_u enters through the target of loss_u, with the weight of every other unlabeled example; its
      examples stay in the unlabeled pool. The losses of the paper may be two terms.
  A2  tau_inner is 0.95, on the inner network's weak view in the same pass, not on averaged weights.
  A3  The outer network labels plain views with its averaged weights, the labeled examples' too.
  A4  DEC's encoder is a square linear map of the features, started as the identity; the published DEC
      (XifengGuo/DEC-keras) trains an auto-encoder first. Features are divided by the root mean square
      distance to their class mean, because Student's t has a fixed length scale of 1.
  A5  Cluster k starts at the mean of the survivors labeled k and keeps that name: no later matching. A
      class without survivors has no cluster; with fewer than two classes nothing is filtered.
  A6  DEC takes dec_steps of SGD with momentum 0.9 over all survivors at once, with a target from the
      same step. Published: batches of 256, a target every 140 steps, an end when few change.
  A7  Both networks have the same backbone, preset and number of steps.
  A8  Optimizer, schedule and views are those of the other scripts, not known of the paper's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    Run, Views, accuracy, averaged_copy, batch_at, build_optimizer, build_student, check_arguments, cli, draw_labeled,
    fill_from_preset, load_data, predict, preset_of, pseudo_label_accuracy, save_student, seed_step, setup_device,
    student_config,
)  # fmt: skip

# ---------------------------------------------------------------------------- arguments


@dataclass
class Args:
    # run
    dataset: str = "digits"
    """Data set: a name of common.PRESETS."""
    num_labels: int = 10
    """Labeled examples in all, the same number of every class."""
    seed: int = 0
    """Decides the labeled examples, the initial weights, the batches and every random view."""
    data_dir: str = "data"
    """Where data sets and label files are kept."""
    runs_dir: str = "runs"
    """Where a folder for this run is made."""
    resume: str | None = None
    """Folder of a run to go on with; its arguments are kept."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the best there is."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Precision of the forward pass; losses are always float32. auto: bf16 where it is native."""
    compile: bool = False
    """Compile the student with torch.compile: slow first step, then faster, mostly on GPUs."""
    log_every: int = 20
    """Steps from one printed line to the next."""
    eval_every: int | None = None
    """Steps from one evaluation and checkpoint to the next. Unset, here and below: the preset's value."""
    # model
    backbone: str | None = None
    """Encoder: cnn or wrn_28_2."""
    # optimization
    num_steps: int | None = None
    """Updates of each network. Alone, it also scales the warm-up and --eval-every."""
    batch_size: int | None = None
    """B: labeled examples a step."""
    uratio: int | None = None
    """Unlabeled examples per labeled one: B_u = uratio * B."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """sgd has Nesterov momentum 0.9."""
    lr: float | None = None
    """Peak learning rate, of the heads where --layer-decay is below 1."""
    weight_decay: float | None = None
    """Weight decay of matrices and kernels; biases and norms have none."""
    layer_decay: float | None = None
    """Learning-rate factor in (0, 1] from one layer to the one below it."""
    warmup_steps: int | None = None
    """Steps of linear learning-rate warm-up, in each stage."""
    ema_decay: float | None = None
    """Decay in [0, 1) of the averaged weights that are evaluated; 0: the trained weights are."""
    # method
    outer_only: bool = False
    """Stop after stage 1: plain FixMatch."""
    tau: float = 0.95
    """Confidence in [0, 1] from which the outer network's own label counts in its training."""
    lambda_u: float = 1.0
    """Weight of loss_u."""
    tau_select: float = 0.80
    """Confidence in [0, 1] from which the trained outer network's label passes the first filter of T_u."""
    clustering: Literal["dec", "kmeans", "none"] = "dec"
    """Second filter of T_u: the label must agree with the cluster. none: there is no second filter."""
    dec_steps: int = 200
    """Updates of DEC's projection and centroids."""
    dec_lr: float = 0.01
    """Learning rate of DEC; XifengGuo/DEC-keras has 0.01."""
    tau_inner: float = 0.95
    """Confidence in [0, 1] from which the inner network's own label overrides the outer network's."""
    unsup_loss: Literal["ce", "sce", "mae", "nce", "gce"] = "sce"
    """The inner network's loss on unlabeled examples."""
    sce_alpha: float = 1.0
    """Weight of cross-entropy in --unsup-loss sce."""
    sce_beta: float = 0.1
    """Weight of reverse cross-entropy in --unsup-loss sce; the paper has 0.1 and 0.01."""


# ---------------------------------------------------------------------------- the method
# Sizes: B labeled, B_u unlabeled examples a step, N in the pool, n survivors of the first filter, K
# classes, D features. lr_at, hard_labels and loss_consistency are those of zeromatch.py word for word.


def lr_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """t / warmup up to the warm-up's end, then cos(7/16 pi * (t - warmup) / (T - warmup)): ends at 0.195.

    Factor of the peak learning rate at step t of T. Source: ZM semilearn/core/utils/build.py."""
    if step < warmup_steps:
        return step / warmup_steps
    return math.cos(7 / 16 * math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps))


def hard_labels(probs: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """pseudo_label_i = argmax_k probs_ik and mask_i = [max_k probs_ik >= threshold].

    [n, K] -> [n] int64, [n] float 0 or 1."""
    max_prob, pseudo_label = probs.max(dim=1)
    return pseudo_label, (max_prob >= threshold).float()


def loss_consistency(logits_ulb_s: Tensor, pseudo_label: Tensor, mask: Tensor) -> Tensor:
    """loss_u = 1 / B_u * sum_i mask_i * CE(logits_ulb_s_i, pseudo_label_i); masked rows count in B_u.

    [B_u, K], [B_u] int64, [B_u] -> scalar."""
    return (F.cross_entropy(logits_ulb_s, pseudo_label, reduction="none") * mask).mean()


def soft_assignment(z: Tensor, centroids: Tensor) -> Tensor:
    """DEC: q_ik = (1 + |z_i - c_k|^2)^-1 / sum_j (1 + |z_i - c_j|^2)^-1, Student's t of one degree of freedom.

    [n, D], [K, D] -> [n, K]. Source: arXiv:1511.06335."""
    kernel = 1 / (1 + torch.cdist(z, centroids).square())
    return kernel / kernel.sum(dim=1, keepdim=True)


def target_distribution(q: Tensor) -> Tensor:
    """DEC: p_ik = (q_ik^2 / f_k) / sum_j (q_ij^2 / f_j) with f_k = sum_i q_ik. [n, K] -> [n, K].

    Sharper than q, and large clusters gain less. Source: arXiv:1511.06335."""
    p = q.square() / q.sum(dim=0)
    return p / p.sum(dim=1, keepdim=True)


def loss_dec(q: Tensor, p: Tensor) -> Tensor:
    """DEC: KL(P || Q) = 1 / n * sum_i sum_k p_ik log(p_ik / q_ik). [n, K], [n, K] -> scalar."""
    return F.kl_div(q.log(), p, reduction="batchmean")


def heuristic_1(pseudo_label: Tensor, mask: Tensor, y_outer: Tensor) -> tuple[Tensor, Tensor]:
    """The network's own label where mask is 1; else y_outer where it is not -1; else the row does not count.

    [B_u] int64, [B_u] 0/1, [B_u] int64 -> (target [B_u] int64, counts [B_u] float 0 or 1)."""
    by_outer = (mask == 0) & (y_outer >= 0)
    return torch.where(by_outer, y_outer, pseudo_label), torch.where(by_outer, 1.0, mask)


def sce(logits: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """SCE = alpha * CE(e, p) + beta * RCE, RCE = -sum_k p_k log e_k with one-hot e, where log 0 is log 1e-4.

    [n, K], [n] int64 -> [n]. Source: arXiv:1908.06112; clamps p >= 1e-7, e >= 1e-4 of its public ports."""
    probs = logits.softmax(dim=1).clamp(min=1e-7)
    one_hot = F.one_hot(target, logits.shape[1]).float().clamp(min=1e-4)
    rce = -(probs * one_hot.log()).sum(dim=1)
    return alpha * F.cross_entropy(logits, target, reduction="none") + beta * rce


def mae(logits: Tensor, target: Tensor) -> Tensor:
    """MAE = sum_k |p_k - e_k| = 2 * (1 - p_y). [n, K], [n] int64 -> [n]. Source: arXiv:1712.09482."""
    return 2 - 2 * logits.softmax(dim=1).gather(1, target[:, None]).squeeze(1)


def nce(logits: Tensor, target: Tensor) -> Tensor:
    """NCE = log p_y / sum_k log p_k, in [0, 1]. [n, K], [n] int64 -> [n]. Source: arXiv:2006.13554."""
    log_probs = logits.log_softmax(dim=1)
    return log_probs.gather(1, target[:, None]).squeeze(1) / log_probs.sum(dim=1)


def gce(logits: Tensor, target: Tensor, q: float = 0.7) -> Tensor:
    """GCE = (1 - p_y^q) / q: CE for q -> 0, half of MAE for q = 1. Source: arXiv:1805.07836, q = 0.7.

    [n, K], [n] int64 -> [n]. By the logarithm, whose gradient stays finite at p_y = 0."""
    log_p_y = logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    return (1 - (q * log_p_y).exp()) / q


def loss_robust(name: str, logits_ulb_s: Tensor, target: Tensor, counts: Tensor, alpha: float, beta: float) -> Tensor:
    """loss_u of stage 3: 1 / B_u * sum_i counts_i * LOSS(logits_ulb_s_i, target_i); alpha, beta are SCE's.

    [B_u, K], [B_u] int64, [B_u] -> scalar."""
    if name == "ce":
        return loss_consistency(logits_ulb_s, target, counts)
    if name == "sce":
        return (sce(logits_ulb_s, target, alpha, beta) * counts).mean()
    return ({"mae": mae, "nce": nce, "gce": gce}[name](logits_ulb_s, target) * counts).mean()


# ---------------------------------------------------------------------------- training


def train(
    stage: int,
    student: nn.Module,
    labeled_idx: Tensor,
    y_lb_all: Tensor,
    train: Views,
    test: Views,
    args: Args,
    run: Run,
    y_outer: Tensor | None = None,
) -> nn.Module:
    """FixMatch of the outer network (stage 1); with y_outer [N], of the inner one (stage 3), -1 = not in T_u.

    labeled_idx [num_labels] are positions in `train`, y_lb_all their labels. The unlabeled pool is all of
    `train`, the labeled examples included. train.y beyond the labeled ones is read in the line that logs
    the pseudo-labels' accuracy, and nowhere else. Returns the network to evaluate."""
    optimizer = build_optimizer(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = averaged_copy(student, args.ema_decay), run.scaler()
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, _ = run.restore(stage, parts)
    B, B_u = args.batch_size, args.uratio * args.batch_size

    for step in range(first_step, args.num_steps):
        seed_step(args.seed, f"stage {stage}", step)
        lr = args.lr * lr_at(step, args.num_steps, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        at_lb = batch_at(len(labeled_idx), B, args.seed, step)
        idx_lb, y_lb = labeled_idx[at_lb], y_lb_all[at_lb]
        idx_ulb = batch_at(len(train), B_u, args.seed, step)
        x_lb, x_ulb_w, x_ulb_s = train.weak(idx_lb), train.weak(idx_ulb), train.strong(idx_ulb)

        # One pass over all three: batch statistics are those of the joint batch.
        student.train()
        with run.autocast():
            logits, _, _ = student(torch.cat([x_lb, x_ulb_w, x_ulb_s]))
        logits = logits.float()  # thresholds and losses in float32
        logits_lb, logits_ulb_w, logits_ulb_s = logits.split([B, B_u, B_u])

        loss_s = F.cross_entropy(logits_lb, y_lb)
        probs_ulb_w = logits_ulb_w.detach().softmax(dim=1)
        if y_outer is None:
            target, mask = hard_labels(probs_ulb_w, args.tau)
            counts = mask
            loss_u = loss_consistency(logits_ulb_s, target, counts)
        else:
            pseudo_label, mask = hard_labels(probs_ulb_w, args.tau_inner)  # A2
            target, counts = heuristic_1(pseudo_label, mask, y_outer[idx_ulb])  # A1
            loss_u = loss_robust(args.unsup_loss, logits_ulb_s, target, counts, args.sce_alpha, args.sce_beta)
        loss = loss_s + args.lambda_u * loss_u

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(student)

        run.log(
            stage, step, args.num_steps, args.log_every, LINE,
            loss=loss, loss_s=loss_s, lambda_u=args.lambda_u, loss_u=loss_u, mask_rate=counts.mean(),
            outer_rate=(counts - mask).mean(), lr=lr, **pseudo_label_accuracy(target, counts, train.y[idx_ulb]),
        )  # fmt: skip
        evaluate = (step + 1) % args.eval_every == 0 or step + 1 == args.num_steps
        if evaluate:
            run.evaluated(stage, step, accuracy(predict(ema.module, test, run.autocast), test.y))
        if evaluate or run.save_due():
            run.save(stage, step, parts, y_outer=y_outer)
    return ema.module


LINE = (
    "loss {loss:.3f} = s {loss_s:.3f} + {lambda_u:g}*u {loss_u:.3f}"
    " | mask {mask_rate:.2f} of it outer {outer_rate:.2f} pl_acc {pl_acc_masked:.1f}"
)


@torch.no_grad()
def probs_and_features(student: nn.Module, views: Views, run: Run, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Class probabilities [N, K] and features [N, D], float32, of the plain view of every example."""  # A3
    student.eval()
    rows = []
    for idx in torch.arange(len(views)).split(batch):
        with run.autocast():
            logits, _, features = student(views.plain(idx))
        rows.append((logits.float().softmax(dim=1), features.float()))
    probs, features = zip(*rows, strict=True)
    return torch.cat(probs), torch.cat(features)


def cluster_dec(features: Tensor, label: Tensor, outer: nn.Module, args: Args, run: Run) -> Tensor:
    """Deep embedded clustering from `label` on: the class number of every row's cluster.

    [n, D], [n] int64 -> [n] int64, classes of `label` only. `outer` is kept in the checkpoints."""
    present, own = label.unique(return_inverse=True)  # A5
    centroids = torch.stack([features[label == k].mean(dim=0) for k in present])
    scale = (features - centroids[own]).square().sum(dim=1).mean().sqrt().clamp(min=1e-6)  # A4
    features = features / scale
    projection = torch.eye(features.shape[1], device=features.device)
    dec = nn.ParameterDict({"projection": projection, "centroids": centroids / scale})
    optimizer = torch.optim.SGD(dec.parameters(), args.dec_lr, momentum=0.9)
    first_step, _ = run.restore(2, {"dec": dec, "optimizer": optimizer})
    for step in range(first_step, args.dec_steps):
        q = soft_assignment(features @ dec["projection"], dec["centroids"])
        loss = loss_dec(q, target_distribution(q.detach()))  # A6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agree = (present[q.argmax(dim=1)] == label).float().mean()
        run.log(2, step, args.dec_steps, args.log_every, "dec {loss:.4f} agree {agree:.3f}", loss=loss, agree=agree)
        if step + 1 == args.dec_steps or run.save_due():
            run.save(2, step, {"outer": outer, "dec": dec, "optimizer": optimizer})
    with torch.no_grad():
        return present[soft_assignment(features @ dec["projection"], dec["centroids"]).argmax(dim=1)]


def cluster_kmeans(features: Tensor, label: Tensor, seed: int) -> Tensor:
    """k-means with one cluster per class of `label`, matched to classes so that most rows agree.

    [n, D], [n] int64 -> [n] int64. The match is one to one (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    present, own = label.unique(return_inverse=True)
    found = KMeans(len(present), n_init=10, random_state=seed).fit_predict(features.cpu().numpy())
    cluster = torch.from_numpy(found).long().to(label.device)
    size = len(present)
    overlap = (cluster * size + own).bincount(minlength=size**2).view(size, size)  # [cluster, class]
    _, matched = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)
    return present[torch.from_numpy(matched).to(label.device)[cluster]]


def select_trusted(
    outer: nn.Module, train: Views, num_classes: int, args: Args, run: Run
) -> tuple[Tensor, dict[str, Any]]:
    """T_u: the outer network's labels that pass both filters, y_outer [N] int64 with -1 elsewhere.

    Also {filter: [examples that are left, percent of their labels right or None]}: printed, never used."""
    probs, features = probs_and_features(outer, train, run)
    y_outer, confident = hard_labels(probs, args.tau_select)
    kept = confident.nonzero().squeeze(1)
    label = y_outer[kept]
    per_class = label.bincount(minlength=num_classes)
    if missing := (per_class == 0).nonzero().squeeze(1).tolist():
        print(f"T_u: no label of class {missing} has confidence >= {args.tau_select}: nothing of it is trusted")
    cluster = label
    if (per_class > 0).sum() < 2:
        print(f"T_u: {len(kept)} labels have that confidence, of fewer than 2 classes: no second filter")
    elif args.clustering == "dec":
        cluster = cluster_dec(features[kept], label, outer, args, run)
    elif args.clustering == "kmeans":
        cluster = cluster_kmeans(features[kept], label, args.seed)
    emptied = (cluster.bincount(minlength=num_classes) == 0) & (per_class > 0)
    if emptied := emptied.nonzero().squeeze(1).tolist():
        print(f"T_u: the cluster of class {emptied} is empty: nothing of it is trusted")

    report, trusted = {}, kept[cluster == label]
    everything = torch.arange(len(train), device=kept.device)
    for name, idx in (("labeled by outer", everything), ("confident", kept), ("in T_u", trusted)):
        known = idx[train.y[idx] >= 0]
        acc = 100 * (y_outer[known] == train.y[known]).float().mean().item() if len(known) else None
        report[name] = [len(idx), acc]
        print(f"  {name:18} {len(idx):7}   " + ("" if acc is None else f"{acc:.2f} % of the labels right"))
    y_trusted = torch.full_like(y_outer, -1)
    y_trusted[trusted] = y_outer[trusted]
    return y_trusted, report


# ---------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, Any]:
    """Train as `args` say; returns what is written to result.json. Raises UserError."""
    preset = preset_of(args.dataset)
    args = replace(args, **fill_from_preset(vars(args), preset))
    check_arguments(vars(args))
    data = load_data(args.dataset, args.data_dir)
    labeled = draw_labeled(data.train.y, args.num_labels, len(data.classes), args.seed)

    device, dtype = setup_device(args.device, args.amp, args.backbone)
    run = Run(
        args.runs_dir,
        f"kd_fixmatch-{args.dataset}-{args.num_labels}-seed{args.seed}",
        asdict(args),
        device,
        dtype,
    )
    run.describe(data, labeled, vars(args))
    train_views, test = Views(data.train, preset, device), Views(data.test, preset, device)
    labeled_idx, y_lb_all = torch.from_numpy(labeled), torch.from_numpy(data.train.y[labeled]).to(device)

    def new_student(name: str) -> nn.Module:
        seed_step(args.seed, name, 0)
        student = build_student(args.backbone, len(preset.mean), preset.size, len(data.classes)).to(device)
        if args.compile:
            student.compile()
        return student

    evaluated, trusted = new_student("weights"), None
    if run.state["stage"] == 2:
        evaluated.load_state_dict(run.state["outer"])
    elif run.state["stage"] < 2:
        evaluated = train(1, evaluated, labeled_idx, y_lb_all, train_views, test, args, run)
    if not args.outer_only:
        if run.state["stage"] < 3:
            y_outer, trusted = select_trusted(evaluated, train_views, len(data.classes), args, run)
            run.write_json("trusted.json", trusted)
        else:
            y_outer, trusted = run.state["y_outer"], json.loads((run.folder / "trusted.json").read_text())
        inner = new_student("inner weights")  # of the outer network, only its trusted labels go on
        evaluated = train(3, inner, labeled_idx, y_lb_all, train_views, test, args, run, y_outer)

    config = student_config(args.dataset, args.backbone, preset, data.classes)
    save_student(run.folder / "student", evaluated, config)
    result = {
        **run.result(stage=1 if args.outer_only else 3),
        "outer_acc": run.result(stage=1)["test_acc"],
        "trusted": trusted,
    }
    run.write_json("result.json", result | {"args": asdict(args)})
    print(f"\n{args.dataset}, {args.num_labels} labels: accuracy on {len(data.test)} test examples, last evaluation")
    rows = [("outer network (FixMatch)", result["outer_acc"])]
    rows += [] if args.outer_only else [(f"inner (KD-FixMatch, {args.unsup_loss})", result["test_acc"])]
    for name, acc in rows:
        print(f"  {name:30} {acc:.2f} %")
    return result


if __name__ == "__main__":
    cli(Args, main)
