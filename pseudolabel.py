# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.9", "numpy>=1.26",
#   "scikit-learn>=1.5", "tyro>=0.9", "pytest>=8"]
# ///
"""Label a data set with a foundation model: one JSON Lines file, made once, read by zeromatch.py.

    python pseudolabel.py --dataset fashion_mnist --teacher chat --model gpt-4.1 --dry-run 20
    python pseudolabel.py --dataset new --teacher student --student runs/NAME/student --csv new.csv

TEACHERS, below, lists who can label what. Line 1 of the file is a header: data set, split, class
names in order, a fingerprint of the examples, teacher, model, prompt, settings. The other lines are
examples in any order, {"index": 17, "label": 3, "probs": [...]}; label null: no answer. Chat adds
the raw answer and the billed tokens (in, out); a line with tokens but no label was asked and not
answered: the next run asks again, for the last time. The file only grows and may be cut anywhere;
the same command resumes after the last whole line.

Departures from the authors' pipelines (jichan3751/zeromatch @8ca4079)
  P1  A label is read if the answer, its first sentence or just one of its lines names it, perhaps
      after "the answer is"; or if the answer holds no other label (the longest, as whole words), no
      word around it denies ("not", "no", "sorry" ...), and it is not as short as "no" or "on".
      Authors: substrings, the last class wins ("pink primrose": "rose"), else one fixed class.
  P2  Local language models write no answer. They score every label: the log-probabilities of its
      tokens and of the end of the answer (or one label could begin another), not divided by length.
  P3  Class names in prompts have spaces instead of underscores.
  P4  Chat: temperature 0, one user message, pictures as JPEG, arrays as PNG (see --image-size).
  P5  Raw answers in an imported file are matched again by P1.
"""

from __future__ import annotations

import base64
import copy
import csv
import glob
import inspect
import io
import json
import math
import os
import random
import re
import sys
import threading
import unicodedata
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.stats import binomtest
from torch import Tensor
from torchvision.transforms.functional import normalize, rgb_to_grayscale, to_pil_image, to_tensor
from tqdm import tqdm

from common import (
    LABELS, PRESETS, STOP, TEXTS, Data, Preset, SmallCNN, Split, Student, UserError, class_counts,
    cli, column_of, content_hash, decode, explained, files_below, first_process_first, label_in,
    load_data, load_pretrained, load_student, lock, make_views, predict, preset_of, read_picture,
    read_table, report_of, seed_step, setup_device, text_in,
)  # fmt: skip

FORMAT = "zeromatch-labels-1"
Row = dict[str, Any]  # a line of a label file
Rows = Iterator[Row]
Reply = tuple[int, Any, bytes]  # status, headers, content
ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


@dataclass
class Args:
    dataset: str = "digits"  # name in common.PRESETS, folder of images, .csv or .jsonl of texts
    test_file: str | None = None  # test texts; unset: a fifth of the labeled rows of --dataset
    text_column: str = TEXTS  # of a table: the first of these that it has
    label_column: str = LABELS  # the same
    split: Literal["train", "test"] = "train"  # part to label
    teacher: Literal["glyphs", "clip", "text", "embedding", "chat", "student", "import"] = "glyphs"
    output: str | None = None  # unset: DATA_DIR/labels/DATASET-SPLIT-TEACHER.jsonl; tables: -HASH
    csv: str | None = None  # student: answers to all rows of own data, instead of a label file
    data_dir: str = "data"  # folder of data sets and label files
    dry_run: int | None = None  # label only so many, spread over the part, and estimate the cost
    device: str = "auto"  # of local models
    batch_size: int = 32  # examples per forward pass of a local model
    model: str | None = None  # hub id, folder, or name at the endpoint; unset: see README
    prompt: str | None = None
    """text, chat: file with a question that contains {text} and {options}. clip, embedding: file of
    templates that contain {label} and are averaged, or of one description per class, in order."""
    max_chars: int = 2000  # cuts texts; a local model may cut more; the options are never cut
    temperature: float = 0.05  # embedding: softmax over classes of cosine / temperature
    student: str | None = None  # student: folder from a training script, RUN/student
    input: str | None = None  # import: a CSV has columns label and text, file or index
    base_url: str = "https://api.openai.com/v1"  # chat; or, for example, http://localhost:8000/v1
    key_variable: str | None = None  # with the key; unset: OPENAI_API_KEY, for api.openai.com only
    header: str | None = None  # for the key, NAME=VARIABLE: api-key=AZURE_KEY; unset: Authorization
    batch_file: str | None = None  # write the open requests for a provider's batch API, ask nothing
    batch_results: str | None = None  # read the answers to such a file
    concurrency: int = 16  # requests in flight
    timeout: float = 60.0  # seconds without a byte until a request is dropped and sent again
    max_tokens: int = 32  # longest answer; reasoning models need more
    logprobs: bool = False  # letter the options, ask for token probabilities (up to 20 classes)
    extra_body: str = "{}"  # JSON object for every request; a response_format needs a field label
    image_size: int = 512  # longer side of the images sent, pixels; small ones are enlarged to 224
    price_in: float = 0.0  # of a million input tokens
    price_out: float = 0.0  # of a million output tokens
    max_cost: float | None = None  # stop before the cost of the whole file exceeds this

    def cost(self, tokens: list[float]) -> float:  # (in, out)
        return (tokens[0] * self.price_in + tokens[1] * self.price_out) / 1e6


# ---------------------------------------------------------------------------- the label file


def header_of(data: Data, split: str, *made: Any) -> Row:
    """Line 1 of a label file. made: teacher, model, prompt, settings, as far as they are known."""
    rows = data.part(split).hashes()
    order, content = (content_hash(bytes.fromhex("".join(of)), 8) for of in (rows, sorted(rows)))
    header = {"format": FORMAT, "dataset": data.name, "split": split, "num_examples": len(rows)}
    header |= {"classes": data.classes, "fingerprint": {"order": order, "content": content}}
    return header | dict(zip(("teacher", "model", "prompt", "settings"), made))


def read_rows(path: Path, **wanted: Any) -> tuple[Row, list[Row], int]:
    """(header, rows, length in bytes) of the whole lines of a label file. Raises UserError if it is
    missing or damaged, or has rows and a header that differs from `wanted`."""
    content, lines = path.read_bytes(), []
    content = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(content.splitlines(), 1):
        with explained(f"{path}: line {number} is not a JSON object", "is the file damaged?"):
            lines.append(dict(**json.loads(line)))
    header, *rows = lines or [{}]
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: expected a first line with format {FORMAT}, from pseudolabel.py")
    for key in wanted if rows else ():
        if wanted[key] != header.get(key):
            reason = f"{key} {header.get(key)!r:.90}, expected {wanted[key]!r:.90}"
            raise UserError(f"{path}: made for {reason}; new data or settings need a new --output")
    return header, rows, len(content)


P, USED = r"[\d.e-]+", r'"usage": \[\d+, \d+\]'  # a probability; tokens
OPEN = rf'{{("index": \d+, )?{USED}}}'  # asked, no answer yet; or tokens alone
DONE = rf'{{"index": \d+, "label": (\d+|null)(, "probs": \[{P}(, {P})*\])?(, {USED})?}}'


def collect(path: Path, rows: list[Row], n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n] int64, -1: no answer, -2: no row; probs [n, k] float32, NaN: none). Raises
    UserError for a row that is not OPEN or DONE, for other data, or with an index that is done."""
    labels, probs = np.full(n, -2), np.full((n, k), np.nan, np.float32)
    for number, row in enumerate(rows, 2):
        keys = ("index", "label", "probs", "usage")
        form = json.dumps({key: row[key] for key in keys if key in row})
        index, label, p = row.get("index", 0), row.get("label"), row.get("probs", [0] * k)
        fits = re.fullmatch(f"{OPEN}|{DONE}", form) and index < n and (label or 0) < k
        if not (fits and len(p) == k and max(p) <= 1) or "label" in row and labels[index] != -2:
            raise UserError(f"{path}: line {number} is damaged or not unique: {row!s:.90}")
        if "label" in row:
            labels[index] = -1 if label is None else label
            probs[index] = row.get("probs", np.nan)
    return labels, probs


def read_labels(path: str | Path, data: Data, split: str, labeled: Any = ()) -> tuple:
    """(labels int64 [N], -1: no answer; probs float32 [N, K] or None) of a complete file, else
    UserError. Prints how many of those at positions `labeled` are right."""
    header, rows, _ = read_rows(Path(path), **header_of(data, split))
    print(f"{split} part, teacher {header.get('teacher')}")
    labels, probs = collect(path, rows, len(data.part(split)), len(data.classes))
    if missing := (labels == -2).sum():
        raise UserError(f"{path}: {missing} of {len(labels)} examples have no label yet; resume it")
    if (labels == -1).all():
        raise UserError(f"{path}: the teacher answered nothing: every label is null")
    print(f"labels: {class_counts(labels, data.classes)}; none: {(labels == -1).sum()}")
    if len(labeled):
        acc = 100 * (labels == data.part(split).y)[labeled].mean()
        print(f"teacher right on labeled examples: {acc:.2f} % of {len(labeled)}", flush=True)
    return labels, None if np.isnan(probs).any() else probs


def open_labels(path: Path, header: Row) -> tuple[Any, list[Row]]:
    """(file to append to, its rows); cuts off a torn line. UserError if in use or different."""
    os.makedirs(path.parent, exist_ok=True)
    file = open(path, "ab", buffering=0)  # one write per row: a killed run leaves whole rows
    if not lock(file):
        raise UserError(f"{path}: another process writes to it; set another --output")
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
    for i, row in zip(idx.tolist(), probs.float().cpu()):
        yield {"index": i, "label": int(row.argmax()), "probs": [round(p, 5) for p in row.tolist()]}


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
    """A text in NFC and folded case; its words (see WORD), without articles; those after LEAD."""
    plain = unicodedata.normalize("NFC", text).casefold().replace("\u0307", "").strip(" \n.\"'`*")
    words = re.sub(r"n['\u2019]t\b|\b(non|cannot)\b", " not", plain.replace("_", " "))
    words = re.findall(WORD, re.sub(r"(\d)\.0+\b", r"\1", words))
    words = " ".join([word for word in words if word not in ("a", "an", "the")] or words)
    return plain, words, re.sub(LEAD, "", words)


def named(text: str, classes: list) -> int | None:
    """The one class whose name is a text, in any of its forms; or None."""
    for form, *names in zip(forms_of(text), *map(forms_of, classes)):
        if form and names.count(form) == 1:
            return names.index(form)


def parse_answer(answer: str, classes: list) -> int | None:
    """Class of an answer by P1, in JSON of its field "label" or all values; None: none, several."""
    answer = spoken(answer)
    with suppress(*ODD):  # not a JSON object
        found = json.loads(answer[answer.find("{") : answer.rfind("}") + 1], strict=False)
        value = found.get("label", [*found.values()])
        answer = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for texts in [answer], re.split(r"[.!;]\s|\n", answer)[:1], answer.splitlines():
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
    found = [n for n, label in enumerate(labels) if label in inside and not is_short]
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------------------- teachers: local


def draw_digits(glyphs: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Random digits (uint8 [batch, 1, 8, 8], labels), made as handwritten ones: bitmaps averaged in
    4x4 blocks. The ranges match average ink, width and slant of these; no label was used."""
    y = torch.randint(10, (batch,))
    images = glyphs[y, torch.randint(glyphs.shape[1], (batch,))]
    ranges = [(0.7, 1.1), (-0.15, 0.15), (-0.25, 0.15), (0.95, 1.1), (-0.05, 0.05), (-0.05, 0.05)]
    drawn = (low + (high - low) * torch.rand(batch) for low, high in ranges)
    width, angle, shear, size, right, down = drawn
    ink_width = (images.amax(dim=2).squeeze(1) > 0.3).float().mean(dim=1)
    width *= (0.62 / ink_width).sqrt()  # widens narrow digits, narrows wide ones
    matrix = angle.cos() / width, shear + angle.sin(), right, -angle.sin(), angle.cos(), down
    affine = torch.stack(matrix, dim=1).view(batch, 2, 3) * size.view(batch, 1, 1)
    elastic = F.interpolate(torch.randn(batch, 2, 3, 3) * 0.2, size=(32, 32), mode="bicubic")
    grid = F.affine_grid(affine, [batch, 1, 32, 32], False) + elastic.permute(0, 2, 3, 1)
    bitmap = (F.grid_sample(images, grid, align_corners=False) > 0.5).float()
    return (F.avg_pool2d(bitmap, 4) * 255).round().to(torch.uint8), y


@cache
def train_glyph_teacher(num_steps: int = 300, batch: int = 128) -> tuple[Student, Row]:
    """A network trained on digits of Pillow's font in four weights and widths; its config."""
    preset, font, glyphs = preset_of("digits"), ImageFont.load_default(96), []
    for number in range(40):
        image, wider = Image.new("L", (160, 160)), number % 4 * 2
        ImageDraw.Draw(image).text((80, 80), str(number // 4), 255, font, "mm", stroke_width=wider)
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
    return student, preset._asdict() | {"classes": [*"0123456789"], "num_extra": 0}


def label_with_network(part: Split, classes: list, todo: list, args: Args) -> Rows:
    """Rows from a network of ours: the glyph teacher, or --student on data like its own."""
    net, config = load_student(args.student) if args.teacher == "student" else train_glyph_teacher()
    preset = Preset(**{name: config[name] for name in ("size", "mean", "std")})
    fits = config["classes"] == classes and not config["num_extra"]
    if not fits or part.is_text == bool(preset.mean):
        raise UserError(f"--student {args.student}: for other classes or data, or needs labels")
    device, _ = setup_device(args.device, "off", config["backbone"])
    for idx in torch.tensor(todo).split(500):
        views = make_views(part.take(idx.numpy()), preset, config["backbone"], device)
        yield from rows_of(idx, predict(net.to(device), views)[0])


def load_model(kind: str, reader: str, args: Args, **options: Any) -> tuple[Any, Any, Any, int]:
    """(model, tokenizer or processor, device, longest text in tokens)."""
    device, dtype = setup_device(args.device, "auto", "")
    model = load_pretrained(kind, args.model, dtype=dtype or torch.float32)
    reader = load_pretrained(reader, args.model, **options)
    config = getattr(model.config, "text_config", model.config)
    longest = getattr(config, "max_position_embeddings", None) or 10**6
    longest = min(longest, getattr(reader, "model_max_length", 10**6))
    return model.to(device).eval().requires_grad_(False), reader, device, longest


def label_by_cosine(part: Split, classes: list, todo: list, args: Args) -> Rows:
    """p_k = softmax_k(scale * cosine(example, class k)); class k is a mean over templates, a text
    the mean over its tokens. The softmax cancels the bias of SigLIP's sigmoid."""
    names = [name.replace("_", " ") for name in classes]  # P3
    lines = [line for line in args.prompt.splitlines() if line.strip()]
    phrases = [[line.replace("{label}", name) for name in names] for line in lines]
    phrases = phrases if "{label}" in args.prompt else [lines]  # templates, or descriptions
    if len(phrases[0]) != len(names):
        raise UserError(f"--prompt: expected lines with {{label}}, or {len(names)}, one per class")
    is_clip = args.teacher == "clip"
    model, reader, device, length = load_model("AutoModel", "AutoProcessor", args)
    padding = "max_length" if "siglip" in model.config.model_type else True  # as trained
    style = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def embed(items):  # texts or pictures -> unit vectors [n, D]
        if not isinstance(items[0], str):
            x = reader(images=items, return_tensors="pt")["pixel_values"].to(device, model.dtype)
            found = model.get_image_features(pixel_values=x).pooler_output
        else:
            tokens = reader(text=[text[: args.max_chars] for text in items], **style).to(device)
            if is_clip:
                found = model.get_text_features(**tokens).pooler_output
            else:
                mask = tokens["attention_mask"][..., None]
                found = (model(**tokens).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return F.normalize(found.float(), dim=1)

    units = F.normalize(torch.stack(list(map(embed, phrases))).mean(dim=0), dim=1)  # [K, D]
    scale = model.logit_scale.float().exp() if is_clip else 1 / args.temperature
    item = partial(picture_of, part) if is_clip else part.x.__getitem__
    todo = sorted(todo, key=lambda i: -len(part.x[i]))
    with ThreadPoolExecutor() as pool:
        for idx in torch.tensor(todo).split(args.batch_size):
            cosine = embed(list(pool.map(item, idx))) @ units.T
            yield from rows_of(idx, (scale * cosine).softmax(dim=1))


def answer_log_probs(model: Any, ids: Tensor, mask: Tensor, answers: list[Tensor]) -> Tensor:
    """log P(answer_k | prompt_i), summed over the tokens of answer_k. ids, mask [n, T] (padded on
    the left for a causal model), K answers [L_k] int64 -> [n, K]. Prompts are read only once."""
    columns, has_positions = [], "position_ids" in inspect.signature(model.forward).parameters

    def read(ids, mask, **more):
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


def label_with_text_model(part: Split, classes: list, todo: list, args: Args) -> Rows:
    """p_k = P(answer_k) / sum_j P(answer_j).  # P2"""
    texts, names = part.x, [name.replace("_", " ") for name in classes]  # P3
    question, end = args.prompt.replace("{options}", ", ".join(names)), "\n"
    seq2seq = load_pretrained("AutoConfig", args.model).is_encoder_decoder
    kind, side = ("AutoModelForSeq2SeqLM", "right") if seq2seq else ("AutoModelForCausalLM", "left")
    model, tokenizer, device, room = load_model(kind, "AutoTokenizer", args, padding_side=side)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if chat := not seq2seq and tokenizer.chat_template:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "ANSWER"}]
        render = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        end = render(turns).rpartition("ANSWER")[2]
        question = render(turns[:1], add_generation_prompt=True)

    def prompt_of(text):  # its tokens; cuts the text until they fit, not the options
        ids = tokenizer(question.replace("{text}", text), add_special_tokens=not chat).input_ids
        if len(ids) <= room:
            return ids
        if not text:
            raise UserError(f"--model {args.model}: the options alone exceed its {room} tokens")
        return prompt_of(text[: len(text) * room // len(ids) - 1])

    # An answer ends with its text, its turn or (for a model that just continues) its line.
    plain = partial(tokenizer, add_special_tokens=False)
    end = (not seq2seq and plain(end).input_ids[:1]) or [tokenizer.eos_token_id]
    said = plain([name if chat or seq2seq else f" {name}" for name in names]).input_ids
    answers = [torch.tensor(ids + end, device=device) for ids in said]
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
TOO_LONG = r"(?i)context.{0,9}(size|length|window)|too (long|large)|exceed.{0,20}token|got -"
AGAIN = rf"(?is)^(0|4(08|09|25|29)|5..(?!.*({TOO_LONG[4:]}))) "  # of "STATUS TEXT"
STOPS = {  # pattern of "STATUS TEXT" that no repetition changes: what the user can do
    "^3": "; the server redirects to {}",
    "^401": "; name the variable with its key: --key-variable",
    "^(402|404|405|[12])": "",
    "^0 .*Cert": "; set SSL_CERT_FILE to the certificate of your authority",
    "^0 .*(gaierror|ConnectionRef|unreachable|No route|Invalid|SSL: W)": "; check --base-url",
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
    """What a reply of a chat endpoint means; the first line that fits decides.
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
    any other                anything (length, content ...)    no answer         1"""
    text, usage = body.decode("utf-8", "replace"), [0, 0]
    if status == 200:
        try:
            reply = json.loads(text)
            with suppress(*ODD):
                used = map(reply["usage"].get, ("prompt_tokens", "completion_tokens"))
                usage = [min(max(0, int(n or 0)), 10**12) for n in used]
            choice = (reply.get("choices") or [{}])[0]
            finish, message = choice.get("finish_reason"), choice.get("message") or {}
            if error := reply.get("error") or choice.get("error") or finish == "error":
                code = re.findall(r"'code': '?([45]\d\d)\b", str(error)) or [500]
                return classify(int(code[0]), headers, body)._replace(usage=usage)
            content = message.get("content") or ""
            if isinstance(content, list):
                content = "".join(part.get("text") or "" for part in content)
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
    if re.search(AGAIN, f"{status} {text}"):
        after = headers.get("Retry-After", "")  # seconds; a date is not waited for
        after = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
        kind = "stop" if after > LONGEST_WAIT else "ask again"
        return Verdict(kind, text, tries=ATTEMPTS, after=after)
    named = re.findall(OF_OPTION, text) if not re.search(TOO_LONG, text) else ()
    return Verdict("no answer", text, without=named)


def judge(i: int, reply: Reply, classes: list, args: Args, key: str) -> tuple[Verdict, Row]:
    """(verdict, row) on a reply to example i, without the key. Lettered: a letter alone is a label;
    p_k is the probability of letter k at the first token that is a letter, scaled to sum 1."""
    verdict = classify(*reply)
    text = verdict.text.replace(key or "\0", "[key]")
    said = f"status {reply[0]}: {text}" if reply[0] else f"no reply: {text}"
    row = {"index": i, "raw": said[:2000], "usage": verdict.usage}
    if verdict.kind != "answered":
        return verdict._replace(text=said[:220] + verdict.hint), row
    mass, letters = np.zeros(len(classes)), [*LETTERS[: len(classes)]]
    with suppress(*ODD):  # no probabilities, or in another shape
        tokens = verdict.logprobs["content"] * args.logprobs
        first = [token for token in tokens if named(token["token"], letters) is not None][0]
        for other in first["top_logprobs"]:
            if (k := named(other["token"], letters)) is not None:
                mass[k] += math.exp(min(0, other["logprob"]))
    label = parse_answer(verdict.text, classes)
    if mass.any():
        label, row["probs"] = int(mass.argmax()), (mass / mass.sum()).round(5).tolist()
    elif label is None and args.logprobs:
        label = named(spoken(verdict.text), letters)
    if label is None and verdict.hint:  # cut before its label
        return verdict._replace(kind="ask again", text=said[:220] + verdict.hint), row
    return verdict, row | {"raw": text[:2000], "label": label}


def connect(args: Args) -> tuple[str, Row, str]:
    """(address, headers, key) of the endpoint; "" is no key. Raises UserError for bad ones."""
    base, mark, query = args.base_url.partition("?")
    host = urllib.request.urlparse(base).hostname
    if not host or not base.startswith(("http://", "https://")):
        raise UserError(f"--base-url {base}: expected http://HOST or https://HOST")
    variable = args.key_variable or ("OPENAI_API_KEY" if host == "api.openai.com" else "")
    name, _, variable = (args.header or f"Authorization={variable}").partition("=")
    key = os.environ.get(variable, "").strip()
    if (args.header or variable) and not (key and key.isascii() and key.isprintable()):
        name = variable if variable.isupper() else "of --header NAME=VARIABLE"
        raise UserError(f"environment variable {name}: expected the API key for {host}")
    headers = {"Content-Type": "application/json", "User-Agent": "pseudolabel"}
    headers |= {name: key if args.header else f"Bearer {key}"} if key else {}
    return f"{base.rstrip('/')}/chat/completions{mark}{query}", headers, key


def post(url: str, headers: Row, body: Row, timeout: float) -> Reply:
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


def picture_of(part: Split, i: int) -> Any:
    """A picture as its file has it; where there are no files, as it is stored."""
    if part.files is not None:
        return read_picture(part.files[i])
    return to_pil_image(torch.tensor(part.x[i])).convert("RGB")


def body_of(part: Split, i: int, question: str, options: Row, args: Args) -> Row:
    """The request about a text or a picture."""
    if part.is_text:
        content = question.replace("{text}", part.x[i][: args.max_chars])
    else:
        image, sent = picture_of(part, i), io.BytesIO()
        side = min(args.image_size, max(224, *image.size))
        sides = [max(1, round(length * side / max(image.size))) for length in image.size]
        kind = "png" if part.files is None else "jpeg"
        image.resize(sides, 3).save(sent, kind, quality=95)  # 3: bicubic
        url = {"url": f"data:image/{kind};base64,{base64.b64encode(sent.getvalue()).decode()}"}
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": url}]
    return {"model": args.model, "messages": [{"role": "user", "content": content}], **options}


def read_batch(path: str, todo: list) -> dict[int, Reply]:
    """Replies to open examples in a file of OpenAI's batch API or vLLM; counts all its lines."""
    replies, lines, index_of = {}, {}, {str(i): i for i in todo}
    for line in filter(bytes.strip, Path(path).read_bytes().splitlines()):
        what = "cannot be read"
        with suppress(*ODD):
            found = json.loads(line)
            name, reply = found["custom_id"], found.get("response") or {}
            body = json.dumps(reply.get("body") or found.get("error")).encode()
            reply, what = (reply.get("status_code", 0), {}, body), "have no custom_id that is open"
            if name in index_of:
                what = f"have no answer, but {body[:150].decode()}"
                if reply[0] == 200 or classify(*reply).kind == "no answer":
                    replies[index_of.pop(name)], what = reply, "are replies"
        lines[what] = lines.get(what, 0) + 1
    said = "; ".join(f"{count} {what}" for what, count in [*lines.items()][:6])
    if not replies:
        raise UserError(f"{path}: no replies among its lines: {said}")
    print(f"{path}: of its lines, {said}")
    return replies


def label_with_chat(part: Split, classes: list, todo: list, args: Args, rows: Any = ()) -> Rows:
    """Rows in the order of the answers. The first request goes alone, to learn the options. Ctrl-C,
    a refusal and --max-cost stop new requests; those in flight are paid for, so kept. Rows without
    an answer wait for one, now or (rows) in an earlier run: then the fault is theirs."""
    names, how = [name.replace("_", " ") for name in classes], WORDS  # P3
    options = {"temperature": 0, "max_tokens": args.max_tokens}
    if args.logprobs:
        how, names = LETTER, [f"{letter}) {name}" for letter, name in zip(LETTERS, names)]
        options |= {"logprobs": True, "top_logprobs": 20}
    question = f"{how}\n\n{args.prompt.replace('{options}', ', '.join(names))}"
    options |= json.loads(args.extra_body)
    if args.batch_file:
        options["max_completion_tokens"] = options.pop("max_tokens")  # OpenAI's name
        with open(args.batch_file, "w") as file:
            for i in todo:
                line = {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions"}
                line["body"] = body_of(part, i, question, options, args)
                file.write(json.dumps(line) + "\n")
        print(f"{args.batch_file}: {len(todo)} requests; read their answers by --batch-results")
        yield {"usage": [0, 0]}  # a label file with rows keeps its header
        return
    replies = read_batch(args.batch_results, todo) if args.batch_results else {}
    url, headers, key = (args.batch_results, {}, "") if replies else connect(args)
    queue = [(i, 1, 0.0) for i in [*replies] or todo[::-1]]  # example, attempt, pause; last is next
    pool, flying, stop = ThreadPoolExecutor(args.concurrency), {}, threading.Event()
    spent, dearest, told, ends = 0.0, 0.0, set(), []  # ends: exceptions that end the run
    answered, silent, waiting, proven = False, 0, [], any("label" in row for row in rows)
    proven |= any(classify(*reply).kind == "answered" for reply in replies.values())

    def ask(i, pause):
        if replies or stop.wait(pause):
            return replies.get(i, (0, {}, b""))  # b"": stopped
        return post(url, headers, body_of(part, i, question, options, args), args.timeout)

    STOP["waits"] = True  # a first signal ends the run below, a second one at once
    try:
        while True:
            if STOP["signal"] and not ends:
                ends.append(KeyboardInterrupt())
                tqdm.write(f"stopping after {len(flying)} requests in flight; again: now")
            while queue and not ends and len(flying) < (args.concurrency if answered else 1):
                if spent + (len(flying) + 1) * dearest > args.max_cost:
                    break
                i, attempt, pause = queue.pop()
                flying[pool.submit(ask, i, pause)] = i, attempt
            if ends:
                stop.set()  # wakes those that wait to ask again
            if not flying:
                break
            for future in wait(flying, 0.2, FIRST_COMPLETED).done:  # 0.2 s: lets signals in
                (i, attempt), reply = flying.pop(future), future.result()
                verdict, row = judge(i, reply, classes, args, key)
                kind, used, status = verdict.kind, verdict.usage, reply[0]
                dearest = max(dearest, args.cost([used[0], max(used[1], args.max_tokens)]))
                if status in (0, 200):  # lost or without usage: it may have cost as much as any
                    spent += args.cost(used) or dearest
                named = [] if answered else [name for name in verdict.without if name in options]
                if kind == "stop":
                    ends.append(UserError(f"{url}: {verdict.text}; what was answered is saved"))
                elif kind == "answered":
                    yield from ({"label": None} | one for one in waiting)
                    yield row
                    silent, waiting, answered, proven = 0, [], True, True
                elif not replies and (ends or named or attempt < verdict.tries):
                    if not ends and status not in told:
                        tqdm.write(f"asking again, {verdict.text}")
                        told.add(status)
                    if named and options.pop(named[0]) and named[0] == "max_tokens":
                        options["max_completion_tokens"] = args.max_tokens
                    pause = max(verdict.after, PAUSE * 2**attempt) * random.uniform(1, 1.5)
                    queue.append((i, attempt + 1, 0.0 if named else pause))
                    if any(used):
                        yield {"usage": used}
                else:
                    silent += 1 if answered else attempt
                    if kind == "no answer":
                        waiting.append(row)
                    else:
                        yield row
                    most = IN_A_ROW if proven else min(FIRST, len(todo))
                    if silent >= most and not (replies and proven):
                        why = f"no answer to the last rows: {verdict.text}"
                        ends.append(UserError(f"{url}: {why}; what was answered is saved"))
        yield from (({"label": None} if proven and not ends else {}) | row for row in waiting)
    finally:
        STOP["waits"] = False
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if ends:
        raise ends[0]
    if queue:
        tqdm.write("stopped: one more request might exceed --max-cost")


def load_arrays(path: Path) -> Row:
    """A torch-saved dict of NumPy arrays, numbers and strings; other content is refused unread."""
    types = {type(np.dtype(code)) for code in "?bhilqBHILQefdUO"}
    makers = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]  # all it may call
    old = [(make, f"numpy.core.multiarray.{make.__name__}") for make in makers]  # NumPy 1
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *types, *makers, *old]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_answers(path: Path, part: Split, classes: list) -> list[int | str]:
    """Column label (numbers, names) of a table in the order of the data: matched by a unique column
    text or file, else by column index, else by order. Raises ValueError for missing rows."""
    lines = read_table(path)
    label = column_of(lines, LABELS)
    column, names = ("text", part.x) if part.is_text else ("file", part.files)
    key_of = str.strip if part.is_text else os.path.basename  # wherever the folder is
    keys = [key_of(str(line.get(column, ""))) for line in lines]
    if names is None or len({*keys}) < len(lines):
        column, names, key_of = "index", range(len(lines)), int
        keys = [int(line.get(column, at)) for at, line in enumerate(lines)]
    print(f"{path}: rows are matched by {column if column in dict(*lines[:1]) else 'their order'}")
    found = {key: label_in(line.get(label), str(path)) for key, line in zip(keys, lines)}
    names = [key_of(name) for name in names]
    if missing := {*names} - {*keys}:
        raise ValueError(f"no row with {column} {min(missing)!s:.80}")
    values = [found[name] for name in names]
    if unknown := [v for v in values if v and not v.isdecimal() and label_of(v, classes) is None]:
        raise ValueError(f"label {unknown[0]}, expected names or numbers of classes")
    return [int(v) if v.isdecimal() and v not in classes else v for v in values]


def label_of(value: Any, classes: list) -> int | None:
    """Class of a name or answer, of a number (-1: none) or of a row of probabilities."""
    if isinstance(value, str):
        return parse_answer(value, classes)
    label = int(np.argmax(value)) if np.ndim(value) else int(value)
    if not -1 <= label < len(classes):
        raise ValueError(f"label {label}, expected -1 to {len(classes) - 1}")
    return None if label == -1 else label


def label_from_file(part: Split, classes: list, todo: list, args: Args) -> Rows:
    """Rows of labels made elsewhere. Raises UserError if they are for other or reordered data."""
    path = Path(args.input)
    with explained(f"--input {path}: could not be read", "expected .csv, .jsonl, .npy or .pt"):
        if path.suffix in (".csv", ".tsv", ".jsonl"):
            found = {"pred_labels": read_answers(path, part, classes)}
        else:
            found = {"pred_labels": np.load(path)} if path.suffix == ".npy" else load_arrays(path)
        kinds = ("decoded_predictions", "decoded_predictions_processed", "pred_labels")  # P5
        values = next(found[kind] for kind in kinds if found.get(kind) is not None)
        truth = found.get("gt_labels", found.get("decoded_labels", ()))
        labels, truth = ([label_of(v, classes) for v in column] for column in (values, truth))
        probs = np.asarray(found.get("probs", values if np.ndim(values) == 2 else ()))
    if len(labels) != len(part):
        raise UserError(f"--input {path}: {len(labels)} labels for {len(part)} examples")
    if any(t is not None and y not in (-1, t) for t, y in zip(truth, part.y)):
        raise UserError(f"--input {path}: its true labels are not those of the data in this order")
    keep = probs.shape == (len(part), len(classes)) and ((probs >= 0) & (probs <= 1)).all()
    keep = keep and (probs.argmax(axis=1) == np.array(labels, float)).all()  # same class order
    for i in todo:
        row = {"probs": probs[i].astype(float).round(5).tolist()} if keep else {}
        row |= {"raw": values[i]} if isinstance(values[i], str) else {}
        yield {"index": i, "label": labels[i]} | row


# ---------------------------------------------------------------------------- main

MINI_LM, BOTH = "sentence-transformers/all-MiniLM-L6-v2", "images texts"
TEACHERS = {  # function, kind of prompt, what it labels, default model, arguments for the header
    "glyphs": (label_with_network, None, "digits", "cnn on rendered glyphs", ""),
    "clip": (label_by_cosine, TEMPLATE, "images", "openai/clip-vit-large-patch14", ""),
    "text": (label_with_text_model, QUESTION, "texts", "google/flan-t5-large", "max_chars"),
    "embedding": (label_by_cosine, TEMPLATE, "texts", MINI_LM, "max_chars temperature"),
    "chat": (label_with_chat, QUESTION, BOTH, None, "max_chars logprobs extra_body image_size"),
    "student": (label_with_network, None, BOTH, None, ""),
    "import": (label_from_file, None, BOTH, None, ""),
}


def prepared(data: Data, args: Args) -> Args:
    """The arguments with model and prompt filled in. Raises UserError for those that do not fit."""
    _, which, reads, model, _ = TEACHERS[args.teacher]
    kind = "texts" if data.part(args.split).is_text else "images"
    needed = {"student": "student", "import": "input", "chat": "model"}.get(args.teacher, "teacher")
    extra = {*OURS}
    with suppress(*ODD):  # not a JSON object
        extra &= json.loads(args.extra_body).keys()
    problems = {
        f"--{name.replace('_', '-')} {value}: expected a number above 0": not 0 < value < math.inf
        for name, value in vars(args).items()
        if type(value) in (int, float) and not (value == 0 and name.startswith("price"))
    } | {
        f"--teacher {args.teacher} needs --{needed}": getattr(args, needed) is None,
        f"--teacher {args.teacher} labels only {reads}": not {kind, data.name} & {*reads.split()},
        "--logprobs: more than 20 classes do not fit": args.logprobs and len(data.classes) > 20,
        "--max-cost needs --price-in/-out": args.max_cost and not args.price_in + args.price_out,
        f"--extra-body: expected a JSON object without {', '.join(OURS)}": extra,
        "--csv goes with --teacher student and own data": args.csv,
        "--batch-file, --batch-results: take one, with --teacher chat":
            bool(args.batch_file) + bool(args.batch_results) > (args.teacher == "chat"),
    }  # fmt: skip
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise UserError(found[0])
    texts = "sentiment" if "negative" in " ".join(data.classes).lower() else "topics"
    prompt = None if which is None else PROMPTS[texts if kind == "texts" else kind][which]
    if prompt and args.prompt:
        given = Path(args.prompt).read_text("utf-8", "replace").strip()
        if "{text}" in prompt and "{text}" not in given:
            raise UserError(f"--prompt {args.prompt}: expected the placeholder {{text}} in it")
        prompt = given
    return replace(args, model=args.model or model, prompt=prompt)


def label(data: Data, args: Args) -> Row:
    """Label what the file lacks; print and return a summary of the file, also if interrupted."""
    args, (teach, *_, settings) = prepared(data, args), TEACHERS[args.teacher]
    model, part, classes = args.model, data.part(args.split), data.classes
    source = {"student": f"{args.student}/model.safetensors", "import": args.input}
    if source := source.get(args.teacher):
        model = f"{Path(source).name} {content_hash(Path(source).read_bytes(), 8)}"
    settings = {setting: getattr(args, setting) for setting in settings.split()}
    header = header_of(data, args.split, args.teacher, model, args.prompt, settings)
    name = f"{data.name}-{args.split}-{args.teacher}"
    if Path(args.dataset).is_file():  # another one of its name has another file
        name += f"-{content_hash(os.path.realpath(args.dataset).encode(), 4)}"
    path = Path(args.output or f"{args.data_dir}/labels/{name}.jsonl")
    given = args.dataset, args.test_file, args.prompt, args.input, args.batch_results
    given = {os.path.realpath(file) for file in given if file}
    if found := given & {os.path.realpath(file) for file in (path, args.batch_file) if file}:
        raise UserError(f"{found.pop()} is an input; write to another file")
    file, rows = open_labels(path, header)
    done = {row["index"] for row in rows if "label" in row}
    tried = {row.get("index") for row in rows}
    todo = [i for i in range(len(part)) if i not in done]
    if args.dry_run:
        random.Random(0).shuffle(todo)  # a fair sample
    todo = sorted(todo, key=lambda i: (i in tried, part.y[i] < 0))[: args.dry_run]  # known first
    costs = [args.cost(row.get("usage", [0, 0])) for row in rows]
    left = math.inf if args.max_cost is None or args.batch_results else args.max_cost - sum(costs)
    todo = todo if max(costs, default=0.0) <= left else []  # one more might cost as much
    try:
        with file, tqdm(total=len(todo), desc=name, disable=None) as bar:
            args = replace(args, max_cost=left)
            more = [rows] if teach is label_with_chat else []
            for row in teach(part, classes, todo, args, *more) if todo else ():
                if "index" in row and row["index"] in tried:
                    row.setdefault("label", None)  # no answer in two runs
                line = (json.dumps(row) + "\n").encode()
                if file.write(line) < len(line):
                    raise UserError(f"could not write all of {path}: make room and resume")
                rows.append(row)
                bar.update("label" in row)
    finally:
        result = summary(path, rows, part.y, classes, args)
    return result


def summary(path: Path, rows: list[Row], y: np.ndarray, classes: list, args: Args) -> Row:
    """Print and return counts, tokens, cost, accuracy on known labels (percent), none is wrong."""
    labels, _ = collect(path, rows, len(y), len(classes))
    used = np.sum([[0, 0], *(row.get("usage", [0, 0]) for row in rows)], axis=0).tolist()
    done, none, cost = int((labels > -2).sum()), int((labels == -1).sum()), args.cost(used)
    y_known, answers = y[known := (labels > -2) & (y >= 0)], labels[known]
    result = {"path": str(path), "labeled": done, "known": len(answers), "abstentions": none}
    result |= {"tokens": used, "cost": cost, "accuracy": None}
    print(f"{path}: {done} of {len(y)} labeled, {none} abstentions ({none / max(1, done):.1%})\n"
          f"labels per class: {class_counts(labels, classes)}")  # fmt: skip
    if any(used):
        scale = len(y) / max(1, len({row["index"] for row in rows if "index" in row}))
        for of, n in ("so far", 1), (f"estimate for all {len(y)}", scale):
            print(f"{of}: {n * used[0]:.0f} tokens in, {n * used[1]:.0f} out, cost {n * cost:.4f}")
    if total := len(answers):
        right = int((answers == y_known).sum())
        low, high = binomtest(right, total).proportion_ci(method="wilson")
        result["accuracy"] = acc = 100 * right / total
        print(f"accuracy {acc:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}) of {total}"
              f" known labels\n{report_of(y_known, answers, classes)[0]}")  # fmt: skip
    return result


@first_process_first()
def default_labels(data: Data, data_dir: str, dataset: Any = None, test_file: Any = None) -> tuple:
    """Label files in DATA_DIR/labels of the train part and, if found, of the test part. Makes those
    of published images. Raises UserError, with advice, for own data or if it finds several."""
    folder, dataset = Path(data_dir) / "labels", dataset or data.name

    def complete(split, teacher="*"):
        wanted, found = header_of(data, split).items(), []
        for path in sorted(folder.glob(f"{glob.escape(data.name)}-{split}-{teacher}.jsonl")):
            header, rows, _ = read_rows(path)
            done = sum("label" in row for row in rows)
            found += [str(path)] * (wanted <= header.items() and done == header["num_examples"])
        return found

    if dataset == "digits":
        for split in [split for split in ("train", "test") if not complete(split, "glyphs")]:
            label(data, Args(split=split, data_dir=data_dir, device="cpu"))
        return *complete("train", "glyphs"), *complete("test", "glyphs")
    found = complete("train")
    if len(found) > 1:
        raise UserError(f"several label files: {', '.join(found)}; set --pseudolabels")
    if not found and (data.train.is_text or dataset not in PRESETS):
        teacher = "text" if data.train.is_text else "clip"
        command = f"pseudolabel.py --dataset {dataset} --teacher {teacher}"
        command += f" --test-file {test_file}" if test_file else ""
        raise UserError(f"no labels of {data.name} in {folder}; run {command}, set --pseudolabels")
    found = found or [label(data, Args(data.name, teacher="clip", data_dir=data_dir))["path"]]
    teacher = Path(found[0]).stem.removeprefix(f"{data.name}-train-")
    test = complete("test", teacher) if data.test else []
    return found[0], test[0] if test else None


def pictures_for(config: Row, files: Any, store: str) -> Split:
    """Picture files as a student sees them (config: of `load_student`), decoded into `store`."""
    preset = Preset(size=config["size"], pad=config["pad"])
    part = decode(Split(np.array(files, object), np.full(len(files), -1)), store, preset, "test")
    if len(config["mean"]) == 1:
        part.x = rgb_to_grayscale(torch.tensor(part.x)).numpy()
    return part


def read_images(files: list, config: Row) -> Tensor:
    """Input [n, C, size, size] of a student (config: of `load_student`). UserError: unreadable."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        x = torch.tensor(pictures_for(config, files, f"{folder}/new").x)
    if len(x) < len(files):
        raise UserError(f"{len(files) - len(x)} pictures cannot be read; leave them out")
    return normalize(x / 255, config["mean"], config["std"])


def answer_all(args: Args, config: Row) -> Row:
    """A student's answers to all rows of a table, or files of a folder, in --csv: its columns or
    file, then label, confidence, a probability per class ("predicted NAME" where NAME is taken);
    and in the result: answers {text or file: [label, confidence, a probability per class]}."""
    path, classes = Path(args.dataset), config["classes"]
    is_text = not (path.is_dir() or config["mean"])
    out = Path(args.csv or f"{args.data_dir}/{path.resolve().name}.csv")
    if out.resolve() == path.resolve():
        raise UserError(f"--csv {out} is an input; write to another file")
    rows = [{"file": file} for file in files_below(path)] if path.is_dir() else read_table(path)
    usual = f"{args.text_column},{config.get('columns', [''])[0]}"  # that it was trained on
    column = column_of(rows, usual if is_text else "image,file")
    names = [text_in(row.get(column)) for row in rows]
    if path.is_file() and not is_text:
        names = [name and str(path.parent / name) for name in names]
    x = np.array([*filter(None, names)], object)
    part, new = Split(x, np.full(len(x), -1)), content_hash(bytes(path.resolve()))
    if not is_text:
        part = pictures_for(config, x, f"{args.data_dir}/decoded/new-{new}")
    made = list(label_with_network(part, classes, [*range(len(part))], args)) if len(part) else []
    keys = part.x if is_text else part.files
    answers = {k: [classes[r["label"]], max(r["probs"]), *r["probs"]] for k, r in zip(keys, made)}
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    ours = [f"predicted {n}" if n in columns else n for n in ("label", "confidence", *classes)]
    table = [columns + ours]
    for row, name in zip(rows, names):
        table.append([*map(row.get, columns), *answers.get(name, [""] * len(ours))])
    os.makedirs(out.parent, exist_ok=True)
    with open(out, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(table)
    return summary(out, made, part.y, classes, args) | {"answers": answers}


def main(args: Args) -> Row:
    """Label a part of a data set, or new data; return the printed summary. Raises UserError."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name it cannot show ends no job
    config, folder = {"backbone": "a teacher", "size": None}, Path(args.dataset)
    if args.teacher == "student" and args.student:
        _, config = load_student(args.student)
        is_new = args.csv or folder.is_dir() and not (folder / "train").is_dir()
        if is_new and args.dataset not in PRESETS:
            return answer_all(args, config)
    look = config["backbone"], config["size"], (args.text_column, args.label_column)
    preset = preset_of(args.dataset, *look)
    return label(load_data(args.dataset, args.data_dir, args.test_file, preset), args)


if __name__ == "__main__":
    cli(Args, main)
