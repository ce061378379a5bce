# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.9", "numpy>=1.26",
#   "scikit-learn>=1.5", "tyro>=0.9", "pytest>=8"]
# ///
"""Label a data set with a foundation model: one JSON Lines file, made once, read by zeromatch.py.

    python pseudolabel.py --dataset digits --split test
    python pseudolabel.py --dataset fashion_mnist --teacher chat --model gpt-4.1 --dry-run 20
    python pseudolabel.py --dataset new --teacher student --student runs/NAME/student --csv new.csv

Teachers
    glyphs     digits only: a network trained on digits drawn with Pillow's built-in font; truly
               zero-shot, with systematic mistakes (its ones have serifs, its sevens no bar)
    clip       CLIP or SigLIP          text  FLAN-T5, any seq2seq, an instruction-tuned causal model
    embedding  a sentence encoder      chat  any OpenAI-compatible endpoint, for images and texts
    student    a network trained by our scripts: this is how you predict with it
    import     labels or probabilities made elsewhere: .csv, .npy, the authors' .pt

The file. Line 1 is a header: data set, split, class names in order, a fingerprint of the examples,
teacher, model, prompt, settings. Every other line is one example, in any order:
    {"index": 17, "label": 3, "probs": [...]}
Label null: no answer. Chat adds the raw answer and the tokens (in, out) billed since the last line.
A line with tokens but no label: asked, not answered; the next run asks again, for the last time.
The file only grows and may be cut anywhere; the same command resumes after the last whole line.

Departures from the authors' pipelines (jichan3751/zeromatch @8ca4079)
  P1  A label is read if the answer, its first sentence or just one of its lines names it, perhaps
      after "the answer is"; or if the answer holds no other label (the longest, as whole words), no
      word around it denies ("not", "no", "sorry" ...), and it is not as short as "no" or "on".
      Authors: substrings, the last class wins ("pink primrose": "rose"), else one fixed class.
  P2  Local language models write no answer. They score every label: the log-probabilities of its
      tokens and of the end of the answer (or one label could begin another), not divided by length.
  P3  Class names in prompts have spaces instead of underscores.
  P4  Chat: temperature 0, one user message, images as PNG resized to --image-size.
  P5  Raw answers in an imported file are matched again by P1.
  P6  Teachers see images as we store them: squashed (train) or cropped (test) to a square.
"""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import unicodedata
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Iterator, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale, to_pil_image, to_tensor
from tqdm import tqdm

from common import (
    OWN, PRESETS, Data, SmallCNN, Split, Student, UserError, class_counts, cli, decode, files_below,
    first_process_first, load_data, load_pretrained, load_student, make_views, predict, preset_of,
    reason_of, seed_step, setup_device, share_right, write_atomically,
)  # fmt: skip

FORMAT = "zeromatch-labels-1"
Row = dict[str, Any]  # a line of a label file
Rows = Iterator[Row]
ODD = (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration)


@dataclass
class Args:
    dataset: str = "digits"  # name in common.PRESETS, folder of images, .csv or .jsonl of texts
    test_file: str | None = None  # test texts; unset: a fifth of the labeled rows of --dataset
    split: Literal["train", "test"] = "train"  # part to label
    teacher: Literal["glyphs", "clip", "text", "embedding", "chat", "student", "import"] = "glyphs"
    output: str | None = None  # label file; unset: DATA_DIR/labels/DATASET-SPLIT-TEACHER.jsonl
    csv: str | None = None  # also write a CSV: file or text, label, one probability per class
    data_dir: str = "data"  # folder of data sets and label files
    dry_run: int | None = None  # label only so many, spread over the part, and estimate the cost
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # of local models
    batch_size: int = 32  # examples per forward pass of a local model
    model: str | None = None
    """Hub id, folder, or name at the endpoint; unset: see README. The paper also uses
    google/flan-t5-xxl, gpt-4o-2024-08-06 (texts), gpt-4.1-2025-04-14 (images)."""
    prompt: str | None = None
    """text, chat: file with a question that contains {text} and {options}. clip, embedding: file of
    templates that contain {label} and are averaged, or of one description per class, in order."""
    max_chars: int = 2000  # cuts texts; a local model may cut more; the options are never cut
    temperature: float = 0.05  # embedding: softmax over classes of cosine / temperature
    student: str | None = None  # student: folder from a training script, RUN/student
    input: str | None = None  # import: file; a CSV has columns label (name, number, empty), index
    base_url: str = "https://api.openai.com/v1"  # chat; or, for example, http://localhost:8000/v1
    key_variable: str | None = None  # with the key; unset: OPENAI_API_KEY, for api.openai.com only
    concurrency: int = 16  # requests in flight
    timeout: float = 60.0  # seconds without a byte until a request is dropped and sent again
    max_tokens: int = 32  # longest answer; reasoning models need more
    logprobs: bool = False  # letter the options, ask for token probabilities (up to 20 classes)
    extra_body: str = "{}"
    """JSON object added to every request: reasoning_effort, provider, response_format (the answer
    is then the field "label"), ..."""
    image_size: int = 224  # longer side of the images sent, pixels
    price_in: float = 0.0  # of a million input tokens
    price_out: float = 0.0  # of a million output tokens
    max_cost: float | None = None  # stop before the cost of the whole file exceeds this


# ---------------------------------------------------------------------------- the label file


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def header_of(data: Data, split: str, *made: Any) -> Row:
    """Line 1 of a label file. made: teacher, model, prompt, settings, as far as they are known."""
    rows = data.part(split).hashes()
    order, content = digest(b"".join(rows)), digest(b"".join(sorted(rows)))
    header = {
        "format": FORMAT, "dataset": data.name, "split": split, "num_examples": len(rows),
        "classes": data.classes, "fingerprint": {"order": order, "content": content},
    }  # fmt: skip
    return header | dict(zip(("teacher", "model", "prompt", "settings"), made, strict=False))


def read_rows(path: Path, **wanted: Any) -> tuple[Row, list[Row], int]:
    """(header, rows, length in bytes) of the whole lines of a label file. Raises UserError if it is
    missing or damaged, or has rows and a header that differs from `wanted`."""
    content, lines = path.read_bytes(), []
    content = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(dict(**json.loads(line)))
        except ODD:
            raise UserError(f"{path}: line {number} is not a JSON object; damaged?") from None
    header, *rows = lines or [{}]
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: expected a first line with format {FORMAT}, from pseudolabel.py")
    for key in wanted if rows else ():
        if wanted[key] != header.get(key):
            reason = f"{key} {header.get(key)!r:.90}, expected {wanted[key]!r:.90}"
            raise UserError(f"{path}: made for {reason}; new data or settings need a new --output")
    return header, rows, len(content)


def is_valid(row: Row, n: int, k: int) -> bool:
    """Whether a row suits n examples and k classes. One with usage but no label had no answer."""
    row = {"index": 0, "label": None} | row if "usage" in row and "label" not in row else row
    with suppress(KeyError, TypeError):
        label, probs = row["label"], row.get("probs", [0] * k)
        whole = [row["index"], 0 if label is None else label, *row.get("usage", [0, 0])]
        typed = list(map(type, whole)) == [int] * 4 and {*map(type, probs)} <= {int, float}
        limits = zip([*whole, *probs], [n - 1, k - 1, math.inf, math.inf, *[1] * len(probs)])
        return typed and len(probs) == k and all(0 <= value <= high for value, high in limits)
    return False


def collect(path: Path, rows: list[Row], n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n] int64, -1: no answer, -2: no row; probs [n, k] float32, NaN: none). Raises
    UserError for a row that is not valid and for an index that occurs twice."""
    labels, probs = np.full(n, -2), np.full((n, k), np.nan, np.float32)
    for number, row in enumerate(rows, 2):
        index = row.get("index") if "label" in row else None
        if not is_valid(row, n, k) or index is not None and labels[index] != -2:
            raise UserError(f"{path}: line {number} is damaged or not unique: {row!s:.90}")
        if index is not None:
            labels[index] = -1 if row["label"] is None else row["label"]
            probs[index] = row.get("probs", np.nan)
    return labels, probs


def read_labels(path: str | Path, data: Data, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(labels [N] int64, -1: no answer; probs [N, K] float32, None unless every row has them).
    Raises UserError with the reason if the file is for other data, incomplete or damaged."""
    header, rows, _ = read_rows(Path(path), **header_of(data, split))
    print(f"labels of the {split} part: {path}, teacher {header.get('teacher')}")
    labels, probs = collect(path, rows, len(data.part(split)), len(data.classes))
    if missing := (labels == -2).sum():
        raise UserError(f"{path}: {missing} of {len(labels)} examples have no label yet; resume it")
    if (labels == -1).all():
        raise UserError(f"{path}: the teacher answered nothing: every label is null")
    return labels, None if np.isnan(probs).any() else probs


def open_labels(path: Path, header: Row) -> tuple[Any, list[Row]]:
    """(file to append to, its rows). Cuts off a torn last line; a file without rows starts anew.
    Raises UserError if another process writes to the file or if it was made in another way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)  # one write per row: a killed run leaves whole rows
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path}: another process writes to it; set another --output") from None
    except (ImportError, OSError):
        pass  # no locks on Windows and on some file systems
    _, rows, length = read_rows(path, **header) if path.stat().st_size else ({}, [], 0)
    collect(path, rows, header["num_examples"], len(header["classes"]))  # damaged: left as it is
    os.truncate(path, length if rows else 0)
    if not rows:
        file.write((json.dumps(header) + "\n").encode())
    return file, rows


def rows_of(idx: Tensor, probs: Tensor) -> Rows:
    """Rows labeled with the most probable class, of probs [n, K]. Raises UserError for NaN."""
    if not probs.isfinite().all():
        raise UserError("the teacher's probabilities are not finite; try --device cpu")
    for i, row in zip(idx.tolist(), probs.float().cpu(), strict=True):
        yield {"index": i, "label": int(row.argmax()), "probs": [round(p, 5) for p in row.tolist()]}


def write_labels(path: Path, header: Row, probs: np.ndarray) -> None:
    """Write a complete label file at once from probabilities [N, K]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *rows_of(torch.arange(len(probs)), torch.as_tensor(probs))]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


# ---------------------------------------------------------------------------- prompts and answers

TEMPLATE, QUESTION, OPTIONS = 0, 1, " Options: {options}.\n\nAnswer:"
PROMPTS = {  # kind of data: (template for clip and embedding, question for text and chat)
    "images": ("This is a photo of {label}.", "What does the image show? Options: {options}."),
    "sentiment": ("This review is {label}.", "Review: {text}\n\nWhat is its mood?" + OPTIONS),
    "topics": ("This text is about {label}.", "Text: {text}\n\nWhat is its topic?" + OPTIONS),
}
WORDS = "Answer with one of the options, word for word, and nothing else."
LETTER = "Answer with the letter of one option and nothing else."
LETTERS = "ABCDEFGHIJKLMNOPQRST"  # of options: endpoints send the 20 most probable tokens

OTHER = r"\u0590-\u1dff\u2190-\u2bff\u3040-\ufaff\U0001f000-\U0003ffff"  # scripts, symbols
# a number; letters (Latin, Greek, Cyrillic); one character of another script; a sign
WORD = rf"(?<![^\W_])[-+]?\d+(?:\.\d+)?(?![^\W_])|[^\W_{OTHER}]+|[{OTHER}]|[+#<>=%&$@]"
DENIALS = r"""(?x)(?<!\S)(not|no|neither|nor|never|none|nothing|without|lacks|isnt|doesnt|dont|
false|anti|hardly|opposite|unlike|impossible|sorry|unable|unclear|unsure|refuse|decline|violates|
nicht|kein|keine|guidelines|pas|ni|não|не|нет|
[不没沒非未无無]|な\ い|아\ 니|न\ ह|ل\ ي\ س)(?!\S)"""
LEAD = r"^((my|final|best|answer|label|class|category|topic|text|image|it|this|that|is|s|an?) )+"


@lru_cache(10_000)
def forms_of(text: str) -> tuple[str, str, str]:
    """A text in NFC and folded case; its words (see WORD) with a space between, without articles
    unless nothing else is left; its words after a LEAD."""
    plain = unicodedata.normalize("NFC", text).casefold().replace("\u0307", "").strip(" \n.\"'`*")
    words = re.sub(r"n['\u2019]t\b|\b(non|cannot)\b", " not", plain.replace("_", " "))
    words = re.findall(WORD, re.sub(r"(\d)\.0+\b", r"\1", words))
    words = " ".join([word for word in words if word not in ("a", "an", "the")] or words)
    return plain, words, re.sub(LEAD, "", words)


def named(text: str, classes: list[str]) -> int | None:
    """The one class whose name is a text, in any of its forms."""
    for form, *names in zip(forms_of(text), *map(forms_of, classes)):
        if form and names.count(form) == 1:
            return names.index(form)
    return None


def option_number(mark: str, num_classes: int) -> int:
    """Class of an option's letter, such as " b" or "(B)"; -1 for anything else."""
    letter = mark.strip(" \n.:)(*'\"").upper()
    return LETTERS[:num_classes].find(letter) if len(letter) == 1 else -1


def parse_answer(answer: str, classes: list[str], lettered: bool = False) -> int | None:
    """Class of an answer by rule P1, else (if the options are lettered) of the letter at its
    beginning or end; of JSON, the field "label" or all values are read. None: none or several."""
    answer = spoken(answer)
    with suppress(*ODD):  # not a JSON object
        found = json.loads(answer[answer.find("{") : answer.rfind("}") + 1], strict=False)
        value = found["label"] if "label" in found else [*found.values()]
        answer = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    first = re.split(r"[.!;]\s|\n", answer)[0]
    for texts in [answer], [first], answer.splitlines():
        found = {named(text, classes) for text in texts} - {None}
        if len(found) == 1:
            return found.pop()
    labels, inside, end = [forms_of(name)[1] for name in classes], set(), 0
    longest_first = "|".join(map(re.escape, sorted(filter(None, labels), key=len, reverse=True)))
    words = forms_of(answer)[1]
    if re.search(DENIALS, re.sub(rf"(?<!\S)({longest_first})(?!\S)", "", words)):
        return None
    for match in re.finditer(rf"(?<!\S)(?=({longest_first})(?!\S))", words):
        if match.end(1) > end:  # not inside the previous label
            inside.add(match[1])
            end = match.end(1)
    is_short = re.fullmatch(r"[^\W\d]{1,2}|yes", " ".join(inside))
    found = {n for n, label in enumerate(labels) if label and label in inside and not is_short}
    if lettered and not found:
        marks = re.findall(r"^\W*(\w+)(?=[.):,\n]|\W*$)|(\w+)\W*$", answer)
        found = {option_number("".join(mark), len(classes)) for mark in marks} - {-1}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------------------- teachers: local


def draw_digits(glyphs: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Random digits, distorted, then made as the handwritten ones were: a 32x32 bitmap averaged in
    4x4 blocks. The ranges match the average ink, width and slant of the handwritten images; no
    label was used to choose them. uint8 [batch, 1, 8, 8], labels [batch]."""
    y = torch.randint(10, (batch,))
    images = glyphs[y, torch.randint(glyphs.shape[1], (batch,))]
    ranges = [(0.7, 1.1), (-0.15, 0.15), (-0.25, 0.15), (0.95, 1.1), (-0.05, 0.05), (-0.05, 0.05)]
    drawn = [low + (high - low) * torch.rand(batch) for low, high in ranges]
    width, angle, shear, size, right, down = drawn
    ink_width = (images.amax(dim=2).squeeze(1) > 0.3).float().mean(dim=1)
    width *= (0.62 / ink_width).sqrt()  # widens narrow digits, narrows wide ones
    affine = torch.stack([
        angle.cos() / width, shear + angle.sin(), right,
        -angle.sin(), angle.cos(), down,
    ], dim=1).view(batch, 2, 3) * size.view(batch, 1, 1)  # fmt: skip
    elastic = F.interpolate(torch.randn(batch, 2, 3, 3) * 0.2, size=(32, 32), mode="bicubic")
    grid = F.affine_grid(affine, [batch, 1, 32, 32], align_corners=False)
    grid += elastic.permute(0, 2, 3, 1)
    bitmap = (F.grid_sample(images, grid, align_corners=False) > 0.5).float()
    return (F.avg_pool2d(bitmap, 4) * 255).round().to(torch.uint8), y


@cache
def train_glyph_teacher(num_steps: int = 300, batch: int = 128) -> Student:
    """A small network trained on drawn digits only, in about ten seconds on two CPU cores: those of
    Pillow's built-in font in four weights, with strokes 0, 2, 4, 6 pixels wider than its own."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    preset, font, glyphs = preset_of("digits"), ImageFont.load_default(96), []
    for number in range(40):
        image, style = Image.new("L", (160, 160)), {"anchor": "mm", "stroke_width": number % 4 * 2}
        ImageDraw.Draw(image).text((80, 80), str(number // 4), 255, font, **style)
        ink = image.crop(image.getbbox())
        glyphs.append(to_tensor(ImageOps.pad(ink, (64, 64), centering=(0.49, 0.5))))
    seed_step(0, "glyph teacher", 0)
    glyphs, student = torch.stack(glyphs).view(10, 4, 1, 64, 64), Student(SmallCNN(1, 8, 32), 10)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in tqdm(range(num_steps), "training the glyph teacher", disable=None):
        x, y = draw_digits(glyphs, batch)
        logits, *_ = student((x.float() / 255 - preset.mean[0]) / preset.std[0])
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        schedule.step()
    return student


def label_with_network(data: Data, todo: list[int], args: Args) -> Rows:
    """Rows from a network of ours: the glyph teacher, or --student on data like its own."""
    part, preset, backbone = data.part(args.split), preset_of("digits"), "cnn"
    if args.teacher == "glyphs":
        student = train_glyph_teacher()
    else:
        student, config = load_student(args.student)
        size, mean, backbone = config["size"], config["mean"], config["backbone"]
        fits = config["classes"] == data.classes and part.is_text != bool(mean)
        fits = fits and (part.is_text or part.x.shape[2] in (size, round(size / 0.875)))
        if not fits or config["num_extra"]:
            other = "was trained for other classes or image sizes, or also reads a teacher's labels"
            raise UserError(f"--student {args.student}: {other}; use another one")
        preset = OWN["texts"]._replace(size=size, mean=mean, std=config["std"])
    device, _ = setup_device(args.device, "off", backbone)
    for idx in torch.tensor(todo).split(500):
        views = make_views(part.take(idx.numpy()), preset, backbone, device)
        yield from rows_of(idx, predict(student.to(device), views))


def load_model(kind: str, reader: str, args: Args, **options: Any) -> tuple[Any, Any, Any, int]:
    """(model, tokenizer or processor, device, longest text in tokens)."""
    device, dtype = setup_device(args.device, "auto", "")
    model = load_pretrained(kind, args.model, dtype=dtype or torch.float32)
    reader = load_pretrained(reader, args.model, **options)
    config = getattr(model.config, "text_config", model.config)
    longest = getattr(config, "max_position_embeddings", None) or 10**6
    longest = min(longest, getattr(reader, "model_max_length", longest))
    return model.to(device).eval().requires_grad_(False), reader, device, longest


def label_by_cosine(data: Data, todo: list[int], args: Args) -> Rows:
    """p_k = softmax_k(scale * cosine(example, class k)); class k is a mean over templates, a text
    the mean over its tokens. The softmax cancels the bias of SigLIP's sigmoid."""
    x, names = data.part(args.split).x, [name.replace("_", " ") for name in data.classes]  # P3
    lines = [line for line in args.prompt.splitlines() if line.strip()]
    phrases = [lines]  # one description per class, or templates
    if "{label}" in args.prompt:
        phrases = [[line.replace("{label}", name) for name in names] for line in lines]
    if len(phrases[0]) != len(names):
        raise UserError(f"--prompt: expected lines with {{label}}, or {len(names)}, one per class")
    is_clip, kind, reader = args.teacher == "clip", "AutoModel", "AutoTokenizer"
    if is_clip:
        kind, reader = "AutoModelForZeroShotImageClassification", "AutoProcessor"
    model, reader, device, length = load_model(kind, reader, args)
    padding = "max_length" if "siglip" in model.config.model_type else True  # as trained
    style = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def embed_texts(texts: list[str]) -> Tensor:
        tokens = reader(text=[text[: args.max_chars] for text in texts], **style).to(device)
        if is_clip:
            return model.get_text_features(**tokens).pooler_output
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return (states.float() * mask).sum(dim=1) / mask.sum(dim=1)

    def embed_images(images: list[np.ndarray]) -> Tensor:
        images = [to_pil_image(torch.tensor(image)).convert("RGB") for image in images]
        pixels = reader(images=images, return_tensors="pt")["pixel_values"].to(device, model.dtype)
        return model.get_image_features(pixel_values=pixels).pooler_output

    units = torch.stack([F.normalize(embed_texts(row).float(), dim=1) for row in phrases])
    classes = F.normalize(units.mean(dim=0), dim=1)  # [K, D]
    embed = embed_images if is_clip else embed_texts
    scale = model.logit_scale.float().exp() if is_clip else 1 / args.temperature
    for idx in torch.tensor(sorted(todo, key=lambda i: -len(x[i]))).split(args.batch_size):
        cosine = F.normalize(embed([x[i] for i in idx]).float(), dim=1) @ classes.T
        yield from rows_of(idx, (scale * cosine).softmax(dim=1))


def answer_log_probs(model: Any, ids: Tensor, mask: Tensor, answers: list[Tensor]) -> Tensor:
    """log P(answer_k | prompt_i), summed over the tokens of answer_k. ids, mask [n, T] (padded on
    the left for a causal model), K answers [L_k] int64 -> [n, K]. Prompts are read only once."""
    columns, has_positions = [], "position_ids" in inspect.signature(model.forward).parameters

    def read(ids: Tensor, mask: Tensor, **more: Any) -> Any:
        at = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        at = {"position_ids": at} if has_positions else {}
        return model(input_ids=ids, attention_mask=mask, **at, **more)

    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    else:
        prompt = read(ids, mask, logits_to_keep=1, use_cache=True)
    for answer in [answer.repeat(len(ids), 1) for answer in answers]:  # [n, L]
        if model.config.is_encoder_decoder:
            logits = model(encoder_outputs=encoded, attention_mask=mask, labels=answer).logits
        else:
            seen = torch.cat([mask, torch.ones_like(answer[:, 1:])], dim=1)
            past = copy.deepcopy(prompt.past_key_values)  # some kinds cannot be cut back
            after = read(answer[:, :-1], seen, past_key_values=past).logits
            logits = torch.cat([prompt.logits, after], dim=1)  # [n, L, vocabulary]
        tokens = logits.float().log_softmax(dim=2).gather(2, answer[..., None])
        columns.append(tokens.sum(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def label_with_text_model(data: Data, todo: list[int], args: Args) -> Rows:
    """p_k = P(answer_k) / sum_j P(answer_j).  # P2"""
    texts, names = data.part(args.split).x, [name.replace("_", " ") for name in data.classes]  # P3
    question, end = args.prompt.replace("{options}", ", ".join(names)), "\n"
    seq2seq = load_pretrained("AutoConfig", args.model).is_encoder_decoder
    kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    side = "right" if seq2seq else "left"
    model, tokenizer, device, room = load_model(kind, "AutoTokenizer", args, padding_side=side)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if chat := bool(not seq2seq and tokenizer.chat_template):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "ANSWER"}]
        render = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        end = render(turns).rpartition("ANSWER")[2]
        question = render(turns[:1], add_generation_prompt=True)

    def ids_of(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special).input_ids

    def prompt_of(text: str) -> list[int]:
        """Tokens of the question; cuts the text until they fit, never the options."""
        ids = ids_of(question.replace("{text}", text), special=not chat)
        if len(ids) <= room:
            return ids
        if not text:
            raise UserError(f"--model {args.model}: the options alone exceed its {room} tokens")
        return prompt_of(text[: len(text) * room // len(ids) - 1])

    # An answer ends with its text, its turn or (for a model that just continues) its line.
    end = ([] if seq2seq else ids_of(end)[:1]) or [tokenizer.eos_token_id]
    answers = [ids_of(name if chat or seq2seq else f" {name}") + end for name in names]
    answers = [torch.tensor(answer, device=device) for answer in answers]
    room -= 0 if seq2seq else max(map(len, answers))
    for idx in torch.tensor(sorted(todo, key=lambda i: -len(texts[i]))).split(args.batch_size):
        ids = {"input_ids": [prompt_of(texts[i][: args.max_chars]) for i in idx]}
        batch = tokenizer.pad(ids, return_tensors="pt").to(device)
        scores = answer_log_probs(model, batch["input_ids"], batch["attention_mask"], answers)
        yield from rows_of(idx, scores.softmax(dim=1))


# ---------------------------------------------------------------------------- teacher: chat

ATTEMPTS, PAUSE, LONGEST_WAIT = 8, 0.5, 600  # requests per example and run; seconds; seconds
FIRST, IN_A_ROW = 3, 25  # rows without an answer that stop a run: at its start, later
OURS = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens")  # see prepared
REASONING = "(?:think|thinking|thought|reasoning)"  # in <> or []
OF_OPTION = r"\b(max_tokens|temperature|top_logprobs|logprobs)\b"
OF_LENGTH = "(?i)context.{0,9}(size|length|window)|too (long|large)|exceed.{0,20}token|got -"
STOPS = {  # pattern of "STATUS TEXT" that no repetition changes: what the user can do
    "^3": "; the server redirects to {}",
    "^401": "; name the variable with its key: --key-variable",
    "^(402|404|405|[12])": "",
    "^0 .*Cert": "; set SSL_CERT_FILE to the certificate of your authority",
    "^0 .*(gaierror|ConnectionRef|unreachable|No route|InvalidURL|SSL: W)": "; check --base-url",
    "(?is)^[45].[^2].*(insufficient.?(quota|credit|balance)|balance.{0,9}(insuffic|too low))": "",
}


class Verdict(NamedTuple):
    kind: str  # "answered", "no answer" (for this row), "ask again" or "stop" (the run)
    text: str  # the answer, or what the server said
    usage: list[int] = [0, 0]  # tokens (in, out) that the reply reports
    tries: int = 1  # requests of a row until this verdict holds; "ask again": in a later run
    hint: str = ""  # what the user can do; of an answer: it was cut
    logprobs: Any = None
    after: float = 0.0  # seconds until the next try
    without: Any = ()  # options of ours that the reply names


def spoken(text: str) -> str:
    """What follows the reasoning, without tokens such as <|end|>; "" if the reasoning is open."""
    after = re.split(rf"(?i)[<[]/{REASONING}[>\]]|<\|channel\|>final<\|message\|>", text)[-1]
    is_open = re.search(rf"(?i)[<[]{REASONING}[>\]]|<\|channel\|>", after)
    return "" if is_open else re.sub(r"<\|[^|]*\|>", " ", after).strip()


def classify(status: int, headers: Any, body: bytes) -> Verdict:
    """Decide what a reply of a chat endpoint means; the first line that fits decides.

    status                   body                              verdict           tries
    200                      an error, finish_reason error     as its code, else as 500
    200                      an answer (parts are joined)      answered
    200                      no answer; cut, or reasoning      ask again         1
    200                      no answer; no choices, null       no answer         2
    200                      no JSON object, odd content       ask again         ATTEMPTS
    any                      one of STOPS                      stop
    5xx                      this row is too long              no answer         1
    0, 408, 409, 425, 429,   Retry-After over LONGEST_WAIT     stop
    5xx                      anything else                     ask again         ATTEMPTS
    any other                anything (length, content ...)    no answer         1

    No answer is label null. A row to ask again is asked by the next run, and gets null if it fails
    there. FIRST rows without an answer at the beginning, or IN_A_ROW later, stop the run."""
    text, usage = body.decode("utf-8", "replace"), [0, 0]
    if status == 200:
        try:
            reply = json.loads(text)
            used = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
            used = [used.get("prompt_tokens"), used.get("completion_tokens")]
            usage = [int(n) if type(n) in (int, float) and 0 < n < 1e12 else 0 for n in used]
            choice = (reply.get("choices") or [{}])[0]
            finish, message = choice.get("finish_reason"), choice.get("message") or {}
            if error := reply.get("error") or choice.get("error") or finish == "error":
                code = str(error.get("code")) if isinstance(error, dict) else ""
                code = int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500
                return classify(code, headers, body)._replace(usage=usage)
            content = message.get("content") or ""
            parts = [{"text": content}] if isinstance(content, str) else content + []
            content = "".join(part.get("text") or "" for part in parts)
            answer, thoughts = spoken(content), map(message.get, ("reasoning_content", "reasoning"))
            cut = finish in ("length", "max_tokens") or not answer and any([content, *thoughts])
            hint = "; reasoning models need a larger --max-tokens" if cut else ""
            if answer:
                return Verdict("answered", content, usage, 1, hint, choice.get("logprobs"))
            kind, tries = ("ask again", 1) if cut else ("no answer", 2)
            return Verdict(kind, json.dumps(choice) if choice else text, usage, tries, hint)
        except ODD:
            return Verdict("ask again", text, usage, ATTEMPTS)
    for pattern, hint in STOPS.items():
        if re.search(pattern, f"{status} {text}"):
            return Verdict("stop", text, hint=hint.format(headers.get("Location")))
    too_long = bool(re.search(OF_LENGTH, text))
    if status in {0, 408, 409, 425, 429, *range(500, 600)} and not (status >= 500 and too_long):
        after = headers.get("Retry-After", "")  # seconds; a date is not waited for
        after = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
        kind = "stop" if after > LONGEST_WAIT else "ask again"
        return Verdict(kind, text, tries=ATTEMPTS, after=after)
    return Verdict("no answer", text, without=() if too_long else re.findall(OF_OPTION, text))


def read_answer(verdict: Verdict, classes: list[str], lettered: bool) -> Row:
    """The label of an answer, and, if the endpoint sent them, probs: p_k is the probability of
    letter k at the first token that is a letter, scaled to sum 1."""
    k, mass = len(classes), np.zeros(len(classes) + 1)  # the last entry: no letter
    with suppress(*ODD):  # no probabilities, or in another shape
        tokens = verdict.logprobs["content"] * lettered
        first = next(token for token in tokens if option_number(token["token"], k) >= 0)
        for other in first["top_logprobs"]:
            mass[option_number(other["token"], k)] += math.exp(min(0, other["logprob"]))
        if np.isfinite(mass).all() and mass[:k].any():
            probs = mass[:k] / mass[:k].sum()
            return {"label": int(probs.argmax()), "probs": probs.round(5).tolist()}
    return {"label": parse_answer(verdict.text, classes, lettered)}


def connect(args: Args) -> tuple[str, dict[str, str], str]:
    """(address, headers, key) of the endpoint; "" is no key. Raises UserError for bad ones."""
    host = urllib.request.urlparse(args.base_url).hostname
    if not host or not args.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url {args.base_url}: expected http://HOST or https://HOST")
    variable = args.key_variable or ("OPENAI_API_KEY" if host == "api.openai.com" else "")
    key = os.environ.get(variable, "").strip()
    if variable and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"environment variable {variable}: expected the API key for {host}")
    headers = {"Content-Type": "application/json", "User-Agent": "pseudolabel"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    return args.base_url.rstrip("/") + "/chat/completions", headers, key


def post(url: str, headers: Row, body: Row, timeout: float) -> tuple[int, Any, bytes]:
    """(status, headers, content) of one request; status 0: no whole reply, the content says why."""
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.OpenerDirector()  # follows no redirect: it would carry the key along
    for name in ("ProxyHandler", "HTTPHandler", "HTTPSHandler"):
        opener.add_handler(getattr(urllib.request, name)())
    try:
        with opener.open(request, timeout=timeout) as reply:
            return reply.status, reply.headers, reply.read()
    except Exception as error:  # of the network, or a reply that is not HTTP
        error = getattr(error, "reason", error)  # of a URLError
        return 0, {}, f"{type(error).__name__}: {error}".encode()


def content_of(x: Any, question: str, args: Args) -> Any:
    """A question about a text, or about an image [C, H, W], which is sent as PNG."""
    if isinstance(x, str):
        return question.replace("{text}", x[: args.max_chars])
    image, png = to_pil_image(torch.tensor(x)).convert("RGB"), io.BytesIO()
    sides = [max(1, round(side * args.image_size / max(image.size))) for side in image.size]
    image.resize(sides, resample=3).save(png, "PNG")  # 3: bicubic
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]


def label_with_chat(data: Data, todo: list[int], args: Args, proven: bool = False) -> Rows:
    """Rows in the order of the answers. The first request goes alone, to learn the options. Ctrl-C,
    a refusal and --max-cost stop new requests; those in flight are paid for, so kept. proven: the
    endpoint has answered before. Rows without an answer wait for one: then the fault is theirs."""
    x, how = data.part(args.split).x, WORDS
    names = [name.replace("_", " ") for name in data.classes]  # P3
    (url, headers, key), options = connect(args), {"temperature": 0, "max_tokens": args.max_tokens}
    if args.logprobs:
        how, names = LETTER, [f"{letter}) {name}" for letter, name in zip(LETTERS, names)]
        options |= {"logprobs": True, "top_logprobs": 20}
    options |= json.loads(args.extra_body)
    question = f"{how}\n\n{args.prompt.replace('{options}', ', '.join(names))}"
    queue = [(i, 1, 0.0) for i in reversed(todo)]  # example, attempt, pause; the last is next
    pool, flying, stop = ThreadPoolExecutor(args.concurrency), {}, threading.Event()
    usage, spent, dearest, told = [0, 0], 0.0, 0.0, set()  # usage: since the last row
    answered, silent, waiting, ends = False, 0, [], []  # waiting rows; exceptions that end the run

    def ask(i: int, options: Row, pause: float) -> tuple[int, Any, bytes]:
        messages = [{"role": "user", "content": content_of(x[i], question, args)}]
        body = {"model": args.model, "messages": messages, **options}
        return (0, {}, b"") if stop.wait(pause) else post(url, headers, body, args.timeout)

    def note(number: int, frame: Any) -> None:
        ends.append(KeyboardInterrupt())
        signal.signal(number, signal.default_int_handler)  # a second one does not wait
        tqdm.write(f"stopping after {len(flying)} requests in flight; again: now")

    in_main = threading.current_thread() is threading.main_thread()  # signals come only there
    handlers = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM) if in_main}
    try:
        while True:
            while queue and not ends and len(flying) < (args.concurrency if answered else 1):
                if spent + (len(flying) + 1) * dearest > args.max_cost:
                    break
                i, attempt, pause = queue.pop()
                flying[pool.submit(ask, i, dict(options), pause)] = i, attempt
            if ends:
                stop.set()  # wakes those that wait to ask again
            if not flying:
                break
            for future in wait(flying, 0.2, FIRST_COMPLETED).done:  # 0.2 s: lets signals in
                i, attempt = flying.pop(future)
                status, *reply = future.result()
                verdict = classify(status, *reply)
                text, used = verdict.text.replace(key or "\0", "[key]"), verdict.usage
                reason = f"{f'status {status}' if status else 'no reply'}: {text[:200]}"
                advice = f"{reason}{verdict.hint}; what was answered is saved"
                usage = np.add(usage, used).tolist()
                dearest = max(dearest, cost_of([used[0], max(used[1], args.max_tokens)], args))
                if status in (0, 200):  # lost or without usage: it may have cost as much as any
                    spent += cost_of(used, args) or dearest
                refused = [] if answered else [name for name in verdict.without if name in options]
                kind, row = verdict.kind, {"index": i, "raw": text[:2000]}
                if kind == "answered":
                    row |= read_answer(verdict, data.classes, args.logprobs)
                    kind = "ask again" if verdict.hint and row["label"] is None else kind
                if kind == "stop":
                    ends.append(UserError(f"{url}: {advice}"))
                elif kind == "answered":
                    yield from ({"label": None} | one for one in waiting)
                    yield row | {"usage": usage}
                    usage, silent, waiting, answered, proven = [0, 0], 0, [], True, True
                elif ends or refused or attempt < verdict.tries:
                    if not ends and (status not in told or not answered):
                        tqdm.write(f"asking again, {reason}")
                        told.add(status)
                    if refused and options.pop(refused[0], None) and refused[0] == "max_tokens":
                        options["max_completion_tokens"] = args.max_tokens
                    pause = max(verdict.after, PAUSE * 2**attempt) * random.uniform(1, 1.5)
                    queue.append((i, attempt + 1, 0.0 if refused else pause))
                else:
                    silent += 1 if answered else attempt
                    if kind == "no answer":
                        waiting.append(row)
                    else:
                        yield {"index": i, "raw": reason, "usage": usage}
                        usage = [0, 0]
                    if silent >= (IN_A_ROW if proven else min(FIRST, len(todo))):
                        ends.append(UserError(f"{url}: no answer to the last rows: {advice}"))
        for row in waiting:
            yield row | ({"label": None} if proven and not ends else {"usage": [0, 0]})
        if any(usage):
            yield {"usage": usage}
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ends:
        raise ends[0]
    if queue:
        tqdm.write("stopped: one more request might exceed --max-cost")


def load_arrays(path: Path) -> Row:
    """A torch-saved dict of NumPy arrays, numbers and strings; other content is refused unread."""
    types = {type(np.dtype(code)) for code in "?bhilqBHILQefdUO"}
    makers = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]  # all it may call
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and 2
    named = [(make, f"{module}.{make.__name__}") for make in makers for module in modules]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *types, *named]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_csv(path: Path, part: Split, classes: list[str]) -> list[int | str]:
    """Column label (numbers, names) of a CSV file in the order of the data: matched by a unique
    column text or file, else by column index, else by order. Raises ValueError for missing rows."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    column, names = ("text", part.x) if part.is_text else ("file", part.files)
    key_of = str.strip if part.is_text else os.path.basename  # wherever the folder is
    keys = [key_of(line.get(column, "")) for line in lines]
    if names is None or len({*keys}) < len(lines):
        column, names, key_of = "index", range(len(lines)), int
        keys = [int(line.get(column, at)) for at, line in enumerate(lines)]
    print(f"{path}: rows are matched by {column if column in dict(*lines[:1]) else 'their order'}")
    found = {key: line["label"].strip() for key, line in zip(keys, lines)}
    if missing := {*map(key_of, names)} - found.keys():
        raise ValueError(f"no row with {column} {min(missing)!s:.80}")
    values = [found[key_of(name)] for name in names]
    values = [int(v) if v.isdecimal() and v not in classes else v for v in values]
    if None in [label_of(v, classes) for v in values if v != ""]:
        raise ValueError("expected names or numbers of classes")
    return values


def label_of(value: Any, classes: list[str]) -> int | None:
    """Class of a name or answer, of a number (-1: none) or of a row of probabilities."""
    if isinstance(value, str):
        return parse_answer(value, classes)
    label = int(np.argmax(value)) if np.ndim(value) else int(value)
    if not -1 <= label < len(classes):
        raise ValueError(f"label {label}, expected -1 to {len(classes) - 1}")
    return None if label == -1 else label


def label_from_file(data: Data, todo: list[int], args: Args) -> Rows:
    """Rows of labels made elsewhere. Raises UserError if they are for other or reordered data."""
    path, part, classes = Path(args.input), data.part(args.split), data.classes
    readers = {".csv": lambda path: read_csv(path, part, classes), ".npy": np.load}
    try:
        found = readers.get(path.suffix, load_arrays)(path)
        found = {"pred_labels": found} if path.suffix in readers else found
        kinds = ("decoded_predictions", "decoded_predictions_processed", "pred_labels")  # P5
        values = next(found[kind] for kind in kinds if found.get(kind) is not None)
        labels = [label_of(value, classes) for value in values]
        truth = found.get("gt_labels", found.get("decoded_labels", ()))
        truth = [label_of(value, classes) for value in truth]
        probs = np.asarray(found.get("probs", values if np.ndim(values) == 2 else ()))
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"--input {path}: could not be read: {reason_of(error)[:200]}") from None
    where = f"{data.name}'s {args.split} part"
    if len(labels) != len(part):
        raise UserError(f"--input {path}: {len(labels)} labels, but {where} has {len(part)}")
    if any(t is not None and y not in (-1, t) for t, y in zip(truth, part.y, strict=False)):
        raise UserError(f"--input {path}: its true labels are not those of {where}, in this order")
    keep = probs.shape == (len(part), len(classes)) and ((probs >= 0) & (probs <= 1)).all()
    keep = keep and (probs.argmax(axis=1) == np.array(labels, float)).all()  # same class order
    for i in todo:
        row = {"index": i, "label": labels[i]}
        row |= {"probs": probs[i].astype(float).round(5).tolist()} if keep else {}
        yield row | ({"raw": values[i]} if isinstance(values[i], str) else {})


# ---------------------------------------------------------------------------- main

MINI_LM, BOTH = "sentence-transformers/all-MiniLM-L6-v2", "images texts"
TEACHERS = {  # function, kind of prompt, what it labels, default model, arguments for the header
    "glyphs": (label_with_network, None, "images", "cnn on rendered glyphs", ""),
    "clip": (label_by_cosine, TEMPLATE, "images", "openai/clip-vit-large-patch14", ""),
    "text": (label_with_text_model, QUESTION, "texts", "google/flan-t5-large", "max_chars"),
    "embedding": (label_by_cosine, TEMPLATE, "texts", MINI_LM, "max_chars temperature"),
    "chat": (label_with_chat, QUESTION, BOTH, None, "max_chars logprobs extra_body image_size"),
    "student": (label_with_network, None, BOTH, None, ""),
    "import": (label_from_file, None, BOTH, None, ""),
}


def prepared(data: Data, args: Args) -> Args:
    """The arguments with model and prompt filled in. Raises UserError for those that are out of
    range, do not go together or do not suit the data."""
    _, which, reads, model, _ = TEACHERS[args.teacher]
    kind, k = "texts" if data.part(args.split).is_text else "images", len(data.classes)
    needed = {"student": "student", "import": "input", "chat": "model"}.get(args.teacher, "teacher")
    extra = {*OURS}
    with suppress(*ODD):  # not a JSON object
        extra = json.loads(args.extra_body).keys()
    problems = {
        f"--{name.replace('_', '-')} {value}: expected a number above 0": not 0 < value < math.inf
        for name, value in vars(args).items()
        if type(value) in (int, float) and not (value == 0 and name.startswith("price"))
    } | {
        f"--teacher {args.teacher} needs --{needed}": getattr(args, needed) is None,
        f"--teacher {args.teacher} does not label {kind}; choose another": kind not in reads,
        f"two classes differ only in case, {', '.join(data.classes):.200}; rename one":
            which and len({forms_of(name)[0] for name in data.classes}) < k,
        f"--logprobs: {k} classes, at most 20 fit; leave it out": args.logprobs and k > 20,
        "--max-cost needs --price-in and --price-out":
            args.max_cost is not None and not args.price_in + args.price_out > 0,
        f"--extra-body: expected a JSON object without {', '.join(OURS)}": extra & {*OURS},
        "--teacher glyphs knows digits only": args.teacher == "glyphs" and data.name != "digits",
    }  # fmt: skip
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise UserError(found[0])
    if kind == "texts":
        kind = "sentiment" if "negative" in " ".join(data.classes).lower() else "topics"
    prompt = None if which is None else PROMPTS[kind][which]
    if prompt and args.prompt:
        given = Path(args.prompt).read_text(encoding="utf-8", errors="replace").strip()
        if "{text}" in prompt and "{text}" not in given:
            raise UserError(f"--prompt {args.prompt}: expected the placeholder {{text}} in it")
        prompt = given
    return replace(args, model=args.model or model, prompt=prompt)


def label(data: Data, args: Args) -> Row:
    """Label what the file lacks; print and return a summary of the file, also if interrupted."""
    args, (teach, *_, settings) = prepared(data, args), TEACHERS[args.teacher]
    model, name = args.model, f"{data.name}-{args.split}-{args.teacher}"
    source = {"student": f"{args.student}/model.safetensors", "import": args.input}
    if source := source.get(args.teacher):
        model = f"{Path(source).name} {digest(Path(source).read_bytes())}"
    settings = {setting: getattr(args, setting) for setting in settings.split()}
    header = header_of(data, args.split, args.teacher, model, args.prompt, settings)
    path = Path(args.output or f"{args.data_dir}/labels/{name}.jsonl")
    given = [file for file in (args.dataset, args.test_file, args.prompt, args.input) if file]
    for file, read in (args.csv, [path, *given]), (args.output, given):
        if file and os.path.realpath(file) in map(os.path.realpath, read):
            raise UserError(f"{file} is an input or the label file; write to another file")
    file, rows = open_labels(path, header)
    done = {row["index"] for row in rows if "label" in row}
    tried = {row["index"] for row in rows if "index" in row} - done
    todo, y = [i for i in range(header["num_examples"]) if i not in done], data.part(args.split).y
    todo = random.Random(0).sample(todo, len(todo)) if args.dry_run else todo  # a fair sample
    todo = sorted(todo, key=lambda i: (i in tried, y[i] < 0))[: args.dry_run]  # the known first
    costs = [cost_of(row.get("usage", [0, 0]), args) for row in rows]
    left = (math.inf if args.max_cost is None else args.max_cost) - sum(costs)
    todo = todo if max(costs, default=0.0) <= left else []  # one more might cost as much
    more = [bool(done)] if args.teacher == "chat" else []
    try:
        with file, tqdm(total=len(todo), desc=name, disable=None) as bar:
            for row in teach(data, todo, replace(args, max_cost=left), *more) if todo else ():
                if row.get("index") in tried:
                    row.setdefault("label", None)  # no answer in two runs
                line = (json.dumps(row) + "\n").encode()
                if file.write(line) < len(line):
                    raise UserError(f"could not write all of {path}: make room and resume")
                rows.append(row)
                bar.update("label" in row)
    finally:
        result = summary(path, rows, data, args)
    return result


def cost_of(usage: list[float], args: Args) -> float:  # of tokens (in, out)
    return (usage[0] * args.price_in + usage[1] * args.price_out) / 1e6


def summary(path: Path, rows: list[Row], data: Data, args: Args) -> Row:
    """Print and return what a label file holds: counts, tokens, cost, and the accuracy on known
    true labels (percent; no answer is wrong) with Wilson's 95 % interval."""
    y = data.part(args.split).y
    labels, probs = collect(path, rows, len(y), len(data.classes))
    used = np.sum([[0, 0], *(row["usage"] for row in rows if "usage" in row)], axis=0).tolist()
    known, labeled = (labels != -2) & (y >= 0), int((labels != -2).sum())
    right, total = int((labels == y)[known].sum()), int(known.sum())
    result = {
        "path": str(path), "labeled": labeled, "known": total, "tokens": used,
        "abstentions": int((labels == -1).sum()), "with_probs": int((probs[:, 0] >= 0).sum()),
        "cost": cost_of(used, args), "accuracy": 100 * right / total if total else None,
    }  # fmt: skip
    said = "{path}: {labeled} of {} labeled, {abstentions} abstentions ({:.1%}), {with_probs} with "
    print((said + "probs").format(len(y), result["abstentions"] / max(1, labeled), **result))
    print("labels per class:", class_counts(labels, data.classes))
    asked = len({row["index"] for row in rows if "index" in row})
    scales = {"so far": 1, f"estimate for all {len(y)}": len(y) / max(1, asked)}
    for what, scale in scales.items() if any(used) else ():
        tokens, cost = np.multiply(scale, used), scale * result["cost"]
        print(f"{what}: {tokens[0]:.0f} tokens in, {tokens[1]:.0f} out, cost {cost:.4f}")
    if total:
        print(f"accuracy {share_right(right, total)} known labels; by class, most mistakes first:")
        given = [labels[known & (y == k)] for k in range(len(data.classes))]
        for k in sorted(range(len(given)), key=lambda k: -(given[k] != k).sum())[:15]:
            good, none = (given[k] == k).sum(), (given[k] == -1).sum()
            wrong = len(given[k]) - good - none
            print(f"  {data.classes[k]}: {good} right, {wrong} wrong, {none} without an answer")
    return result


@first_process_first()
def default_labels(
    data: Data, data_dir: str, dataset: str | None = None, test_file: str | None = None
) -> tuple[str, str | None]:
    """Label files in DATA_DIR/labels of the train part and, if found, of the test part. Makes those
    of published images. Raises UserError, with advice, for own data or if it finds several."""
    folder, prefix = Path(data_dir) / "labels", f"{data.name}-train-"

    def complete(path: Path) -> bool:
        header, rows, _ = read_rows(path) if path.is_file() else ({}, [], 0)
        return sum("label" in row for row in rows) == header.get("num_examples")

    if (dataset or data.name) == "digits":
        paths = {split: folder / f"digits-{split}-glyphs.jsonl" for split in ("train", "test")}
        for split in [split for split, path in paths.items() if not complete(path)]:
            label(data, Args(split=split, data_dir=data_dir, device="cpu"))
        return str(paths["train"]), str(paths["test"])
    found = sorted(p for p in folder.glob("*.jsonl") if p.name.startswith(prefix) and complete(p))
    if len(found) > 1:
        raise UserError(f"several label files: {', '.join(map(str, found))}; set --pseudolabels")
    if not found and (data.train.is_text or (dataset or data.name) not in PRESETS):
        teacher = "text" if data.train.is_text else "clip"
        command = f"pseudolabel.py --dataset {dataset or data.name} --teacher {teacher}"
        command += f" --test-file {test_file}" if test_file else ""
        raise UserError(f"no labels of {data.name} in {folder}; run {command}, set --pseudolabels")
    if not found:
        found = [Path(label(data, Args(data.name, teacher="clip", data_dir=data_dir))["path"])]
    test = folder / f"{data.name}-test-{found[0].name.removeprefix(prefix)}"
    return str(found[0]), str(test) if complete(test) else None


def write_csv(path: Path, data: Data, args: Args, labels: Path) -> None:
    """Write a label file as CSV: index, file or text, label, one probability per class."""
    part, (_, rows, _) = data.part(args.split), read_rows(labels)
    names = part.x if part.is_text else part.files
    rows = {row["index"]: row for row in rows if "label" in row}
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        out = csv.writer(file)
        out.writerow(["index", "text" if part.is_text else "file", "label", *data.classes])
        for i, row in sorted(rows.items()):
            name = "" if row["label"] is None else data.classes[row["label"]]
            probs = row.get("probs", [""] * len(data.classes))
            out.writerow([i, "" if names is None else names[i], name, *probs])
    print(f"{path}: labels and probabilities of {len(rows)} examples")


def main(args: Args) -> Row:
    """Label a part of a data set; return the printed summary. Raises UserError."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name it cannot show ends no job
    folder, config = Path(args.dataset), {"classes": [], "backbone": "a teacher", "size": None}
    if args.teacher == "student" and args.student:
        _, config = load_student(args.student)
    if config["classes"] and folder.is_dir() and not (folder / "train").is_dir():  # new pictures
        preset = PRESETS["cifar10"]._replace(size=config["size"], pad=config["pad"])
        store = f"{args.data_dir}/decoded/new-{digest(str(folder.resolve()).encode())}"
        part = decode([(file, -1) for file in files_below(folder)], store, preset, "test")
        if len(config["mean"]) == 1:
            part.x = rgb_to_grayscale(torch.tensor(part.x)).numpy()
        data = Data(folder.resolve().name, config["classes"], part, None)
    else:
        preset = preset_of(args.dataset, config["backbone"], config["size"])  # as the student sees
        data = load_data(args.dataset, args.data_dir, args.test_file, preset)
        data.classes = data.classes or config["classes"]  # new texts without a single label
    result = label(data, args)
    if args.csv:
        write_csv(Path(args.csv), data, args, Path(result["path"]))
    return result


if __name__ == "__main__":
    cli(Args, main)
