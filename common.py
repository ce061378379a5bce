"""What the three method scripts share: data, views, backbones, evaluation, run folder.

What a paper defines is in that paper's script. Functions take values, never the scripts' `Args`;
they raise UserError, with advice, for what a user can fix.

Departures from the published code (jichan3751/zeromatch @8ca4079, "ZM"):
  C1  Batches are slices of endless seeded permutations; ZM's "epochs" are parts of seeded ones.
  C2  Cutout: centers are uniform, boxes clipped on all sides. ZM draws centers from U(1, width).
  C3  As published: enhancement factors are 0.05-0.95 (duller only); all three operations apply.
  C4  Gray images stay gray: Color leaves them alone, Cutout fills with its color's luminance.
  C5  WRN-28-2: each block's first norm feeds its first convolution. In ZM's copy, those at the head
      of groups 2 and 3 feed nothing; its stem has a bias, its last norm eps 0.001, its head Xavier.
  C6  SVHN is not mirrored (ZM mirrors digits). EuroSAT is also turned upside down, as published.
  C7  Each CPU process has its own batch statistics; all draw the same crops of unpadded images.
  C8  The decay of averages ramps up, for short runs. WRN's norms: momentum 0.1 (ZM: 0.001).
  T1  Text features average a row's own tokens. ZM's include padding: they depend on the batch.
  T2  A text is title, space, body, with escaped newlines decoded. ZM joins them without the space,
      keeps the escapes, drops Yahoo's last character. Both drop Yahoo's best answer.
  T3  The draw of rows is seeded and without test texts. Both keep a text's last 1,024 characters.
  T4  Texts without back-translations: the strong view deletes, masks and swaps tokens.
"""

from __future__ import annotations

import copy
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache, partial
from importlib import import_module
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import snapshot_download
from numpy import ndarray
from numpy.random import RandomState
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision import datasets
from torchvision.models import VisionTransformer, efficientnet_b0
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import Conv2dNormActivation, StochasticDepth
from torchvision.transforms.v2 import RandomResizedCrop, functional
from tqdm import tqdm

csv.field_size_limit(2**31 - 1)  # texts may be long

# ---------------------------------------------------------------------------- presets and errors


class UserError(ValueError):
    """`cli` prints it as one line and exits with code 2."""


TEXTS, LABELS = "text,ori,sentence,image,file", "label,category,class,target"  # usual columns


class Preset(NamedTuple):
    """Look and recipe of a data set. Defaults: cifar100's (ZM config/usb_cv_paper)."""

    backbone: str = "vit_small_patch2_32"
    size: int = 32  # side of the image the network sees, pixels; texts: longest row, tokens
    pad: int = 4  # reflected border before the random crop; 0: crop an image stored at size / 0.875
    flip: int = 1  # 0: none, 1: mirror half of the images, 2: also turn half of them upside down
    mean: tuple = (129.3 / 255, 124.1 / 255, 112.4 / 255)  # per channel, of values in [0, 1]
    std: tuple = (68.2 / 255, 65.4 / 255, 70.4 / 255)  # mean and std of texts: ()
    optimizer: str = "adamw"  # or "sgd" (Nesterov momentum 0.9)
    lr: float = 5e-4  # peak
    weight_decay: float = 5e-4
    layer_decay: float = 0.5  # learning-rate factor from one layer to the one below it
    batch_size: int = 16  # B, labeled examples a step
    uratio: int = 1  # unlabeled examples per labeled one
    num_steps_stage1: int = 204_800
    num_steps: int = 204_800  # of stage 2, and of methods with a single stage
    warmup_steps: int = 5_120
    ema_decay: float = 0.0  # of the evaluated weights; 0: evaluate the trained weights themselves
    marginal_decay: float = 0.999  # of the class marginals p_lb and p_ulb
    eval_every: int = 2_048
    num_labels: int = 0  # 0: all with a known label
    columns: tuple = (TEXTS, LABELS)  # of own tables


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CNN = {  # small images on a CPU: chosen on digits with 10 labels, seeds 100-109
    "backbone": "cnn", "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3, "layer_decay": 1.0,
    "uratio": 4, "num_steps_stage1": 600, "num_steps": 1400, "warmup_steps": 60,
    "ema_decay": 0.99, "marginal_decay": 0.99, "eval_every": 70,
}  # fmt: skip
FLOWERS102 = Preset(  # ZM config/usb_cv_framed_paper, for resisc45 too
    backbone="vit_small_patch16_224", size=224, pad=0, **IMAGENET, lr=1e-4, layer_decay=0.65,
    num_steps_stage1=102_400, num_steps=102_400, warmup_steps=2_560, eval_every=1_024,
)  # fmt: skip
AG_NEWS = Preset(  # ZM config/usb_nlp_paper
    backbone="bert-base-uncased", size=512, pad=0, flip=0, mean=(), std=(), batch_size=4,
    lr=5e-5, weight_decay=1e-4, layer_decay=0.65, num_steps_stage1=102_400, num_steps=102_400,
)  # fmt: skip
CLASSIC = {  # wrn_28_2 for a ViT: FixMatch (CIFAR-100: WRN-28-8), USB classic_cv; stage 1: ours
    "backbone": "wrn_28_2", "optimizer": "sgd", "lr": 0.03, "layer_decay": 1.0, "batch_size": 64,
    "uratio": 7, "num_steps_stage1": 2**18, "num_steps": 2**20, "warmup_steps": 0,
    "ema_decay": 0.999, "eval_every": 5_120,
}  # fmt: skip
PRESETS = {
    "digits": Preset(**CNN | {"num_steps_stage1": 400, "num_steps": 800, "warmup_steps": 40,
        "eval_every": 40}, size=8, pad=1, flip=0, mean=(0.305,), std=(0.376,), num_labels=10),
    "fashion_mnist": Preset(**CNN, size=28, pad=3, mean=(0.286,), std=(0.353,), num_labels=100),
    "cifar10": Preset(**IMAGENET, num_labels=40),
    "cifar100": Preset(num_labels=100),
    "svhn": Preset(flip=0, mean=(0.438, 0.444, 0.473), std=(0.1751, 0.1771, 0.1744), num_labels=40),
    "eurosat": Preset(  # learning rates: USB
        flip=2, mean=(0.5,) * 3, std=(0.5,) * 3, lr=5e-5, layer_decay=1.0, num_labels=20),
    "stl10": FLOWERS102._replace(
        size=96, pad=12, num_labels=40,
        mean=(112.4 / 255, 109.1 / 255, 98.6 / 255), std=(68.4 / 255, 66.6 / 255, 68.5 / 255)),
    "flowers102": FLOWERS102._replace(num_labels=204),
    "resisc45": FLOWERS102._replace(num_labels=90),
    "food101": FLOWERS102._replace(
        backbone="efficientnet_b0", lr=3e-4, layer_decay=1.0, uratio=3, num_steps_stage1=25_600,
        ema_decay=0.999, num_labels=1_010),
    "ag_news": AG_NEWS._replace(num_labels=40),
    "yahoo_answers": AG_NEWS._replace(lr=1e-4, num_labels=250),
    "amazon_review": AG_NEWS._replace(lr=1e-5, layer_decay=0.75, num_labels=250),
}  # fmt: skip
SHORT = {"num_steps_stage1": 1000, "num_steps": 2000, "warmup_steps": 100, "eval_every": 100}
OWN = {
    "texts": AG_NEWS._replace(batch_size=8, uratio=2, marginal_decay=0.99, **SHORT),
    "pictures": Preset(**CNN, **IMAGENET),
    "photos": FLOWERS102._replace(marginal_decay=0.99, **SHORT),
}


def preset_of(dataset: str, backbone=None, size=None, columns: tuple = (TEXTS, LABELS)) -> Preset:
    """A data set's recipe, that of cnn or wrn_28_2 where one replaces a ViT; own data at `size`."""
    if dataset in PRESETS:
        preset = PRESETS[dataset]
        if size not in (None, preset.size):
            raise UserError(f"--size is for own data; {dataset} uses {preset.size}")
        decay = {"weight_decay": 1e-3 if dataset == "cifar100" else 5e-4}
        instead = {"cnn": CNN, "wrn_28_2": CLASSIC | decay} if "vit" in preset.backbone else {}
        return preset._replace(**instead.get(backbone, {}))
    table = dataset.endswith((".csv", ".tsv", ".jsonl"))
    if not table and not Path(dataset).is_dir():
        own = "or a folder with pictures in train/<class>/, or a .csv or .jsonl file"
        raise UserError(f"--dataset {dataset}: expected {', '.join(PRESETS)}, {own}")
    if table and read_own(dataset, "train", columns).files is None:
        preset = OWN["texts"]
    elif backbone in (None, "cnn", "wrn_28_2"):
        preset = OWN["pictures"]
    else:
        side = 32 if backbone == "vit_small_patch2_32" else 224
        preset = OWN["photos"]._replace(ema_decay=0.999 if backbone == "efficientnet_b0" else 0.0)
        if backbone not in [*NAMES, "a teacher"]:  # what it was trained with
            config = load_pretrained("AutoConfig", backbone)
            side = getattr(getattr(config, "vision_config", config), "image_size", 224)
            with suppress(Exception):  # it may have no image processor
                reader = load_pretrained("AutoImageProcessor", backbone)
                side = [*dict(reader.crop_size or reader.size).values()]
                preset = preset._replace(mean=tuple(reader.image_mean), std=tuple(reader.image_std))
        preset = preset._replace(size=int(np.max(side)))
    size = size or preset.size
    pad = size // 8 if preset.mean and size < 128 else 0
    return preset._replace(size=size, pad=pad, columns=columns)


def resolve(given: dict, preset: Preset) -> dict:
    """Arguments with the preset's value for every None (--num-steps scales others), checked."""
    row, factor = preset._asdict(), (given["num_steps"] or preset.num_steps) / preset.num_steps
    for name, least in (("num_steps_stage1", 1), ("warmup_steps", 0), ("eval_every", 10)):
        row[name] = max(least, round(row[name] * factor))
    args = {name: row.get(name) if value is None else value for name, value in given.items()}
    args |= {"layer_decay": 0.0} if given.get("freeze") else {}  # 0: the encoder learns nothing
    ranges = {  # names: (lowest, highest)
        "num_steps num_steps_stage1 batch_size uratio log_every eval_every": (1, 2**32 - 1),
        "seed lr weight_decay lambda_u lambda_p sce_alpha sce_beta": (0, 2**32 - 1),
        "tau tau_select tau_inner marginal_decay layer_decay": (0, 1),
        "ema_decay": (0, 0.999999),
        "warmup_steps": (0, args["num_steps"]),
        "size": (8, 2**16),
    }
    for names, (low, high) in ranges.items():
        for name in args.keys() & names.split():
            if not low <= args[name] <= high:  # also refuses NaN
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {args[name]}: expected a number from {low} to {high}")
    if args["batch_size"] % PROCESSES:
        raise UserError(f"--batch-size: expected a multiple of {PROCESSES}, the processes")
    return args


# ---------------------------------------------------------------------------- randomness, device
# Under torchrun every process computes its rows of the same batch and repeats everything else.

TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, PROCESSES = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None, "auto": None}


def content_hash(content: bytes, size: int = 12) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def seed_of(*key: Any) -> int:
    """63 bits for each key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, stage: str, step: int) -> None:
    """Make all random numbers of a step (views, dropout) a pure function of (seed, stage, step)."""
    torch.manual_seed(seed_of(seed, stage, step))


@lru_cache(maxsize=8)
def permutation(n: int, *key: Any) -> Tensor:
    """The order [n] of one pass over n examples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*key)))


def batch_at(n: int, batch: int, seed: int, stream: str, step: int) -> Tensor:
    """This process's positions [batch / PROCESSES] in range(n) of a step's batch.  # C1"""
    rows = batch // PROCESSES
    first = step * batch + RANK * rows
    passes = range(first // n, (first + rows - 1) // n + 1)
    orders = [permutation(n, seed, stream, number) for number in passes]
    return torch.cat(orders)[first % n :][:rows]


def uniform(n: int, *shape: int) -> Tensor:
    """Numbers [n, *shape] in [0, 1) for this process's rows, as one process draws them."""
    return torch.rand(PROCESSES * n, *shape)[RANK * n :][:n]


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of x over all processes, without gradient."""
    total = x.detach().clone()
    if PROCESSES > 1:
        torch.distributed.all_reduce(total)
    return total / PROCESSES


def from_first_process(value: Any) -> Any:
    """Process 0's value (any picklable object), in every process."""
    values = [value]
    if PROCESSES > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block first; the others then find its files. Also a decorator."""
    if RANK:
        from_first_process(None)
    yield
    if not RANK:
        from_first_process(None)


def data_parallel(student: nn.Module) -> nn.Module:
    """What the loop calls: the student; under torchrun, wrapped to average gradients.  # C7"""
    if PROCESSES == 1:
        return student
    if next(student.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(student)  # in place; parameters stay the same
    return nn.parallel.DistributedDataParallel(student, static_graph=True)  # allows idle weights


def setup_device(device: str, amp: str, backbone: str) -> tuple[torch.device, torch.dtype | None]:
    """(device, autocast dtype or None). auto: the accelerator; bfloat16 and TF32 if supported."""
    found, native = "cpu", False
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator().type
    device = found if device == "auto" else device
    if device not in ("cpu", found):
        raise UserError(f"--device {device}: torch finds no such device; use --device cpu or auto")
    if device == "cpu" and backbone == "cnn" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # with more, threads wait for each other at each step
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, amp != "off"
        torch.set_float32_matmul_precision("highest" if amp == "off" else "high")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device), AMP["bf16" if amp == "auto" and native else amp]


# ---------------------------------------------------------------------------- data


@dataclass
class Split:
    """x: images uint8 [N, C, H, W] or texts [N]. y: int64 [N], -1: unknown. files, keys [N]: names
    of pictures, hashes of their full pixels. aug [N, 1 or 2]: back-translations of texts."""

    x: ndarray
    y: ndarray
    files: ndarray | None = None
    keys: ndarray | None = None
    aug: ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_text(self) -> bool:
        return self.x.ndim == 1

    def hashes(self) -> list[str]:
        """One content hash per example; equal images or texts have equal hashes."""
        if self.keys is not None:
            return self.keys.tolist()
        return [content_hash(x.encode() if self.is_text else x.tobytes()) for x in self.x]

    def take(self, idx: ndarray) -> Split:
        """The examples at positions idx."""
        columns = vars(self).values()
        return Split(*(None if column is None else column[idx] for column in columns))


@dataclass
class Data:
    """Of the labels in `train`, only the drawn ones reach training. test: None if there is none."""

    name: str
    classes: list[str]
    train: Split
    test: Split | None

    def part(self, split: str) -> Split:
        """The part called train or test."""
        if (part := getattr(self, split)) is None:
            raise UserError(f"{self.name} has no {split} part")
        return part


@first_process_first()
def load_data(dataset: str, data_dir: str, test_file=None, preset: Any = None) -> Data:
    """A published data set (downloaded into `data_dir` if needed) or own pictures or texts."""
    preset = preset or preset_of(dataset, "a teacher")  # large pictures
    if dataset not in PRESETS and (not test_file or Path(dataset).is_file()):
        return load_own(dataset, test_file, data_dir, preset)
    if Path(dataset).is_dir():
        print(f"--dataset {dataset} is the published set; for your folder, write ./{dataset}")
    if test_file:
        raise UserError(f"--test-file goes with a file of texts; {dataset} has its own test part")
    if dataset == "digits":  # scikit-learn's 1,797, 8 x 8; a fixed 500 are for test
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = np.rint(x * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        whole, order = Split(x, y), RandomState(0).permutation(len(x))
        return Data(dataset, list("0123456789"), whole.take(order[500:]), whole.take(order[:500]))
    load = load_text_set if dataset in TEXT_SETS else load_images
    where = Path(data_dir, dataset if dataset in TEXT_SETS else "")
    advice = f"check the network, or put its files into {where} (delete damaged ones)"
    with explained(f"{dataset} could not be downloaded or read", advice):
        return load(dataset, where, preset)


TORCHVISION = {  # class in torchvision.datasets; what makes up its training part | test part
    "fashion_mnist": ("FashionMNIST", [True], [False]),  # 60,000 | 10,000
    "cifar10": ("CIFAR10", [True], [False]),  # 50,000 | 10,000
    "cifar100": ("CIFAR100", [True], [False]),  # 50,000 | 10,000, fine labels
    "svhn": ("SVHN", ["train", "extra"], ["test"]),  # 604,388 | 26,032
    "stl10": ("STL10", ["train+unlabeled"], ["test"]),  # 5,000 labeled + 100,000 | 8,000
    "food101": ("Food101", ["train"], ["test"]),  # 75,750 | 25,250
    "flowers102": ("Flowers102", ["train", "val"], ["test"]),  # 2,040 | 6,149
}


def load_images(dataset: str, root: Path, preset: Preset) -> Data:
    """A published set of images, read by torchvision; picture files are decoded once."""
    if dataset in TORCHVISION:
        name, *parts = TORCHVISION[dataset]
        kind = getattr(datasets, name)
        parts = [[kind(root, value, download=True) for value in part] for part in parts]
        classes = getattr(parts[0][0], "classes", list("0123456789"))  # SVHN names none
        train, test = map(images_of, parts)
    else:
        found, held = satellite_pictures(dataset, root)
        classes = [re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in found.classes]
        train, test = images_of([found]).take(~held), images_of([found]).take(held)
    if train.x.ndim == 1:
        store = f"{root}/decoded/{dataset}"
        train, test = decode(train, store, preset, "train"), decode(test, store, preset, "test")
    return Data(dataset, [name.replace("_", " ") for name in classes], train, test)


def images_of(found: list) -> Split:
    """The examples of data sets of torchvision; x: uint8 [N, C, H, W] or picture files [N]."""
    x, y = (
        np.concatenate([vars(one)[name] for one in found for name in names if name in vars(one)])
        for names in (("data", "_image_files", "samples"), ("targets", "labels", "_labels"))
    )
    if x.ndim == 2:  # (file, label)
        x = x[:, 0]
    elif x.ndim == 3:
        x = x[:, None]
    elif x.shape[3:] == (3,):
        x = x.transpose(0, 3, 1, 2)
    return Split(x, y.astype(np.int64))


def satellite_pictures(dataset: str, root: Path) -> tuple[Any, ndarray]:
    """(eurosat or resisc45 from torchgeo's copy; bool [N]: for test)."""
    if dataset == "eurosat":  # as in USB: the last fifth of each class by name, of 27,000
        found = datasets.EuroSAT(root, download=True)
        held = [np.arange(n) >= n * 4 // 5 for n in np.bincount(found.targets)]
        return found, np.concatenate(held)
    folder = root / "resisc45" / "NWPU-RESISC45"
    if not folder.exists():
        snapshot_download(
            "isaaccorley/resisc45", repo_type="dataset", local_dir=folder.parent,
            revision="883edc0eee77b2c84225472f10f126e3ed83fa6e",
            allow_patterns=["NWPU-RESISC45.zip", "resisc45-test.txt"],
        )  # fmt: skip
        datasets.utils.extract_archive(f"{folder}.zip", str(folder.parent))
    found, listed = datasets.ImageFolder(folder), folder.with_name("resisc45-test.txt").read_text()
    return found, among((Path(file).name for file, _ in found.samples), listed.split())


TEXT_URL = "https://s3.amazonaws.com/fast-ai-nlp/"
TEXT_SETS = {  # archive, start of its sha256, classes, rows a class of train | test, newline
    "ag_news": (
        "ag_news_csv", "9a8c300eabb45750", "world, sports, business, technology",
        25_000, 1_900, "\\"),
    "yahoo_answers": ("yahoo_answers_csv", "2d4277855faf8b35", "society, science, health, "
        "education, computer, sports, business, entertainment, relationship, politics",
        50_000, 6_000, "\\n"),
    "amazon_review": ("amazon_review_full_csv", "4af62eeee139d014", "very negative, negative, "
        "neutral, positive, very positive", 50_000, 13_000, "\\n"),
}  # fmt: skip


def load_text_set(name: str, folder: Path, preset: Preset) -> Data:
    """USB's train.json and test.json if `folder` has them, else a fixed draw from the archive."""
    archive, sha256, classes, *sizes, newline = TEXT_SETS[name]
    classes, file = classes.split(", "), folder / f"{archive}.tgz"
    if (folder / "train.json").exists():
        train, test = (read_own(f"{folder}/{part}.json", part) for part in ("train", "test"))
        for split in (train, test):
            split.y = split.y.astype(np.int64)
        return Data(name, classes, train, test.take(~among(test.x, train.x)))  # T3
    if not file.exists():
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(TEXT_URL + file.name, str(file), sha256)
    rng, splits, texts = RandomState(0), {}, ()
    for part, each in zip(("test", "train"), sizes[::-1]):
        with tarfile.open(file) as tar:
            lines = io.TextIOWrapper(tar.extractfile(f"{archive}/{part}.csv"), "utf-8", newline="")
            rows = list(csv.reader(lines))
        x = [" ".join(row[1:3]).replace(newline, "\n").strip() for row in rows]  # T2
        y = np.where(among(x, texts), -1, [int(row[0]) - 1 for row in rows])
        drawn = np.sort(draw(y, [each] * len(classes), rng))
        texts, first = [x[i] for i in drawn], -1024 if part == "train" else 0
        splits[part] = Split(np.array([text[first:] for text in texts], object), y[drawn])
    return Data(name, classes, **splits)


def among(items: Any, pool: Any) -> ndarray:
    """bool [N]: whether each item is also in the pool."""
    return np.array([*map(set(pool).__contains__, items)], bool)


def read_table(path: str | Path, part: str = "train") -> list[dict]:
    """The rows {column: cell} of a .csv or .tsv file (UTF-8, or UTF-16 with its mark; delimiter:
    the header's most frequent of , ; tab), .jsonl, USB's .json, or part of a folder of pictures."""
    path, rows = Path(path).absolute(), []
    if path.is_dir():
        folders = sorted(path.glob(f"{part}/[!.]*/")) + [path / "unlabeled"] * (part == "train")
        found = [(file, at.name) for at in folders for file in files_below(at)]
        return [{"file": file, "label": "" if k == "unlabeled" else k} for file, k in found]
    try:
        content = path.read_bytes()
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if wide else "utf-8-sig")
        if path.suffix in (".csv", ".tsv"):
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            found = csv.DictReader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
        elif path.suffix == ".json":
            found = json.loads(text).values()
        else:
            found = map(json.loads, filter(str.strip, text.split("\n")))
        for row in found:
            if None in row:
                raise ValueError("more cells than in the header; quote texts with commas")
            rows.append(dict(row))
    except Exception as error:  # a file may hold anything
        at = f"{path}: cannot read row {len(rows) + 1}: {reason_of(error)}"
        raise UserError(f"{at}; expected CSV UTF-8 with a header, or JSON Lines") from None
    return rows


def column_of(rows: list[dict], names: str) -> Any:
    """The column with the first of the `names` that exists, in any case; None without rows."""
    known = {text_in(name).casefold(): name for row in rows for name in row}
    if found := [known[name] for name in names.casefold().split(",") if name in known]:
        return found[0]
    if rows:
        raise UserError(f"found columns {', '.join(map(text_in, known.values()))}; "
                        f"expected {names}; set --text-column, --label-column")  # fmt: skip


def text_in(cell: Any) -> str:
    """The text in a cell, "" if it is missing; JSON may hold halves of characters, made "?"."""
    return ("" if cell is None else str(cell)).encode("utf-8", "replace").decode().strip()


def label_in(cell: Any, where: str) -> str:
    """The class name in a cell: in NFC, numbers like 1.0 as 1, "" if it is missing."""
    if isinstance(cell, list | dict | bool):
        raise UserError(f"{where}: {cell} is no label; expected a text or a number")
    name = unicodedata.normalize("NFC", text_in(cell))
    name = re.sub(r"^([-+]?\d+)\.0*$", r"\1", name)  # pandas writes numbers with gaps so
    return "" if name.casefold() in MISSING else name


def read_own(path: str, part: str, columns: tuple = (TEXTS, LABELS)) -> Split:
    """Own texts or picture files (relative to their table), less rows without text. y: class
    names, "" if missing; so is -1 among numbers. aug: columns aug_0, aug_1."""
    rows = read_table(path, part)
    text, label = (column_of(rows, names) for names in columns)
    y = [row.get(label) for row in rows]
    if not Path(path).is_dir():  # its folders' names are classes as they are
        y = [label_in(cell, f"{path}, row {i}") for i, cell in enumerate(y, 1)]
    if all(map(NUMBER.fullmatch, filter(None, y))):
        y = ["" if name == "-1" else name for name in y]
    table = [[text_in(row.get(name)) for name in (text, "aug_0", "aug_1")] for row in rows]
    table, y = np.array(table, object).reshape(-1, 3), np.array(y, object)
    full, folder = table[:, 0] != "", Path(path).absolute().parent
    if not full.all():
        print(f"{path}: left out {(~full).sum()} rows without text")
    x, aug, y = table[full, 0], table[full, 1:], y[full]
    if str(text).casefold() in ("image", "file"):
        x = np.array([str(folder / file) for file in x], object)
        return Split(x, y, files=x)
    aug = aug[:, (aug != "").any(axis=0)]
    return Split(x, y, aug=np.where(aug == "", x[:, None], aug) if aug.size else None)


MISSING = ("none", "null", "nan", "na", "n/a", "<na>")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def load_own(dataset: str, test_file: str | None, data_dir: str, preset: Preset) -> Data:
    """Own pictures or texts. For test: what is labeled in `test_file` or test/, else a fifth."""
    path, tested = Path(dataset), Path(test_file or f"{dataset}/test")
    train = read_own(dataset, "train", preset.columns)
    by_value = lambda name: (not (n := NUMBER.fullmatch(name)), n and float(name))  # noqa: E731
    classes, test = sorted(sorted({*train.y} - {""}), key=by_value), train.take([])
    if len(classes) < 2:
        raise UserError(f"{path}: found classes {classes}; expected 2 in train/<class>/ or a label")
    spellings = Counter(map(str.casefold, classes))
    if twins := [name for name in classes if spellings[name.casefold()] > 1]:
        twins = ", ".join(f"{name} ({(train.y == name).sum()} times)" for name in twins)
        raise UserError(f"{path}: classes that differ only in case: {twins}; use one spelling")
    if empty := sorted({at.name for at in path.glob("train/[!.]*/")} - {*classes, "unlabeled"}):
        raise UserError(f"{path}: expected pictures in every folder train/<class>/; empty: {empty}")
    if test_file or tested.is_dir():
        test = read_own(test_file or dataset, "test", preset.columns)
        if unknown := sorted({*test.y} - {*classes, ""}):
            raise UserError(f"{tested}: has labels {unknown}, expected only those of {classes}")
        test = test.take(test.y != "")
        if not len(test):
            print(f"{tested}: no labeled examples; goes on as without it")
    number = dict(zip(["", *classes], range(-1, len(classes))))
    for split in (train, test):
        split.y = np.array([number[name] for name in split.y], np.int64)
    sizes = np.bincount(train.y[train.y >= 0])
    if not len(test) and min(sizes) >= 10:  # hold out a fixed fifth of every class
        test = train.take(draw(train.y, sizes // 5, RandomState(0)))
    name, test = path.resolve().name if path.is_dir() else path.stem, test if len(test) else None
    if unused := {at.name for at in path.glob("[!.]*/")} - {"train", "test", "unlabeled"}:
        print(f"{path}: not used: {', '.join(unused)}; expected train/, unlabeled/, test/")
    if train.files is None:
        copies = among(train.x, test.x if test else ())  # never train on test examples
        print(f"{path}: {len(test or ())} test texts; left out {copies.sum()} copies from training")
        train = train.take(~copies)
    else:
        store = f"{data_dir}/decoded/{name}-{content_hash(bytes(path.resolve()), 4)}"
        test = test and decode(test, store, preset, "test")
        train = decode(train, store, preset, "train", test.keys if test else ())
    known = {(key, k) for key, k in zip(train.hashes(), train.y) if k >= 0}
    if double := len(known) - len(dict(known)):
        print(f"{path}: {double} labeled examples have a copy with another label")
    return Data(name, classes, train, test)


def draw(y: ndarray, sizes: Any, rng: RandomState) -> ndarray:
    """Positions of sizes[k] random examples of every class k."""
    return np.hstack([rng.permutation(np.flatnonzero(y == k))[:n] for k, n in enumerate(sizes)])


def files_below(folder: Path) -> list[str]:
    """All files in a folder and its folders, sorted by name; hidden ones are left out."""
    return sorted(filter(os.path.isfile, glob.glob(f"{glob.escape(folder)}/**", recursive=True)))


def decode(split: Split, store: str, preset: Preset, part: str, test_keys: Any = ()) -> Split:
    """Decode picture files into a memory map, again if one has changed. train: squashed, without
    hashes in test_keys. test: short side fitted, center crop. Unreadable ones are listed."""
    side = preset.size if preset.pad else round(preset.size / 0.875)  # ZM crop_ratio
    shape = (3, *[side if part == "train" else preset.size] * 2)
    names, copies = split.x.astype(str), {*test_keys}
    times = [os.path.isfile(name) and os.stat(name).st_mtime_ns for name in names]
    recipe = json.dumps([shape, *names, *times, *sorted(copies)])
    path = Path(f"{store}-{part}-{side}.raw")
    note = path.with_suffix(".json")
    done, *found = json.loads(note.read_text()) if path.exists() and note.exists() else [None]
    if done != recipe:
        found = []
        os.makedirs(path.parent, exist_ok=True)
        with ThreadPool() as pool, open(path.with_suffix(f".{os.getpid()}"), "wb") as to:
            decoded = pool.imap(lambda name: decode_one(name, side, shape), names)
            for pixels, *row in tqdm(decoded, f"decoding {part}", len(names), disable=None):
                to.write(b"" if row[0] in copies else pixels)
                found.append(row)
        os.replace(to.name, path)
        write_atomically(note, json.dumps([recipe, *found]).encode())
    keys, troubles = np.array(found, str).reshape(-1, 2).T
    kept = (keys != "") & ~among(keys, copies)
    for i in np.flatnonzero(keys == ""):
        print(f"left out unreadable picture {names[i]} ({troubles[i]})")
    if not kept.any():
        raise UserError(f"{store}: none of the {len(names)} {part} pictures can be used")
    x = np.memmap(path, np.uint8, "c").reshape(-1, *shape)  # torch warns of read-only ones
    return Split(x, split.y[kept], names[kept], keys[kept])


def decode_one(file: str, side: int, shape: tuple) -> tuple[bytes, str, str]:
    """(a picture [C, H, W] in bytes, hash of its full pixels, ""), or two empty ones and why."""
    try:
        image = read_picture(file)
    except Exception as error:  # damaged files make Pillow raise errors of many kinds
        return b"", "", reason_of(error)
    fitted = functional.resize(image, [side] if shape[1] < side else [side, side])
    pixels = np.asarray(functional.center_crop(fitted, shape[1:])).transpose(2, 0, 1)
    content = image.tobytes() + str(image.size).encode()
    return pixels.tobytes(), content_hash(content), ""


def read_picture(file: Any) -> Image.Image:
    """Any picture as 8-bit RGB, turned as its EXIF data say, on white where it is transparent."""
    image = Image.open(file)
    try:
        image.load()
    except Exception as error:  # a JPEG that was cut off can be read with its end mark
        print(f"picture {file} is damaged ({reason_of(error)})")
        image = Image.open(io.BytesIO(Path(file).read_bytes() + b"\xff\xd9"))
    with suppress(Exception):  # damaged EXIF data: not turned
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits, which convert would clip: scaled by range
        x = np.array(image, float)
        x -= min(0, x.min())
        usual = (top for top in (1, 255, 4095, 65535) if top / 16 < x.max() <= top)
        x *= 255 / next(usual, x.max() or 1)
        image = Image.fromarray(np.rint(x).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def class_counts(y: ndarray, classes: list[str]) -> str:
    """Labels (not y = -1) per class, most frequent first, of at most 20 classes."""
    counts = Counter(classes)  # 1 each, so that a class without labels is named, too
    counts.update(classes[k] for k in y if k >= 0)
    return ", ".join(f"{name} {n - 1}" for name, n in counts.most_common(20))


def report_of(y: Any, label: Any, classes: list[str]) -> tuple[str, dict]:
    """Recall and precision by class, confusion table, most confused pairs; the first as a dict."""
    from sklearn.metrics import classification_report, confusion_matrix

    of = {"labels": range(len(classes)), "target_names": classes, "zero_division": 0}
    table = confusion_matrix(y, label, labels=of["labels"])
    pairs = Counter((k, j) for k, j in zip(y.tolist(), label.tolist()) if k != j >= 0)
    worst = [f"{n} of {classes[k]} taken for {classes[j]}" for (k, j), n in pairs.most_common(5)]
    text = [classification_report(y, label, **of), "true class (row), answer", str(table), *worst]
    return "\n".join(text), classification_report(y, label, output_dict=True, **of)


def draw_labeled(y: ndarray, num_labels: int, K: int, seed: int) -> ndarray:
    """Positions [num_labels] of labeled examples, as many of every class, seeded; 0: of all."""
    if num_labels == 0:
        return np.flatnonzero(y >= 0)
    most = K * np.bincount(y[y >= 0], minlength=K).min()
    if num_labels % K or not 0 < num_labels <= most:
        raise UserError(f"--num-labels {num_labels}: expected 0 or a multiple of {K} up to {most}")
    return draw(y, [num_labels // K] * K, RandomState(seed))


# ---------------------------------------------------------------------------- views of images
# Images: uint8 [n, C, S, S], with a row each of random numbers u in [0, 1), drawn on the CPU.


def pick_pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[n, c, i, j] = x[n, c, rows[n, 0, i, j], columns[n, 0, i, j]]; both may broadcast."""
    at = (rows * x.shape[3] + columns).long()  # [n, 1, h, w]
    picked = x.flatten(2).gather(2, at.flatten(2).expand(-1, x.shape[1], -1))
    return picked.unflatten(2, at.shape[2:])


def crop_and_flip(x: Tensor, u: Tensor, size: int, pad: int, flip: int) -> Tensor:
    """The weak view: a random size x size part of the image with `pad` reflected pixels around it.
    flip 1: half are mirrored; 2: half are also upside down. u [n, 3]: row, column, flip."""
    u, last = u.to(x.device), x.shape[3] - 1
    corners = (u[:, :2] * (last + 2 * pad - size + 2)).long() - pad
    at = corners[:, :, None] + torch.arange(size, device=x.device)  # [n, 2, size]
    rows, columns = (last - (last - at.abs()).abs()).unbind(dim=1)  # reflected
    if flip:
        columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    if flip == 2:
        rows = torch.where(u[:, 2:] * 2 % 1 < 0.5, rows.flip(1), rows)
    return pick_pixels(x, rows[:, None, :, None], columns[:, None, None])


def enhance(operation: Callable, x: Tensor, v: Tensor) -> Tensor:
    """v * image + (1 - v) * torchvision's result at factor 0 (black, gray, mean gray, smoothed)."""
    base = operation(x, 0.0).float()
    return (x.float() - base).mul_(v).add_(base).short().byte()


def affine(x: Tensor, *matrix: Any) -> Tensor:
    """Pillow's AFFINE: out(x, y) = in(ax + by + c, dx + ey + f) at pixel centers, black outside."""
    side, (a, b, c, d, e, f) = x.shape[3], matrix
    center = torch.arange(0.5, side, device=x.device)
    columns, rows = a * center + b * center[:, None] + c, d * center + e * center[:, None] + f
    columns, rows = (at.floor().int().clamp(-1, side) + 1 for at in (columns, rows))
    return pick_pixels(F.pad(x, (1, 1, 1, 1)), rows, columns)


def rotate(x: Tensor, v: Tensor) -> Tensor:
    """By v degrees counter-clockwise around the middle."""
    cos, sin, middle = v.deg2rad().cos(), v.deg2rad().sin(), x.shape[3] / 2
    return affine(x, cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - cos - sin))


RAND_AUGMENT = {  # lowest v, highest v, (x, v [n, 1, 1, 1]) -> x.  # C3
    "AutoContrast": (0, 1, lambda x, v: functional.autocontrast(x)),
    "Brightness": (0.05, 0.95, partial(enhance, functional.adjust_brightness)),
    "Color": (0.05, 0.95, partial(enhance, functional.adjust_saturation)),  # C4
    "Contrast": (0.05, 0.95, partial(enhance, functional.adjust_contrast)),
    "Equalize": (0, 1, lambda x, v: functional.equalize(x) if x.shape[3] >= 16 else x),
    "Identity": (0, 1, lambda x, v: x),
    "Posterize": (4, 8, lambda x, v: x & (256 - 2 ** (8 - v.long())).byte()),
    "Rotate": (-30, 30, rotate),
    "Sharpness": (0.05, 0.95, partial(enhance, functional.adjust_sharpness)),
    "ShearX": (-0.3, 0.3, lambda x, v: affine(x, 1, v, 0, 0, 1, 0)),
    "ShearY": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, 0, v, 1, 0)),
    "Solarize": (0, 256, lambda x, v: x ^ 255 * (x >= v).byte()),
    "TranslateX": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, v * x.shape[3], 0, 1, 0)),
    "TranslateY": (-0.3, 0.3, lambda x, v: affine(x, 1, 0, 0, 0, 1, v * x.shape[3])),
}
RANGES = torch.tensor([row[:2] for row in RAND_AUGMENT.values()])


def rand_augment(x: Tensor, u: Tensor) -> Tensor:
    """Three operations per image, with replacement. u [n, 3, 2]: (operation, v) of each round."""
    numbers = (u[..., 0] * len(RAND_AUGMENT)).long()  # [n, 3]
    low, high = RANGES[numbers].unbind(dim=2)
    values = low + (high - low) * u[..., 1]
    for number, v in zip(numbers.T, values.T, strict=True):
        number, order = number.sort()  # images of one operation side by side
        sizes = number.bincount(minlength=len(RAND_AUGMENT)).tolist()  # on the CPU: no GPU waits
        of = x.index_select(0, order.to(x.device)).split(sizes)
        parts = zip(RAND_AUGMENT.values(), of, v[order, None, None, None].split(sizes), strict=True)
        done = [operation(x, v.to(x.device)) for (_, _, operation), x, v in parts]
        x = torch.cat(done).index_select(0, order.argsort().to(x.device))
    return x


CUTOUT_FILL = (125, 123, 114)  # ZM; its luminance is 123


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Fill a square of side U(0, 0.5) * width. u [n, 3]: side, center row, center column.  # C2"""
    side, u = x.shape[3], u.to(x.device)[:, :, None] * x.shape[3]
    to_center = (torch.arange(0.5, side, device=x.device) - u[:, 1:]).abs()  # [n, 2, side]
    i, j = (to_center < u[:, :1] / 4).unbind(dim=1)
    inside = (i[:, :, None] & j[:, None])[:, None]  # [n, 1, side, side]
    fill = x.new_tensor(CUTOUT_FILL if x.shape[1] == 3 else (123,))[:, None, None]  # C4
    return x * ~inside + fill * inside  # torch.where is slow for bytes


class Views:
    """What the network sees of a split of images: normalized float batches, made on the device."""

    def __init__(self, split: Split, preset: Preset, backbone: str, device: torch.device):
        self.y, self.device = torch.tensor(split.y, device=device), device
        self.extra = torch.zeros(len(split), 0, device=device)  # further inputs of the heads
        self.order = torch.arange(len(split))  # see TextViews
        if split.is_text:
            return
        self.geometry = preset.size, preset.pad, preset.flip
        statistics = 255 * torch.tensor([preset.mean, preset.std], device=device)
        self.mean, self.std = statistics[..., None, None]  # [C, 1, 1]
        x = torch.from_numpy(split.x)
        self.x = x.to(device) if x.nbytes <= 2**30 else x  # larger ones stay where they are
        self.batch = min(500, 16 + 2**21 // x[0].nbytes)  # evaluation; fewer large pictures

    def __len__(self) -> int:
        return len(self.y)

    def pixels(self, idx: Tensor) -> Tensor:
        return self.x.index_select(0, idx.to(self.x.device)).to(self.device)

    def weak(self, idx: Tensor) -> Tensor:
        """Normalized weak views [n, C, size, size] of the examples at idx [n]."""
        x, u = self.pixels(idx), uniform(len(idx), 3)
        return self.normalized(crop_and_flip(x, u, *self.geometry))

    def strong(self, idx: Tensor) -> Tensor:
        """Normalized strong views; without a border, of a random part resized to the whole."""
        x, u = self.pixels(idx), uniform(len(idx), 12)
        if not self.geometry[1]:
            crop = RandomResizedCrop(self.geometry[0])  # 0.08 to 1 of the area, sides 3:4 to 4:3
            x = torch.stack([crop(image) for image in x])
        x = crop_and_flip(x, u[:, :3], *self.geometry)
        x = rand_augment(x, u[:, 3:9].unflatten(1, (3, 2)))
        return self.normalized(cutout(x, u[:, 9:]))

    def normalized(self, x: Tensor) -> Tensor:
        return x.float().sub_(self.mean).div_(self.std)

    def plain(self, idx: Tensor) -> Tensor:
        """The normalized images themselves, those stored larger cropped at the center."""
        return self.normalized(functional.center_crop(self.pixels(idx), self.geometry[:1]))


# ---------------------------------------------------------------------------- views of texts
# A batch of texts is token numbers [n, L] int64, -1 after the end of a row.


def reason_of(error: Exception) -> str:
    """An error's text on one line, without torch.load's advice to execute the file's content."""
    return " ".join(str(error).split())[:300].split("This file can still")[0] or repr(error)


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Any error of the block becomes a UserError "what (reason); advice": files hold anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({reason_of(error)}); {advice}") from None


def load_pretrained(kind: str, backbone: str, **options: Any) -> Any:
    """transformers' `kind`.from_pretrained(backbone). Raises UserError if it cannot be loaded."""
    import transformers

    transformers.logging.set_verbosity_error()  # no word about a pre-training head's weights
    transformers.logging.disable_progress_bar()
    safely = options | {"trust_remote_code": False}  # never a folder's own code
    advice = "expected an id on the hub or a folder with config.json, tokenizer and weights"
    with explained(f"{backbone}: transformers' {kind} could not load it", advice):
        return getattr(transformers, kind).from_pretrained(backbone, **safely)


def token_augment(ids: Tensor, u: Tensor, special: Tensor, mask_id: int | None) -> Tensor:
    """Delete, mask, swap (with the right neighbor) a tenth of the ordinary tokens [n, L].  # T4
    u [n, L, 2]: (delete or mask, swap). The token with the largest first number always stays."""
    length, ordinary = ids.shape[1], (ids >= 0) & ~torch.isin(ids, special)
    u_edit = torch.where(ordinary, u[..., 0], -1)
    free = ordinary & (u_edit < u_edit.amax(dim=1, keepdim=True))
    deleted = free & (u_edit < 0.1)
    if mask_id is not None:
        ids = ids.masked_fill(free & ~deleted & (u_edit < 0.2), mask_id)
    swapped = ordinary & ordinary.roll(-1, dims=1) & (u[..., 1] < 0.1)
    place = torch.arange(length, device=ids.device) + 1.5 * swapped + length * 2 * deleted
    return ids.masked_fill(deleted, -1).gather(1, place.argsort(dim=1, stable=True))


class TextViews(Views):
    """What the network sees of a split of texts: rows of tokens, padded to the batch's longest."""

    def __init__(self, split: Split, preset: Preset, backbone: str, device: torch.device):
        super().__init__(split, preset, backbone, device)
        tokenizer = load_pretrained("AutoTokenizer", backbone, truncation_side="right")
        self.max_length = min(preset.size, tokenizer.model_max_length)
        config = load_pretrained("AutoConfig", backbone)
        positions = (getattr(config, "max_position_embeddings", 0) or 0) - 2
        if 0 < positions < tokenizer.model_max_length - 2:  # RoBERTa's begin behind the padding id
            self.max_length = min(preset.size, positions)
        columns = [split.x] if split.aug is None else [split.x, *split.aug.T]
        texts = np.concatenate(columns).tolist()
        rows = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        if len({*map(frozenset, rows)}) < min(10, len({*texts}) / 10):
            raise UserError(f"{backbone} has no usable tokenizer: nearly all texts look the same")
        self.rows = [torch.tensor(row or [0]) for row in rows]
        self.largest_id = max(map(torch.max, self.rows)).item()
        lengths = torch.tensor([len(row) for row in self.rows[: len(split)]])
        self.order = lengths.argsort(stable=True)  # for evaluation, with little padding
        self.num_aug = len(columns) - 1
        self.special = torch.tensor(tokenizer.all_special_ids, device=device)
        self.mask_id, self.batch = tokenizer.mask_token_id, 64

    def plain(self, idx: Tensor) -> Tensor:
        """Tokens [n, L] int64 of the texts at idx."""
        return join([[self.rows[i] for i in idx]]).to(self.device)

    weak = plain  # the text itself

    def strong(self, idx: Tensor) -> Tensor:
        """One of the back-translations, each with equal chance, or token edits.  # T4"""
        if self.num_aug:
            chosen = (uniform(len(idx)) * self.num_aug).long()
            return self.plain(idx + (1 + chosen) * len(self))
        u = uniform(len(idx), self.max_length, 2)  # a row's edits do not depend on its batch
        ids = self.plain(idx)
        return token_augment(ids, u[:, : ids.shape[1]].to(self.device), self.special, self.mask_id)


def make_views(split: Split, preset: Preset, backbone: str, device: torch.device) -> Views:
    """Views of images or of texts, as the split is."""
    return (TextViews if split.is_text else Views)(split, preset, backbone, device)


def join(views: list) -> Tensor:
    """One batch of several; rows of tokens are padded with -1 to the longest."""
    if views[0][0].ndim > 1:
        return torch.cat(views)
    return nn.utils.rnn.pad_sequence([row for view in views for row in view], True, -1)


# ---------------------------------------------------------------------------- backbones
# An encoder maps images [n, C, H, W] or tokens [n, L] to features [n, num_features].
VITS = {"vit_small_patch2_32": 2, "vit_small_patch16_224": 16}  # patch side; any image side works
NAMES = ["cnn", "wrn_28_2", "efficientnet_b0", *VITS]
LEAKY = partial(nn.LeakyReLU, 0.1)


class SmallCNN(nn.Sequential):
    """Five 3x3 convolutions (from 16 pixels on, the first has stride 2) and a global average."""

    def __init__(self, channels: int, size: int, width: int = 16):
        conv, w = Conv2dNormActivation, width  # 3x3 convolution, batch norm, ReLU
        super().__init__(
            conv(channels, w, stride=2 if size >= 16 else 1), conv(w, 2 * w), nn.MaxPool2d(2),
            conv(2 * w, 2 * w), conv(2 * w, 4 * w), nn.MaxPool2d(2),
            conv(4 * w, 4 * w), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.num_features = 4 * w


class WideBlock(nn.Module):
    """Pre-activation residual block of a WRN; in the first one the shortcut is activated, too."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(c_in), LEAKY())  # C5, C8
        conv = Conv2dNormActivation(c_in, c_out, stride=stride, activation_layer=LEAKY)
        self.residual = nn.Sequential(conv, nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False))
        widened = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None
        self.first, self.shortcut = c_in == 16, widened or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.activate(x)
        return self.shortcut(out if self.first else x) + self.residual(out)


class WideResNet(nn.Sequential):
    """WRN-28-2 of FixMatch: 28 layers, width 2, leaky ReLU 0.1."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, 16, 3, 1, 1, bias=False))
        for c_in, c_out, stride in ((16, 32, 1), (32, 64, 2), (64, 128, 2)):
            self.append(WideBlock(c_in, c_out, stride))
            self.extend(WideBlock(c_out, c_out) for _ in range(3))
        self.extend([nn.BatchNorm2d(128), LEAKY(), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        self.num_features = 128
        for p in self.parameters():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="leaky_relu")


class PretrainedEncoder(nn.Module):
    """ViT-S, EfficientNet-B0 (torchvision's), or an image or text encoder of transformers."""

    def __init__(self, backbone: str, size: int, reads_text: bool):
        super().__init__()
        self.reads_text = reads_text
        if backbone in VITS:  # width 384, depth 12, 6 heads. Source: ZM nets/vit
            self.model = VisionTransformer(size, VITS[backbone], 12, 6, 384, mlp_dim=1536)
            self.model.heads = nn.Identity()
            for depth, block in enumerate(self.model.encoder.layers):  # of both branches
                block.dropout = block.mlp[-1] = StochasticDepth(0.2 * depth / 11, "row")
            nn.init.zeros_(self.model.encoder.pos_embedding)  # as published where nothing is loaded
        elif backbone == "efficientnet_b0":
            self.model = efficientnet_b0()
            self.model.classifier = nn.Identity()
        else:
            from transformers import MODEL_MAPPING, AutoModel

            config = load_pretrained("AutoConfig", backbone)
            model = AutoModel.from_config(config, dtype=torch.float32)
            self.model = getattr(model, "vision_model", model)
            if type(self.model.config) not in MODEL_MAPPING:
                raise ValueError("transformers could not load its vision model again")
            if reads_text:
                self.model.pooler = nn.Identity()  # the mean does not use it
                self.num_tokens = len(self.model.get_input_embeddings().weight)
        names = " ".join(self.state_dict())
        self.has_class_token = "cls_token" in names or "class_emb" in names
        x = torch.zeros(1, 8).long() if reads_text else torch.zeros(1, 3, size, size)
        with torch.no_grad():
            self.num_features = self.eval()(x).shape[1]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        if self.reads_text:
            mask = x >= 0
            out = self.model(x.clamp(min=0), attention_mask=mask.long()).last_hidden_state
            out = F.dropout(out.float(), 0.1, self.training)  # ZM nets/bert; float32 for the mean
            return (out * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)  # T1
        out = self.model(x.expand(-1, 3, -1, -1))
        out = getattr(out, "last_hidden_state", out)  # [n, tokens, D], [n, D, h, w] or [n, D]
        if out.ndim == 3:
            return out[:, 0] if self.has_class_token else out.mean(dim=1)
        return out.flatten(2).mean(dim=2) if out.ndim == 4 else out


class Student(nn.Module):
    """Batch, extra inputs [n, num_extra] -> (logits [n, K], auxiliary head's or None, features)."""

    def __init__(self, encoder: nn.Module, num_classes: int, num_extra: int = 0):
        super().__init__()
        self.encoder, self.num_classes, self.kd_head = encoder, num_classes, None
        encoder.batch_statistics = any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
        layers = type(getattr(encoder, "model", encoder)).__module__
        self.channels_last = encoder.batch_statistics and "transformers" not in layers
        width = encoder.num_features + num_extra
        self.head = nn.Linear(width, num_classes)
        if getattr(encoder, "reads_text", False):
            self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), self.head)

    def add_kd_head(self) -> None:
        """The main head's architecture with new random weights."""
        self.kd_head = copy.deepcopy(self.head)
        for layer in [m for m in self.kd_head.modules() if isinstance(m, nn.Linear)]:
            layer.reset_parameters()

    def train(self, mode: bool = True) -> Student:
        """As usual, but an encoder with nothing to train stays in eval mode."""
        super().train(mode)
        self.encoder.train(mode and any(p.requires_grad for p in self.encoder.parameters()))
        return self

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Any, Tensor]:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions
        features = self.encoder(x)
        if extra is not None:
            features = torch.cat([features, extra.to(features)], dim=1)
        return self.head(features), self.kd_head and self.kd_head(features), features


def build_student(backbone: str, preset: Preset, K: int, num_extra=0, weights="none", parts=()):
    """Pre-trained encoder and random heads (seed torch first), tried on `parts` (Views)."""
    channels, size = len(preset.mean), preset.size
    advice = "expected the id or folder of a transformers encoder for texts"
    if channels:
        advice = f"expected {', '.join(NAMES)}, or one of transformers for {size} pixels (--size)"
    with explained(f"--backbone {backbone} cannot be used", advice):
        if backbone == "cnn" and channels:
            encoder = SmallCNN(channels, size)
        elif backbone == "wrn_28_2" and channels:
            encoder = WideResNet(channels)
        else:
            encoder = PretrainedEncoder(backbone, size, reads_text=not channels)
    load_weights(encoder, backbone, weights)
    student = Student(encoder, K, num_extra)
    seen = {name: getattr(preset, name) for name in ("size", "pad", "mean", "std", "columns")}
    student.config = seen | {"backbone": backbone, "num_extra": num_extra}
    with explained(f"--backbone {backbone} cannot be used", advice):
        for views in parts:
            x, extra = views.plain(views.order[[0, -1]]).cpu(), torch.zeros(2, num_extra)
            if not channels and views.largest_id >= encoder.num_tokens:
                raise ValueError("its tokenizer has more tokens than its embedding")
            with torch.no_grad():
                student.train(channels == 0)(x, extra)  # some take other rows in training
                both, _, _ = student.eval()(x, extra)
                alone, _, _ = student(views.plain(views.order[:1]).cpu(), extra[:1])
            if not torch.allclose(alone, both[:1], 1e-3, 1e-3):
                raise ValueError("its answers are random, or depend on other rows of a batch")
    return student.train()


USB = "https://github.com/microsoft/Semi-supervised-learning/releases/download/v.0.0.0/"
WEIGHTS = {
    "vit_small_patch2_32": USB + "vit_small_patch2_32_mlp_im_1k_32.pth",
    "vit_small_patch16_224": USB + "vit_small_patch16_224_mlp_im_1k_224.pth",
    "efficientnet_b0": "https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth",
}
TIMM_NAMES = {  # pattern in timm's names of a ViT: torchvision's name
    "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj", r"^blocks\.": "encoder.layers.encoder_layer_",
    r"^norm\.": "encoder.ln.", "norm([12])": r"ln_\1", r"attn.qkv\.": "self_attention.in_proj_",
    "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3",
}  # fmt: skip


def load_weights(encoder: nn.Module, backbone: str, weights: str | None) -> None:
    """Fill an encoder with the weights of a file or folder; None: the published ones."""
    if weights == "none" or (weights is None and backbone in ("cnn", "wrn_28_2")):
        return
    target, source = getattr(encoder, "model", encoder), weights or backbone
    advice = "give a file or folder that fits, or --weights none to start from scratch"
    safely = {"map_location": "cpu", "weights_only": True}
    with explained(f"--weights {source}: no weights for {backbone}", advice):
        if source.endswith(".safetensors"):
            state = load_file(source)
        elif Path(source).is_file():
            state = torch.load(source, **safely)
        elif source in WEIGHTS:
            state = torch.hub.load_state_dict_from_url(WEIGHTS[source], **safely)
        else:
            model = load_pretrained("AutoModel", source, dtype=torch.float32)
            state = getattr(model, "vision_model", model).state_dict()
        state = {k.removeprefix("module."): w for k, w in state.get("model", state).items()}
        if "pos_embed" in state:
            names = "\n".join(state)
            for pattern, ours in TIMM_NAMES.items():
                names = re.sub(pattern, ours, names, flags=re.MULTILINE)
            state = dict(zip(names.split(), state.values(), strict=True))
            state = interpolate_embeddings(target.image_size, target.patch_size, state)
        missing, left = target.load_state_dict(state, strict=False)
        own = tuple({name.partition(".")[0] + "." for name in target.state_dict()})
        heads = ("fc", "classifier", "mlp", "head", "pooler")  # ZM semilearn/nets/utils.py
        left = [name for name in left if name.startswith(own) or not name.startswith(heads)]
        if wrong := missing + left:
            raise ValueError(f"{len(wrong)} tensors missing or left over, such as {wrong[0]}")
    print(f"{backbone} starts from {WEIGHTS.get(source, source)}")


def optimizer_of(student: Any, kind: str, lr: float, weight_decay: float, layer_decay: float):
    """No decay for biases, norms, positions, class token. lr_scale: 1 for heads, times layer_decay
    per block of the largest ModuleList (else Sequential) downwards. Source: ZM nets/utils.py."""
    lists = [m for m in student.encoder.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    blocks = max(lists, key=lambda m: (type(m) is nn.ModuleList, len(m.state_dict())), default=())
    layer, groups = 0, {}
    layer_of = {p: at for at, block in enumerate(blocks, 1) for p in block.parameters()}
    if 0 < layer_decay < 1:
        print(f"layer decay {layer_decay} over {len(blocks)} blocks")
        if len(blocks) < 2:
            raise UserError("--layer-decay: this backbone has no list of blocks; set it to 1")
    for name, p in student.named_parameters():
        layer = layer_of.get(p, layer)
        scale = layer_decay ** (len(blocks) + 1 - layer) if name.startswith("encoder.") else 1.0
        p.requires_grad_(scale > 0)  # --freeze: no gradient below the heads
        plain = p.ndim <= 1 or re.search("cls_token|class_token|position_embeddings|pos_emb", name)
        decay = 0.0 if plain else weight_decay
        group = {"params": [], "weight_decay": decay, "lr": lr, "lr_scale": scale}
        groups.setdefault((scale, decay), group)["params"].append(p)
    if kind == "sgd":
        return torch.optim.SGD(groups.values(), momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups.values(), fused=True)  # BERT on a CPU: 570 -> 70 ms


@torch.no_grad()
def predict(student: nn.Module, views: Views, autocast: Any = nullcontext) -> list[Tensor]:
    """[class probabilities [N, K], features [N, D]] of all plain views, float32 on the CPU."""
    student, parts = student.eval(), []
    for idx in views.order.split(views.batch):
        with autocast():
            logits, _, features = student(views.plain(idx), views.extra[idx])
        parts.append((logits.float().softmax(dim=1).cpu(), features.float().cpu()))
    return [torch.cat(column)[views.order.argsort()] for column in zip(*parts)]


def pseudo_label_accuracy(label: Tensor, mask: Tensor, y_true: Tensor) -> dict:
    """Percent right of all pseudo-labels [B_u], of those with mask 1; y_true -1: unknown."""
    known, right = (y_true >= 0).float(), 100 * (label == y_true).float()
    masked = (right * mask).sum() / (known * mask).sum()
    return {"pl_acc": right.sum() / known.sum(), "pl_acc_masked": masked}


# ---------------------------------------------------------------------------- run folder
STOP = {"signal": 0, "waits": False}  # the last signal; whether training will save first


def note_signal(number: int, frame: Any) -> None:
    """In training, a signal waits for the next `Run.save`; the same once more stops at once."""
    at_once, STOP["signal"] = STOP["signal"] == number or not STOP["waits"], number
    if at_once:
        raise KeyboardInterrupt


class Run:
    """A folder runs/<name>-<time>/. Scalars stay tensors until a line is printed: no step waits."""

    def __init__(self, name: str, args: dict, device: torch.device, dtype: Any):
        """A new folder in args["runs_dir"], or that of the run which args["resume"] continues."""
        self.args, self.device, self.dtype, resume = args, device, dtype, args["resume"]
        begun = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # of this run alone
        self.folder = Path(from_first_process(resume or f"{args['runs_dir']}/{name}-{begun}"))
        if not RANK:
            os.makedirs(self.folder, exist_ok=bool(resume))
        self.metrics = open(os.devnull if RANK else self.folder / "metrics.jsonl", "a", 1)
        if not RANK and not lock(self.metrics):
            raise UserError(f"{self.folder}: another process trains in this folder")
        checkpoint = self.folder / "checkpoint.pt"
        self.state = {"stage": 0, "step": 0, "seconds": 0}
        if checkpoint.exists():
            with explained(f"{checkpoint} is damaged", "start a new run"):
                self.state |= torch.load(checkpoint, map_location=device, weights_only=True)
        self.history = self.state.get("history", {})  # stage: accuracies
        if not RANK:  # what was logged after the checkpoint will come again
            self.metrics.seek(self.metrics.truncate(self.state.get("metrics_bytes", 0)))
        self.track = not RANK and args["track"] and tracker(args["track"], self.folder, args)
        self.start = self.saved = time.perf_counter()
        # Losses stay outside of autocast: bfloat16's 0.949 passes 0.95. Only float16 is scaled.
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        self.scaler = partial(torch.amp.GradScaler, device.type, enabled=dtype == torch.float16)

    def describe(self, data: Data, labeled: ndarray, y_zs: Any = None) -> Split:
        """Print the plan, write it, return the part to evaluate. y_zs [N]: the teacher's labels."""
        self.measured, self.classes, y_lb = "test_acc", data.classes, data.train.y[labeled]
        if (measured := data.test) is None:
            known = RandomState(0).permutation(np.flatnonzero(data.train.y >= 0))
            self.measured, measured = "labeled_acc", data.train.take(known[:2000])
        print(*(f"{name} {value}" for name, value in self.args.items() if value is not None))
        print(f"{self.folder} on {self.device}, amp {self.dtype}; {self.measured}\n{len(labeled)} "
              f"labeled, {len(data.train)} unlabeled (with labeled), {len(data.test or ())} test; "
              f"labels: {class_counts(y_lb, data.classes)}")  # fmt: skip
        given = data.train.hashes(), y_lb.tolist(), y_zs is None or y_zs.tolist()
        now = {"command": sys.argv, "cwd": os.getcwd(), "python": sys.version}
        now |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        now["data"] = content_hash(str(given).encode())
        env = self.folder / "env.json"
        first = now | {"resumed": []} | (json.loads(env.read_text()) if env.exists() else {})
        if first["data"] != now["data"]:
            raise UserError(f"{self.folder}: the examples or labels have changed; start a new run")
        if self.args["resume"]:
            first["resumed"].append(now)
        else:
            amp = next(name for name, dtype in AMP.items() if dtype == self.dtype)
            resolved = self.args | {"amp": amp, "device": self.device.type}
            write_atomically(self.folder / "args.json", resolved)
        write_atomically(env, first)
        write_atomically(self.folder / "labeled_idx.txt", "\n".join(map(str, labeled)).encode())
        return measured

    def restore(self, stage: int, parts: dict) -> tuple:
        """(first step, state) of the checkpoint if it is of this stage, else (0, {})."""
        self.stage_start, self.steps, self.pending = time.perf_counter(), 0, {}
        STOP["waits"] = True  # from now on, `save` answers signals
        if self.state["stage"] != stage:
            return 0, {}
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        print(f"continuing in stage {stage} after step {self.state['step']}")
        return self.state["step"], self.state

    def log(self, stage: int, step: int, num_steps: int, line: str, **values: Any) -> None:
        """Keep one step's scalars; every --log-every steps write their means and print `line`."""
        for name, value in values.items():
            self.pending.setdefault(name, []).append(torch.as_tensor(value).detach())
        self.steps += 1
        if (step + 1) % self.args["log_every"] and step + 1 < num_steps:
            return
        means = self.means(stage, step)
        row = {f"train/{name}": mean for name, mean in means.items()}
        row["time/step_per_s"] = rate = self.steps / (time.perf_counter() - self.stage_start)
        left = timedelta(seconds=round((num_steps - step - 1) / rate))
        said = line.format(**means).replace(" pl_acc nan", "")  # where nothing is known
        self.write(stage, step, row, f"/{num_steps} | {said} | {rate:.3g} step/s, {left} left")

    def means(self, stage: int, step: int) -> dict:
        """Means of the scalars since the last line or checkpoint; NaN (no cases) is skipped."""
        means = {}
        for name, values in self.pending.items():
            values = [torch.as_tensor(value, device=self.device).float() for value in values]
            column = mean_over_processes(torch.stack(values)).cpu()
            if name.startswith("loss") and not column.isfinite().all():
                at = f"{name} is not finite at stage {stage} step {step + 1}; checkpoint: before"
                raise UserError(f"{at}; try a lower --lr or --amp off in a new run")
            means[name] = column.nanmean().item()
        self.pending = {}
        return means

    def due(self, step: int, num_steps: int) -> bool:
        """Whether step is one of every --eval-every steps, or the last."""
        return (step + 1) % self.args["eval_every"] == 0 or step + 1 == num_steps

    def evaluate(self, stage: int, step: int, num_steps: int, student: Any, test: Views) -> None:
        """If it is due, log the accuracy in percent of `student` on `test`."""
        if not self.due(step, num_steps):
            return
        label = predict(student, test, self.autocast)[0].argmax(dim=1)
        acc = 100 * (label == test.y.cpu()).float().mean().item()
        name = "test/acc" if self.measured == "test_acc" else f"train/{self.measured}"
        row = {name: acc, "time/hours": self.seconds() / 3600}
        self.history.setdefault(stage, []).append(acc)
        self.write(stage, step, row, *(f" | {name} {value:.2f}" for name, value in row.items()))

    def write(self, stage: int, step: int, row: dict, *said: str) -> None:
        values = {name: None if math.isnan(value) else value for name, value in row.items()}
        print(json.dumps({"stage": stage, "step": step + 1} | values), file=self.metrics)
        try:
            print(f"stage {stage} step {step + 1}", *said, sep="", flush=True)
        except BrokenPipeError:  # whoever read it has left: save and stop
            sys.stdout, STOP["signal"] = open(os.devnull, "w"), signal.SIGTERM
        if self.track:
            self.track({f"stage {stage}/{name}": value for name, value in row.items()}, step + 1)

    def seconds(self) -> float:
        """Running time of all sessions of this run."""
        return self.state["seconds"] + time.perf_counter() - self.start

    def urgent(self) -> bool:
        """Whether any process got a signal, or the last save was ten minutes ago."""
        urgent = time.perf_counter() - self.saved > 600 or STOP["signal"] > 0
        return bool(mean_over_processes(torch.tensor(urgent).float()))

    def save(self, stage: int, step: int, num_steps: int, parts: dict, **state: Any) -> None:
        """If due or urgent, replace the checkpoint. Raises KeyboardInterrupt after a signal."""
        if not self.urgent() and not self.due(step, num_steps):
            return
        self.means(stage, step)
        buffer, parts = io.BytesIO(), {name: part.state_dict() for name, part in parts.items()}
        torch.save({
            "stage": stage, "step": step + 1, "seconds": self.seconds(), "history": self.history,
            "metrics_bytes": self.metrics.tell(), **parts, **state,
        }, buffer)  # fmt: skip
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.saved = time.perf_counter()
        if self.urgent():  # right after a save: on a signal only
            self.metrics.close()
            raise KeyboardInterrupt(self.folder)

    def accuracy(self, stage: int) -> float | None:
        """The reported figure of a stage, percent: its last evaluation, never the best one."""
        return self.history.get(stage, [None])[-1]

    def finish(self, student: Any, test: Views, lines: dict, **facts: Any) -> dict:
        """Write the student, report.txt, result.json; print `lines`, return the result."""
        config = student.config | {"dataset": self.args["dataset"], "classes": self.classes}
        if not RANK:
            save_student(self.folder / "student", student, config)
        probs, _ = predict(student, test, self.autocast)
        (sure, label), y = probs.max(dim=1), test.y.cpu()
        gaps = torch.zeros(11).index_add(0, (10 * sure).long(), (label == y) * 1.0 - sure)
        report, by_class = report_of(y, label, self.classes)
        print(report)
        write_atomically(self.folder / "report.txt", report.encode())
        last20 = self.history[max(self.history)][-20:]
        result = {
            self.measured: last20[-1], f"{self.measured}_median20": float(np.median(last20)),
            "measured": self.measured, "seconds": self.seconds(), **facts,
            "calibration_error": 100 * gaps.norm(1).item() / len(y), "by_class": by_class,
        }  # fmt: skip
        write_atomically(self.folder / "result.json", result | {"args": self.args})
        self.metrics.close()
        print(f"\n{self.measured}, last evaluation")
        for name, acc in lines.items():
            print(f"  {name:34} {'-' if acc is None else f'{acc:.2f} %'}")
        print("Label new data with the student:\n  python pseudolabel.py --teacher student "
              f"--student {self.folder}/student --dataset NEW --csv answers.csv")  # fmt: skip
        return result


def tracker(kind: str, folder: Path, args: dict) -> Callable:
    """(a step's {metric: value}, step) -> also to tensorboard, trackio or wandb."""
    with explained(f"--track {kind} cannot be used", "pip install tensorboard, trackio or wandb"):
        if kind == "tensorboard":
            board = import_module("torch.utils.tensorboard").SummaryWriter(folder)
            return lambda row, step: [board.add_scalar(*item, step) for item in row.items()]
        os.environ["WANDB_RUN_ID"] = name = folder.name  # a resumed run is the same one
        run = import_module(kind).init(project="zeromatch", name=name, resume="allow", config=args)
        return lambda row, step: run.log(row | {"time/step": step})  # begins again in each stage


def lock(file: Any) -> bool:
    """Keep other processes out of an open file; False if one has it. Locks may be unsupported."""
    try:
        fcntl = import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):  # Windows, some file systems
        pass
    return True


def write_atomically(path: Path, content: Any) -> None:
    """The first process writes bytes, or a dict as JSON: whatever happens, `path` is old or new."""
    if RANK:
        return
    if isinstance(content, dict):
        content = (json.dumps(content, indent=2) + "\n").encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_student(folder: Path, student: nn.Module, config: dict) -> None:
    """Encoder and main head; encoder/: once more in transformers' format, with its tokenizer."""
    folder.mkdir(exist_ok=True)
    model = getattr(student.encoder, "model", None)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "encoder")
        if student.encoder.reads_text:
            load_pretrained("AutoTokenizer", config["backbone"]).save_pretrained(folder / "encoder")
    state = student.state_dict().items()
    weights = {name: w.clone().contiguous() for name, w in state if not name.startswith("kd_head.")}
    write_atomically(folder / "model.safetensors", save(weights))
    write_atomically(folder / "config.json", config)


def load_student(folder: str | Path) -> tuple[Student, dict]:
    """(student in eval mode, config) of a run. Input: `read_images`' or `TextViews.plain`'s."""
    folder = Path(folder)
    with explained(f"{folder} is no student", "expected the folder RUN/student"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "encoder").exists():
            config["backbone"] = str(folder / "encoder")
        preset = Preset(**{name: config[name] for name in ("size", "mean", "std")})
        known = preset, len(config["classes"]), config["num_extra"]
        student = build_student(config["backbone"], *known)
        student.load_state_dict(load_file(folder / "model.safetensors"))
    return student.eval(), config


FIXES = {  # pattern of errors that are not ours: what the user can do
    "(?i)out ?of ?memory|MemoryError|allocate": "(try a lower --batch-size, --uratio or --size)",
    "No space left|quota": "(earlier files are intact: make room, then continue with --resume)",
    "more than 1 value per channel": "(try a larger --batch-size)",
    "_dynamo|_inductor|Compiler": "(leave out --compile)",
}


def cli(args_type: type, main: Callable) -> None:
    """Parse the command line, call `main`. Exit: 0 done, 2 the user can fix it, 130 stopped."""
    script, code = Path(sys.argv[0]).name, 0
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, note_signal)
    try:
        args = tyro.cli(args_type, description=sys.modules["__main__"].__doc__)
        if folder := getattr(args, "resume", None):
            expected = f"expected the folder of a run of {script}"
            with explained(f"--resume {folder} cannot be continued", expected):
                files = (Path(folder, name).read_bytes() for name in ("args.json", "env.json"))
                saved, env = map(json.loads, files)
                saved = args_type(**saved | {"resume": os.path.abspath(folder)})
                os.chdir(env.get("cwd", "."))  # relative paths are those of the start
            args = tyro.cli(args_type, default=saved)
            args.resume = saved.resume
            for name in vars(saved).keys() - {"data_dir", "runs_dir", "device", "amp"}:
                if (now := getattr(args, name)) != (was := getattr(saved, name)):
                    raise UserError(f"--{name.replace('_', '-')} {now}: the run has {was}; omit it")
        if PROCESSES > 1:  # gloo for CPU tensors, nccl for CUDA; others wait while the first labels
            torch.distributed.init_process_group(timeout=timedelta(days=1))
        if RANK:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        main(args)
        if PROCESSES > 1:
            torch.distributed.barrier()
    except Exception as error:
        said = f"{type(error).__module__}.{type(error).__name__}: {error}"
        advice = "; ".join(advice for pattern, advice in FIXES.items() if re.search(pattern, said))
        if not isinstance(error, UserError | OSError) and not advice:
            raise
        said = " ".join(str(error).split()) or said
        print(f"{script}: error: {said} {advice}".rstrip(), file=sys.stderr)
        code = 2
    except KeyboardInterrupt as stop:
        how = f"training by --resume {(*stop.args, 'FOLDER')[0]}, labeling by the same command"
        print(f"{script}: stopped; continue {how}", file=sys.stderr)
        code = 130
    if PROCESSES > 1:  # process-group threads sometimes abort Python at exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
