# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.9", "numpy>=1.26",
#   "scikit-learn>=1.5", "tyro>=0.9", "pytest>=8"]
# ///
"""KD-FixMatch: FixMatch whose second network also learns the labels that the first one trusts.

Paper: "KD-FixMatch: Knowledge Distillation Siamese Neural Networks", ICIP 2023, arXiv:2309.05826;
its authors published no code. No foundation model: the only teacher is the outer network.

Stage 1 trains an OUTER network by FixMatch. Stage 2 labels every unlabeled example with it and
keeps a trusted set T_u: confident labels that deep embedded clustering (DEC) of the features agrees
with. Stage 3 trains an INNER network, from new weights, on labeled, unlabeled, trusted examples:

    loss = loss_s + lambda_u * loss_u

    loss_s   cross-entropy on labeled weak views
    loss_u   on unlabeled STRONG views, mean over the whole unlabeled batch, 0 for a row without
             target. Stage 1: the network's own hard label of the WEAK view, if its confidence
             reaches tau. Stage 3 (Heuristic 1): its own, if that reaches tau_inner; else the outer
             network's, if the example is in T_u. Cross-entropy; in stage 3 a robust loss.

The inner network predicts, with averaged weights (not for ViT, BERT), at the last evaluation.

    python kd_fixmatch.py                         handwritten digits, 10 labels
    python kd_fixmatch.py --outer-only            plain FixMatch
    python kd_fixmatch.py --unsup-loss ce         KD-FixMatch-CE; the default is SCE-1.0-0.1
    python kd_fixmatch.py --clustering none       only the first filter of T_u
    python kd_fixmatch.py --dataset cifar10 --num-labels 250 --backbone wrn_28_2    on a GPU

    recipe       digits (default)                 cifar10 with WRN-28-2, from scratch
    B, B_u       16, 64                           64, 448
    steps        800 each network; DEC 200        2^20 each network; DEC 200
    lr           SGD, 40 warm-up steps from 0;    SGD, no warm-up;
                 0.1 -> 0.0195 (7/16 cosine)      0.03 -> 0.0059 (7/16 cosine)
    averages     weights 0.99                     weights 0.999
    thresholds   tau 0.95, tau_select 0.80, tau_inner 0.95 (both)
    weak view    8 x 8 crop, 1 pixel reflected    32 x 32 crop, 4 pixels; half mirrored
    strong view  a crop of its own, 3 operations of RandAugment, Cutout up to half the side (both)
    evaluation   every 40 steps, 500 images       every 5,120 steps, 10,000 images
    result       83.5 +- 8.4 % (outer: 81.6 +- 7.3)  not run; left: seeds 0-19
    cost         30 to 45 s on one CPU thread     not measured

The abstract specifies the stages, the fresh network, two filters; summaries by others specify tau,
tau_select, DEC on the features before the head, Heuristic 1, SCE's weights. The rest is our choice:
  A1  T_u only supplies targets of loss_u, equally weighted; its examples stay in the pool.
  A2  tau_inner is 0.95, on the trained (not averaged) network's weak view of the same pass.
  A3  The outer network's averaged weights label plain views, those of labeled examples too.
  A4  DEC's encoder is a square linear map of the features, started as the identity (published: an
      auto-encoder). Features are divided by their RMS distance to the mean: the kernel has scale 1.
  A5  k-means places one cluster per surviving class and sees no label. Clusters are matched to
      classes at the end, one to one, for most agreement. One class: no second filter.
  A6  DEC takes full-batch SGD steps, each towards its own target; gradients are small, so the rate
      is large: a tenth of the largest (1, 3, 10, ...) at which the loss peaks once, then falls.
      Published (arXiv:1511.06335, XifengGuo/DEC-keras): batches, new targets every 140 steps, 0.01.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import (
    LABELS, TEXTS, Run, Views, batch_at, build_student, cli, data_parallel, draw_labeled,
    from_first_process, join, load_data, make_views, optimizer_of, predict, preset_of,
    pseudo_label_accuracy, resolve, seed_step, setup_device, write_atomically,
)  # fmt: skip

# ---------------------------------------------------------------------------- arguments


@dataclass
class Args:
    dataset: str = "digits"  # a name in common.PRESETS, a folder of pictures, a .csv or .jsonl file
    test_file: str | None = None  # test part of a file; unset: a fifth of its labeled rows
    text_column: str = TEXTS  # of a table: the first of these that it has
    label_column: str = LABELS  # the same
    num_labels: int | None = None  # equally many per class; 0: all; unset: the preset's
    size: int | None = None  # own pictures: side in pixels; own texts: most tokens per row
    seed: int = 0  # decides labeled examples, initial weights, batches and random views
    data_dir: str = "data"  # where data sets and label files are kept
    runs_dir: str = "runs"  # where a folder for this run is made
    resume: str | None = None  # folder of a run to continue, with its arguments
    device: str = "auto"  # cpu, cuda, mps ...; auto: the accelerator, if any
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 on GPUs that have it
    compile: bool = False  # torch.compile the student: a slow first step, then faster on GPUs
    log_every: int = 20  # steps from one printed line to the next
    track: str | None = None  # tensorboard, trackio or wandb: log there, too; needs the package
    eval_every: int | None = None  # steps from one evaluation and checkpoint to the next
    # model
    backbone: str | None = None  # a name in common.NAMES, or a model of transformers (id, folder)
    weights: str | None = None  # of the encoder: file, folder or none; unset: the published ones
    freeze: bool = False  # train the heads alone; the encoder stays as it is, in eval mode
    # optimization; unset values are the preset's (common.PRESETS)
    num_steps: int | None = None  # of each network; alone, it scales warm-up and --eval-every
    batch_size: int | None = None  # B: labeled examples a step
    uratio: int | None = None  # B_u = uratio * B unlabeled examples a step
    optimizer: Literal["adamw", "sgd"] | None = None  # sgd has Nesterov momentum 0.9
    lr: float | None = None  # peak; with --layer-decay below 1, of the heads
    weight_decay: float | None = None  # of matrices and kernels; biases and norms have none
    layer_decay: float | None = None  # learning-rate factor from one layer to the one below it
    warmup_steps: int | None = None  # linear learning-rate warm-up, of each network
    ema_decay: float | None = None  # of the averaged weights, which are evaluated; 0: no averaging
    # method
    outer_only: bool = False  # stop after stage 1: plain FixMatch
    tau: float = 0.95  # confidence from which the outer network's own label trains it
    lambda_u: float = 1.0  # weight of loss_u
    tau_select: float = 0.80  # first filter of T_u: least confidence of the outer network
    clustering: Literal["dec", "kmeans", "none"] = "dec"  # second filter of T_u, or none
    tau_inner: float = 0.95  # confidence from which the inner network's own label trains it
    unsup_loss: Literal["ce", "sce", "mae", "nce"] = "sce"  # of the inner network
    sce_alpha: float = 1.0  # weight of cross-entropy in --unsup-loss sce
    sce_beta: float = 0.1  # weight of reverse cross-entropy in sce; the paper has 0.1 and 0.01


# ---------------------------------------------------------------------------- the method
# Sizes: B labeled, B_u unlabeled examples a step, N in the pool, n survivors of the first filter,
# K classes, D features. Functions that zeromatch.py also has are repeated, word for word.


def lr_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """t / warmup in the warm-up, then cos(7/16 pi * (t - warmup) / (T - warmup)): ends at 0.195.

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
    """loss_u = 1 / B_u * sum_i mask_i * CE(logits_ulb_s_i, pseudo_label_i); masked rows are 0.

    [B_u, K], [B_u] int64, [B_u] -> scalar."""
    return (F.cross_entropy(logits_ulb_s, pseudo_label, reduction="none") * mask).mean()


DEC_STEPS, DEC_LR = 200, 3.0  # A6; results hardly change for 100-500 steps, rates 1-10


def soft_assignment(z: Tensor, centroids: Tensor) -> Tensor:
    """q_ik = (1 + |z_i - c_k|^2)^-1 / sum_j (1 + |z_i - c_j|^2)^-1: Student's t.

    [n, D], [K, D] -> [n, K]."""
    kernel = 1 / (1 + torch.cdist(z, centroids).square())
    return kernel / kernel.sum(dim=1, keepdim=True)


def target_distribution(q: Tensor) -> Tensor:
    """p_ik = (q_ik^2 / f_k) / sum_j (q_ij^2 / f_j), sizes f_k = sum_i q_ik. [n, K] -> [n, K]."""
    p = q.square() / q.sum(dim=0)
    return p / p.sum(dim=1, keepdim=True)


def loss_dec(q: Tensor, p: Tensor) -> Tensor:
    """KL(P || Q) = 1 / n * sum_i sum_k p_ik log(p_ik / q_ik). [n, K], [n, K] -> scalar."""
    return F.kl_div(q.log(), p, reduction="batchmean")


def heuristic_1(pseudo_label: Tensor, mask: Tensor, y_outer: Tensor) -> tuple[Tensor, Tensor]:
    """The network's own label where mask is 1; else y_outer where it is not -1; else no target.

    [B_u] int64, [B_u] 0/1, [B_u] int64 -> (target [B_u] int64, used [B_u] float 0 or 1)."""
    by_outer = (mask == 0) & (y_outer >= 0)
    return torch.where(by_outer, y_outer, pseudo_label), torch.where(by_outer, 1.0, mask)


def sce(logits: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """SCE = alpha * CE + beta * RCE, RCE = -sum_k p_k log e_k, e one-hot, where log 0 is log 1e-4.

    [n, K], [n] int64 -> [n]. Source: arXiv:1908.06112; clamps of its public ports."""
    probs = logits.softmax(dim=1).clamp(min=1e-7)
    log_one_hot = F.one_hot(target, logits.shape[1]).float().clamp(min=1e-4).log()
    rce = -(probs * log_one_hot).sum(dim=1)
    return alpha * F.cross_entropy(logits, target, reduction="none") + beta * rce


def mae(logits: Tensor, target: Tensor) -> Tensor:
    """MAE = sum_k |p_k - e_k| = 2 - 2 * exp(-CE). [n, K], [n] -> [n]. arXiv:1712.09482."""
    return 2 - 2 * (-F.cross_entropy(logits, target, reduction="none")).exp()


def nce(logits: Tensor, target: Tensor) -> Tensor:
    """NCE = CE / sum_k (CE towards class k), in [0, 1]. [n, K], [n] -> [n]. arXiv:2006.13554."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ce / -logits.log_softmax(dim=1).sum(dim=1)


def loss_robust(
    name: str, logits_ulb_s: Tensor, target: Tensor, used: Tensor, alpha: float, beta: float
) -> Tensor:
    """loss_u of stage 3: 1 / B_u * sum_i used_i * LOSS(logits_ulb_s_i, target_i).

    [B_u, K], [B_u] int64, [B_u] -> scalar. ce: that of stage 1. alpha, beta: SCE's."""
    if name == "ce":
        return loss_consistency(logits_ulb_s, target, used)
    if name == "sce":
        return (sce(logits_ulb_s, target, alpha, beta) * used).mean()
    return ({"mae": mae, "nce": nce}[name](logits_ulb_s, target) * used).mean()


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """`.module`: weights <- d * weights + (1 - d) * student's, batch statistics included; after t
    updates d = min(decay, (1 + t) / (10 + t)); at t = 0 it copies.  # C8"""

    def update(*tensors: Any) -> None:  # averaged, current, t on their device
        t = average.n_averaged.item()  # on the CPU: no GPU waits
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(*tensors)

    average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    return average


# ---------------------------------------------------------------------------- training


def forward(net: nn.Module, x: Tensor, run: Run) -> Tensor:
    """Logits [n, K], in float32 for softmax, thresholds and losses."""
    with run.autocast():
        logits, _, _ = net(x)
    return logits.float()


def train_fixmatch(
    stage: int, student: nn.Module, labeled_idx: Tensor, y_lb_all: Tensor, train: Views,
    test: Views, args: Args, run: Run, y_outer: Tensor | None = None,
) -> nn.Module:  # fmt: skip
    """FixMatch of the outer network (stage 1) or the inner one (stage 3); returns what to evaluate.

    labeled_idx [num_labels]: positions in `train`; y_lb_all: their labels; y_outer [N], stage 3:
    the outer network's, -1 = not in T_u. The unlabeled pool is all of `train`, labeled examples
    included; its true labels reach only run.log."""
    tau, unsup_loss = (args.tau, "ce") if stage == 1 else (args.tau_inner, args.unsup_loss)  # A2
    y_outer = torch.full_like(train.y, -1) if y_outer is None else y_outer
    optimizer = optimizer_of(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = average_of(student, args.ema_decay), run.scaler()
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, _ = run.restore(stage, parts)
    net = data_parallel(student)

    key = f"stage {stage}"
    for step in range(first_step, args.num_steps):
        seed_step(args.seed, key, step)  # so that a resumed run repeats the same step
        lr = args.lr * lr_at(step, args.num_steps, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        at_lb = batch_at(len(labeled_idx), args.batch_size, args.seed, key + " labeled", step)
        idx_lb, y_lb = labeled_idx[at_lb], y_lb_all[at_lb]
        idx_ulb = batch_at(len(train), args.uratio * args.batch_size, args.seed, key, step)
        x_lb, x_ulb_w, x_ulb_s = train.weak(idx_lb), train.weak(idx_ulb), train.strong(idx_ulb)
        B, B_u = len(idx_lb), len(idx_ulb)  # under torchrun, this process's share

        student.train()
        if student.encoder.batch_statistics:  # one pass: they are those of the joint batch
            logits = forward(net, join([x_lb, x_ulb_w, x_ulb_s]), run)
            logits_lb, logits_ulb_w, logits_ulb_s = logits.split([B, B_u, B_u])
        else:  # nothing learns from the weak view, so its gradient would be wasted work
            with torch.no_grad():
                logits_ulb_w = forward(net, x_ulb_w, run)
            logits_lb, logits_ulb_s = forward(net, join([x_lb, x_ulb_s]), run).split([B, B_u])

        pseudo_label, mask = hard_labels(logits_ulb_w.detach().softmax(dim=1), tau)
        # Once the inner network is sure, its label replaces the outer one's. No change in stage 1.
        target, used = heuristic_1(pseudo_label, mask, y_outer[idx_ulb])  # A1
        loss_s = F.cross_entropy(logits_lb, y_lb)
        loss_u = loss_robust(unsup_loss, logits_ulb_s, target, used, args.sce_alpha, args.sce_beta)
        loss = loss_s + args.lambda_u * loss_u

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(student)

        run.log(
            stage, step, args.num_steps, LINE,
            loss=loss, loss_s=loss_s, lambda_u=args.lambda_u, loss_u=loss_u, mask_rate=used.mean(),
            outer_rate=(used - mask).mean(), lr=lr,
            **pseudo_label_accuracy(target, used, train.y[idx_ulb]),
        )  # fmt: skip
        # Evaluates every --eval-every steps and at the end; saves then and every ten minutes.
        run.evaluate(stage, step, args.num_steps, ema.module, test)
        run.save(stage, step, args.num_steps, parts, y_outer=y_outer)
    return ema.module


LINE = (
    "loss {loss:.3f} = s {loss_s:.3f} + {lambda_u:g}*u {loss_u:.3f}"
    " | mask {mask_rate:.2f} by outer {outer_rate:.2f} pl_acc {pl_acc_masked:.1f}"
)


def cluster_dec(features: Tensor, label: Tensor, outer: nn.Module, args: Args, run: Run) -> Tensor:
    """Deep embedded clustering: the class of each row's cluster. [n, D], [n] int64 -> [n] int64.

    kmeans: only the start. The checkpoint keeps `outer`: resuming needs its features."""
    from sklearn.cluster import KMeans

    features = features - features.mean(dim=0)
    features = features / features.square().sum(dim=1).mean().sqrt().clamp(min=1e-6)  # A4
    kmeans = KMeans(len(label.unique()), n_init=10, random_state=args.seed)  # A5
    centers = from_first_process(kmeans.fit(features.cpu().numpy()).cluster_centers_)
    parts = {"projection": torch.eye(features.shape[1]), "centroids": torch.from_numpy(centers)}
    dec = nn.ParameterDict(parts).to(features.device)
    optimizer = torch.optim.SGD(dec.parameters(), DEC_LR, momentum=0.9)
    first_step, _ = run.restore(2, {"dec": dec, "optimizer": optimizer})
    for step in range(first_step, DEC_STEPS if args.clustering == "dec" else 0):
        q = soft_assignment(features @ dec["projection"], dec["centroids"])
        loss = loss_dec(q, target_distribution(q.detach()))  # A6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agree = (class_of(q.argmax(dim=1), label) == label).float().mean()
        run.log(2, step, DEC_STEPS, "dec {loss:.4f} agree {agree:.3f}", loss=loss, agree=agree)
        run.save(2, step, DEC_STEPS, {"outer": outer, "dec": dec, "optimizer": optimizer})
    q = soft_assignment(features @ dec["projection"], dec["centroids"])
    return class_of(q.argmax(dim=1), label)


def class_of(cluster: Tensor, label: Tensor) -> Tensor:
    """The class of each row's cluster, matched one to one. [n] int64, [n] int64 -> [n] int64."""
    from scipy.optimize import linear_sum_assignment

    present, own = label.unique(return_inverse=True)
    K = len(present)
    agreement = (K * cluster + own).bincount(minlength=K * K).view(K, K).cpu().numpy()
    _, matched = linear_sum_assignment(agreement, maximize=True)  # Hungarian
    return present[torch.from_numpy(matched).to(label.device)[cluster]]


def select_trusted(outer: nn.Module, train: Views, args: Args, run: Run) -> Tensor:
    """T_u as y_outer [N] int64: the outer network's labels that pass both filters, -1 elsewhere.

    Monitoring: trusted.json, {set: [its size, percent of its labels that are right or null]}."""
    found = map(from_first_process, predict(outer, train, run.autocast))  # all agree on T_u
    probs, features = (x.to(run.device) for x in found)  # [N, K], [N, D]
    label, confident = hard_labels(probs, args.tau_select)  # A3
    kept = confident.nonzero().squeeze(1)
    cluster = label.clone()
    classes = set(label[kept].tolist())
    if missing := sorted(set(range(probs.shape[1])) - classes):
        print(f"T_u: no label of class {missing} reaches --tau-select: none is trusted")
    if args.clustering != "none" and len(classes) > 1:
        cluster[kept] = cluster_dec(features[kept], label[kept], outer, args, run)
    if empty := sorted(classes - set(cluster[kept].tolist())):
        print(f"T_u: the cluster of class {empty} is empty: none of its labels is trusted")

    trusted, report = confident * (cluster == label), {}
    for name, mask in (("all", confident >= 0), ("confident", confident), ("trusted", trusted)):
        acc = pseudo_label_accuracy(label, mask, train.y)["pl_acc_masked"].item()
        report[name] = [int(mask.sum()), None if math.isnan(acc) else acc]
        print(f"T_u: {name:9} {report[name][0]:7} labels, {acc:.2f} % right (nan: unknown)")
    write_atomically(run.folder / "trusted.json", report)
    return torch.where(trusted > 0, label, -1)


# ---------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    """Train as `args` say; returns what is written to result.json. Raises UserError."""
    columns = args.text_column, args.label_column
    preset = preset_of(args.dataset, args.backbone, args.size, columns)
    args = Args(**resolve(vars(args), preset))
    device, dtype = setup_device(args.device, args.amp, args.backbone)
    data = load_data(args.dataset, args.data_dir, args.test_file, preset)
    labeled = draw_labeled(data.train.y, args.num_labels, K := len(data.classes), args.seed)

    name = f"kd_fixmatch-{data.name}-{args.num_labels}-seed{args.seed}"
    run = Run(name, vars(args), device, dtype)
    test_part = run.describe(data, labeled)
    idx, y_lb_all = torch.from_numpy(labeled), torch.from_numpy(data.train.y[labeled]).to(device)
    train, test = (make_views(x, preset, args.backbone, device) for x in (data.train, test_part))
    train.y[labeled] = -1  # monitor pseudo-labels on hidden labels only

    networks = []
    for key in ("weights", "inner weights"):  # only the trusted labels are passed on
        seed_step(args.seed, key, 0)
        student = build_student(args.backbone, preset, K, 0, args.weights, (train, test))
        networks.append(student.to(device))
        if args.compile:
            student.compile()
    outer, inner = networks
    stage = run.state["stage"]  # of a run to continue; else 0
    if stage < 2:
        outer = train_fixmatch(1, outer, idx, y_lb_all, train, test, args, run)
    elif stage == 2:
        run.restore(2, {"outer": outer})
    evaluated, trusted, lines = outer, None, {"outer network (FixMatch)": run.accuracy(1)}
    if not args.outer_only:
        y_outer = run.state["y_outer"] if stage == 3 else select_trusted(outer, train, args, run)
        evaluated = train_fixmatch(3, inner, idx, y_lb_all, train, test, args, run, y_outer)
        trusted = json.loads((run.folder / "trusted.json").read_text())
        lines[f"inner (KD-FixMatch, {args.unsup_loss})"] = run.accuracy(3)
    facts = {"outer_acc": run.accuracy(1), "trusted": trusted}
    return run.finish(evaluated, test, lines, **facts)


if __name__ == "__main__":
    cli(Args, main)
