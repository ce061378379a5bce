"""What the method scripts share: data, views, backbones, evaluation, run folder.

Nothing in here knows a method: a rule with an equation, a threshold or a schedule in a paper stands
in that paper's script. Functions take values, never the scripts' `Args`, so a signature tells all.

Departures from the published code (jichan3751/zeromatch @8ca4079, "ZM"):
  C1  Index stream: endless seeded permutations, every example once a pass. ZM cuts every "epoch" of
      1,024 steps from a new permutation whose seed is the epoch number alone, equal for all runs. Stages
      see the same order; so do labeled and unlabeled batches where every example of the pool is labeled.
  C2  Cutout: center uniform over the image, box clipped on both sides. ZM draws the center from
      U(1, width) and lets boxes at the left and top edge keep their full size, one pixel wider.
  C3  Kept as published: enhancement factors reach only 0.05-0.95 (images get duller, never more
      vivid), and every one of the three operations is always applied.
  C4  Gray images stay gray: Color leaves them as they are, and Cutout's fill is the fill's luminance.
  C5  WRN-28-2: every block's first batch-norm feeds its first convolution. In ZM's copy the one at
      the head of groups 2 and 3 feeds nothing and gets no gradient.
  C6  SVHN is not mirrored (ZM mirrors digits); EuroSAT turns upside down as published.
  T1  Text features are the mean over a row's own tokens. ZM's mean runs over the padding too, so that
      a prediction depends on the longest row of its batch.
  T2  A text is title and body with a space between, escaped newlines decoded. ZM joins them without
      one, keeps the escapes and drops Yahoo's last character; Yahoo's best answer is dropped by both.
  T3  The draw of train, dev and test rows is seeded, and no text of the test part is drawn for the
      others. ZM's draw is unseeded; its training texts are the last 1,024 characters, as ours are.
  T4  Strong view of texts that have no back-translations: deletion, masking and swaps of tokens.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import json
import logging
import math
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial, wraps
from http.client import HTTPException
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------- presets and errors


class UserError(ValueError):
    """Something the user can mend: `cli` prints it as one line and exits with code 2."""


class Preset(NamedTuple):
    """One data set: how its images or texts are stored and seen, and the recipe that trains on it."""

    backbone: str
    size: int  # side of the seen image, pixels; texts: longest row in tokens, cut on the right
    pad: int  # reflected border before the random crop, 0.125 * size; 0: crops of a stored size / 0.875
    flip: int  # views: 1: mirror half of the images, 2: also turn half of them upside down
    mean: tuple[float, ...]  # of each channel, of values in [0, 1]; empty: texts
    std: tuple[float, ...]
    optimizer: str  # "sgd" (Nesterov momentum 0.9) or "adamw"
    lr: float
    weight_decay: float
    layer_decay: float  # learning-rate factor from one layer group to the one below it
    batch_size: int  # B, labeled images a step
    uratio: int  # unlabeled images per labeled image
    num_steps: int  # of stage 2, and of the methods that have one stage
    num_steps_stage1: int
    warmup_steps: int
    ema_decay: float  # of the evaluated weights; 0: the weights themselves
    marginal_decay: float  # of the class marginals p_lb and p_ulb
    eval_every: int


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Recipes, columns as below. ZM config/usb_cv_paper: cifar100; flowers102 and resisc45. The others are choices
# made here: what is nearest of these, with USB's learning rate for eurosat.
VIT_32 = ("adamw", 5e-4, 5e-4, 0.5, 16, 1, 204_800, 204_800, 5_120, 0.0, 0.999, 2_048)
VIT_224 = ("adamw", 1e-4, 5e-4, 0.65, 16, 1, 102_400, 102_400, 2_560, 0.0, 0.999, 1_024)
CLASSIC = {  # --backbone wrn_28_2 from scratch: FixMatch, and USB config/classic_cv; stage 1 is a choice made here
    "backbone": "wrn_28_2", "optimizer": "sgd", "lr": 0.03, "weight_decay": 5e-4, "layer_decay": 1.0, "batch_size": 64,
    "uratio": 7, "num_steps": 2**20, "num_steps_stage1": 2**18, "warmup_steps": 0, "ema_decay": 0.999,
    "marginal_decay": 0.999, "eval_every": 5_120,
}  # fmt: skip
# fmt: off
PRESETS = {
    # backbone, size, pad, flip, mean, std | optimizer, lr, weight decay, layer decay | B, uratio, steps, of stage 1,
    # warm-up | decay of weights and of marginals, evaluate every
    "digits": Preset(
        "cnn", 8, 1, False, (0.305,), (0.376,), "sgd", 0.1, 1e-3, 1.0, 16, 4, 800, 400, 40, 0.99, 0.99, 40),
    "fashion_mnist": Preset(
        "cnn", 28, 3, 1, (0.286,), (0.353,), "sgd", 0.1, 1e-3, 1.0, 16, 4, 1400, 600, 60, 0.99, 0.99, 70),
    "cifar10": Preset("vit_small_patch2_32", 32, 4, 1, *IMAGENET, *VIT_32),
    "cifar100": Preset("vit_small_patch2_32", 32, 4, 1, (129.3 / 255, 124.1 / 255, 112.4 / 255),
                       (68.2 / 255, 65.4 / 255, 70.4 / 255), *VIT_32),
    "svhn": Preset("vit_small_patch2_32", 32, 4, 0, (0.438, 0.444, 0.473), (0.1751, 0.1771, 0.1744), *VIT_32),  # C6
    "eurosat": Preset("vit_small_patch2_32", 32, 4, 2, (0.5,) * 3, (0.5,) * 3, "adamw", 5e-5, 5e-4, 1.0, *VIT_32[4:]),
    "stl10": Preset("vit_small_patch16_224", 96, 12, 1, (112.4 / 255, 109.1 / 255, 98.6 / 255),
                    (68.4 / 255, 66.6 / 255, 68.5 / 255), *VIT_224),
    "flowers102": Preset("vit_small_patch16_224", 224, 0, 1, *IMAGENET, *VIT_224),
    "resisc45": Preset("vit_small_patch16_224", 224, 0, 1, *IMAGENET, *VIT_224),
    "food101": Preset("efficientnet_b0", 224, 0, 1, *IMAGENET,
                      "adamw", 3e-4, 5e-4, 1.0, 16, 3, 102_400, 25_600, 2_560, 0.999, 0.999, 1_024),
    "ag_news": Preset(  # texts: ZM config/usb_nlp_paper
        "bert-base-uncased", 512, 0, False, (), (), "adamw", 5e-5, 1e-4, 0.65, 4, 1, 102_400, 102_400, 5120, 0, 0.999,
        2048),
}
PRESETS["yahoo_answers"] = PRESETS["ag_news"]._replace(lr=1e-4)
PRESETS["amazon_review"] = PRESETS["ag_news"]._replace(lr=1e-5, layer_decay=0.75)
PRESETS["text"] = PRESETS["ag_news"]._replace(  # files of your own
    batch_size=8, uratio=2, num_steps=2000, num_steps_stage1=1000, warmup_steps=100, marginal_decay=0.99,
    eval_every=100)
# fmt: on


def preset_of(dataset: str, backbone: str | None = None) -> Preset:
    """The row of PRESETS for a data set; with the WRN in place of a ViT, its classic recipe.

    A file of texts has the row "text". A folder of pictures has flowers102's row, and cifar10's with the
    WRN where their median side is at most 64 pixels. Raises UserError for anything else."""
    if dataset.endswith((".csv", ".jsonl")):
        return PRESETS["text"]
    if (dataset not in PRESETS or dataset == "text") and not Path(dataset).is_dir():
        names = ", ".join(name for name in PRESETS if name != "text")
        raise UserError(
            f"--dataset {dataset}: expected one of {names}, a folder with pictures in train/<class>/, or a file of "
            "texts ending in .csv or .jsonl"
        )
    small = dataset not in PRESETS and median_side(Path(dataset)) <= 64
    preset = PRESETS.get(dataset) or PRESETS["cifar10" if small else "flowers102"]
    if preset.backbone.startswith("vit") and (backbone or ("wrn_28_2" if small else "")) == "wrn_28_2":
        return preset._replace(**CLASSIC | ({"weight_decay": 1e-3} if dataset == "cifar100" else {}))
    return preset


def fill_from_preset(given: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """The values to put where the user gave none: every None in `given` that the preset knows.

    A user who sets only --num-steps gets stage 1 shortened or lengthened by the same factor."""
    row = preset._asdict()
    if given.get("num_steps") is not None:
        factor = given["num_steps"] / preset.num_steps
        row["num_steps_stage1"] = max(1, round(preset.num_steps_stage1 * factor))
        row["warmup_steps"] = round(preset.warmup_steps * factor)
        row["eval_every"] = max(1, round(preset.eval_every * factor))
    return {key: row[key] for key, value in given.items() if value is None and key in row}


# ---------------------------------------------------------------------------- randomness, device, processes
# Under torchrun every process computes its rows of the same batch, and everything else alike. Without it
# PROCESSES is 1 and nothing touches torch.distributed.

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK, PROCESSES = (int(os.environ[name]) if LAUNCHED else alone for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))


def seed_step(seed: int, stage: int | str, step: int) -> None:
    """Make every random number of one step a pure function of (seed, stage, step).

    Seeds torch's global generators (all devices), which views, dropout and stochastic depth draw
    from: that is why a resumed run needs no generator state to go on bit for bit."""
    # where there is no accelerator torch.manual_seed would note where it was called from, for later
    manual_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    manual_seed(seed_of(seed, stage, step))


def seed_of(*key: Any) -> int:
    """A seed of 63 bits for each key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, number: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "order", number)))


def batch_at(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Positions [batch] int64 in range(n): the step's slice of endless seeded permutations.  # C1

    Every example comes once a pass, also where a batch is larger than the set (10 labels). `batch` rows
    are each process's own part of a step."""
    first = (step * PROCESSES + RANK) * batch
    last = first + batch - 1
    order = [_permutation(n, seed, number) for number in range(first // n, last // n + 1)]
    return torch.cat(order)[first % n :][:batch]


def uniform(n: int, *shape: int) -> Tensor:
    """Random numbers [n, *shape] in [0, 1) for a process's rows, as one process would draw them for all rows."""
    return torch.rand(PROCESSES * n, *shape)[RANK * n :][:n]


class MeanOverProcesses(torch.autograd.Function):
    """The mean over processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total / PROCESSES

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return MeanOverProcesses.apply(grad)


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of x over all processes, with its gradient; x itself where there is one."""
    return x if PROCESSES == 1 else MeanOverProcesses.apply(x)


def agreed(flag: bool) -> bool:
    """Whether `flag` holds in any process, which all of them learn at once."""
    return bool(mean_over_processes(torch.tensor(float(flag))))


def first_process_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """The others wait until process 0 has been through `function`, and find the files it made."""

    @wraps(function)
    def waiting(*args: Any, **options: Any) -> Any:
        if RANK:
            agreed(True)
        try:
            return function(*args, **options)
        finally:
            if not RANK:
                agreed(True)

    return waiting


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the rows of all processes, on every device; torch's own needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = mean_over_processes(x.float().mean(dim=(0, 2, 3)))
        centered = x.float() - mean[:, None, None]
        var = mean_over_processes(centered.square().mean(dim=(0, 2, 3)))
        n = PROCESSES * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (var + self.eps).rsqrt() * self.weight
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def data_parallel(student: nn.Module) -> nn.Module:
    """What the training loop calls: the student itself; under torchrun wrapped so that gradients are the
    mean over processes and batch statistics those of the joint batch.

    Dropout masks repeat in every process: each seeds its generator alike, for the views' sake."""
    if PROCESSES == 1:
        return student
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm  # weights and optimizer stay what they are
    return nn.parallel.DistributedDataParallel(student, static_graph=True)  # a model may have idle weights


def setup_device(device: str, amp: str, backbone: str) -> tuple[torch.device, torch.dtype | None]:
    """(device, autocast dtype or None) for --device auto|cpu|cuda|mps and --amp auto|bf16|fp16|off.

    auto takes the best device there is, and bfloat16 where it is native and pays: on CUDA from
    Ampere on; on a CPU with AVX512-BF16 but for EfficientNet, which is slower so, and the small CNN, whose
    results should not depend on the machine."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU; use --device cpu or auto")
    if device == "cuda":
        if PROCESSES > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cudnn.benchmark = True  # shapes are constant; resume is bit-exact on CPUs only
        torch.backends.cuda.matmul.allow_tf32 = True
    if amp == "fp16" and device == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    if amp == "auto":
        cpu_bf16 = backbone not in ("cnn", "efficientnet_b0") and torch.cpu._is_avx512_bf16_supported()
        cuda_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if cuda_bf16 or (device == "cpu" and cpu_bf16) else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.device(device), dtype


def check_arguments(given: dict[str, Any]) -> None:
    """Raise UserError for a number out of its range; `given` maps argument names to values."""
    ranges = {  # (lowest, highest, both allowed themselves): names
        (1, math.inf): "num_steps num_steps_stage1 batch_size uratio log_every eval_every",
        (0, math.inf): "warmup_steps lr weight_decay lambda_u lambda_p sce_alpha sce_beta",
        (0, 1): "tau tau_select tau_inner marginal_decay",
        (1e-6, 1): "layer_decay", (0, 0.999999): "ema_decay", (0, 2**32 - 1): "seed",
    }  # fmt: skip
    for (low, high), names in ranges.items():
        for name in names.split():
            value = given.get(name, low)
            if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
                wanted = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a number {wanted}")
    if given["batch_size"] % PROCESSES:
        raise UserError(f"--batch-size {given['batch_size']}: expected a multiple of {PROCESSES}, the processes")
    prior = given.get("prior", "labeled")
    if prior not in ("labeled", "teacher") and not Path(prior).is_file():  # before a teacher is put to work
        raise UserError(f"--prior {prior}: no such file; {PRIORS.format('cat')}")


# ---------------------------------------------------------------------------- data


@dataclass
class Split:
    """Examples of one part: x uint8 [N, C, H, W] (maybe a memory map), y int64 [N], -1 = unknown.

    Decoded pictures also keep their files and the hashes of their pixels before any resizing."""

    x: np.ndarray
    y: np.ndarray
    files: list[str] | None = None
    keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def hashes(self) -> list[bytes]:
        """One content hash an example; equal images have equal hashes."""
        if self.keys is not None:
            return [bytes.fromhex(key) for key in self.keys]
        return [content_hash(row.tobytes()) for row in self.x]

    def take(self, idx: np.ndarray) -> Split:
        """The examples at positions idx."""
        return Split(self.x[idx], self.y[idx])


@dataclass
class TextSplit:
    """Examples of one part: texts; aug, two lists of back-translations or None; y int64 [N], -1 = unknown."""

    texts: list[str]
    aug: list[list[str]] | None
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def hashes(self) -> list[bytes]:
        """One content hash an example; equal texts have equal hashes."""
        return [content_hash(text.encode()) for text in self.texts]

    def take(self, idx: np.ndarray) -> TextSplit:
        """The examples at positions idx."""
        aug = self.aug and [[column[i] for i in idx] for column in self.aug]
        return TextSplit([self.texts[i] for i in idx], aug, self.y[idx])


def content_hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()


@dataclass
class Data:
    """A data set. `train` holds labeled and unlabeled examples; its y beyond the drawn labels is for
    monitoring only. `test` is None where the user has no test part."""

    name: str
    classes: list[str]
    train: Split | TextSplit
    test: Split | TextSplit | None

    def part(self, split: str) -> Split | TextSplit:
        part = self.train if split == "train" else self.test
        if part is None:
            raise UserError(f"{self.name} has no {split} part")
        return part


@first_process_first
def load_data(dataset: str, data_dir: str, test_file: str | None = None) -> Data:
    """Load a data set by name, fetching it into `data_dir` where it is not found on this machine, or a file of texts.

    Raises UserError with the address and the place for a manual copy when it cannot be fetched."""
    preset = preset_of(dataset)
    if preset is PRESETS["text"]:
        return load_text_file(dataset, test_file)
    if test_file:
        raise UserError(f"--test-file {test_file}: {dataset} has a test part of its own; leave the flag out")
    if dataset in TEXT_SETS:
        return load_text_set(dataset, data_dir)
    if dataset not in PRESETS:
        return load_folder(Path(dataset), data_dir, preset)
    if dataset == "digits":
        return load_digits()
    if dataset == "fashion_mnist":
        return load_fashion_mnist(data_dir)
    sources = fetch_source(dataset, data_dir)
    if dataset in ("cifar10", "cifar100", "svhn", "stl10"):
        return load_arrays(dataset, data_dir, sources)
    classes, train, test = list_pictures(dataset, data_dir)
    store = f"{data_dir}/decoded/{dataset}"
    return Data(dataset, classes, decode(train, store, preset, "train"), decode(test, store, preset, "test"))


def load_digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8, stored as round(value * 255 / 16).

    No split is published: a fixed permutation, the same for every run, keeps 500 of them for test."""
    from sklearn.datasets import load_digits as embedded_digits

    digits = embedded_digits()
    x = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[500:], order[:500]
    y = digits.target.astype(np.int64)
    return Data("digits", [str(d) for d in range(10)], Split(x[train], y[train]), Split(x[test], y[test]))


DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"  # package dataset-fashion-mnist
FASHION_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot".split(", ")


def load_fashion_mnist(data_dir: str) -> Data:
    """Fashion-MNIST, 60,000 + 10,000 images of 28x28, from Debian's folder or the publisher's files."""
    files = [Path(DEBIAN_FASHION) / Path(url).name for url, *_ in SOURCES["fashion_mnist"]]
    if not all(file.exists() for file in files):
        files = fetch_source("fashion_mnist", data_dir)
    read = [np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files]
    pairs = (read[:2], read[2:])  # images behind a header of 16 bytes, labels behind one of 8
    parts = [Split(x[16:].reshape(-1, 1, 28, 28), y[8:].astype(np.int64)) for x, y in pairs]
    return Data("fashion_mnist", FASHION_CLASSES, *parts)


# What each data set is made of: address, md5, folder below --data-dir, what an archive unpacks to. The places are those
# of torchvision's classes, so that their downloads are found. Sources: torchvision 0.29 datasets; torchgeo resisc45.
# fmt: off
OXFORD, HOUSES = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "http://ufldl.stanford.edu/housenumbers/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
RESISC = "https://hf.co/datasets/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e/"
SOURCES = {
    "fashion_mnist": [
        (FASHION + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "fashion_mnist", ""),
        (FASHION + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", "fashion_mnist", ""),
        (FASHION + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", "fashion_mnist", ""),
        (FASHION + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", "fashion_mnist", "")],
    "cifar10": [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                 "c58f30108f718f92721af3b95e74349a", "", "cifar-10-batches-py")],
    "cifar100": [("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                  "eb9058c3a382ffc7106e4002c42a8d85", "", "cifar-100-python")],
    "svhn": [(HOUSES + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "", ""),
             (HOUSES + "extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", "", ""),
             (HOUSES + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "", "")],
    "stl10": [("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
               "91f7769df0f17e558f3565bffb0c7dfb", "", "stl10_binary")],
    "food101": [("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                 "85eeb15f3717b99a5da872d97d918f87", "", "food-101")],
    "flowers102": [(OXFORD + "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "flowers-102", "jpg"),
                   (OXFORD + "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "flowers-102", ""),
                   (OXFORD + "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102", "")],
    "eurosat": [("https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
                 "EuroSAT.zip", "c8fa014336c82ac7804f0398fcb19387", "eurosat", "2750")],
    "resisc45": [(RESISC + "NWPU-RESISC45.zip", "75206b2e16446591afa88e2628744886", "resisc45", "NWPU-RESISC45"),
                 (RESISC + "resisc45-test.txt", "3dda9e4988b47eb1de9f07993653eb08", "resisc45", "")],
}
EUROSAT_CLASSES = (  # of its folders AnnualCrop ... SeaLake, as BatsResearch/menghini-neurips23-code words them
    "annual crop land, forest, brushland or shrubland, highway or road, industrial buildings or commercial buildings, "
    "pasture land, permanent crop land, residential buildings or homes or apartments, river, lake or sea"
).split(", ")
# fmt: on


def fetch(url: str, path: Path, checksum: str | None = None) -> None:
    """Download `url` to `path` unless it is there; a partial or wrong file never gets that name.

    checksum: md5, or sha256 when 64 digits long; also of a file that was there. Raises UserError
    naming the address, the reason and where to put a manual copy."""

    def is_wrong(file: Path) -> bool:
        with open(file, "rb") as content:
            kind = "sha256" if len(checksum or "") == 64 else "md5"
            return bool(checksum) and hashlib.file_digest(content, kind).hexdigest() != checksum

    if path.exists():
        if is_wrong(path):
            raise UserError(f"{path} is damaged or not the file of {url}; delete it and run again")
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "zeromatch"})
        with urllib.request.urlopen(request, timeout=20) as response, open(part, "wb") as file:
            size = response.length
            with tqdm.wrapattr(file, "write", total=size, desc=path.name, disable=None) as out:
                shutil.copyfileobj(response, out, 2**20)
        if size is not None and part.stat().st_size < size:
            raise OSError(f"ended after {part.stat().st_size} of {size} bytes")
        if is_wrong(part):
            raise OSError("its checksum is not the published one")
        part.rename(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"could not fetch {url} ({error}); put the file at {path} by hand and run again") from None
    finally:
        part.unlink(missing_ok=True)


TEXT_URL = "https://s3.amazonaws.com/fast-ai-nlp/"
TEXT_SETS = {  # archive, its sha256, classes, rows a class of train, dev and test, how its CSV writes a newline
    "ag_news": (
        "ag_news_csv.tgz", "9a8c300eabb45750237fcc669f61cb8a3448f3ef6f6098e1ce340e444f6872be",
        "world, sports, business, technology", (25000, 2500, 1900), "\\",
    ),
    "yahoo_answers": (
        "yahoo_answers_csv.tgz", "2d4277855faf8b35259009425fa8f7fe1888b5644b47165508942d000f4c96ae",
        "society, science, health, education, computer, sports, business, entertainment, relationship, politics",
        (50000, 5000, 6000), "\\n",
    ),
    "amazon_review": (
        "amazon_review_full_csv.tgz", "4af62eeee139d0142e0747340b68646d23483d9475c33ea0641ee9175b423443",
        "very negative, negative, neutral, positive, very positive", (50000, 5000, 13000), "\\n",
    ),
}  # fmt: skip


def load_text_set(name: str, data_dir: str) -> Data:
    """A published set of texts from train.json and test.json in data_dir/name, {id: {ori, label, aug_0, aug_1}}.

    USB's files are taken where the user has put them there; otherwise they are made from the archive,
    once, without back-translations. Test texts that also stand in the training part are left out."""
    archive, sha256, classes, sizes, newline = TEXT_SETS[name]
    folder, classes = Path(data_dir) / name, classes.split(", ")
    if not all((folder / f"{part}.json").exists() for part in ("train", "test")):
        fetch(TEXT_URL + archive, folder / archive, sha256)
        split_archive(folder / archive, len(classes), sizes, newline)
    numbers = [str(label) for label in range(len(classes))]
    train, test = (read_texts(folder / f"{part}.json", numbers)[0] for part in ("train", "test"))
    pool = set(train.texts)
    unseen = np.flatnonzero([text not in pool for text in test.texts])
    if len(unseen) < len(test):
        print(f"{name}: {len(test) - len(unseen)} test texts that also stand in the training part are left out")
    return Data(name, classes, train, test.take(unseen))


def split_archive(archive: Path, num_classes: int, sizes: tuple[int, int, int], newline: str) -> None:
    """Write test.json, train.json and dev.json beside the archive: a fixed draw of `sizes` rows a class.  # T3

    dev is kept out of the pool and never read here. Each CSV is read twice: only drawn rows are held."""
    rng, (train, dev, test), test_texts = np.random.RandomState(0), sizes, set()
    train_parts = {"train": slice(train), "dev": slice(train, train + dev)}
    for member, parts in (("test", {"test": slice(test)}), ("train", train_parts)):
        rows = archive_rows(archive, member, newline)
        y = np.array([-1 if text in test_texts else label for label, text in rows])
        orders = [rng.permutation(np.flatnonzero(y == k)) for k in range(num_classes)]
        part_of = {row: part for part, cut in parts.items() for order in orders for row in order[cut].tolist()}
        drawn: dict[str, dict[int, Any]] = {part: {} for part in parts}
        for row, (label, text) in enumerate(archive_rows(archive, member, newline)):
            if row in part_of:
                drawn[part_of[row]][row] = {"ori": text[-1024:] if member == "train" else text, "label": label}
        if member == "test":
            test_texts = {row["ori"] for row in drawn["test"].values()}
        for part, content in drawn.items():
            write_atomically(archive.with_name(f"{part}.json"), json.dumps(content).encode())


def archive_rows(archive: Path, member: str, newline: str) -> Iterator[tuple[int, str]]:
    """(label from 0, text) of every row of one CSV in an archive; text is title and body.  # T2"""
    csv.field_size_limit(2**31 - 1)
    try:
        with tarfile.open(archive) as tar:
            name = next(name for name in tar.getnames() if name.endswith(f"/{member}.csv"))
            file = io.TextIOWrapper(tar.extractfile(name), "utf-8", newline="")
            for row in tqdm(csv.reader(file), f"reading {name}", disable=None):
                yield int(row[0]) - 1, clean(" ".join(row[1:3]).replace(newline, "\n"))
    except (OSError, EOFError, LookupError, ValueError, StopIteration, tarfile.TarError, csv.Error) as error:
        raise UserError(f"{archive}: damaged or of another layout ({error!r}); delete it and run again") from None


def clean(value: Any) -> str:
    """A field as text without outer blanks, "" for None; half surrogate pairs, which no UTF-8 has, become "?"."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode().strip()


def read_texts(path: Path, classes: list[str] | None = None) -> tuple[TextSplit, list[str]]:
    """(texts, class names) of CSV with a header or JSON Lines (text, label), or of USB's JSON ({id: {ori, label}}).

    aug_0 and aug_1 are back-translations, where they stand; an empty label is an unknown one; rows
    without text are left out. Classes are the labels in sorted order, numbers by value.
    Raises UserError for another layout and for a label that is not in given `classes`."""
    csv.field_size_limit(2**31 - 1)
    rows: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".json":
                found = json.load(file).values()
            elif path.suffix == ".jsonl":
                found = (json.loads(line) for line in file if line.strip())
            else:
                found = csv.DictReader(file, strict=True)
            for row in found:
                if not isinstance(row, dict) or not {"text", "ori"} & set(row) or None in row:
                    raise ValueError("expected fields text and label, in CSV with quotes around a text that has commas")
                rows.append({key: clean(value) for key, value in row.items()})
    except (OSError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: could not be read at row {len(rows) + 1}: {error}") from None
    kept = [row for row in rows if row.get("text") or row.get("ori")]
    if len(kept) < len(rows):
        print(f"{path}: {len(rows) - len(kept)} rows without text are left out")
    texts, labels = [row.get("text") or row["ori"] for row in kept], [row.get("label", "") for row in kept]
    names = sorted(set(labels) - {""}, key=lambda c: (0, float(c), c) if c.isdecimal() else (1, 0, c))
    if classes is not None and (not kept or set(labels) - set(classes)):
        raise UserError(f"{path}: has labels {sorted(set(labels))}, expected only those of the classes: {classes}")
    number = {name: label for label, name in enumerate(classes or names)} | {"": -1}
    keys = [key for key in ("aug_0", "aug_1") if any(row.get(key) for row in kept)]
    aug = [[row.get(key) or text for row, text in zip(kept, texts, strict=True)] for key in keys]
    return TextSplit(texts, aug or None, np.array([number[label] for label in labels], np.int64)), classes or names


def load_text_file(path: str, test_file: str | None) -> Data:
    """Texts of the user's own (`read_texts`).

    Without a test file a fifth of the labeled rows of every class is held out, if every class has
    ten (of texts that occur once); the draw is fixed. Raises UserError when a test text is in the pool."""
    (train, classes), test = read_texts(Path(path)), None
    if test_file:
        test, _ = read_texts(Path(test_file), classes)
        pool = set(train.texts)
        inside = [row for row, text in enumerate(test.texts, 1) if text in pool]
        if inside:
            raise UserError(
                f"{test_file}: {len(inside)} of its {len(test)} texts also stand in {path} (first: row {inside[0]}), "
                "and no test text may be in the unlabeled pool; delete them from one of the two files"
            )
    else:
        times = Counter(train.texts)
        once = np.array([times[text] == 1 for text in train.texts], bool)
        rows_of = [np.flatnonzero((train.y == label) & once) for label in range(len(classes))]
        if min(map(len, rows_of), default=0) >= 10:
            rng = np.random.RandomState(0)
            held = np.concatenate([rng.permutation(rows)[: len(rows) // 5] for rows in rows_of])
            train, test = train.take(np.setdiff1d(np.arange(len(train)), held)), train.take(np.sort(held))
    return Data(Path(path).stem, classes, train, test)


def fetch_source(dataset: str, data_dir: str) -> list[Path]:
    """Fetch and unpack SOURCES[dataset]; returns all its files. A folder appears only when it is whole."""
    from torchvision.datasets.utils import extract_archive

    files = []
    for url, checksum, below, content in SOURCES[dataset]:
        folder = Path(data_dir) / below
        archive, unpacked = folder / url.rsplit("/", 1)[1], folder / content
        if not content or not unpacked.exists():
            fetch(url, archive, checksum)
        if content and not unpacked.exists():
            print(f"unpacking {archive}", flush=True)
            try:
                with tempfile.TemporaryDirectory(dir=folder) as part:
                    extract_archive(str(archive), part)
                    os.rename(Path(part) / content, unpacked)
            except OSError as error:
                raise UserError(f"could not unpack {content} from {archive} ({error.strerror}); make room") from None
        files += files_below(unpacked) if content else [archive]
    return files


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders, by name; what is hidden is left out, as `glob` does."""
    found = glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True)
    return sorted(Path(name) for name in found if not os.path.isdir(name))


def load_arrays(dataset: str, data_dir: str, sources: list[Path]) -> Data:
    """CIFAR-10, CIFAR-100 (fine labels), SVHN (training part: train and extra, 604,388) and STL-10
    (training part: 5,000 labeled and 100,000 unlabeled), as torchvision reads them."""
    from torchvision import datasets

    kind = getattr(datasets, dataset.upper())
    options = {"svhn": [("train", "extra"), ("test",)], "stl10": [("train+unlabeled",), ("test",)]}

    def make(parts: tuple, file: Path) -> dict[str, Any]:
        try:
            read = [kind(data_dir, part) for part in parts]
        except RuntimeError:
            raise UserError(f"{data_dir}: unpacked files of {dataset} are damaged; delete them and run again") from None
        x = np.concatenate([part.data for part in read])
        with open(file, "wb") as out:
            np.save(out, x.transpose(0, 3, 1, 2) if "cifar" in dataset else x)
        y = np.concatenate([getattr(part, "targets" if "cifar" in dataset else "labels") for part in read])
        names = getattr(read[0], "classes", list("0123456789"))
        return {"y": y.astype(int).tolist(), "classes": [name.replace("_", " ") for name in names]}

    splits = []
    for part, parts in zip(("train", "test"), options.get(dataset, [(True,), (False,)]), strict=True):
        x, facts = stored(Path(data_dir) / f"decoded/{dataset}-{part}.npy", sources, "", partial(make, parts))
        splits.append(Split(x, np.array(facts["y"])))
    return Data(dataset, facts["classes"], *splits)


Pictures = list[tuple[Path, int]]  # (file, label or -1)


def list_pictures(dataset: str, data_dir: str) -> tuple[list[str], Pictures, Pictures]:
    """(class names in label order, training part, test part) of a published set of picture files.

    food101: 75,750 + 25,250. flowers102: train and val, 2,040 + 6,149. resisc45: all but torchgeo's
    test list, 25,200 + 6,300 (ZM's lists come from elsewhere). eurosat has no published split: the
    first 80 % of every class by name, as in USB, 21,600 + 5,400."""
    from torchvision import datasets

    if dataset == "food101":
        read = [datasets.Food101(data_dir, part) for part in ("train", "test")]
    elif dataset == "flowers102":
        read = [datasets.Flowers102(data_dir, part) for part in ("train", "val", "test")]
    else:
        folder = Path(data_dir) / ("eurosat/2750" if dataset == "eurosat" else "resisc45/NWPU-RESISC45")
        read = [datasets.ImageFolder(folder)]
    classes = EUROSAT_CLASSES if dataset == "eurosat" else [name.replace("_", " ") for name in read[0].classes]
    if len(read) > 1:
        parts = [list(zip(part._image_files, part._labels, strict=True)) for part in read]
        return classes, sum(parts[:-1], []), parts[-1]
    samples, y = [(Path(file), label) for file, label in read[0].samples], np.array(read[0].targets)
    if dataset == "eurosat":
        rank = np.arange(len(y)) - np.searchsorted(y, y)  # y is sorted
        is_test = rank >= np.bincount(y)[y] * 4 // 5
    else:
        listed = set((folder.parent / "resisc45-test.txt").read_text().split())
        is_test = np.array([file.name in listed for file, _ in samples])
    return classes, *([samples[i] for i in np.flatnonzero(is_test == test)] for test in (False, True))


def load_folder(folder: Path, data_dir: str, preset: Preset) -> Data:
    """Own pictures: train/<class>/, and where they exist unlabeled/ (also nested) and test/<class>/.

    Without test/, a fifth of every class is held out when each has at least 10 labeled pictures;
    with fewer there is no test part. Raises UserError for another structure, an unreadable labeled
    picture, and test pictures that are also in the training part."""
    name, parts = folder.resolve().name, (folder / "train", folder / "test")
    labels, test_labels = (sorted(at.name for at in part.glob("[!.]*") if at.is_dir()) for part in parts)
    files = {label: files_below(folder / "train" / label) for label in labels}
    wrong = [label for label in labels if not files[label]] + [label for label in test_labels if label not in labels]
    if len(files) < 2 or wrong:
        raise UserError(
            f"--dataset {folder}: expected at least two folders train/<class>/ with pictures, and no other classes "
            f"in test/; found {len(files)}" + (f", wrong: {', '.join(wrong)}" if wrong else "")
        )
    fewest, held_out = min(map(len, files.values())), not test_labels
    train, test, said = [], [], "test/"
    for y, label in enumerate(files):
        order = np.random.RandomState(0).permutation(len(files[label]))
        cut = set(order[: len(order) // 5]) if held_out and fewest >= 10 else set()
        train += [(file, y) for i, file in enumerate(files[label]) if i not in cut]
        test += [(file, y) for i, file in enumerate(files[label]) if i in cut]
        test += [(file, y) for file in files_below(folder / "test" / label)]
    if held_out:
        said = f"a fifth of train/ ({len(test)} pictures)" if test else "nothing, as a class has under 10 pictures"
    print(f"{name}: tested on {said}; seen at {preset.size} pixels, by default by {preset.backbone}")
    train += [(file, -1) for file in files_below(folder / "unlabeled")]
    store = f"{data_dir}/decoded/{name}-{hashlib.md5(str(folder.resolve()).encode()).hexdigest()[:8]}"
    test_part = decode(test, store, preset, "test") if test else None
    train_part = decode(train, store, preset, "train", test_part.keys if test else [], held_out)
    return Data(name, list(files), train_part, test_part)


def median_side(folder: Path) -> float:
    """The median of the pictures' shorter sides in pixels, of about a hundred in train/."""
    from PIL import Image

    sides, files = [], files_below(folder / "train")
    for file in files[:: len(files) // 100 + 1]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except OSError:
            continue  # decoding will name it
    return float(np.median(sides or [256]))


def stored(
    path: Path, sources: list[Path], recipe: Any, make: Callable[[Path], dict[str, Any]]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(memory map of `path`, facts): an array `make(file) -> facts` writes once, and again when the
    recipe or a source's name, size or time has changed. It gets its name when it is whole."""
    stats = [(source.name, source.stat().st_size, source.stat().st_mtime_ns) for source in sources]
    key = hashlib.blake2b(json.dumps([recipe, stats]).encode(), digest_size=16).hexdigest()
    note, part = path.with_suffix(".json"), path.with_name(f"{path.name}.{os.getpid()}.part")
    facts = json.loads(note.read_text()) if note.exists() and path.exists() else {}
    if facts.get("key") != key:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = make(part) | {"key": key}
            note.unlink(missing_ok=True)
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"could not write {path} ({error}); make room or give another --data-dir") from None
        finally:
            part.unlink(missing_ok=True)
        write_atomically(note, json.dumps(facts).encode())
    return np.load(path, mmap_mode="r"), facts


def decode(
    pictures: Pictures, store: str, preset: Preset, part: str, test_keys: Any = (), held_out: bool = False
) -> Split:
    """All pictures of a part as one stored array, decoded by all cores.

    train: squashed to a square. test: short side to the same length, center crop. Raises UserError
    for unreadable labeled pictures, and for training pictures equal to one of the test part."""
    side = preset.size if preset.pad else round(preset.size / 0.875)  # ZM crop_ratio
    shape = (len(pictures), 3, *[side if part == "train" else preset.size] * 2)
    known = set(test_keys)

    def make(to: Path) -> dict[str, Any]:
        need, free = math.prod(shape), shutil.disk_usage(to.parent).free
        if need > free:  # a memory map would end the process instead
            raise OSError(f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        x = np.lib.format.open_memmap(to, mode="w+", dtype=np.uint8, shape=shape)
        with ThreadPool(os.cpu_count()) as pool:  # Pillow's decoders work outside the interpreter's lock
            work = pool.imap(lambda i: decode_one(pictures[i][0], x[i], side, part == "train"), range(len(x)))
            keys = list(tqdm(work, f"decoding {part} pictures", len(x), disable=None))
        bad = [i for i, key in enumerate(keys) if key is None]
        refused = [str(pictures[i][0]) for i in bad if pictures[i][1] >= 0]
        doubles = [i for i, key in enumerate(keys) if key in known]
        if refused:
            raise UserError(f"{len(refused)} labeled pictures cannot be read: {', '.join(refused[:5])}; remove them")
        if doubles and not held_out:
            where = f"{len(doubles)} pictures of the training part are also in test/, e.g. {pictures[doubles[0]][0]}"
            raise UserError(f"{where}; remove them from one of the two")
        if bad or doubles:
            said = f"left out: {len(doubles)} pictures equal to a held-out one, {len(bad)} unreadable ones"
            print(said, *[pictures[i][0] for i in bad], sep="\n  ")
        keep = sorted({*range(len(x))} - {*bad, *doubles})
        for target, i in enumerate(keep):
            if target != i:
                x[target] = x[i]
        x.flush()
        return {"keep": keep, "keys": [keys[i] for i in keep]}

    recipe = [shape, [y for _, y in pictures], sorted(known)]
    x, facts = stored(Path(f"{store}-{part}-{side}.npy"), [file for file, _ in pictures], recipe, make)
    files, labels = zip(*[pictures[i] for i in facts["keep"]], strict=True)
    return Split(x[: len(labels)], np.array(labels), [str(file) for file in files], facts["keys"])


def decode_one(file: Path, out: np.ndarray, side: int, squash: bool) -> str | None:
    """Decode a picture to out [3, H, W]; returns the hash of its pixels, None where it is unreadable."""
    from torchvision.transforms import functional as geometry

    try:
        image = read_picture(file)
    except Exception:  # damaged files make Pillow raise errors of many kinds; the caller names the file
        return None
    fitted = geometry.resize(image, [side, side] if squash else [side])
    out[:] = np.asarray(geometry.center_crop(fitted, list(out.shape[1:]))).transpose(2, 0, 1)
    return content_hash(image.tobytes() + str(image.size).encode()).hex()


def read_picture(file: str | Path) -> Any:
    """Any picture as 8-bit RGB: turned as its EXIF data say, on white where it is transparent."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


MEASURED = {  # name in result.json: (name in metrics.jsonl, what it is)
    "test_acc": ("test/acc", "accuracy on test examples"),
    "agreement": ("train/agreement", "no test part, agreement with the teacher on training examples"),
    "labeled_acc": ("train/labeled_acc", "no test part, accuracy on the labeled training examples"),
}


def measured_part(data: Data, y_zs: np.ndarray | None = None) -> tuple[Split | TextSplit, str]:
    """(the part that is evaluated, what its figure is called, a key of MEASURED): the test part and its accuracy.

    Own data without one: 2,000 training examples, against the teacher's labels y_zs [N] where there are
    any, else the labeled ones against their labels; called what it is."""
    if data.test is not None:
        return data.test, "test_acc"
    labels, measured = (data.train.y, "labeled_acc") if y_zs is None else (y_zs, "agreement")
    known = np.flatnonzero(labels >= 0)  # pictures stand class by class
    shown = np.sort(np.random.RandomState(0).permutation(known)[:2000])
    part = data.train.take(shown)
    part.y = labels[shown]
    return part, measured


def wilson_interval(right: int, total: int) -> list[float]:
    """Ends of Wilson's 95 % interval of a share, percent."""
    from scipy.stats import binomtest

    return [100 * end for end in binomtest(right, total).proportion_ci(method="wilson")]


def share_right(right: int, total: int) -> str:
    """As in: 63.00 % (95 % interval 59.94 to 65.96) of 1000."""
    low, high = wilson_interval(right, total)
    return f"{100 * right / total:.2f} % (95 % interval {low:.2f} to {high:.2f}) of {total}"


def class_counts(y: np.ndarray, classes: list[str]) -> str:
    """How many labels each class has, most frequent first, of many classes the first and last ten; -1 is no class."""
    counts = np.bincount(y[y >= 0], minlength=len(classes))
    rows = [f"{classes[k]} {counts[k]}" for k in np.argsort(-counts, kind="stable")]
    return ", ".join(rows if len(rows) <= 20 else [*rows[:10], "...", *rows[-10:]])


def draw_labeled(y: np.ndarray, num_labels: int, num_classes: int, seed: int) -> np.ndarray:
    """Indices [num_labels] int64 of the labeled examples: num_labels / K of every class, seeded.

    0 stands for every example whose label is known. Raises UserError when K does not divide
    num_labels or a class has too few examples."""
    if num_classes < 2:
        raise UserError(f"the labels name {num_classes} classes; expected a few labeled rows of 2 or more")
    if num_labels == 0:
        return np.flatnonzero(y >= 0)
    if num_labels < 0 or num_labels % num_classes:
        near = [num_classes * k for k in (1, 2, 4)]
        raise UserError(
            f"--num-labels {num_labels}: expected a multiple of {num_classes} (classes), e.g. {near}, or 0: all labels"
        )
    each, rng = num_labels // num_classes, np.random.RandomState(seed)
    drawn = []
    for label in range(num_classes):
        members = np.flatnonzero(y == label)
        if len(members) < each:
            raise UserError(f"--num-labels {num_labels}: class {label} has {len(members)} examples, {each} wanted")
        drawn.append(rng.permutation(members)[:each])
    return np.concatenate(drawn)


PRIORS = 'expected labeled, teacher, or a JSON file {{"{}": 0.25, ...}} with a share or count of every class'


def class_shares(
    source: str, classes: list[str], y_zs: np.ndarray, y_lb: np.ndarray, device: torch.device
) -> Tensor | None:
    """Shares of the classes that pseudo-labels are aligned to, float32 [K], sum 1; "labeled": None, p_lb is.

    "teacher": p_k = (share of class k in the teacher's answers y_zs [N] + its share in the labels y_lb) / 2, the
    latter so that a class that the teacher takes for another is not lost; -1 in y_zs is no answer. Else the name
    of a JSON file, {class: share or count}. Raises UserError for a file that has not a positive one of each class."""
    if source == "labeled":
        return None
    if source == "teacher":
        counts = [np.bincount(y[y >= 0], minlength=len(classes)) for y in (y_zs, y_lb)]
        shares = torch.from_numpy(sum(count / max(1, count.sum()) for count in counts)).float()
        return (shares / shares.sum()).to(device)
    try:
        given = json.loads(Path(source).read_text(encoding="utf-8-sig"))
        counts = torch.tensor([float(given.pop(name, 0)) for name in classes])
        shares = counts / counts.sum()
        missing = [name for name, fine in zip(classes, (counts > 0) & (shares > 0), strict=True) if not fine]
        wrong = f"no positive number for {missing[0]!r}" if missing else f"unknown class {min(given)!r}" if given else ""
    except OSError as error:
        wrong = error.strerror
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        wrong = "not a JSON object of numbers"
    if wrong:
        raise UserError(f"--prior {source}: {wrong}; {PRIORS.format(classes[0])}")
    return shares.to(device)


# ---------------------------------------------------------------------------- views
# Every image has its own random parameters: one row of uniform numbers u. Views are pure functions
# of (images, u), the only randomness being the drawing of u, on the CPU, so that they are the same
# on every device. Images are uint8 [n, C, H, W] throughout, as Pillow's are; 0 is black.


def to_bytes(x: Tensor) -> Tensor:
    """Numbers in [0, 256) cut to integers; by way of int16, as the direct conversion is not vectorized on CPUs."""
    return x.to(torch.int16).to(torch.uint8)


def mirror(x: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """The images where `chosen` [n] is true, mirrored along dim, beside the others as they are."""
    both = torch.cat([x, x.flip(dim)])
    return both.index_select(0, torch.arange(len(x), device=x.device) + len(x) * chosen)


def crop_and_flip(x: Tensor, u: Tensor, size: int, pad: int, flip: int) -> Tensor:
    """Reflect `pad` pixels around the image, crop size x size at a random place, mirror half of them.

    u [n, 3] in [0, 1): row, column, mirror. [n, C, H, W] -> [n, C, size, size]."""
    if pad:
        x = torch.cat([x[..., 1 : pad + 1].flip(3), x, x[..., -pad - 1 : -1].flip(3)], dim=3)
    n, channels, height, width = x.shape
    top, left = (u[:, 0] * (height + 2 * pad - size + 1)).long() - pad, (u[:, 1] * (width - size + 1)).long()
    rows = (top[:, None, None] + torch.arange(size, device=x.device)).abs()  # [n, 1, size]; reflected at the first ...
    rows = (height - 1) - (height - 1 - rows).abs()  # ... and at the last row
    # all runs of `size` bytes in memory, one starting at each byte: a row of a crop is one of them
    runs = x.contiguous().view(-1).as_strided((x.numel() - size + 1, size), (1, 1))
    planes = torch.arange(n * channels, device=x.device).view(n, channels, 1) * height
    start = (planes + rows) * width + left[:, None, None]
    x = runs.index_select(0, start.flatten()).view(n, channels, size, size)
    if flip:
        x = mirror(x, u[:, 2] < 0.5, 3)
    return mirror(x, u[:, 2] * 2 % 1 < 0.5, 2) if flip == 2 else x


AREA_DRAWS = 2 * 10  # (area, proportion) of ten tries, torchvision's number


def random_resized_crop(x: Tensor, u: Tensor, u_area: Tensor, size: int, flip: int) -> Tensor:
    """A part of 0.08 to 1 of the area with sides 3:4 to 4:3, resized to size x size, half of them mirrored.

    u [n, 3] in [0, 1) on the CPU: row, column, mirror; u_area [n, AREA_DRAWS]; the first try that fits into
    the image counts, else the whole image. Source: torchvision transforms.RandomResizedCrop."""
    height, width = x.shape[2:]
    area, ratio = u_area.unflatten(1, (-1, 2)).unbind(dim=2)  # [n, 10]
    area, ratio = (0.08 + 0.92 * area) * height * width, (math.log(3 / 4) + 2 * math.log(4 / 3) * ratio).exp()
    sides = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=2)
    whole = torch.tensor([height, width])
    sides = torch.cat([sides, whole.expand(len(x), 1, 2)], dim=1)
    first = (sides <= whole).all(dim=2).float().argmax(dim=1)  # of equal ones argmax takes the first
    sides = sides[torch.arange(len(x)), first]  # [n, 2]
    corners = (u[:, :2] * (whole - sides + 1)).floor()
    boxes = torch.cat([corners, corners + sides], dim=1).long().tolist()
    parts = [resize(x[i, None, :, top:end, left:right], size) for i, (top, left, end, right) in enumerate(boxes)]
    x = torch.cat(parts)
    return mirror(x, (u[:, 2] < 0.5).to(x.device), 3) if flip else x


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear with triangles as wide as the reduction, as Pillow's. GPUs have no such thing for bytes."""
    options = {"size": (size, size), "mode": "bilinear", "antialias": True}
    return F.interpolate(x, **options) if x.is_cpu else to_bytes(F.interpolate(x.float(), **options) + 0.5)


def luminance(x: Tensor) -> Tensor:
    """Pillow's gray value (R*19595 + G*38470 + B*7471 + 2^15) / 2^16, [n, C, H, W] -> [n, 1, H, W] uint8."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.int().unbind(dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) >> 16).to(torch.uint8)[:, None]


def blend(base: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """base + v * (x - base), cut to an integer as Pillow does; v [n] in [0, 1]."""
    base = base.float()
    return to_bytes((x.float() - base).mul_(v[:, None, None, None]).add_(base))


def auto_contrast(x: Tensor) -> Tensor:
    """Stretch every channel to 0 ... 255; a flat channel stays."""
    low, high = (extreme(dim=(2, 3), keepdim=True).float() for extreme in (x.amin, x.amax))  # [n, C, 1, 1]
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1)
    low = torch.where(high > low, low, 0)
    return to_bytes((x.float() - low).mul_(scale).add_(1e-4).clamp_(0, 255))


def equalize(x: Tensor) -> Tensor:
    """Level every channel's histogram by Pillow's integer rule; a channel of one value stays."""
    if x.shape[2] * x.shape[3] < 256:  # the integer step below is 0 then, which is no change
        return x
    flat = x.flatten(0, 1).flatten(1).long()  # [n * C, H * W]
    count = torch.zeros(len(flat), 256, device=x.device).scatter_add_(1, flat, flat.new_ones(1).float().expand_as(flat))
    step = ((flat.shape[1] - count.gather(1, flat.amax(dim=1, keepdim=True))) / 255).int()
    below = count.cumsum(dim=1) - count
    table = to_bytes(((below + step // 2) / step.clamp(min=1)).clamp_(max=255))  # such quotients cut exactly
    table = torch.where(step > 0, table, torch.arange(256, device=x.device, dtype=torch.uint8))
    return table.gather(1, flat).view_as(x)


def smooth(x: Tensor) -> Tensor:
    """Filter by [1 1 1; 1 5 1; 1 1 1] / 13, rounded; the border stays as it is."""
    out, wide = x.clone(), x.int()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    out[:, :, 1:-1, 1:-1] = ((total + 6) * 20165 >> 18).to(torch.uint8)  # (total + 6) // 13 of sums to 13 * 255
    return out


def mean_gray(x: Tensor) -> Tensor:
    """Every image's mean luminance, rounded. [n, C, H, W] -> [n, 1, 1, 1]."""
    return (luminance(x).float().mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()


def posterize(x: Tensor, v: Tensor) -> Tensor:
    """Keep the int(v) highest bits."""
    low = 8 - v.long()
    return x & (255 >> low << low).to(torch.uint8)[:, None, None, None]


def solarize(x: Tensor, v: Tensor) -> Tensor:
    """255 - x where x >= v, without a comparison, which is slow for bytes: the sign of x - ceil(v) fills the bits."""
    below = (x.short() - v.ceil().short()[:, None, None, None] >> 15).to(torch.uint8)  # 255 or 0
    return x ^ ~below


def affine(x: Tensor, coefficients: Tensor) -> Tensor:
    """Pillow's AFFINE with nearest neighbor and black fill: out(x, y) = in(ax + by + c, dx + ey + f).

    Coordinates are of pixel centers; coefficients [n, 6] in Pillow's order, a to f."""
    channels, height, width = x.shape[1:]
    i, j = torch.arange(0.5, height, device=x.device)[:, None], torch.arange(0.5, width, device=x.device)
    of_x, of_y, shift = coefficients.view(len(x), 2, 3, 1, 1).unbind(dim=2)
    place = of_x * j + of_y * i + shift  # [n, 2, H, W]: column and row, with fractions
    whole = place.int()
    # The sign bit of any of the four is set outside the image: -1 there, 0 inside. Comparisons are slow on CPUs.
    last = torch.tensor([width - 1, height - 1], dtype=torch.int32).to(x.device)[:, None, None]
    beyond = place.view(torch.int32) | (last - whole)
    inside = ~((beyond[:, 0] | beyond[:, 1]) >> 31)  # [n, H, W]
    at = ((whole[:, 1] * width + whole[:, 0]) & inside).long().flatten(1)[:, None].expand(-1, channels, -1)
    return x.flatten(2).gather(2, at).view_as(x) & inside.to(torch.uint8)[:, None]


class Geometry:
    """An operation of RandAugment that moves pixels; all of a round are done in one go.

    rule: (height, width, v [n]) -> {place among a to f of `affine`: value [n]} where it is not the identity's."""

    def __init__(self, rule: Callable[[int, int, Tensor], dict[int, Tensor]]) -> None:
        self.rule = rule

    def fill(self, coefficients: Tensor, x: Tensor, v: Tensor) -> None:
        """Write the rule's values into coefficients [n, 6], which hold the identity's."""
        for place, value in self.rule(*x.shape[2:], v).items():
            coefficients[:, place] = value

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        coefficients = torch.eye(2, 3, device=x.device).flatten().repeat(len(x), 1)
        self.fill(coefficients, x, v)
        return affine(x, coefficients)


class Enhancement:
    """An operation of RandAugment that draws pixels away from a base image; all of a round are blended in one go."""

    def __init__(self, base: Callable[[Tensor], Tensor]) -> None:
        self.base = base  # [n, C, H, W] uint8 -> the same, or what expands to it

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        return blend(self.base(x), x, v)


def rotation(height: int, width: int, v: Tensor) -> dict[int, Tensor]:
    """By v degrees counter-clockwise around the middle."""
    cy, cx, cos, sin = height / 2, width / 2, (v * (math.pi / 180)).cos(), (v * (math.pi / 180)).sin()
    return {0: cos, 1: -sin, 2: cx - cos * cx + sin * cy, 3: sin, 4: cos, 5: cy - sin * cx - cos * cy}


# Lowest and highest v of the 14 operations, ZM semilearn/datasets/augmentation/randaugment.py.  # C3
RAND_AUGMENT: dict[str, tuple[float, float, Callable[[Tensor, Tensor], Tensor]]] = {
    "AutoContrast": (0, 1, lambda x, v: auto_contrast(x)),
    "Brightness": (0.05, 0.95, Enhancement(lambda x: torch.zeros_like(x))),
    "Color": (0.05, 0.95, Enhancement(luminance)),  # C4
    "Contrast": (0.05, 0.95, Enhancement(mean_gray)),
    "Equalize": (0, 1, lambda x, v: equalize(x)),
    "Identity": (0, 1, lambda x, v: x),
    "Posterize": (4, 8, posterize),
    "Rotate": (-30, 30, Geometry(rotation)),
    "Sharpness": (0.05, 0.95, Enhancement(smooth)),
    "ShearX": (-0.3, 0.3, Geometry(lambda height, width, v: {1: v})),
    "ShearY": (-0.3, 0.3, Geometry(lambda height, width, v: {3: v})),
    "Solarize": (0, 256, solarize),
    "TranslateX": (-0.3, 0.3, Geometry(lambda height, width, v: {2: v * width})),
    "TranslateY": (-0.3, 0.3, Geometry(lambda height, width, v: {5: v * height})),
}
OPERATIONS = [operation for _, _, operation in RAND_AUGMENT.values()]
LOW, HIGH = torch.tensor([[low, high] for low, high, _ in RAND_AUGMENT.values()]).unbind(dim=1)
KINDS = (type(rotation), Enhancement, Geometry)  # the order of work in a round
IN_ORDER = sorted(OPERATIONS, key=lambda operation: KINDS.index(type(operation)))
PLACE = torch.tensor([IN_ORDER.index(operation) for operation in OPERATIONS])


def rand_augment(x: Tensor, u: Tensor) -> Tensor:
    """Three operations an image, drawn with replacement, v uniform in the operation's range.

    u [n, 3, 2] in [0, 1) on the CPU: (operation, v) of each round. [n, C, H, W] -> the same."""
    number = (u[..., 0] * len(OPERATIONS)).long()
    place, v_all = PLACE[number], LOW[number] + (HIGH - LOW)[number] * u[..., 1]  # [n, 3]
    order = torch.arange(len(x))  # which image each row of x is by now
    for turn in range(u.shape[1]):
        chosen, step = place[order, turn].sort()
        order = order[step]  # rows of one operation side by side
        x, v = x.index_select(0, step.to(x.device)), v_all[order, turn].to(x.device)
        sizes = chosen.bincount(minlength=len(IN_ORDER)).tolist()  # on the CPU: no GPU waits for it
        coefficients = torch.eye(2, 3, device=x.device).flatten().repeat(len(x), 1)
        rows = zip(IN_ORDER, x.split(sizes), v.split(sizes), coefficients.split(sizes), strict=True)
        done, bases = [], []
        for operate, part, v_part, k_part in rows:
            if isinstance(operate, Geometry):
                operate.fill(k_part, part, v_part)
            elif isinstance(operate, Enhancement):
                bases.append(operate.base(part).expand_as(part))
            elif len(part):
                done.append(operate(part, v_part))
        first = sum(map(len, done))
        end = first + sum(map(len, bases))
        drawn = blend(torch.cat(bases), x[first:end], v[first:end])
        x = torch.cat([*done, drawn, affine(x[end:], coefficients[end:])])
    return x.index_select(0, order.argsort().to(x.device))


CUTOUT_FILL = (125, 123, 114)  # ZM; its luminance is 123


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Fill a square of side U(0, 0.5) * width around a center uniform over the image.  # C2

    u [n, 3] in [0, 1): side, center row, center column."""
    height, width = x.shape[2:]
    half = u[:, :1] * 0.25 * width  # [n, 1]
    i = (torch.arange(height, device=x.device) + 0.5 - u[:, 1:2] * height).abs() < half  # [n, H]
    j = (torch.arange(width, device=x.device) + 0.5 - u[:, 2:3] * width).abs() < half
    fill = torch.tensor(CUTOUT_FILL, dtype=torch.uint8, device=x.device).view(1, 3, 1, 1)
    fill = fill if x.shape[1] == 3 else luminance(fill)  # C4
    inside = (i[:, :, None] & j[:, None, :])[:, None]
    return x * ~inside + fill * inside  # not torch.where, which is slow for bytes


WEAK_DRAWS, STRONG_DRAWS = 3, 3 + 2 * 3 + 3  # numbers u an image


def weak_augment(x: Tensor, u: Tensor, size: int, pad: int, flip: int) -> Tensor:
    """The weak view: random crop of the reflected image, random mirror. u [n, WEAK_DRAWS] in [0, 1)."""
    return crop_and_flip(x, u.to(x.device), size, pad, flip)


def strong_augment(x: Tensor, u: Tensor, size: int, pad: int, flip: int) -> Tensor:
    """The strong view: crop and mirror, RandAugment, Cutout. u [n, STRONG_DRAWS] on the CPU.

    The crop is the weak one's; without a border it is a resized one, u [n, STRONG_DRAWS + AREA_DRAWS]."""
    u_crop, u_operations, u_cutout, u_area = u.tensor_split([3, 9, 12], dim=1)
    if pad:
        x = crop_and_flip(x, u_crop.to(x.device), size, pad, flip)
    else:
        x = random_resized_crop(x, u_crop, u_area, size, flip)
    x = rand_augment(x, u_operations.unflatten(1, (3, 2)))
    return cutout(x, u_cutout.to(x.device))


CACHE_BYTES = 3 * 2**19  # of images a CPU works on at a time


class Views:
    """What the network sees of a split: normalized float batches, made on the device.

    A split that fits (1 GiB) is kept on the device; a larger one stays a memory map."""

    def __init__(self, split: Split, preset: Preset, device: torch.device) -> None:
        self.size, self.pad, self.flip, self.device = preset.size, preset.pad, preset.flip, device
        self.mean = torch.tensor(preset.mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(preset.std, device=device).view(1, -1, 1, 1) * 255
        self.y = torch.from_numpy(split.y).to(device)
        self.x = torch.as_tensor(split.x.copy()).to(device) if split.x.nbytes <= 2**30 else split.x

    def __len__(self) -> int:
        return len(self.x)

    def pixels(self, idx: Tensor) -> Tensor:
        """uint8 [n, C, H, W] on the device."""
        if isinstance(self.x, Tensor):
            return self.x.index_select(0, idx.to(self.device))
        x = torch.from_numpy(self.x[idx.numpy()])
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(self.x, "_mmap"):  # not on Windows
            self.x._mmap.madvise(mmap.MADV_DONTNEED)  # what was read would stay in this process's memory
        return x.to(self.device, non_blocking=True)

    def normalize(self, x: Tensor) -> Tensor:
        return x.float().sub_(self.mean).div_(self.std)

    def weak(self, idx: Tensor) -> Tensor:
        return self.augmented(idx, weak_augment, uniform(len(idx), WEAK_DRAWS))

    def strong(self, idx: Tensor) -> Tensor:
        u = uniform(len(idx), STRONG_DRAWS + (0 if self.pad else AREA_DRAWS))
        return self.augmented(idx, strong_augment, u)

    def augmented(self, idx: Tensor, augment: Callable[..., Tensor], u: Tensor) -> Tensor:
        """The views of u [n, draws]; on a CPU of so many images at a time as stay in its cache."""
        at_once = max(1, CACHE_BYTES // self.x[0].nbytes) if self.device.type == "cpu" else len(idx)
        out = torch.empty(len(idx), self.x.shape[1], self.size, self.size, device=self.device)
        for part, u_part, idx_part in zip(out.split(at_once), u.split(at_once), idx.split(at_once), strict=True):
            part.copy_(augment(self.pixels(idx_part), u_part, self.size, self.pad, self.flip))
            part.sub_(self.mean).div_(self.std)
        return out

    def plain(self, idx: Tensor) -> Tensor:
        x = self.pixels(idx)
        edge = (x.shape[2] - self.size) // 2  # 0, but for training images stored larger
        return self.normalize(x[:, :, edge : edge + self.size, edge : edge + self.size])


# ---------------------------------------------------------------------------- views of texts
# A batch of texts is token numbers [n, L] int64, -1 behind a row's end. Views work as those of images.


@lru_cache(maxsize=1)
def reach_hub() -> None:
    """Ask the hub once, and where it does not answer take this machine's copies only; no bars over loading.

    Otherwise its own retries take half a minute for every file, a line each, before they give up."""
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of its HTTP library, which differs between versions
        print(f"{constants.ENDPOINT} is out of reach ({reason_of(error)}): only files that are here are used")
        constants.HF_HUB_OFFLINE = True


def reason_of(error: Exception) -> str:
    """The first line of an error's text, or its kind; without torch's advice to execute what a file brings."""
    if "weights_only" in str(error):
        return "it is damaged or holds more than tensors and plain Python; nothing in it was executed"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_pretrained(kind: str, backbone: str, **options: Any) -> Any:
    """transformers' `kind`.from_pretrained(backbone). Raises UserError when there is nothing to load."""
    import transformers

    transformers.logging.set_verbosity_error()  # weights of a pre-training head that is not used here
    if not Path(backbone).is_dir():
        reach_hub()
    try:  # False: by default it asks whether to execute what a stranger's folder brings
        return getattr(transformers, kind).from_pretrained(backbone, trust_remote_code=False, **options)
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(
            f"{backbone}: {kind} of transformers could not load it ({reason_of(error)}); expected "
            "an id on the hub or a folder with config.json, tokenizer and weights (none needed with --weights none)"
        ) from None


@first_process_first
def tokenize(texts: list[str], tokenizer: Any, max_length: int, cache: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of all texts end to end, int32; offsets int64 [N + 1]), rows cut to max_length on the right.

    Kept as cache/tokens/<hash of tokenizer and texts>.npy: number of rows, their lengths, the tokens."""
    tokenizer.truncation_side = "right"
    key = hashlib.blake2b(f"{max_length}/{tokenizer.backend_tokenizer.to_str()}".encode(), digest_size=12)
    for text in texts:
        key.update(content_hash(text.encode()))
    path = Path(cache or "") / "tokens" / f"{key.hexdigest()}.npy"
    if cache and path.exists():
        stored = np.load(path, mmap_mode="r")
    else:
        lengths, tokens = [], []
        for first in tqdm(range(0, len(texts), 1000), "tokenizing", disable=None):
            rows = tokenizer(texts[first : first + 1000], truncation=True, max_length=max_length)["input_ids"]
            lengths += [len(row) for row in rows]
            tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))
        stored = np.concatenate([np.array([len(texts), *lengths], np.int32), *tokens])
        if cache:
            buffer = io.BytesIO()
            np.save(buffer, stored)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getbuffer())
    n = int(stored[0])
    return stored[1 + n :], np.concatenate([[0], stored[1 : 1 + n].cumsum(dtype=np.int64)])


TOKEN_DELETE, TOKEN_MASK, TOKEN_SWAP = 0.1, 0.1, 0.1  # rates of T4


def token_augment(ids: Tensor, u: Tensor, special: Tensor, mask_id: int | None) -> Tensor:
    """Delete, mask or swap with the right neighbor single tokens, never a special one.  # T4

    u [n, L, 2] in [0, 1): (delete or mask, swap). The ordinary token with the largest first number is
    never deleted or masked, so that no text is emptied. [n, L] -> [n, L]."""
    length = ids.shape[1]
    ordinary = (ids >= 0) & ~torch.isin(ids, special)
    u_edit = torch.where(ordinary, u[..., 0], -1)
    free = ordinary & (u_edit < u_edit.amax(dim=1, keepdim=True))
    deleted = free & (u_edit < TOKEN_DELETE)
    if mask_id is not None:
        ids = ids.masked_fill(free & ~deleted & (u_edit < TOKEN_DELETE + TOKEN_MASK), mask_id)
    next_ordinary = F.pad(ordinary[:, 1:], (0, 1), value=False)
    place = torch.arange(length, device=ids.device) + 1.5 * (ordinary & next_ordinary & (u[..., 1] < TOKEN_SWAP))
    order = (place + length * 2 * deleted).argsort(dim=1, stable=True)
    return ids.masked_fill(deleted, -1).gather(1, order)


class TextViews:
    """What the network sees of a split of texts: rows padded to the batch's longest, in steps of 8."""

    def __init__(
        self, split: TextSplit, preset: Preset, backbone: str, device: torch.device, cache: str | None
    ) -> None:
        tokenizer = load_pretrained("AutoTokenizer", backbone)
        if not tokenizer.is_fast:
            raise UserError(f"--backbone {backbone}: has no fast tokenizer; take an encoder that has one")
        self.device, self.num_aug = device, len(split.aug or [])
        self.max_length = min(preset.size, tokenizer.model_max_length)
        texts = list(chain(split.texts, *(split.aug or [])))
        self.tokens, self.offsets = tokenize(texts, tokenizer, self.max_length, cache)
        self.special, self.mask_id = torch.tensor(tokenizer.all_special_ids, device=device), tokenizer.mask_token_id
        self.y = torch.from_numpy(split.y).to(device)

    def __len__(self) -> int:
        return len(self.y)

    def by_length(self) -> Tensor:
        """Positions [N] of all examples, short rows first: batches of them hold little padding."""
        return torch.from_numpy(np.diff(self.offsets[: len(self) + 1])).argsort(stable=True)

    def plain(self, idx: Tensor) -> Tensor:
        first, end = self.offsets[idx.numpy(), None], self.offsets[idx.numpy() + 1, None]
        longest = min(-(-int((end - first).max()) // 8) * 8, self.max_length)
        at = first + np.arange(longest)
        ids = np.where(at < end, self.tokens[np.minimum(at, len(self.tokens) - 1)], -1)
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    weak = plain  # the text itself

    def strong(self, idx: Tensor) -> Tensor:
        """One of the back-translations, each with equal chance; T4 where there are none."""
        if self.num_aug:
            chosen = (uniform(len(idx)) * self.num_aug).long()
            return self.plain(idx + (1 + chosen) * len(self))
        ids = self.plain(idx)
        u = uniform(len(ids), self.max_length, 2)[:, : ids.shape[1]]  # no row's edits depend on its batch's longest
        return token_augment(ids, u.to(self.device), self.special, self.mask_id)


def make_views(
    split: Split | TextSplit, preset: Preset, backbone: str, device: torch.device, cache: str | None = None
) -> Views | TextViews:
    """Views of images or of texts, as the split is; tokens are kept in the folder `cache`."""
    if isinstance(split, TextSplit):
        return TextViews(split, preset, backbone, device, cache)
    return Views(split, preset, device)


def join(views: list[Tensor]) -> Tensor:
    """One batch of several; token rows are first filled up with -1 to the longest."""
    if views[0].ndim == 2:
        longest = max(ids.shape[1] for ids in views)
        views = [F.pad(ids, (0, longest - ids.shape[1]), value=-1) for ids in views]
    return torch.cat(views)


# ---------------------------------------------------------------------------- backbones


def conv_bn(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class SmallCNN(nn.Sequential):
    """Five 3x3 convolutions, global average: an encoder for two CPU cores.

    [n, C, H, W] float -> [n, 4 * width]. From 16 pixels on, the first convolution has stride 2."""

    batch_statistics = True  # rows of a batch influence one another

    def __init__(self, channels: int, size: int, width: int = 16) -> None:
        super().__init__(
            conv_bn(channels, width, 2 if size >= 16 else 1), conv_bn(width, 2 * width), nn.MaxPool2d(2),
            conv_bn(2 * width, 2 * width), conv_bn(2 * width, 4 * width), nn.MaxPool2d(2),
            conv_bn(4 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.num_features = 4 * width


class WideBlock(nn.Module):
    """Pre-activation residual block of WRN; `first` also shortcuts from behind the activation."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool) -> None:
        super().__init__()
        self.bn1, self.bn2 = (nn.BatchNorm2d(c, momentum=0.001) for c in (c_in, c_out))  # ZM nets/wrn/wrn.py
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(x), 0.1)  # C5
        x = self.shortcut(out if self.first else x)
        return x + self.conv2(F.leaky_relu(self.bn2(self.conv1(out)), 0.1))


class WideResNet(nn.Module):
    """WRN-28-2 of FixMatch: 28 layers, width 2, leaky ReLU 0.1. [n, C, H, W] float -> [n, 128]."""

    num_features = 128
    batch_statistics = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for c_in, c_out, stride in ((16, 32, 1), (32, 64, 2), (64, 128, 2)):
            self.blocks.append(WideBlock(c_in, c_out, stride, first=c_in == 16))
            self.blocks.extend(WideBlock(c_out, c_out, 1, first=False) for _ in range(3))
        self.bn = nn.BatchNorm2d(128, momentum=0.001)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.blocks(self.conv1(x))), 0.1).mean(dim=(2, 3))


class TextEncoder(nn.Module):
    """An encoder of transformers, dropout 0.1, mean over a row's tokens. Weights are random; `load_weights` fills them.

    ids [n, L] int64, -1 = padding -> [n, D]. Source: ZM semilearn/nets/bert/bert.py, but T1."""

    batch_statistics = False

    def __init__(self, backbone: str) -> None:
        super().__init__()
        config = load_pretrained("AutoConfig", backbone)
        if config.is_encoder_decoder:
            raise UserError(f"--backbone {backbone}: has a decoder; expected an encoder such as bert-base-uncased")
        from transformers import AutoModel

        self.model, self.num_features = AutoModel.from_config(config, dtype=torch.float32), config.hidden_size
        self.model.pooler = None  # a layer on the first token, which the mean makes idle

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids >= 0
        tokens = ids.where(mask, self.model.config.pad_token_id or 0)
        hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        hidden = F.dropout(hidden.float(), 0.1, self.training)  # mean in float32
        return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)  # T1


class Student(nn.Module):
    """Encoder + main head + (after `add_kd_head`) auxiliary distillation head.

    encoder: any module [n, ...] -> [n, D] with the attributes num_features (D) and batch_statistics
    (whether rows of a batch influence one another).
    forward: batch, extra inputs of the heads [n, num_extra] or None
    -> (logits [n, K], logits_kd [n, K] or None, features [n, D])."""

    def __init__(self, encoder: nn.Module, num_classes: int, num_extra: int = 0) -> None:
        super().__init__()
        self.encoder, self.num_classes = encoder, num_classes
        self.head = nn.Linear(encoder.num_features + num_extra, num_classes)
        if isinstance(encoder, TextEncoder):
            hidden = nn.Linear(encoder.num_features + num_extra, encoder.num_features + num_extra)
            self.head = nn.Sequential(hidden, nn.GELU(), self.head)
        self.kd_head: nn.Module | None = None

    def add_kd_head(self) -> None:
        """A new, randomly started copy of the main head's architecture."""
        self.kd_head = copy.deepcopy(self.head)
        for module in self.kd_head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.encoder.batch_statistics and x.ndim == 4:  # convolutions, which are faster so
            x = x.contiguous(memory_format=torch.channels_last)
        features = self.encoder(x)
        if extra is not None:
            features = torch.cat([features, extra.to(features)], dim=1)
        return self.head(features), None if self.kd_head is None else self.kd_head(features), features


class PretrainedEncoder(nn.Module):
    """ViT-S and any image model of transformers, or torchvision's EfficientNet-B0.

    [n, C, H, W] float -> [n, D]: the class token, or the mean over places where there is none. Gray
    images are shown in all three channels. Weights are random; `load_weights` fills them."""

    def __init__(self, backbone: str, size: int) -> None:
        super().__init__()
        if backbone == "efficientnet_b0":
            from torchvision.models import efficientnet_b0

            self.model = efficientnet_b0()
            self.model.classifier = nn.Identity()
        elif backbone in VITS:
            self.model = vit_small(VITS[backbone], size)
        else:
            from transformers import AutoConfig, AutoModel

            if not Path(backbone).is_dir():
                reach_hub()
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(backbone, trust_remote_code=False))
            self.model = getattr(self.model, "vision_model", self.model).float()
        self.has_class_token = any("cls_token" in n or "class_emb" in n for n, _ in self.named_parameters())
        self.batch_statistics = any(isinstance(m, nn.BatchNorm2d) for m in self.modules())
        with torch.no_grad():
            self.num_features = self.eval()(torch.zeros(1, 3, size, size)).shape[1]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x.expand(-1, 3, -1, -1))
        out = getattr(out, "last_hidden_state", out)  # [n, tokens, D], [n, D, h, w] or [n, D]
        if out.ndim == 3:
            return out[:, 0] if self.has_class_token else out.mean(dim=1)
        return out.flatten(2).mean(dim=2) if out.ndim == 4 else out


VITS = {"vit_small_patch2_32": 2, "vit_small_patch16_224": 16}  # patch sides; the image's side is free


def vit_small(patch: int, size: int) -> nn.Module:
    """ViT-S of width 384, depth 12, 6 heads; stochastic depth 0 ... 0.2. Source: ZM semilearn/nets/vit/vit.py."""
    from torchvision.ops import StochasticDepth
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, image_size=size, patch_size=patch,
    )  # fmt: skip
    vit = ViTModel(config, add_pooling_layer=False)
    for depth, layer in enumerate(vit.layers):
        layer.dropout = StochasticDepth(0.2 * depth / 11, "row")  # stands on both residual branches
    nn.init.zeros_(vit.embeddings.cls_token)  # as published where nothing is loaded
    nn.init.zeros_(vit.embeddings.position_embeddings)
    return vit


def build_student(backbone: str, channels: int, size: int, num_classes: int, num_extra: int = 0) -> Student:
    """A student for images of `channels` x `size` x `size`; the caller seeds torch first.

    backbone: cnn, wrn_28_2, efficientnet_b0, one of VITS, or a model of transformers (id or folder).
    channels 0: a student for texts."""
    if channels == 0:
        encoder = TextEncoder(backbone)
    elif backbone == "cnn":
        encoder = SmallCNN(channels, size)
    elif backbone == "wrn_28_2":
        encoder = WideResNet(channels)
    elif size % VITS.get(backbone, 1):
        raise UserError(f"--backbone vit_small: images of {size} pixels cannot be cut into patches of {VITS[backbone]}")
    else:
        try:
            encoder = PretrainedEncoder(backbone, size)
        except Exception as error:  # a folder of any content
            raise UserError(
                f"--backbone {backbone}: expected cnn, wrn_28_2, efficientnet_b0, {', '.join(VITS)} or a model of "
                f"transformers for images of {size} pixels ({reason_of(error)})"
            ) from None
    return Student(encoder, num_classes, num_extra)


USB = "https://github.com/microsoft/Semi-supervised-learning/releases/download/v.0.0.0/"
WEIGHTS = {
    "vit_small_patch2_32": USB + "vit_small_patch2_32_mlp_im_1k_32.pth",
    "vit_small_patch16_224": USB + "vit_small_patch16_224_mlp_im_1k_224.pth",
    "efficientnet_b0": "https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth",
}
TIMM_NAMES = (  # (pattern of timm's names, transformers')
    ("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token"), ("^norm", "layernorm"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("^blocks", "layers"),
    ("attn.proj", "attention.o_proj"), ("attn", "attention"),
    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
)  # fmt: skip


def from_timm(state: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """A ViT's weights under transformers' names; positions resized (bicubic) to `num_tokens`, class token included."""
    out = {}
    for name, weight in state.items():
        for pattern, ours in TIMM_NAMES:
            name = re.sub(pattern, ours, name)
        thirds = zip("qkv", weight.chunk(3), strict=True) if ".qkv." in name else ()
        out |= {name.replace("qkv", f"{part}_proj"): third for part, third in thirds} or {name: weight}
    positions = out["embeddings.position_embeddings"]
    was, now = math.isqrt(positions.shape[1] - 1), math.isqrt(num_tokens - 1)
    if was != now:
        grid = positions[:, 1:].mT.unflatten(2, (was, was))  # [1, D, was, was]
        grid = F.interpolate(grid, size=(now, now), mode="bicubic", align_corners=False)
        out["embeddings.position_embeddings"] = torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)
    return out


def read_weights(path: str, backbone: str) -> dict[str, Tensor]:
    """The tensors of a weight file; nothing in it is executed. Raises UserError for a file of anything else."""
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()):
            raise ValueError("expected tensors by their names")
        return state
    except Exception as error:  # a file of any content: unpickling raises errors of many kinds
        raise UserError(f"--weights: {path} cannot be read as weights of {backbone} ({reason_of(error)})") from None


@first_process_first
def load_weights(encoder: nn.Module, backbone: str, weights: str | None) -> None:
    """Fill an encoder with pre-trained weights: a file's, the published ones (None), or "none".

    Raises UserError when they cannot be fetched or read, or do not fit."""
    if isinstance(encoder, TextEncoder):
        if weights != "none":
            model = load_pretrained("AutoModel", weights or backbone, dtype=torch.float32)
            model.pooler = None
            try:
                encoder.model.load_state_dict(model.state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[1].strip()
                raise UserError(f"--weights {weights}: do not fit {backbone} ({reason})") from None
        return
    if weights == "none" or (weights is None and backbone in ("cnn", "wrn_28_2")):
        print(f"{backbone} starts from scratch, without pre-trained weights")
        return
    source = weights or backbone
    if weights is None and backbone in WEIGHTS:
        source = f"{torch.hub.get_dir()}/checkpoints/{Path(WEIGHTS[backbone]).name}"
        try:
            fetch(WEIGHTS[backbone], Path(source))
        except UserError as error:
            raise UserError(f"{error}, or start from scratch with --weights none") from None
    if source == backbone:
        model = load_pretrained("AutoModel", backbone, dtype=torch.float32)
        state = getattr(model, "vision_model", model).state_dict()
    else:
        state = read_weights(source, backbone)
    state = {name.removeprefix("module."): weight for name, weight in state.items()}
    heads = ("fc", "classifier", "mlp", "head")  # ZM semilearn/nets/utils.py
    state = {name: weight for name, weight in state.items() if not name.startswith(heads)}
    target = getattr(encoder, "model", encoder)
    wanted = target.state_dict()
    if backbone in VITS and "pos_embed" in state:
        state = from_timm(state, wanted["embeddings.position_embeddings"].shape[1])
    misfits = {
        "missing": wanted.keys() - state.keys(),
        "left over": state.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape},
    }
    if any(misfits.values()):
        said = [f"{kind} {len(names)}: {', '.join(sorted(names)[:5])}" for kind, names in misfits.items() if names]
        raise UserError(
            f"--weights: {source} does not fit {backbone} ({'; '.join(said)}); give a fitting file or --weights none"
        )
    target.load_state_dict(state)
    print(f"{backbone} starts from {source}")


def param_groups(student: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: no decay for 1-D tensors (biases, norms), positions and class token, as ZM
    semilearn/nets/utils.py.

    Every group carries `lr_scale`, which the learning rate of a step is multiplied with: 1 for the
    heads, times layer_decay from each block to the one below it; what stands before the first block
    is one more layer, and what follows the last one belongs to it."""
    layer, layers = 0, {}  # of the encoder's parameters, in their order
    for name, _ in student.named_parameters():
        block = re.search(r"(?:^|\.)(?:layers?|blocks|stages|features)\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else layer
        layers[name] = layer
    top = max(layers.values()) + 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in student.named_parameters():
        scale = layer_decay ** (top - layers[name]) if name.startswith("encoder.") else 1.0
        decay = 0.0 if p.ndim <= 1 or name.endswith(("cls_token", "position_embeddings")) else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr": lr, "lr_scale": scale})
        group["params"].append(p)
    return list(groups.values())


def build_optimizer(
    student: nn.Module, name: str, lr: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999) or SGD with Nesterov momentum 0.9 over `param_groups`."""
    groups = param_groups(student, lr, weight_decay, layer_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    # one pass over the weights (BERT-base on a CPU: 570 -> 70 ms); not tried on other devices
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, fused=fused)


class Averaged:
    """weights <- decay * weights + (1 - decay) * student's, batch statistics included; the first update copies.

    `.module` is the network to evaluate; with decay 0 it is the student itself. All tensors in one operation,
    a tenth of the time of torch's AveragedModel for a small CNN (0.03 ms), with the same results."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(student) if decay else student, decay, 0
        pairs = zip(*(chain(net.parameters(), net.buffers()) for net in (self.module, student)), strict=True)
        pairs = [pair for pair in pairs if pair[0].is_floating_point()]  # a count of batches stays as it is
        self.mean, self.now = (list(tensors) for tensors in zip(*pairs, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take the student's weights of now into the average."""
        if self.decay:
            torch._foreach_lerp_(self.mean, self.now, 1 - self.decay if self.updates else 1.0)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict() | {"updates": torch.tensor(self.updates)} if self.decay else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.decay:
            self.module.load_state_dict({name: weight for name, weight in state.items() if name != "updates"})
            self.updates = int(state["updates"])


@torch.no_grad()
def predict(
    student: nn.Module, views: Views | TextViews, autocast: Any = nullcontext,
    extra: Tensor | None = None, batch: int = 500,
) -> Tensor:  # fmt: skip
    """Class probabilities [N, K] float32 of the main head on the plain view of every example, on the CPU."""
    student.eval()
    order, probs = torch.arange(len(views)), []
    if isinstance(views, TextViews):
        order, batch = views.by_length(), min(batch, 64)
    for idx in order.split(batch):
        with autocast():
            logits, _, _ = student(views.plain(idx), None if extra is None else extra[idx])
        probs.append(logits.float().softmax(dim=1).cpu())
    return torch.cat(probs)[order.argsort()]


def accuracy(probs: Tensor, y: Tensor) -> float:
    """Share of rows whose largest probability is at y, in percent."""
    return 100 * (probs.argmax(dim=1) == y.cpu()).float().mean().item()


def pseudo_label_accuracy(pseudo_label: Tensor, mask: Tensor, y_true: Tensor) -> dict[str, Tensor]:
    """Monitoring: percent right of all pseudo-labels and of those that count, NaN where there is none.

    [B_u] int64, [B_u] in [0, 1], [B_u] int64 (-1: truth unknown, left out); also of use with a teacher's labels."""
    known = (y_true >= 0).float()
    right = 100 * (pseudo_label == y_true).float()
    return {
        "pl_acc": (right * known).sum() / known.sum(),
        "pl_acc_masked": (right * known * mask).sum() / (known * mask).sum(),
    }


# ---------------------------------------------------------------------------- run folder

HEALTH = {  # what the health line takes from the metrics
    "mask_rate": "mask {:.2f}",
    "pl_acc_masked": "pseudo-labels {:.1f} % right",
    "agree_teacher": "{:.1f} % as the teacher",
}


class Run:
    """One folder `runs/<name>-<time>/`: args, environment, metrics, checkpoint, result, student.

    Scalars are kept as tensors and read only when a line is printed, so that no step waits for
    them. SIGINT and SIGTERM are noted, and answered between two steps by `save`."""

    def __init__(
        self, runs_dir: str, name: str, args: dict[str, Any], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """A new folder under `runs_dir`; with args["resume"], the folder of a run to go on with."""
        resume = args["resume"]
        self.folder = Path(resume or f"{runs_dir}/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        while not resume and self.folder.exists():  # two runs in one second
            self.folder = self.folder.with_name(self.folder.name + "b")
        if PROCESSES > 1:
            names = [self.folder]
            torch.distributed.broadcast_object_list(names)
            self.folder = names[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device, self.dtype, self.signal, self.warned = device, dtype, 0, set[str]()
        self.pending: list[dict[str, Any]] = []  # scalars of the steps since the last line
        self.means: dict[str, float] = {}  # those of the last line
        self.counts = torch.zeros(0, device=device)  # pseudo-labels of each class since the last evaluation
        self.idle = 0  # steps without a single one
        self.history: list[list[float]] = []  # [stage, steps done, test accuracy] of every evaluation
        self.state: dict[str, Any] = {"stage": 0, "step": 0, "seconds": 0.0}
        if (self.folder / "checkpoint.pt").exists():
            self.state = read_checkpoint(self.folder / "checkpoint.pt", device)
            self.history, self.pending = self.state["history"], self.state["pending"]
        if not resume:
            self.write_json("args.json", args)
        self.write_json("env.json", environment(device) | {"autocast": str(dtype or "off")})
        self._drop_metrics_after(self.state["stage"], self.state["step"])
        self.board = tensorboard_writer(self.folder) if args.get("tensorboard") and not RANK else None
        self.metrics = open(os.devnull if RANK else self.folder / "metrics.jsonl", "a")
        self.start = self.saved = self.mark = time.perf_counter()
        self.timed, self.seen = 0, 0  # steps since self.mark, and since the stage was begun
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note_signal)

    def _drop_metrics_after(self, stage: int, step: int) -> None:
        """Forget what was logged beyond the checkpoint (it will come again) and a torn last line."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                row = json.loads(line)
                if (row["stage"], row["step"]) <= (stage, step):
                    rows.append(row)
            except (ValueError, LookupError, TypeError):
                continue  # torn by the end of the process, or zeros after a power cut
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _note_signal(self, number: int, frame: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self.signal = number

    def write_json(self, name: str, content: Any) -> None:
        write_atomically(self.folder / name, (json.dumps(content, indent=2) + "\n").encode())

    def describe(
        self, data: Data, labeled: np.ndarray, args: dict[str, Any], measured: str, y_zs: np.ndarray | None = None,
        prior: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Print one screen, what will be done with what: split, classes, teacher, plan; keep the labeled positions.

        measured: a key of MEASURED. y_zs [N]: the teacher's labels, -1 where it abstained. prior [K]: the shares of
        the classes that pseudo-labels should have, if not the labels'; the health line compares with them."""
        self.measured, self.classes, y_lb = measured, data.classes, data.train.y[labeled]
        self.p_expected = torch.from_numpy(np.bincount(y_lb, minlength=len(data.classes)) / len(y_lb))
        self.counts = self.state.get("counts", torch.zeros(len(data.classes), device=self.device))
        n, labels, tests = len(data.train), len(labeled), 0 if data.test is None else len(data.test)
        batch, rows = args["batch_size"], 0 if args.get("supervised_only") else args["uratio"] * args["batch_size"]
        steps, warm_up, stages = args["num_steps"], args.get("num_steps_stage1"), args.get("stages", "both")
        print(f"torch {torch.__version__} on {self.device}, autocast {self.dtype or 'off'}, run folder {self.folder}")
        print(f"{labels} labeled, {n} unlabeled (labeled included), {tests} test, {len(data.classes)} classes")
        print(f"labels of a class: {class_counts(y_lb, data.classes)}")
        if y_zs is not None:
            print(f"teacher's labels of a class: {class_counts(y_zs, data.classes)}; none: {(y_zs < 0).sum()}")
            print(f"teacher right on labeled examples: {share_right(int((y_zs[labeled] == y_lb).sum()), labels)}")
        if prior is not None:
            self.p_expected = prior.cpu()
            expected = np.repeat(np.arange(len(prior)), (n * self.p_expected).round().int())
            print(f"expected of a class (--prior): {class_counts(expected, data.classes)}")
        plan = []
        if warm_up and stages != "2":
            plan.append(f"{warm_up} steps of stage 1: {warm_up * rows / n:.1f} passes over the pool")
        if stages != "1":
            passes = f"{steps * batch / labels:.0f} passes over the labels, {steps * rows / n:.1f} over the pool"
            networks = "2 networks, each " if args.get("outer_only") is False else ""
            plan.append(f"{networks}{steps} steps x ({batch} labeled + {rows} unlabeled): {passes}")
        print("plan:", "; then ".join(plan))
        print(f"measured at evaluations: {MEASURED[measured][1]}")
        print("  ".join(f"{name} {value}" for name, value in args.items() if value is not None), flush=True)
        write_atomically(self.folder / "labeled_idx.txt", "".join(f"{i}\n" for i in labeled).encode())

    def autocast(self) -> Any:
        """Context of the forward pass. Losses stay outside: a bfloat16 0.949 passes a 0.95 threshold."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in float16 only; a disabled scaler's calls do nothing else."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def restore(self, stage: int, parts: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(first step, state): the checkpoint's if it was written in this stage, else (0, {})."""
        self.mark, self.timed, self.seen = time.perf_counter(), 0, 0
        if self.state["stage"] != stage:
            return 0, {}
        try:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
        except Exception as error:  # a file of any content
            path = self.folder / "checkpoint.pt"
            raise UserError(f"{path} is not of this run ({reason_of(error)}); start a new run") from None
        print(f"going on in stage {stage} after step {self.state['step']}")
        return self.state["step"], self.state

    def log(
        self, stage: int, step: int, num_steps: int, log_every: int, line: str,
        pseudo_label: Tensor | None = None, mask: Tensor | None = None, **values: Any,
    ) -> None:  # fmt: skip
        """Keep one step's scalars; every `log_every` steps write their means and print them as `line`.

        pseudo_label [B_u] and mask [B_u] are counted for the health line. A mean leaves out NaN (a rate
        without a single case) except in a loss: Raises UserError naming the first loss and step that
        were not finite."""
        self.pending.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()})
        if pseudo_label is not None:
            self.counts.index_add_(0, pseudo_label, mask)
        self.timed += 1
        self.seen += 1
        if self.seen == 1:
            self.second_step = time.perf_counter()  # the first one may have compiled something
        if self.seen == 3:
            seconds = (num_steps - step - 1) * (time.perf_counter() - self.second_step) / 2
            shorter = "; --num-steps, --batch-size, a smaller --backbone, --amp bf16 or a GPU make it shorter"
            if seconds > 20:
                said = f"about {timedelta(seconds=round(seconds))} on {self.device}"
                print(f"stage {stage} takes {said}{shorter if seconds > 3600 else ''}", flush=True)
        if (step + 1) % log_every and step + 1 < num_steps:
            return
        rate = self.timed / (time.perf_counter() - self.mark)
        self.means = means = self._means(stage, step)
        self._write(stage, step, {f"train/{name}": mean for name, mean in means.items()} | {"time/step_per_s": rate})
        left = f"{rate:.3g} step/s, {(num_steps - step - 1) / rate:.0f} s left"
        print(f"stage {stage} step {step + 1}/{num_steps} | {line.format(**means)} | {left}", flush=True)
        self.idle = self.idle + len(self.pending) if means.get("mask_rate") == 0 else 0
        if self.idle >= min(500, num_steps / 4):
            self.warn(
                "idle", f"no unlabeled example has counted for {self.idle} steps: only labels teach; try a "
                "lower threshold (--tau), a higher --lr, more labels or pre-trained weights",
            )  # fmt: skip
        self.pending, self.mark, self.timed = [], time.perf_counter(), 0

    def warn(self, about: str, said: str) -> None:
        """Print a warning, once a run."""
        if about not in self.warned:
            self.warned.add(about)
            print(f"warning: {said}", flush=True)

    def _means(self, stage: int, step: int) -> dict[str, float]:
        names = list(self.pending[0])
        rows = [[torch.as_tensor(row[name], device=self.device).float() for name in names] for row in self.pending]
        table = torch.stack([torch.stack(row) for row in rows]).cpu()[None]
        if PROCESSES > 1:
            tables = [torch.empty_like(table) for _ in range(PROCESSES)]
            torch.distributed.all_gather(tables, table)
            table = torch.cat(tables)  # [processes, steps, names]
        for name, column in zip(names, table.unbind(dim=2), strict=True):
            bad = (~column.isfinite()).any(dim=0).nonzero()
            if name.startswith("loss") and len(bad):
                at = step + 2 - len(rows) + int(bad[0])
                raise UserError(
                    f"{name} became {column[:, bad[0]].sum().item():g} at stage {stage} step {at}; try a lower "
                    f"--lr, --amp off (the last good checkpoint stays in {self.folder})"
                )
        return dict(zip(names, table.nanmean(dim=(0, 1)).tolist(), strict=True))

    def evaluated(self, stage: int, step: int, acc: float) -> None:
        """Write one test accuracy in percent (`result` reports from all of them), and say how training goes.

        class_drift is half the sum over classes of |share of the pseudo-labels that counted since the
        last evaluation - share that they should have|: 0 alike, near 1 everything in a class of few labels."""
        self.history.append([stage, step + 1, acc])
        name = MEASURED[self.measured][0]
        row = {name: acc, "time/hours": self.seconds() / 3600}
        known = {key: mean for key, mean in self.means.items() if not math.isnan(mean)}
        health = [said.format(known[key]) for key, said in HEALTH.items() if key in known]
        counts = mean_over_processes(self.counts).cpu().double()
        if counts.sum() > 0:
            drift = 0.5 * (counts / counts.sum() - self.p_expected).abs().sum().item()
            row["train/class_drift"] = drift
            health.append(f"class drift {drift:.2f}")
        if counts.sum() > 50 * len(self.classes):
            self._warn_of_classes(counts)
        self._write(stage, step, row)
        said = f" | health: {', '.join(health)}" if health else ""
        print(f"stage {stage} step {step + 1} | {name} {acc:.2f}{said}", flush=True)
        self.counts.zero_()

    def _warn_of_classes(self, counts: Tensor) -> None:
        """Warn of a class that swallows the others, and of classes that get nothing."""
        shares, top = counts / counts.sum(), int(counts.argmax())
        p = self.p_expected[top]
        if shares[top] > max(0.5, min(3 * p, (1 + p) / 2)):  # of two or three classes none can have 3 times its share
            self.warn(
                f"class {top}", f"{100 * shares[top]:.0f} % of the pseudo-labels are {self.classes[top]!r}, "
                f"expected {100 * p:.0f} %: training may be collapsing; try a higher --tau, lower --lr",
            )  # fmt: skip
        missing = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            self.warn(
                "missing", f"no pseudo-label of class {', '.join(missing[:5])}{more} counted since the last "
                "evaluation: such a class is learned from labels alone; if it stays so, try a lower --tau, more labels",
            )  # fmt: skip

    def _write(self, stage: int, step: int, row: dict[str, float]) -> None:
        row = {"stage": stage, "step": step + 1} | {name: None if math.isnan(v) else v for name, v in row.items()}
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        for name, value in row.items():
            if self.board and value is not None and "/" in name:
                self.board.add_scalar(f"stage {stage}/{name}", value, step + 1)

    def seconds(self) -> float:
        """Running time of all sessions of this run."""
        return self.state["seconds"] + time.perf_counter() - self.start

    def save_due(self) -> bool:
        """Between evaluations: on a signal, and every ten minutes, so that little is ever lost."""
        return agreed(bool(self.signal) or time.perf_counter() - self.saved > 600)

    def save(self, stage: int, step: int, parts: dict[str, Any], **state: Any) -> None:
        """Replace checkpoint.pt by the state_dicts of `parts` and `state`: tensors and plain Python only.

        After a signal it ends the run (KeyboardInterrupt). Raises UserError when the disk is full,
        with the previous checkpoint still there."""
        if self.pending:
            self._means(stage, step)  # raises: a run that has diverged is never saved
        pending = [{name: float(value) for name, value in row.items()} for row in self.pending]
        state |= {name: part.state_dict() for name, part in parts.items()}
        state |= {"stage": stage, "step": step + 1, "seconds": self.seconds()}
        state |= {"history": self.history, "pending": pending, "counts": self.counts}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.saved = self.mark = time.perf_counter()
        self.timed = 0
        if agreed(bool(self.signal)):
            raise KeyboardInterrupt(self.folder)

    def result(self, stage: int) -> dict[str, float | None]:
        """The reported figures of a stage, percent: last evaluation and median of the last 20, never the best.

        Named test_acc only where they are of a test part (MEASURED)."""
        accs = [acc for at, _, acc in self.history if at == stage]
        last, median = (accs[-1], float(np.median(accs[-20:]))) if accs else (None, None)
        return {self.measured: last, f"{self.measured}_median20": median, "seconds": self.seconds()}


def tensorboard_writer(folder: Path) -> Any:
    """Writes event files into `folder`. Raises UserError where the optional package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is optional here: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state that `Run.save` wrote; nothing in the file is executed. Raises UserError for any other file."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if missing := {"stage", "step", "seconds", "history", "pending"} - set(state):
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return state
    except Exception as error:  # a file of any content: unpickling raises errors of many kinds
        raise UserError(f"{path} cannot be read as a checkpoint ({reason_of(error)}); start a new run") from None


def write_atomically(path: Path, content: Any) -> None:
    """Write to a temporary name, flush to disk, rename: `path` is the old file or the new, never half.

    Of several processes only the first writes. Raises UserError when the disk does not take it."""
    if RANK:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path} ({error.strerror}); what was saved before is untouched: make room and go on"
        ) from None


def environment(device: torch.device) -> dict[str, Any]:
    """What is needed to repeat a run: command, versions, device, commit of the code."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout if shutil.which("git") else ""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "commit": commit.strip() or None,
    }


def student_config(
    dataset: str, backbone: str, preset: Preset, classes: list[str], num_extra: int = 0
) -> dict[str, Any]:
    """What it takes to use a student elsewhere: architecture, class names in order, preprocessing."""
    return {
        "dataset": dataset, "backbone": backbone, "classes": classes, "num_extra": num_extra,
        "size": preset.size, "pad": preset.pad, "mean": preset.mean, "std": preset.std,
    }  # fmt: skip


def save_student(folder: Path, student: nn.Module, config: dict[str, Any]) -> None:
    """Encoder and main head as `model.safetensors`, with `config.json` beside it. A model of transformers
    stands in encoder/ once more, with its tokenizer, for AutoModel.from_pretrained: no hub is needed."""
    from safetensors.torch import save

    if RANK:
        return
    folder.mkdir(exist_ok=True)
    if config["backbone"] not in VITS and hasattr(getattr(student.encoder, "model", None), "config"):
        import transformers

        transformers.logging.disable_progress_bar()
        student.encoder.model.save_pretrained(folder / "encoder")
    if isinstance(student.encoder, TextEncoder):
        load_pretrained("AutoTokenizer", config["backbone"]).save_pretrained(folder / "encoder")
    weights = {k: v.contiguous() for k, v in student.state_dict().items() if not k.startswith("kd_head.")}
    write_atomically(folder / "model.safetensors", save(weights))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_student(folder: str | Path) -> tuple[Student, dict[str, Any]]:
    """(student in eval mode, config) of a folder written by `save_student`. Raises UserError for any other."""
    from safetensors.torch import load_file

    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        encoder = Path(folder) / "encoder"
        if encoder.exists():
            config["backbone"] = str(encoder)
        channels, num_classes = len(config["mean"]), len(config["classes"])
        student = build_student(config["backbone"], channels, config["size"], num_classes, config["num_extra"])
        student.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except Exception as error:  # files of any content
        raise UserError(f"{folder} cannot be read as a student ({reason_of(error)}); expected RUN/student") from None
    return student.eval(), config


def expected_of(hint: str) -> str:
    """What a field's annotation asks for, in words: 'float | None' -> 'a number'."""
    if choices := re.search(r"Literal\[(.*?)\]", hint):
        return "one of " + choices[1].replace('"', "")
    kinds = {"int": "a whole number", "float": "a number", "bool": "no value after it, the flag alone"}
    return kinds.get(hint.split(" ")[0], "a value")


def parse(args_type: type, **options: Any) -> Any:
    """tyro.cli, with one line of our own (UserError) in place of its box for what it refuses."""
    import tyro

    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(args_type, description=sys.modules["__main__"].__doc__, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    # Of tyro's words, which differ between its versions, only the first flag or unknown word is used.
    words = " ".join(re.sub(r"[\u2500-\u257f|+]", " ", box.getvalue()).split()).split("For full")[0].strip()
    hints = {"--" + field.name.replace("_", "-"): str(field.type) for field in dataclasses.fields(args_type)}
    see = f"see {Path(sys.argv[0]).name} --help"
    if unknown := re.match(r"unrecognized[^:]*: *([^\s,]*)", words, re.IGNORECASE):
        near = difflib.get_close_matches(unknown[1], hints, 1, 0.7)
        raise UserError(f"{unknown[1]}: there is no such option{'; perhaps ' + near[0] if near else ''}; {see}")
    flag = "".join(re.findall(r"--[a-z][\w-]*", words)[:1])
    at = [i for i, word in enumerate(sys.argv) if word.partition("=")[0].replace("_", "-") == flag]
    if at and flag in hints:
        given = sys.argv[at[-1]].partition("=")[2] or "".join(sys.argv[at[-1] + 1 : at[-1] + 2])
        given = "without a value" if not given or given.startswith("--") else given
        raise UserError(f"{flag} {given}: expected {expected_of(hints[flag])}; {see}")
    raise UserError(f"{words}; {see}")


def saved_arguments(args_type: type, folder: str) -> Any:
    """What the run in `folder` was started with. Raises UserError where that is no run of this script."""
    path = Path(folder) / "args.json"
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no args.json; expected the folder of a run, e.g. runs/NAME")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return args_type(**saved | {"resume": folder})
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"--resume {folder}: args.json is damaged or of another script; expected a run of {Path(sys.argv[0]).name}"
        ) from None


def cli(args_type: type, main: Callable[[Any], Any]) -> None:
    """Parse the command line into `args_type` and call `main`.

    With --resume, what the run was started with is the default and may not be changed. Exit
    codes: 0 done, 2 the user can mend it (one line on standard error), 130 stopped by a signal."""
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is read safely or refused
    try:
        args = parse(args_type)
        if getattr(args, "resume", None):
            saved = saved_arguments(args_type, args.resume)
            args = parse(args_type, default=saved)
            for field in dataclasses.fields(args_type):
                was, now = getattr(saved, field.name), getattr(args, field.name)
                if was != now and field.name not in ("data_dir", "runs_dir", "device"):
                    flag = "--" + field.name.replace("_", "-")
                    raise UserError(f"{flag} {now}: the run to resume has {was}; leave the flag out or start a new run")
        if PROCESSES > 1:
            # gloo for CPU tensors, nccl for CUDA; the others wait while the first labels or decodes
            torch.distributed.init_process_group(timeout=timedelta(days=1))
        if RANK:
            sys.stdout = open(os.devnull, "w")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # also labeling says how to go on
        main(args)
    except (UserError, OSError) as error:
        said = str(error)
        if not isinstance(error, UserError):  # a folder that may not be written, a full disk: not a fault of the code
            if error.strerror is None:
                raise
            said = f"{error.filename or 'a file'}: {error.strerror}; mend that, then go on (--resume FOLDER, or again)"
        if not RANK:
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        folder = stop.args[0] if stop.args else "FOLDER"
        if not RANK:
            said = f"stopped; training goes on with --resume {folder}, labeling with the same command again"
            print(said, file=sys.stderr)
        sys.exit(130)
    finally:
        if PROCESSES > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
