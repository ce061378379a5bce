"""What the method scripts share: data, views, backbones, evaluation, run folder.

Nothing in here knows a method: a rule with an equation, a threshold or a schedule in a paper stands
in that paper's script. Functions take values, never the scripts' `Args`, so a signature tells all.

Departures from the published code (jichan3751/zeromatch @8ca4079, "ZM"):
  C1  Index stream: endless seeded permutations, every example once a pass. ZM cuts every "epoch" of
      1,024 steps from a new permutation whose seed is the epoch number alone, equal for all runs.
  C2  Cutout: center uniform over the image, box clipped on both sides. ZM draws the center from
      U(1, width) and lets boxes at the left and top edge keep their full size, one pixel wider.
  C3  Kept as published: enhancement factors reach only 0.05-0.95 (images get duller, never more
      vivid), and every one of the three operations is always applied.
  C4  Gray images stay gray: Color leaves them as they are, and Cutout's fill is the fill's luminance.
  C5  WRN-28-2: every block's first batch-norm feeds its first convolution. In ZM's copy the one at
      the head of groups 2 and 3 feeds nothing and gets no gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# ---------------------------------------------------------------------------- presets and errors


class UserError(ValueError):
    """Something the user can mend: `cli` prints it as one line and exits with code 2."""


class Preset(NamedTuple):
    """One data set: how its images are stored and seen, and the recipe that trains on it."""

    backbone: str
    size: int  # side of the stored and seen image, pixels
    pad: int  # weak view: reflected border before the random crop, pixels; 0.125 * size as published
    flip: bool  # weak view: mirror half of the images
    mean: tuple[float, ...]  # of each channel, of values in [0, 1]
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


# fmt: off
PRESETS = {
    # backbone, size, pad, flip, mean, std | optimizer, lr, weight decay, layer decay | B, uratio, steps, of stage 1,
    # warm-up | decay of weights and of marginals, evaluate every
    "digits": Preset(
        "cnn", 8, 1, False, (0.305,), (0.376,), "sgd", 0.1, 1e-3, 1.0, 16, 4, 800, 400, 40, 0.99, 0.99, 40),
    "fashion_mnist": Preset(
        "cnn", 28, 3, True, (0.286,), (0.353,), "sgd", 0.1, 1e-3, 1.0, 16, 4, 1400, 600, 60, 0.99, 0.99, 70),
}
# fmt: on


def preset_of(dataset: str) -> Preset:
    """The row of PRESETS for a data set. Raises UserError for a name that is not there."""
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset}: expected one of {', '.join(PRESETS)}")
    return PRESETS[dataset]


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


# ---------------------------------------------------------------------------- randomness and device


def seed_step(seed: int, stage: int | str, step: int) -> None:
    """Make every random number of one step a pure function of (seed, stage, step).

    Seeds torch's global generators (all devices), which views, dropout and stochastic depth draw
    from: that is why a resumed run needs no generator state to go on bit for bit."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, number: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/order/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(n, generator=generator)


def batch_at(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Positions [batch] int64 in range(n): the step's slice of endless seeded permutations.  # C1

    Every example comes once a pass, also where a batch is larger than the set (10 labels)."""
    first, last = step * batch, (step + 1) * batch - 1
    order = [_permutation(n, seed, number) for number in range(first // n, last // n + 1)]
    return torch.cat(order)[first % n :][:batch]


def setup_device(device: str, amp: str, backbone: str) -> tuple[torch.device, torch.dtype | None]:
    """(device, autocast dtype or None) for --device auto|cpu|cuda|mps and --amp auto|bf16|fp16|off.

    auto takes the best device there is, and bfloat16 where it is native and pays: on CUDA from
    Ampere on, and for transformers on a CPU with AVX512-BF16 (small convolutions gain nothing)."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU; use --device cpu or auto")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are constant; resume is bit-exact on CPUs only
        torch.backends.cuda.matmul.allow_tf32 = True
    if amp == "fp16" and device == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    if amp == "auto":
        convolutional = backbone in ("cnn", "wrn_28_2", "efficientnet_b0")
        cpu_bf16 = not convolutional and torch.cpu._is_avx512_bf16_supported()
        cuda_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if cuda_bf16 or (device == "cpu" and cpu_bf16) else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.device(device), dtype


def check_arguments(given: dict[str, Any]) -> None:
    """Raise UserError for a number out of its range; `given` maps argument names to values."""
    ranges = {  # name: (lowest, highest, lowest and highest allowed themselves)
        "num_steps": (1, math.inf), "num_steps_stage1": (1, math.inf), "batch_size": (1, math.inf),
        "uratio": (1, math.inf),
        "warmup_steps": (0, math.inf), "log_every": (1, math.inf), "eval_every": (1, math.inf), "lr": (0, math.inf),
        "weight_decay": (0, math.inf), "layer_decay": (1e-6, 1), "ema_decay": (0, 0.999999), "marginal_decay": (0, 1),
        "tau": (0, 1), "lambda_u": (0, math.inf), "lambda_p": (0, math.inf),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if name in given and not low <= given[name] <= high:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: expected a number from {low} to {high}"
            )


# ---------------------------------------------------------------------------- data


@dataclass
class Split:
    """Examples of one part: x uint8 [N, C, H, W] (maybe a memory map), y int64 [N], -1 = unknown."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def hashes(self) -> list[bytes]:
        """One content hash an example; equal images have equal hashes."""
        return [
            hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=12).digest() for row in self.x
        ]


@dataclass
class Data:
    """A data set. `train` holds labeled and unlabeled examples; its y beyond the drawn labels is for
    monitoring only. `test` is None where the user has no test part."""

    name: str
    classes: list[str]
    train: Split
    test: Split | None

    def part(self, split: str) -> Split:
        part = self.train if split == "train" else self.test
        if part is None:
            raise UserError(f"{self.name} has no {split} part")
        return part


def load_data(dataset: str, data_dir: str) -> Data:
    """Load a data set by name, fetching it into `data_dir` where it is not found on this machine.

    Raises UserError with the address and the place for a manual copy when it cannot be fetched."""
    preset_of(dataset)
    return {"digits": load_digits, "fashion_mnist": load_fashion_mnist}[dataset](data_dir)


def load_digits(data_dir: str) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8, stored as round(value * 255 / 16).

    No split is published: a fixed permutation, the same for every run, keeps 500 of them for test."""
    from sklearn.datasets import load_digits as embedded_digits

    digits = embedded_digits()
    x = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[500:], order[:500]
    y = digits.target.astype(np.int64)
    return Data("digits", [str(d) for d in range(10)], Split(x[train], y[train]), Split(x[test], y[test]))


FASHION_CLASSES = (
    "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot".split(", ")
)
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"  # package dataset-fashion-mnist
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {  # name: md5, torchvision 0.29 datasets/mnist.py
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def load_fashion_mnist(data_dir: str) -> Data:
    """Fashion-MNIST, 60,000 + 10,000 images of 28x28, from Debian's folder or the publisher's files."""
    folder = Path(DEBIAN_FASHION)
    if not all((folder / name).exists() for name in FASHION_FILES):
        folder = Path(data_dir) / "fashion_mnist"
        for name, md5 in FASHION_FILES.items():
            fetch(FASHION_URL + name, folder / name, md5)

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    parts = [
        Split(
            read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28),
            read(f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64),
        )
        for part in ("train", "t10k")
    ]
    return Data("fashion_mnist", FASHION_CLASSES, *parts)


def fetch(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path` unless it is there; a partial or wrong file never gets that name.

    Raises UserError naming the address, the reason and where to put a manual copy."""
    if path.exists():
        return
    from torchvision.datasets.utils import download_url

    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.unlink(missing_ok=True)
        download_url(url, str(path.parent), part.name, md5)
        part.rename(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"could not fetch {url} ({error}); put the file at {path} by hand and run again"
        ) from None


def draw_labeled(y: np.ndarray, num_labels: int, num_classes: int, seed: int) -> np.ndarray:
    """Indices [num_labels] int64 of the labeled examples: num_labels / K of every class, seeded.

    Raises UserError when K does not divide num_labels or a class has too few examples."""
    if num_labels <= 0 or num_labels % num_classes:
        near = [num_classes * k for k in (1, 2, 4)]
        raise UserError(
            f"--num-labels {num_labels}: expected a positive multiple of {num_classes} (one per class), e.g. {near}"
        )
    each, rng = num_labels // num_classes, np.random.RandomState(seed)
    drawn = []
    for label in range(num_classes):
        members = np.flatnonzero(y == label)
        if len(members) < each:
            raise UserError(
                f"--num-labels {num_labels}: class {label} has {len(members)} examples, {each} wanted"
            )
        drawn.append(rng.permutation(members)[:each])
    return np.concatenate(drawn)


# ---------------------------------------------------------------------------- views
# Every image has its own random parameters: one row of uniform numbers u. Views are pure functions
# of (images, u), the only randomness being the drawing of u, on the CPU, so that they are the same
# on every device. Images are uint8 [n, C, H, W] throughout, as Pillow's are; 0 is black.


def take_pixels(x: Tensor, rows: Tensor, cols: Tensor, inside: Tensor | None = None) -> Tensor:
    """out[b, c, i, j] = x[b, c, rows[b, i, j], cols[b, i, j]], 0 where `inside` is False.

    [n, C, H, W], rows and cols broadcastable to [n, h, w] int64 -> [n, C, h, w]."""
    flat = rows * x.shape[3] + cols  # [n, h, w]
    if inside is not None:
        flat = flat.where(inside, 0)
    n, channels, (h, w) = len(x), x.shape[1], flat.shape[1:]
    out = x.flatten(2).gather(2, flat.reshape(n, 1, h * w).expand(n, channels, h * w)).view(n, channels, h, w)
    return out if inside is None else out * inside[:, None]


def crop_and_flip(x: Tensor, u: Tensor, size: int, pad: int, flip: bool) -> Tensor:
    """Reflect `pad` pixels around the image, crop size x size at a random place, mirror half of them.

    u [n, 3] in [0, 1): row, column, mirror. [n, C, H, W] -> [n, C, size, size]."""
    height, width = x.shape[2:]
    grid = torch.arange(size, device=x.device)
    top = (u[:, 0] * (height + 2 * pad - size + 1)).long() - pad
    left = (u[:, 1] * (width + 2 * pad - size + 1)).long() - pad
    rows = (top[:, None] + grid).abs()  # [n, size]; reflection at the first ...
    rows = (height - 1) - (height - 1 - rows).abs()  # ... and at the last row
    cols = (left[:, None] + grid).abs()
    cols = (width - 1) - (width - 1 - cols).abs()
    if flip:
        cols = torch.where(u[:, 2, None] < 0.5, cols.flip(1), cols)
    return take_pixels(x, rows[:, :, None], cols[:, None, :])


def luminance(x: Tensor) -> Tensor:
    """Pillow's gray value (R*19595 + G*38470 + B*7471 + 2^15) / 2^16, [n, C, H, W] -> [n, 1, H, W] uint8."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.int().unbind(dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) >> 16).to(torch.uint8)[:, None]


def blend(base: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """base + v * (x - base), cut to an integer as Pillow does; v [n] in [0, 1]."""
    base = base.float()
    return (base + v[:, None, None, None] * (x.float() - base)).clamp_(0, 255).to(torch.uint8)


def auto_contrast(x: Tensor) -> Tensor:
    """Stretch every channel to 0 ... 255; a flat channel stays."""
    low, high = x.float().flatten(2).aminmax(dim=2)  # [n, C]
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1)[..., None, None]
    low = torch.where(high > low, low, 0)[..., None, None]
    return ((x.float() - low) * scale + 1e-4).clamp_(0, 255).to(torch.uint8)


def equalize(x: Tensor) -> Tensor:
    """Level every channel's histogram by Pillow's integer rule; a channel of one value stays."""
    flat = x.flatten(0, 1).flatten(1).long()  # [n * C, H * W]
    count = flat.new_zeros(len(flat), 256).scatter_add_(1, flat, torch.ones_like(flat))
    step = (flat.shape[1] - count.gather(1, flat.amax(dim=1, keepdim=True))) // 255
    below = count.cumsum(dim=1) - count
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(x)


def smooth(x: Tensor) -> Tensor:
    """Filter by [1 1 1; 1 5 1; 1 1 1] / 13, rounded; the border stays as it is."""
    out = x.clone()
    inner = F.avg_pool2d(x.float(), 3, 1) * (9 / 13) + x[:, :, 1:-1, 1:-1] * (4 / 13)
    out[:, :, 1:-1, 1:-1] = (inner + 0.5 + 1e-4).to(torch.uint8)
    return out


def mean_gray(x: Tensor) -> Tensor:
    """Every image's mean luminance, rounded. [n, C, H, W] -> [n, 1, 1, 1]."""
    return (luminance(x).float().mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()


def posterize(x: Tensor, v: Tensor) -> Tensor:
    """Keep the int(v) highest bits."""
    low = 8 - v.long()
    return x & (255 >> low << low).to(torch.uint8)[:, None, None, None]


def affine(x: Tensor, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Tensor:
    """Pillow's AFFINE with nearest neighbor and black fill: out(x, y) = in(ax + by + c, dx + ey + f).

    Coordinates are of pixel centers; the six coefficients are [n] tensors or numbers."""
    height, width = x.shape[2:]
    a, b, c, d, e, f = (torch.as_tensor(k, device=x.device).view(-1, 1, 1) for k in (a, b, c, d, e, f))
    i = torch.arange(height, device=x.device)[:, None] + 0.5
    j = torch.arange(width, device=x.device) + 0.5
    cols, rows = (a * j + b * i + c).floor().long(), (d * j + e * i + f).floor().long()
    inside = (cols >= 0) & (cols < width) & (rows >= 0) & (rows < height)
    return take_pixels(x, rows, cols, inside.expand(len(x), -1, -1))


def rotate(x: Tensor, v: Tensor) -> Tensor:
    """Rotate by v degrees counter-clockwise around the middle."""
    cy, cx = (side / 2 for side in x.shape[2:])
    cos, sin = (v * (math.pi / 180)).cos(), (v * (math.pi / 180)).sin()
    return affine(x, cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)


# Lowest and highest v of the 14 operations, ZM semilearn/datasets/augmentation/randaugment.py.  # C3
RAND_AUGMENT: dict[str, tuple[float, float, Callable[[Tensor, Tensor], Tensor]]] = {
    "AutoContrast": (0, 1, lambda x, v: auto_contrast(x)),
    "Brightness": (0.05, 0.95, lambda x, v: blend(torch.zeros_like(x), x, v)),
    "Color": (0.05, 0.95, lambda x, v: blend(luminance(x), x, v)),  # C4
    "Contrast": (0.05, 0.95, lambda x, v: blend(mean_gray(x), x, v)),
    "Equalize": (0, 1, lambda x, v: equalize(x)),
    "Identity": (0, 1, lambda x, v: x),
    "Posterize": (4, 8, posterize),
    "Rotate": (-30, 30, rotate),
    "Sharpness": (0.05, 0.95, lambda x, v: blend(smooth(x), x, v)),
    "ShearX": (-0.3, 0.3, lambda x, v: affine(x, 1, v, 0, 0, 1, 0)),
    "ShearY": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, 0, v, 1, 0)),
    "Solarize": (0, 256, lambda x, v: torch.where(x < v[:, None, None, None], x, 255 - x)),
    "TranslateX": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, v * x.shape[3], 0, 1, 0)),
    "TranslateY": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, 0, 0, 1, v * x.shape[2])),
}


def rand_augment(x: Tensor, u: Tensor) -> Tensor:
    """Three operations an image, drawn with replacement, v uniform in the operation's range.

    u [n, 3, 2] in [0, 1) on the CPU: (operation, v) of each round. [n, C, H, W] -> the same."""
    x = x.clone()
    for round_u in u.unbind(dim=1):
        chosen = (round_u[:, 0] * len(RAND_AUGMENT)).long()
        for number, (low, high, operation) in enumerate(RAND_AUGMENT.values()):
            members = (chosen == number).nonzero().squeeze(1)  # on the CPU: no GPU waits for it
            if len(members):
                v = (low + (high - low) * round_u[members, 1]).to(x.device)
                members = members.to(x.device)
                x[members] = operation(x[members], v)
    return x


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
    return torch.where((i[:, :, None] & j[:, None, :])[:, None], fill, x)


WEAK_DRAWS, STRONG_DRAWS = 3, 3 + 2 * 3 + 3  # numbers u an image


def weak_augment(x: Tensor, u: Tensor, size: int, pad: int, flip: bool) -> Tensor:
    """The weak view: random crop of the reflected image, random mirror. u [n, WEAK_DRAWS] in [0, 1)."""
    return crop_and_flip(x, u.to(x.device), size, pad, flip)


def strong_augment(x: Tensor, u: Tensor, size: int, pad: int, flip: bool) -> Tensor:
    """The strong view: crop and mirror like the weak one, RandAugment, Cutout. u [n, STRONG_DRAWS], CPU."""
    u_crop, u_operations, u_cutout = u.split([3, 6, 3], dim=1)
    x = crop_and_flip(x, u_crop.to(x.device), size, pad, flip)
    x = rand_augment(x, u_operations.unflatten(1, (3, 2)))
    return cutout(x, u_cutout.to(x.device))


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
            return self.x[idx.to(self.device)]
        return torch.from_numpy(self.x[idx.numpy()]).to(self.device, non_blocking=True)

    def normalize(self, x: Tensor) -> Tensor:
        return ((x.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def weak(self, idx: Tensor) -> Tensor:
        u = torch.rand(len(idx), WEAK_DRAWS)
        return self.normalize(weak_augment(self.pixels(idx), u, self.size, self.pad, self.flip))

    def strong(self, idx: Tensor) -> Tensor:
        u = torch.rand(len(idx), STRONG_DRAWS)
        return self.normalize(strong_augment(self.pixels(idx), u, self.size, self.pad, self.flip))

    def plain(self, idx: Tensor) -> Tensor:
        return self.normalize(self.pixels(idx))


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
        self.blocks = nn.Sequential(
            *[
                WideBlock(
                    c_in if depth == 0 else c_out,
                    c_out,
                    stride if depth == 0 else 1,
                    c_in == 16 and depth == 0,
                )
                for c_in, c_out, stride in ((16, 32, 1), (32, 64, 2), (64, 128, 2))
                for depth in range(4)
            ]
        )
        self.bn = nn.BatchNorm2d(128, momentum=0.001)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.blocks(self.conv1(x))), 0.1).mean(dim=(2, 3))


class Student(nn.Module):
    """Encoder + main head + (after `add_kd_head`) auxiliary distillation head.

    forward: batch, extra inputs of the heads [n, num_extra] or None
    -> (logits [n, K], logits_kd [n, K] or None, features [n, D])."""

    def __init__(self, encoder: nn.Module, num_classes: int, num_extra: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features + num_extra, num_classes)
        self.kd_head: nn.Module | None = None

    def add_kd_head(self) -> None:
        """A new, randomly started copy of the main head's architecture."""
        self.kd_head = copy.deepcopy(self.head)
        for module in self.kd_head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        features = self.encoder(x)
        if extra is not None:
            features = torch.cat([features, extra.to(features)], dim=1)
        return self.head(features), None if self.kd_head is None else self.kd_head(features), features


def build_student(backbone: str, channels: int, size: int, num_classes: int, num_extra: int = 0) -> Student:
    """A student for images of `channels` x `size` x `size`; the caller seeds torch first."""
    if backbone == "cnn":
        return Student(SmallCNN(channels, size), num_classes, num_extra)
    if backbone == "wrn_28_2":
        return Student(WideResNet(channels), num_classes, num_extra)
    raise UserError(f"--backbone {backbone}: expected cnn or wrn_28_2")


def param_groups(
    student: nn.Module, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: no decay for 1-D tensors (biases, norms), as ZM semilearn/nets/utils.py.

    Every group carries `lr_scale`, which the learning rate of a step is multiplied with."""
    decay = [p for p in student.parameters() if p.ndim > 1]
    no_decay = [p for p in student.parameters() if p.ndim <= 1]
    return [
        {"params": decay, "weight_decay": weight_decay, "lr": lr, "lr_scale": 1.0},
        {"params": no_decay, "weight_decay": 0.0, "lr": lr, "lr_scale": 1.0},
    ]


def build_optimizer(
    student: nn.Module, name: str, lr: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999) or SGD with Nesterov momentum 0.9 over `param_groups`."""
    groups = param_groups(student, lr, weight_decay, layer_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


class Unaveraged:
    """Stands where weights are not averaged: the trained network itself is evaluated."""

    def __init__(self, student: nn.Module) -> None:
        self.module = student

    def update_parameters(self, student: nn.Module) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to do."""


def averaged_copy(student: nn.Module, decay: float) -> AveragedModel | Unaveraged:
    """weights <- decay * weights + (1 - decay) * student's, batch statistics included; the first
    update copies. `.module` is the network to evaluate; with decay 0 it is the student itself."""
    if decay == 0:
        return Unaveraged(student)
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def predict(
    student: nn.Module, views: Views, autocast: Any = nullcontext, extra: Tensor | None = None, batch: int = 500
) -> Tensor:
    """Class probabilities [N, K] float32 of the main head on the plain view of every example, on the CPU."""
    student.eval()
    probs = []
    for idx in torch.arange(len(views)).split(batch):
        with autocast():
            logits, _, _ = student(views.plain(idx), None if extra is None else extra[idx])
        probs.append(logits.float().softmax(dim=1).cpu())
    return torch.cat(probs)


def accuracy(probs: Tensor, y: Tensor) -> float:
    """Share of rows whose largest probability is at y, in percent."""
    return 100 * (probs.argmax(dim=1) == y.cpu()).float().mean().item()


def pseudo_label_accuracy(pseudo_label: Tensor, mask: Tensor, y_true: Tensor) -> dict[str, Tensor]:
    """Monitoring: percent right of all pseudo-labels and of those that count, NaN where there is none.

    [B_u] int64, [B_u] 0/1, [B_u] int64 (-1: truth unknown, left out)."""
    known = (y_true >= 0).float()
    right = 100 * (pseudo_label == y_true).float()
    return {
        "pl_acc": (right * known).sum() / known.sum(),
        "pl_acc_masked": (right * known * mask).sum() / (known * mask).sum(),
    }


# ---------------------------------------------------------------------------- run folder


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
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device, self.dtype, self.signal = device, dtype, 0
        self.pending: list[dict[str, Any]] = []  # scalars of the steps since the last line
        self.history: list[list[float]] = []  # [stage, steps done, test accuracy] of every evaluation
        self.state: dict[str, Any] = {"stage": 0, "step": 0, "seconds": 0.0}
        if (self.folder / "checkpoint.pt").exists():
            self.state = torch.load(self.folder / "checkpoint.pt", map_location=device, weights_only=True)
            self.history, self.pending = self.state["history"], self.state["pending"]
        if not resume:
            self.write_json("args.json", args)
        self.write_json("env.json", environment(device))
        self._drop_metrics_after(self.state["stage"], self.state["step"])
        self.metrics = open(self.folder / "metrics.jsonl", "a")
        self.start = self.saved = self.mark = time.perf_counter()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note_signal)

    def _drop_metrics_after(self, stage: int, step: int) -> None:
        """Forget what was logged beyond the checkpoint (it will come again) and a torn last line."""
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(row) for row in path.read_text().split("\n")[:-1]] if path.exists() else []
        rows = [row for row in rows if (row["stage"], row["step"]) <= (stage, step)]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _note_signal(self, number: int, frame: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self.signal = number

    def write_json(self, name: str, content: Any) -> None:
        write_atomically(self.folder / name, (json.dumps(content, indent=2) + "\n").encode())

    def describe(self, data: Data, labeled: np.ndarray, args: dict[str, Any]) -> None:
        """Print what will be done: versions, split, settings, plan in steps and passes; keep the labeled positions."""
        n, labels = len(data.train), len(labeled)
        steps, batch, uratio = args["num_steps"], args["batch_size"], args["uratio"]
        settings = "  ".join(f"{name} {value}" for name, value in args.items() if value is not None)
        print(f"torch {torch.__version__} on {self.device}, autocast {self.dtype or 'off'}, run folder {self.folder}")
        print(f"{labels} labeled, {n} unlabeled (labeled included), {len(data.test)} test, {len(data.classes)} classes")
        print(f"plan: {steps} steps x ({batch} labeled + {uratio * batch} unlabeled): ", end="")
        print(f"{steps * batch / labels:.0f} passes over the labels, {steps * uratio * batch / n:.1f} over the pool")
        print(settings)
        write_atomically(self.folder / "labeled_idx.txt", "".join(f"{i}\n" for i in labeled).encode())

    def autocast(self) -> Any:
        """Context of the forward pass. Losses stay outside: a bfloat16 0.949 passes a 0.95 threshold."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in float16 only; a disabled scaler's calls do nothing else."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def restore(self, stage: int, parts: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(first step, state): the checkpoint's if it was written in this stage, else (0, {})."""
        self.mark = time.perf_counter()
        if self.state["stage"] != stage:
            return 0, {}
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        print(f"going on in stage {stage} after step {self.state['step']}")
        return self.state["step"], self.state

    def log(self, stage: int, step: int, num_steps: int, log_every: int, line: str, **values: Any) -> None:
        """Keep one step's scalars; every `log_every` steps write their means and print them as `line`.

        A mean leaves out NaN (a rate without a single case) except in a loss: Raises UserError
        naming the first loss and step that were not finite."""
        self.pending.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()})
        if (step + 1) % log_every and step + 1 < num_steps:
            return
        rate = len(self.pending) / (time.perf_counter() - self.mark)
        means = self._means(stage, step)
        self._write(
            stage, step, {f"train/{name}": mean for name, mean in means.items()} | {"time/step_per_s": rate}
        )
        left = f"{rate:.3g} step/s, {(num_steps - step - 1) / rate:.0f} s left"
        print(f"stage {stage} step {step + 1}/{num_steps} | {line.format(**means)} | {left}", flush=True)
        self.pending, self.mark = [], time.perf_counter()

    def _means(self, stage: int, step: int) -> dict[str, float]:
        names = list(self.pending[0])
        rows = [[torch.as_tensor(row[name], device=self.device).float() for name in names] for row in self.pending]
        table = torch.stack([torch.stack(row) for row in rows]).cpu()  # [steps, names]
        for name, column in zip(names, table.unbind(dim=1), strict=True):
            bad = (~column.isfinite()).nonzero()
            if name.startswith("loss") and len(bad):
                at = step + 2 - len(rows) + int(bad[0])
                raise UserError(
                    f"{name} became {column[bad[0]].item():g} at stage {stage} step {at}; try a lower --lr, --amp off "
                    f"(the last good checkpoint stays in {self.folder})"
                )
        return dict(zip(names, table.nanmean(dim=0).tolist(), strict=True))

    def evaluated(self, stage: int, step: int, acc: float) -> None:
        """Write one test accuracy in percent; `result_of` reports from all of them."""
        self.history.append([stage, step + 1, acc])
        self._write(stage, step, {"test/acc": acc, "time/hours": self.seconds() / 3600})
        print(f"stage {stage} step {step + 1} | test/acc {acc:.2f}", flush=True)

    def _write(self, stage: int, step: int, row: dict[str, float]) -> None:
        row = {"stage": stage, "step": step + 1} | {
            name: None if math.isnan(v) else v for name, v in row.items()
        }
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()

    def seconds(self) -> float:
        """Running time of all sessions of this run."""
        return self.state["seconds"] + time.perf_counter() - self.start

    def save_due(self) -> bool:
        """Between evaluations: on a signal, and every ten minutes, so that little is ever lost."""
        return bool(self.signal) or time.perf_counter() - self.saved > 600

    def save(self, stage: int, step: int, parts: dict[str, Any], **state: Any) -> None:
        """Replace checkpoint.pt by the state_dicts of `parts` and `state`: tensors and plain Python only.

        After a signal it ends the run (KeyboardInterrupt). Raises UserError when the disk is full,
        with the previous checkpoint still there."""
        if self.pending:
            self._means(stage, step)  # raises: a run that has diverged is never saved
        pending = [{name: float(value) for name, value in row.items()} for row in self.pending]
        state |= {name: part.state_dict() for name, part in parts.items()}
        state |= {"stage": stage, "step": step + 1, "seconds": self.seconds()}
        state |= {"history": self.history, "pending": pending}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.saved = self.mark = time.perf_counter()
        if self.signal:
            raise KeyboardInterrupt

    def result(self, stage: int) -> dict[str, float | None]:
        """The reported figures of a stage, percent: last evaluation and median of the last 20, never the best."""
        accs = [acc for at, _, acc in self.history if at == stage]
        last, median = (accs[-1], float(np.median(accs[-20:]))) if accs else (None, None)
        return {"test_acc": last, "test_acc_median20": median, "seconds": self.seconds()}


def write_atomically(path: Path, content: Any) -> None:
    """Write to a temporary name, flush to disk, rename: `path` is the old file or the new, never half.

    Raises UserError when the disk does not take it."""
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
            f"could not write {path} ({error.strerror}); what was saved before is untouched: make room, then --resume"
        ) from None


def environment(device: torch.device) -> dict[str, Any]:
    """What is needed to repeat a run: command, versions, device, commit of the code."""
    git = (
        subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip() or None if git else None,
    }


def student_config(
    dataset: str, backbone: str, preset: Preset, classes: list[str], num_extra: int = 0
) -> dict[str, Any]:
    """What it takes to use a student elsewhere: architecture, class names in order, preprocessing."""
    return {
        "dataset": dataset, "backbone": backbone, "classes": classes, "num_extra": num_extra,
        "size": preset.size, "mean": preset.mean, "std": preset.std,
    }  # fmt: skip


def save_student(folder: Path, student: nn.Module, config: dict[str, Any]) -> None:
    """Encoder and main head as `model.safetensors`, with `config.json` beside it."""
    from safetensors.torch import save

    folder.mkdir(exist_ok=True)
    weights = {k: v.contiguous() for k, v in student.state_dict().items() if not k.startswith("kd_head.")}
    write_atomically(folder / "model.safetensors", save(weights))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_student(folder: str | Path) -> tuple[Student, dict[str, Any]]:
    """(student in eval mode, config) of a folder written by `save_student`."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    channels, num_classes = len(config["mean"]), len(config["classes"])
    student = build_student(config["backbone"], channels, config["size"], num_classes, config["num_extra"])
    student.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return student.eval(), config


def cli(args_type: type, main: Callable[[Any], Any]) -> None:
    """Parse the command line into `args_type` and call `main`.

    With --resume, what the run was started with is the default and may not be changed. Exit
    codes: 0 done, 2 the user can mend it (one line on standard error), 130 stopped by a signal."""
    import tyro

    about = sys.modules["__main__"].__doc__
    try:
        args = tyro.cli(args_type, description=about)
        if getattr(args, "resume", None):
            path = Path(args.resume) / "args.json"
            if not path.exists():
                raise UserError(
                    f"--resume {args.resume}: there is no args.json; expected the folder of a run, e.g. runs/NAME"
                )
            saved = args_type(**json.loads(path.read_text()) | {"resume": args.resume})
            args = tyro.cli(args_type, default=saved, description=about)
            for field in dataclasses.fields(args_type):
                was, now = getattr(saved, field.name), getattr(args, field.name)
                if was != now and field.name not in ("data_dir", "runs_dir", "device"):
                    flag = "--" + field.name.replace("_", "-")
                    raise UserError(
                        f"{flag} {now}: the run to resume has {was}; leave the flag out or start a new run"
                    )
        main(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; --resume with the run's folder goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)
