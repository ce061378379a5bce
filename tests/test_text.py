"""Texts: files, archives, tokens, views, encoder, whole runs with a tiny BERT made on the spot."""

import csv
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import write_labels
from safetensors.torch import load_file
from test_images import url_of, web  # noqa: F401  (a fixture)

import common
import pseudolabel
import zeromatch
from common import OWN, TEXT_SETS, Split, TextViews, UserError, join, load_data, token_augment

CPU = torch.device("cpu")
WORDS = {
    "tea": "leaf pot kettle cup brew steam sugar lemon".split(),
    "sea": "wave boat sail tide salt gull anchor storm".split(),
    "wood": "oak pine axe bark root moss owl path".split(),
    "town": "street tower market bell bridge lamp tram square".split(),
}
WORDS |= {f"code{k}": [f"{letter}{k}" for letter in "abcdefgh"] for k in range(8)}  # topics 5 to 12
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS |= {"intermediate_size": 32, "max_position_embeddings": 60}


def sentences(topic: str, n: int, seed: int = 0) -> list[str]:
    """Texts of five to nine words, two thirds of them of the topic."""
    rng, anywhere = random.Random(f"{topic}/{seed}"), WORDS["tea"] + WORDS["sea"]

    def word() -> str:
        return rng.choice(WORDS[topic] if rng.random() < 0.67 else anywhere)

    texts = [" ".join(word() for _ in range(rng.randint(5, 9))) for _ in range(n)]
    return [f"{text} no {seed} {k}" for k, text in enumerate(texts)]


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a two-layer BERT, random weights, with a tokenizer of its own."""
    return make_bert(tmp_path_factory.mktemp("tiny"), **LAYERS)


def make_bert(folder, with_weights=True, **sizes) -> str:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words, max_length = BertWordPieceTokenizer(), sizes.get("max_position_embeddings", 512)
    text = " ".join(sum(WORDS.values(), [])) + " no 0123456789 ."
    words.train_from_iterator([text] * 3, vocab_size=300)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)
    (BertModel(config) if with_weights else config).save_pretrained(folder)
    return str(folder)


def views_of(tiny, texts, aug=None):
    aug = None if aug is None else np.array(aug, object)
    split = Split(np.array(texts, object), np.zeros(len(texts), np.int64), aug=aug)
    return TextViews(split, OWN["texts"], tiny, CPU)


def build(backbone, weights="none"):
    return common.build_student(backbone, OWN["texts"], 3, weights=weights)


def test_csv_keeps_quotes_newlines_emoji_long_rows_and_no_empty_ones(tmp_path, capsys):
    texts = ["long " * 50_000, 'he said "no", twice', "two\nlines", "tea \N{HOT BEVERAGE} ünï"]
    rows = [(text, "ab"[k % 2]) for k, text in enumerate(texts)] + [("", "a"), ("  \n", "b")]
    data = load_data(write_csv(tmp_path / "my.csv", rows), "")
    assert data.train.is_text and data.train.x.tolist() == [text.strip() for text in texts]
    assert data.classes == ["a", "b"] and data.train.y.tolist() == [0, 1, 0, 1]
    assert data.name == "my" and data.test is None
    assert "left out 2 rows without text" in capsys.readouterr().out


def test_jsonl_reads_the_same_as_csv(tmp_path):
    rows = [("one", "2"), ("two", "10"), ("th?ree", ""), ("four", "2")]  # of half a surrogate
    lines = [{"text": "one", "label": 2}, {"text": "two", "label": "10"},
             {"text": "th\ud83dree"}, {"label": 2, "text": "four"}]  # fmt: skip
    (tmp_path / "my.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    a = load_data(write_csv(tmp_path / "my.csv", rows), "")
    b = load_data(str(tmp_path / "my.jsonl"), "")
    assert a.classes == b.classes == ["2", "10"]  # by value, not by letter
    assert a.train.y.tolist() == b.train.y.tolist() == [0, 1, -1, 0]
    assert a.train.x.tolist() == b.train.x.tolist() == ["one", "two", "th?ree", "four"]
    assert a.train.hashes() == b.train.hashes() and len(set(a.train.hashes())) == 4


@pytest.mark.parametrize("labels, classes, y", [
    (["0", "1", "-1", "1.0", "", "nan"], ["0", "1"], [0, 1, -1, 1, -1, -1]),
    (["10", "9", "2.5", "None", "NULL", "n/a"], ["2.5", "9", "10"], [2, 1, 0, -1, -1, -1]),
    (["-1", "tea", "", "<NA>", "tea", "N/A"], ["-1", "tea"], [0, 1, -1, -1, 1, -1]),
    (["cafe\u0301", "caf\u00e9 ", "b", "NaN", "b", "b"], ["b", "caf\u00e9"], [1, 1, 0, -1, 0, 0]),
])  # fmt: skip
def test_a_missing_label_is_no_class_in_any_spelling(tmp_path, labels, classes, y):
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    data = load_data(write_csv(tmp_path / "my.csv", rows), "")
    assert data.classes == classes and data.train.y.tolist() == y
    lines = [{"text": text, "label": label} for text, label in rows]
    if labels[0] == "0":  # as pandas and json write them
        values = [0, 1, -1, 1.0, None, float("nan")]
        lines = [line | {"label": value} for line, value in zip(lines, values, strict=True)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    again = load_data(str(tmp_path / "my.jsonl"), "")
    assert again.classes == classes and again.train.y.tolist() == y


@pytest.mark.parametrize("label", [["a"], {"a": 1}, True])
def test_what_is_no_label_is_refused_with_its_row(tmp_path, label):
    lines = [{"text": "one", "label": "a"}, {"text": "two", "label": label}]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="my.jsonl, row 2: .*is no label"):
        load_data(str(tmp_path / "my.jsonl"), "")


def test_classes_that_differ_only_in_case_are_refused_with_their_numbers(tmp_path):
    rows = [("one", "Tea"), ("two", "tea"), ("three", "tea"), ("four", "sea")]
    with pytest.raises(UserError, match=r"Tea \(1 times\), tea \(2 times\); use one spelling"):
        load_data(write_csv(tmp_path / "my.csv", rows), "")


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_as_spreadsheets_write_it(tmp_path, delimiter, encoding):
    lines = [("Category", "id", " Text"), ("tea", "7", 'caf\u00e9, "hot"; now')]
    lines += [("sea", "8", "wave")]
    with open(tmp_path / "my.csv", "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    data = load_data(str(tmp_path / "my.csv"), "")
    assert data.train.x.tolist() == ['caf\u00e9, "hot"; now', "wave"]
    assert [data.classes[k] for k in data.train.y] == ["tea", "sea"]


def test_a_back_translation_that_is_missing_is_the_text_itself(tmp_path):
    rows = [("one", "a", "eins", ""), ("two", "b", "", "deux")]
    header = ("text", "label", "aug_0", "aug_1")
    train = load_data(write_csv(tmp_path / "my.csv", rows, header), "").train
    assert train.aug.tolist() == [["eins", "one"], ["two", "deux"]]
    assert train.take(np.array([1])).aug.tolist() == [["two", "deux"]]
    one = write_csv(tmp_path / "one.csv", [row[:3] for row in rows], header[:3])
    assert load_data(one, "").train.aug.tolist() == [["eins"], ["two"]]
    none = write_csv(tmp_path / "none.csv", [(*row[:2], "") for row in rows], header[:3])
    assert load_data(none, "").train.aug is None


@pytest.mark.parametrize("name, content, reason", [
    ("my.csv", b"body,label\nx,a\n", "found columns body, label; expected text,ori"),
    ("my.csv", b"text,label\nx, y,a\n", "quote texts with commas"),
    ("my.csv", b'text,label\n"x"y,a\n', "row 1"),
    ("my.csv", b"text,label\nok,a\n\xff,a\n", ".*decode byte 0xff"),
    ("my.jsonl", b'{"text": "one", "label": 1}\n{"text": "tw\n', "row 2"),
    ("my.jsonl", b'["text", "label"]\n', "row 1"),
    ("none.csv", None, "No such file"),
])  # fmt: skip
def test_a_damaged_file_is_one_clear_line(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f".*{reason}") as caught:
        load_data(str(tmp_path / name), "")
    assert "\n" not in str(caught.value)


def test_a_fifth_is_held_out_where_every_class_has_ten_and_nowhere_else(tmp_path):
    rows = [(text, topic) for topic in ("tea", "sea") for text in sentences(topic, 10)]
    rows += [(text, "") for text in sentences("wood", 30)]
    path = write_csv(tmp_path / "my.csv", rows)
    data = load_data(path, "")
    assert np.bincount(data.test.y).tolist() == [2, 2] and len(data.train) == len(rows) - 4
    assert sorted([*data.train.x, *data.test.x]) == sorted(text for text, _ in rows)
    assert load_data(path, "").test.x.tolist() == data.test.x.tolist()
    assert load_data(write_csv(tmp_path / "few.csv", rows[1:]), "").test is None
    copies = [(text, "") for text, _ in rows]
    twice = load_data(write_csv(tmp_path / "twice.csv", rows + copies), "")
    assert len(twice.test) == 4 and len(twice.train) == 2 * len(rows) - 8
    assert not set(twice.test.x) & set(twice.train.x)


def test_copies_of_test_texts_are_left_out_of_training_with_a_number(tmp_path, capsys):
    rows = [("one", "a"), ("two", ""), ("three", "b"), ("two", "b"), ("five", "b")]
    train = write_csv(tmp_path / "my.csv", rows)
    test = [("four", "a"), ("two", "b"), (" three\n", "b"), ("Two", "b")]
    data = load_data(train, "", write_csv(tmp_path / "t.csv", test))
    assert data.train.x.tolist() == ["one", "five"] and data.train.y.tolist() == [0, 1]
    assert data.test.x.tolist() == ["four", "two", "three", "Two"]
    assert data.test.y.tolist() == [0, 1, 1, 1]
    assert "left out 3 copies" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [("three", ""), ("four", "nan")]])
def test_a_test_file_without_labels_is_named_and_a_fifth_is_held_out(tmp_path, rows, capsys):
    texts = [(text, topic) for topic in ("tea", "sea") for text in sentences(topic, 10)]
    train = write_csv(tmp_path / "my.csv", texts)
    data = load_data(train, "", write_csv(tmp_path / "t.csv", rows))
    assert "t.csv: no labeled examples" in capsys.readouterr().out
    assert len(data.test) == 4 and data.test.x.tolist() == load_data(train, "").test.x.tolist()


def test_a_test_file_with_a_new_class_is_refused(tmp_path):
    train = write_csv(tmp_path / "my.csv", [("one", "a"), ("two", "b")])
    with pytest.raises(UserError, match="t.csv.* has labels .'c'.*, expected only those of"):
        load_data(train, "", write_csv(tmp_path / "t.csv", [("three", "c")]))
    part = load_data(train, "", write_csv(tmp_path / "t.csv", [("three", "b"), ("four", "")]))
    assert part.test.x.tolist() == ["three"]  # only what is labeled can be tested on
    with pytest.raises(UserError, match="its own test part"):
        load_data("digits", "data", str(tmp_path / "t.csv"))


@pytest.fixture
def archive(tmp_path, monkeypatch, web):  # noqa: F811
    """Serves an archive in the publisher's layout (headerless quoted CSV: class from 1, title,
    body) as ag_news of 6 + 3 rows a class; returns the data folder."""

    def make(train, test):
        file = web / "ag_news_csv.tgz"
        with tarfile.open(file, "w:gz") as tar:
            for member, rows in (("train", train), ("test", test)):
                text = io.StringIO()
                csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
                content = text.getvalue().encode()
                info = tarfile.TarInfo(f"ag_news_csv/{member}.csv")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(common, "TEXT_URL", url_of(""))
        monkeypatch.setitem(TEXT_SETS, "ag_news", (file.stem, sha256, "a, b, c, d", 6, 3, "\\"))
        return tmp_path / "data"

    return make


def rows_of(member, n):
    return [(k + 1, f"{member} {k} {i}", f"body {i}") for i in range(n) for k in range(4)]


def test_an_archive_becomes_a_fixed_balanced_draw_without_test_texts(archive, web):  # noqa: F811
    folder = archive(rows_of("train", 8) + rows_of("test", 4), rows_of("test", 4))
    data = load_data("ag_news", str(folder))
    assert np.bincount(data.train.y).tolist() == [6] * 4
    assert np.bincount(data.test.y).tolist() == [3] * 4 and data.classes == ["a", "b", "c", "d"]
    for split in (data.train, data.test):
        for text, label in zip(split.x, split.y, strict=True):
            assert text.split()[1] == str(label) and text.split()[2] == text.split()[4]
    assert len(set(data.train.x)) == 24 and not set(data.train.x) & set(data.test.x)
    (web / "ag_news_csv.tgz").unlink()  # the second time without a download
    again = load_data("ag_news", str(folder))
    assert again.train.x.tolist() == data.train.x.tolist()
    assert again.test.x.tolist() == data.test.x.tolist()


def test_archive_texts_are_decoded_and_training_texts_keep_their_last_1024_characters(archive):
    def long(member):
        body = "dwindling\\band " + "x" * 2000 + "end "
        return [(k, f'A "{member}{k}{i}" title', body) for k in (1, 2, 3, 4) for i in range(6)]

    data = load_data("ag_news", str(archive(long("train"), long("test"))))
    assert re.fullmatch(r'A "test\d+" title dwindling\nband x{2000}end', data.test.x[0])
    assert set(data.train.x) == {"x" * 1021 + "end"}


@pytest.mark.parametrize("content", [b"not an archive", None])
def test_a_damaged_or_missing_archive_is_one_clear_line(archive, web, content):  # noqa: F811
    folder = archive([], [])
    (web / "ag_news_csv.tgz").unlink()
    if content:
        (folder / "ag_news").mkdir(parents=True)
        (folder / "ag_news" / "ag_news_csv.tgz").write_bytes(content)
    with pytest.raises(UserError, match="ag_news could not be downloaded or read") as caught:
        load_data("ag_news", str(folder))
    assert "\n" not in str(caught.value) and str(folder / "ag_news") in str(caught.value)


def test_usb_files_give_back_translations_and_lose_test_texts_of_the_pool(tmp_path):
    train = {str(i): {"ori": f"q {i}", "aug_0": f"de {i}", "aug_1": f"ru {i}", "label": str(i % 10)}
             for i in range(20)}  # fmt: skip
    test = {str(i): {"ori": f"q {i}", "label": i % 10} for i in range(18, 30)}
    (tmp_path / "yahoo_answers").mkdir()
    for part, rows in (("train", train), ("test", test)):
        (tmp_path / "yahoo_answers" / f"{part}.json").write_text(json.dumps(rows))
    data = load_data("yahoo_answers", str(tmp_path))
    assert data.train.aug.tolist() == [[f"de {i}", f"ru {i}"] for i in range(20)]
    assert data.train.y.tolist() == [i % 10 for i in range(20)] and len(data.classes) == 10
    assert data.test.x.tolist() == [f"q {i}" for i in range(20, 30)]
    assert data.test.y.tolist() == list(range(10))
    (tmp_path / "yahoo_answers" / "test.json").write_text('{"0": {"ori": "x", "label": "a"}}')
    with pytest.raises(UserError, match="yahoo_answers could not be .*'a'"):
        load_data("yahoo_answers", str(tmp_path))


def test_tokens_equal_the_tokenizers_row_by_row(tiny):
    from transformers import AutoTokenizer

    texts = [*sentences("tea", 30), "leaf", "leaf " * 3000]
    views, tokenizer = views_of(tiny, texts), AutoTokenizer.from_pretrained(tiny)
    for k, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=60)["input_ids"]
        assert views.plain(torch.tensor([k])).tolist() == [expected]
        assert views.weak(torch.tensor([k])).tolist() == [expected]
    batch = views.plain(torch.tensor([30, 0]))  # as wide as its longest row
    assert batch[0, 3:].tolist() == [-1] * (batch.shape[1] - 3) and (batch[1] >= 0).all()
    assert [len(row) for row in views.rows][30:] == [3, 60]


def test_join_fills_up_rows_and_leaves_images_alone():
    a, b = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, -1]])
    assert join([a, b]).tolist() == [[1, 2, -1], [3, 4, 5], [6, 7, -1]]
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(join([x, x + 1]), torch.cat([x, x + 1]))


SPECIAL, MASK = torch.tensor([0, 1, 2, 3, 4]), 4


def test_token_augment_by_hand():
    ids = torch.tensor([[2, 10, 11, 12, 13, 14, 3, -1]])
    u = torch.full((1, 8, 2), 0.9)
    assert token_augment(ids, u, SPECIAL, MASK).tolist() == ids.tolist()
    u[0, 1, 0] = 0.05  # 10 deleted
    u[0, 2, 0] = 0.15  # 11 masked
    u[0, 3, 1] = 0.05  # 12 after 13
    u[0, 5, 1] = 0.05  # 14 stays: its neighbor is special
    u[0, [0, 6, 7]] = 0.0  # special and padding: nothing happens
    assert token_augment(ids, u, SPECIAL, MASK).tolist() == [[2, 4, 13, 12, 14, 3, -1, -1]]
    assert token_augment(ids, u, SPECIAL, None).tolist() == [[2, 11, 13, 12, 14, 3, -1, -1]]


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_no_text_is_emptied_and_special_tokens_stay(scale):
    torch.manual_seed(0)
    lengths = torch.randint(10, (400,)).tolist()
    ids = torch.full((len(lengths), 16), -1)
    for row, n in zip(ids, lengths, strict=True):
        row[: n + 2] = torch.tensor([2, *range(10, 10 + n), 3])
    out = token_augment(ids, torch.rand(*ids.shape, 2) * scale, SPECIAL, MASK)
    for row, n in zip(out.tolist(), lengths, strict=True):
        tokens = [token for token in row if token >= 0]
        assert row == tokens + [-1] * (16 - len(tokens))
        assert tokens[0] == 2 and tokens[-1] == 3 and not {2, 3} & set(tokens[1:-1])
        words = [token for token in tokens if token >= 10]
        assert len(set(words)) == len(words) <= n and (words or n == 0)
        assert all(abs((token - 10) - k) <= n - len(words) + 2 for k, token in enumerate(words))


def test_token_augment_keeps_its_rates():
    torch.manual_seed(0)
    ids, u = torch.arange(10, 210).repeat(500, 1), torch.rand(500, 200, 2)
    out = token_augment(ids, u, SPECIAL, MASK)
    assert (out == -1).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (out == MASK).float().mean().item() == pytest.approx(0.1, abs=0.005)
    out = token_augment(ids, u.clamp(min=torch.tensor([0.5, 0])), SPECIAL, MASK)
    descents = (out[:, 1:] < out[:, :-1]).float().mean().item()
    assert descents == pytest.approx(0.1 * 0.9, abs=0.005)  # one behind every run of swapped tokens


def test_the_strong_view_is_a_back_translation_of_the_same_text_where_there_are_any(tiny):
    n, aug = 300, [["boat", "owl"], ["sail", "axe"], ["tide", "lamp"]]
    views = views_of(tiny, ["leaf", "oak", "cup"] * 100, aug * 100)
    torch.manual_seed(0)
    strong = views.strong(torch.arange(n))
    first, second = (views.plain(torch.arange(n) + n * k) for k in (1, 2))
    assert strong.shape == first.shape == second.shape
    is_first, is_second = ((strong == of).all(dim=1) for of in (first, second))
    assert (is_first ^ is_second).all() and 0.4 < is_first.float().mean() < 0.6


def test_the_strong_view_without_back_translations_edits_most_texts_whatever_their_batch(tiny):
    views, idx = views_of(tiny, [*sentences("tea", 40), "leaf " * 50]), torch.arange(40)

    def strong(idx):
        torch.manual_seed(1)
        return views.strong(idx)

    assert torch.equal(strong(idx), strong(idx))
    assert (strong(idx) != views.plain(idx)).any(dim=1).float().mean() > 0.8
    longer = strong(torch.cat([idx, torch.tensor([40])]))[:40]
    assert torch.equal(join([strong(idx), longer])[:40], longer)


def test_features_are_the_mean_over_the_rows_own_tokens(tiny):
    encoder = build(tiny, weights=tiny).encoder.eval()
    ids = torch.tensor([[2, 8, 9, 3, -1, -1], [2, 8, 9, 10, 11, 3]])
    with torch.no_grad():
        own = encoder.model(input_ids=torch.tensor([[2, 8, 9, 3]])).last_hidden_state[0]
        torch.testing.assert_close(encoder(ids)[0], own.mean(dim=0), atol=1e-5, rtol=0)
        assert not torch.allclose(encoder.train()(ids), encoder(ids))  # dropout


def test_weights_are_the_folders_unless_none_is_asked_for(tiny, tmp_path):
    from transformers import AutoModel

    name, found = "encoder.layer.0.attention.self.query.weight", {}
    for weights in (None, "none", tiny, str(Path(tiny) / "model.safetensors")):
        torch.manual_seed(5)
        found[weights] = build(tiny, weights=weights).encoder.model.state_dict()[name]
    published = AutoModel.from_pretrained(tiny).state_dict()[name]
    assert [torch.equal(w, published) for w in found.values()] == [True, False, True, True]
    other = make_bert(tmp_path, **LAYERS | {"hidden_size": 24})
    for weights, reason in ((other, "size mismatch"), (f"{other}/none", "could not load it")):
        with pytest.raises(UserError, match=f"--weights {weights}.* {reason}") as caught:
            build(tiny, weights=weights)
        assert "\n" not in str(caught.value)


def test_heads_are_two_layers_and_rates_fall_from_layer_to_layer(tiny):
    student = build(tiny)
    student.add_kd_head()
    for head in (student.head, student.kd_head):
        assert [tuple(p.shape) for p in head.parameters()] == [(16, 16), (16,), (3, 16), (3,)]
    assert not torch.equal(student.head[0].weight, student.kd_head[0].weight)
    groups = common.optimizer_of(student, "adamw", 1.0, 0.1, 0.5).param_groups
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(scale) == sum(1 for _ in student.parameters())
    model = student.encoder.model
    assert scale[id(model.embeddings.word_embeddings.weight)] == (0.125, 0.1)
    assert scale[id(model.embeddings.LayerNorm.weight)] == (0.125, 0.0)
    assert scale[id(model.encoder.layer[0].attention.self.query.weight)] == (0.25, 0.1)
    assert scale[id(model.encoder.layer[1].output.dense.bias)] == (0.5, 0.0)
    assert scale[id(student.head[0].weight)] == scale[id(student.kd_head[2].weight)] == (1.0, 0.1)


@pytest.mark.parametrize("family", ["DistilBert", "Roberta", "ModernBert", "Electra", "DebertaV2"])
def test_other_encoders_work_and_their_layers_are_found(tmp_path, family):
    import transformers

    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
    config = getattr(transformers, f"{family}Config")(vocab_size=60, **LAYERS, **ids)
    config.save_pretrained(tmp_path)
    student = build(str(tmp_path)).eval()
    encoder = student.encoder
    groups = common.optimizer_of(student, "adamw", 1.0, 0.0, 0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(encoder.model.get_input_embeddings().weight)] == 0.125
    assert set(scale.values()) == {0.125, 0.25, 0.5, 1.0}
    features = encoder(torch.tensor([[5, 6, 7], [8, -1, -1]]))
    assert features.shape == (2, encoder.num_features) and features.isfinite().all()
    torch.testing.assert_close(features[1:], encoder(torch.tensor([[8]])), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["missing", "empty", "decoder", "cnn", "vit_small_patch2_32"])
def test_a_backbone_that_is_no_text_encoder_is_one_clear_line(tmp_path, monkeypatch, kind):
    from transformers import T5Config

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders = {"missing": tmp_path / "none", "empty": tmp_path, "decoder": tmp_path}
    if kind == "decoder":
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    backbone = str(folders.get(kind, kind))
    with pytest.raises(UserError) as caught:
        build(backbone)
    said = str(caught.value)
    assert said.startswith(f"--backbone {backbone} cannot be used") and "\n" not in said
    assert said.endswith("transformers encoder for texts")


# ---------------------------------------------------------------------------- whole runs


def make_run(tmp_path, tiny, topics=("tea", "sea"), test=True, **more):
    """(arguments of a short run on own texts, data set); the teacher's labels are 80 % right."""
    texts = [(topic, k, text) for topic in topics for k, text in enumerate(sentences(topic, 30))]
    rows = [(text, topic if k < 8 else "") for topic, k, text in texts]
    path = write_csv(tmp_path / "my.csv", rows)
    test_rows = [(text, topic) for topic in topics for text in sentences(topic, 10, seed=1)]
    test_file = write_csv(tmp_path / "test.csv", test_rows) if test else None
    data = load_data(path, "", test_file)
    truth = np.array([data.classes.index(topic) for topic in topics for _ in range(30)])
    teacher = np.where(np.random.RandomState(0).rand(len(truth)) < 0.8, truth, 0)
    header = pseudolabel.header_of(data, "train", "t", "m")
    write_labels(tmp_path / "zs.jsonl", header, np.eye(len(topics))[teacher])
    args = zeromatch.Args(
        dataset=path, test_file=test_file, num_labels=0, pseudolabels=str(tmp_path / "zs.jsonl"),
        data_dir=str(tmp_path / "data"), runs_dir=str(tmp_path / "runs"), device="cpu", amp="off",
        backbone=tiny, batch_size=4, uratio=1, num_steps=6, num_steps_stage1=3, eval_every=3,
        log_every=2,
    )  # fmt: skip
    return replace(args, **more), data


def weights_of(runs_dir):
    (path,) = Path(runs_dir).glob("*/student/model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("num_classes", [2, 12])
def test_a_run_learns_own_texts_of_2_and_12_classes(tmp_path, tiny, num_classes):
    topics = list(WORDS)[:num_classes]
    args, data = make_run(
        tmp_path, tiny, topics, num_steps=30, num_steps_stage1=40, lr=1e-2, layer_decay=1.0,
        eval_every=40, warmup_steps=3, batch_size=12, weights="none",
    )  # fmt: skip
    result = zeromatch.main(args)
    assert len(data.classes) == num_classes and len(data.test) == 10 * num_classes
    assert result["test_acc"] > (75 if num_classes == 2 else 3 * 100 / 12)


def test_a_saved_student_predicts_the_same_without_the_backbones_folder(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    args, data = make_run(tmp_path, str(folder), num_steps=2, num_steps_stage1=1)
    result = zeromatch.main(args)
    shutil.rmtree(folder)
    (student_folder,) = (tmp_path / "runs").glob("*/student")
    student, config = common.load_student(student_folder)
    views = common.make_views(data.test, OWN["texts"], config["backbone"], CPU)
    right = common.predict(student, views)[0].argmax(dim=1) == views.y
    assert 100 * right.float().mean().item() == pytest.approx(result["test_acc"])
    assert config["classes"] == ["sea", "tea"]


def test_evaluation_by_length_gives_rows_in_their_own_order(tiny):
    student = build(tiny, weights=tiny).eval()
    texts = [text for k in range(70) for text in sentences("town", 1, seed=k)]
    views = views_of(tiny, ["leaf " * 40, "owl", *texts])
    probs, _ = common.predict(student, views)
    assert probs.shape == (72, 3) and len(probs[:, 0].unique()) > 60
    for k in (0, 1, 33, 71):
        with torch.no_grad():
            one = student(views.plain(torch.tensor([k])))[0].softmax(dim=1)
        torch.testing.assert_close(probs[k : k + 1], one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, tiny, monkeypatch, stop_at):
    """Stopped in stage 1 or 2 one step after a checkpoint, then resumed."""
    args, _ = make_run(tmp_path, tiny, eval_every=2)
    zeromatch.main(replace(args, runs_dir=str(tmp_path / "straight")))
    cut, lr_at, steps = replace(args, runs_dir=str(tmp_path / "cut")), zeromatch.lr_at, count()

    def stop(*step):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return lr_at(*step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zeromatch, "lr_at", stop)
        zeromatch.main(cut)
    (run,) = (tmp_path / "cut").iterdir()
    zeromatch.main(replace(cut, resume=str(run)))
    straight, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "cut")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_changing_the_truth_of_unlabeled_texts_changes_no_weight(tmp_path, tiny, monkeypatch):
    """The same labeled rows drawn from a file that knows all labels: only monitoring may differ."""
    args, data = make_run(tmp_path, tiny, num_steps=3, num_steps_stage1=1)
    labeled = np.flatnonzero(data.train.y >= 0)
    for name, truth in (("a", -1), ("b", 1), ("labeled ones too", 0)):
        data.train.y[:] = load_data(args.dataset, "", args.test_file).train.y
        data.train.y[data.train.y < 0] = truth
        if name == "labeled ones too":
            data.train.y[:] = 0
        monkeypatch.setattr(zeromatch, "load_data", lambda *a: data)
        monkeypatch.setattr(zeromatch, "draw_labeled", lambda *a: labeled)
        zeromatch.main(replace(args, runs_dir=str(tmp_path / name)))
    a, b, other = (weights_of(tmp_path / name) for name in ("a", "b", "labeled ones too"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], other[name]) for name in a)  # so the comparison can fail


def text_student(folder, texts):
    """Build a student for texts and try it on them."""
    return build_tried(folder, views_of(folder, texts))


def build_tried(folder, views):
    return common.build_student(folder, OWN["texts"], 3, weights=None, parts=(views,))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="bare.* has no usable tokenizer|could not load it"):
        views_of(str(tmp_path / "bare"), sentences("tea", 60))


def test_tokens_past_the_embedding_are_refused_before_training(tmp_path, tiny):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["teabag"])
    tokenizer.save_pretrained(folder)
    text_student(str(folder), sentences("tea", 5))  # as long as no text has it
    with pytest.raises(UserError, match="grown cannot be used .*more tokens than its embedding"):
        text_student(str(folder), [*sentences("tea", 5), "a teabag in a cup"])


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2"])
def test_rows_are_cut_to_the_positions_of_a_model_whose_tokenizer_knows_no_limit(tmp_path, kind):
    import transformers as t

    folder = make_bert(tmp_path / "m", **LAYERS)
    if kind == "Roberta":  # its positions begin behind the padding token
        config = t.RobertaConfig(**LAYERS, vocab_size=300, pad_token_id=1)
        t.RobertaModel(config).save_pretrained(folder)
    if kind == "GPT2":  # which calls them otherwise
        shape = {"n_positions": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
        t.GPT2Model(t.GPT2Config(**shape, vocab_size=300)).save_pretrained(folder)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": 10**30})
    )
    views = views_of(folder, [*sentences("tea", 4), "leaf pot " * 90])
    build_tried(folder, views)
    assert views.max_length == 58 and len(views.rows[-1]) <= 58
