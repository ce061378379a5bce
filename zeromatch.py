# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.9", "numpy>=1.26",
#   "scikit-learn>=1.5", "tyro>=0.9", "pytest>=8"]
# ///
"""ZeroMatch: semi-supervised learning with a foundation model's zero-shot pseudo-labels.

Paper: "Enhancing Semi-supervised Learning with Zero-shot Pseudolabels", TMLR, arXiv:2502.12584.
Code of the authors: github.com/jichan3751/zeromatch @8ca4079 ("ZM"). Symbols are the paper's.

Stage 1 (distillation warm-up) trains encoder and main head on the teacher's labels of ALL training
examples. Stage 2 continues with AdaMatch (as in ZM: no ramp of loss_u, no logit interpolation) on
the main head; a new auxiliary head on the encoder keeps predicting the teacher's labels:

    loss = loss_s + lambda_u * loss_u + lambda_p * alpha_t * loss_kd

    loss_s   cross-entropy of the main head on labeled weak views
    loss_u   the same, mean over all B_u STRONG views; target (detached): argmax of the WEAK view's
             aligned probabilities if it reaches c_tau = tau * (mean confidence on labeled), else 0
    loss_kd  cross-entropy of the AUXILIARY head on all weak views; target: the teacher's label
    alpha_t  0 at the first step, 1 at the last, linear

At test time the main head predicts (with averaged weights or not: D4); the auxiliary head is thrown
away. The reported accuracy is that of the last evaluation, never the best one.

    python zeromatch.py                                  handwritten digits, 10 labels
    python zeromatch.py --stages 1 | --stages 2          pseudo-supervision | ablation: no warm-up
    python zeromatch.py --lambda-p 0 | --anneal none     ablations: no loss_kd | alpha_t = 1
    python zeromatch.py --agreement | --prior teacher    beyond the paper, see the functions below
    python zeromatch.py --dataset cifar100 --num-labels 100    the headline run, on a GPU

    recipe       digits (default)                 cifar100 (ViT-S/2, pre-trained)
    B, B_u       16, 64 (stage 1: 64)             16, 16 (stage 1: 16)
    steps        400, then 800                    204,800, then 204,800
    lr           SGD, 40 warm-up steps from 0;    AdamW, 5,120; heads 5e-4 -> 1e-4, layer decay
                 0.1 -> 0.0195 (7/16 cosine)      0.5; restarted in stage 2 (both)
    averages     weights 0.99, marginals 0.99     no weight averaging, marginals 0.999
    weak view    8 x 8 crop, 1 pixel reflected    32 x 32 crop, 4 pixels; half mirrored
    strong view  a crop of its own, 3 operations of RandAugment, Cutout up to half the side (both)
    evaluation   every 40 steps, 500 images       every 2,048 steps, 10,000 images
    result       91.4 +- 4.6 % (seeds 0-19)       not run here (paper, GPT-4.1's labels: 88.01)
    cost         25 to 45 s on one CPU thread     not measured

Departures from the authors' code (those in the data path are numbered in common.py)
  D1  Stage 1 passes on its last (averaged) weights; ZM passes on those that best fit the teacher's
      training labels: the most overfitted ones.
  D2  We report the last evaluation; ZM its best test accuracy (text: at the best dev score).
  D3  An example without a teacher's answer adds zero loss but stays in the denominator. ZM gives it
      one fixed class.
  D4  Networks with batch statistics (CNN, WRN, EfficientNet) are evaluated with averaged weights
      (C8), as in FixMatch, AdaMatch. ZM trains only transformers, without averaging, and so do we.
  D5  bfloat16 and TF32 where the GPU supports them. ZM has float32 without TF32: --amp off.
  D6  Stage 1 runs to its last step. ZM's stops once it fits 99.99 % of the teacher's labels.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import (
    LABELS, RANK, TEXTS, Run, Split, UserError, Views, batch_at, build_student, cli, data_parallel,
    draw_labeled, explained, join, load_data, make_views, mean_over_processes, optimizer_of,
    predict, preset_of, pseudo_label_accuracy, resolve, seed_step, setup_device,
)  # fmt: skip
from pseudolabel import default_labels, read_labels

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
    pseudolabels: str | None = None  # teacher's labels of the training part; unset: found or made
    pseudolabels_test: str | None = None  # of the test part, to print the teacher's accuracy
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
    num_steps: int | None = None  # of stage 2; alone, it scales stage 1, warm-up, --eval-every
    num_steps_stage1: int | None = None  # updates of stage 1
    batch_size: int | None = None  # B: labeled examples a step
    uratio: int | None = None  # B_u = uratio * B unlabeled examples a step; in stage 1, too
    optimizer: Literal["adamw", "sgd"] | None = None  # sgd has Nesterov momentum 0.9
    lr: float | None = None  # peak; with --layer-decay below 1, of the heads
    weight_decay: float | None = None  # of matrices and kernels; biases and norms have none
    layer_decay: float | None = None  # learning-rate factor from one layer to the one below it
    warmup_steps: int | None = None  # linear learning-rate warm-up, in each stage
    ema_decay: float | None = None  # of the averaged weights, which are evaluated; 0: no averaging
    # method
    stages: Literal["both", "1", "2"] = "both"  # 1: pseudo-supervision alone; 2: no warm-up
    tau: float = 0.95  # relative threshold: times the mean confidence on the labeled batch
    lambda_u: float = 1.0  # weight of loss_u
    lambda_p: float = 1.0  # weight of loss_kd; 0: stage 2 is AdaMatch
    anneal: Literal["linear", "none"] = "linear"  # alpha_t: 0 to 1 over stage 2; none: 1
    marginal_decay: float | None = None  # of the running class marginals p_lb and p_ulb
    # beyond the paper
    agreement: bool = False  # a pseudo-label that the teacher shares has at least weight alpha_t
    prior: str = "labeled"  # shares to align to: labeled (p_lb), teacher, or a file {class: share}


# ---------------------------------------------------------------------------- the method
# Sizes: B labeled, B_u unlabeled examples a step, K classes. Paste these functions into your own
# loop, and keep p_lb and p_ulb from step to step. The other scripts repeat them, word for word.


def lr_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """t / warmup in the warm-up, then cos(7/16 pi * (t - warmup) / (T - warmup)): ends at 0.195.

    Factor of the peak learning rate at step t of T. Source: ZM semilearn/core/utils/build.py."""
    if step < warmup_steps:
        return step / warmup_steps
    return math.cos(7 / 16 * math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps))


def alpha_at(step: int, num_steps: int, anneal: str) -> float:
    """alpha_t = t / (T - 1), from 0 at the first step to 1 at the last; 1 without annealing."""
    return step / max(1, num_steps - 1) if anneal == "linear" else 1.0


def update_marginal(p: Tensor | None, probs: Tensor, decay: float) -> Tensor:
    """p <- decay * p + (1 - decay) * mean_i probs_i; the batch's mean itself where p is None.

    [K] or None, [n, K] -> [K]. Source: ZM algorithms/hooks/dist_align.py."""
    mean = probs.mean(dim=0)
    return mean if p is None else decay * p + (1 - decay) * mean


def align(probs: Tensor, p_lb: Tensor, p_ulb: Tensor) -> Tensor:
    """Distribution alignment: probs_ik * p_lb_k / p_ulb_k, scaled to sum to 1 over k.

    [n, K], [K], [K] -> [n, K]. 1e-6 keeps an empty class finite (google-research/adamatch)."""
    aligned = probs * (p_lb + 1e-6) / (p_ulb + 1e-6)
    return aligned / aligned.sum(dim=1, keepdim=True)


def relative_threshold(probs_lb: Tensor, tau: float) -> Tensor:
    """c_tau = tau * mean_i max_k probs_lb_ik, not aligned. [B, K] -> scalar."""
    return tau * probs_lb.max(dim=1).values.mean()


def hard_labels(probs: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """pseudo_label_i = argmax_k probs_ik and mask_i = [max_k probs_ik >= threshold].

    [n, K] -> [n] int64, [n] float 0 or 1."""
    max_prob, pseudo_label = probs.max(dim=1)
    return pseudo_label, (max_prob >= threshold).float()


def loss_consistency(logits_ulb_s: Tensor, pseudo_label: Tensor, mask: Tensor) -> Tensor:
    """loss_u = 1 / B_u * sum_i mask_i * CE(logits_ulb_s_i, pseudo_label_i); masked rows are 0.

    [B_u, K], [B_u] int64, [B_u] -> scalar."""
    return (F.cross_entropy(logits_ulb_s, pseudo_label, reduction="none") * mask).mean()


def loss_distillation(logits: Tensor, y_zs: Tensor) -> Tensor:
    """L_KD = 1 / n * sum_i CE(logits_i, y_zs_i), 0 for a row with y_zs_i = -1 (no answer).  # D3

    [n, K], [n] int64 -> scalar."""
    return F.cross_entropy(logits, y_zs, reduction="none", ignore_index=-1).mean()


def with_agreement(mask: Tensor, pseudo_label: Tensor, y_zs: Tensor, alpha_t: float) -> Tensor:
    """max(mask_i, alpha_t) where pseudo_label_i = y_zs_i, else mask_i: student and teacher agree.

    Ramped, because right after stage 1 the head still echoes the teacher, mistakes included. Not in
    the paper. [B_u] 0 or 1, [B_u] int64, [B_u] int64 (-1: no answer), in [0, 1] -> [B_u]."""
    return torch.where(pseudo_label == y_zs, mask.clamp(min=alpha_t), mask)


def teacher_shares(y_zs: Tensor, y_lb: Tensor, K: int) -> Tensor:
    """p_k = (share of class k among the teacher's answers + its share among the labels) / 2.

    The labels preserve classes that the teacher confuses with others. Not in the paper.
    [N] int64 (-1: no answer), [num_labels] int64 -> [K]."""
    answers, labels = y_zs[y_zs >= 0].bincount(minlength=K), y_lb.bincount(minlength=K)
    shares = answers / answers.sum().clamp(min=1) + labels / labels.sum()
    return shares / shares.sum()


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """`.module`: weights <- d * weights + (1 - d) * student's, batch statistics included; after t
    updates d = min(decay, (1 + t) / (10 + t)); at t = 0 it copies.  # C8"""

    def update(*tensors: Any) -> None:  # averaged, current, t on their device
        t = average.n_averaged.item()  # on the CPU: no GPU waits
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(*tensors)

    average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    return average


# ---------------------------------------------------------------------------- training


def train_stage1(
    student: nn.Module, y_zs: Tensor, train: Views, test: Views, args: Args, run: Run
) -> nn.Module:
    """Distillation warm-up: the main head learns y_zs [N] on weak views of all training examples,
    labeled or not. Returns the network to evaluate and to continue with."""
    optimizer = optimizer_of(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = average_of(student, args.ema_decay), run.scaler()  # D4
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, _ = run.restore(1, parts)
    net, num_steps = data_parallel(student), args.num_steps_stage1

    for step in range(first_step, num_steps):
        seed_step(args.seed, "stage 1", step)  # so that a resumed run repeats the same step
        lr = args.lr * lr_at(step, num_steps, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        idx = batch_at(len(train), args.uratio * args.batch_size, args.seed, "stage 1", step)
        student.train()
        with run.autocast():
            logits, _, _ = net(train.weak(idx))  # weak views only, as published
        loss = loss_distillation(logits.float(), y_zs[idx])

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(student)

        run.log(1, step, num_steps, "loss {loss:.3f}", loss=loss, lr=lr)
        run.evaluate(1, step, num_steps, ema.module, test)  # every --eval-every steps, at the end
        run.save(1, step, num_steps, parts)  # then, and every ten minutes
    return ema.module  # the last weights, not the best-fitting ones: D1


def train_stage2(
    student: nn.Module, labeled_idx: Tensor, y_lb_all: Tensor, y_zs: Tensor, train: Views,
    test: Views, prior: Tensor | None, args: Args, run: Run,
) -> nn.Module:  # fmt: skip
    """AdaMatch on the main head, distillation on the auxiliary head; returns what to evaluate.

    labeled_idx [num_labels]: positions in `train`; y_lb_all: their labels; y_zs [N]: the teacher's.
    prior [K]: class shares in place of p_lb in the alignment; None: as published. The unlabeled
    pool is all of `train`, labeled examples included; its true labels reach only run.log."""
    optimizer = optimizer_of(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = average_of(student, args.ema_decay), run.scaler()  # D4
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, state = run.restore(2, parts)
    net, K = data_parallel(student), student.num_classes
    p_lb = state.get("p_lb", torch.full((K,), 1 / K, device=run.device))  # starts uniform
    p_ulb = state.get("p_ulb")  # None: starts at the first batch's mean

    for step in range(first_step, args.num_steps):
        seed_step(args.seed, "stage 2", step)
        lr = args.lr * lr_at(step, args.num_steps, args.warmup_steps)
        alpha_t = alpha_at(step, args.num_steps, args.anneal)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        at_lb = batch_at(len(labeled_idx), args.batch_size, args.seed, "labeled", step)
        idx_lb, y_lb = labeled_idx[at_lb], y_lb_all[at_lb]
        idx_ulb = batch_at(len(train), args.uratio * args.batch_size, args.seed, "unlabeled", step)
        x_lb, x_ulb_w, x_ulb_s = train.weak(idx_lb), train.weak(idx_ulb), train.strong(idx_ulb)
        B, B_u = len(idx_lb), len(idx_ulb)  # under torchrun, this process's share

        # One pass over all three views, so that batch statistics are those of the joint batch. The
        # unlabeled weak view keeps its gradient: through it loss_kd trains the encoder.
        student.train()
        with run.autocast():
            logits, logits_kd, _ = net(join([x_lb, x_ulb_w, x_ulb_s]))
        logits, logits_kd = logits.float(), logits_kd.float()  # for softmax, thresholds, losses
        logits_lb, logits_ulb_w, logits_ulb_s = logits.split([B, B_u, B_u])

        # Detached: targets are constants, and the marginals must not keep every step's graph.
        probs_lb = logits_lb.detach().softmax(dim=1)
        probs_ulb_w = logits_ulb_w.detach().softmax(dim=1)
        # Both marginals include this batch before they are used, as in the authors' code.
        p_lb = mean_over_processes(update_marginal(p_lb, probs_lb, args.marginal_decay))
        p_ulb = mean_over_processes(update_marginal(p_ulb, probs_ulb_w, args.marginal_decay))
        aligned = align(probs_ulb_w, p_lb if prior is None else prior, p_ulb)
        # The threshold follows the confidence on labeled data: early steps keep some labels, too.
        c_tau = mean_over_processes(relative_threshold(probs_lb, args.tau))
        pseudo_label, mask = hard_labels(aligned, c_tau)
        if args.agreement:
            mask = with_agreement(mask, pseudo_label, y_zs[idx_ulb], alpha_t)
        loss_s = F.cross_entropy(logits_lb, y_lb)
        loss_u = loss_consistency(logits_ulb_s, pseudo_label, mask)
        # Weak views only, as published.
        loss_kd = loss_distillation(logits_kd[: B + B_u], torch.cat([y_zs[idx_lb], y_zs[idx_ulb]]))
        loss = loss_s + args.lambda_u * loss_u + args.lambda_p * alpha_t * loss_kd

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(student)

        run.log(
            2, step, args.num_steps, LINE,
            loss=loss, loss_s=loss_s, lambda_u=args.lambda_u, loss_u=loss_u,
            kd_weight=args.lambda_p * alpha_t, loss_kd=loss_kd, mask_rate=mask.mean(), c_tau=c_tau,
            alpha_t=alpha_t, lr=lr, **pseudo_label_accuracy(pseudo_label, mask, train.y[idx_ulb]),
            agree_teacher=pseudo_label_accuracy(pseudo_label, mask, y_zs[idx_ulb])["pl_acc"],
        )  # fmt: skip
        run.evaluate(2, step, args.num_steps, ema.module, test)  # as in stage 1
        run.save(2, step, args.num_steps, parts, p_lb=p_lb, p_ulb=p_ulb)
    return ema.module


LINE = (
    "loss {loss:.3f} = s {loss_s:.3f} + {lambda_u:g}*u {loss_u:.3f} + {kd_weight:.2f}*kd "
    "{loss_kd:.3f} | mask {mask_rate:.2f} c_tau {c_tau:.2f} pl_acc {pl_acc_masked:.1f}"
)

# ---------------------------------------------------------------------------- main


def prior_from_file(path: str, classes: list[str]) -> Tensor:
    """Class shares [K], sum 1, from a JSON file {class: share or count}. Raises UserError."""
    expected = f'{{"{classes[0]}": 0.25, ...}} with a positive number for each class'
    with explained(f"--prior {path}", f"expected labeled, teacher, or a JSON file {expected}"):
        given = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        shares = torch.tensor([float(given.pop(name)) for name in classes])
        assert not given and (shares > 0).all() and shares.sum().isfinite()
    return shares / shares.sum()


def write_review(path: Path, found: list, labeled: Any, y_zs: Any, part: Split, classes: list):
    """CSV of up to 200 examples that the teacher labels differently: labeled ones (wrong labels?),
    least support first, then others (label these next?), by their rank, the student's confidence.
    found: `predict` of the pool. Support, 2 - rank: mean probability of the label on the 10 nearest
    examples (features): a student fits wrong labels, too, but seldom gives them to similar ones."""
    rows = [["labeled", "label or student's", "teacher's", "rank", "example"]]
    (probs, z), names = found, part.x if part.is_text else part.files
    rank, label = probs.max(dim=1)
    label[labeled] = torch.from_numpy(part.y[labeled])
    nearest = KNeighborsRegressor(min(10, len(z))).fit(z, probs).predict(z[labeled])
    rank[labeled] = 2 - torch.tensor(nearest[range(len(labeled)), label[labeled]])
    for i in rank.argsort(descending=True).tolist():
        if label[i] != y_zs[i] >= 0:
            item = i if names is None else names[i]
            rows.append([i in labeled, classes[label[i]], classes[y_zs[i]], rank[i].item(), item])
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(rows[:201])


def main(args: Args) -> dict:
    """Train as `args` say; returns what is written to result.json. Raises UserError."""
    columns = args.text_column, args.label_column
    preset = preset_of(args.dataset, args.backbone, args.size, columns)
    args = Args(**resolve(vars(args), preset))
    if args.stages == "1" and (args.agreement or args.prior != "labeled"):
        raise UserError("--agreement and --prior change stage 2; leave them out with --stages 1")
    device, dtype = setup_device(args.device, args.amp, args.backbone)
    data = load_data(args.dataset, args.data_dir, args.test_file, preset)
    K, prior, teacher_acc = len(data.classes), None, None
    labeled = draw_labeled(data.train.y, args.num_labels, K, args.seed)
    if args.prior not in ("labeled", "teacher"):  # read before a teacher is put to work
        prior = prior_from_file(args.prior, data.classes).to(device)

    if not args.pseudolabels:
        found = default_labels(data, args.data_dir, args.dataset, args.test_file)
        args.pseudolabels, args.pseudolabels_test = found[0], args.pseudolabels_test or found[1]
    zero_shot, _ = read_labels(args.pseudolabels, data, "train", labeled)
    if args.pseudolabels_test:
        test_labels, _ = read_labels(args.pseudolabels_test, data, "test")
        teacher_acc = 100 * float((test_labels == data.test.y).mean())
    y_zs, y_lb_all = (torch.from_numpy(y).to(device) for y in (zero_shot, data.train.y[labeled]))
    if args.prior == "teacher":
        prior = teacher_shares(y_zs, y_lb_all, K)
    run = Run(f"zeromatch-{data.name}-{args.num_labels}-seed{args.seed}", vars(args), device, dtype)
    test_part = run.describe(data, labeled, zero_shot)
    train, test = (make_views(x, preset, args.backbone, device) for x in (data.train, test_part))
    train.y[labeled] = -1  # monitor pseudo-labels on hidden labels only

    seed_step(args.seed, "weights", 0)
    student = build_student(args.backbone, preset, K, 0, args.weights, (train, test)).to(device)
    if args.compile:
        student.compile()
    if args.stages != "2" and run.state["stage"] < 2:
        evaluated = train_stage1(student, y_zs, train, test, args, run)
        student.load_state_dict(evaluated.state_dict())  # stage 2 inherits encoder, main head ...
    if args.stages != "1":
        seed_step(args.seed, "auxiliary head", 0)
        student.add_kd_head()  # ... while auxiliary head, optimizer, schedule, marginals are new
        idx = torch.from_numpy(labeled)
        evaluated = train_stage2(student, idx, y_lb_all, y_zs, train, test, prior, args, run)

    found = predict(evaluated, train, run.autocast)
    if not RANK:
        write_review(run.folder / "review.csv", found, labeled, zero_shot, data.train, data.classes)
    lines = {"teacher (zero-shot)": teacher_acc, "stage 1 (pseudo-supervision)": run.accuracy(1)}
    lines |= {"stage 2 (ZeroMatch)": run.accuracy(2)}
    return run.finish(evaluated, test, lines, teacher_acc=teacher_acc, stage1_acc=run.accuracy(1))


if __name__ == "__main__":
    cli(Args, main)
