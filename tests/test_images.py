"""Image data: sources and downloads, loaders in their real on-disk formats, own pictures, 224-pixel geometry."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import RandomResizedCrop

import common
import zeromatch
from common import UserError, Views, load_data, preset_of


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth random RGB picture, so that JPEG changes it little."""
    noise = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def adopt(monkeypatch, name: str, *files: Path) -> None:
    """Let SOURCES[name] expect the checksums of these files, in its order."""
    rows = [(url, md5(file), *rest) for (url, _, *rest), file in zip(common.SOURCES[name], files, strict=True)]
    monkeypatch.setitem(common.SOURCES, name, rows)


def tar(folder: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


def zipped(folder: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(folder.rglob("*.*")):
            out.write(file, file.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


# ---------------------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """/cut ends in the middle, /wrong has other bytes, /right the right ones, /gone is no file."""

    content = bytes(range(256)) * 4096

    def do_GET(self):
        if self.path == "/gone":
            return self.send_error(404)
        body = self.content if self.path != "/wrong" else self.content[::-1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_cut_or_wrong_download_gives_one_line_and_leaves_nothing_and_then_the_right_one_is_kept(address, tmp_path):
    path, right = tmp_path / "data" / "file.bin", hashlib.md5(Server.content).hexdigest()
    for name, checksum, reason in (
        ("cut", right, "ended after 524288 of 1048576 bytes"),
        ("cut", None, "ended after 524288 of 1048576 bytes"),
        ("wrong", right, "checksum"),
        ("wrong", hashlib.sha256(Server.content).hexdigest(), "checksum"),
        ("gone", right, "404"),
    ):
        with pytest.raises(UserError) as caught:
            common.fetch(f"{address}/{name}", path, checksum)
        assert f"{address}/{name}" in str(caught.value) and reason in str(caught.value)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert list(path.parent.iterdir()) == []
    common.fetch(f"{address}/right", path, right)
    assert path.read_bytes() == Server.content and list(path.parent.iterdir()) == [path]
    common.fetch(f"{address}/gone", path, hashlib.sha256(Server.content).hexdigest())  # is there: nothing is asked for


def test_a_damaged_file_put_there_by_hand_is_refused(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="delete it"):
        common.fetch("http://127.0.0.1:9/file.bin", path, "0" * 32)


def test_the_headline_command_without_a_network_ends_in_one_line_with_code_2(monkeypatch, tmp_path, capsys):
    url = "http://127.0.0.1:9/cifar-100-python.tar.gz"  # nobody listens there
    monkeypatch.setitem(common.SOURCES, "cifar100", [(url, "0" * 32, "", "cifar-100-python")])
    command = ["zeromatch.py", "--dataset", "cifar100", "--num-labels", "100", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    start = time.perf_counter()
    with pytest.raises(SystemExit) as caught:
        common.cli(zeromatch.Args, zeromatch.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and url in error
    assert time.perf_counter() - start < 10


def test_an_archive_without_the_expected_folder_or_an_interrupted_unpacking_leaves_no_folder(monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("x")
    archive = tar(tmp_path / "other", tmp_path / "cifar-100-python.tar.gz")
    adopt(monkeypatch, "cifar100", archive)
    with pytest.raises(UserError, match="cifar-100-python.tar.gz"):
        load_data("cifar100", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


# ---------------------------------------------------------------------------- published sets


def make_cifar(monkeypatch, root: Path, name: str, per_class: int = 1, with_test: int = 10) -> None:
    """The pickled batches of CIFAR in their archive, with random pixels."""
    kind = getattr(torchvision.datasets, name.upper())
    folder, key, rng = root / kind.base_folder, kind.meta["key"], np.random.RandomState(0)
    folder.mkdir(parents=True)
    names = [f"class_{i:02d}" for i in range(100 if name == "cifar100" else 10)]
    lists = {}
    for attribute, n in (("train_list", per_class * len(names)), ("test_list", with_test)):
        files = [file for file, _ in getattr(kind, attribute)]
        pixels = np.array_split(rng.randint(0, 256, (n, 3072), dtype=np.uint8), len(files))
        labels = np.array_split(np.arange(n) % len(names), len(files))
        for file, x, y in zip(files, pixels, labels, strict=True):
            batch = {"data": x, "fine_labels" if name == "cifar100" else "labels": y.tolist()}
            (folder / file).write_bytes(pickle.dumps(batch))
        lists[attribute] = [[file, md5(folder / file)] for file in files]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({key: names}))
    meta = kind.meta | {"md5": md5(folder / kind.meta["filename"])}
    for attribute, value in (lists | {"meta": meta}).items():
        monkeypatch.setattr(kind, attribute, value)
    adopt(monkeypatch, name, tar(folder, root / kind.filename))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive(monkeypatch, tmp_path, name):
    make_cifar(monkeypatch, tmp_path, name, per_class=2)
    data = load_data(name, str(tmp_path))
    n = 2 * len(data.classes)
    pixels = np.random.RandomState(0).randint(0, 256, (n, 3072), dtype=np.uint8)  # the first numbers make_cifar draws
    np.testing.assert_array_equal(data.train.x, pixels.reshape(n, 3, 32, 32))
    np.testing.assert_array_equal(data.train.y, np.arange(n) % len(data.classes))
    assert len(data.test) == 10 and data.classes[:2] == ["class 00", "class 01"]
    assert data.train.y.dtype == np.int64


def test_svhn_joins_train_and_extra_and_ten_means_zero(monkeypatch, tmp_path):
    rng, files = np.random.RandomState(0), []
    made = {}
    for part, labels in (("train", [10, 1]), ("extra", [2, 10, 9]), ("test", [5, 10])):
        x = rng.randint(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        files.append(tmp_path / f"{part}_32x32.mat")
        savemat(files[-1], {"X": x, "y": np.array(labels, dtype=np.uint8)[:, None]})
        made[part] = x
    adopt(monkeypatch, "svhn", *files)
    rows = {part: [url, f"{part}_32x32.mat", md5(tmp_path / f"{part}_32x32.mat")]
            for part, (url, _, _) in torchvision.datasets.SVHN.split_list.items()}  # fmt: skip
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", rows)
    data = load_data("svhn", str(tmp_path))
    assert data.train.y.tolist() == [0, 1, 2, 0, 9] and data.test.y.tolist() == [5, 0]
    np.testing.assert_array_equal(data.train.x[3], made["extra"][:, :, :, 1].transpose(2, 0, 1))
    assert data.classes == list("0123456789")


def test_stl10_has_its_unlabeled_images_in_the_training_part(monkeypatch, tmp_path):
    folder, rng = tmp_path / "stl10_binary", np.random.RandomState(0)
    folder.mkdir()
    images = {part: rng.randint(0, 256, (n, 3, 96, 96), dtype=np.uint8)
              for part, n in (("train", 3), ("unlabeled", 2), ("test", 2))}  # fmt: skip
    for part, x in images.items():
        x.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # stored column by column
    np.array([10, 1, 2], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([3, 4], dtype=np.uint8).tofile(folder / "test_y.bin")
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    for attribute in ("train_list", "test_list"):
        rows = [[file, md5(folder / file)] for file, _ in getattr(torchvision.datasets.STL10, attribute)]
        monkeypatch.setattr(torchvision.datasets.STL10, attribute, rows)
    adopt(monkeypatch, "stl10", tar(folder, tmp_path / "stl10_binary.tar.gz"))
    data = load_data("stl10", str(tmp_path))
    assert data.train.y.tolist() == [9, 0, 1, -1, -1] and data.test.y.tolist() == [2, 3] and data.classes == names
    np.testing.assert_array_equal(data.train.x, np.concatenate([images["train"], images["unlabeled"]]))


FOODS = ["apple_pie", "waffles"]


def make_food101(monkeypatch, root: Path, names: dict[str, list[str]], each: int) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for at, part in enumerate(names):
        lists = {name: [f"{name}/{at}{i}" for i in range(each)] for name in reversed(names[part])}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(lists))
        for y, file in enumerate(file for name in names[part] for file in lists[name]):
            save(picture(1000 * at + y, 60, 40), folder / "images" / f"{file}.jpg", quality=95)
    adopt(monkeypatch, "food101", tar(folder, root / "food-101.tar.gz"))


def test_food101_is_squashed_for_training_and_cropped_for_evaluation(monkeypatch, tmp_path):
    make_food101(monkeypatch, tmp_path, {"train": FOODS, "test": FOODS}, 2)
    data = load_data("food101", str(tmp_path))
    assert data.classes == ["apple pie", "waffles"]
    labels = sorted(zip(data.train.files, data.train.y.tolist(), strict=True))
    assert [(Path(file).parent.name, y) for file, y in labels] == [
        ("apple_pie", 0), ("apple_pie", 0), ("waffles", 1), ("waffles", 1)]  # fmt: skip
    assert data.train.x.shape == (4, 3, 256, 256) and data.test.x.shape == (4, 3, 224, 224)
    for split, slow in ((data.train, squash), (data.test, short_side_and_center)):
        for file, x in zip(split.files, split.x, strict=True):
            np.testing.assert_array_equal(x.transpose(1, 2, 0), np.asarray(slow(Image.open(file))))


def squash(image: Image.Image) -> Image.Image:
    return image.resize((256, 256), Image.Resampling.BILINEAR)


def short_side_and_center(image: Image.Image) -> Image.Image:
    width, height = image.size
    scale = 256 / min(width, height)
    image = image.resize((int(width * scale + 1e-6), int(height * scale + 1e-6)), Image.Resampling.BILINEAR)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    return image.crop((left, top, left + 224, top + 224))


def make_flowers102(monkeypatch, root: Path, num_test: int = 102) -> list[int]:
    """Class c is image 2c + 1 (train or val) and 2c + 2 (test); returns the ids of the training part."""
    folder = root / "flowers-102"
    ids = np.arange(1, 205)
    for i in ids:
        save(picture(int(i), 32, 24), folder / "jpg" / f"image_{i:05d}.jpg")
    train, val, test = ids[0:100:2], ids[100::2], ids[1::2][:num_test]
    savemat(folder / "imagelabels.mat", {"labels": (ids + 1)[None] // 2})
    savemat(folder / "setid.mat", {"trnid": train[None], "valid": val[None], "tstid": test[None]})
    archive = tar(folder / "jpg", folder / "102flowers.tgz")
    adopt(monkeypatch, "flowers102", archive, folder / "imagelabels.mat", folder / "setid.mat")
    sums = {key: (file, md5(folder / file)) for key, (file, _) in torchvision.datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", sums)
    return [*train.tolist(), *val.tolist()]


def test_flowers102_trains_on_train_and_val(monkeypatch, tmp_path):
    ids = make_flowers102(monkeypatch, tmp_path)
    data = load_data("flowers102", str(tmp_path))
    assert [Path(file).name for file in data.train.files] == [f"image_{i:05d}.jpg" for i in ids]
    assert data.train.y.tolist() == list(range(102)) and data.test.y.tolist() == list(range(102))
    assert data.classes[0] == "pink primrose" and data.classes[48] == "oxeye daisy" and len(data.classes) == 102


def test_eurosat_keeps_the_last_fifth_of_every_class_for_test(monkeypatch, tmp_path):
    folder = tmp_path / "eurosat" / "2750"
    folders = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    ).split()
    for y, name in enumerate(folders):
        for i in range(1, 6):
            save(picture(10 * y + i, 64, 64), folder / name / f"{name}_{i}.jpg")
    adopt(monkeypatch, "eurosat", zipped(folder, tmp_path / "eurosat" / "EuroSAT.zip"))
    data = load_data("eurosat", str(tmp_path))
    assert data.train.x.shape == (40, 3, 32, 32) and data.test.x.shape == (10, 3, 32, 32)
    assert [Path(file).stem for file in data.test.files] == [f"{name}_5" for name in folders]
    assert data.test.y.tolist() == list(range(10))
    assert data.classes[2] == "brushland or shrubland" and data.classes[9] == "lake or sea" and len(data.classes) == 10


def test_resisc45_takes_its_test_part_from_the_list(monkeypatch, tmp_path):
    folder = tmp_path / "resisc45" / "NWPU-RESISC45"
    for y, name in enumerate(("airplane", "railway", "railway_station")):
        for i in (1, 2, 3):
            save(picture(10 * y + i, 256, 256), folder / name / f"{name}_{i:03d}.jpg")
    listed = folder.parent / "resisc45-test.txt"
    listed.write_text("railway_station_003.jpg\nairplane_002.jpg\nrailway_001.jpg\n")
    adopt(monkeypatch, "resisc45", zipped(folder, folder.parent / "NWPU-RESISC45.zip"), listed)
    data = load_data("resisc45", str(tmp_path))
    assert data.classes == ["airplane", "railway", "railway station"]
    assert data.train.y.tolist() == [0, 0, 1, 1, 2, 2] and data.test.y.tolist() == [0, 1, 2]
    assert [Path(file).name for file in data.test.files] == [
        "airplane_002.jpg", "railway_001.jpg", "railway_station_003.jpg"]  # fmt: skip


def test_a_damaged_unpacked_file_is_named_in_one_line(monkeypatch, tmp_path):
    make_cifar(monkeypatch, tmp_path, "cifar10")
    load_data("cifar10", str(tmp_path))
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cifar10 are damaged"):
        load_data("cifar10", str(tmp_path))


# ---------------------------------------------------------------------------- storing


def test_an_array_is_stored_once_again_after_a_change_and_never_half(tmp_path):
    source, path, calls = tmp_path / "source", tmp_path / "decoded" / "x.npy", []
    source.write_text("one")

    def make(file: Path) -> dict:
        calls.append(file)
        with open(file, "wb") as out:
            np.save(out, np.full(3, len(calls), np.uint8))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"n": len(calls)}

    def ask(recipe: str = "") -> tuple[int, int]:
        x, facts = common.stored(path, [source], recipe, make)
        return int(x[0]), facts["n"]

    assert ask() == (1, 1) and ask() == (1, 1)
    source.write_text("three")
    with pytest.raises(KeyboardInterrupt):
        ask()
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.json", "x.npy"]  # the old ones ...
    assert ask() == (3, 3)  # ... which are not taken for new
    stat = source.stat()
    source.write_text("seven")  # as long as before
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ask() == (4, 4) and ask("other recipe") == (5, 5)
    path.unlink()
    assert ask("other recipe") == (6, 6)


def test_too_little_room_gives_one_line_before_decoding(monkeypatch, tmp_path):
    make_food101(monkeypatch, tmp_path, {"train": FOODS, "test": FOODS}, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="0.0 GB needed, 0.0 GB free"):
        load_data("food101", str(tmp_path))
    assert list((tmp_path / "decoded").iterdir()) == []


# ---------------------------------------------------------------------------- own pictures


def test_pictures_of_every_mode_are_read_as_what_they_show(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8)
    red[:, :10] = (250, 0, 0)  # the left third is red, the rest black
    rgb = Image.fromarray(red)

    def pixels(name: str, image: Image.Image, **options) -> np.ndarray:
        return np.asarray(common.read_picture(save(image, tmp_path / name, **options))).astype(int)

    np.testing.assert_array_equal(pixels("rgb.png", rgb), red)
    np.testing.assert_array_equal(pixels("palette.png", rgb.quantize(8)), red)
    np.testing.assert_array_equal(pixels("palette.gif", rgb.quantize(8)), red)
    np.testing.assert_allclose(pixels("cmyk.jpg", rgb.convert("CMYK"), quality=100), red, atol=6)
    gray = np.arange(200, dtype=np.uint8).reshape(10, 20)
    for name, image in (
        ("gray.png", Image.fromarray(gray)),
        ("deep.png", Image.fromarray(gray.astype(np.uint16) * 257)),
        ("deep.tif", Image.fromarray(gray.astype(np.uint16) * 257)),
        ("gray_alpha.png", Image.merge("LA", [Image.fromarray(gray), Image.new("L", (20, 10), 255)])),
    ):
        np.testing.assert_array_equal(pixels(name, image), np.repeat(gray[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(pixels("bits.png", rgb.convert("1")).max(), 255)
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray((red[:, :, 0] > 0).astype(np.uint8) * 255))  # the black part is transparent
    expected = np.where(red.any(axis=2, keepdims=True), red, 255)
    np.testing.assert_array_equal(pixels("clear.png", clear), expected)
    index = rgb.quantize(8)
    np.testing.assert_array_equal(pixels("clear_index.png", index, transparency=index.getpixel((20, 5))), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = pixels("turned.png", rgb, exif=exif)
    assert turned.shape == (30, 20, 3)
    np.testing.assert_array_equal(turned, np.rot90(red, -1))


def make_folder(root: Path, each: int = 3, test: int = 0, classes: str = "cat dog", side: int = 90) -> Path:
    for y, name in enumerate(classes.split()):
        for i in range(each):
            save(picture(100 * y + i, side + 7 * i, side), root / "train" / name / f"{i:02d}.png")
        for i in range(test):
            save(picture(5000 + 100 * y + i, side, side), root / "test" / name / f"{i}.jpg")
    return root


def test_a_folder_of_pictures_of_every_mode_and_size(tmp_path, capsys):
    root = make_folder(tmp_path / "pets", test=2)
    for number, mode in enumerate(("L", "RGBA", "P", "LA", "1", "RGB")):
        at = root / "unlabeled" / ("deep/er" if number % 2 else "")
        save(picture(900 + number, 10 + 40 * number, 300 - 40 * number).convert(mode), at / f"{mode}.png")
    save(Image.fromarray(np.full((50, 3), 40_000, np.uint16)), root / "unlabeled" / "deep.tif")
    (root / "unlabeled" / "broken.jpg").write_bytes(b"no picture")
    (root / "unlabeled" / "cut.jpg").write_bytes((root / "test/cat/0.jpg").read_bytes()[:600])
    (root / "unlabeled" / ".DS_Store").write_bytes(b"x")
    save(picture(1, 50, 50), root / "train" / "cat" / ".thumbnails" / "x.png")
    data = load_data(str(root), str(tmp_path / "data"))
    said = capsys.readouterr().out
    assert data.name == "pets" and data.classes == ["cat", "dog"]
    assert data.train.y.tolist() == [0] * 3 + [1] * 3 + [-1] * 7 and data.test.y.tolist() == [0, 0, 1, 1]
    assert data.train.x.shape == (13, 3, 256, 256) and data.test.x.shape == (4, 3, 224, 224)
    assert "2 unreadable" in said and "broken.jpg" in said and "cut.jpg" in said and "DS_Store" not in said
    for file, x in zip(data.train.files, data.train.x, strict=True):  # the gaps of the unreadable ones are closed
        np.testing.assert_array_equal(x.transpose(1, 2, 0), np.asarray(squash(common.read_picture(file))))
    again = load_data(str(root), str(tmp_path / "data"))
    assert "unreadable" not in capsys.readouterr().out  # listed once
    np.testing.assert_array_equal(again.train.x, data.train.x)
    assert again.train.hashes() == data.train.hashes() and len(set(data.train.hashes())) == 13


def test_an_unreadable_labeled_picture_is_refused(tmp_path):
    root = make_folder(tmp_path / "pets", test=1)
    (root / "train" / "dog" / "zz.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 labeled pictures cannot be read: .*zz\.png"):
        load_data(str(root), str(tmp_path / "data"))
    assert not any("train" in file.name for file in (tmp_path / "data" / "decoded").iterdir())


def test_test_pictures_in_the_training_part_are_refused_with_the_count_however_they_are_saved(tmp_path):
    root = make_folder(tmp_path / "pets", test=2)
    (root / "unlabeled").mkdir()
    shutil.copy(root / "test/cat/0.jpg", root / "unlabeled/copy.jpg")
    save(Image.open(root / "test/dog/1.jpg"), root / "unlabeled/same_pixels.png")
    with pytest.raises(UserError, match="2 pictures of the training part are also in test/"):
        load_data(str(root), str(tmp_path / "data"))
    for file in (root / "unlabeled").iterdir():
        file.unlink()
    assert len(load_data(str(root), str(tmp_path / "data")).train) == 6
    shutil.copy(root / "train/cat/00.png", root / "test/cat/later.png")  # the stored training part is old by now
    with pytest.raises(UserError, match="1 pictures of the training part"):
        load_data(str(root), str(tmp_path / "data"))


def test_without_a_test_folder_a_fifth_is_held_out_or_nothing(tmp_path, capsys):
    root = make_folder(tmp_path / "pets", each=11)
    shutil.copytree(root / "train", root / "unlabeled")  # everything is in the pool once more
    data = load_data(str(root), str(tmp_path / "data"))
    said = capsys.readouterr().out
    assert "a fifth of train/ (4 pictures)" in said and "4 pictures equal to a held-out one" in said
    assert data.test.y.tolist() == [0, 0, 1, 1] and data.train.y.tolist() == [0] * 9 + [1] * 9 + [-1] * 18
    assert not set(data.test.hashes()) & set(data.train.hashes())
    few = load_data(str(make_folder(tmp_path / "few", each=9)), str(tmp_path / "data"))
    assert few.test is None and len(few.train) == 18 and "tested on nothing" in capsys.readouterr().out


def test_small_pictures_get_the_wrn_and_large_ones_the_vit(tmp_path):
    small, large = make_folder(tmp_path / "small", side=40), make_folder(tmp_path / "large", side=65)
    assert preset_of(str(small)).backbone == "wrn_28_2" and preset_of(str(small)).size == 32
    assert preset_of(str(large)).backbone == "vit_small_patch16_224" and preset_of(str(large)).size == 224
    assert preset_of(str(small), "vit_small_patch2_32").optimizer == "adamw"
    assert load_data(str(small), str(tmp_path / "data")).train.x.shape[1:] == (3, 32, 32)


def test_a_folder_of_another_structure_is_refused_with_what_is_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="train/<class>/"):
        load_data(str(tmp_path / "empty"), str(tmp_path / "data"))
    root = make_folder(tmp_path / "pets")
    (root / "train" / "horse").mkdir()
    with pytest.raises(UserError, match="wrong: horse"):
        load_data(str(root), str(tmp_path / "data"))
    (root / "train" / "horse").rmdir()
    make_folder(root, test=1, classes="cat cow")
    shutil.rmtree(root / "train" / "cow")
    with pytest.raises(UserError, match="wrong: cow"):
        load_data(str(root), str(tmp_path / "data"))
    with pytest.raises(UserError, match="a folder with pictures"):
        load_data(str(tmp_path / "nowhere"), str(tmp_path / "data"))


def test_zero_labels_means_every_known_label():
    y = np.array([1, -1, 0, 1, -1])
    assert common.draw_labeled(y, 0, 2, seed=3).tolist() == [0, 2, 3]
    with pytest.raises(UserError, match="0: all labels"):
        common.draw_labeled(y, 3, 2, seed=3)


# ---------------------------------------------------------------------------- geometry


def images(n: int, side: int = 256) -> torch.Tensor:
    """Random pictures with fine and coarse detail."""
    rng, out = np.random.RandomState(5), []
    for i in range(n):
        coarse = np.asarray(picture(i, side, side)).astype(int)
        out.append((coarse + rng.randint(-30, 31, coarse.shape)).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())


def slow_resized_crop(x: torch.Tensor, u: list[float], u_area: list[float]) -> np.ndarray:
    """torchvision's rule in a loop, Pillow's crop and resize: [C, H, W] uint8 -> [C, 224, 224] int."""
    _, height, width = x.shape
    h, w = height, width
    for k in range(0, 20, 2):
        area = height * width * (0.08 + 0.92 * u_area[k])
        ratio = math.exp(math.log(3 / 4) + u_area[k + 1] * (math.log(4 / 3) - math.log(3 / 4)))
        tried_w, tried_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tried_w <= width and tried_h <= height:
            h, w = tried_h, tried_w
            break
    top, left = int(u[0] * (height - h + 1)), int(u[1] * (width - w + 1))
    image = Image.fromarray(x.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
    out = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
    return (out[:, ::-1] if u[2] < 0.5 else out).transpose(2, 0, 1)


def test_a_resized_crop_equals_pillows():
    torch.manual_seed(0)
    x, u, u_area = images(24), torch.rand(24, 3), torch.rand(24, common.AREA_DRAWS)
    u_area[0, ::2] = 0.999  # square enough for none of the ten tries: the whole image
    u_area[0, 1::2] = 0.0
    out = common.random_resized_crop(x, u, u_area, 224, 1)
    assert out.dtype == torch.uint8 and out.shape == (24, 3, 224, 224)
    slow = np.stack([slow_resized_crop(*row) for row in zip(x, u.tolist(), u_area.tolist(), strict=True)])
    difference = np.abs(out.numpy().astype(int) - slow)
    # Pillow's weights are integers / 2^22: where a value is a half, the last digit decides in each direction.
    assert difference.max() <= 2 and (difference <= 1).mean() > 0.9999 and (difference == 0).mean() > 0.9
    whole = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BILINEAR)
    mirrored = np.asarray(whole)[:, ::-1] if u[0, 2] < 0.5 else np.asarray(whole)
    assert np.abs(out[0].permute(1, 2, 0).numpy().astype(int) - mirrored).max() <= 2


def test_a_resized_crop_that_enlarges_equals_pillows():
    x, u = images(8, side=100), torch.rand(8, 3, generator=torch.Generator().manual_seed(1))
    u_area = torch.full((8, common.AREA_DRAWS), 0.3)
    slow = np.stack([slow_resized_crop(*row) for row in zip(x, u.tolist(), u_area.tolist(), strict=True)])
    assert np.abs(common.random_resized_crop(x, u, u_area, 224, 1).numpy().astype(int) - slow).max() <= 1


def test_resized_crops_are_drawn_like_torchvisions():
    torch.manual_seed(0)
    n = 1200
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 1, 256, 256)  # the gray value is the column
    theirs = torch.tensor([RandomResizedCrop.get_params(ramp[0], [0.08, 1], [3 / 4, 4 / 3]) for _ in range(n)]).float()
    x, rows = torch.cat([ramp, ramp.mT], dim=1).expand(200, -1, -1, -1), []
    for _ in range(n // 200):
        u, u_area = torch.rand(200, 3), torch.rand(200, common.AREA_DRAWS)
        out = common.random_resized_crop(x, u, u_area, 8, 0).float()
        w, h = (out[:, 0, 0, 6] - out[:, 0, 0, 1]) * 8 / 5, (out[:, 1, 6, 0] - out[:, 1, 1, 0]) * 8 / 5
        left, top = out[:, 0, 0, 1] - 1.5 * w / 8 + 0.5, out[:, 1, 1, 0] - 1.5 * h / 8 + 0.5
        rows.append(torch.stack([top, left, h, w], dim=1))
    mine = torch.cat(rows)
    area = [(crop[:, 2] * crop[:, 3]).sqrt()[:, None] for crop in (mine, theirs)]
    mine, theirs = torch.cat([mine, area[0]], dim=1), torch.cat([theirs, area[1]], dim=1)
    for quantile in (0.1, 0.5, 0.9):  # twice the standard error of a median of 1,200 is about 4 pixels
        assert (mine.quantile(quantile, dim=0) - theirs.quantile(quantile, dim=0)).abs().max() < 8
    assert (mine.mean(dim=0) - theirs.mean(dim=0)).abs().max() < 5


def preset_224() -> common.Preset:
    return preset_of("flowers102")


def test_every_image_of_a_batch_has_its_own_parameters_and_views_depend_on_nothing_else():
    torch.manual_seed(0)
    x, u = images(5), torch.rand(5, common.STRONG_DRAWS + common.AREA_DRAWS)
    whole = common.strong_augment(x, u, 224, 0, 1)
    for i in (0, 3, 4):
        alone = common.strong_augment(x[i : i + 1], u[i : i + 1], 224, 0, 1)
        assert (whole[i].int() - alone[0].int()).abs().max() <= 1  # matrix products may round in another order
    same = common.strong_augment(x[:1].expand(5, -1, -1, -1), u, 224, 0, 1)
    assert len({bytes(row.numpy()) for row in same}) == 5


def test_weak_and_plain_views_of_a_256_pixel_store_are_cut_from_it():
    x = images(3)
    views = Views(common.Split(x.numpy(), np.zeros(3, np.int64)), preset_224(), torch.device("cpu"))
    idx = torch.arange(3)
    plain = views.plain(idx)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preset_224().mean, preset_224().std))
    torch.testing.assert_close(plain, (x[:, :, 16:240, 16:240] / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    u = torch.tensor([[0.0, 0.0, 0.9], [0.999, 0.999, 0.1], [0.5, 0.25, 0.9]])
    weak = common.weak_augment(x, u, 224, 0, 1)
    assert torch.equal(weak[0], x[0, :, :224, :224]) and torch.equal(weak[1], x[1, :, 32:, 32:].flip(2))
    assert torch.equal(weak[2], x[2, :, 16:240, 8:232])
    assert views.weak(idx).shape == views.strong(idx).shape == (3, 3, 224, 224)


def test_eurosat_is_also_turned_upside_down():
    x = images(4, side=32)
    u = torch.tensor([[0.5, 0.5, v] for v in (0.1, 0.3, 0.6, 0.8)])  # the four combinations, one quarter each
    out = common.crop_and_flip(x, u, 32, 4, preset_of("eurosat").flip)
    for i, dims in enumerate(([1, 2], [2], [1], [])):
        assert torch.equal(out[i], x[i].flip(dims))


# ---------------------------------------------------------------------------- presets


def test_published_recipes_are_those_of_the_papers_configuration():
    for name, lr, decay, steps, warmup, every in (
        ("cifar100", 5e-4, 0.5, 204_800, 5_120, 2_048),
        ("flowers102", 1e-4, 0.65, 102_400, 2_560, 1_024),
        ("resisc45", 1e-4, 0.65, 102_400, 2_560, 1_024),
    ):
        row = preset_of(name)
        assert (row.lr, row.layer_decay, row.num_steps, row.num_steps_stage1) == (lr, decay, steps, steps)
        assert (row.warmup_steps, row.eval_every, row.batch_size, row.uratio) == (warmup, every, 16, 1)
        assert (row.optimizer, row.weight_decay, row.ema_decay, row.marginal_decay) == (
            "adamw",
            5e-4,
            0,
            0.999,
        )


def test_the_wrn_brings_its_classic_recipe():
    row = preset_of("cifar100", "wrn_28_2")
    assert (row.optimizer, row.lr, row.batch_size, row.uratio, row.num_steps) == ("sgd", 0.03, 64, 7, 2**20)
    assert row.weight_decay == 1e-3 and preset_of("svhn", "wrn_28_2").weight_decay == 5e-4
    assert row.size == 32 and row.mean == preset_of("cifar100").mean
    assert preset_of("digits", "wrn_28_2") == preset_of("digits")  # its short recipe is made for two cores
