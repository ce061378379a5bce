"""ZeroMatch: semi-supervised learning with a foundation model's zero-shot pseudo-labels.

Paper: "Enhancing Semi-supervised Learning with Zero-shot Pseudolabels", TMLR 2026, arXiv:2502.12584.
Code of the authors: github.com/jichan3751/zeromatch @8ca4079 ("ZM"). Symbols are the paper's; its
equation numbers were not at hand, so equations are named, not numbered.

Stage 1 (distillation warm-up) trains encoder and main head on the teacher's labels of ALL training
examples. Stage 2 goes on with AdaMatch on the main head, while a new auxiliary head on the same
encoder keeps predicting the teacher's labels, so that the encoder does not forget them:

    loss = loss_s + lambda_u * loss_u + lambda_p * alpha_t * loss_kd

    loss_s   cross-entropy of the main head on labeled weak views
    loss_u   the same on unlabeled STRONG views; target: the main head's own hard label of the WEAK
             view after alignment, if its confidence reaches c_tau = tau * (mean confidence on labeled)
    loss_kd  cross-entropy of the AUXILIARY head on labeled and unlabeled weak views; target: the teacher
    alpha_t  0 at the first step, 1 at the last, linear

At test time the main head of the averaged weights predicts; the auxiliary head is thrown away. The
reported accuracy is that of the last evaluation (and the median of the last 20), never the best one.

    python zeromatch.py                                    handwritten digits, 10 labels, a minute on a laptop
    python zeromatch.py --stages 1                         pseudo-supervision: the teacher's labels as if true
    python zeromatch.py --stages 2                         ablation: no warm-up
    python zeromatch.py --lambda-p 0 | --anneal none       ablations: no auxiliary loss | constant weight
    python zeromatch.py --agreement | --prior teacher      beyond the paper: with_agreement | align to other shares

Departures from the authors' code
  D1  Stage 1 hands on its last (averaged) weights. ZM keeps the checkpoint that fits the teacher's
      labels on training images best, which rewards the most over-fitted one.
  D2  Reported: see above. ZM: the best test accuracy; for texts that of the weights best on labeled dev data.
  D3  An example whose teacher gave no answer has no distillation loss; it counts in the denominator,
      as an unlabeled example below the threshold does. ZM gives it one fixed class.
  D4  With batch statistics (CNN, WRN) weights are averaged over steps and the averaged ones evaluated,
      as FixMatch and AdaMatch do. ZM only trains transformers, without averaging; so do we there.
  Departures in the data path are numbered in common.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    MEASURED, PROCESSES, Averaged, Run, TextViews, UserError, Views, accuracy, batch_at, build_optimizer, build_student,
    check_arguments, class_shares, cli, data_parallel, draw_labeled, fill_from_preset, join, load_data, load_weights,
    make_views, mean_over_processes, measured_part, predict, preset_of, pseudo_label_accuracy, save_student, seed_step,
    setup_device, student_config,
)  # fmt: skip
from pseudolabel import default_labels, read_labels

# ---------------------------------------------------------------------------- arguments


@dataclass
class Args:
    # run
    dataset: str = "digits"
    """A name of common.PRESETS, a folder of pictures or a .csv or .jsonl file of texts (README: Your own data)."""
    test_file: str | None = None
    """Test part of a file of texts; unset: a fifth of its labeled rows, if every class has ten."""
    num_labels: int = 10
    """Labeled examples in all, the same number of every class; 0: all whose label is known (own data)."""
    seed: int = 0
    """Decides the labeled examples, the initial weights, the batches and every random view."""
    pseudolabels: str | None = None
    """Teacher's labels of the training part (pseudolabel.py); unset: found in --data-dir or (images) made."""
    pseudolabels_test: str | None = None
    """Teacher's labels of the test part, only to print the teacher's accuracy on it."""
    data_dir: str = "data"
    """Where data sets and label files are kept."""
    runs_dir: str = "runs"
    """Where a folder for this run is made."""
    resume: str | None = None
    """Folder of a run to go on with; its arguments are kept."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the best there is."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Precision of the forward pass; losses are always float32. auto: bf16 where it is native and faster."""
    compile: bool = False
    """Compile the student with torch.compile: slow first step, then faster, mostly on GPUs."""
    log_every: int = 20
    """Steps from one printed line to the next."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard into the run folder; needs the package tensorboard."""
    eval_every: int | None = None
    """Steps from one evaluation and checkpoint to the next. Unset, here and below: the preset's value."""
    # model
    backbone: str | None = None
    """cnn, wrn_28_2, vit_small_patch2_32, vit_small_patch16_224, efficientnet_b0, or an id or folder of transformers"""
    weights: str | None = None
    """Pre-trained weights of the encoder: a file (texts: a folder), or none; unset: the published ones, if any."""
    # optimization
    num_steps: int | None = None
    """Updates of stage 2. Alone, it also scales stage 1, the warm-up and --eval-every."""
    num_steps_stage1: int | None = None
    """Updates of stage 1."""
    batch_size: int | None = None
    """B: labeled examples a step."""
    uratio: int | None = None
    """Unlabeled examples per labeled one: B_u = uratio * B. Stage 1 takes B_u examples a step."""
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
    stages: Literal["both", "1", "2"] = "both"
    """1: pseudo-supervision only. 2: no warm-up. both: ZeroMatch."""
    tau: float = 0.95
    """Relative threshold in [0, 1]: multiplies the mean confidence on the labeled batch."""
    lambda_u: float = 1.0
    """Weight of loss_u."""
    lambda_p: float = 1.0
    """Weight of loss_kd; 0: stage 2 is AdaMatch (without --agreement and --prior)."""
    anneal: Literal["linear", "none"] = "linear"
    """alpha_t: linear from 0 to 1 over stage 2, or none: 1 throughout."""
    marginal_decay: float | None = None
    """Decay of the running class marginals p_lb and p_ulb."""
    agreement: bool = False
    """Beyond the paper: a pseudo-label that is also the teacher's counts by alpha_t below the threshold, too."""
    prior: str = "labeled"
    """Beyond the paper, for classes of unequal size: shares that pseudo-labels are aligned to. labeled: p_lb, as
    published; teacher: half its answers', half the labels'; else a JSON file, {class: share or count}."""


# ---------------------------------------------------------------------------- the method
# Sizes: B labeled, B_u unlabeled examples a step, K classes. Functions that adamatch.py or
# kd_fixmatch.py need too stand there word for word.


def lr_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """t / warmup up to the warm-up's end, then cos(7/16 pi * (t - warmup) / (T - warmup)): ends at 0.195.

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
    """c_tau = tau * mean_i max_k probs_lb_ik, of the labeled batch before alignment. [B, K] -> scalar."""
    return tau * probs_lb.max(dim=1).values.mean()


def hard_labels(probs: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """pseudo_label_i = argmax_k probs_ik and mask_i = [max_k probs_ik >= threshold].

    [n, K] -> [n] int64, [n] float 0 or 1."""
    max_prob, pseudo_label = probs.max(dim=1)
    return pseudo_label, (max_prob >= threshold).float()


def loss_consistency(logits_ulb_s: Tensor, pseudo_label: Tensor, mask: Tensor) -> Tensor:
    """loss_u = 1 / B_u * sum_i mask_i * CE(logits_ulb_s_i, pseudo_label_i); masked rows count in B_u.

    [B_u, K], [B_u] int64, [B_u] -> scalar."""
    return (F.cross_entropy(logits_ulb_s, pseudo_label, reduction="none") * mask).mean()


def loss_distillation(logits: Tensor, y_zs: Tensor) -> Tensor:
    """L_KD = 1 / n * sum_i CE(logits_i, y_zs_i), 0 for a row with y_zs_i = -1 (no answer).  # D3

    [n, K], [n] int64 -> scalar."""
    return F.cross_entropy(logits, y_zs, reduction="none", ignore_index=-1).mean()


def with_agreement(mask: Tensor, pseudo_label: Tensor, y_zs: Tensor, alpha_t: float) -> Tensor:
    """max(mask_i, alpha_t) where pseudo_label_i = y_zs_i, else mask_i: two witnesses need no threshold.

    Ramped, as right after stage 1 they are not independent: the head agrees with what it was taught, mistakes too.
    [B_u] 0 or 1, [B_u] int64, [B_u] int64 (-1: no answer, agrees with none), in [0, 1] -> [B_u]. Not in the paper."""
    return torch.where(pseudo_label == y_zs, mask.clamp(min=alpha_t), mask)


# ---------------------------------------------------------------------------- training


def train_stage1(
    student: nn.Module, y_zs: Tensor, train: Views | TextViews, test: Views | TextViews, args: Args, run: Run
) -> nn.Module:
    """Distillation warm-up: the main head learns y_zs [N] on weak views of all training examples.

    Returns the network to evaluate and to go on with: the averaged copy where weights are averaged."""
    optimizer = build_optimizer(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = Averaged(student, args.ema_decay), run.scaler()  # D4
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, _ = run.restore(1, parts)
    net = data_parallel(student)
    num_steps, batch = args.num_steps_stage1, args.uratio * args.batch_size // PROCESSES

    for step in range(first_step, num_steps):
        seed_step(args.seed, "stage 1", step)
        lr = args.lr * lr_at(step, num_steps, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        idx = batch_at(len(train), batch, args.seed, step)

        student.train()
        with run.autocast():
            logits, _, _ = net(train.weak(idx))
        logits = logits.float()
        loss = loss_distillation(logits, y_zs[idx])

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update()

        run.log(1, step, num_steps, args.log_every, "loss {loss:.3f}", loss=loss, lr=lr)
        evaluate = (step + 1) % args.eval_every == 0 or step + 1 == num_steps
        if evaluate:
            run.evaluated(1, step, accuracy(predict(ema.module, test, run.autocast), test.y))
        if evaluate or run.save_due():
            run.save(1, step, parts)
    return ema.module  # D1


def train_stage2(
    student: nn.Module, labeled_idx: Tensor, y_lb_all: Tensor, y_zs: Tensor, train: Views | TextViews,
    test: Views | TextViews, prior: Tensor | None, args: Args, run: Run,
) -> nn.Module:  # fmt: skip
    """AdaMatch on the main head, distillation on the auxiliary head.

    labeled_idx [num_labels] are positions in `train`, y_lb_all their labels, y_zs [N] the teacher's.
    prior [K]: shares of the classes in place of p_lb in the alignment; None: as published.
    The unlabeled pool is all of `train`, the labeled examples included. train.y beyond the labeled
    ones is read in the line that logs the pseudo-labels' accuracy, and nowhere else.
    Returns the network to evaluate."""
    optimizer = build_optimizer(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = Averaged(student, args.ema_decay), run.scaler()  # D4
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, state = run.restore(2, parts)
    net = data_parallel(student)
    K = student.num_classes
    p_lb = state.get("p_lb", torch.full((K,), 1 / K, device=run.device))  # starts uniform
    p_ulb = state.get("p_ulb")  # None: starts at the first batch's mean
    B = args.batch_size // PROCESSES  # here and below: the rows of this process
    B_u = args.uratio * B

    for step in range(first_step, args.num_steps):
        seed_step(args.seed, "stage 2", step)
        lr = args.lr * lr_at(step, args.num_steps, args.warmup_steps)
        alpha_t = alpha_at(step, args.num_steps, args.anneal)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        at_lb = batch_at(len(labeled_idx), B, args.seed, step)
        idx_lb, y_lb = labeled_idx[at_lb], y_lb_all[at_lb]
        idx_ulb = batch_at(len(train), B_u, args.seed, step)
        x_lb, x_ulb_w, x_ulb_s = train.weak(idx_lb), train.weak(idx_ulb), train.strong(idx_ulb)

        # One pass over all three: batch statistics are those of the joint batch. The weak view keeps
        # its gradient, which only the auxiliary head uses.
        student.train()
        with run.autocast():
            logits, logits_kd, _ = net(join([x_lb, x_ulb_w, x_ulb_s]))
        logits, logits_kd = logits.float(), logits_kd.float()  # thresholds and losses in float32
        logits_lb, logits_ulb_w, logits_ulb_s = logits.split([B, B_u, B_u])

        probs_lb, probs_ulb_w = logits_lb.detach().softmax(dim=1), logits_ulb_w.detach().softmax(dim=1)
        p_lb = mean_over_processes(update_marginal(p_lb, probs_lb, args.marginal_decay))  # both before use
        p_ulb = mean_over_processes(update_marginal(p_ulb, probs_ulb_w, args.marginal_decay))
        c_tau = mean_over_processes(relative_threshold(probs_lb, args.tau))
        pseudo_label, mask = hard_labels(align(probs_ulb_w, p_lb if prior is None else prior, p_ulb), c_tau)
        if args.agreement:
            mask = with_agreement(mask, pseudo_label, y_zs[idx_ulb], alpha_t)

        loss_s = F.cross_entropy(logits_lb, y_lb)
        loss_u = loss_consistency(logits_ulb_s, pseudo_label, mask)
        loss_kd = loss_distillation(logits_kd[: B + B_u], torch.cat([y_zs[idx_lb], y_zs[idx_ulb]]))
        loss = loss_s + args.lambda_u * loss_u + args.lambda_p * alpha_t * loss_kd

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update()

        run.log(
            2, step, args.num_steps, args.log_every, LINE,
            loss=loss, loss_s=loss_s, lambda_u=args.lambda_u, loss_u=loss_u, kd_weight=args.lambda_p * alpha_t,
            loss_kd=loss_kd, mask_rate=mask.mean(), c_tau=c_tau, alpha_t=alpha_t, lr=lr,
            pseudo_label=pseudo_label, mask=mask, **pseudo_label_accuracy(pseudo_label, mask, train.y[idx_ulb]),
            agree_teacher=pseudo_label_accuracy(pseudo_label, mask, y_zs[idx_ulb])["pl_acc"],
        )  # fmt: skip
        evaluate = (step + 1) % args.eval_every == 0 or step + 1 == args.num_steps
        if evaluate:
            run.evaluated(2, step, accuracy(predict(ema.module, test, run.autocast), test.y))
        if evaluate or run.save_due():
            run.save(2, step, parts, p_lb=p_lb, p_ulb=p_ulb)
    return ema.module


LINE = (
    "loss {loss:.3f} = s {loss_s:.3f} + {lambda_u:g}*u {loss_u:.3f} + {kd_weight:.2f}*kd {loss_kd:.3f}"
    " | mask {mask_rate:.2f} c_tau {c_tau:.2f} pl_acc {pl_acc_masked:.1f}"
)

# ---------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, Any]:
    """Train as `args` say; returns what is written to result.json. Raises UserError."""
    preset = preset_of(args.dataset, args.backbone)
    args = replace(args, **fill_from_preset(vars(args), preset))
    check_arguments(vars(args))
    device, dtype = setup_device(args.device, args.amp, args.backbone)
    data = load_data(args.dataset, args.data_dir, args.test_file)
    labeled = draw_labeled(data.train.y, args.num_labels, len(data.classes), args.seed)
    if args.stages == "1" and (args.agreement or args.prior != "labeled"):
        raise UserError("--agreement and --prior change stage 2 only; leave them out with --stages 1")
    if args.pseudolabels_test and not args.pseudolabels:
        raise UserError("--pseudolabels-test needs --pseudolabels")
    if not args.pseudolabels:
        found = [p and str(p) for p in default_labels(data, args.data_dir, args.dataset, args.test_file)]  # or None
        args = replace(args, pseudolabels=found[0], pseudolabels_test=found[1])  # kept in args.json
    zero_shot, _ = read_labels(args.pseudolabels, data, "train")
    teacher_acc = None
    if args.pseudolabels_test:
        teacher_acc = 100 * float((read_labels(args.pseudolabels_test, data, "test")[0] == data.test.y).mean())

    prior = class_shares(args.prior, data.classes, zero_shot, data.train.y[labeled], device)
    test_part, measured = measured_part(data, zero_shot)
    name = f"zeromatch-{data.name}-{args.num_labels}-seed{args.seed}"
    run = Run(args.runs_dir, name, asdict(args), device, dtype)
    run.describe(data, labeled, vars(args), measured, zero_shot, prior)
    train, test = (make_views(part, preset, args.backbone, device, args.data_dir) for part in (data.train, test_part))
    y_zs = torch.from_numpy(zero_shot).to(device)
    labeled_idx, y_lb_all = torch.from_numpy(labeled), torch.from_numpy(data.train.y[labeled]).to(device)

    seed_step(args.seed, "weights", 0)
    student = build_student(args.backbone, len(preset.mean), preset.size, len(data.classes)).to(device)
    load_weights(student.encoder, args.backbone, args.weights)
    if args.compile:
        student.compile()
    if args.stages != "2" and run.state["stage"] < 2:
        evaluated = train_stage1(student, y_zs, train, test, args, run)
        student.load_state_dict(evaluated.state_dict())  # stage 2 inherits encoder and main head ...
    if args.stages != "1":
        seed_step(args.seed, "auxiliary head", 0)
        student.add_kd_head()  # ... while auxiliary head, optimizer, schedule and marginals are new
        evaluated = train_stage2(student, labeled_idx, y_lb_all, y_zs, train, test, prior, args, run)

    save_student(run.folder / "student", evaluated, student_config(args.dataset, args.backbone, preset, data.classes))
    result = run.result(stage=1 if args.stages == "1" else 2) | {"teacher_acc": teacher_acc, "measured": measured}
    result["stage1_acc"] = run.result(stage=1)[measured]
    run.write_json("result.json", result | {"args": asdict(args)})
    print(f"\n{data.name}, {len(labeled)} labels: {MEASURED[measured][1]} ({len(test)}), last evaluation")
    accs = {"teacher (zero-shot)": teacher_acc, "stage 1 (pseudo-supervision)": result["stage1_acc"]}
    for name, acc in (accs | ({} if args.stages == "1" else {"stage 2 (ZeroMatch)": result[measured]})).items():
        print(f"  {name:30} {'not known' if acc is None else f'{acc:.2f} %'}")
    return result


if __name__ == "__main__":
    cli(Args, main)
