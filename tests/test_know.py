"""Knowing what one has: review.csv, the probe, answers in Python, other columns, ONNX."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from runs import (
    digits_labels, digits_views, dying_at, new_student, only_run, save_untrained, write_labels,
)  # fmt: skip

import adamatch
import common
import kd_fixmatch
import pseudolabel
import zeromatch
from common import UserError

HEADER = ["labeled", "label or student's", "teacher's", "rank", "example"]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------------------- review.csv


def review(tmp_path, probs, features, labeled, y, y_zs, part=None):
    part = part or common.Split(np.zeros((len(y), 1, 8, 8), np.uint8), np.array(y))
    found = [torch.tensor(probs), torch.tensor(features)]
    path, classes = tmp_path / "review.csv", ["cat", "dog"]
    zeromatch.write_review(path, found, np.array(labeled), np.array(y_zs), part, classes)
    header, *rows = read_csv(path)
    assert header == HEADER
    return rows


def test_doubtful_labels_come_first_then_confident_differences(tmp_path):
    """Two groups of eleven; example 3 has the label of the other group, which the student fits."""
    y = [0] * 11 + [1] * 11
    y[3] = 1
    probs = [[0.9, 0.1]] * 11 + [[0.2, 0.8]] * 11
    probs[3], probs[5], probs[6] = [0.01, 0.99], [0.6, 0.4], [0.95, 0.05]
    features = [[float(10 * (i > 10)), 0.1 * i] for i in range(22)]
    y_zs = [0] * 11 + [1] * 11
    y_zs[5] = y_zs[6] = 1  # the teacher is wrong about unlabeled ones
    y_zs[12] = 0  # ... and about a labeled one, whose neighbors support its label
    y_zs[7], y_zs[2] = -1, -1  # no answer
    rows = review(tmp_path, probs, features, [2, 3, 12], y, y_zs)
    assert [[*row[:3], row[4]] for row in rows] == [
        ["True", "dog", "cat", "3"], ["True", "dog", "cat", "12"], ["False", "cat", "dog", "6"],
        ["False", "cat", "dog", "5"],
    ]  # fmt: skip
    # 2 - support: of dog, among the 10 examples nearest to 3 (0 to 9, itself included)
    support = (7 * 0.1 + 0.99 + 0.4 + 0.05) / 10
    ranks = [2 - support, 2 - 0.8, 0.95, 0.6]
    assert [float(row[3]) for row in rows] == pytest.approx(ranks, abs=1e-5)


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_a_review_names_texts_and_files_and_has_200_rows_at_most(tmp_path, kind):
    n = 300
    names = np.array([f'a "{i}",\nb' for i in range(n)], object)
    x = names if kind == "texts" else np.zeros((n, 3, 8, 8), np.uint8)
    part = common.Split(x, np.full(n, -1), files=None if kind == "texts" else names)
    probs = np.tile(np.float32([0.3, 0.7]), (n, 1))
    part.y[:4] = [0, 1, 0, 1]
    features = np.random.RandomState(0).randn(n, 2).astype(np.float32)
    rows = review(tmp_path, probs, features, [0, 1, 2, 3], part.y, [0] * n, part)
    assert len(rows) == 200 and {row[0] for row in rows[:2]} == {"True"}
    assert all(row[4] in names for row in rows) and rows[2][0] == "False"


def test_a_pool_smaller_than_ten_can_be_reviewed(tmp_path):
    rows = review(tmp_path, [[0.9, 0.1]] * 3, [[0.0], [1.0], [2.0]], [0, 1, 2], [0, 1, 0], [1] * 3)
    assert len(rows) == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_five_wrong_labels_of_digits_are_among_the_first_twenty_rows(tmp_path, monkeypatch, seed):
    data, rng = common.load_data("digits", "data"), np.random.RandomState(seed)
    labeled = common.draw_labeled(data.train.y, 40, 10, seed)
    wrong = rng.choice(labeled, 5, replace=False)
    data.train.y[wrong] = (data.train.y[wrong] + rng.randint(1, 10, 5)) % 10
    monkeypatch.setattr(zeromatch, "load_data", lambda *given: data)
    monkeypatch.setattr(zeromatch, "draw_labeled", lambda *given: labeled)
    args = {"num_labels": 40, "seed": seed, "num_steps": 200, "runs_dir": str(tmp_path)}
    zeromatch.main(zeromatch.Args(**args, data_dir=str(tmp_path)))
    _, *rows = read_csv(only_run(tmp_path) / "review.csv")
    assert len({int(row[4]) for row in rows[:20]} & set(wrong.tolist())) >= 4


# ---------------------------------------------------------------------------- the probe


def probed(tmp_path, **changes):
    args = {"probe": True, "num_labels": 40, "seed": 3, "runs_dir": str(tmp_path / "runs")}
    result = adamatch.main(adamatch.Args(**args | {"data_dir": str(tmp_path)} | changes))
    return result, only_run(tmp_path / "runs")


def test_the_probe_is_a_logistic_regression_on_the_features(tmp_path, capsys):
    """An independent one: standardized by hand, fitted by scikit-learn on the same 40 examples."""
    from sklearn.linear_model import LogisticRegression

    labels = digits_labels(tmp_path)["pseudolabels"]
    result, folder = probed(tmp_path, pseudolabels=labels)
    data, student = common.load_data("digits", "data"), new_student(seed=3).eval()
    drawn = common.draw_labeled(data.train.y, 40, 10, 3)
    with torch.no_grad():
        x = student(digits_views().plain(torch.from_numpy(drawn)))[2]
        x_test = student(digits_views("test").plain(torch.arange(500)))[2]
    mean, sd = x.mean(dim=0), x.std(dim=0, correction=0)
    sd[sd == 0] = 1
    model = LogisticRegression(max_iter=1000).fit((x - mean) / sd, data.train.y[drawn])
    expected = 100 * model.score((x_test - mean) / sd, data.test.y)
    assert result["test_acc"] == pytest.approx(expected, abs=0.41) and expected > 50
    assert json.loads((folder / "result.json").read_text())["test_acc"] == result["test_acc"]
    assert "teacher right on labeled examples" in capsys.readouterr().out
    assert not (folder / "checkpoint.pt").exists()  # nothing was trained


def test_the_probe_refuses_a_file_that_it_would_not_read(tmp_path):
    with pytest.raises(UserError, match="--pseudolabels-test"):
        probed(tmp_path, pseudolabels_test="labels.jsonl")


@pytest.mark.parametrize("other", ["supervised_only", "feature_input"])
def test_one_baseline_at_a_time(tmp_path, other):
    with pytest.raises(UserError, match="take one"):
        probed(tmp_path, **{other: True})


# ---------------------------------------------------------------------------- columns


@pytest.fixture
def reviews(tmp_path):
    rows = [(f"{word} {i}", word) for i in range(12) for word in ("tea", "sea")]
    with open(tmp_path / "my.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("My Review", "Stars"), *rows])
    return str(tmp_path / "my.csv")


def test_other_columns_are_shown_and_can_be_named(tmp_path, reviews):
    with pytest.raises(UserError, match="found columns My Review, Stars.*--text-column"):
        common.preset_of(reviews)
    with pytest.raises(UserError, match="found columns My Review, Stars; expected label,"):
        common.preset_of(reviews, columns=("my review", common.LABELS))
    preset = common.preset_of(reviews, columns=("My Review", "stars"))
    data = common.load_data(reviews, str(tmp_path), None, preset)
    assert data.classes == ["sea", "tea"] and len(data.train) + len(data.test) == 24


@pytest.mark.parametrize("script", [adamatch, kd_fixmatch, zeromatch])
def test_every_script_takes_the_names_of_columns(tmp_path, reviews, script):
    bert, data_dir = str(tiny_models.encoder(tmp_path / "bert")), str(tmp_path)
    args = {"dataset": reviews, "text_column": "My Review", "label_column": "Stars"}
    args |= {"backbone": bert, "weights": "none", "num_steps": 2, "batch_size": 2}
    args |= {"runs_dir": str(tmp_path / "r")}
    args |= {"device": "cpu", "layer_decay": 1.0, "warmup_steps": 0, "data_dir": data_dir}
    columns = ("My Review", "Stars")
    if script is zeromatch:
        data = common.load_data(reviews, data_dir, None, common.preset_of(reviews, columns=columns))
        header = pseudolabel.header_of(data, "train", "made up", "none")
        write_labels(tmp_path / "zs.jsonl", header, np.eye(2)[data.train.y])
        args |= {"pseudolabels": str(tmp_path / "zs.jsonl"), "num_steps_stage1": 1}
    result = script.main(script.Args(**args))
    assert set(result["by_class"]) > {"sea", "tea"}
    student = str(only_run(tmp_path / "r") / "student")
    asked = pseudolabel.Args(reviews, teacher="student", student=student, data_dir=data_dir)
    asked.csv, asked.text_column = str(tmp_path / "new" / "folder" / "a.csv"), "My Review"
    assert pseudolabel.main(asked)["labeled"] == 24
    asked.csv, asked.label_column, asked.output = None, "Stars", str(tmp_path / "out.jsonl")
    assert pseudolabel.main(asked)["known"] == 20  # a fifth of 24 is held out, 2 of each class


# ---------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("kind, given, side", [
    ("ViT", {"size": {"height": 64, "width": 64}}, 64),
    ("CLIP", {"size": {"shortest_edge": 80}, "crop_size": 64}, 64),
    (None, {}, 96),
])  # fmt: skip
def test_a_model_of_transformers_brings_its_own_preprocessing(tmp_path, kind, given, side):
    import transformers

    folder, look = tmp_path / "vit", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.ViTConfig(image_size=side, patch_size=16, **shape)
    transformers.ViTModel(config).save_pretrained(folder)
    if kind:
        getattr(transformers, f"{kind}ImageProcessor")(**given, **look).save_pretrained(folder)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    preset = common.preset_of(str(tmp_path), str(folder))
    assert preset.size == side
    own = common.IMAGENET if not kind else {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    assert preset.mean == own["mean"] and preset.std == own["std"]
    assert common.preset_of(str(tmp_path), str(folder), 128).size == 128
    student = common.build_student(str(folder), preset, 2)
    assert student.config["mean"] == own["mean"] and student.config["size"] == side


# ---------------------------------------------------------------------------- predictions


def test_answers_in_python_are_those_of_the_csv(tmp_path):
    preset, folder = common.OWN["pictures"]._replace(size=16, pad=2), tmp_path / "new"
    save_untrained(tmp_path / "s", "cnn", preset, ["cat", "dog"])
    folder.mkdir()
    for i in range(5):
        noise = np.random.RandomState(i).randint(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    args = pseudolabel.Args(str(folder), teacher="student", student=str(tmp_path / "s"))
    args.data_dir, args.csv = str(tmp_path), str(tmp_path / "out.csv")
    answers = pseudolabel.main(args)["answers"]
    _, *rows = read_csv(args.csv)
    assert len(rows) == 5
    for file, label, *numbers in rows:
        assert answers[file] == [label, *map(float, numbers)]


@pytest.mark.parametrize("gray", [False, True])
def test_read_images_gives_a_student_what_the_csv_answers_were_made_of(tmp_path, gray):
    """Also for tall and gray pictures, of a student with and one without a cropped border."""
    preset = common.OWN["pictures"]._replace(size=16, pad=0 if gray else 2)
    if gray:
        preset = preset._replace(mean=(0.3,), std=(0.4,))
    save_untrained(tmp_path / "s", "cnn", preset, ["cat", "dog"])
    (tmp_path / "new").mkdir()
    files = []
    for i, size in enumerate(((20, 24, 3), (40, 17, 3), (16, 16))):
        noise = np.random.RandomState(i).randint(0, 256, size).astype(np.uint8)
        files.append(str(tmp_path / "new" / f"{i}.png"))
        Image.fromarray(noise).save(files[-1])
    args = pseudolabel.Args(str(tmp_path / "new"), teacher="student", student=str(tmp_path / "s"))
    args.data_dir, args.csv = str(tmp_path), str(tmp_path / "out.csv")
    answers = pseudolabel.main(args)["answers"]
    student, config = common.load_student(tmp_path / "s")
    probs = student(pseudolabel.read_images(files, config))[0].softmax(dim=1)
    for file, row in zip(files, probs.tolist(), strict=True):
        assert answers[file][2:] == pytest.approx(row, abs=1e-4)
    (tmp_path / "new" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 pictures cannot be read"):
        pseudolabel.read_images([*files, str(tmp_path / "new" / "3.png")], config)


def test_a_student_looks_for_texts_in_the_column_it_was_trained_on(tmp_path):
    folder = tiny_models.encoder(tmp_path / "bert")
    preset = common.OWN["texts"]._replace(size=16, columns=("Ticket", common.LABELS))
    save_untrained(tmp_path / "s", str(folder), preset, ["cat", "dog"])
    (tmp_path / "new.csv").write_text("ID,Ticket\n7,a good film\n8,bad\n")
    args = pseudolabel.Args(str(tmp_path / "new.csv"), teacher="student", student=f"{tmp_path}/s")
    args.data_dir, args.csv = str(tmp_path), str(tmp_path / "out.csv")
    assert set(pseudolabel.main(args)["answers"]) == {"a good film", "bad"}
    header, *rows = read_csv(args.csv)
    assert header[:3] == ["ID", "Ticket", "label"] and [row[0] for row in rows] == ["7", "8"]


def test_a_student_of_pictures_says_that_a_table_of_texts_has_none(tmp_path):
    save_untrained(tmp_path / "s", "cnn", common.OWN["pictures"], ["cat", "dog"])
    (tmp_path / "new.csv").write_text("Text\n" + "a long text " * 99 + "\n")
    args = pseudolabel.Args(str(tmp_path / "new.csv"), teacher="student", student=f"{tmp_path}/s")
    args.csv = str(tmp_path / "out.csv")
    with pytest.raises(UserError, match="found columns Text; expected image,file"):
        pseudolabel.main(args)


# ---------------------------------------------------------------------------- own pictures


def picture_set(folder, per_class=3, suffix="png"):
    """Two classes of noise; the files' names."""
    names = []
    for k, name in enumerate(("cat", "dog")):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(per_class):
            noise = np.random.RandomState(9 * k + i).randint(0, 256, (64, 64, 3)).astype(np.uint8)
            names.append(folder / "train" / name / f"{i}.{suffix}")
            Image.fromarray(noise).save(names[-1])
    return names


def test_a_jpeg_that_was_cut_off_is_used_and_named(tmp_path, capsys):
    names = picture_set(tmp_path / "pets", suffix="jpg")
    whole = common.read_picture(names[1])
    names[1].write_bytes(names[1].read_bytes()[:-900])
    names[4].write_bytes(names[4].read_bytes()[:40])  # nothing can be read of it
    data = common.load_data(str(tmp_path / "pets"), str(tmp_path))
    said = capsys.readouterr().out
    assert len(data.train) == 5 and str(names[1]) in data.train.files
    assert f"picture {names[1]} is damaged (image file is truncated" in said
    assert f"left out unreadable picture {names[4]} (" in said and said.count("left out") == 1
    preset = common.preset_of(str(tmp_path / "pets"), "a teacher")
    found = data.train.x[list(data.train.files).index(str(names[1]))]
    side = round(preset.size / 0.875)
    expected = np.asarray(whole.resize((side, side))).transpose(2, 0, 1)
    top = np.abs(found[:, :100].astype(int) - expected[:, :100])
    assert top.mean() < 12 and np.ptp(found[:, -3:]) < 8  # noise above, one gray below
    # as a teacher reads it, too
    assert np.asarray(pseudolabel.picture_of(data.train, 1)).shape == (64, 64, 3)


def test_one_line_says_what_is_odd_in_a_folder(tmp_path, monkeypatch, capsys):
    names = picture_set(tmp_path / "pets")
    shutil.copy(names[0], tmp_path / "pets" / "train" / "dog" / "copy.png")  # in two classes
    (tmp_path / "pets" / "val" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / ".cache").mkdir()
    (tmp_path / "pets" / "train" / "unlabeled").mkdir()
    shutil.copy(names[1], tmp_path / "pets" / "train" / "unlabeled" / "x.png")
    data = common.load_data(str(tmp_path / "pets"), str(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in said] == [
        "not used: val; expected train/, unlabeled/, test/",
        "1 labeled examples have a copy with another label",
    ]
    assert data.classes == ["cat", "dog"] and (data.train.y == -1).sum() == 1
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    common.load_data("digits", str(tmp_path))
    said = capsys.readouterr().out
    assert said == "--dataset digits is the published set; for your folder, write ./digits\n"


def test_texts_with_two_labels_are_told_too(tmp_path, capsys):
    rows = "text,label\na,1\nb,2\na,2\na,1\nb,\nc,2\n"
    (tmp_path / "t.csv").write_text(rows)
    common.load_data(str(tmp_path / "t.csv"), str(tmp_path))
    assert "1 labeled examples have a copy with another label" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("text,label\na,1\nb,2\na,1\nb,\n")
    common.load_data(str(tmp_path / "t.csv"), str(tmp_path))
    assert "copy with another" not in capsys.readouterr().out


# ---------------------------------------------------------------------------- frozen encoders


@pytest.mark.parametrize("script", [zeromatch, adamatch, kd_fixmatch])
def test_a_frozen_encoder_stays_as_it_is_while_the_heads_learn(tmp_path, monkeypatch, script):
    """Weights and batch statistics; in eval mode, and without gradient, at every step."""
    steps = []

    def spy(run, *given, **values):
        steps.append(values["loss"].requires_grad)

    monkeypatch.setattr(common.Run, "log", spy)
    args = {"num_steps": 12, "freeze": True, "runs_dir": str(tmp_path), "data_dir": "data"}
    torch.manual_seed(0)
    modes, real = [], common.Student.forward
    monkeypatch.setattr(
        common.Student, "forward",
        lambda self, *x: modes.append((self.training, self.encoder.training)) or real(self, *x),
    )  # fmt: skip
    more = {"device": "cpu"} | ({"outer_only": True} if script is kd_fixmatch else {})
    script.main(script.Args(**args | more))
    student, _ = common.load_student(only_run(tmp_path) / "student")
    common.seed_step(0, "weights", 0)
    fresh = common.build_student("cnn", common.PRESETS["digits"], 10)
    trained = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, value in [*fresh.named_parameters(), *fresh.named_buffers()]:
        assert torch.equal(trained[name], value) == name.startswith("encoder."), name
    first = modes.index((True, False))  # before that, build_student tries the network
    assert (True, True) not in modes[first:] and len(steps) >= 12 and all(steps)


def test_below_a_frozen_encoder_there_is_no_gradient():
    student = new_student()
    common.optimizer_of(student, "sgd", 0.1, 0.0, 0.0)
    x = digits_views().plain(torch.arange(4))
    student.train()(x)[0].sum().backward()
    assert all(p.grad is None for p in student.encoder.parameters())
    assert student.head.weight.grad is not None and not student(x)[2].requires_grad
    common.optimizer_of(student, "sgd", 0.1, 0.0, 1.0)  # and back
    student.train()(x)[0].sum().backward()
    assert all(p.grad is not None for p in student.encoder.parameters())


# ---------------------------------------------------------------------------- ONNX


def test_an_exported_student_answers_as_before(tmp_path):
    """The README's export, in ONNX, run by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_untrained(tmp_path / "s", "cnn", common.PRESETS["digits"], list("0123456789"))
    student, _ = common.load_student(tmp_path / "s")
    x = digits_views("test").plain(torch.arange(20))
    torch.onnx.export(student, (x,), tmp_path / "student.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "student.onnx")
    logits, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected, _, _ = student(x)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    assert len(np.unique(logits, axis=0)) == 20


# ---------------------------------------------------------------------------- another folder


def test_a_run_is_continued_from_another_folder_with_its_own_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    args = adamatch.Args(num_steps=12, eval_every=5, runs_dir="runs", data_dir="data", device="cpu")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(common.Run, "log", dying_at(1, 7))
        adamatch.main(args)
    folder = only_run(tmp_path / "first" / "runs")
    script = [sys.executable, adamatch.__file__, "--resume", f"first/runs/{folder.name}"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "result.json").exists() and not (tmp_path / "runs").exists()
    assert json.loads((folder / "args.json").read_text())["runs_dir"] == "runs"
