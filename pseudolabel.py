"""A foundation model's zero-shot labels for a data set: one JSON Lines file, made once, read by zeromatch.py.

    python pseudolabel.py --dataset digits --split test
    python pseudolabel.py --dataset fashion_mnist --teacher clip
    python pseudolabel.py --dataset fashion_mnist --teacher chat --model gpt-4.1 --price-in 2 --price-out 8 --dry-run 20
    python pseudolabel.py --dataset new_pictures --teacher student --student runs/NAME/student --csv answers.csv

Teachers
    glyphs     digits only: a network that has only ever seen digits rendered from Pillow's built-in font; a true
               zero-shot teacher with systematic mistakes (its ones have serifs, its sevens no bar)
    clip       CLIP or SigLIP          text   FLAN-T5, any seq2seq, or an instruction-tuned causal model
    embedding  a sentence encoder      chat   any OpenAI-compatible endpoint, for images and texts
    student    a network of ours: this is how one predicts
    import     labels or probabilities made elsewhere: .csv, .npy, the authors' .pt

The file. Line 1 is a header: data set, split, class names in order, a fingerprint of the examples, teacher,
model, prompt, settings. Then one line an example, in any order; label null where the teacher gave no answer,
from chat also the raw answer and the usage, the tokens (in, out) billed since the line before:
    {"index": 17, "label": 3, "probs": [...]}
It is append-only and may be cut anywhere; the same command again goes on behind the last whole line.

Departures from the authors' pipelines (jichan3751/zeromatch @8ca4079)
  P1  An answer is a label, else the longest label in it as whole words, else none. Published: substring,
      the last class in the list wins ("pink primrose" becomes "rose"), anything else is one fixed class.
  P2  Local language models score every label (the sum over its tokens and the end of the answer, which keeps
      one label from being the beginning of another; no division by length) instead of writing an answer.
  P3  Class names in prompts have spaces, not underscores.
  P4  Chat: temperature 0, one user message, images as PNG resized to --image-size.
  P5  Imported raw answers are read again by P1.
  P6  Teachers see pictures as they are stored: training ones squashed to a square, test ones cropped. The
      authors label the original files.
"""

from __future__ import annotations

import base64
import copy
import csv
import email.utils
import glob
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import random
import re
import signal
import string
import sys
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tqdm import tqdm

from common import (
    PRESETS, Data, SmallCNN, Split, Student, TextSplit, UserError, class_counts, cli, decode, files_below,
    first_process_first, load_data, load_pretrained, load_student, luminance, make_views, predict, preset_of, reason_of,
    seed_step, setup_device, share_right, wilson_interval, write_atomically,
)  # fmt: skip

Rows = Iterator[dict[str, Any]]

# ---------------------------------------------------------------------------- arguments


@dataclass
class Args:
    # run
    dataset: str = "digits"
    """A name of common.PRESETS, a folder of pictures or a .csv or .jsonl file of texts (README: Your own data)."""
    test_file: str | None = None
    """Test part of a file of texts; unset: a fifth of its labeled rows, if every class has ten."""
    split: Literal["train", "test"] = "train"
    """Part to label."""
    teacher: Literal["glyphs", "clip", "text", "embedding", "chat", "student", "import"] = "glyphs"
    """Who labels, see above."""
    output: str | None = None
    """Label file to make or go on with; unset: DATA_DIR/labels/DATASET-SPLIT-TEACHER.jsonl."""
    csv: str | None = None
    """Also write a CSV: file or text, label by name, a probability a class."""
    data_dir: str = "data"
    """Where data sets and label files are kept."""
    dry_run: int | None = None
    """Label only this many examples, spread over the part, and print what labeling all takes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Of local models; auto: the best there is, in bfloat16 where it is native."""
    batch_size: int = 32
    """Examples a forward pass of a local model."""
    # teacher
    model: str | None = None
    """Hub id, folder, or an endpoint's name for it; unset: openai/clip-vit-large-patch14, google/flan-t5-large,
    sentence-transformers/all-MiniLM-L6-v2. The paper's others: google/flan-t5-xxl, gpt-4o-2024-08-06 (texts),
    gpt-4.1-2025-04-14 (images)."""
    prompt: str | None = None
    """text, chat: file with a question that holds {text} and {options}. clip, embedding: file with lines that hold
    {label} and are averaged, or with one description a line of each class in order."""
    max_chars: int = 2000
    """Texts are cut to so many characters, and further where a local model takes less; options never are."""
    order_swaps: Literal[1, 2] = 1
    """text: 2 averages over the options in order and in reverse, against position bias, in twice the time."""
    temperature: float = 0.05
    """embedding: probabilities are the softmax over classes of cosine / temperature."""
    student: str | None = None
    """student: folder written by a script, RUN/student."""
    input: str | None = None
    """import: the file. CSV has a column label (name or number; empty: none) and may have a column index."""
    # chat
    base_url: str = "https://api.openai.com/v1"
    """Address of the API, e.g. http://localhost:8000/v1."""
    key_variable: str | None = None
    """Environment variable that holds the key; unset: OPENAI_API_KEY for api.openai.com, no key for any other host."""
    concurrency: int = 16
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds until a request is given up and sent again."""
    max_tokens: int = 32
    """Longest answer in tokens; reasoning models need more."""
    logprobs: bool = False
    """Letter the options and ask for token probabilities, for up to 20 classes; labels only where none are sent."""
    json_schema: bool = False
    """Ask for JSON that must fit a schema of the class names."""
    image_size: int = 224
    """Longer side of an image as it is sent, pixels."""
    price_in: float = 0.0
    """Price of a million tokens in."""
    price_out: float = 0.0
    """Price of a million tokens out."""
    max_cost: float | None = None
    """Stop before the cost of the whole file passes this."""


# ---------------------------------------------------------------------------- the label file

FORMAT = "zeromatch-labels-1"


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def header_of(
    data: Data, split: str, teacher: str = "", model: str = "", prompt: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Line 1 of a label file. fingerprint: of the examples in their `order`, and of their `content` in any."""
    part = data.part(split)
    rows = part.hashes()
    return {
        "format": FORMAT, "dataset": data.name, "split": split, "num_examples": len(part), "classes": data.classes,
        "fingerprint": {"order": digest(b"".join(rows)), "content": digest(b"".join(sorted(rows)))},
        "teacher": teacher, "model": model, "prompt": prompt, "prompt_hash": prompt and digest(prompt.encode()),
        "settings": settings,
    }  # fmt: skip


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """(header, rows, length in bytes of the whole lines) of a label file; a torn last line is left out.

    Raises UserError when the file is missing, is no label file, or a whole line is damaged."""
    if not path.is_file():
        raise UserError(f"--pseudolabels {path}: no such file; make it with pseudolabel.py")
    whole, rows = path.read_bytes(), []
    whole = whole[: whole.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}: line {number} is not a JSON object; the file is damaged or no label file")
    if not rows or rows[0].get("format") != FORMAT:
        raise UserError(f"{path}: expected a first line with format {FORMAT}; make label files with pseudolabel.py")
    return rows[0], rows[1:], len(whole)


def collect(path: Path, rows: list[dict[str, Any]], n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n], -1: abstention, -2: no row; probs [n, k], NaN: none). Raises UserError for an impossible row."""
    labels, probs = np.full(n, -2), np.full((n, k), np.nan, np.float32)
    for number, row in enumerate(rows, 2):
        used = row.get("usage", [0, 0])
        if not isinstance(used, list) or len(used) != 2 or not all(type(count) is int and count >= 0 for count in used):
            raise UserError(f"{path}: line {number} has usage {used!r}, expected tokens [in, out]; damaged")
        if row.keys() == {"usage"}:  # tokens billed for no answer
            continue
        i, label, p = row.get("index"), row.get("label", -2), row.get("probs", [0] * k)
        if type(i) is not int or not 0 <= i < n or labels[i] != -2:
            raise UserError(f"{path}: line {number} has index {i!r}, expected each of 0 to {n - 1} once; damaged")
        if label is not None and (type(label) is not int or not 0 <= label < k):
            raise UserError(f"{path}: line {number} has label {label!r}, expected 0 to {k - 1} or null; damaged")
        if not isinstance(p, list) or len(p) != k or not all(type(v) in (int, float) and 0 <= v <= 1 for v in p):
            raise UserError(f"{path}: line {number} has no list of {k} probabilities under probs; damaged")
        labels[i], probs[i] = -1 if label is None else label, p if "probs" in row else np.nan
    return labels, probs


def read_labels(path: str | Path, data: Data, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(labels [N] int64 with -1 for an abstention, probs [N, K] float32 or None) from a label file.

    Raises UserError with the reason when the file belongs to other data, is incomplete or damaged."""
    path = Path(path)
    header, rows, _ = read_rows(path)
    for key, wanted in header_of(data, split).items():
        was = header.get(key)
        if key in ("dataset", "split", "num_examples", "classes", "fingerprint") and was != wanted:
            same = key == "fingerprint" and isinstance(was, dict) and was.get("content") == wanted["content"]
            other = "the same examples in another order" if same else "other examples"
            reasons = {"classes": "other class names or another order of them", "fingerprint": other}
            reason = reasons.get(key, f"{key} {was!r}, expected {wanted!r}")
            raise UserError(f"{path}: made for {reason}; give a file made for {data.name}'s {split} part")
    labels, probs = collect(path, rows, len(data.part(split)), len(data.classes))
    if missing := int((labels == -2).sum()):
        raise UserError(f"{path}: {missing} of {len(labels)} examples have no label yet; run the same command again")
    return labels, None if np.isnan(probs).any() else probs


def open_labels(path: Path, header: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """(file to append to, rows it holds); a torn last line is cut off, a file without rows starts anew.

    Raises UserError when another process writes to the file, or when it was made in another way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)  # a row is one call: a killed run leaves whole rows
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise UserError(f"{path}: another process is writing to it; wait for it or give another --output") from None
    old, rows, length = read_rows(path) if path.stat().st_size else ({}, [], 0)
    for key, value in header.items():
        if rows and old.get(key) != value:
            raise UserError(f"{path}: made with another {key}, {old.get(key)!r}; give another --output or delete it")
    collect(path, rows, header["num_examples"], len(header["classes"]))  # a damaged file stays as it is
    os.truncate(path, length if rows else 0)
    if not rows:
        append(file, header)
    return file, rows


def append(file: Any, row: dict[str, Any]) -> None:
    """Write one line. Raises UserError when the disk does not take it; whole lines stay."""
    line, reason = (json.dumps(row) + "\n").encode(), "disk full"
    try:
        if file.write(line) == len(line):
            return
    except OSError as error:
        reason = error.strerror
    raise UserError(f"could not write {file.name} ({reason}); whole lines stay: make room, run the same command again")


def rows_of(idx: list[int], probs: Tensor) -> Rows:
    """A row for each of probs [n, K]; its label is the most probable class. Raises UserError for NaN."""
    if not probs.isfinite().all():
        raise UserError("the teacher's probabilities are not finite; try --device cpu")
    for index, row in zip(idx, probs.float().cpu(), strict=True):
        yield {"index": index, "label": int(row.argmax()), "probs": [round(p, 5) for p in row.tolist()]}


def write_labels(path: Path, header: dict[str, Any], probs: np.ndarray) -> None:
    """A whole label file from probabilities [N, K]; it appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *rows_of(list(range(len(probs))), torch.as_tensor(probs))]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def chunks(todo: list[int], size: int) -> list[list[int]]:
    return [todo[at : at + size] for at in range(0, len(todo), size)]


# ---------------------------------------------------------------------------- prompts and answers

PROMPTS = {  # what is labeled: (for clip and embedding, for text and chat)
    "images": ("This is a photo of {label}.", "What does the image show? Options: {options}."),
    "sentiment": ("This review is {label}.", "Review: {text}\n\nWhat is its mood? Options: {options}.\n\nAnswer:"),
    "topics": ("This text is about {label}.", "Text: {text}\n\nWhat is its topic? Options: {options}.\n\nAnswer:"),
}
HOW_TO_ANSWER = {  # chat
    "words": "Answer with one of the options, word for word, and nothing else.",
    "letter": "Answer with the letter of one option and nothing else.",
    "json": 'Answer with JSON, {"label": one of the options, word for word}, and nothing else.',
}


def readable(name: str) -> str:
    return name.replace("_", " ")  # P3


def prompt_for(data: Data, args: Args) -> str | None:
    """The prompt that a teacher uses, of --prompt or by the kind of data. Raises UserError where it does not fit."""
    texts, asks = hasattr(data.part(args.split), "texts"), args.teacher in ("text", "chat")
    if args.teacher not in ("clip", "embedding", "text", "chat"):
        return None
    if args.teacher != "chat" and texts == (args.teacher == "clip"):
        raise UserError(f"--teacher {args.teacher} does not label {'texts' if texts else 'images'}; take another")
    sentiment = any("negative" in name.lower() for name in data.classes)
    prompt = PROMPTS["images" if not texts else "sentiment" if sentiment else "topics"][asks]
    if args.prompt is not None:
        try:
            prompt = Path(args.prompt).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"--prompt {args.prompt}: could not be read ({error}); expected a text file") from None
    if asks and texts and "{text}" not in prompt:
        raise UserError(f"--prompt {args.prompt}: expected the placeholder {{text}} in it")
    return prompt


def descriptions(prompt: str, classes: list[str]) -> list[list[str]]:
    """T lists of K phrases: each line with every class in place of {label}; or K lines, one for each class."""
    lines = [line for line in prompt.splitlines() if line.strip()]
    if lines and all("{label}" in line for line in lines):
        return [[line.replace("{label}", readable(name)) for name in classes] for line in lines]
    if len(lines) == len(classes) and "{label}" not in prompt:
        return [lines]
    raise UserError(f"--prompt: expected {{label}} in every line, or {len(classes)} lines, one a class, without it")


def fill(prompt: str, text: str, options: list[str]) -> str:
    return prompt.replace("{options}", ", ".join(options)).replace("{text}", text)


def words_of(text: str) -> list[str]:
    """Words in lower case, without articles unless nothing else is there."""
    words = re.findall(r"\w+", readable(text).casefold())
    return [word for word in words if word not in ("a", "an", "the")] or words


def option_number(mark: str, num_classes: int) -> int | None:
    """Class of an option's mark, a letter or a number from 1."""
    mark = mark.strip(" \n.:)(*'\"").upper()
    number = int(mark) - 1 if re.fullmatch("[0-9]{1,3}", mark) else string.ascii_uppercase.find(mark or "-")
    return number if 0 <= number < num_classes and (len(mark) == 1 or mark.isdecimal()) else None


def parse_answer(answer: str, classes: list[str], lettered: bool = False) -> int | None:
    """Class of an answer: the label itself, else the longest label in it, else (options lettered) the option's mark
    at its beginning or end. None, an abstention, when nothing or more than one thing is found.  # P1"""
    answer = answer.rpartition("</think>")[2]
    if in_json := re.search(r'"label"\s*:\s*("(?:[^"\\]|\\.)*")', answer):
        answer = json.loads(in_json[1], strict=False)
    bare = answer.strip(" \t\r\n.\"'`*").casefold()
    exact = [number for number, name in enumerate(classes) if name.casefold() == bare]
    if len(exact) == 1:
        return exact[0]
    words, found = words_of(answer), []
    for number, label in enumerate(map(words_of, classes)):
        places = [at for at in range(len(words)) if label and words[at : at + len(label)] == label]
        found += [(at, at + len(label), number) for at in places]
    longest = {
        number for start, end, number in found
        if not any(s <= start and end <= e and end - start < e - s for s, e, _ in found)
    }  # fmt: skip
    if lettered and not longest:
        marks = re.findall(r"^\W*(\w+)(?=[.):,\n]|\W*$)", answer) + re.findall(r"(\w+)\W*$", answer)
        numeric = any(name.isdecimal() for name in classes)  # then a number is no mark
        longest = {option_number(mark, len(classes)) for mark in marks if not (numeric and mark.isdecimal())} - {None}
    return longest.pop() if len(longest) == 1 else None


# ---------------------------------------------------------------------------- teacher: rendered glyphs


def render_glyphs() -> Tensor:
    """Digits of Pillow's built-in font in four weights, each cut to its ink: [10, 4, 1, 64, 64] in [0, 1].

    Height fills the square; the width keeps its proportion. Strokes 0 to 6 pixels wider than the font's."""
    from PIL import Image, ImageDraw, ImageFont

    font, glyphs = ImageFont.load_default(96), []
    for digit in "0123456789":
        for stroke in range(0, 7, 2):
            image = Image.new("L", (160, 160))
            ImageDraw.Draw(image).text((80, 80), digit, 255, font, anchor="mm", stroke_width=stroke)
            image = image.crop(image.getbbox())
            width = max(1, round(64 * image.width / image.height))
            square = Image.new("L", (64, 64))
            square.paste(image.resize((width, 64)), ((64 - width) // 2, 0))
            glyphs.append(torch.from_numpy(np.array(square)).float() / 255)
    return torch.stack(glyphs).view(10, -1, 1, 64, 64)


def draw_digits(glyphs: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Random rendered digits as the data set would hold them: uint8 [batch, 1, 8, 8], labels [batch].

    Rotation, shear, width, size and a smooth elastic field; then a 32x32 bitmap averaged in 4x4 blocks, which is
    how the handwritten set was made. The ranges were set so that ink, width and slant of rendered and handwritten
    images agree on average; no label was looked at for that."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch)

    y = torch.randint(10, (batch,))
    images = glyphs[y, torch.randint(glyphs.shape[1], (batch,))]
    ink_width = (images.amax(dim=2).squeeze(1) > 0.3).float().mean(dim=1)
    width = uniform(0.7, 1.1) * (0.62 / ink_width).sqrt()  # narrow digits wider, wide ones narrower
    angle, shear, size = uniform(-0.15, 0.15), uniform(-0.25, 0.15), uniform(0.95, 1.1)
    affine = torch.stack([
        torch.stack([angle.cos() / width, shear + angle.sin(), uniform(-0.05, 0.05)], dim=1),
        torch.stack([-angle.sin(), angle.cos(), uniform(-0.05, 0.05)], dim=1),
    ], dim=1) * size.view(-1, 1, 1)  # fmt: skip
    elastic = F.interpolate(torch.randn(batch, 2, 3, 3) * 0.2, size=(32, 32), mode="bicubic", align_corners=False)
    grid = F.affine_grid(affine, [batch, 1, 32, 32], align_corners=False) + elastic.permute(0, 2, 3, 1)
    bitmap = (F.grid_sample(images, grid, align_corners=False) > 0.5).float()
    return (F.avg_pool2d(bitmap, 4) * 255).round().to(torch.uint8), y


@lru_cache(maxsize=1)
def train_glyph_teacher(num_steps: int = 300, batch: int = 128) -> Student:
    """A small network that has seen rendered digits only, about ten seconds on two CPU cores."""
    preset = preset_of("digits")
    seed_step(0, "glyph teacher", 0)
    glyphs, student = render_glyphs(), Student(SmallCNN(1, 8, width=32), 10)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in tqdm(range(num_steps), "training the glyph teacher", disable=None):
        x, y = draw_digits(glyphs, batch)
        loss = F.cross_entropy(student((x.float() / 255 - preset.mean[0]) / preset.std[0])[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


def label_with_glyphs(data: Data, todo: list[int], args: Args, prompt: None) -> Rows:
    """Rows of the glyph teacher."""
    if data.name != "digits":
        raise UserError(f"--teacher glyphs knows digits only, not {data.name}; use another teacher")
    yield from rows_of_student(train_glyph_teacher(), data.part(args.split), todo, preset_of("digits"), args, "cnn")


# ---------------------------------------------------------------------------- teachers: local models


def rows_of_student(
    student: Student, part: Split | TextSplit, todo: list[int], preset: Any, args: Args, backbone: str
) -> Rows:
    device, _ = setup_device(args.device, "off", backbone)
    for idx in chunks(todo, 500):
        views = make_views(part.take(np.array(idx)), preset, backbone, device)
        yield from rows_of(idx, predict(student.to(device), views))


def label_with_student(data: Data, todo: list[int], args: Args, prompt: None) -> Rows:
    """Rows of a network trained by one of the scripts, for data of the same classes, kind and image size."""
    student, config = load_student(args.student)
    part, size, texts = data.part(args.split), config["size"], not config["mean"]
    fits = isinstance(part, TextSplit) == texts and (texts or part.x.shape[2] in (size, round(size / 0.875)))
    if config["classes"] != data.classes or not fits:
        raise UserError(f"--student {args.student}: was trained for other classes or image sizes than {data.name}'s")
    if config["num_extra"]:
        raise UserError(f"--student {args.student}: needs a teacher's labels as input, too; give another student")
    preset = PRESETS["text"]._replace(**{key: config[key] for key in ("size", "mean", "std")})
    yield from rows_of_student(student, part, todo, preset, args, config["backbone"])


def load_model(kind: str, reader: str, args: Args, **options: Any) -> tuple[Any, Any, torch.device, int]:
    """(model, tokenizer or processor, device, longest input in tokens)."""
    device, dtype = setup_device(args.device, "auto", "")
    model = load_pretrained(kind, args.model, dtype=dtype or torch.float32).to(device).eval()
    reader = load_pretrained(reader, args.model, **options)
    longest = getattr(model.config, "max_position_embeddings", None) or 10**6
    return model, reader, device, min(longest, getattr(reader, "model_max_length", longest))


def picture(x: np.ndarray) -> Any:
    """uint8 [C, H, W], gray or color -> RGB image of Pillow."""
    from PIL import Image

    return Image.fromarray(x[0] if len(x) == 1 else np.moveaxis(x, 0, 2)).convert("RGB")


def ensemble(embeddings: list[Tensor]) -> Tensor:
    """Mean over templates of unit vectors, scaled to unit length: T times [K, D] -> [K, D]."""
    return F.normalize(torch.stack([F.normalize(e, dim=1) for e in embeddings]).mean(dim=0), dim=1)


@torch.inference_mode()
def clip_features(encode: Any, **inputs: Tensor) -> Tensor:
    """[n, D] float32 from a model's get_text_features or get_image_features."""
    return encode(**inputs).pooler_output.float()


def label_with_clip(data: Data, todo: list[int], args: Args, prompt: str) -> Rows:
    """p_k = softmax_k(scale * cosine(image, class k)); the text side is encoded once.

    The same for SigLIP, whose own sigmoid judges each class alone: its bias is equal for all and drops out."""
    phrases, x = descriptions(prompt, data.classes), data.part(args.split).x
    model, processor, device, _ = load_model("AutoModelForZeroShotImageClassification", "AutoProcessor", args)
    padding = "max_length" if "siglip" in model.config.model_type else True  # SigLIP has seen no other length
    style = {"truncation": True, "max_length": model.config.text_config.max_position_embeddings, "return_tensors": "pt"}
    tokens = [processor(text=row, padding=padding, **style) for row in phrases]
    text = ensemble([clip_features(model.get_text_features, **t.to(device)) for t in tokens])  # [K, D]
    for idx in chunks(todo, args.batch_size):
        pixels = processor(images=[picture(x[i]) for i in idx], return_tensors="pt")["pixel_values"]
        image = clip_features(model.get_image_features, pixel_values=pixels.to(device, model.dtype))
        scale = model.logit_scale.detach().float().exp()
        yield from rows_of(idx, (scale * F.normalize(image, dim=1) @ text.T).softmax(dim=1))


def label_with_embedding(data: Data, todo: list[int], args: Args, prompt: str) -> Rows:
    """p_k = softmax_k(cosine(text, description k) / temperature), vectors being means over tokens."""
    phrases, texts = descriptions(prompt, data.classes), data.part(args.split).texts
    model, tokenizer, device, length = load_model("AutoModel", "AutoTokenizer", args)

    @torch.inference_mode()
    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        states, mask = model(**tokens).last_hidden_state.float(), tokens["attention_mask"][..., None]
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    classes = ensemble([embed(row) for row in phrases])
    for idx in chunks(sorted(todo, key=lambda i: -len(texts[i])), args.batch_size):
        cosine = F.normalize(embed([texts[i][: args.max_chars] for i in idx]), dim=1) @ classes.T
        yield from rows_of(idx, (cosine / args.temperature).softmax(dim=1))


@torch.inference_mode()
def answer_log_probs(model: Any, ids: Tensor, mask: Tensor, answers: list[Tensor]) -> Tensor:
    """log P(answer_k | prompt_i), summed over all tokens of answer_k.

    ids, mask [n, T] (padded on the left for a causal model), answers: K times [L_k] int64 -> [n, K]. Prompts are
    read once; the rows of a pass share their answer, so that answers need no padding."""
    seq2seq, known, columns = model.config.is_encoder_decoder, inspect.signature(model.forward).parameters, []
    if seq2seq:
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    else:
        extra = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "logits_to_keep": 1}
        extra = {name: value for name, value in extra.items() if name in known}
        prompt = model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
    for answer in (answer.repeat(len(ids), 1) for answer in answers):  # [n, L]
        if seq2seq:
            logits = model(encoder_outputs=encoded, attention_mask=mask, labels=answer).logits
        else:
            seen = torch.cat([mask, torch.ones_like(answer[:, 1:])], dim=1)
            at = {"position_ids": seen.cumsum(dim=1)[:, mask.shape[1] :] - 1} if "position_ids" in known else {}
            past = copy.deepcopy(prompt.past_key_values)  # not every kind of cache can be cut back
            after = model(input_ids=answer[:, :-1], attention_mask=seen, past_key_values=past, **at).logits
            logits = torch.cat([prompt.logits[:, -1:], after], dim=1)  # [n, L, vocabulary]
        columns.append(logits.float().log_softmax(dim=2).gather(2, answer[..., None]).sum(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def label_with_text_model(data: Data, todo: list[int], args: Args, prompt: str) -> Rows:
    """p_k = P(answer_k) / sum_j P(answer_j), mean over option orders.  # P2"""
    texts, names = data.part(args.split).texts, [readable(name) for name in data.classes]
    seq2seq = load_pretrained("AutoConfig", args.model).is_encoder_decoder
    kind, side = ("AutoModelForSeq2SeqLM", "right") if seq2seq else ("AutoModelForCausalLM", "left")
    model, tokenizer, device, room = load_model(kind, "AutoTokenizer", args, padding_side=side)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat = bool(not seq2seq and tokenizer.chat_template)

    def ids_of(text: str, **options: Any) -> list[int]:
        return tokenizer(text, **{"add_special_tokens": False, **options}).input_ids

    def turn(*contents: str) -> str:
        messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents, strict=False)]
        style = {"tokenize": False, "add_generation_prompt": len(contents) == 1, "enable_thinking": False}
        return tokenizer.apply_chat_template(messages, **style)

    # What follows an answer: the end of the turn, of the text, or, from a model that only goes on writing, of the line.
    end = ids_of(turn("?", "ANSWER").rpartition("ANSWER")[2] if chat else "\n")[:1]
    end = [tokenizer.eos_token_id] if seq2seq or not end else end
    answers = [ids_of(name if chat or seq2seq else f" {name}") + end for name in names]
    room -= 0 if seq2seq else max(map(len, answers))
    answers = [torch.tensor(answer, device=device) for answer in answers]

    def encode(text: str, options: list[str]) -> list[int]:
        asked = fill(prompt, text, options)
        ids = ids_of(turn(asked)) if chat else ids_of(asked, add_special_tokens=True)
        if len(ids) > room and not text:
            raise UserError(f"--model {args.model}: the options alone are longer than the {room} tokens it takes")
        # Cuts the text, never the options.
        return ids if len(ids) <= room else encode(text[: len(text) * room // len(ids) - 1], options)

    for idx in chunks(sorted(todo, key=lambda i: -len(texts[i])), args.batch_size):
        probs = 0
        for options in (names, names[::-1])[: args.order_swaps]:
            ids = [encode(texts[i][: args.max_chars], options) for i in idx]
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
            scores = answer_log_probs(model, batch["input_ids"], batch["attention_mask"], answers)
            probs = probs + scores.softmax(dim=1) / args.order_swaps
        yield from rows_of(idx, probs)


# ---------------------------------------------------------------------------- teacher: a chat endpoint

ATTEMPTS, LONGEST_WAIT = 8, 600  # requests for one example in one run; seconds that an endpoint may ask to wait
OWN_FAULT = "content_filter|content_policy_violation|context_length_exceeded"  # of one example, not of the request
BROKEN = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)  # no or odd reply


def seconds_of(retry_after: str) -> float:
    """Seconds to wait from a Retry-After header: a number or a date; 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    date = email.utils.parsedate_tz(retry_after)
    return email.utils.mktime_tz(date) - time.time() if date else 0.0


class Endpoint:
    """A chat endpoint: how to reach it, which options it takes (learnt from its refusals), what it has cost."""

    def __init__(self, args: Args, classes: list[str]) -> None:
        host = urllib.parse.urlsplit(args.base_url).hostname
        if not host or not args.base_url.startswith(("http://", "https://")):
            raise UserError(f"--base-url {args.base_url}: expected http://HOST... or https://HOST...")
        variable = args.key_variable or ("OPENAI_API_KEY" if host == "api.openai.com" else "")
        self.key = os.environ.get(variable, "").strip()
        if variable and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise UserError(f"environment variable {variable}: expected the API key for {host}; set it")
        self.headers = {"Content-Type": "application/json", "User-Agent": "pseudolabel"}
        self.headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.opener = urllib.request.OpenerDirector()  # follows no redirect, which would carry the key elsewhere
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            self.opener.add_handler(handler())
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": args.max_tokens}  # P4
        self.options |= {"logprobs": True, "top_logprobs": 20} if args.logprobs else {}
        if args.json_schema:
            schema = {"type": "object", "properties": {"label": {"type": "string", "enum": classes}}}
            schema |= {"required": ["label"], "additionalProperties": False}
            schema = {"name": "answer", "strict": True, "schema": schema}
            self.options["response_format"] = {"type": "json_schema", "json_schema": schema}
        self.args, self.classes, self.url = args, classes, args.base_url.rstrip("/") + "/chat/completions"
        self.lock, self.stop, self.refusal, self.answered = threading.Lock(), threading.Event(), "", False
        self.in_flight, self.spent, self.dearest, self.usage = 0, 0.0, 0.0, [0, 0]  # usage: not yet in the file

    def affordable(self, more: int) -> bool:
        """Whether `more` requests beyond those in flight, each as dear as the dearest, keep within --max-cost."""
        limit = self.args.max_cost
        return limit is None or self.spent + (self.in_flight + more) * self.dearest <= limit

    def ask(self, index: int, question: Any) -> dict[str, Any] | None:
        """The row of one example, asked until there is a reply; None: left for the next run."""
        for attempt in range(ATTEMPTS):
            pause, options = min(60, 0.5 * 2**attempt) * random.uniform(0.5, 1), dict(self.options)
            body = {"model": self.args.model, "messages": [{"role": "user", "content": question}], **options}
            status, headers = 0, {}
            try:
                status, headers, content = self.post(json.dumps(body).encode())
                if status == 200:
                    return {"index": index, **self.read(json.loads(content))}
                problem = content.decode("utf-8", "replace")
            except BROKEN as error:
                if status == 0 or isinstance(error, json.JSONDecodeError):  # it may have been billed
                    with self.lock:
                        self.spent += self.dearest
                problem = f"{type(error).__name__}: {error}"
            if status in (400, 422) and self.without(problem, options):
                continue
            short = f"status {status}: {' '.join(self.hide(problem).split())[:300]}"
            if status == 400 and re.search(OWN_FAULT, problem):
                return {"index": index, "label": None, "raw": short}
            after = seconds_of(headers.get("Retry-After", ""))
            exhausted = status == 429 and re.search("insufficient_quota|billing", problem) or after > LONGEST_WAIT
            if exhausted or 200 < status < 500 and status not in (408, 409, 429):
                return self.refuse(short)
            if not self.answered:
                tqdm.write(f"no answer yet, {short}", file=sys.stderr)
            if self.stop.wait(max(pause, after + random.random())) or not self.affordable(0):
                return None
        return None

    def post(self, body: bytes) -> tuple[int, Any, bytes]:
        """(status, headers, content) of one request, all of it within the time-out."""
        request = urllib.request.Request(self.url, body, self.headers)
        content, end = b"", time.monotonic() + self.args.timeout
        with self.opener.open(request, timeout=self.args.timeout) as reply:
            while part := reply.read1(2**16):
                content += part
                if time.monotonic() > end or len(content) > 2**24:
                    raise TimeoutError("the reply does not end")
        return reply.status, reply.headers, content

    def refuse(self, reason: str) -> None:
        """End the run: neither this nor any other request is of use."""
        self.refusal = self.refusal or f"{self.url}: {reason}; what was answered is saved"
        self.stop.set()

    def hide(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text

    def without(self, problem: str, options: dict[str, Any]) -> bool:
        """Leave out from now on the option that a refusal names first; max_tokens gets its new name. False: none."""
        named = re.search(rf"\b({'|'.join(options)})\b", problem) if options else None
        if named is None:
            return False
        name = named[1]
        with self.lock:
            value = self.options.pop(name, None)  # None: another request was quicker
            if name == "logprobs":
                self.options.pop("top_logprobs", None)
            if name == "max_tokens" and value:
                self.options["max_completion_tokens"] = value
        return True

    def read(self, reply: Any) -> dict[str, Any]:
        """Label, raw answer and, where they were sent, probabilities of a reply; its tokens are counted in any case."""
        usage, price_in, price_out = reply.get("usage") or {}, self.args.price_in / 1e6, self.args.price_out / 1e6
        used = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        used = [count if isinstance(count, int) else 0 for count in used]
        with self.lock:
            self.usage = [self.usage[0] + used[0], self.usage[1] + used[1]]
            self.dearest = max(self.dearest, used[0] * price_in + max(used[1], self.args.max_tokens) * price_out)
            self.spent += used[0] * price_in + used[1] * price_out if any(used) else self.dearest
        choice = reply["choices"][0]
        raw = choice["message"]["content"] or ""  # null: refused, or no token left after the reasoning
        row = {"label": parse_answer(raw, self.classes, self.args.logprobs), "raw": self.hide(raw)[:2000]}
        tokens = (choice.get("logprobs") or {}).get("content") or [] if self.args.logprobs else []
        mass = np.zeros(len(self.classes))
        for token in [token for token in tokens if option_number(token["token"], len(mass)) is not None][:1]:
            for other in token.get("top_logprobs") or []:
                if (number := option_number(other["token"], len(mass))) is not None:
                    mass[number] += math.exp(other["logprob"])
        if mass.sum() > 0:
            row |= {"label": int(mass.argmax()), "probs": (mass / mass.sum()).round(5).tolist()}
        return row


def data_url(x: np.ndarray, size: int) -> str:
    """An image [C, H, W] as PNG, its longer side resized to `size` pixels."""
    image, png = picture(x), io.BytesIO()
    sides = [max(1, round(side * size / max(image.size))) for side in image.size]
    image.resize(sides, resample=3).save(png, "PNG")  # 3: bicubic
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def label_with_chat(data: Data, todo: list[int], args: Args, prompt: str) -> Rows:
    """Rows in the order in which answers come; the first request goes alone and shows what the endpoint takes.

    Ctrl-C, a refusal and --max-cost end the asking; answers in flight are still taken, as they are paid for."""
    part, endpoint = data.part(args.split), Endpoint(args, data.classes)
    options = [readable(name) for name in data.classes]
    how = HOW_TO_ANSWER["letter" if args.logprobs else "json" if args.json_schema else "words"]
    if args.logprobs:
        options = [f"{string.ascii_uppercase[number]}) {name}" for number, name in enumerate(options)]

    def question(i: int) -> Any:
        if hasattr(part, "texts"):
            return f"{how}\n\n{fill(prompt, part.texts[i][: args.max_chars], options)}"
        text = {"type": "text", "text": f"{how}\n\n{fill(prompt, '', options)}"}
        return [text, {"type": "image_url", "image_url": {"url": data_url(part.x[i], args.image_size)}}]

    def note_signal(number: int, frame: Any) -> None:
        endpoint.stop.set()
        signal.signal(number, signal.default_int_handler)  # a second one does not wait
        tqdm.write(f"stopping when {endpoint.in_flight} requests in flight are answered; again: now", file=sys.stderr)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    pool, flying, todo, failed = ThreadPoolExecutor(args.concurrency), set(), todo[::-1], 0
    try:
        while todo or flying:
            free = (args.concurrency if endpoint.answered else 1) - len(flying)
            while todo and free > 0 and not endpoint.stop.is_set() and endpoint.affordable(1):
                flying.add(pool.submit(endpoint.ask, todo[-1], question(todo.pop())))
                free, endpoint.in_flight = free - 1, len(flying)
            if not flying:
                break
            done, flying = wait(flying, 0.2, FIRST_COMPLETED)  # 0.2 s: also looks after signals
            endpoint.in_flight = len(flying)
            for future in done:
                if (row := future.result()) is None:  # no reply, or stopped while it waited to ask again
                    failed += 1
                    continue
                with endpoint.lock:
                    row["usage"], endpoint.usage, endpoint.answered = endpoint.usage, [0, 0], True
                failed = 0
                yield row
            if failed > (10 if endpoint.answered else 0) and not endpoint.stop.is_set() and endpoint.affordable(1):
                endpoint.refuse(f"{failed} examples in a row had no reply in {ATTEMPTS} attempts; is it down?")
        interrupted = endpoint.stop.is_set()
        if any(endpoint.usage):
            yield {"usage": endpoint.usage}
    finally:
        endpoint.stop.set()  # nobody asks on
        pool.shutdown(wait=False, cancel_futures=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if endpoint.refusal:
        raise UserError(endpoint.refusal)
    if interrupted:
        raise KeyboardInterrupt
    if todo:
        tqdm.write("stopped, as one more request might pass --max-cost", file=sys.stderr)


# ---------------------------------------------------------------------------- import


def load_arrays(path: Path) -> dict[str, Any]:
    """A torch-saved dict of NumPy arrays, numbers and strings: these are made, and no other function is called."""
    types = {type(np.dtype(code)) for code in "?bhilqBHILQefdUO"}
    makers = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]  # NumPy's own _reconstruct and scalar
    both = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in makers for core in ("core", "_core")]  # NumPy 1, 2
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *types, *both]):
        return torch.load(path, map_location="cpu", weights_only=True)


def label_of(value: Any, classes: list[str]) -> int | None:
    """Class of a name or free answer, a number (-1: none) or a row of probabilities."""
    if isinstance(value, str):
        return parse_answer(value, classes)
    label = int(np.argmax(value)) if np.ndim(value) else int(value)
    if not -1 <= label < len(classes):
        raise ValueError(f"label {label}, expected -1 to {len(classes) - 1}")
    return None if label == -1 else label


def label_from_file(data: Data, todo: list[int], args: Args, prompt: None) -> Rows:
    """Rows of labels that were made elsewhere. Raises UserError when the file belongs to other or reordered data."""
    path, part, classes = Path(args.input), data.part(args.split), data.classes
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = list(csv.DictReader(file))
            order = [int(line.get("index", number)) for number, line in enumerate(lines)]
            values = [lines[at]["label"].strip() for at in np.argsort(order)]
            values = [int(v) if v.isdecimal() and v not in classes else v for v in values]
            if sorted(order) != list(range(len(lines))) or None in [label_of(v, classes) for v in values if v != ""]:
                raise ValueError("expected every index from 0 once, and names or numbers of classes")
            found = {"pred_labels": values}
        else:
            found = {"pred_labels": np.load(path, allow_pickle=False)} if path.suffix == ".npy" else load_arrays(path)
        kinds = ("decoded_predictions", "decoded_predictions_processed", "pred_labels")  # P5
        values = next(found[kind] for kind in kinds if found.get(kind) is not None)
        labels = [label_of(value, classes) for value in values]
        truth = [label_of(value, classes) for value in found.get("gt_labels", found.get("decoded_labels", ()))]
        probs = np.asarray(found.get("probs", values if np.ndim(values) == 2 else ()))
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"--input {path}: could not be read: {reason_of(error)[:200]}") from None
    if len(labels) != len(part):
        raise UserError(f"--input {path}: {len(labels)} labels, but {data.name}'s {args.split} part has {len(part)}")
    if any(t is not None and y not in (-1, t) for t, y in zip(truth, part.y, strict=False)):
        raise UserError(f"--input {path}: its true labels are not {data.name}'s {args.split} part's in their order")
    # Columns in another order of classes, as in one of the published files, are of no use.
    keep = probs.shape == (len(part), len(classes)) and (probs.argmax(axis=1) == np.array(labels, float)).all()
    keep = keep and ((probs >= 0) & (probs <= 1)).all()  # not logits, not NaN
    for i in todo:
        row = {"index": i, "label": labels[i]} | ({"probs": probs[i].astype(float).round(5).tolist()} if keep else {})
        yield row | ({"raw": values[i]} if isinstance(values[i], str) else {})


# ---------------------------------------------------------------------------- main

TEACHERS = {  # (function, default model, arguments that shape the labels and go into the header)
    "glyphs": (label_with_glyphs, "cnn on rendered glyphs", ()),
    "clip": (label_with_clip, "openai/clip-vit-large-patch14", ()),
    "text": (label_with_text_model, "google/flan-t5-large", ("max_chars", "order_swaps")),
    "embedding": (label_with_embedding, "sentence-transformers/all-MiniLM-L6-v2", ("max_chars", "temperature")),
    "chat": (label_with_chat, None, ("max_chars", "logprobs", "json_schema", "image_size")),
    "student": (label_with_student, None, ()),
    "import": (label_from_file, None, ()),
}


def check(args: Args, data: Data) -> None:
    """Raise UserError for arguments that are out of range or do not go together."""
    needed = {"student": "student", "import": "input", "chat": "model"}.get(args.teacher)
    if needed and getattr(args, needed) is None:
        raise UserError(f"--teacher {args.teacher} needs --{needed}")
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name.startswith("price")):
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if args.logprobs and args.json_schema:
        raise UserError("--logprobs --json-schema: one asks for a letter, the other for JSON; leave one out")
    if args.logprobs and len(data.classes) > 20:
        raise UserError(f"--logprobs: {len(data.classes)} classes, at most 20 can be asked for; leave it out")
    if args.max_cost is not None and not args.price_in + args.price_out > 0:
        raise UserError("--max-cost needs --price-in and --price-out")


def label(data: Data, args: Args) -> dict[str, Any]:
    """Label what the file does not hold yet; returns and prints what it holds then, also when it is interrupted."""
    check(args, data)
    teach, model, settings = TEACHERS[args.teacher]
    args, part, prompt = replace(args, model=args.model or model), data.part(args.split), prompt_for(data, args)
    model = args.model
    if source := {"student": f"{args.student}/model.safetensors", "import": args.input}.get(args.teacher):
        if not Path(source).is_file():
            raise UserError(f"--teacher {args.teacher}: there is no file {source}")
        model = f"{Path(source).name} {digest(Path(source).read_bytes())}"
    path = Path(args.output or f"{args.data_dir}/labels/{data.name}-{args.split}-{args.teacher}.jsonl")
    shaping = {name: getattr(args, name) for name in settings}
    header = header_of(data, args.split, args.teacher, model, prompt, **shaping)
    file, rows = open_labels(path, header)
    done = {row.get("index") for row in rows}
    todo = [i for i in range(len(part)) if i not in done]
    if args.dry_run:
        todo = todo[:: max(1, len(todo) // args.dry_run)][: args.dry_run]
    if args.max_cost is not None:  # what is left of it; nothing is asked when the dearest example would pass it
        spent, dearest = cost_of(rows, args), max((cost_of([row], args) for row in rows), default=0.0)
        todo, args = (todo if spent + dearest <= args.max_cost else []), replace(args, max_cost=args.max_cost - spent)
    try:
        with file, tqdm(total=len(todo), desc=f"{args.teacher} labels {data.name} {args.split}", disable=None) as bar:
            for row in teach(data, todo, args, prompt) if todo else ():
                append(file, row)
                rows.append(row)
                bar.update("index" in row)
    finally:
        result = summary(path, rows, data, args)
    return result


def cost_of(rows: list[dict[str, Any]], args: Args) -> float:
    used = [row["usage"] for row in rows if "usage" in row]
    return sum(tokens_in * args.price_in + tokens_out * args.price_out for tokens_in, tokens_out in used) / 1e6


def summary(path: Path, rows: list[dict[str, Any]], data: Data, args: Args) -> dict[str, Any]:
    """What a label file holds: counts, classes, tokens, cost, and the accuracy where true labels are known (in own
    data: of the labeled examples), an abstention counting as wrong, with Wilson's 95 % interval."""
    y, classes = data.part(args.split).y, data.classes
    labels, probs = collect(path, rows, len(y), len(classes))
    known, counts = (labels != -2) & (y >= 0), np.bincount(labels[labels >= 0], minlength=len(classes))
    right = int((labels == y)[known].sum())
    used = [sum(row["usage"][side] for row in rows if "usage" in row) for side in (0, 1)]
    result = {
        "path": str(path), "num_examples": len(y), "labeled": int((labels != -2).sum()), "known": int(known.sum()),
        "abstentions": int((labels == -1).sum()), "with_probs": int((~np.isnan(probs).any(axis=1)).sum()),
        "classes": dict(zip(classes, counts.tolist(), strict=True)), "tokens": used, "cost": cost_of(rows, args),
        "accuracy": None, "interval": None,
    }  # fmt: skip
    said = "{path}: {labeled} of {num_examples} labeled, {abstentions} abstentions, {with_probs} with probs"
    print(said.format(**result))
    print("labels of a class:", class_counts(labels, classes))
    if any(used):
        for what, factor in (("so far", 1), (f"estimate for all {len(y)}", len(y) / max(1, result["labeled"]))):
            tokens_in, tokens_out, cost = used[0] * factor, used[1] * factor, result["cost"] * factor
            print(f"{what}: {tokens_in:.0f} tokens in, {tokens_out:.0f} out, cost {cost:.4f}")
    if result["known"]:
        result |= {"accuracy": 100 * right / result["known"], "interval": wilson_interval(right, result["known"])}
        print(f"accuracy {share_right(right, result['known'])} known labels")
    return result


def complete(path: Path) -> bool:
    if not path.is_file():
        return False
    header, rows, _ = read_rows(path)
    return sum("index" in row for row in rows) == header.get("num_examples")


@first_process_first
def default_labels(
    data: Data, data_dir: str, dataset: str | None = None, test_file: str | None = None
) -> tuple[Path, Path | None]:
    """Label files of the train and (if there is one) test part in `data_dir`/labels; made now for digits and images.

    dataset, test_file: as the user gave them, for the command that is advised. Raises UserError when several
    files are there to choose from, or none and the data are texts."""
    folder = Path(data_dir) / "labels"
    if data.name == "digits":
        for split in ("train", "test"):
            if not complete(folder / f"digits-{split}-glyphs.jsonl"):
                label(data, Args(split=split, data_dir=data_dir, device="cpu"))
        return folder / "digits-train-glyphs.jsonl", folder / "digits-test-glyphs.jsonl"
    found = [path for path in sorted(folder.glob(f"{glob.escape(data.name)}-train-*.jsonl")) if complete(path)]
    if len(found) > 1:
        raise UserError(f"several label files: {', '.join(map(str, found))}; choose one by --pseudolabels")
    if not found and hasattr(data.train, "texts"):
        more = f" --test-file {test_file}" if test_file else ""
        command = f"python pseudolabel.py --dataset {dataset or data.name}{more} --teacher text"
        raise UserError(f"no labels of {data.name} in {folder}; make them, e.g. by {command}, or give --pseudolabels")
    if not found:
        found = [Path(label(data, Args(dataset=data.name, teacher="clip", data_dir=data_dir))["path"])]
    test = folder / f"{data.name}-test-{found[0].name.removeprefix(f'{data.name}-train-')}"
    return found[0], test if complete(test) else None


def load_new_pictures(folder: Path, args: Args) -> Data:
    """All pictures below a folder, without labels, as the student of `args` has seen test pictures."""
    config = load_student(args.student)[1]
    if not config["mean"]:
        raise UserError(f"--student {args.student}: reads texts, {folder} is a folder of pictures; give a .csv file")
    preset = PRESETS["cifar10"]._replace(size=config["size"], pad=config.get("pad", 1))
    store = f"{args.data_dir}/decoded/new-{digest(str(folder.resolve()).encode())}"
    pictures = [(file, -1) for file in files_below(folder)]
    if not pictures:
        raise UserError(f"--dataset {folder}: there is no picture in it or below it")
    part = decode(pictures, store, preset, "test")
    if len(config["mean"]) == 1:
        part.x = luminance(torch.tensor(part.x)).numpy()
    return Data(folder.resolve().name, config["classes"], part, None)


def write_csv(path: Path, data: Data, args: Args, labels: Path) -> None:
    """What `labels` holds as a CSV: index, file (images that have one) or text, label, a probability a class."""
    part, (_, rows, _) = data.part(args.split), read_rows(labels)
    kind, names = ("text", part.texts) if isinstance(part, TextSplit) else ("file", part.files)
    content = io.StringIO()
    out = csv.writer(content)
    out.writerow(["index", kind, "label", *data.classes])
    for row in sorted((row for row in rows if "index" in row), key=lambda row: row["index"]):
        name = "" if row["label"] is None else data.classes[row["label"]]
        probs = row.get("probs", [""] * len(data.classes))
        out.writerow([row["index"], names[row["index"]] if names else "", name, *probs])
    write_atomically(path, content.getvalue().encode())
    print(f"{path}: label and probabilities of {len(rows)} examples")


def main(args: Args) -> dict[str, Any]:
    """Label a part of a data set as `args` say; returns what is printed at the end. Raises UserError."""
    folder = Path(args.dataset)
    if args.teacher == "student" and args.student and folder.is_dir() and not (folder / "train").is_dir():
        data = load_new_pictures(folder, args)
    else:
        data = load_data(args.dataset, args.data_dir, args.test_file)
    if args.student and not data.classes:  # new texts without a single label
        data.classes = load_student(args.student)[1]["classes"]
    result = label(data, args)
    if args.csv:
        write_csv(Path(args.csv), data, args, Path(result["path"]))
    return result


if __name__ == "__main__":
    cli(Args, main)
