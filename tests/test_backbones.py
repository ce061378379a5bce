"""Backbones: published architectures and weight files, layer-wise learning rates, full-size runs of three steps."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import common
import zeromatch
from common import UserError, build_student, load_weights, param_groups
from pseudolabel import header_of, write_labels
from test_images import FOODS, make_cifar, make_flowers102, make_folder, make_food101  # noqa: F401

# ---------------------------------------------------------------------------- timm's layout, a second implementation


def timm_weights(size: int, patch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under timm's names, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.05, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, 384), "pos_embed": draw(1, 1 + (size // patch) ** 2, 384),
        "patch_embed.proj.weight": draw(384, 3, patch, patch), "patch_embed.proj.bias": draw(384),
        "norm.weight": draw(384, mean=1.0), "norm.bias": draw(384),
    }  # fmt: skip
    for i in range(12):
        for name, (rows, cols) in {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384),
                                   "mlp.fc2": (384, 1536)}.items():  # fmt: skip
            state[f"blocks.{i}.{name}.weight"] = draw(rows, cols)
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = draw(384, mean=1.0, scale=0.2)
            state[f"blocks.{i}.{name}.bias"] = draw(384)
    return state


def timm_features(state: dict[str, Tensor], x: Tensor, patch: int) -> Tensor:
    """The class token of a pre-norm ViT with 6 heads, written with unfold and einsum only."""

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        scaled = centered / (centered.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    n = len(x)
    patches = F.unfold(x, patch, stride=patch).mT  # [n, L, 3 * patch * patch]
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].expand(n, 1, 384), tokens], dim=1) + state["pos_embed"]
    for i in range(12):
        qkv = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.view(n, -1, 3, 6, 64).unbind(dim=2)  # [n, L, 6, 64]
        attention = (torch.einsum("nqhd,nkhd->nhqk", q, k) / 8).softmax(dim=-1)
        mixed = torch.einsum("nhqk,nkhd->nqhd", attention, v).reshape(n, -1, 384)
        tokens = tokens + linear(mixed, f"blocks.{i}.attn.proj")
        hidden = linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(tokens, "norm")[:, 0]


def usb_file(path: Path, state: dict[str, Tensor]) -> str:
    """A file as the USB release holds them: under "model", perhaps with "module." and a head."""
    state = state | {"head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)}
    torch.save({"model": {f"module.{name}": weight for name, weight in state.items()}, "epoch": 7}, path)
    return str(path)


@pytest.mark.parametrize("name, size, patch", [("vit_small_patch2_32", 32, 2), ("vit_small_patch16_224", 224, 16)])
def test_a_published_weight_file_gives_the_features_of_timms_layout(tmp_path, name, size, patch):
    state, student = timm_weights(size, patch), build_student(name, 3, size, 10)
    load_weights(student.encoder, name, usb_file(tmp_path / "vit.pth", state))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, theirs = student.eval()(x)[2], timm_features(state, x, patch)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    save_file(state | {"head.weight": torch.zeros(7, 384)}, tmp_path / "model.safetensors")  # as timm's hub files
    other = build_student(name, 3, size, 10)
    load_weights(other.encoder, name, str(tmp_path / "model.safetensors"))
    for (key, a), b in zip(student.encoder.state_dict().items(), other.encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_positions_of_another_image_size_are_resized_and_the_class_token_kept(tmp_path):
    state = timm_weights(224, 16)
    rows = torch.arange(14.0).repeat_interleave(14)  # a ramp over the rows survives any interpolation
    state["pos_embed"][0, 1:] = rows[:, None]
    student = build_student("vit_small_patch16_224", 3, 96, 10)
    load_weights(student.encoder, "vit_small_patch16_224", usb_file(tmp_path / "vit.pth", state))
    positions = student.encoder.model.embeddings.position_embeddings[0].detach()
    assert torch.equal(positions[0], state["pos_embed"][0, 0])
    grid = positions[1:].view(6, 6, 384)
    assert (grid - grid[:, :1, :1]).abs().max() < 1e-4  # equal along each row
    expected = (torch.arange(6) + 0.5) * 14 / 6 - 0.5
    torch.testing.assert_close(grid[1:5, 0, 0], expected[1:5], atol=0.1, rtol=0)


def test_the_vit_is_the_published_one():
    for name, size, millions in (("vit_small_patch2_32", 32, 21.48), ("vit_small_patch16_224", 224, 21.74)):
        student = build_student(name, 3, size, 100 if size == 32 else 102)
        student.add_kd_head()
        assert round(sum(p.numel() for p in student.parameters()) / 1e6, 2) == millions
    vit = student.encoder.model
    drops = [module for module in vit.modules() if isinstance(module, StochasticDepth)]
    assert [round(drop.p, 4) for drop in drops] == [round(0.2 * i / 11, 4) for i in range(12)]
    assert all(drop.mode == "row" for drop in drops) and not vit.embeddings.position_embeddings.any()
    assert {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    layer, x = vit.layers[11], torch.randn(400, 2, 384)
    layer.dropout.p = 0.5
    branches = (layer.train()(x) - x).flatten(1)
    untouched = (branches == 0).all(dim=1).float().mean()  # both branches dropped, for whole examples
    assert 0.15 < untouched < 0.35
    assert torch.equal(layer.eval()(x), layer(x))


def test_weights_that_do_not_fit_are_listed_with_what_to_do(tmp_path):
    state = timm_weights(32, 2)
    del state["blocks.3.mlp.fc1.bias"]
    state |= {"blocks.12.norm1.bias": torch.zeros(384), "norm.weight": torch.ones(192)}
    student = build_student("vit_small_patch2_32", 3, 32, 10)
    before = student.state_dict()["encoder.model.layernorm.bias"].clone()
    with pytest.raises(UserError) as caught:
        load_weights(student.encoder, "vit_small_patch2_32", usb_file(tmp_path / "vit.pth", state))
    message = str(caught.value)
    assert "missing 1: layers.3.mlp.fc1.bias" in message and "left over 1: layers.12.layernorm_before.bias" in message
    assert "of another shape 1: layernorm.weight" in message and "--weights none" in message
    assert torch.equal(before, student.state_dict()["encoder.model.layernorm.bias"])


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_a_file_that_is_no_weight_file_is_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = build_student("wrn_28_2", 3, 32, 10).encoder
    (tmp_path / "damaged.pth").write_bytes(b"PK damaged")
    torch.save({"model": Attack()}, tmp_path / "attack.pth")
    for name in ("damaged.pth", "attack.pth", "nowhere.pth", "nowhere.safetensors"):
        with pytest.raises(UserError, match=name) as caught:
            load_weights(encoder, "wrn_28_2", str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()


def test_published_weights_that_cannot_be_fetched_name_address_place_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/vit_small_patch2_32.pth"
    monkeypatch.setitem(common.WEIGHTS, "vit_small_patch2_32", url)
    student = build_student("vit_small_patch2_32", 3, 32, 10)
    with pytest.raises(UserError) as caught:
        load_weights(student.encoder, "vit_small_patch2_32", None)
    place = tmp_path / "hub" / "checkpoints" / "vit_small_patch2_32.pth"
    assert url in str(caught.value) and str(place) in str(caught.value) and "--weights none" in str(caught.value)
    state = timm_weights(32, 2)
    usb_file(place, state)  # put there by hand
    load_weights(student.encoder, "vit_small_patch2_32", None)
    assert torch.equal(student.encoder.model.layernorm.bias, state["norm.bias"])


def test_a_backbone_without_weights_says_that_it_starts_from_scratch(capsys):
    for name, weights in (("cnn", None), ("wrn_28_2", None), ("efficientnet_b0", "none")):
        load_weights(build_student(name, 3, 32, 10).encoder, name, weights)
        assert f"{name} starts from scratch" in capsys.readouterr().out


def test_efficientnet_is_torchvisions_and_takes_its_weight_file(tmp_path):
    from torchvision.models import efficientnet_b0

    torch.manual_seed(0)
    model = efficientnet_b0().eval()
    assert sum(p.numel() for p in model.parameters()) == 5_288_548
    torch.save(model.state_dict(), tmp_path / "efficientnet_b0_rwightman-7f5810bc.pth")
    student = build_student("efficientnet_b0", 3, 64, 10)
    load_weights(student.encoder, "efficientnet_b0", str(tmp_path / "efficientnet_b0_rwightman-7f5810bc.pth"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.avgpool(model.features(x)).flatten(1)
        torch.testing.assert_close(student.eval()(x)[2], expected)


def test_batch_statistics_are_known_for_every_backbone():
    expected = {"cnn": True, "wrn_28_2": True, "efficientnet_b0": True, "vit_small_patch2_32": False}
    assert {name: build_student(name, 3, 32, 10).encoder.batch_statistics for name in expected} == expected


# ---------------------------------------------------------------------------- models of transformers


def tiny_models() -> dict[str, nn.Module]:
    """Every kind of output: class token, pooled CLIP, mean of tokens, maps of a convolutional network."""
    from transformers import (
        CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, SwinConfig, SwinModel, ViTConfig, ViTForImageClassification,
    )  # fmt: skip

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = small | {"image_size": 32, "patch_size": 16}
    return {
        "vit": ViTForImageClassification(ViTConfig(**vision, num_labels=3)),
        "clip": CLIPModel(CLIPConfig(vision_config=vision, text_config=small | {"vocab_size": 99})),
        "swin": SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                                     window_size=2)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "clip", "swin", "resnet"])
def test_any_image_model_folder_of_transformers_is_a_backbone(tmp_path, kind):
    model = tiny_models()[kind].eval()
    model.save_pretrained(tmp_path / kind)
    backbone = str(tmp_path / kind)
    student = build_student(backbone, 3, 32, 5)
    load_weights(student.encoder, backbone, None)
    x = torch.randn(2, 3, 32, 32)
    inner = {"vit": "vit", "clip": "vision_model"}.get(kind)
    with torch.no_grad():
        hidden = (getattr(model, inner) if inner else model)(x).last_hidden_state
        expected = {"vit": lambda: hidden[:, 0], "clip": lambda: hidden[:, 0], "swin": lambda: hidden.mean(dim=1),
                    "resnet": lambda: hidden.mean(dim=(2, 3))}[kind]()  # fmt: skip
        logits, _, features = student.eval()(x)
    torch.testing.assert_close(features, expected)
    assert logits.shape == (2, 5) and student.encoder.batch_statistics == (kind == "resnet")
    gray = build_student(backbone, 1, 32, 5).eval()
    assert gray(torch.randn(2, 1, 32, 32))[0].shape == (2, 5)
    scales = {group["lr_scale"] for group in param_groups(student, 1.0, 0.1, 0.5)}
    assert 1.0 in scales and len(scales) >= 3


def test_a_name_that_is_no_model_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text").mkdir()
    bert = {"model_type": "bert", "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "text" / "config.json").write_text(json.dumps(bert))
    for name in ("vit_huge", str(tmp_path / "text"), str(tmp_path)):
        with pytest.raises(UserError, match="--backbone") as caught:
            build_student(name, 3, 32, 10)
        assert "\n" not in str(caught.value) and "vit_small_patch2_32" in str(caught.value)
    with pytest.raises(UserError, match="patches of 16"):
        build_student("vit_small_patch16_224", 3, 28, 10)


# ---------------------------------------------------------------------------- layer-wise learning rates


def test_layer_decay_makes_the_published_fourteen_groups():
    student = build_student("vit_small_patch2_32", 3, 32, 100)
    student.add_kd_head()
    groups = param_groups(student, 5e-4, 5e-4, 0.5)
    names = {id(p): name for name, p in student.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(names) and len(set(scale.values())) == 14
    model = "encoder.model."
    assert scale["head.weight"] == scale["kd_head.bias"] == 1.0
    assert scale[model + "layers.11.mlp.fc1.weight"] == scale[model + "layernorm.weight"] == 0.5
    assert scale[model + "layers.0.attention.q_proj.weight"] == 0.5**12
    for stem in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight"):
        assert 5e-4 * scale[model + "embeddings." + stem] == pytest.approx(6.1e-8, rel=1e-2)
    spared = {name for name, value in decay.items() if value == 0}
    assert {model + "embeddings.cls_token", model + "embeddings.position_embeddings"} < spared
    assert spared == {name for name, p in student.named_parameters() if p.ndim == 1} | {
        model + "embeddings.cls_token", model + "embeddings.position_embeddings"}  # fmt: skip
    assert set(decay.values()) == {0.0, 5e-4}


def test_without_layer_decay_there_are_two_groups_and_scale_one():
    groups = param_groups(build_student("cnn", 1, 8, 10), 1e-3, 0.1, 1.0)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.1), (1.0, 0.0)]


# ---------------------------------------------------------------------------- whole runs


def run(dataset: str, root: Path, **options) -> dict:
    """Three steps with a batch that a test can afford, on labels that a made-up teacher gives in turn."""
    data = common.load_data(dataset, str(root))
    probs = np.eye(len(data.classes), dtype=np.float32)[np.arange(len(data.train)) % len(data.classes)]
    labels = root / "labels.jsonl"
    write_labels(labels, header_of(data, "train", "test", "made up"), probs)
    given = {
        "dataset": dataset, "data_dir": str(root), "runs_dir": str(root / "runs"), "pseudolabels": str(labels),
        "num_steps": 3, "num_steps_stage1": 1, "batch_size": 1, "uratio": 1, "device": "cpu", "weights": "none",
    }  # fmt: skip
    return zeromatch.main(zeromatch.Args(**given | options))


def student_of(root: Path) -> Path:
    return next((root / "runs").glob("*/student"))


def test_three_steps_of_the_cifar100_preset(monkeypatch, tmp_path, capsys):
    make_cifar(monkeypatch, tmp_path, "cifar100", with_test=3)
    result = run("cifar100", tmp_path, num_labels=100)
    said = capsys.readouterr().out
    assert "vit_small_patch2_32 starts from scratch" in said and "stage 2 step 3/3" in said
    assert result["measured"] == "test_acc" and 0 <= result["test_acc"] <= 100
    student, config = common.load_student(student_of(tmp_path))
    assert config["backbone"] == "vit_small_patch2_32" and student.encoder.model.layers[11].dropout.p == 0.2


def test_three_steps_of_the_flowers102_preset(monkeypatch, tmp_path, capsys):
    make_flowers102(monkeypatch, tmp_path, num_test=2)
    result = run("flowers102", tmp_path, num_labels=102)
    assert "stage 2 step 3/3" in capsys.readouterr().out and 0 <= result["test_acc"] <= 100


def test_three_steps_of_the_food101_preset(monkeypatch, tmp_path, capsys):
    names = [f"food_{i:03d}" for i in range(101)]
    make_food101(monkeypatch, tmp_path, {"train": names, "test": names[:2]}, 1)
    result = run("food101", tmp_path, num_labels=101, batch_size=2)
    assert "efficientnet_b0 starts from scratch" in capsys.readouterr().out and 0 <= result["test_acc"] <= 100


def test_own_pictures_without_a_test_part_report_agreement_and_not_accuracy(tmp_path, capsys):
    root = make_folder(tmp_path / "pets", each=4, side=40)
    result = run(str(root), tmp_path, num_labels=0, num_steps=2)
    said = capsys.readouterr().out
    assert "8 labeled" in said and "agreement with the teacher on training examples (8)" in said
    assert result["measured"] == "agreement" and "test_acc" not in result
    student, config = common.load_student(student_of(tmp_path))
    assert config["classes"] == ["cat", "dog"]


def test_a_student_on_a_transformers_model_is_read_back_without_that_model(tmp_path):
    tiny_models()["vit"].save_pretrained(tmp_path / "vit")
    student = build_student(str(tmp_path / "vit"), 3, 32, 2).eval()
    preset = common.preset_of("cifar10")
    config = common.student_config("pets", str(tmp_path / "vit"), preset, ["cat", "dog"])
    common.save_student(tmp_path / "student", student, config)
    shutil.rmtree(tmp_path / "vit")
    again, _ = common.load_student(tmp_path / "student")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x)[0], student(x)[0])
