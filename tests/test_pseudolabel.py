"""Label files, answers, imported labels, and local teachers on tiny models."""

import csv
import errno
import json
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from runs import write_labels

import common
import pseudolabel
from pseudolabel import Args, parse_answer, read_labels, read_rows

CLASSES_21 = "abcdefghijklmnopqrstu"
CLASSES = ["very negative", "negative", "positive", "railway", "railway station"]


def text_data(texts=("so good", "bad, very bad, the worst", "trains"), classes=CLASSES, y=None):
    y = np.full(len(texts), -1) if y is None else np.array(y)
    return common.Data("reviews", list(classes), common.Split(np.array(texts, object), y), None)


def image_data(n=6, channels=3, size=8, y=None, classes=("cat", "dog", "cow_boy")):
    x = np.random.RandomState(0).randint(0, 256, (n, channels, size, size)).astype(np.uint8)
    part = common.Split(x, np.array(y if y is not None else [i % 3 for i in range(n)]))
    return common.Data("pictures", list(classes), part, None)


def made_up(path, data, split="train", rows=None, header=()):
    """A label file with class i % K for example i."""
    n, k = len(data.part(split)), len(data.classes)
    head = pseudolabel.header_of(data, split, "made up", "none") | dict(header)
    rows = [{"index": i, "label": i % k} for i in range(n)] if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return path


def import_args(tmp_path, labels):
    np.save(tmp_path / "in.npy", labels)
    output = str(tmp_path / "l.jsonl")
    return Args(teacher="import", input=str(tmp_path / "in.npy"), output=output)


# ---------------------------------------------------------------------------- the label file


def test_labels_written_are_labels_read(tmp_path):
    data, probs = image_data(), np.random.RandomState(1).dirichlet([1, 1, 1], 6)
    path = tmp_path / "a" / "b.jsonl"
    write_labels(path, pseudolabel.header_of(data, "train", "t", "m"), probs)
    labels, read = read_labels(path, data, "train")
    assert np.array_equal(labels, probs.argmax(axis=1)) and np.abs(read - probs).max() < 1e-5


def test_order_abstentions_missing_probs_and_billed_tokens_are_understood(tmp_path):
    rows = [{"index": 2, "label": None}, {"usage": [7, 1]}]
    rows += [{"index": 0, "label": 1, "probs": [0.1, 0.8, 0.1]}]
    rows += [{"index": 1, "label": 0, "raw": "\u2028 {\n", "usage": [1, 0]}]
    data = image_data(3)
    labels, probs = read_labels(made_up(tmp_path / "l.jsonl", data, rows=rows), data, "train")
    assert labels.tolist() == [1, 0, -1] and probs is None


def test_a_file_cut_anywhere_is_continued_to_the_same_labels(tmp_path):
    """At every byte of a small file: whole lines stay, the rest is labeled again."""
    data, path, args = image_data(4), tmp_path / "l.jsonl", import_args(tmp_path, [2, 0, -1, 1])
    pseudolabel.label(data, args)
    whole = path.read_bytes()
    header_end = whole.index(b"\n") + 1
    for length in [0, *range(header_end, len(whole) + 1)]:
        path.write_bytes(whole[:length])
        pseudolabel.label(data, args)
        assert path.read_bytes() == whole
    path.write_bytes(whole[: header_end - 5])  # it may be anything of the user's
    with pytest.raises(common.UserError, match="expected a first line"):
        pseudolabel.label(data, args)
    assert path.read_bytes() == whole[: header_end - 5]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "others"}, "dataset 'others', expected 'pictures'"),
        ({"split": "test"}, "split 'test'"),
        ({"num_examples": 5}, "num_examples 5, expected 6"),
        ({"classes": ["dog", "cat", "cow_boy"]}, "classes .*dog.*expected .*cat"),
        ({"fingerprint": {"order": "1", "content": "2"}}, "fingerprint .*expected .*content"),
        ({"fingerprint": None}, "fingerprint None"),
        ({"format": "x"}, "expected a first line"),
    ],
)
def test_a_file_of_other_data_is_refused_with_the_reason(tmp_path, change, message):
    data = image_data()
    with pytest.raises(common.UserError, match=message):
        read_labels(made_up(tmp_path / "l.jsonl", data, header=change), data, "train")


def test_the_same_examples_in_another_order_are_refused(tmp_path):
    data, turned = image_data(), image_data()
    turned.train.x = turned.train.x[::-1]
    with pytest.raises(common.UserError, match="made for fingerprint"):
        read_labels(made_up(tmp_path / "l.jsonl", turned), data, "train")


@pytest.mark.parametrize(
    "row, message",
    [
        *[(row, "line 5 is damaged or not unique: .*") for row in (
            {"index": 9, "label": 0}, {"index": 0, "label": 0}, {"index": -1, "label": 0},
            {"index": 2.0, "label": 0}, {"index": True, "label": 0}, {"label": 0}, {"index": 3},
            {"index": 3, "label": 3}, {"index": 3, "label": "cat"}, {"index": 3, "label": -1},
            {"index": 3, "label": 0, "probs": [1]}, {"index": 3, "label": 0, "probs": ["a", 0, 0]},
            {"index": 3, "label": 0, "probs": [0, 0, 2]}, {"index": 3, "label": 0, "usage": [1]},
            {"usage": [1, -1]}, {"usage": [1.5, 1]}, {"raw": "?"},
        )],  # fmt: skip
        ([3, 0], "not a JSON object"),
        ({"index": 3, "label": 0}, "2 of 6 examples have no label yet"),
    ],
)
def test_a_damaged_or_incomplete_file_is_one_clear_line(tmp_path, row, message):
    data = image_data()
    rows = [{"index": i, "label": 0} for i in range(3)] + [row]
    with pytest.raises(common.UserError, match=message) as caught:
        read_labels(made_up(tmp_path / "l.jsonl", data, rows=rows), data, "train")
    assert "\n" not in str(caught.value)


def test_a_file_made_in_another_way_is_not_continued(tmp_path):
    data, path = text_data(), tmp_path / "l.jsonl"
    folder = str(tiny_models.seq2seq_model(tmp_path / "t5"))
    args = dict(teacher="text", model=folder, output=str(path), device="cpu", dry_run=1)
    pseudolabel.label(data, Args(**args))
    (tmp_path / "prompt").write_text("{text}? {options}")
    changes = {"prompt": str(tmp_path / "prompt"), "settings": 2, "model": "other"}
    for key, value in changes.items():
        before = path.read_bytes()
        with pytest.raises(common.UserError, match=f"made for {key}"):
            flag = "max_chars" if key == "settings" else key
            pseudolabel.label(data, Args(**{**args, flag: value}))
        assert path.read_bytes() == before


def test_a_file_without_rows_starts_anew(tmp_path):
    data, args = text_data(), dict(teacher="text", output=str(tmp_path / "l.jsonl"))
    with pytest.raises(common.UserError, match="nowhere: .*could not load it"):
        pseudolabel.label(data, Args(**args, model=str(tmp_path / "nowhere")))
    folder = str(tiny_models.seq2seq_model(tmp_path / "t5"))
    pseudolabel.label(data, Args(**args, model=folder))
    assert read_labels(tmp_path / "l.jsonl", data, "train")[1].shape == (3, 5)


def test_two_processes_do_not_write_to_one_file(tmp_path):
    data = image_data()
    header = pseudolabel.header_of(data, "train", "t", "m")
    file, _ = pseudolabel.open_labels(tmp_path / "l.jsonl", header)
    with pytest.raises(common.UserError, match="another process"):
        pseudolabel.open_labels(tmp_path / "l.jsonl", header)
    file.close()
    pseudolabel.open_labels(tmp_path / "l.jsonl", header)[0].close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, code):
    def no_locks(*given):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    data = image_data()
    pseudolabel.label(data, import_args(tmp_path, [0, 1, 2, 0, 1, 2]))
    assert read_labels(tmp_path / "l.jsonl", data, "train")[0].tolist() == [0, 1, 2] * 2


def test_a_full_disk_is_one_line_and_keeps_whole_lines(tmp_path):
    data, args = image_data(100), import_args(tmp_path, np.arange(100) % 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(common.UserError, match="could not write all.*make room"):
            pseudolabel.label(data, args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < len(read_rows(tmp_path / "l.jsonl")[1]) < 100
    pseudolabel.label(data, args)
    labels, _ = read_labels(tmp_path / "l.jsonl", data, "train")
    assert np.array_equal(labels, np.arange(100) % 3)


# ---------------------------------------------------------------------------- answers

FLOWERS = "rose,pink primrose,marigold,english marigold,lenten rose,tree mallow,mallow".split(",")


@pytest.mark.parametrize(
    "answer, classes, label",
    [
        *[(name, FLOWERS, name) for name in FLOWERS],
        ("It is a Pink Primrose.", FLOWERS, "pink primrose"), ("**The rose**", FLOWERS, "rose"),
        ("pink primrose, not a rose", FLOWERS, None), ("a rose or a mallow", FLOWERS, None),
        ("primrose", FLOWERS, None), ("", FLOWERS, None), ("no idea", FLOWERS, None),
        ("'English marigold'.\n", FLOWERS, "english marigold"), ("rose rose", FLOWERS, "rose"),
        ("It's a 1: TREE_MALLOW!\n", FLOWERS, "tree mallow"),
        ("It looks like a porcupine", ["cup", "porcupine"], "porcupine"),
        ("woman", ["man", "woman"], "woman"), ("very bad", ["very bad", "bad"], "very bad"),
        ("railway_station", ["railway", "railway_station"], "railway_station"),
        ("A railway station!", ["railway", "railway_station"], "railway_station"),
        ("Sci/Tech", ["World", "Sci/Tech"], "Sci/Tech"), ("C++", ["C", "C++", "C#"], "C++"),
        ("t-shirt / top", ["T-shirt/top", "Dress"], "T-shirt/top"), ("#", ["#", "C"], "#"),
        ("an A", ["A", "B"], "A"), ("B", ["A", "B"], "B"), ("it is C or C++", ["C", "C++"], None),
        ("na\u00efve \u00dcbermut", ["\u00fcbermut", "mut"], "\u00fcbermut"),
        ('{"label": "sports"}', ["world", "sports"], "sports"),
        ('{"label": "sports', ["world", "sports"], "sports"),
        ('{"label": "\\q sports"}', ["world", "sports"], "sports"),
        ('{"label": null}', ["world", "null"], "null"), ("{" * 10_000 + " a", ["a", "b"], "a"),
        ('```json\n{"reason": "world", "label": "sports"}\n```', ["world", "sports"], "sports"),
        ('{"label": "caf\\u00e9"}', ["caf\u00e9", "bar"], "caf\u00e9"),
        ("<think>world? no</think>\nsports", ["world", "sports"], "sports"),
        ("7", list("0123456789"), "7"), ("pink rose mallow", ["pink rose", "rose mallow"], None),
    ],
)  # fmt: skip
def test_answers_are_exact_labels_else_the_longest_whole_words_else_nothing(answer, classes, label):
    assert parse_answer(answer, classes) == (None if label is None else classes.index(label))


def label_of_reply(answer, classes, logprobs=True):
    """Label of a whole reply; with logprobs, the options were lettered."""
    body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
    args = Args(logprobs=logprobs)
    return pseudolabel.judge(0, (200, {}, body), classes, args, "")[1].get("label")


@pytest.mark.parametrize(
    "answer, label",
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B) sports", 1), ("Answer: B", 1),
        ("The answer is B.", 1), ("2", None), ("B: because of A", None), ("A or B", None),
        ("Z", None),
        ("A cat", None), ("sports", 1), ("C) sports", 1), ("bb", None), ("AB", None), ("", None),
    ],
)  # fmt: skip
def test_lettered_options_are_understood_by_their_mark(answer, label):
    assert label_of_reply(answer, ["world", "sports", "business"]) == label
    if answer not in ("B) sports", "C) sports", "sports"):
        assert label_of_reply(answer, ["world", "sports", "business"], logprobs=False) is None


@pytest.mark.parametrize("seed", range(200))
def test_no_answer_breaks_the_parser(seed):
    rng = random.Random(seed)

    def text(low, high):
        ends = rng.choices([127, 0xD7FF], k=rng.randint(low, high))
        return "".join(chr(rng.randint(0, end)) for end in ends)

    classes = sorted({text(1, 6) for _ in range(rng.randint(1, 5))})
    answer = rng.choice([text(0, 30), text(0, 5) + rng.choice(classes) + text(0, 5)])
    label = parse_answer(answer, classes)
    assert label is None or 0 <= label < len(classes)


SCRIPTS = ["\u4f53\u80b2", "\u8d22\u7ecf"]  # sports, finance
TWO = ["sports", "world"]


@pytest.mark.parametrize(
    "answer, classes, label",
    [
        # denials and refusals
        ("Not toxic", ["toxic", "mild"], None), ("This is not spam.", ["ham", "spam"], None),
        ("non-toxic", ["toxic", "mild"], None), ("It isn\u2019t spam", ["ham", "spam"], None),
        ("Not toxic", ["toxic", "non-toxic"], "non-toxic"), ("No label fits hate", ["hate"], None),
        ("This is not toxic.", ["non_toxic", "toxic"], "non_toxic"),
        ("neither positive nor negative", ["negative", "neutral", "positive"], None),
        ("I'm sorry, but I can't help with sexual content.", ["sexual", "clean"], None),
        ("I am unable to label politics.", ["other", "politics"], None),
        ("\u8fd9\u4e0d\u662f\u4f53\u80b2", SCRIPTS, None),  # this is not sports
        ("I cannot decide between\n- sports\n- world", TWO, None),
        ("Spam: false", ["ham", "spam"], None), ("anti-vaccine", ["vaccine", "x"], None),
        ("This violates my guidelines on violence.", ["violence", "x"], None),
        ("\u4f53\u80b2\u3067\u306f\u306a\u3044", SCRIPTS, None),  # Japanese: it is not
        ("World. It is not about sports.", TWO, "world"), ("World sports", TWO, None),
        # short words
        ("I have no idea.", ["no", "yes"], None), ("No", ["no", "yes"], "no"), 
        ("on", ["on", "off"], "on"),
        ("The answer is yes.", ["no", "yes"], "yes"), ("It depends on it", ["on", "off"], None),
        ("Yes\n\nIt is about money.", ["no", "yes"], "yes"), ("I go with it", ["i", "o"], None),
        # numbers
        ("-1", ["0", "1"], None), ("3.5", list("12345"), None), ("4/5", list("12345"), None),
        ("Rating: 4.0", list("012345"), "4"), ("The answer is -1.", ["+1", "-1"], "-1"),
        ("I think it is a 7, clearly", list("0123456789"), "7"),
        # forms of a clear answer
        ("The answer is **sports**.", TWO, "sports"), ("**Answer:** sports", TWO, "sports"),
        ("Sports\n\nText: more\n\nAnswer: world", TWO, "sports"),
        ("First, it is about world affairs.\nAnswer: sports", TWO, "sports"),
        ('{"category": "sports"}', TWO, "sports"), ('```json\n{"label": 1}\n```', ["0", "1"], "1"),
        ('{"label": true}', ["False", "True"], "True"), ("sports<|im_end|>", TWO, "sports"),
        ("The language is C++.", ["C", "C#", "C++"], "C++"),
        ("The label is <5 days.", ["<5 days", ">5 days"], "<5 days"),
        # scripts
        ("\u8fd9\u662f\u4f53\u80b2\u65b0\u95fb\u3002", SCRIPTS, SCRIPTS[0]),
        ("\u8fd9\u662fsports\u65b0\u95fb\u3002", TWO, "sports"),
        ("Answer: \U0001f44d", ["\U0001f44d", "x"], "\U0001f44d"),
        ("\u0438\u0433\u0440\u0430\u0442\u044c", ["\u0438\u0433\u0440\u0430"], None),  # longer
        ("cafe\u0301", ["bar", "caf\u00e9"], "caf\u00e9"), ("Stra\u00dfe", ["strasse"], "strasse"),
        # reasoning
        ("<think>\nmaybe sports because", TWO, None), ("<think>sports</think>", TWO, None),
        ("<thinking>sports? no</thinking>world", TWO, "world"),
        ("[THINK]world[/THINK]sports", TWO, "sports"),
        ("<|channel|>analysis<|message|>world<|end|><|start|>assistant<|channel|>final<|message|>"
         "sports", TWO, "sports"),
        ("<|channel|>analysis<|message|>it could be world", TWO, None),
    ],
)  # fmt: skip
def test_answers_are_read_with_care(answer, classes, label):
    assert parse_answer(answer, classes) == (None if label is None else classes.index(label))


@pytest.mark.parametrize("answer", ["Not B", "It is not B.", "I cannot say: B"])
def test_a_letter_that_is_denied_is_no_answer(answer):
    assert label_of_reply(answer, ["world", "sports"]) is None


# ---------------------------------------------------------------------------- import


def imported(data, path, tmp_path):
    out = tmp_path / f"{path.name}.jsonl"
    pseudolabel.label(data, Args(teacher="import", input=str(path), output=str(out)))
    return read_labels(out, data, "train")


def numpy_1(path):
    """The same file as NumPy 1 writes it: functions come from numpy.core."""
    old = path.with_name("old-" + path.name)
    with zipfile.ZipFile(path) as made, zipfile.ZipFile(old, "w") as out:
        for name in made.namelist():
            content = made.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"numpy._core", b"numpy.core")
            out.writestr(name, content)
    assert old.read_bytes() != path.read_bytes()
    return old


def test_the_layout_of_the_authors_cifar_clip(tmp_path):
    data, probs = image_data(), np.random.RandomState(3).dirichlet([1, 1, 1], 6).astype(np.float32)
    content = {
        "probs": probs, "pred_labels": probs.argmax(axis=1), "gt_labels": data.train.y,
        "metrics": {"accuracy": np.float64(0.5), "f1": 0.25},
    }  # fmt: skip
    torch.save(content, tmp_path / "plabel_results.pt")
    for path in (tmp_path / "plabel_results.pt", numpy_1(tmp_path / "plabel_results.pt")):
        labels, read = imported(data, path, tmp_path)
        assert np.array_equal(labels, probs.argmax(axis=1)) and np.abs(read - probs).max() < 1e-4


@pytest.mark.parametrize("same_order", [True, False])
def test_the_layout_of_the_authors_framed_clip(tmp_path, same_order):
    """Labels are names; columns of probs in another order of classes are left out."""
    data, probs = image_data(), np.eye(3)[[0, 1, 2, 2, 1, 0]] * 0.8 + 0.1
    names = np.array(["cat", "dog", "cow boy"])
    content = {
        "decoded_predictions": None,
        "decoded_predictions_processed": names[probs.argmax(axis=1)].tolist(),
        "decoded_labels": names[data.train.y].astype(object), "embedding": np.zeros((6, 2)),
        "probs": probs if same_order else probs[:, ::-1].copy(),
    }  # fmt: skip
    torch.save(content, tmp_path / "p.pt")
    labels, read = imported(data, tmp_path / "p.pt", tmp_path)
    assert labels.tolist() == [0, 1, 2, 2, 1, 0] and (read is not None) == same_order


def test_the_layout_of_the_authors_language_models(tmp_path):
    """Raw answers are matched again: the published parser made "rose" of the first."""
    data = text_data(["a", "b", "c"], FLOWERS, y=[1, 0, 2])
    content = {
        "decoded_predictions": ["Pink primrose.", "rose", "I do not know"],
        "f1": np.float64(0.1), "accuracy": 0.3,
        "decoded_predictions_processed": ["rose", "rose", "rose"],
        "decoded_labels": ["pink primrose", "rose", "marigold"],
    }  # fmt: skip
    torch.save(content, tmp_path / "p.pt")
    labels, probs = imported(data, tmp_path / "p.pt", tmp_path)
    assert labels.tolist() == [1, 0, -1] and probs is None
    assert read_rows(tmp_path / "p.pt.jsonl")[1][0]["raw"] == "Pink primrose."
    content["decoded_labels"] = ["rose", "pink primrose", "marigold"]
    torch.save(content, tmp_path / "q.pt")
    with pytest.raises(common.UserError, match="its true labels are not those of the data"):
        imported(data, tmp_path / "q.pt", tmp_path)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("kind", ["system", "exec", "load", "getattr"])
def test_a_hostile_file_executes_nothing(tmp_path, number, kind):
    data, mark = image_data(), tmp_path / "executed"
    hostile = {
        "system": Hostile(os.system, f"touch {mark}"),
        "exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "load": Hostile(pickle.loads, pickle.dumps(Hostile(os.system, f"touch {mark}"))),
        "getattr": Hostile(getattr, "text", "upper"),
    }[kind]
    array = np.array([hostile], dtype=object)  # a pickle inside NumPy's own
    places = {"probs": array}, {"pred_labels": hostile}, hostile, [hostile], {"m": {hostile: 1}}
    content = places[number]
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(content))
    (tmp_path / "fake.npy").write_bytes(pickle.dumps(content))
    np.save(tmp_path / "object.npy", np.array([hostile], dtype=object), allow_pickle=True)
    for name in ("new.pt", "legacy.pt", "bare.pt", "fake.npy", "object.npy"):
        with pytest.raises(common.UserError, match="could not be read") as caught:
            imported(data, tmp_path / name, tmp_path)
        assert not mark.exists() and "\n" not in str(caught.value)
    if kind == "system":  # the test would notice
        pickle.loads((tmp_path / "bare.pt").read_bytes())
        assert mark.exists()


def test_npy_labels_and_probabilities(tmp_path):
    data = image_data(3)
    np.save(tmp_path / "labels.npy", [2, -1, 0])
    np.save(tmp_path / "probs.npy", [[0.2, 0.5, 0.3], [1, 0, 0], [0.1, 0.1, 0.8]])
    assert imported(data, tmp_path / "labels.npy", tmp_path)[0].tolist() == [2, -1, 0]
    labels, probs = imported(data, tmp_path / "probs.npy", tmp_path)
    assert labels.tolist() == [1, 0, 2] and probs[0] == pytest.approx([0.2, 0.5, 0.3])


@pytest.mark.parametrize(
    "lines, labels",
    [
        (["label", "dog", '""', "Cow boy", "0"], [1, -1, 2, 0]),
        (["index,label", "3,cat", "0,dog", "1,", "2,2"], [1, -1, 2, 0]),
        (["\ufefflabel,text", 'dog,"a, b"', ",", "2,", "cat,"], [1, -1, 2, 0]),
    ],
)
def test_csv_with_names_numbers_or_nothing(tmp_path, lines, labels):
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert imported(image_data(4), tmp_path / "l.csv", tmp_path)[0].tolist() == labels


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.csv", "label\ndog\n", "1 labels for 4 examples"),
        ("l.csv", "label\ncat\ndog\nhen\ncat\n", "could not be read .label hen, expected names"),
        ("l.csv", "label\n0\n1\n2\n3\n", "label 3, expected -1 to 2"),
        ("l.csv", "name\ncat\n", "could not be read .found columns name; expected label"),
        ("l.csv", "", "0 labels for 4"),
        ("l.csv", "index,label\n0,cat\n1,cat\n2,cat\n4,cat\n", "no row with index 3"),
        ("l.csv", "index,label\n0,cat\n0,cat\n1,cat\n2,cat\n", "could not be read"),
        ("l.txt", "cat", "could not be read"),
        ("l.pt", "cat", "could not be read"),
    ],
)
def test_an_unfit_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(common.UserError, match=message) as caught:
        imported(image_data(4), tmp_path / name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_csv_is_matched_by_text_or_file_before_index_and_order(tmp_path, capsys):
    """Rows that are left out or in another order would shift the labels."""
    texts, path = text_data(["tea one", "sea two", "tea three"], ["sea", "tea"]), tmp_path / "l.csv"
    path.write_text("text,label\ntea three,tea\n,sea\nsea two,sea\ntea one,tea\nother,sea\n")
    assert imported(texts, path, tmp_path)[0].tolist() == [1, 0, 1]
    assert "rows are matched by text" in capsys.readouterr().out
    path.write_text("text,index,label\nx,2,tea\nx,1,sea\nx,0,tea\n")  # the texts are not unique
    assert imported(texts, path, tmp_path / "a")[0].tolist() == [1, 0, 1]
    assert "rows are matched by index" in capsys.readouterr().out
    path.write_text("label\ntea\nsea\ntea\n")
    assert imported(texts, path, tmp_path / "b")[0].tolist() == [1, 0, 1]
    assert "rows are matched by their order" in capsys.readouterr().out
    path.write_text("text,label\ntea one,tea\nsea two,sea\ntea four,tea\n")
    with pytest.raises(common.UserError, match="no row with text tea three"):
        imported(texts, path, tmp_path / "c")
    pictures = image_data(3)
    pictures.train.files = np.array(["p/a.png", "p/b.png", "p/c.png"])
    path.write_text("file,label\nc.png,cow_boy\nx/a.png,cat\nb.png,dog\n")
    assert imported(pictures, path, tmp_path / "d")[0].tolist() == [0, 1, 2]
    assert "rows are matched by file" in capsys.readouterr().out


# ---------------------------------------------------------------------------- local teachers


def labeled(data, tmp_path, **changes):
    """Probabilities [N, K] of a teacher, read back from its file."""
    out = tmp_path / f"{random.random()}.jsonl"
    pseudolabel.label(data, Args(**{"output": str(out), "device": "cpu", **changes}))
    labels, probs = read_labels(out, data, "train")
    assert np.array_equal(labels, probs.argmax(axis=1))
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-3)
    return probs


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Where the machine would take bfloat16, comparisons would need wide margins."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.parametrize("kind, channels", [("clip", 3), ("clip", 1), ("siglip", 3)])
def test_clip_agrees_with_the_model_asked_image_by_image(tmp_path, kind, channels):
    from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

    folder, data = tiny_models.clip_model(tmp_path / kind, kind), image_data(channels=channels)
    probs = labeled(data, tmp_path, teacher="clip", model=str(folder), batch_size=4)
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    phrases = [f"This is a photo of {name}." for name in ("cat", "dog", "cow boy")]
    for x, row in zip(data.train.x, probs, strict=True):
        image = np.moveaxis(np.repeat(x, 3 // channels, axis=0), 0, 2)
        style = {"padding": "max_length" if kind == "siglip" else True, "max_length": 64}
        inputs = processor(text=phrases, images=[image], return_tensors="pt", **style)
        with torch.no_grad():
            expected = model(**inputs).logits_per_image.softmax(dim=1)[0]
        assert row == pytest.approx(expected.numpy(), abs=1e-3)
    assert np.ptp(probs, axis=0).max() > 0.01  # images differ


def test_clip_sees_the_pictures_in_their_files(tmp_path):
    """Whatever the stored squares look like, and in the given order."""
    folder, files = str(tiny_models.clip_model(tmp_path / "clip")), []
    for i, size in enumerate([(50, 40), (64, 32), (33, 90)]):
        noise = np.random.RandomState(i).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(noise).save(files[-1])

    def probs_of(x, files):
        y, args = np.full(len(x), -1), dict(teacher="clip", model=folder, batch_size=2)
        part = common.Split(np.array(x), y, None if files is None else np.array(files))
        return labeled(common.Data("p", ["cat", "dog"], part, None), tmp_path, **args)

    squares = np.random.RandomState(9).randint(0, 256, (3, 3, 32, 32)).astype(np.uint8)
    probs = probs_of(squares, files)
    alone = [np.asarray(Image.open(file)).transpose(2, 0, 1)[None] for file in files]
    expected = np.concatenate([probs_of(x, None) for x in alone])
    assert probs == pytest.approx(expected, abs=1e-3)
    assert np.abs(probs - probs_of(squares, None)).max() > 0.01


def test_clip_averages_an_ensemble_of_templates_and_takes_descriptions(tmp_path):
    folder, data = str(tiny_models.clip_model(tmp_path / "clip")), image_data()

    def with_prompt(text):
        path = tmp_path / "prompt"
        path.write_text(text)
        return labeled(data, tmp_path, teacher="clip", model=folder, prompt=str(path))

    one, two = with_prompt("a {label}"), with_prompt("the drawing of some {label}!")
    assert np.abs(with_prompt("a {label}\n\n a {label}".replace(" a", "a")) - one).max() < 1e-4
    both = with_prompt("a {label}\nthe drawing of some {label}!")
    assert np.abs(both - one).max() > 1e-3 and np.abs(both - two).max() > 1e-3
    assert np.abs(with_prompt("a cat\na dog\na cow boy") - one).max() < 1e-4
    with pytest.raises(common.UserError, match="or 3, one per class"):
        with_prompt("a cat\na dog")


def test_the_command_line_labels_digits_by_a_clip_folder(tmp_path, monkeypatch, capsys):
    """main() from beginning to end, the second run finding nothing to do."""
    folder = str(tiny_models.clip_model(tmp_path / "clip"))
    args = Args("digits", split="test", teacher="clip", model=folder, data_dir=str(tmp_path))
    result = pseudolabel.main(args)
    assert result["path"] == str(tmp_path / "labels" / "digits-test-clip.jsonl")
    assert result["labeled"] == result["known"] == 500
    header = read_rows(Path(result["path"]))[0]
    assert header["model"] == folder and header["prompt"] == "This is a photo of {label}."
    assert f"accuracy {result['accuracy']:.2f} % (95 % interval" in capsys.readouterr().out
    before = Path(result["path"]).read_bytes()
    monkeypatch.setattr(pseudolabel, "load_pretrained", None)
    assert pseudolabel.main(args) == result and Path(result["path"]).read_bytes() == before


def one_by_one(folder, prompts, answers, special, end):
    """P(answer | prompt) of each pair alone: no batch, no padding, no cache; scaled to sum 1."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer, rows, seq2seq = AutoTokenizer.from_pretrained(folder), [], "t5" in str(folder)
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    for prompt in prompts:
        scores = []
        for answer in answers:
            parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (answer, end)]
            ids = sum(parts, [])
            assert ids[-1] != tokenizer.unk_token_id
            first = tokenizer(prompt, add_special_tokens=special).input_ids
            with torch.no_grad():
                if seq2seq:
                    start = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
                    logits = model(torch.tensor([first]), decoder_input_ids=start).logits[0]
                else:
                    logits = model(torch.tensor([first + ids])).logits[0, len(first) - 1 : -1]
            log_probs = logits.log_softmax(dim=1)
            scores.append(sum(log_probs[at, token].item() for at, token in enumerate(ids)))
        rows.append(np.exp(scores) / np.exp(scores).sum())
    return np.array(rows)


TEXTS = ["so good", "bad, very bad, the worst of all " * 3, "trains", "", "na\u00efve \U0001f600"]
OPTIONS = "very negative, negative, positive, railway, railway station"


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "mistral", "chat"])
def test_language_models_agree_with_pairs_asked_one_by_one(tmp_path, kind):
    """Labels share first tokens, and one begins another; texts have many lengths."""
    chat, folder = kind == "chat", tmp_path / kind
    if kind == "t5":
        tiny_models.seq2seq_model(folder)
    else:
        tiny_models.causal_model(folder, "llama" if chat else kind, chat=chat)
    prompt, path, data = "Q: {text} ({options})\n", tmp_path / "prompt", text_data(TEXTS)
    path.write_text(prompt)
    args = dict(teacher="text", model=str(folder), batch_size=3, prompt=str(path))
    probs = labeled(data, tmp_path, **args)
    prompt = prompt.strip().replace("{options}", OPTIONS)
    prompts = [prompt.replace("{text}", text) for text in TEXTS]
    if chat:
        prompts = [f"<s>user: {prompt}<turn>\n<s>me: " for prompt in prompts]
    answers = [name if kind in ("t5", "chat") else f" {name}" for name in CLASSES]
    end = {"t5": "</s>", "chat": "<turn>"}.get(kind, "\n")
    expected = one_by_one(folder, prompts, answers, kind == "t5", end)
    assert probs == pytest.approx(expected, abs=2e-4) and np.ptp(probs, axis=0).max() > 1e-3


def test_a_text_longer_than_the_model_takes_is_cut_before_the_options(tmp_path, monkeypatch):
    folder, seen = tiny_models.causal_model(tmp_path / "gpt2", "gpt2"), []
    real = pseudolabel.answer_log_probs

    def spy(model, ids, mask, answers):
        seen.extend(ids)
        return real(model, ids, mask, answers)

    monkeypatch.setattr(pseudolabel, "answer_log_probs", spy)
    args = dict(teacher="text", model=str(folder), max_chars=100_000)
    labeled(text_data(["word " * 3000, "short"]), tmp_path, **args)
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder).decode(seen[0])
    assert 400 < len(seen[0]) <= 512 and OPTIONS in text and "word word" in text
    assert text.rstrip().endswith("Answer:")
    with pytest.raises(common.UserError, match="the options alone exceed"):
        names = [f"class number {i}" for i in range(100)]
        labeled(text_data(["a"], names), tmp_path, **args)


def test_embeddings_agree_with_texts_encoded_one_by_one(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder, data = tiny_models.encoder(tmp_path / "bert"), text_data(TEXTS)
    args = dict(teacher="embedding", model=str(folder), temperature=0.5, batch_size=2)
    probs = labeled(data, tmp_path, **args)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def embed(text):
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt").input_ids
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        return torch.nn.functional.normalize(mean, dim=0)

    classes = torch.stack([embed(f"This review is {name}.") for name in CLASSES])
    expected = torch.stack([(classes @ embed(text) / 0.5).softmax(dim=0) for text in TEXTS])
    assert probs == pytest.approx(expected.numpy(), abs=1e-3)


def config_of(backbone, preset, classes):
    facts = {name: getattr(preset, name) for name in ("size", "pad", "mean", "std")}
    return facts | {"backbone": backbone, "classes": classes, "num_extra": 0}


def test_a_student_labels_new_data(tmp_path):
    preset, folder = common.preset_of("digits"), tmp_path / "student"
    torch.manual_seed(0)
    student = common.build_student("cnn", preset, 10).eval()
    config = config_of("cnn", preset, [str(d) for d in range(10)])
    common.save_student(folder, student, config)
    args = dict(split="test", teacher="student", student=str(folder), data_dir=str(tmp_path))
    result = pseudolabel.main(Args(**args))
    data = common.load_data("digits", "")
    views = common.make_views(data.test, preset, "cnn", torch.device("cpu"))
    expected, _ = common.predict(student, views)
    labels, probs = read_labels(result["path"], data, "test")
    assert np.abs(probs - expected.numpy()).max() < 1e-4
    assert np.array_equal(labels, expected.argmax(dim=1).numpy())
    assert result["accuracy"] == pytest.approx(100 * (labels == data.test.y).mean())
    with torch.no_grad():
        student.head.bias += 1
    common.save_student(folder, student, config)
    with pytest.raises(common.UserError, match="made for model"):  # trained on since
        pseudolabel.main(Args(**args))
    common.save_student(folder, student, config | {"classes": list("abcdefghij")})
    with pytest.raises(common.UserError, match="other classes"):
        pseudolabel.main(Args(**args, output=str(tmp_path / "new.jsonl")))


def test_a_student_of_texts_labels_new_texts(tmp_path):
    """A run's folder alone is enough: tokenizer and configuration of the encoder are in it."""
    bert, texts = str(tiny_models.encoder(tmp_path / "bert")), [text or "none" for text in TEXTS]
    lines = [json.dumps({"text": text, "label": ""}) + "\n" for text in texts]
    (tmp_path / "new.jsonl").write_text("".join(lines))
    preset = common.preset_of(str(tmp_path / "new.jsonl"))._replace(size=32)
    folder = tmp_path / "student"
    torch.manual_seed(0)
    student, data = common.build_student(bert, preset, 5).eval(), text_data(texts)
    common.save_student(folder, student, config_of(bert, preset, CLASSES))
    views = common.make_views(data.train, preset, bert, torch.device("cpu"))
    expected = common.predict(student, views)[0].numpy()
    (tmp_path / "bert").rename(tmp_path / "moved")
    probs = labeled(data, tmp_path, teacher="student", student=str(folder))
    assert probs == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------- main


def test_the_interval_is_wilsons_and_unknown_labels_are_left_out(tmp_path, capsys):
    """8 of 10 right: center (p + z^2/2n) / (1 + z^2/n), by hand 49.02 to 94.33; 2 are unknown."""
    data = image_data(12, y=[0, 1, 2, 0, 1, 2, 0, 1, 0, 0, -1, -1])
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 1, -1, 1, 1]  # one wrong, one abstention
    result = pseudolabel.label(data, import_args(tmp_path, labels))
    assert result["known"] == 10 and result["accuracy"] == pytest.approx(80)
    assert result["abstentions"] == 1 and result["labeled"] == 12
    said = capsys.readouterr().out
    assert "80.00 % (95 % interval 49.02 to 94.33) of 10" in said and "dog 6, cat 3" in said
    data.train.y[:] = -1
    assert pseudolabel.label(data, import_args(tmp_path, labels))["accuracy"] is None
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(teacher="chat"), "needs --model"),
        (dict(teacher="student"), "needs --student"),
        (dict(teacher="import"), "needs --input"),
        (dict(teacher="import", input="nowhere.npy"), "No such file .*nowhere.npy"),
        (dict(teacher="student", student="nowhere"), "No such file .*nowhere"),
        (dict(teacher="text"), "--teacher text labels only texts"),
        (dict(teacher="glyphs"), "--teacher glyphs labels only digits"),
        (dict(teacher="clip", prompt="nowhere"), "No such file .*nowhere"),
        (dict(teacher="chat", model="m", max_cost=1.0), "--max-cost needs"),
        (dict(teacher="chat", model="m", concurrency=0), "--concurrency 0"),
        (dict(teacher="chat", model="m", logprobs=True), "--logprobs: more than 20 classes"),
        (dict(dry_run=0), "--dry-run 0"),
        (dict(teacher="chat", model="m", extra_body="[1]"), "expected a JSON object without model"),
        (dict(teacher="chat", model="m", extra_body="{"), "--extra-body: expected a JSON object"),
        (dict(teacher="chat", model="m", extra_body='{"stream": 1}'), "--extra-body: expected a J"),
        (dict(split="test"), "no test part"),
        (dict(teacher="chat", model="m", csv="my.csv"), "--csv goes with --teacher student"),
        (dict(teacher="chat", model="m", dataset="my.csv", output="./my.csv"), "my.csv is an in"),
        (dict(teacher="chat", model="m", test_file="t.csv", output="t.csv"), "t.csv is an input"),
        (dict(teacher="chat", model="m", batch_file="d", dataset="./d"), "d is an input"),
        (dict(teacher="chat", model="m", batch_file="r", input="r"), "r is an input"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(tmp_path, changes, message):
    args, data = {"output": str(tmp_path / "o"), **changes}, image_data(classes=CLASSES_21)
    with pytest.raises((common.UserError, OSError), match=message):
        pseudolabel.label(data, Args(**args))


def test_output_that_cannot_be_printed_ends_no_job(tmp_path):
    """A console in cp1252, as on Windows; classes in Chinese."""
    rows = [json.dumps({"text": f"t {i}", "label": SCRIPTS[i % 2]}) + "\n" for i in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(rows))
    np.save(tmp_path / "in.npy", [0, 1, 0, 1])
    command = [sys.executable, pseudolabel.__file__, "--dataset", "my.jsonl", "--teacher", "import"]
    command += ["--input", "in.npy"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\u4f53\\u80b2" in done.stdout


def csv_of(path, rows, header=("text", "label")):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_two_files_of_one_name_have_two_label_files(tmp_path):
    """And training finds that of its own data; a published set and a folder keep the plain name."""
    made, data_dir = {}, str(tmp_path / "data")
    for folder in ("a", "b"):
        rows = [(f"text {i} of {folder}", ["sea", "tea"][i % 2]) for i in range(6)]
        path = csv_of(tmp_path / folder / "train.csv", rows)
        np.save(tmp_path / "in.npy", [0, 1] * 3)
        args = Args(path, teacher="import", input=str(tmp_path / "in.npy"), data_dir=data_dir)
        for _ in range(2):  # the second run goes on with the same file
            made.setdefault(folder, []).append(pseudolabel.main(args)["path"])
        data = common.load_data(path, data_dir)
        assert pseudolabel.default_labels(data, data_dir, path) == (made[folder][0], None)
    names = [Path(path).name for path in made["a"] + made["b"]]
    assert names[0] == names[1] != names[2] == names[3]
    assert all(re.fullmatch(r"train-train-import-[0-9a-f]{8}\.jsonl", name) for name in names)
    csv_of(tmp_path / "a" / "train.csv", [*rows, ("one more", "")])
    with pytest.raises(common.UserError, match="made for num_examples 6, expected 7"):
        pseudolabel.main(replace(args, dataset=str(tmp_path / "a" / "train.csv")))
    (tmp_path / "pictures").mkdir()
    args = replace(args, dataset=str(tmp_path / "pictures"), input=str(tmp_path / "in.npy"))
    made = pseudolabel.label(image_data(6), args)["path"]
    assert Path(made).name == "pictures-train-import.jsonl"


# ---------------------------------------------------------------------------- predictions


@pytest.fixture
def text_student(tmp_path):
    """(folder, probabilities of texts) of an untrained student of three classes."""
    bert = str(tiny_models.encoder(tmp_path / "bert"))
    preset = common.OWN["texts"]._replace(size=32)
    torch.manual_seed(0)
    student = common.build_student(bert, preset, 3).eval()
    common.save_student(tmp_path / "s", student, config_of(bert, preset, ["sea", "tea", "label"]))

    def probs_of(texts):
        split = common.Split(np.array(texts, object), np.full(len(texts), -1))
        views = common.make_views(split, preset, bert, torch.device("cpu"))
        return common.predict(student, views)[0].numpy()

    return str(tmp_path / "s"), probs_of


def answers_of(dataset, student, tmp_path):
    """(summary, header, rows) of the CSV with a student's answers."""
    out = str(tmp_path / "answers.csv")
    args = Args(str(dataset), teacher="student", student=student, csv=out, device="cpu")
    args.data_dir = str(tmp_path / "data")
    result = pseudolabel.main(args)
    with open(out, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return result, header, rows


def test_a_student_answers_every_row_in_order_beside_the_columns_of_the_user(
    tmp_path, text_student
):
    """Empty texts, copies, and labels of the user's own; nothing is held out or remembered."""
    student, probs_of = text_student
    texts = ["a tea", "", "the sea", "  ", "a tea", *(f"number {i}" for i in range(40))]
    rows = [(f"id{i}", text, "sea" if i % 2 else "", "x, y") for i, text in enumerate(texts)]
    path = csv_of(tmp_path / "my.csv", rows, ("id", "text", "label", "note"))
    result, header, found = answers_of(path, student, tmp_path)
    own, ours = ["id", "text", "label", "note"], ["predicted label", "confidence", "sea", "tea"]
    assert header == [*own, *ours, "predicted label"]  # a class is named label, too
    assert [tuple(row[:4]) for row in found] == rows and result["labeled"] == 43
    expected = probs_of([text.strip() or "none" for text in texts])
    for text, row, probs in zip(texts, found, expected, strict=True):
        if not text.strip():
            assert row[4:] == [""] * 5
            continue
        assert [float(p) for p in row[6:]] == pytest.approx(probs.tolist(), abs=1e-4)
        assert row[4] == ["sea", "tea", "label"][probs.argmax()]
        assert float(row[5]) == pytest.approx(probs.max(), abs=1e-4)
    assert not list(tmp_path.rglob("labels"))  # no label file
    csv_of(tmp_path / "my.csv", [*rows, ("new", "more tea", "", "")], own)  # it grew
    assert len(answers_of(path, student, tmp_path)[2]) == 46


@pytest.mark.parametrize(
    "content, answered",
    [
        ("text\na tea\nthe sea\n", [True, True]),
        ("text,label\na tea,sea\nthe sea,sea\n", [True, True]),
        ("text;n\na tea;1\n;2\n", [True, False]),
        ('text\n""\n', [False]),
        ("text\n", []),
    ],
)
def test_new_texts_may_hold_one_class_or_none_or_nothing(tmp_path, text_student, content, answered):
    (tmp_path / "new.csv").write_text(content)
    result, header, rows = answers_of(tmp_path / "new.csv", text_student[0], tmp_path)
    assert [row[-1] != "" for row in rows] == answered and result["labeled"] == sum(answered)


def test_data_that_a_student_cannot_read_are_one_clear_line(tmp_path, text_student):
    Image.new("RGB", (20, 20)).save(tmp_path / "s" / "a.png")
    for dataset, message in (
        (tmp_path / "nowhere.csv", "cannot read row 1: .*No such file"),
        (tmp_path / "s", "s: for other classes or data"),  # pictures for a student of texts
    ):
        with pytest.raises(common.UserError, match=message):
            answers_of(dataset, text_student[0], tmp_path)
        assert not (tmp_path / "answers.csv").exists()


def test_answers_do_not_replace_the_texts(tmp_path, text_student):
    path = csv_of(tmp_path / "answers.csv", [("a tea", "")])
    with pytest.raises(common.UserError, match="answers.csv is an input"):
        answers_of(path, text_student[0], tmp_path)
    assert Path(path).read_text().splitlines() == ["text,label", "a tea,"]


@pytest.mark.parametrize("table", [False, True])
def test_a_student_answers_all_pictures_of_a_folder_or_a_table(tmp_path, table):
    """Also those in train/ and test/; one that is damaged has an empty answer."""
    preset, folder = common.OWN["pictures"]._replace(size=16, pad=2), tmp_path / "my"
    torch.manual_seed(0)
    student = common.build_student("cnn", preset, 2).eval()
    common.save_student(tmp_path / "s", student, config_of("cnn", preset, ["cat", "dog"]))
    names = ["train/cat/1.png", "test/dog/2.png", "unlabeled/broken.png", "unlabeled/3.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.RandomState(i).randint(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "unlabeled/broken.png").write_bytes(b"no picture")
    rows = [(name, i) for i, name in enumerate(names)]
    dataset = csv_of(tmp_path / "my" / "list.csv", rows, ("file", "n")) if table else folder
    result, header, rows = answers_of(dataset, str(tmp_path / "s"), tmp_path)
    assert header[-4:] == ["label", "confidence", "cat", "dog"] and result["labeled"] == 3
    found = {row[0].split("my/")[-1]: row[-4:] for row in rows}
    assert sorted(found) == sorted(names) and found["unlabeled/broken.png"] == [""] * 4
    files = [str(folder / name) for name in names if "broken" not in name]
    part = common.Split(np.array(files, object), np.full(3, -1))
    part = common.decode(part, str(tmp_path / "x"), preset, "test")
    views = common.make_views(part, preset, "cnn", torch.device("cpu"))
    expected, _ = common.predict(student, views)
    for name, probs in zip([*names[:2], names[3]], expected, strict=True):
        assert [float(p) for p in found[name][2:]] == pytest.approx(probs.tolist(), abs=1e-4)


def test_the_one_complete_label_file_is_found(tmp_path):
    data = image_data()
    data.test = data.train
    folder = tmp_path / "labels"
    train = made_up(folder / "pictures-train-clip.jsonl", data)
    incomplete = [{"index": 0, "label": 1}]
    made_up(folder / "pictures-train-chat.jsonl", data, rows=incomplete)
    assert pseudolabel.default_labels(data, str(tmp_path)) == (str(train), None)
    made_up(folder / "pictures-test-chat.jsonl", data, "test")
    found = pseudolabel.default_labels(data, str(tmp_path))
    assert found == (str(train), None)  # not another teacher's
    test = made_up(folder / "pictures-test-clip.jsonl", data, "test")
    assert pseudolabel.default_labels(data, str(tmp_path)) == (str(train), str(test))
    made_up(folder / "pictures-train-text.jsonl", data)
    message = "pictures-train-clip.jsonl.*pictures-train-text.jsonl.*--pseudolabels"
    with pytest.raises(common.UserError, match=message):
        pseudolabel.default_labels(data, str(tmp_path))


def test_without_a_label_file_published_images_are_labeled_and_own_data_ask_for_it(
    tmp_path, monkeypatch
):
    folder = str(tiny_models.clip_model(tmp_path / "clip"))
    clip = (*pseudolabel.TEACHERS["clip"][:3], folder, "")
    monkeypatch.setitem(pseudolabel.TEACHERS, "clip", clip)
    advice = "run pseudolabel.py --dataset my/pics --teacher clip"
    with pytest.raises(common.UserError, match=advice):
        pseudolabel.default_labels(image_data(), str(tmp_path), "my/pics")
    own = image_data()
    own.name = "digits"  # of the folder, no published set
    with pytest.raises(common.UserError, match="--dataset my/digits --teacher clip"):
        pseudolabel.default_labels(own, str(tmp_path), "my/digits")
    published = image_data()
    published.name = "cifar10"
    train, test = pseudolabel.default_labels(published, str(tmp_path))
    assert Path(train).name == "cifar10-train-clip.jsonl" and test is None
    assert read_labels(train, published, "train")[1].shape == (6, 3)
    advice = "pseudolabel.py --dataset my/reviews.csv --teacher text --test-file test.csv"
    with pytest.raises(common.UserError, match=f"no labels of reviews .*{advice}"):
        pseudolabel.default_labels(text_data(), str(tmp_path), "my/reviews.csv", "test.csv")
