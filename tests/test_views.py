"""The batched views against Pillow, one image and one operation at a time."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import common

SIZES = [(8, 8), (28, 28), (32, 32)]


def natural_images(n, channels, height, width, seed=0):
    """Smooth random images with noise, a flat one, a black one and one with a narrow range: uint8."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (n, 4, 4, channels)).astype(np.uint8)
    images = np.stack([
        np.asarray(Image.fromarray(c.squeeze()).resize((width, height), Image.BICUBIC)).reshape(height, width, channels)
        for c in coarse
    ])  # fmt: skip
    images = np.clip(images.astype(int) + rng.randint(-20, 21, images.shape), 0, 255).astype(np.uint8)
    images[0], images[1] = 77, 0
    images[2] = 100 + images[2] // 32
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_pillow(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def pillow_affine(coefficients):
    return lambda image, v: image.transform(image.size, Image.AFFINE, coefficients(image, v))


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
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def test_the_operations_are_the_published_fourteen():
    assert list(common.RAND_AUGMENT) == list(PILLOW) and len(PILLOW) == 14


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PILLOW)
def test_every_operation_equals_pillows(name, channels, size):
    low, high, operation = common.RAND_AUGMENT[name]
    x = natural_images(24, channels, *size)
    v = torch.linspace(low, high, len(x))
    ours = operation(x, v)
    theirs = torch.stack([
        torch.from_numpy(np.array(PILLOW[name](to_pillow(image), value)).reshape(*size, channels)).permute(2, 0, 1)
        for image, value in zip(x, v.tolist())
    ])  # fmt: skip
    assert ours.dtype == torch.uint8 and ours.shape == x.shape
    difference = (ours.int() - theirs.int()).abs()
    if name in GEOMETRIC:
        assert (difference == 0).float().mean() >= 0.99
    else:
        assert difference.max() <= 1
    # The comparison means something: the operation changes images, except a gray image's color, and
    # Equalize on 64 pixels, where Pillow's integer step is 0.
    idle = name == "Identity" or (name == "Color" and channels == 1) or (name == "Equalize" and size == (8, 8))
    assert (ours != x).any() != idle


def test_operations_use_each_images_own_parameter():
    x = natural_images(6, 3, 32, 32)
    for name, (low, high, operation) in common.RAND_AUGMENT.items():
        v = torch.linspace(low, high, 6)
        together = operation(x, v)
        alone = torch.cat([operation(x[i : i + 1], v[i : i + 1]) for i in range(6)])
        assert torch.equal(together, alone), name


def test_rand_augment_applies_three_drawn_operations_in_order():
    x = natural_images(10, 3, 32, 32)
    u = torch.rand(10, 3, 2, generator=torch.Generator().manual_seed(1))
    names = list(common.RAND_AUGMENT)
    expected = []
    for image, row in zip(x, u):
        image = image[None]
        for choice, magnitude in row:
            low, high, operation = common.RAND_AUGMENT[names[int(choice * 14)]]
            image = operation(image, torch.tensor([low + (high - low) * magnitude]))
        expected.append(image)
    before = x.clone()
    assert torch.equal(common.rand_augment(x, u), torch.cat(expected))
    assert torch.equal(x, before)  # the stored images stay


def test_weak_view_is_a_reflected_crop_and_a_mirror():
    x = natural_images(50, 3, 32, 32)
    u = torch.rand(50, 3, generator=torch.Generator().manual_seed(2))
    ours = common.weak_augment(x, u, size=32, pad=4, flip=True)
    for image, (top, left, mirror), out in zip(x, u, ours):
        padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        i, j = int(top * 9), int(left * 9)
        crop = padded[:, i : i + 32, j : j + 32]
        assert np.array_equal(out.numpy(), crop[:, :, ::-1] if mirror < 0.5 else crop)


def test_weak_view_never_mirrors_where_the_preset_says_so():
    x = natural_images(20, 1, 8, 8)
    center = torch.tensor([[0.5, 0.5, 0.1]]).expand(20, 3)  # row and column offset 0, mirror drawn
    assert torch.equal(common.weak_augment(x, center, 8, 1, flip=False), x)
    assert torch.equal(common.weak_augment(x, center, 8, 1, flip=True), x.flip(3))


def test_cutout_box_has_the_drawn_side_is_clipped_and_gray_on_gray():
    x = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    u = torch.tensor(
        [[0.5, 0.5, 0.5], [0.99, 0.0, 0.0], [0.0, 0.3, 0.3]]
    )  # side 8 in the middle; 16 at the corner; none
    out = common.cutout(x, u)
    filled = (out[:, 0] == 125) & (out[:, 1] == 123) & (out[:, 2] == 114)
    assert filled.sum(dim=(1, 2)).tolist() == [8 * 8, 8 * 8, 0]
    assert filled[0, 12:20, 12:20].all() and filled[1, :8, :8].all()
    assert (out[:, 0] > 0).sum() == filled.sum()  # nothing else was touched
    gray = common.cutout(x[:1, :1], u[:1])
    assert set(gray.unique().tolist()) == {0, 123}


def test_strong_view_differs_from_weak_and_is_a_function_of_its_draws():
    x = natural_images(40, 3, 32, 32, seed=3)
    u = torch.rand(40, common.STRONG_DRAWS, generator=torch.Generator().manual_seed(3))
    strong = common.strong_augment(x, u, 32, 4, True)
    assert torch.equal(strong, common.strong_augment(x, u, 32, 4, True))
    weak = common.weak_augment(x, u[:, :3], 32, 4, True)
    assert (strong != weak).flatten(1).any(dim=1).float().mean() > 0.95
    assert torch.equal(strong[7:9], common.strong_augment(x[7:9], u[7:9], 32, 4, True))  # rows are independent


def test_views_normalize_with_the_presets_statistics():
    preset = common.preset_of("digits")
    x = np.random.RandomState(0).randint(0, 256, (5, 1, 8, 8)).astype(np.uint8)
    views = common.Views(common.Split(x, np.zeros(5, np.int64)), preset, torch.device("cpu"))
    plain = views.plain(torch.tensor([3, 1]))
    assert torch.allclose(
        plain, torch.from_numpy((x[[3, 1]] / 255 - preset.mean[0]) / preset.std[0]).float(), atol=1e-5
    )
    assert views.weak(torch.arange(5)).shape == views.strong(torch.arange(5)).shape == (5, 1, 8, 8)


def test_preset_statistics_are_those_of_the_training_images():
    for name in ("digits",):
        data, preset = common.load_data(name, "data"), common.preset_of(name)
        pixels = data.train.x.transpose(1, 0, 2, 3).reshape(len(preset.mean), -1) / 255
        assert np.allclose(pixels.mean(axis=1), preset.mean, atol=2e-3)
        assert np.allclose(pixels.std(axis=1), preset.std, atol=2e-3)
