"""From own pictures and texts to a model that labels new ones, by what the README says alone."""

import csv
import random

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from runs import save_untrained

import adamatch
import common
import kd_fixmatch
import pseudolabel
import zeromatch

SHADES = {"beach": (220, 200, 120), "forest": (30, 120, 40)}


def photo(place, seed, mode="RGB"):
    """A noisy picture of about one color, 40 x 50 pixels."""
    noise = np.random.RandomState(seed).randint(-30, 30, (40, 50, 3))
    pixels = (np.array(SHADES[place]) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def pictures(tmp_path):
    """A folder: 5 labeled pictures a class, 40 unlabeled ones in nested folders, one damaged."""
    folder = tmp_path / "places"
    for place in SHADES:
        (folder / "train" / place).mkdir(parents=True)
        for i in range(5):
            picture = photo(place, i, "RGBA" if i == 1 else "RGB")
            picture.save(folder / "train" / place / f"{i}.png")
    unlabeled = folder / "unlabeled" / "2026"
    unlabeled.mkdir(parents=True)
    for i in range(40):
        photo("beach" if i % 2 else "forest", 100 + i).save(unlabeled / f"{i:02d}.jpg")
    (folder / "unlabeled" / "broken.jpg").write_bytes(b"no picture")
    return folder


def label(tmp_path, **args):
    data_dir = str(tmp_path / "data")
    return pseudolabel.main(pseudolabel.Args(data_dir=data_dir, device="cpu", **args))


def student_of(tmp_path):
    (folder,) = (tmp_path / "runs").glob("*/student")
    return str(folder)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", [zeromatch, adamatch, kd_fixmatch])
def test_from_a_folder_of_pictures_to_labels_of_new_ones(tmp_path, pictures, capsys, script):
    teacher = tmp_path / "teacher.csv"  # labels made elsewhere, a tenth of them wrong
    names = ["beach"] * 5 + ["forest"] * 5 + ["beach" if i % 2 else "forest" for i in range(40)]
    wrong = {"beach": "forest", "forest": "beach"}
    said = [wrong[name] if i % 10 == 3 else name for i, name in enumerate(names)]
    teacher.write_text("\n".join(["label", *said]))
    made = label(tmp_path, dataset=str(pictures), teacher="import", input=str(teacher))
    assert made["labeled"] == 50 and made["known"] == 10
    assert "broken.jpg" in capsys.readouterr().out

    settings = {"backbone": "cnn", "num_steps": 30, "lr": 3e-3, "batch_size": 8, "warmup_steps": 3}
    settings |= {"ema_decay": 0.5, "num_steps_stage1": 20, "layer_decay": 1.0, "eval_every": 15}
    settings |= {"dataset": str(pictures), "num_labels": 0, "device": "cpu"}
    settings |= {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    if script is zeromatch:
        settings["pseudolabels"] = made["path"]
    settings = {k: v for k, v in settings.items() if hasattr(script.Args, k)}
    result = script.main(script.Args(**settings))
    assert result["measured"] == "labeled_acc" and result["labeled_acc"] > 80
    assert "test_acc" not in result
    assert "labeled_acc, last evaluation" in capsys.readouterr().out

    new = tmp_path / "holiday" / "day 1"
    new.mkdir(parents=True)
    for i, place in enumerate(["beach", "forest", "forest"]):
        photo(place, 900 + i).save(new / f"{i}.webp")
    answers, folder = str(tmp_path / "answers.csv"), str(new.parent)
    label(tmp_path, dataset=folder, teacher="student", student=student_of(tmp_path), csv=answers)
    rows = read_csv(answers)
    assert list(rows[0]) == ["file", "label", "confidence", "beach", "forest"]
    assert [row["label"] for row in rows] == ["beach", "forest", "forest"]
    assert rows[1]["file"].endswith("1.webp")
    shares = [float(row["beach"]) + float(row["forest"]) for row in rows]
    assert shares == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(tiny_models.encoder(tmp_path_factory.mktemp("models") / "bert"))


def texts_of(topic, n, seed=0):
    """Texts of four words of a topic, or three of it and one of the other's."""
    words = {"tea": "leaf pot kettle cup".split(), "sea": "gull sail wind wharf".split()}
    rng = random.Random(f"{topic}/{seed}")
    topics = [topic] * 6 + ["tea", "sea"]
    return [" ".join(rng.choice(words[rng.choice(topics)]) for _ in range(4)) for _ in range(n)]


def test_from_a_csv_of_texts_to_labels_of_new_ones(tmp_path, bert):
    def write(name, rows, header):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(tmp_path / name)

    rows = [
        (text, topic if k < 5 else "")
        for topic in ("tea", "sea")
        for k, text in enumerate(texts_of(topic, 25))
    ]
    texts = write("mine.csv", rows, ("text", "label"))
    teacher = write("teacher.csv", [["tea" if i < 25 else "sea"] for i in range(50)], ["label"])
    made = label(tmp_path, dataset=texts, teacher="import", input=teacher)
    zeromatch.main(zeromatch.Args(
        dataset=texts, num_labels=0, pseudolabels=made["path"], data_dir=str(tmp_path / "data"),
        backbone=bert, runs_dir=str(tmp_path / "runs"), device="cpu", amp="off", weights="none",
        num_steps=20, num_steps_stage1=30, lr=1e-2, layer_decay=1.0, eval_every=20, warmup_steps=3,
    ))  # fmt: skip
    names, answers = ["sea"] * 4 + ["tea"] * 4, str(tmp_path / "answers.csv")
    fresh = texts_of("sea", 4, seed=9) + texts_of("tea", 4, seed=9)
    new = write("new.csv", [[text] for text in fresh], ["text"])
    label(tmp_path, dataset=new, teacher="student", student=student_of(tmp_path), csv=answers)
    rows = read_csv(answers)
    assert list(rows[0]) == ["text", "label", "confidence", "sea", "tea"]
    assert [row["text"] for row in rows] == fresh
    assert sum(row["label"] == name for row, name in zip(rows, names, strict=True)) >= 6


def test_the_encoder_of_a_student_opens_in_transformers(tmp_path, bert):
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(1)
    student = save_untrained(tmp_path / "student", bert, common.OWN["texts"], ["sea", "tea"])
    model = AutoModel.from_pretrained(tmp_path / "student" / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student" / "encoder")
    tokens = tokenizer(["a tea"], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(hidden, student(tokens["input_ids"])[2])


def test_a_gray_student_labels_pictures_in_color(tmp_path):
    save_untrained(tmp_path / "runs/x/student", "cnn", common.PRESETS["digits"], list("0123456789"))
    (tmp_path / "new").mkdir()
    photo("beach", 0).save(tmp_path / "new" / "a.png")
    given = {"dataset": str(tmp_path / "new"), "student": student_of(tmp_path)}
    assert label(tmp_path, teacher="student", **given)["labeled"] == 1


def test_a_folder_without_pictures_is_refused(tmp_path):
    folder = tmp_path / "runs/x/student"
    (tmp_path / "new").mkdir()
    given = {"dataset": str(tmp_path / "new"), "teacher": "student", "student": str(folder)}
    save_untrained(folder, "cnn", common.PRESETS["digits"], list("0123456789"))
    with pytest.raises(common.UserError, match="none of the 0"):
        label(tmp_path, **given)
