"""A foundation model's zero-shot labels for a data set: one JSON Lines file, made once, read by zeromatch.py.

    python pseudolabel.py --dataset digits --teacher glyphs --split train

The file. Line 1 is a header: format, data set, split, number of examples, class names in order, a
fingerprint of the examples, teacher, model, prompt. Then one line an example:
    {"index": 17, "label": 3, "probs": [...]}          label null: the teacher gave no usable answer
It is append-only and may be cut anywhere: whatever stands in whole lines is kept and continued.

Teachers
    glyphs   for `digits`: a small network that has only ever seen digits rendered from Pillow's
             built-in font labels the handwritten ones. A true zero-shot teacher: it makes its own,
             systematic mistakes (its ones have serifs, its sevens no bar).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tqdm import tqdm

from common import Data, SmallCNN, Split, Student, UserError, Views, predict, preset_of, seed_step

# ---------------------------------------------------------------------------- the label file

FORMAT = "zeromatch-labels-1"


def fingerprint(split: Split) -> dict[str, str]:
    """Two hashes of a split: `order` of the examples as they stand, `content` whatever their order."""
    rows = split.hashes()
    return {
        "order": hashlib.blake2b(b"".join(rows), digest_size=8).hexdigest(),
        "content": hashlib.blake2b(b"".join(sorted(rows)), digest_size=8).hexdigest(),
    }


def header_of(data: Data, split: str, teacher: str, model: str, prompt: str | None = None) -> dict[str, Any]:
    """Line 1 of a label file for one part ("train" or "test") of a data set."""
    part = data.part(split)
    return {
        "format": FORMAT, "dataset": data.name, "split": split, "num_examples": len(part), "classes": data.classes,
        "fingerprint": fingerprint(part), "teacher": teacher, "model": model, "prompt": prompt,
    }  # fmt: skip


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """(header, rows, length in bytes of the whole lines) of a label file; a torn last line is left out.

    Raises UserError when the file is missing, is no label file, or a whole line is damaged."""
    if not path.is_file():
        raise UserError(f"--pseudolabels {path}: no such file; make it with pseudolabel.py")
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise UserError(
                f"{path}: line {number} is not a JSON object; the file is damaged or no label file"
            )
    if not rows or rows[0].get("format") != FORMAT:
        raise UserError(
            f"{path}: expected a first line with format {FORMAT}; make label files with pseudolabel.py"
        )
    return rows[0], rows[1:], len(whole)


def check_header(path: Path, header: dict[str, Any], data: Data, split: str) -> None:
    """Raise UserError saying why a label file does not belong to this part of this data set."""
    wanted = header_of(data, split, "", "")
    for key, what in (("dataset", "data set"), ("split", "split"), ("num_examples", "number of examples")):
        if header.get(key) != wanted[key]:
            raise UserError(
                f"{path}: made for {what} {header.get(key)!r}, expected {wanted[key]!r}; give another file"
            )
    if header.get("classes") != data.classes:
        raise UserError(
            f"{path}: its class names or their order differ from {data.name}'s; make the labels again"
        )
    if header.get("fingerprint") != wanted["fingerprint"]:
        same = isinstance(header.get("fingerprint"), dict) and (
            header["fingerprint"].get("content") == wanted["fingerprint"]["content"])  # fmt: skip
        reason = "the same examples in another order" if same else "other examples"
        raise UserError(f"{path}: made for {reason} than {data.name}'s {split} part; make the labels again")


def read_labels(path: str | Path, data: Data, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(labels [N] int64 with -1 for an abstention, probs [N, K] float32 or None) from a label file.

    Raises UserError with the reason when the file belongs to other data, is incomplete or damaged."""
    path = Path(path)
    header, rows, _ = read_rows(path)
    check_header(path, header, data, split)
    n, k = header["num_examples"], len(data.classes)
    labels, probs = np.full(n, -2), np.full((n, k), np.nan, np.float32)
    for number, row in enumerate(rows, 2):
        index, label = row.get("index"), row.get("label", -2)
        if not isinstance(index, int) or not 0 <= index < n:
            raise UserError(
                f"{path}: line {number} has index {index!r}, expected 0 to {n - 1}; the file is damaged"
            )
        if labels[index] != -2:
            raise UserError(
                f"{path}: line {number} labels example {index} a second time; the file is damaged"
            )
        if label is not None and not (isinstance(label, int) and 0 <= label < k):
            raise UserError(f"{path}: line {number} has label {label!r}, expected 0 to {k - 1} or null")
        labels[index] = -1 if label is None else label
        if "probs" in row:
            if not isinstance(row["probs"], list) or len(row["probs"]) != k:
                raise UserError(f"{path}: line {number} has no list of {k} probabilities under probs")
            probs[index] = row["probs"]
    missing = int((labels == -2).sum())
    if missing:
        raise UserError(
            f"{path}: {missing} of {n} examples have no label yet; run the same pseudolabel.py command again"
        )
    return labels, None if np.isnan(probs).any() else probs


def write_labels(path: Path, header: dict[str, Any], probs: np.ndarray) -> None:
    """Write a whole label file from probabilities [N, K]; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps(header) + "\n")
        for index, row in enumerate(probs):
            line = {"index": index, "label": int(row.argmax()), "probs": [round(float(p), 5) for p in row]}
            file.write(json.dumps(line) + "\n")
    os.replace(part, path)


# ---------------------------------------------------------------------------- teacher: rendered glyphs


def render_glyphs() -> Tensor:
    """Digits of Pillow's built-in font, each cut to its ink: [10, widths, 1, 64, 64] in [0, 1].

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

    Rotation, shear, width, size and a smooth elastic field; then a 32x32 bitmap averaged in 4x4
    blocks, which is how the handwritten set was made. The ranges were set so that ink, width and
    slant of rendered and handwritten images agree on average; no label was looked at for that."""
    y = torch.randint(10, (batch,))
    images = glyphs[y, torch.randint(glyphs.shape[1], (batch,))]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch)

    ink_width = (images.amax(dim=2).squeeze(1) > 0.3).float().mean(dim=1)
    width = uniform(0.7, 1.1) * (0.62 / ink_width).sqrt()  # narrow digits wider, wide ones narrower
    angle, shear, size = uniform(-0.15, 0.15), uniform(-0.25, 0.15), uniform(0.95, 1.1)
    affine = torch.stack([
        torch.stack([angle.cos() / width, shear + angle.sin(), uniform(-0.05, 0.05)], dim=1),
        torch.stack([-angle.sin(), angle.cos(), uniform(-0.05, 0.05)], dim=1),
    ], dim=1) * size.view(-1, 1, 1)  # fmt: skip
    elastic = F.interpolate(
        torch.randn(batch, 2, 3, 3) * 0.2, size=(32, 32), mode="bicubic", align_corners=False
    )
    grid = F.affine_grid(affine, [batch, 1, 32, 32], align_corners=False) + elastic.permute(0, 2, 3, 1)
    bitmap = (F.grid_sample(images, grid, align_corners=False) > 0.5).float()
    return (F.avg_pool2d(bitmap, 4) * 255).round().to(torch.uint8), y


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


def label_with_glyphs(data: Data, paths: dict[str, Path]) -> None:
    """Write the glyph teacher's labels of the given parts ({"train": path, "test": path})."""
    if data.name != "digits":
        raise UserError(f"--teacher glyphs knows digits only, not {data.name}; use another teacher")
    student = train_glyph_teacher()
    for split, path in paths.items():
        probs = predict(student, Views(data.part(split), preset_of("digits"), torch.device("cpu")))
        write_labels(path, header_of(data, split, "glyphs", "cnn on rendered glyphs"), probs.numpy())


def default_labels(data: Data, data_dir: str) -> tuple[Path, Path]:
    """Label files of the train and test part in `data_dir`/labels, made now where they are missing."""
    paths = {
        split: Path(data_dir) / "labels" / f"{data.name}-{split}-glyphs.jsonl" for split in ("train", "test")
    }
    if data.name != "digits":
        raise UserError(
            f"--pseudolabels: no label file of {data.name} was given; make one with pseudolabel.py"
        )
    if not all(path.exists() for path in paths.values()):
        label_with_glyphs(data, paths)
    return paths["train"], paths["test"]
