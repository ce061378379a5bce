"""Backbones: published architectures and weight files, layer-wise rates, runs of two steps."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_images
import torch
import torch.nn.functional as F
import transformers
from runs import write_labels
from safetensors.torch import save_file
from test_images import url_of, web  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import common
import zeromatch
from common import UserError, load_weights, optimizer_of
from pseudolabel import header_of

VITS = [("vit_small_patch2_32", 32, 2), ("vit_small_patch16_224", 224, 16)]


def build(backbone: str, size: int = 32, num_classes: int = 10, channels: int = 3):
    preset = common.preset_of("cifar10")._replace(size=size, mean=(0.5,) * channels)
    return common.build_student(backbone, preset, num_classes)


def timm_weights(size: int, patch: int) -> dict[str, Tensor]:
    """Random weights under timm's names, large enough that every one of them matters."""
    generator, blocks = torch.Generator().manual_seed(0), range(12)
    shapes = {"cls_token": (1, 1, 384), "pos_embed": (1, 1 + (size // patch) ** 2, 384)}
    shapes |= {"patch_embed.proj.weight": (384, 3, patch, patch), "patch_embed.proj.bias": (384,)}
    matrices = {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384)}
    matrices |= {"mlp.fc2": (384, 1536), "norm1": (384,), "norm2": (384,)}
    every = {f"blocks.{i}.{name}": shape for i in blocks for name, shape in matrices.items()}
    for name, shape in (every | {"norm": (384,)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    ones = {name: "norm" in name and name.endswith("weight") for name in shapes}
    return {name: ones[name] + 0.05 * torch.randn(*shape, generator=generator)
            for name, shape in shapes.items()}  # fmt: skip


def timm_features(state: dict[str, Tensor], x: Tensor, patch: int) -> Tensor:
    """The class token of a pre-norm ViT with 6 heads, a second implementation."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, [384], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    tokens = linear(F.unfold(x, patch, stride=patch).mT, "patch_embed.proj")
    tokens = torch.cat([state["cls_token"].expand(len(x), 1, 384), tokens], dim=1)
    tokens = tokens + state["pos_embed"]
    for block in (f"blocks.{i}." for i in range(12)):
        qkv = linear(norm(tokens, f"{block}norm1"), f"{block}attn.qkv")
        q, k, v = qkv.unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)  # [n, 6, L, 64]
        mixed = (q @ k.mT / 8).softmax(dim=-1) @ v
        tokens = tokens + linear(mixed.transpose(1, 2).flatten(2), f"{block}attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"{block}norm2"), f"{block}mlp.fc1"))
        tokens = tokens + linear(hidden, f"{block}mlp.fc2")
    return norm(tokens, "norm")[:, 0]


def usb_file(path: Path, state: dict[str, Tensor]) -> str:
    """A file as the USB release holds them: under "model", perhaps with "module." and a head."""
    state = state | {"head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)}
    state = {f"module.{name}": weight for name, weight in state.items()}
    torch.save({"model": state, "epoch": 7}, path)
    return str(path)


@pytest.mark.parametrize("name, size, patch", VITS)
def test_a_published_weight_file_gives_the_features_of_timms_layout(tmp_path, name, size, patch):
    state, student = timm_weights(size, patch), build(name, size)
    load_weights(student.encoder, name, usb_file(tmp_path / "vit.pth", state))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, theirs = student.eval()(x)[2], timm_features(state, x, patch)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    with_head = state | {"head.weight": torch.zeros(7, 384)}
    save_file(with_head, tmp_path / "model.safetensors")  # as timm's hub files
    other = build(name, size)
    load_weights(other.encoder, name, str(tmp_path / "model.safetensors"))
    a, b = student.encoder.state_dict(), other.encoder.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a | b)


def test_positions_of_another_image_size_are_resized_and_the_class_token_kept(tmp_path):
    state, name = timm_weights(224, 16), "vit_small_patch16_224"
    rows = torch.arange(14.0).repeat_interleave(14)  # a ramp over the rows
    state["pos_embed"][0, 1:] = rows[:, None]
    student = build(name, 96)
    load_weights(student.encoder, name, usb_file(tmp_path / "vit.pth", state))
    positions = student.encoder.model.encoder.pos_embedding[0].detach()
    assert torch.equal(positions[0], state["pos_embed"][0, 0])
    grid = positions[1:].view(6, 6, 384)
    assert (grid - grid[:, :1, :1]).abs().max() < 1e-4  # equal along each row
    steps = grid[:, 0, 0].diff()
    assert (steps > 1).all() and grid.min() >= -1 and grid.max() <= 14  # and still a ramp
    assert student.eval()(torch.zeros(1, 3, 96, 96))[0].shape == (1, 10)


def test_the_vit_is_the_published_one():
    for (name, size, _), millions in zip(VITS, (21.48, 21.74), strict=True):
        student = build(name, size, 100 if size == 32 else 102)
        student.add_kd_head()
        assert round(sum(p.numel() for p in student.parameters()) / 1e6, 2) == millions
    vit = student.encoder.model
    drops = [module for module in vit.modules() if isinstance(module, StochasticDepth)]
    assert [round(drop.p, 4) for drop in drops] == [round(0.2 * i / 11, 4) for i in range(12)]
    assert all(drop.mode == "row" for drop in drops) and not vit.encoder.pos_embedding.any()
    assert {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert not any(module.p for module in vit.modules() if isinstance(module, nn.Dropout))
    layer, x = vit.encoder.layers[11], torch.randn(400, 2, 384)
    drops[11].p = 0.5
    branches = (layer.train()(x) - x).flatten(1)
    untouched = (branches == 0).all(dim=1).float().mean()  # both branches dropped, of whole rows
    assert 0.15 < untouched < 0.35
    assert torch.equal(layer.eval()(x), layer(x))


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_weight_files_that_do_not_fit_are_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = build("wrn_28_2").encoder
    state = encoder.state_dict()
    Path("damaged.pth").write_bytes(b"PK damaged")
    files = {"attack": {"model": Attack()}, "list": [1, 2], "more": state | {"x": torch.ones(1)}}
    files |= {"fewer": dict(list(state.items())[1:]), "shape": state | {"bn.bias": torch.ones(1)}}
    for name, content in files.items():
        torch.save(content, f"{name}.pth")
    for name in ("damaged.pth", "nowhere.pth", "nowhere.safetensors", *map("{}.pth".format, files)):
        with pytest.raises(UserError, match=f"--weights {name}.*--weights none to start") as caught:
            load_weights(encoder, "wrn_28_2", name)
        assert "\n" not in str(caught.value)
    assert not Path("attacked").exists()


def test_published_weights_are_downloaded_or_refused(tmp_path, monkeypatch, web):  # noqa: F811
    name, state = VITS[0][0], timm_weights(32, 2)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(common.WEIGHTS, name, "http://127.0.0.1:9/vit.pth")  # nobody listens
    encoder = build(name).encoder
    with pytest.raises(UserError, match=f"^--weights {name}.*--weights none to start[^\n]*$"):
        load_weights(encoder, name, None)
    usb_file(web / "vit.pth", state)
    monkeypatch.setitem(common.WEIGHTS, name, url_of(web / "vit.pth"))
    load_weights(encoder, name, None)
    assert torch.equal(encoder.model.encoder.ln.bias, state["norm.bias"])


def test_efficientnet_is_torchvisions_and_takes_its_weight_file(tmp_path):
    from torchvision.models import efficientnet_b0

    torch.manual_seed(0)
    model = efficientnet_b0().eval()
    assert sum(p.numel() for p in model.parameters()) == 5_288_548
    torch.save(model.state_dict(), tmp_path / "b0.pth")
    student = build("efficientnet_b0", 64)
    load_weights(student.encoder, "efficientnet_b0", str(tmp_path / "b0.pth"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.avgpool(model.features(x)).flatten(1)
        torch.testing.assert_close(student.eval()(x)[2], expected)


@pytest.mark.parametrize("backbone, size, channels", [
    ("cnn", 8, 1), ("cnn", 28, 1), ("wrn_28_2", 32, 3), ("efficientnet_b0", 64, 3),
    ("vit_small_patch2_32", 32, 3),
])  # fmt: skip
def test_backbones_have_heads_gradients_and_the_published_size(backbone, size, channels):
    torch.manual_seed(0)
    student = build(backbone, size, channels=channels)
    student.add_kd_head()
    logits, logits_kd, features = student(torch.randn(8, channels, size, size))
    assert logits.shape == logits_kd.shape == (8, 10)
    assert features.shape == (8, student.encoder.num_features)
    assert not torch.equal(student.head.weight, student.kd_head.weight)  # a new head, not a copy
    (logits.square().sum() + logits_kd.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())  # C5
    assert student.encoder.batch_statistics == (not backbone.startswith("vit"))
    if backbone == "wrn_28_2":
        student.kd_head = None
        assert sum(p.numel() for p in student.parameters()) == 1_467_610


def image_model(kind: str) -> nn.Module:
    """By kind of output: class token, pooled CLIP, mean of tokens, maps of convolutions."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32}
    vision = small | {"image_size": 32, "patch_size": 16}
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**vision, num_labels=3))
    if kind == "clip":
        text = small | {"vocab_size": 99}
        return t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text))
    if kind == "swin":
        shape = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
        return t.SwinModel(t.SwinConfig(image_size=32, patch_size=4, **shape))
    shape = {"hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return t.ResNetModel(t.ResNetConfig(embedding_size=8, **shape))


@pytest.mark.parametrize("kind", ["vit", "clip", "swin", "resnet"])
def test_any_image_model_of_transformers_is_a_backbone_and_read_back_without_it(tmp_path, kind):
    model, folder = image_model(kind).eval(), tmp_path / kind
    model.save_pretrained(folder)
    student = build(str(folder), num_classes=2).eval()
    load_weights(student.encoder, str(folder), None)
    x = torch.randn(2, 3, 32, 32)
    inner = {"vit": "vit", "clip": "vision_model"}.get(kind)
    with torch.no_grad():
        hidden = (getattr(model, inner) if inner else model)(x).last_hidden_state
        mean = hidden.mean(dim=(2, 3) if kind == "resnet" else 1)
        logits, _, features = student(x)
    torch.testing.assert_close(features, hidden[:, 0] if kind in ("vit", "clip") else mean)
    assert logits.shape == (2, 2) and student.encoder.batch_statistics == (kind == "resnet")
    gray = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(student(gray)[0], student(gray.expand(2, 3, 32, 32))[0])
    groups = optimizer_of(student, "sgd", 1.0, 0.1, 0.5).param_groups
    scales = {group["lr_scale"] for group in groups}
    assert {1.0, 0.5, 0.25, 0.125} <= scales
    config = {"backbone": str(folder), "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    config |= {"classes": ["cat", "dog"], "num_extra": 0}
    common.save_student(tmp_path / "student", student, config)
    shutil.rmtree(folder)
    again, _ = common.load_student(tmp_path / "student")
    assert torch.equal(again(x)[0], student(x)[0])


def tried(folder, model, size=32):
    """Build a student of a saved model and try it on two pictures."""
    model.save_pretrained(folder)
    pictures = np.random.RandomState(0).randint(0, 255, (2, 3, size, size), dtype=np.uint8)
    preset = common.Preset(size=size)
    split = common.Split(pictures, np.zeros(2, int))
    views = common.Views(split, preset, "cnn", torch.device("cpu"))
    return common.build_student(str(folder), preset, 2, weights=None, parts=(views,))


def test_a_model_that_draws_patches_in_evaluation_is_refused_before_training(tmp_path):
    import transformers as t

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.ViTMAEConfig(**shape, intermediate_size=32, image_size=32, patch_size=4)
    with pytest.raises(UserError, match="mae cannot be used .*its answers are random"):
        tried(tmp_path / "mae", t.ViTMAEModel(config))
    tried(tmp_path / "vit", image_model("vit"))  # a usual one is taken


def test_a_pooling_head_of_the_model_itself_is_not_dropped_as_a_classifier(tmp_path):
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32}
    vision, text = small | {"image_size": 32, "patch_size": 8}, small | {"vocab_size": 100}
    torch.manual_seed(0)
    model = t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))
    student = tried(tmp_path / "siglip", model)
    for name, weight in model.vision_model.state_dict().items():
        assert torch.equal(student.encoder.model.state_dict()[name], weight), name


def test_a_part_that_transformers_cannot_load_alone_is_refused(tmp_path):
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32}
    vision, text = small | {"image_size": 32, "patch_size": 8}, small | {"vocab_size": 100}
    config = t.BlipConfig(vision_config=vision, text_config=text)
    with pytest.raises(UserError, match="blip cannot be .*could not load its vision model again"):
        tried(tmp_path / "blip", t.BlipModel(config))


def test_a_name_that_is_no_model_for_images_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text").mkdir()
    bert = {"model_type": "bert", "hidden_size": 12, "num_attention_heads": 2}
    (tmp_path / "text" / "config.json").write_text(json.dumps(bert | {"num_hidden_layers": 1}))
    names = [("vit_huge", 32), (str(tmp_path / "text"), 32), (str(tmp_path), 32)]
    for name, size in (*names, ("vit_small_patch16_224", 28)):  # patches of 16 pixels
        with pytest.raises(UserError, match=f"--backbone {name} cannot be used") as caught:
            build(name, size)
        assert "\n" not in str(caught.value) and "vit_small_patch2_32" in str(caught.value)


def test_layer_decay_makes_the_published_fourteen_groups():
    student = build("vit_small_patch2_32", num_classes=100)
    student.add_kd_head()
    groups = optimizer_of(student, "adamw", 5e-4, 5e-4, 0.5).param_groups
    names = {id(p): name for name, p in student.named_parameters()}
    row_of = {names[id(p)]: group for group in groups for p in group["params"]}
    scale = {name: group["lr_scale"] for name, group in row_of.items()}
    assert len(scale) == len(names) and len(set(scale.values())) == 14
    model, blocks = "encoder.model.", "encoder.model.encoder.layers.encoder_layer_"
    assert scale["head.weight"] == scale["kd_head.bias"] == 1.0
    assert scale[f"{blocks}11.mlp.0.weight"] == scale[model + "encoder.ln.weight"] == 0.5
    assert scale[f"{blocks}0.self_attention.in_proj_weight"] == 0.5**12
    whole = {model + "class_token", model + "encoder.pos_embedding"}
    for name in whole | {model + "conv_proj.weight"}:
        assert 5e-4 * scale[name] == pytest.approx(6.1e-8, rel=1e-2)
    spared = {name for name, group in row_of.items() if group["weight_decay"] == 0}
    assert spared == whole | {name for name, p in student.named_parameters() if p.ndim == 1}
    assert {group["weight_decay"] for group in groups} == {0.0, 5e-4}
    groups = optimizer_of(build("cnn", 8), "sgd", 1e-3, 0.1, 1.0).param_groups
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.1), (1.0, 0.0)]


@pytest.mark.parametrize("dataset, backbone, num_labels", [
    ("cifar100", "vit_small_patch2_32", 100), ("flowers102", "vit_small_patch16_224", 102),
    ("food101", "efficientnet_b0", 101),
])  # fmt: skip
def test_two_steps_of_published_sets(monkeypatch, web, dataset, backbone, num_labels):  # noqa: F811
    foods, root = [f"food_{i:03d}" for i in range(101)], web.parent / "data"
    foods = {"train": foods, "test": foods[:2]}
    {
        "cifar100": lambda: test_images.make_cifar(monkeypatch, web, "cifar100", with_test=3),
        "flowers102": lambda: test_images.make_flowers102(monkeypatch, web, num_test=2),
        "food101": lambda: test_images.make_food101(monkeypatch, web, foods, 1),
    }[dataset]()
    data = common.load_data(dataset, str(root))
    teacher = np.eye(num_labels)[np.arange(len(data.train)) % num_labels]
    write_labels(root / "labels.jsonl", header_of(data, "train", "test", "made up"), teacher)
    batch = 2 if backbone == "efficientnet_b0" else 1  # batch statistics of one are none
    result = zeromatch.main(zeromatch.Args(
        dataset=dataset, data_dir=str(root), runs_dir=str(root / "runs"), num_labels=num_labels,
        pseudolabels=str(root / "labels.jsonl"), num_steps=2, num_steps_stage1=1, uratio=1,
        batch_size=batch, device="cpu", weights="none",
    ))  # fmt: skip
    assert result["measured"] == "test_acc" and 0 <= result["test_acc"] <= 100
    student, config = common.load_student(next(root.glob("runs/*/student")))
    assert config["backbone"] == backbone and len(config["classes"]) == num_labels
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("kind", ["GPT2", "XLM", "Albert"])
def test_layer_decay_finds_blocks_of_any_name_or_is_refused(kind, capsys):
    sizes = {"GPT2": dict(n_embd=8, n_head=2, n_layer=3, vocab_size=9)}
    sizes["XLM"] = dict(emb_dim=8, n_heads=2, n_layers=3, vocab_size=9)
    sizes["Albert"] = dict(hidden_size=8, embedding_size=4, num_attention_heads=2, vocab_size=9)
    encoder = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**sizes[kind])
    )
    encoder.num_features = 8
    student = common.Student(encoder, 2)
    if kind == "Albert":  # one block, used again and again
        with pytest.raises(UserError, match="--layer-decay: this backbone has no list of blocks"):
            optimizer_of(student, "sgd", 1.0, 0.1, 0.5)
        return
    groups = optimizer_of(student, "sgd", 1.0, 0.1, 0.5).param_groups
    assert {group["lr_scale"] for group in groups} == {1, 0.5, 0.25, 0.125, 0.0625}
    assert "over 3 blocks" in capsys.readouterr().out


@pytest.mark.parametrize("side, batch", [(8, 500), (32, 500), (96, 91), (256, 26)])
def test_evaluation_takes_few_large_pictures_at_a_time(side, batch):
    x = np.zeros((1, 1 if side == 8 else 3, side, side), np.uint8)
    split = common.Split(x, np.zeros(1, np.int64))
    preset = common.preset_of("cifar10")._replace(size=side)
    views = common.Views(split, preset, "cnn", torch.device("cpu"))
    assert views.batch == batch


def test_layer_decay_takes_the_stages_of_a_hierarchical_encoder(capsys):
    sizes = dict(image_size=32, patch_size=2, embed_dim=8, window_size=2, num_heads=[1, 1, 1])
    encoder = transformers.SwinModel(transformers.SwinConfig(depths=[1, 1, 4], **sizes))
    encoder.num_features = 32
    groups = optimizer_of(common.Student(encoder, 2), "sgd", 1.0, 0.1, 0.5).param_groups
    assert {group["lr_scale"] for group in groups} == {1, 0.5, 0.25, 0.125, 0.0625}
    assert "over 3 blocks" in capsys.readouterr().out
