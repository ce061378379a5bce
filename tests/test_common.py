"""Data, index stream, backbones, averaging, checkpoint files: the parts no paper argues about."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import common

CPU = torch.device("cpu")


def test_index_stream_shows_every_example_once_a_pass():
    for n, batch in ((10, 16), (97, 16), (64, 64), (5, 23)):
        stream = torch.cat([common.batch_at(n, batch, 3, step) for step in range(40)])
        assert len(stream) == 40 * batch
        for start in range(0, len(stream) - n + 1, n):
            assert sorted(stream[start : start + n].tolist()) == list(range(n))


def test_index_stream_is_a_function_of_seed_and_step():
    one = common.batch_at(1000, 32, seed=1, step=7)
    common.batch_at(1000, 32, seed=1, step=500)
    torch.rand(5)
    assert torch.equal(one, common.batch_at(1000, 32, seed=1, step=7))
    assert not torch.equal(one, common.batch_at(1000, 32, seed=2, step=7))
    assert not torch.equal(one, common.batch_at(1000, 32, seed=1, step=7 + 1000))


def test_seed_step_separates_seeds_stages_and_steps():
    def draw(*key):
        common.seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(0, "stage 2", 5) == draw(0, "stage 2", 5)
    assert len({tuple(draw(*k)) for k in [(0, "a", 5), (0, "b", 5), (1, "a", 5), (0, "a", 6), (0, "a", 50)]}) == 5


def test_labeled_examples_are_balanced_seeded_and_of_the_right_class():
    y = np.repeat(np.arange(4), 25)
    drawn = common.draw_labeled(y, 12, 4, seed=5)
    assert np.bincount(y[drawn]).tolist() == [3, 3, 3, 3] and len(set(drawn.tolist())) == 12
    assert np.array_equal(drawn, common.draw_labeled(y, 12, 4, seed=5))
    assert not np.array_equal(drawn, common.draw_labeled(y, 12, 4, seed=6))
    assert common.draw_labeled(np.array([-1, 0, 1, -1, 1]), 0, 2, seed=5).tolist() == [1, 2, 4]  # 0: all known ones
    for wrong in (-4, 7, 104):
        with pytest.raises(common.UserError, match="--num-labels"):
            common.draw_labeled(y, wrong, 4, seed=5)


def test_digits_split_is_fixed_disjoint_and_complete():
    data = common.load_data("digits", "data")
    assert len(data.train) == 1297 and len(data.test) == 500 and data.classes == list("0123456789")
    assert data.train.x.dtype == np.uint8 and data.train.x.max() == 255 and data.train.x.shape[1:] == (1, 8, 8)
    assert not set(data.train.hashes()) & set(data.test.hashes())
    again = common.load_data("digits", "elsewhere")
    assert np.array_equal(data.test.x, again.test.x) and np.array_equal(data.test.y, again.test.y)


def test_fashion_mnist_is_read_from_the_publishers_files(tmp_path, monkeypatch):
    import gzip
    import hashlib

    folder, rng, made = tmp_path / "fashion_mnist", np.random.RandomState(0), {}
    folder.mkdir()
    sources = []
    for url, _, *rest in common.SOURCES["fashion_mnist"]:
        name = url.rsplit("/", 1)[1]
        count = 30 if name.startswith("train") else 10
        shape = (count, 28, 28) if "images" in name else (count,)
        made[name] = rng.randint(0, 10, shape).astype(np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (folder / name).write_bytes(gzip.compress(header + made[name].tobytes()))
        sources.append((url, hashlib.md5((folder / name).read_bytes()).hexdigest(), *rest))
    monkeypatch.setitem(common.SOURCES, "fashion_mnist", sources)
    monkeypatch.setattr(common, "DEBIAN_FASHION", str(tmp_path / "none"))
    data = common.load_data("fashion_mnist", str(tmp_path))
    assert np.array_equal(data.train.x[:, 0], made["train-images-idx3-ubyte.gz"])
    assert np.array_equal(data.test.y, made["t10k-labels-idx1-ubyte.gz"]) and len(data.classes) == 10


def test_averaged_weights_follow_the_formula_with_batch_statistics():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = common.Averaged(net, 0.9)
    weight = net[0].weight.detach().clone()
    ema.update()
    with torch.no_grad():
        net[0].weight += 1
        net[1].running_mean += 2
    ema.update()
    assert torch.allclose(ema.module[0].weight, weight + 0.1) and torch.allclose(
        ema.module[1].running_mean, torch.full((2,), 0.2)
    )
    assert common.Averaged(net, 0).module is net


def test_averaged_weights_are_those_of_torch_bit_for_bit_and_go_on_from_a_checkpoint():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    student = common.build_student("cnn", 1, 8, 10).train()
    optimizer = common.build_optimizer(student, "sgd", 0.1, 1e-3, 1.0)
    ours, theirs = common.Averaged(student, 0.99), AveragedModel(student, None, None, get_ema_multi_avg_fn(0.99), True)
    for step in range(6):
        if step == 3:  # as after a restart
            state, ours = ours.state_dict(), common.Averaged(student, 0.99)
            ours.load_state_dict(state)
        optimizer.zero_grad()
        student(torch.randn(4, 1, 8, 8))[0].square().mean().backward()
        optimizer.step()
        ours.update()
        theirs.update_parameters(student)
    for name, value in theirs.module.state_dict().items():
        assert "num_batches" in name or torch.equal(ours.module.state_dict()[name], value), name


def test_adamw_in_one_pass_gives_what_its_formula_says():
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = common.build_optimizer(net, "adamw", 0.1, 0.01, 1.0)
    w, m, v = net[0].weight.detach().double().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for step in range(1, 5):
        grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        net[0].weight.grad, net[0].bias.grad = grad.clone(), torch.zeros(2)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        w = w * (1 - 0.1 * 0.01) - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(net[0].weight.double(), w, atol=1e-6)


@pytest.mark.parametrize("backbone, size", [("cnn", 8), ("cnn", 28), ("wrn_28_2", 32)])
def test_backbones_have_heads_gradients_and_the_published_size(backbone, size):
    torch.manual_seed(0)
    student = common.build_student(backbone, 3, size, 10)
    student.add_kd_head()
    logits, logits_kd, features = student(torch.randn(4, 3, size, size))
    assert logits.shape == logits_kd.shape == (4, 10) and features.shape == (4, student.encoder.num_features)
    assert not torch.equal(student.head.weight, student.kd_head.weight)  # a new head, not a copy
    (logits.sum() + logits_kd.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.encoder.parameters())  # C5
    if backbone == "wrn_28_2":
        assert sum(p.numel() for p in student.encoder.parameters()) + student.head.weight.numel() + 10 == 1467610


def test_one_dimensional_tensors_have_no_weight_decay():
    student = common.build_student("cnn", 1, 8, 10)
    optimizer = common.build_optimizer(student, "sgd", 0.1, 5e-4, 1.0)
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert all(p.ndim > 1 for p in decayed) and {g["weight_decay"] for g in optimizer.param_groups} == {
        0.0,
        5e-4,
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(student.parameters()))
    assert optimizer.param_groups[0]["nesterov"]


def test_preset_fills_only_what_is_unset_and_scales_with_the_steps():
    preset = common.preset_of("digits")
    filled = common.fill_from_preset({"lr": 0.5, "num_steps": None, "seed": 0, "resume": None}, preset)
    assert filled == {"num_steps": preset.num_steps}
    half = {
        "num_steps": preset.num_steps // 2,
        "num_steps_stage1": None,
        "warmup_steps": None,
        "eval_every": 7,
    }
    filled = common.fill_from_preset(half, preset)
    assert filled == {
        "num_steps_stage1": preset.num_steps_stage1 // 2,
        "warmup_steps": preset.warmup_steps // 2,
    }


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.write_atomically(path, b"first")
    with pytest.raises(TypeError):
        common.write_atomically(path, object())
    assert path.read_bytes() == b"first"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    common.write_atomically(path, b"first")
    real_fsync = common.os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(common.UserError, match="No space left on device.*make room"):
        common.write_atomically(path, b"second")
    monkeypatch.setattr(common.os, "fsync", real_fsync)
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_student_folder_gives_the_same_predictions(tmp_path):
    torch.manual_seed(0)
    student, preset = common.build_student("cnn", 1, 8, 10), common.preset_of("digits")
    student.add_kd_head()  # is left out of the file
    data = common.load_data("digits", "data")
    config = common.student_config("digits", "cnn", preset, data.classes)
    common.save_student(tmp_path / "student", student, config)
    loaded, read = common.load_student(tmp_path / "student")
    views = common.Views(data.test, preset, torch.device("cpu"))
    assert torch.equal(common.predict(student, views), common.predict(loaded, views))
    assert loaded.kd_head is None and read["classes"] == data.classes
    json.loads((tmp_path / "student" / "config.json").read_text())


def test_accuracy_and_pseudo_label_accuracy_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    assert common.accuracy(probs, torch.tensor([0, 1, 1, 1])) == 50
    rates = common.pseudo_label_accuracy(
        torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, -1])
    )
    assert rates["pl_acc"].item() == pytest.approx(200 / 3) and rates["pl_acc_masked"].item() == 50
    none = common.pseudo_label_accuracy(torch.tensor([0]), torch.tensor([0.0]), torch.tensor([-1]))
    assert none["pl_acc"].isnan() and none["pl_acc_masked"].isnan()


def test_the_teachers_shares_are_drawn_half_way_to_the_labels():
    y_zs, y_lb = np.array([0, 0, 0, 1, -1, -1]), np.array([0, 1, 2, 2])  # 3/4, 1/4, 0 and 1/4, 1/4, 1/2
    assert common.class_shares("labeled", ["a", "b", "c"], y_zs, y_lb, CPU) is None
    shares = common.class_shares("teacher", ["a", "b", "c"], y_zs, y_lb, CPU)
    assert shares.tolist() == pytest.approx([0.5, 0.25, 0.25])
    silent = common.class_shares("teacher", ["a", "b", "c"], np.array([-1, -1]), y_lb, CPU)
    assert silent.tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_a_file_of_shares_or_counts_is_scaled_and_read_in_the_order_of_the_classes(tmp_path):
    (tmp_path / "shares.json").write_text('{"dog": 30, "cat": 90}')
    shares = common.class_shares(str(tmp_path / "shares.json"), ["cat", "dog"], np.array([0]), np.array([0]), CPU)
    assert shares.tolist() == pytest.approx([0.75, 0.25])


TOO_BIG = "1" + 400 * "0"


@pytest.mark.parametrize("content, wrong", [
    (None, "No such file"), ("", "not a JSON object"), ("[1, 2]", "not a JSON object"), ("3", "not a JSON object"),
    ('{"cat": 1}', "no positive number for 'dog'"), ('{"cat": 1, "dog": 0}', "no positive number for 'dog'"),
    ('{"cat": -1, "dog": -1}', "no positive number for 'cat'"), ('{"cat": 1, "dog": NaN}', "no positive number for"),
    ('{"cat": 1, "dog": "many"}', "not a JSON object of numbers"), (b"\xff\xfe", "not a JSON object"),
    ('{"cat": 1, "dog": 1, "cow": 1}', "unknown class 'cow'"), ('{"cat": 1, "dog": null}', "not a JSON object"),
    ('{"cat": 1e308, "dog": 1e308}', "no positive number for"), (f'{{"cat": 1, "dog": {TOO_BIG}}}', "not a JSON"),
    ('{"cat": 1, "dog": 1e-60}', "no positive number for 'dog'"), (9999 * "[", "not a JSON object"),
])  # fmt: skip
def test_a_file_that_does_not_say_every_share_is_refused_with_the_reason(tmp_path, content, wrong):
    path = tmp_path / "shares.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    expected = f'{wrong}.*; expected labeled, teacher, or a JSON file {{"cat": 0.25, ...}}'
    with pytest.raises(common.UserError, match=expected.replace("{", r"\{")):
        common.class_shares(str(path), ["cat", "dog"], np.array([0]), np.array([0]), CPU)
