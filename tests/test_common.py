"""Presets, index stream, labeled examples, averaging, files: the parts no paper argues about."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import common
import zeromatch
from common import UserError, preset_of, resolve

DIGITS = preset_of("digits")


@pytest.mark.parametrize("name, expected", [
    ("cifar100", (5e-4, 0.5, 204_800, 5_120, 2_048)),
    ("flowers102", (1e-4, 0.65, 102_400, 2_560, 1_024)),
    ("resisc45", (1e-4, 0.65, 102_400, 2_560, 1_024)),
    ("ag_news", (5e-5, 0.65, 102_400, 5_120, 2_048)),
    ("yahoo_answers", (1e-4, 0.65, 102_400, 5_120, 2_048)),
    ("amazon_review", (1e-5, 0.75, 102_400, 5_120, 2_048)),
])  # fmt: skip
def test_published_recipes_are_the_papers(name, expected):
    row = preset_of(name)
    assert (row.lr, row.layer_decay, row.num_steps, row.warmup_steps, row.eval_every) == expected
    batch, decay = (16, 5e-4) if row.mean else (4, 1e-4)
    assert (row.batch_size, row.uratio, row.optimizer) == (batch, 1, "adamw")
    assert (row.weight_decay, row.ema_decay, row.marginal_decay) == (decay, 0, 0.999)
    assert row.size == (32 if name == "cifar100" else 224 if row.mean else 512)
    assert row.num_steps_stage1 == row.num_steps


def test_the_wrn_brings_its_classic_recipe():
    row = preset_of("cifar100", "wrn_28_2")
    assert (row.optimizer, row.lr, row.batch_size, row.uratio) == ("sgd", 0.03, 64, 7)
    assert row.num_steps == 2**20 and row.weight_decay == 1e-3
    assert row.size == 32 and row.mean == preset_of("cifar100").mean
    assert preset_of("svhn", "wrn_28_2").weight_decay == 5e-4
    assert preset_of("digits", "wrn_28_2") == DIGITS  # its short recipe is made for two cores


def test_the_small_cnn_brings_its_recipe_to_published_images():
    row, own = preset_of("cifar10", "cnn"), preset_of("fashion_mnist")
    assert (row.optimizer, row.lr, row.layer_decay, row.num_steps) == ("sgd", 0.1, 1, 1400)
    seen = {name: getattr(row, name) for name in "size pad flip mean std num_labels".split()}
    assert row == own._replace(**seen)
    assert row.mean == preset_of("cifar10").mean and row.num_labels == 40


GIVEN = dict.fromkeys(("num_steps", "num_steps_stage1", "warmup_steps", "eval_every"))
GIVEN |= {"batch_size": None, "lr": None, "seed": 0, "num_labels": None, "tau": 0.95}
GIVEN |= {"layer_decay": None, "freeze": False}


def test_the_preset_fills_only_what_is_unset_and_scales_with_the_steps():
    filled = resolve(GIVEN | {"lr": 0.5}, DIGITS)
    assert filled == GIVEN | {
        "num_steps": 800, "num_steps_stage1": 400, "warmup_steps": 40, "eval_every": 40,
        "batch_size": 16, "lr": 0.5, "num_labels": 10, "layer_decay": 1.0,
    }  # fmt: skip
    assert resolve(GIVEN | {"freeze": True}, common.PRESETS["cifar100"])["layer_decay"] == 0
    half = resolve(GIVEN | {"num_steps": 400, "eval_every": 7}, DIGITS)
    assert (half["num_steps_stage1"], half["warmup_steps"], half["eval_every"]) == (200, 20, 7)
    tiny = resolve(GIVEN | {"num_steps": 1}, DIGITS)
    names = ("num_steps_stage1", "warmup_steps", "eval_every")
    assert [json.dumps(tiny[name]) for name in names] == ["1", "0", "10"]


@pytest.mark.parametrize("name, value", [
    ("num_steps", 0), ("batch_size", 0), ("lr", -0.1), ("lr", float("nan")), ("tau", 1.01),
    ("seed", -1), ("seed", 2**32), ("eval_every", 0), ("warmup_steps", -1),
])  # fmt: skip
def test_a_number_out_of_its_range_is_refused(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} {value}: expected a number from"):
        resolve(GIVEN | {name: value}, DIGITS)


@pytest.mark.parametrize("n, batch", [(10, 16), (97, 16), (64, 64), (5, 23)])
def test_the_index_stream_shows_every_example_once_a_pass(n, batch):
    stream = torch.cat([common.batch_at(n, batch, 3, "a", step) for step in range(40)])
    assert len(stream) == 40 * batch
    passes = [part.tolist() for part in stream.split(n) if len(part) == n]
    assert all(sorted(part) == list(range(n)) for part in passes)
    assert len(set(map(tuple, passes))) > 1  # another order in every pass
    one = common.batch_at(1000, 32, 1, "a", 7)
    common.batch_at(1000, 32, 1, "a", 500)
    assert torch.equal(one, common.batch_at(1000, 32, 1, "a", 7))
    for key in ((2, "a", 7), (1, "b", 7), (1, "a", 8), (1, "a", 7 + 1000)):
        assert not torch.equal(one, common.batch_at(1000, 32, *key))


def test_seed_step_separates_seeds_stages_and_steps():
    def draw(*key):
        common.seed_step(*key)
        return tuple(torch.rand(3).tolist())

    assert draw(0, "stage 2", 5) == draw(0, "stage 2", 5)
    keys = [(0, "a", 5), (0, "b", 5), (1, "a", 5), (0, "a", 6), (0, "a", 50)]
    assert len({draw(*key) for key in keys}) == 5


def test_labeled_examples_are_balanced_seeded_and_of_the_right_class():
    y = np.append(np.repeat(np.arange(4), 25), [-1, -1])
    drawn = common.draw_labeled(y, 12, 4, seed=5)
    assert np.bincount(y[drawn]).tolist() == [3, 3, 3, 3] and len(set(drawn.tolist())) == 12
    assert np.array_equal(drawn, common.draw_labeled(y, 12, 4, seed=5))
    assert not np.array_equal(drawn, common.draw_labeled(y, 12, 4, seed=6))
    few = np.array([-1, 0, 1, -1, 1])
    assert common.draw_labeled(few, 0, 2, seed=5).tolist() == [1, 2, 4]  # 0: all known ones
    for wrong in (-4, 7, 104):
        with pytest.raises(UserError, match="--num-labels"):
            common.draw_labeled(y, wrong, 4, seed=5)


def test_the_digits_split_is_fixed_disjoint_and_complete():
    data, again = (common.load_data("digits", folder) for folder in ("data", "elsewhere"))
    assert len(data.train) == 1297 and len(data.test) == 500
    assert data.classes == list("0123456789")
    assert data.train.x.dtype == np.uint8 and data.train.x.max() == 255
    assert data.train.x.shape[1:] == (1, 8, 8) and data.train.keys is None
    assert (data.train.x / 255).mean() == pytest.approx(*DIGITS.mean, abs=2e-3)
    assert (data.train.x / 255).std() == pytest.approx(*DIGITS.std, abs=2e-3)
    assert not set(data.train.hashes()) & set(data.test.hashes())
    assert np.array_equal(data.test.x, again.test.x) and np.array_equal(data.test.y, again.test.y)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_averaged_weights_follow_the_formula_with_batch_statistics(decay):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = zeromatch.average_of(net, decay)
    names = ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"]
    expected = None
    for step in range(100):
        if step == 3:  # as after a restart
            state, average = average.state_dict(), zeromatch.average_of(net, decay)
            average.load_state_dict(state)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net(torch.randn(8, 2) + step)
        now = {name: net.state_dict()[name].clone() for name in names}
        average.update_parameters(net)
        before = expected or now  # the first update copies
        d = min(decay, (1 + step) / (10 + step))
        expected = {name: d * before[name] + (1 - d) * now[name] for name in names}
        for name in names:
            torch.testing.assert_close(
                average.module.state_dict()[name], expected[name], rtol=1e-4, atol=1e-4
            )
    assert all(torch.equal(net.state_dict()[name], now[name]) for name in names)  # not changed


def test_optimizers_are_nesterovs_and_adamw():
    net = common.Student(common.SmallCNN(1, 8), 2)
    sgd, adamw = (common.optimizer_of(net, name, 0.1, 0.01, 1) for name in ("sgd", "adamw"))
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.9
    assert sgd.defaults["nesterov"] and type(adamw) is torch.optim.AdamW
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["eps"] == 1e-8
    for optimizer in (sgd, adamw):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0]


def test_the_accuracy_of_pseudo_labels_by_hand():
    label, mask = torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    rates = common.pseudo_label_accuracy(label, mask, torch.tensor([0, 0, 1, -1]))
    assert rates["pl_acc"].item() == pytest.approx(200 / 3)
    assert rates["pl_acc_masked"].item() == 50
    none = common.pseudo_label_accuracy(label[:1], torch.zeros(1), torch.tensor([-1]))
    assert none["pl_acc"].isnan() and none["pl_acc_masked"].isnan()


def test_a_warm_up_beyond_the_training_is_refused_and_no_range_hides_another():
    with pytest.raises(UserError, match="--warmup-steps 40: expected a number from 0 to 30"):
        resolve(GIVEN | {"num_steps": 30, "warmup_steps": 40}, DIGITS)
    with pytest.raises(UserError, match="--tau 7"):
        resolve(GIVEN | {"num_steps": 1, "tau": 7}, DIGITS)


def measured_part(folder, data):
    """(what Run.describe says is to be evaluated, its name)."""
    args = {"runs_dir": str(folder), "resume": None, "track": None, "log_every": 1}
    run = common.Run("run", args, torch.device("cpu"), None)
    return run.describe(data, np.arange(1)), run.measured


def test_without_a_test_part_known_training_labels_are_measured(tmp_path):
    x, y = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8), np.array([0, -1, 1, -1])
    train = common.Split(x, y)
    data = common.Data("own", ["a", "b"], train, None)
    part, measured = measured_part(tmp_path, data)
    assert measured == "labeled_acc" and sorted(part.y.tolist()) == [0, 1]
    assert np.array_equal(part.x, x[2 * part.y])
    many = common.Split(np.zeros((9000, 1, 8, 8), np.uint8), np.arange(9000) // 1000)  # by class
    part, _ = measured_part(tmp_path, common.Data("own", [*"abcdefghi"], many, None))
    assert len(part) == 2000 and len(set(part.y.tolist())) == 9
    whole = common.Data("own", ["a", "b"], train, train.take(np.array([2])))
    assert measured_part(tmp_path, whole) == (whole.test, "test_acc")


@pytest.mark.parametrize("failure", [TypeError("no bytes"), OSError(28, "No space left on device")])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, failure):
    def fsync(descriptor):
        raise failure

    path = tmp_path / "checkpoint.pt"
    common.write_atomically(path, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(type(failure), match="No space left on device|no bytes"):
            common.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    common.write_atomically(path, b"third")
    assert path.read_bytes() == b"third" and list(tmp_path.iterdir()) == [path]


def test_a_student_folder_gives_the_same_predictions(tmp_path):
    torch.manual_seed(0)
    student = common.build_student("cnn", DIGITS, 10)
    student.add_kd_head()  # is left out of the file
    data = common.load_data("digits", "data")
    config = {"dataset": "digits", "backbone": "cnn", "size": 8, "mean": [0.305], "std": [0.376]}
    config |= {"pad": 1, "classes": data.classes, "num_extra": 0}
    common.save_student(tmp_path / "student", student, config)
    loaded, read = common.load_student(tmp_path / "student")
    views = common.make_views(data.test, DIGITS, "cnn", torch.device("cpu"))
    probs, _ = common.predict(student, views)
    assert torch.equal(probs, common.predict(loaded, views)[0]) and len(probs.unique(dim=0)) > 100
    assert loaded.kd_head is None and read == config and not loaded.training
    for damage in (b"{}", b"no json"):
        (tmp_path / "student" / "config.json").write_bytes(damage)
        with pytest.raises(UserError, match="is no student"):
            common.load_student(tmp_path / "student")


def test_class_shares_are_drawn_half_way_to_the_labels_or_read_from_a_file(tmp_path):
    y_lb = torch.tensor([0, 1, 2, 2])  # shares 1/4, 1/4, 1/2
    shares = zeromatch.teacher_shares(torch.tensor([0, 0, 0, 1, -1, -1]), y_lb, 3)
    assert shares.tolist() == pytest.approx([0.5, 0.25, 0.25])
    silent = zeromatch.teacher_shares(torch.tensor([-1, -1]), y_lb, 3)
    assert silent.tolist() == pytest.approx([0.25, 0.25, 0.5])
    (tmp_path / "shares.json").write_text('{"dog": 30, "cat": 90}')
    shares = zeromatch.prior_from_file(str(tmp_path / "shares.json"), ["cat", "dog"])
    assert shares.tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("content", [
    None, "", "[1, 2]", "3", '{"cat": 1}', '{"cat": 1, "dog": 0}', '{"cat": -1, "dog": -1}',
    '{"cat": 1, "dog": NaN}', '{"cat": 1, "dog": "many"}', b"\xff\xfe", 9999 * "[",
    '{"cat": 1, "dog": 1, "cow": 1}', '{"cat": 1, "dog": null}', '{"cat": 1e308, "dog": 1e308}',
    '{"cat": 1, "dog": 1%s}' % (400 * "0"), '{"cat": 1, "dog": 1e-60}',
])  # fmt: skip
def test_a_file_that_does_not_say_every_share_is_refused(tmp_path, content):
    path = tmp_path / "shares.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match='shares.json .*a JSON file .*"cat": 0.25') as caught:
        zeromatch.prior_from_file(str(path), ["cat", "dog"])
    assert "\n" not in str(caught.value)
