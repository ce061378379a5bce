"""The batched views against Pillow, one image and one operation at a time."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import RandomResizedCrop

import common
from common import Split, Views, preset_of

CPU = torch.device("cpu")


def natural_images(n, channels, side, seed=0):
    """Smooth random images with noise, a flat one, a black one, one with a narrow range: uint8."""
    rng = np.random.RandomState(seed)
    coarse = torch.from_numpy(rng.randint(0, 256, (n, channels, 4, 4)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").numpy()
    images = np.clip(smooth + rng.randint(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    images[0], images[1] = 77, 0
    images[2] = 100 + images[2] // 32
    return torch.from_numpy(images)


def draws(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def to_pillow(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def from_pillow(image):
    return torch.from_numpy(np.array(image).reshape(*image.size[::-1], -1)).permute(2, 0, 1)


def pillow_affine(matrix):
    return lambda image, v: image.transform(image.size, Image.AFFINE, matrix(image, v))


# What the published code does with Pillow, operation by operation; v as drawn from the same range.
PILLOW = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Identity": lambda image, v: image,
    "Posterize": lambda image, v: ImageOps.posterize(image, max(1, int(v))),
    "Rotate": lambda image, v: image.rotate(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "ShearX": pillow_affine(lambda image, v: (1, v, 0, 0, 1, 0)),
    "ShearY": pillow_affine(lambda image, v: (1, 0, 0, v, 1, 0)),
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "TranslateX": pillow_affine(lambda image, v: (1, 0, v * image.size[0], 0, 1, 0)),
    "TranslateY": pillow_affine(lambda image, v: (1, 0, 0, 0, 1, v * image.size[1])),
}


def operate(name, x, v):
    """One of the operations on all images [n, C, H, W], with v [n]."""
    return common.RAND_AUGMENT[name][2](x, v[:, None, None, None])


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PILLOW)
def test_every_operation_is_pillows_up_to_rounding(name, channels, size):
    low, high, _ = common.RAND_AUGMENT[name]
    x = natural_images(24, channels, size)
    before, v = x.clone(), torch.linspace(low, high, len(x))
    ours = operate(name, x, v)
    rows = zip(x, v.tolist(), strict=True)
    theirs = torch.stack([from_pillow(PILLOW[name](to_pillow(row), value)) for row, value in rows])
    assert ours.dtype == torch.uint8 and ours.shape == x.shape and torch.equal(x, before)
    equal, off = (ours == theirs).float().mean(), (ours.int() - theirs.int()).abs().max()
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        assert equal >= 0.999  # positions between two pixels are rounded in another way
    elif name in ("AutoContrast", "Color", "Contrast"):  # torchvision rounds less
        assert off <= 2
    else:
        assert equal == 1
    # The operation changes images, except a gray image's color, and Equalize on 64 pixels, where
    # Pillow's integer step is 0.
    gray_color, too_small = name == "Color" and channels == 1, name == "Equalize" and size == 8
    assert (ours != x).any() != (name == "Identity" or gray_color or too_small)
    alone = torch.cat([operate(name, x[i : i + 1], v[i : i + 1]) for i in range(len(x))])
    assert torch.equal(ours, alone)  # every image has its own v


def test_rand_augment_applies_three_drawn_operations_in_order():
    names, x, u = sorted(PILLOW), natural_images(60, 3, 32), draws(60, 3, 2)
    assert sorted(common.RAND_AUGMENT) == names and len(names) == 14
    assert len((u[..., 0] * 14).long().unique()) == 14
    expected, before = [], x.clone()
    for image, row in zip(x.split(1), u, strict=True):
        for choice, magnitude in row:
            name = names[int(choice * 14)]
            low, high, _ = common.RAND_AUGMENT[name]
            image = operate(name, image, low + (high - low) * magnitude[None])
        expected.append(image)
    assert torch.equal(common.rand_augment(x, u), torch.cat(expected))
    assert torch.equal(x, before)  # the stored images are not changed


@pytest.mark.parametrize(
    "size, pad, flip", [(32, 4, 1), (32, 4, 0), (32, 4, 2), (32, 12, 1), (28, 0, 1)]
)
def test_the_weak_view_is_a_crop_with_reflected_border_and_a_flip(size, pad, flip):
    x, u = natural_images(60, 3, 32), draws(60, 3, seed=2)
    u[0], u[1, :2] = 0, 1 - 2**-24  # the first and the last crop
    ours = common.crop_and_flip(x, u, size, pad, flip)
    for image, (top, left, turn), out in zip(x.numpy(), u, ours.numpy(), strict=True):
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        places = 32 + 2 * pad - size + 1
        i, j = int(top * places), int(left * places)
        crop = image[:, i : i + size, j : j + size]
        crop = crop[:, :, ::-1] if flip and turn < 0.5 else crop
        upside_down = flip == 2 and int(turn * 4) % 2 == 0  # half of the mirrored and of the others
        np.testing.assert_array_equal(out, crop[:, ::-1] if upside_down else crop)


def test_cutout_box_has_the_drawn_side_is_clipped_and_gray_on_gray():
    x = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    # side 8 in the middle; side 16 at the corner; none
    u = torch.tensor([[0.5, 0.5, 0.5], [0.99, 0.0, 0.0], [0.0, 0.3, 0.3]])
    out = common.cutout(x, u)
    filled = (out == torch.tensor([125, 123, 114]).view(1, 3, 1, 1)).all(dim=1)
    assert filled.sum(dim=(1, 2)).tolist() == [8 * 8, 8 * 8, 0]
    assert filled[0, 12:20, 12:20].all() and filled[1, :8, :8].all()
    assert (out.amax(dim=1) > 0).sum() == filled.sum()  # nothing else was touched
    assert set(common.cutout(x[:1, :1], u[:1]).unique().tolist()) == {0, 123}


def strong_of(x, u, size, pad, flip):
    weak = common.crop_and_flip(x, u[:, :3], size, pad, flip)
    return common.cutout(common.rand_augment(weak, u[:, 3:9].unflatten(1, (3, 2))), u[:, 9:])


def test_the_strong_view_is_weak_view_operations_and_cutout_row_by_row():
    x, u = natural_images(40, 3, 32, seed=3), draws(40, 12, seed=3)
    strong, weak = strong_of(x, u, 32, 4, 1), common.crop_and_flip(x, u[:, :3], 32, 4, 1)
    assert (strong != weak).flatten(1).any(dim=1).float().mean() > 0.95
    alone = [strong_of(x[i : i + 1], u[i : i + 1], 32, 4, 1) for i in range(40)]
    assert torch.equal(strong, torch.cat(alone))
    views = Views(Split(x.numpy(), np.zeros(40, np.int64)), preset_of("cifar10"), "cnn", CPU)
    common.seed_step(0, "stage", 5)
    expected = views.normalized(strong_of(x, common.uniform(40, 12), 32, 4, 1))
    common.seed_step(0, "stage", 5)
    assert torch.equal(views.strong(torch.arange(40)), expected)


def test_strong_views_of_images_without_border_show_a_random_part():
    preset = preset_of("flowers102")._replace(size=24)
    x, idx = natural_images(8, 3, 28), torch.tensor([5, 2])
    views = Views(Split(x.numpy(), np.zeros(8, np.int64)), preset, "cnn", CPU)
    common.seed_step(0, "stage", 5)
    u, crop = common.uniform(2, 12), RandomResizedCrop(24)
    crops = torch.stack([crop(x[5]), crop(x[2])])
    expected = views.normalized(strong_of(crops, u, 24, 0, 1))
    common.seed_step(0, "stage", 5)
    assert torch.equal(views.strong(idx), expected)


@pytest.mark.parametrize("dataset, stored", [("digits", 8), ("flowers102", 256)])
def test_views_are_normalized_and_larger_images_cut(dataset, stored):
    preset = preset_of(dataset)
    x = natural_images(5, len(preset.mean), stored)
    views = Views(Split(x.numpy(), np.arange(5)), preset, "cnn", CPU)
    mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (preset.mean, preset.std))
    idx, edge = torch.tensor([3, 1]), (stored - preset.size) // 2
    part = x[idx][:, :, edge : stored - edge, edge : stored - edge]
    torch.testing.assert_close(views.plain(idx), (part / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    common.seed_step(0, "weak", 0)
    weak = common.crop_and_flip(x, common.uniform(5, 3), preset.size, preset.pad, preset.flip)
    common.seed_step(0, "weak", 0)
    expected = (weak / 255 - mean) / std
    torch.testing.assert_close(views.weak(torch.arange(5)), expected, atol=1e-5, rtol=1e-5)
    assert views.strong(idx).shape == views.plain(idx).shape and views.y.tolist() == [0, 1, 2, 3, 4]


def test_a_set_of_more_than_a_gibibyte_is_read_from_its_file(tmp_path):
    shape = (2**30 // 3072 + 1, 3, 32, 32)
    x = np.memmap(tmp_path / "x.raw", np.uint8, "w+", shape=shape)  # a sparse file of zeros
    views = Views(Split(x, np.zeros(len(x), np.int64)), preset_of("cifar10"), "cnn", CPU)
    x[-2] = 200  # later: seen only if nothing was copied
    pixels = views.pixels(torch.tensor([len(x) - 2, 0]))
    assert pixels.shape == (2, 3, 32, 32) and (pixels[0] == 200).all() and not pixels[1].any()
