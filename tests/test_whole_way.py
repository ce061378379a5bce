"""From own pictures and texts to a model that labels new ones, with what the README says and nothing else."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_text import sentences, tiny  # noqa: F401  (a fixture)

import adamatch
import common
import kd_fixmatch
import pseudolabel
import zeromatch

SHADES = {"beach": (220, 200, 120), "forest": (30, 120, 40)}


def photo(place: str, seed: int, mode: str = "RGB") -> Image.Image:
    """A noisy picture of about one color, 40 x 50 pixels."""
    noise = np.random.RandomState(seed).randint(-30, 30, (40, 50, 3))
    return Image.fromarray((np.array(SHADES[place]) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture
def pictures(tmp_path):
    """A folder: 5 labeled pictures a class, 40 unlabeled ones in folders of any name, one damaged; a teacher's CSV."""
    folder = tmp_path / "places"
    for place in SHADES:
        (folder / "train" / place).mkdir(parents=True)
        for i in range(5):
            photo(place, i, "RGBA" if i == 1 else "RGB").save(folder / "train" / place / f"{i}.png")
    (folder / "unlabeled" / "2026").mkdir(parents=True)
    for i in range(40):
        photo("beach" if i % 2 else "forest", 100 + i).save(folder / "unlabeled" / "2026" / f"{i:02d}.jpg")
    (folder / "unlabeled" / "broken.jpg").write_bytes(b"no picture")
    return folder


def label(tmp_path, **args):
    return pseudolabel.main(pseudolabel.Args(data_dir=str(tmp_path / "data"), device="cpu", **args))


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
    teacher.write_text("label\n" + "".join(f"{wrong[n] if i % 10 == 3 else n}\n" for i, n in enumerate(names)))
    made = label(tmp_path, dataset=str(pictures), teacher="import", input=str(teacher))
    assert made["labeled"] == 50 and made["known"] == 10 and "broken.jpg" in capsys.readouterr().out

    settings = {"backbone": "cnn", "num_steps": 30, "lr": 3e-3, "batch_size": 8, "warmup_steps": 3, "ema_decay": 0.5}
    settings |= {"pseudolabels": made["path"], "num_steps_stage1": 20, "layer_decay": 1.0, "eval_every": 15}
    needless = {"pseudolabels"} if script is adamatch else set()  # it has no teacher
    settings = {k: v for k, v in settings.items() if hasattr(script.Args, k) and k not in needless}
    shared = {"dataset": str(pictures), "num_labels": 0, "data_dir": str(tmp_path / "data"), "device": "cpu"}
    result = script.main(script.Args(**shared, runs_dir=str(tmp_path / "runs"), **settings))
    measured = "agreement" if script is zeromatch else "labeled_acc"
    assert result["measured"] == measured and result[measured] > 80 and "test_acc" not in result
    assert f"measured at evaluations: {common.MEASURED[measured][1]}" in capsys.readouterr().out

    new = tmp_path / "holiday" / "day 1"
    new.mkdir(parents=True)
    for i, place in enumerate(["beach", "forest", "forest"]):
        photo(place, 900 + i).save(new / f"{i}.webp")
    answers = str(tmp_path / "answers.csv")
    label(tmp_path, dataset=str(new.parent), teacher="student", student=student_of(tmp_path), csv=answers)
    rows = read_csv(answers)
    assert list(rows[0]) == ["index", "file", "label", "beach", "forest"]
    assert [row["label"] for row in rows] == ["beach", "forest", "forest"] and rows[1]["file"].endswith("1.webp")
    assert all(float(row["beach"]) + float(row["forest"]) == pytest.approx(1, abs=1e-3) for row in rows)


def test_from_a_csv_of_texts_to_labels_of_new_ones(tmp_path, tiny):  # noqa: F811
    def write(name, rows, header):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(tmp_path / name)

    rows = [(text, topic if k < 5 else "") for topic in ("tea", "sea") for k, text in enumerate(sentences(topic, 25))]
    texts = write("mine.csv", rows, ("text", "label"))
    teacher = write("teacher.csv", [["tea" if i < 25 else "sea"] for i in range(50)], ["label"])
    made = label(tmp_path, dataset=texts, teacher="import", input=teacher)
    zeromatch.main(zeromatch.Args(
        dataset=texts, num_labels=0, pseudolabels=made["path"], data_dir=str(tmp_path / "data"), backbone=tiny,
        runs_dir=str(tmp_path / "runs"), device="cpu", amp="off", weights="none", num_steps=20, num_steps_stage1=30,
        lr=1e-2, layer_decay=1.0, eval_every=20, warmup_steps=3,
    ))  # fmt: skip
    new = write("new.csv", [[text] for topic in ("sea", "tea") for text in sentences(topic, 4, seed=9)], ["text"])
    label(tmp_path, dataset=new, teacher="student", student=student_of(tmp_path), csv=str(tmp_path / "answers.csv"))
    answers = read_csv(tmp_path / "answers.csv")
    assert list(answers[0]) == ["index", "text", "label", "sea", "tea"]
    right = [row["label"] == name for row, name in zip(answers, ["sea"] * 4 + ["tea"] * 4, strict=True)]
    assert sum(right) >= 6
    assert answers[0]["text"] == sentences("sea", 1, seed=9)[0]


def test_the_encoder_of_a_student_opens_in_transformers(tmp_path, tiny):  # noqa: F811
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(1)
    student = common.build_student(tiny, 0, 40, 2).eval()
    config = common.student_config("x.csv", tiny, common.PRESETS["text"], ["sea", "tea"])
    common.save_student(tmp_path / "student", student, config)
    model = AutoModel.from_pretrained(tmp_path / "student" / "encoder").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "student" / "encoder")(["a tea"], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(hidden, student(tokens["input_ids"])[2])


def test_a_gray_student_labels_pictures_in_color(tmp_path):
    preset = common.PRESETS["digits"]
    student = common.build_student("cnn", 1, 8, 10)
    config = common.student_config("digits", "cnn", preset, [str(k) for k in range(10)])
    (tmp_path / "runs/x").mkdir(parents=True)
    common.save_student(tmp_path / "runs/x/student", student, config)
    (tmp_path / "new").mkdir()
    photo("beach", 0).save(tmp_path / "new" / "a.png")
    made = label(tmp_path, dataset=str(tmp_path / "new"), teacher="student", student=student_of(tmp_path))
    assert made["labeled"] == 1


def test_a_folder_without_pictures_and_a_student_of_texts_are_refused(tmp_path, tiny):  # noqa: F811
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    student = common.build_student(tiny, 0, 40, 2)
    config = common.student_config("x.csv", tiny, common.PRESETS["text"], ["sea", "tea"])
    common.save_student(tmp_path / "runs/x/student", student, config)
    with pytest.raises(common.UserError, match="reads texts"):
        label(tmp_path, dataset=str(tmp_path / "new"), teacher="student", student=student_of(tmp_path))
    common.save_student(
        tmp_path / "runs/x/student", common.build_student("cnn", 1, 8, 10),
        common.student_config("digits", "cnn", common.PRESETS["digits"], list("0123456789")),
    )  # fmt: skip
    shutil.rmtree(tmp_path / "runs/x/student/encoder")
    with pytest.raises(common.UserError, match="no picture"):
        label(tmp_path, dataset=str(tmp_path / "new"), teacher="student", student=student_of(tmp_path))
