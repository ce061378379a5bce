# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.9", "numpy>=1.26",
#   "scikit-learn>=1.5", "tyro>=0.9", "pytest>=8"]
# ///
"""AdaMatch: semi-supervised learning with a relative threshold and distribution alignment.

Paper: "AdaMatch: A Unified Approach to Semi-Supervised Learning and Domain Adaptation", ICLR 2022,
arXiv:2106.04732. Code of the authors: google-research/adamatch @7a0b40c ("GAM").

The label that the network itself gives to the WEAK view of an unlabeled image trains it on the
STRONG view. The weak view's class probabilities are first aligned to the mean predictions on
labeled data; their argmax is the label, kept if their maximum reaches an adaptive threshold c_tau,
tau times the mean (not aligned) confidence on the labeled batch.

    loss = loss_s + u_weight * loss_u

    loss_s   cross-entropy on labeled views with their true labels
    loss_u   cross-entropy on unlabeled strong views with the weak view's hard label, 0 below c_tau
             (mean over all unlabeled examples); no gradient through the weak view

The averaged weights are evaluated (ViT, BERT: the trained ones); reported is the last evaluation.

    variant              usb (default)                    paper (GAM)
    labeled views        weak                             weak and strong, loss_s is their mean
    logit interpolation  none                             labeled batch alone and jointly, below
    p_lb                 running average from uniform     the same, decay 0.999
    p_ulb                running average from batch 1     mean of 128 batch means, first all uniform
    u_weight             lambda_u                         0, 1 at T/2, lambda_u: half cosines
    --tau                0.95                             0.9

The default is stage 2 of zeromatch.py without the teacher, with identical hyper-parameters, to be
compared with it; optimizer and schedule are the preset's in both variants. Random logit
interpolation mixes, logit by logit, a pass of the labeled batch alone with the joint pass. Only
batch statistics make the two differ, so networks without them (ViT, BERT) skip it.

    python adamatch.py                              handwritten digits, 10 labels
    python adamatch.py --variant paper
    python adamatch.py --supervised-only            baseline: labeled data alone
    python adamatch.py --feature-input              baseline: the teacher's label as head input
    python adamatch.py --probe --backbone ...       baseline: logistic regression on its features
    python adamatch.py --dataset cifar100 --num-labels 100    on a GPU

    recipe       digits (default)                 cifar100 (ViT-S/2, pre-trained)
    B, B_u       16, 64                           16, 16
    steps        800                              204,800
    lr           SGD, 40 warm-up steps from 0;    AdamW, 5,120; heads 5e-4 -> 1e-4, layer decay
                 0.1 -> 0.0195 (7/16 cosine)      0.5
    averages     weights 0.99, marginals 0.99     no weight averaging, marginals 0.999
    weak view    8 x 8 crop, 1 pixel reflected    32 x 32 crop, 4 pixels; half mirrored
    strong view  a crop of its own, 3 operations of RandAugment, Cutout up to half the side (both)
    evaluation   every 40 steps, 500 images       every 2,048 steps, 10,000 images
    result       91.0 +- 6.1 % (seeds 0-19)       not run here (ZeroMatch paper: 71.43)
    cost         20 to 30 s on one CPU thread     not measured

Departures from the original code (those in the data path are numbered in common.py)
  A1  Strong views are RandAugment and Cutout in both variants; GAM's are CTAugment.
  A2  Optimizer, schedule and batch of the preset, with a 7/16 cosine. GAM: SGD without Nesterov, lr
      0.03, cosine to a quarter, L2 0.001 on kernels, 64 labeled and 192 unlabeled images, 131,072
      steps.
  A3  We report the last evaluation and the median of the last 20; GAM reports every 64 Ki images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import (
    LABELS, TEXTS, Run, UserError, Views, batch_at, build_student, cli, data_parallel, draw_labeled,
    join, load_data, make_views, mean_over_processes, optimizer_of, predict, preset_of,
    pseudo_label_accuracy, resolve, seed_step, setup_device, uniform, write_atomically,
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
    pseudolabels: str | None = None  # --feature-input, --probe: the teacher's labels
    pseudolabels_test: str | None = None  # --feature-input: those of the test part
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
    num_steps: int | None = None  # updates; alone, it scales warm-up and --eval-every
    batch_size: int | None = None  # B: labeled examples a step
    uratio: int | None = None  # B_u = uratio * B unlabeled examples a step
    optimizer: Literal["adamw", "sgd"] | None = None  # sgd has Nesterov momentum 0.9
    lr: float | None = None  # peak; with --layer-decay below 1, of the heads
    weight_decay: float | None = None  # of matrices and kernels; biases and norms have none
    layer_decay: float | None = None  # learning-rate factor from one layer to the one below it
    warmup_steps: int | None = None  # linear learning-rate warm-up
    ema_decay: float | None = None  # of the averaged weights, which are evaluated; 0: no averaging
    # method
    variant: Literal["usb", "paper"] = "usb"  # paper: as in the code of AdaMatch's authors
    supervised_only: bool = False  # baseline: labeled weak views alone
    probe: bool = False
    """Baseline in seconds: logistic regression on the encoder's features, which are not trained.
    For pre-trained backbones. With --pseudolabels, it also prints the teacher's accuracy."""
    feature_input: bool = False
    """Baseline: the head also sees the teacher's one-hot label, in training and at test time."""
    tau: float | None = None  # relative threshold: times the mean confidence on labeled; see above
    lambda_u: float = 1.0  # weight of loss_u
    marginal_decay: float | None = None  # of the running class marginals p_lb and p_ulb


# ---------------------------------------------------------------------------- the method
# Sizes: B labeled, B_u unlabeled examples a step, K classes. Functions that zeromatch.py or
# kd_fixmatch.py also need are repeated there, word for word.


def lr_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """t / warmup in the warm-up, then cos(7/16 pi * (t - warmup) / (T - warmup)): ends at 0.195.

    Factor of the peak learning rate at step t of T. Source: ZM semilearn/core/utils/build.py."""
    if step < warmup_steps:
        return step / warmup_steps
    return math.cos(7 / 16 * math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps))


def u_weight_at(step: int, num_steps: int, lambda_u: float) -> float:
    """Weight of loss_u (paper): (1 - cos 2 pi t / T) / 2 rises from 0 to 1 over the first half of T
    steps; a second half cosine then leads from 1 to lambda_u.

    Source: GAM semi_supervised/adamatch.py, shared/train.py."""
    half_cosine = 0.5 - 0.5 * math.cos(2 * math.pi * step / num_steps)
    if 2 * step < num_steps:
        return half_cosine
    return 1 + (lambda_u - 1) * (1 - half_cosine)


def interpolate_logits(logits_joint: Tensor, logits_alone: Tensor, lam: Tensor) -> Tensor:
    """Random logit interpolation: logits_joint + lam * (logits_alone - logits_joint).

    [n, K] each: one lam in [0, 1) per logit; the gradient flows through both passes. Source: GAM
    semi_supervised/adamatch.py."""
    return logits_joint + lam * (logits_alone - logits_joint)


def update_window(window: Tensor, probs: Tensor, step: int) -> Tensor:
    """The last 128 batch means, this one in the oldest's place; p_ulb is their mean (paper).

    [128, K], [n, K] -> [128, K]. Source: GAM semi_supervised/adamatch.py."""
    window = window.clone()
    window[step % len(window)] = probs.mean(dim=0)
    return window


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


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """`.module`: weights <- d * weights + (1 - d) * student's, batch statistics included; after t
    updates d = min(decay, (1 + t) / (10 + t)); at t = 0 it copies.  # C8"""

    def update(*tensors: Any) -> None:  # averaged, current, t on their device
        t = average.n_averaged.item()  # on the CPU: no GPU waits
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(*tensors)

    average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    return average


# ---------------------------------------------------------------------------- training


def forward(net: nn.Module, x: Tensor, train: Views, idx: Tensor, run: Run) -> Tensor:
    """Logits [n, K] of views x of the examples idx, in float32 for softmax, thresholds, losses."""
    with run.autocast():
        logits, _, _ = net(x, train.extra[idx])  # further inputs only with --feature-input
    return logits.float()


def train_adamatch(
    student: nn.Module, labeled_idx: Tensor, y_lb_all: Tensor, train: Views, test: Views,
    args: Args, run: Run,
) -> nn.Module:  # fmt: skip
    """Train as `args` say and return the network to evaluate.

    labeled_idx [num_labels]: positions in `train`; y_lb_all: their labels. The unlabeled pool is
    all of `train`, labeled examples included; its true labels reach only run.log."""
    optimizer = optimizer_of(student, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    ema, scaler = average_of(student, args.ema_decay), run.scaler()
    parts = {"model": student, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    first_step, state = run.restore(1, parts)
    net, K = data_parallel(student), student.num_classes
    paper = args.variant == "paper" and not args.supervised_only
    coupled = student.encoder.batch_statistics  # rows of a batch influence one another
    p_lb = state.get("p_lb", torch.full((K,), 1 / K, device=run.device))  # starts uniform
    p_ulb = state.get("p_ulb")  # None: starts at the first batch's mean
    window = state.get("window", torch.full((128, K), 1 / K, device=run.device))

    for step in range(first_step, args.num_steps):
        seed_step(args.seed, "adamatch", step)  # so that a resumed run repeats the same step
        lr = args.lr * lr_at(step, args.num_steps, args.warmup_steps)
        u_weight = u_weight_at(step, args.num_steps, args.lambda_u) if paper else args.lambda_u
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        at_lb = batch_at(len(labeled_idx), args.batch_size, args.seed, "labeled", step)
        idx_lb, y_lb = labeled_idx[at_lb], y_lb_all[at_lb]
        idx_ulb = batch_at(len(train), args.uratio * args.batch_size, args.seed, "unlabeled", step)
        B, B_u = len(idx_lb), len(idx_ulb)  # under torchrun, this process's share
        x_lb = train.weak(idx_lb)
        if paper:  # labeled weak and strong views: loss_s is the mean over both
            x_lb = join([x_lb, train.strong(idx_lb)])
            idx_lb, y_lb = idx_lb.repeat(2), y_lb.repeat(2)

        student.train()
        if args.supervised_only:
            loss = loss_s = F.cross_entropy(forward(net, x_lb, train, idx_lb, run), y_lb)
            values = {"loss": loss, "loss_s": loss_s}
        else:
            x_ulb_w, x_ulb_s = train.weak(idx_ulb), train.strong(idx_ulb)
            if coupled:  # one pass, so that batch statistics are those of the joint batch
                x, idx = join([x_lb, x_ulb_w, x_ulb_s]), torch.cat([idx_lb, idx_ulb, idx_ulb])
                logits = forward(net, x, train, idx, run)
                logits_lb, logits_ulb_w, logits_ulb_s = logits.split([len(x_lb), B_u, B_u])
            else:  # nothing learns from the weak view, so its gradient would be wasted work
                with torch.no_grad():
                    logits_ulb_w = forward(net, x_ulb_w, train, idx_ulb, run)
                x, idx = join([x_lb, x_ulb_s]), torch.cat([idx_lb, idx_ulb])
                logits = forward(net, x, train, idx, run)
                logits_lb, logits_ulb_s = logits.split([len(x_lb), B_u])
            if paper and coupled:
                kept = [buffer.clone() for buffer in student.buffers()]
                logits_alone = forward(net, x_lb, train, idx_lb, run)
                for buffer, value in zip(student.buffers(), kept, strict=True):
                    buffer.data.copy_(value)  # the extra pass must not move running statistics
                lam = torch.cat([uniform(B, K), uniform(B, K)]).to(run.device)
                logits_lb = interpolate_logits(logits_lb, logits_alone, lam)

            # Detached: targets are constants, and the marginals must not keep every step's graph.
            probs_lb = logits_lb[:B].detach().softmax(dim=1)
            probs_ulb_w = logits_ulb_w.detach().softmax(dim=1)
            # Both marginals include this batch before they are used, as in the authors' code.
            p_lb = mean_over_processes(update_marginal(p_lb, probs_lb, args.marginal_decay))
            if paper:
                window = mean_over_processes(update_window(window, probs_ulb_w, step))
                p_ulb = window.mean(dim=0)
            else:
                p_ulb = update_marginal(p_ulb, probs_ulb_w, args.marginal_decay)
                p_ulb = mean_over_processes(p_ulb)
            # The threshold follows the confidence on labeled data: early steps keep labels, too.
            c_tau = mean_over_processes(relative_threshold(probs_lb, args.tau))
            pseudo_label, mask = hard_labels(align(probs_ulb_w, p_lb, p_ulb), c_tau)

            loss_s = F.cross_entropy(logits_lb, y_lb)
            loss_u = loss_consistency(logits_ulb_s, pseudo_label, mask)
            loss = loss_s + u_weight * loss_u
            values = {
                "loss": loss, "loss_s": loss_s, "u_weight": u_weight, "loss_u": loss_u,
                "mask_rate": mask.mean(), "c_tau": c_tau,
                **pseudo_label_accuracy(pseudo_label, mask, train.y[idx_ulb]),
            }  # fmt: skip

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(student)

        line = "loss {loss:.3f} = s" if args.supervised_only else LINE
        run.log(1, step, args.num_steps, line, **values, lr=lr)
        # Evaluates every --eval-every steps and at the end; saves then and every ten minutes.
        run.evaluate(1, step, args.num_steps, ema.module, test)
        run.save(1, step, args.num_steps, parts, p_lb=p_lb, p_ulb=p_ulb, window=window)
    return ema.module


LINE = (
    "loss {loss:.3f} = s {loss_s:.3f} + {u_weight:.2f}*u {loss_u:.3f}"
    " | mask {mask_rate:.2f} c_tau {c_tau:.2f} pl_acc {pl_acc_masked:.1f}"
)

def probe(student: nn.Module, labeled: Views, test: Views, run: Run) -> float:
    """Percent of `test` that a logistic regression gets right, fitted to the labeled examples'
    features (each scaled to mean 0 and variance 1 on them)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (_, x), (_, x_test) = (predict(student, views, run.autocast) for views in (labeled, test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * model.fit(x, labeled.y.cpu()).score(x_test, test.y.cpu())


# ---------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    """Train as `args` say; returns what is written to result.json. Raises UserError."""
    columns = args.text_column, args.label_column
    preset = preset_of(args.dataset, args.backbone, args.size, columns)
    own = {"tau": 0.9, "marginal_decay": 0.999} if args.variant == "paper" else {"tau": 0.95}
    unset = {name: value for name, value in own.items() if getattr(args, name) is None}
    args = Args(**resolve(vars(args) | unset, preset))
    if args.variant not in ("usb", "paper"):
        raise UserError(f"--variant {args.variant}: from an older version; start a new run")
    if args.pseudolabels and not (args.feature_input or args.probe):
        raise UserError("--pseudolabels: for --feature-input, --probe; AdaMatch has no teacher")
    if args.pseudolabels_test and not args.feature_input:
        raise UserError("--pseudolabels-test: for --feature-input alone")
    if args.supervised_only + args.feature_input + args.probe > 1:
        raise UserError("--supervised-only, --feature-input, --probe: take one")
    device, dtype = setup_device(args.device, args.amp, args.backbone)
    data = load_data(args.dataset, args.data_dir, args.test_file, preset)
    K = len(data.classes)
    labeled = draw_labeled(data.train.y, args.num_labels, K, args.seed)
    zero_shot: list[Any] = []
    teacher = None
    if args.feature_input or args.pseudolabels:
        from pseudolabel import default_labels, read_labels  # only these baselines read labels
    if args.probe and args.pseudolabels:
        teacher, _ = read_labels(args.pseudolabels, data, "train", labeled)
    if args.feature_input:
        paths = args.pseudolabels, args.pseudolabels_test
        if paths == (None, None):
            paths = default_labels(data, args.data_dir, args.dataset, args.test_file)
        if None in paths:
            raise UserError("--feature-input needs --pseudolabels and --pseudolabels-test")
        parts = zip(paths, ("train", "test"), strict=True)
        zero_shot = [torch.from_numpy(read_labels(path, data, part)[0]) for path, part in parts]

    name = f"adamatch-{data.name}-{args.num_labels}-seed{args.seed}"
    run = Run(name, vars(args), device, dtype)
    test_part = run.describe(data, labeled, teacher)
    idx, y_lb_all = torch.from_numpy(labeled), torch.from_numpy(data.train.y[labeled]).to(device)
    train, test = (make_views(x, preset, args.backbone, device) for x in (data.train, test_part))
    train.y[labeled] = -1  # monitor pseudo-labels on hidden labels only
    for views, labels in zip((train, test), zero_shot):
        one_hot = torch.eye(K + 1, K, device=device)  # the last row, all zero: no answer
        views.extra = one_hot[labels]

    seed_step(args.seed, "weights", 0)
    num_extra = K if args.feature_input else 0
    parts = train, test
    student = build_student(args.backbone, preset, K, num_extra, args.weights, parts).to(device)
    if args.probe:
        known = make_views(data.train.take(labeled), preset, args.backbone, device)
        result = {run.measured: probe(student, known, test, run), "measured": run.measured}
        result["seconds"] = run.seconds()
        print(f"\n{run.measured} of the probe: {result[run.measured]:.2f} %")
        write_atomically(run.folder / "result.json", result | {"args": vars(args)})
        return result
    if args.compile:
        student.compile()
    evaluated = train_adamatch(student, idx, y_lb_all, train, test, args, run)
    lines = {"supervised only" if args.supervised_only else "AdaMatch": run.accuracy(1)}
    return run.finish(evaluated, test, lines)


if __name__ == "__main__":
    cli(Args, main)
