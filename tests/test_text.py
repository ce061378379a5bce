"""Texts: files and archives, tokens, views, encoder, and whole runs with a tiny BERT made on the spot."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch

import common
import pseudolabel
import zeromatch
from common import (
    PRESETS,
    TEXT_SETS,
    TextEncoder,
    TextSplit,
    TextViews,
    UserError,
    join,
    load_data,
    token_augment,
)

CPU = torch.device("cpu")
WORDS = {
    "tea": "leaf pot kettle cup brew steam sugar lemon".split(),
    "sea": "wave boat sail tide salt gull anchor storm".split(),
    "wood": "oak pine axe bark root moss owl path".split(),
    "town": "street tower market bell bridge lamp tram square".split(),
}
WORDS |= {f"code{k}": [f"{letter}{k}" for letter in "abcdefgh"] for k in range(8)}  # topics 5 to 12


def sentences(topic: str, n: int, seed: int = 0) -> list[str]:
    """Texts of five to nine words, two thirds of them of the topic."""
    rng = random.Random(f"{topic}/{seed}")
    anywhere = WORDS["tea"] + WORDS["sea"]
    return [
        " ".join(rng.choice(WORDS[topic] if rng.random() < 0.67 else anywhere) for _ in range(rng.randint(5, 9)))
        + f" no {seed} {k}"
        for k in range(n)
    ]


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a two-layer BERT, random weights, with a tokenizer of its own."""
    return make_bert(tmp_path_factory.mktemp("tiny"), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=32, max_position_embeddings=60)  # fmt: skip


def make_bert(folder, with_weights=True, **sizes) -> str:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = BertWordPieceTokenizer()
    words.train_from_iterator([" ".join(sum(WORDS.values(), [])) + " no 0123456789 ."] * 3, vocab_size=300)
    max_length = sizes.get("max_position_embeddings", 512)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    if with_weights:
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return str(folder)


def split_of(texts, aug=None, y=None):
    return TextSplit(texts, aug, np.zeros(len(texts), np.int64) if y is None else np.array(y, np.int64))


def views_of(tiny, texts, aug=None, cache=None):
    return TextViews(split_of(texts, aug), PRESETS["text"], tiny, CPU, cache)


# ---------------------------------------------------------------------------- files of one's own


def test_csv_keeps_quotes_newlines_emoji_and_long_rows(tmp_path):
    texts = ['he said "no", twice', "two\nlines", "tea \N{HOT BEVERAGE} ünïcode", "long " * 2000]
    data = load_data(write_csv(tmp_path / "my.csv", [(t, "ab"[k % 2]) for k, t in enumerate(texts)]), "")
    assert data.train.texts == [text.strip() for text in texts]
    assert data.classes == ["a", "b"] and data.train.y.tolist() == [0, 1, 0, 1]
    assert data.name == "my" and data.test is None


def test_jsonl_reads_the_same_as_csv(tmp_path):
    rows = [("one", "2"), ("two", "10"), ("three", ""), ("four", "2")]
    (tmp_path / "my.jsonl").write_text(
        json.dumps({"text": "one", "label": 2}) + "\n" + json.dumps({"text": "two", "label": "10"}) + "\n\n"
        + json.dumps({"text": "three"}) + "\n" + json.dumps({"label": 2, "text": "four"}) + "\n"
    )  # fmt: skip
    a = load_data(write_csv(tmp_path / "my.csv", rows), "")
    b = load_data(str(tmp_path / "my.jsonl"), "")
    assert a.classes == b.classes == ["2", "10"]  # by value, not by letter
    assert a.train.y.tolist() == b.train.y.tolist() == [0, 1, -1, 0]
    assert a.train.texts == b.train.texts and a.train.hashes() == b.train.hashes()


def test_rows_without_text_are_left_out_and_counted(tmp_path, capsys):
    path = write_csv(tmp_path / "my.csv", [("one", "a"), ("", "a"), ("  \n", "b"), ("two", "b")])
    assert load_data(path, "").train.texts == ["one", "two"]
    assert "2 rows without text" in capsys.readouterr().out


def test_a_back_translation_that_is_missing_is_the_text_itself(tmp_path):
    rows = [("one", "a", "eins", ""), ("two", "b", "", "deux")]
    data = load_data(write_csv(tmp_path / "my.csv", rows, ("text", "label", "aug_0", "aug_1")), "")
    assert data.train.aug == [["eins", "two"], ["one", "deux"]]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"body,label\nx,a\n", "text and label"),
        (b"text,label\nx, y,a\n", "quotes around a text that"),
        (b'text,label\n"x"y,a\n', "row 1"),
        (b"text,label\nok,a\n\xff,a\n", "utf-8"),
    ],
)
def test_a_damaged_csv_is_one_clear_line(tmp_path, content, reason):
    (tmp_path / "my.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        load_data(str(tmp_path / "my.csv"), "")
    assert "\n" not in str(caught.value) and "my.csv" in str(caught.value)


def test_a_damaged_jsonl_names_the_row(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "one", "label": 1}\n{"text": "tw\n')
    with pytest.raises(UserError, match="my.jsonl.* row 2"):
        load_data(str(tmp_path / "my.jsonl"), "")


def test_half_a_surrogate_pair_does_not_stop_anything(tmp_path, tiny):
    (tmp_path / "my.jsonl").write_text('{"text": "tea \\ud83d cup", "label": "a"}\n{"text": "x", "label": "b"}\n')
    train = load_data(str(tmp_path / "my.jsonl"), "").train
    assert train.texts[0] == "tea ? cup" and len(train.hashes()) == 2
    assert len(views_of(tiny, train.texts)) == 2


def test_unlabeled_rows_only_is_refused_with_what_to_do(tmp_path):
    path = write_csv(tmp_path / "my.csv", [(text, "") for text in sentences("tea", 12)])
    data = load_data(path, "")
    assert data.classes == [] and (data.train.y == -1).all() and data.test is None
    with pytest.raises(UserError, match="labels name 0 classes; expected"):
        common.draw_labeled(data.train.y, 0, len(data.classes), 0)


def test_num_labels_0_takes_every_labeled_row_and_no_other():
    y = np.array([1, -1, 0, -1, 1, 0, 1])
    assert common.draw_labeled(y, 0, 2, seed=3).tolist() == [0, 2, 4, 5, 6]
    assert sorted(y[common.draw_labeled(y, 2, 2, seed=3)]) == [0, 1]


def test_a_fifth_is_held_out_where_every_class_has_ten_and_nowhere_else(tmp_path):
    rows = [(text, topic) for topic in ("tea", "sea") for text in sentences(topic, 10)]
    rows += [(text, "") for text in sentences("wood", 30)]
    data = load_data(write_csv(tmp_path / "my.csv", rows), "")
    assert np.bincount(data.test.y).tolist() == [2, 2] and len(data.train) == len(rows) - 4
    assert not set(data.test.hashes()) & set(data.train.hashes())
    assert sorted(data.train.texts + data.test.texts) == sorted(text for text, _ in rows)
    again = load_data(str(tmp_path / "my.csv"), "")
    assert again.test.texts == data.test.texts
    assert load_data(write_csv(tmp_path / "few.csv", rows[1:]), "").test is None


def test_a_text_that_occurs_twice_is_never_held_out(tmp_path):
    rows = [(text, topic) for topic in ("tea", "sea") for text in sentences(topic, 14)]
    twice = [(text, "") for text, _ in rows[:4]]
    data = load_data(write_csv(tmp_path / "my.csv", rows + twice), "")
    assert len(data.test) == 2 + 2 and not set(data.test.hashes()) & set(data.train.hashes())


def test_test_texts_in_the_pool_are_refused_with_their_number(tmp_path):
    train = write_csv(tmp_path / "my.csv", [("one", "a"), ("two", ""), ("three", "b")])
    test = write_csv(tmp_path / "t.csv", [("four", "a"), ("two", "b"), (" three\n", "b"), ("Two", "b")])
    with pytest.raises(UserError, match=r"t.csv: 2 of its 4 texts also stand in .*my.csv \(first: row 2\).*delete"):
        load_data(train, "", test)
    good = load_data(train, "", write_csv(tmp_path / "g.csv", [("four", "b"), ("Two", "b")]))
    assert good.test.y.tolist() == [1, 1]


@pytest.mark.parametrize("label", ["", "c"])
def test_a_test_file_with_a_missing_or_new_label_is_refused(tmp_path, label):
    train = write_csv(tmp_path / "my.csv", [("one", "a"), ("two", "b")])
    with pytest.raises(UserError, match="expected only those of the classes"):
        load_data(train, "", write_csv(tmp_path / "t.csv", [("three", "a"), ("four", label)]))


def test_a_test_file_is_refused_for_a_set_with_a_test_part():
    with pytest.raises(UserError, match="test part of its own"):
        load_data("digits", "data", "t.csv")


# ---------------------------------------------------------------------------- published sets


def make_archive(folder, per_class, classes, extra_train=()):
    """An archive in the publisher's layout: headerless quoted CSV, class from 1, title, body."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "ag_news_csv.tgz", "w:gz") as tar:
        for member, n in (("train", per_class), ("test", per_class // 2)):
            rows = [(k + 1, f"{member} {k} {i}", f"body {i}") for i in range(n) for k in range(classes)]
            rows += list(extra_train) if member == "train" else []
            text = "".join(",".join('"' + str(v).replace('"', '""') + '"' for v in row) + "\n" for row in rows)
            info = tarfile.TarInfo(f"ag_news_csv/{member}.csv")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def small_ag_news(tmp_path, monkeypatch):
    """make_archive in a data folder, as ag_news of 6 + 2 + 3 rows a class; gives the folder."""

    def make(*args):
        folder = tmp_path / "data" / "ag_news"
        make_archive(folder, *args)
        sha256 = hashlib.sha256((folder / "ag_news_csv.tgz").read_bytes()).hexdigest()
        monkeypatch.setitem(TEXT_SETS, "ag_news", (TEXT_SETS["ag_news"][0], sha256, "a, b, c, d", (6, 2, 3), "\\"))
        return folder

    return make


def test_an_archive_becomes_a_fixed_balanced_draw_without_test_texts(small_ag_news):
    copies = [(k + 1, f"test {k} {i}", f"body {i}") for k in range(4) for i in range(4)]  # the whole test part
    folder = small_ag_news(8, 4, copies)
    data = load_data("ag_news", str(folder.parent))
    assert np.bincount(data.train.y).tolist() == [6] * 4 and np.bincount(data.test.y).tolist() == [3] * 4
    dev = json.loads((folder / "dev.json").read_text())
    assert len(dev) == 8 and not {row["ori"] for row in dev.values()} & set(data.train.texts)
    for text, label in zip(data.train.texts, data.train.y, strict=True):
        assert text not in data.test.texts and text.split()[1] == str(label)
    first = data.train.texts
    for part in ("train", "test", "dev"):
        (folder / f"{part}.json").unlink()
    assert load_data("ag_news", str(folder.parent)).train.texts == first


def test_archive_texts_are_decoded_and_training_texts_keep_their_last_1024_characters(small_ag_news):
    rows = [(k + 1, f'A "{k}{i}" title', "dwindling\\band " + "x" * 2000 + "end") for k in range(4) for i in range(8)]
    archive = small_ag_news(0, 4, rows) / "ag_news_csv.tgz"
    with tarfile.open(archive) as tar:
        assert b'""00""' in tar.extractfile("ag_news_csv/train.csv").read()
    label, text = next(common.archive_rows(archive, "train", "\\"))
    assert label == 0 and text.startswith('A "00" title dwindling\nband')
    common.split_archive(archive, 4, (6, 2, 3), "\\")
    train, _ = common.read_texts(archive.with_name("train.json"))
    assert {len(text) for text in train.texts} == {1024} and train.texts[0].endswith("xend")


def test_a_damaged_archive_is_one_clear_line(tmp_path):
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "ag_news_csv.tgz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="ag_news_csv.tgz is damaged"):
        load_data("ag_news", str(tmp_path))
    with pytest.raises(UserError, match="another layout"):
        next(common.archive_rows(tmp_path / "ag_news" / "ag_news_csv.tgz", "train", "\\"))


def test_usb_files_give_back_translations_and_lose_test_texts_of_the_pool(tmp_path, capsys):
    folder = tmp_path / "yahoo_answers"
    folder.mkdir()
    train = {str(i): {"ori": f"q {i}", "aug_0": f"de {i}", "aug_1": f"ru {i}", "label": str(i % 10)} for i in range(20)}
    test = {str(i): {"ori": f"q {i}", "label": i % 10} for i in range(18, 30)}
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    data = load_data("yahoo_answers", str(tmp_path))
    assert data.train.aug == [[f"de {i}" for i in range(20)], [f"ru {i}" for i in range(20)]]
    assert data.train.y.tolist() == [i % 10 for i in range(20)] and len(data.classes) == 10
    assert data.test.texts == [f"q {i}" for i in range(20, 30)] and data.test.y.tolist() == list(range(10))
    assert "2 test texts" in capsys.readouterr().out


def test_usb_labels_out_of_range_are_refused(tmp_path):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.json").write_text(json.dumps({"0": {"ori": "x", "label": 4}}))
    with pytest.raises(UserError, match="train.json"):
        load_data("ag_news", str(tmp_path))


def test_published_recipes_stand_in_the_presets():
    rows = {name: PRESETS[name] for name in ("ag_news", "yahoo_answers", "amazon_review")}
    assert [(row.lr, row.layer_decay) for row in rows.values()] == [(5e-5, 0.65), (1e-4, 0.65), (1e-5, 0.75)]
    for row in rows.values():
        assert (row.batch_size, row.uratio, row.num_steps, row.warmup_steps) == (4, 1, 102400, 5120)
        assert (row.weight_decay, row.ema_decay, row.marginal_decay, row.size) == (1e-4, 0, 0.999, 512)


# ---------------------------------------------------------------------------- tokens and views


def test_tokens_equal_the_tokenizer_row_by_row_also_from_the_cache(tiny, tmp_path):
    from transformers import AutoTokenizer

    texts = [*sentences("tea", 30), "leaf", "leaf " * 3000]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    want = [tokenizer(text, truncation=True, max_length=60)["input_ids"] for text in texts]
    for _ in range(2):  # the second time from the file
        views = views_of(tiny, texts, cache=str(tmp_path))
        for k, row in enumerate(want):
            ids = views.plain(torch.tensor([k]))[0]
            assert ids[ids >= 0].tolist() == row
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 1
    assert isinstance(views.tokens, np.memmap)
    views_of(tiny, texts[:-1], cache=str(tmp_path))
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 2  # other texts, other file


def test_a_batch_is_as_wide_as_its_longest_row_in_steps_of_8_up_to_the_encoders_limit(tiny):
    views = views_of(tiny, ["leaf", "leaf " * 7, "leaf " * 500])
    assert [views.plain(torch.tensor(idx)).shape[1] for idx in ([0], [0, 1], [1, 2])] == [8, 16, 60]
    assert views.by_length().tolist() == [0, 1, 2]


def test_join_fills_up_rows_and_leaves_images_alone():
    a, b = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, -1]])
    assert join([a, b]).tolist() == [[1, 2, -1], [3, 4, 5], [6, 7, -1]]
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(join([x, x]), torch.cat([x, x]))


SPECIAL, MASK = torch.tensor([0, 1, 2, 3, 4]), 4


def test_token_augment_by_hand():
    ids = torch.tensor([[2, 10, 11, 12, 13, 14, 3, -1]])
    u = torch.full((1, 8, 2), 0.9)
    u[0, 1, 0] = 0.05  # 10 deleted
    u[0, 2, 0] = 0.15  # 11 masked
    u[0, 3, 1] = 0.05  # 12 after 13
    u[0, 5, 1] = 0.05  # 14 stays: its neighbor is special
    u[0, [0, 6, 7]] = 0.0  # special and padding: nothing happens
    assert token_augment(ids, u, SPECIAL, MASK).tolist() == [[2, 4, 13, 12, 14, 3, -1, -1]]
    assert token_augment(ids, torch.full((1, 8, 2), 0.9), SPECIAL, MASK).tolist() == ids.tolist()
    assert token_augment(ids, u, SPECIAL, None).tolist() == [[2, 11, 13, 12, 14, 3, -1, -1]]


@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("seed", range(40))
def test_no_text_is_emptied_and_special_tokens_stay(seed, scale):
    torch.manual_seed(seed)
    lengths = torch.randint(10, (1 + seed % 4,)).tolist()
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
    ids = torch.arange(10, 210).repeat(500, 1)
    out = token_augment(ids, torch.rand(500, 200, 2), SPECIAL, MASK)
    assert (out == -1).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (out == MASK).float().mean().item() == pytest.approx(0.1, abs=0.005)
    out = token_augment(ids, torch.rand(500, 200, 2).clamp(min=torch.tensor([0.5, 0])), SPECIAL, MASK)
    descents = (out[:, 1:] < out[:, :-1]).float().mean().item()
    assert descents == pytest.approx(0.1 * 0.9, abs=0.005)  # one behind every run of swapped tokens


def test_strong_view_is_a_back_translation_where_there_are_any(tiny):
    n = 200
    views = views_of(tiny, ["leaf"] * n, [["boat"] * n, ["owl"] * n])
    torch.manual_seed(0)
    strong, idx = views.strong(torch.arange(n)), torch.tensor([0, n // 2])
    boat, owl = (views_of(tiny, [word]).plain(torch.tensor([0]))[0] for word in ("boat", "owl"))
    share = (strong == boat).all(dim=1).float().mean().item()
    assert 0.4 < share < 0.6
    assert ((strong == boat).all(dim=1) | (strong == owl).all(dim=1)).all()
    assert torch.equal(views.weak(idx), views.plain(idx))


def test_strong_view_without_back_translations_changes_most_texts_and_repeats_with_the_seed(tiny):
    views, idx = views_of(tiny, sentences("tea", 40)), torch.arange(40)
    torch.manual_seed(1)
    a = views.strong(idx)
    torch.manual_seed(1)
    assert torch.equal(a, views.strong(idx))
    assert (a != views.plain(idx)).any(dim=1).float().mean() > 0.8


# ---------------------------------------------------------------------------- encoder


def test_padding_does_not_change_the_logits(tiny):
    student = common.build_student(tiny, 0, 60, 4).eval()
    ids = views_of(tiny, sentences("sea", 3)).plain(torch.arange(3))
    padded = join([ids, torch.full((1, 56), -1)])[:3]
    with torch.no_grad():
        torch.testing.assert_close(student(ids)[0], student(padded)[0], atol=1e-5, rtol=0)


def test_features_are_the_mean_over_the_rows_own_tokens(tiny):
    encoder = TextEncoder(tiny).eval()
    ids = torch.tensor([[2, 8, 9, 3, -1, -1], [2, 8, 9, 10, 11, 3]])
    with torch.no_grad():
        by_hand = encoder.model(input_ids=torch.tensor([[2, 8, 9, 3]])).last_hidden_state[0].sum(dim=0) / 4
        torch.testing.assert_close(encoder(ids)[0], by_hand, atol=1e-5, rtol=0)


def test_weights_are_the_folders_unless_none_is_asked_for(tiny):
    from transformers import AutoModel

    name, encoders = "encoder.layer.0.attention.self.query.weight", {}
    for weights in (None, "none", tiny):
        torch.manual_seed(5)
        encoders[weights] = TextEncoder(tiny)
        common.load_weights(encoders[weights], tiny, weights)
    a, none, b = (encoder.model.state_dict()[name] for encoder in encoders.values())
    torch.manual_seed(5)
    assert torch.equal(none, TextEncoder(tiny).model.state_dict()[name]) and not torch.equal(a, none)
    assert torch.equal(a, b) and torch.equal(a, AutoModel.from_pretrained(tiny).state_dict()[name])


def test_weights_of_another_encoder_are_one_clear_line(tiny, tmp_path):
    other = make_bert(tmp_path, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(UserError, match="--weights .* do not fit"):
        common.load_weights(TextEncoder(tiny), tiny, other)
    with pytest.raises(UserError, match="could not load it"):
        common.load_weights(TextEncoder(tiny), tiny, str(tmp_path / "nowhere"))


def test_heads_are_two_layers_and_the_auxiliary_one_starts_anew(tiny):
    student = common.build_student(tiny, 0, 60, 3)
    student.add_kd_head()
    shapes = [tuple(p.shape) for p in student.head.parameters()]
    assert shapes == [(16, 16), (16,), (3, 16), (3,)]
    assert shapes == [tuple(p.shape) for p in student.kd_head.parameters()]
    assert not torch.equal(student.head[0].weight, student.kd_head[0].weight)


def test_learning_rates_fall_from_layer_to_layer(tiny):
    student = common.build_student(tiny, 0, 60, 3)
    student.add_kd_head()
    groups = common.param_groups(student, 1.0, 0.1, 0.5)
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

    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    student = common.build_student(str(tmp_path), 0, 40, 3).eval()
    encoder, groups = student.encoder, common.param_groups(student, 1.0, 0.0, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(encoder.model.get_input_embeddings().weight)] == 0.125
    assert set(scale.values()) == {0.125, 0.25, 0.5, 1.0}
    ids = torch.tensor([[5, 6, 7], [8, -1, -1]])
    assert encoder(ids).shape == (2, encoder.num_features) and encoder(ids).isfinite().all()


@pytest.mark.parametrize("kind", ["missing", "empty folder", "decoder"])
def test_a_backbone_that_is_no_encoder_is_one_clear_line(tmp_path, monkeypatch, kind):
    if kind == "decoder":
        from transformers import T5Config

        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40).save_pretrained(tmp_path)
    backbone = str(tmp_path / "none") if kind == "missing" else str(tmp_path)
    with pytest.raises(UserError, match=re.escape(backbone)) as caught:
        TextEncoder(backbone)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- whole runs


def make_run(tmp_path, tiny, topics=("tea", "sea"), test=True, **more):
    """(arguments of a short run on a CSV of the user's own, data set), teacher's labels 80 % right."""
    rows = [(text, topic if k < 8 else "") for topic in topics for k, text in enumerate(sentences(topic, 30))]
    path = write_csv(tmp_path / "my.csv", rows)
    test_rows = [(text, topic) for topic in topics for text in sentences(topic, 10, seed=1)]
    test_file = write_csv(tmp_path / "test.csv", test_rows) if test else None
    data = load_data(path, "", test_file)
    truth = np.array([data.classes.index(topic) for topic in topics for _ in range(30)])
    teacher = np.where(np.random.RandomState(0).rand(len(truth)) < 0.8, truth, 0)
    probs = np.eye(len(topics))[teacher]
    pseudolabel.write_labels(tmp_path / "zs.jsonl", pseudolabel.header_of(data, "train", "t", "m"), probs)
    args = zeromatch.Args(
        dataset=path, test_file=test_file, num_labels=0, pseudolabels=str(tmp_path / "zs.jsonl"),
        data_dir=str(tmp_path / "data"), runs_dir=str(tmp_path / "runs"), device="cpu", amp="off", backbone=tiny,
        batch_size=4, uratio=1, num_steps=6, num_steps_stage1=3, eval_every=3, log_every=2,
    )  # fmt: skip
    return zeromatch.replace(args, **more), data


def weights_of(runs_dir):
    from safetensors.torch import load_file

    (path,) = runs_dir.glob("*/student/model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("num_classes", [2, 12])
def test_a_run_learns_own_texts_of_2_and_12_classes(tmp_path, tiny, num_classes):
    topics = list(WORDS)[:num_classes]
    args, data = make_run(tmp_path, tiny, topics, num_steps=30, num_steps_stage1=40, lr=1e-2, layer_decay=1.0,
                          eval_every=40, warmup_steps=3, batch_size=12, weights="none")  # fmt: skip
    result = zeromatch.main(args)
    assert len(data.classes) == num_classes and len(data.test) == 10 * num_classes
    assert result["test_acc"] > (75 if num_classes == 2 else 3 * 100 / 12)


def test_a_saved_student_predicts_the_same_without_the_backbones_folder(tmp_path, tiny):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    args, data = make_run(tmp_path, str(folder), num_steps=2, num_steps_stage1=1)
    result = zeromatch.main(args)
    shutil.rmtree(folder)
    (student_folder,) = (tmp_path / "runs").glob("*/student")
    student, config = common.load_student(student_folder)
    views = common.make_views(data.test, PRESETS["text"], config["backbone"], CPU)
    assert common.accuracy(common.predict(student, views), views.y) == pytest.approx(result["test_acc"])
    assert config["classes"] == ["sea", "tea"]


def test_evaluation_by_length_gives_rows_in_their_own_order(tiny):
    student = common.build_student(tiny, 0, 60, 3).eval()
    texts = [text for k in range(70) for text in sentences("town", 1, seed=k)] + ["leaf " * 40, "owl"]
    views = views_of(tiny, texts)
    probs = common.predict(student, views, batch=7)
    for k in (0, 33, 70, 71):
        with torch.no_grad():
            one = student(views.plain(torch.tensor([k])))[0].softmax(dim=1)
        torch.testing.assert_close(probs[k : k + 1], one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, tiny, monkeypatch, stop_at):
    """Stopped in stage 1 or 2 (the eval_every-th steps save), then resumed: equal to the straight run."""
    args, _ = make_run(tmp_path, tiny, eval_every=2)
    zeromatch.main(zeromatch.replace(args, runs_dir=str(tmp_path / "straight")))
    calls, update = [0], torch.optim.AdamW.step

    def step(self, *a, **k):
        calls[0] += 1
        if calls[0] == stop_at + 2:  # one step beyond a checkpoint
            raise KeyboardInterrupt
        return update(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        zeromatch.main(zeromatch.replace(args, runs_dir=str(tmp_path / "cut")))
    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    (run,) = (tmp_path / "cut").iterdir()
    zeromatch.main(zeromatch.replace(args, runs_dir=str(tmp_path / "cut"), resume=str(run)))
    straight, cut = weights_of(tmp_path / "straight"), weights_of(tmp_path / "cut")
    assert straight.keys() == cut.keys() and all(torch.equal(straight[name], cut[name]) for name in straight)


def test_without_a_test_part_a_run_reports_agreement_with_the_teacher(tmp_path, tiny, capsys):
    args, data = make_run(tmp_path, tiny, test=False, num_steps=2, num_steps_stage1=1)
    assert data.test is None
    result = zeromatch.main(args)
    out = capsys.readouterr().out
    assert "agreement with the teacher on training examples (60)" in out
    assert 0 <= result["agreement"] <= 100 and result["teacher_acc"] is None and "test_acc" not in result


def test_changing_the_truth_of_unlabeled_texts_changes_no_weight(tmp_path, tiny):
    """The same labeled rows drawn from a file that knows all labels: only monitoring may differ."""
    args, _ = make_run(tmp_path, tiny, num_steps=3, num_steps_stage1=1)
    zeromatch.main(zeromatch.replace(args, runs_dir=str(tmp_path / "a")))
    real = zeromatch.load_data

    def with_truth(*a):
        data = real(*a)
        y = data.train.y.copy()
        y[y < 0] = 1
        data.train.y[:] = y
        return data

    hidden = real(args.dataset, "", args.test_file).train.y
    labeled = np.flatnonzero(hidden >= 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeromatch, "load_data", with_truth)
        patch.setattr(zeromatch, "draw_labeled", lambda *a: labeled)
        zeromatch.main(zeromatch.replace(args, runs_dir=str(tmp_path / "b")))
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_three_steps_of_the_ag_news_preset_with_a_random_bert_base(tmp_path):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    for part, seed in (("train", 0), ("test", 1)):
        texts = [(text, k) for k, topic in enumerate(list(WORDS)[:4]) for text in sentences(topic, 4, seed)]
        rows = {str(i): {"ori": text, "label": k} for i, (text, k) in enumerate(texts)}
        (folder / f"{part}.json").write_text(json.dumps(rows))
    data = load_data("ag_news", str(tmp_path))
    probs = np.eye(4)[data.train.y]
    pseudolabel.write_labels(tmp_path / "zs.jsonl", pseudolabel.header_of(data, "train", "t", "m"), probs)
    result = zeromatch.main(zeromatch.Args(
        dataset="ag_news", num_labels=8, pseudolabels=str(tmp_path / "zs.jsonl"), data_dir=str(tmp_path),
        runs_dir=str(tmp_path / "runs"), device="cpu", amp="off", stages="2", num_steps=3, eval_every=3,
        backbone=make_bert(tmp_path / "bert_base", with_weights=False), weights="none",
    ))  # fmt: skip
    (run,) = (tmp_path / "runs").iterdir()
    saved = json.loads((run / "args.json").read_text())
    shutil.rmtree(run)  # a gigabyte
    assert 0 <= result["test_acc"] <= 100
    assert (saved["batch_size"], saved["uratio"], saved["lr"], saved["layer_decay"]) == (4, 1, 5e-5, 0.65)
