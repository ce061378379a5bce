"""Images: published sets in their real formats, served by this machine; own pictures."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

import common
import zeromatch
from common import UserError, load_data, preset_of


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


def pack(folder: Path, archive: Path) -> Path:
    """Move a folder into an archive, .zip or .tgz."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for file in sorted(folder.rglob("*.*")):
                out.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz") as out:
            out.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


def serve(monkeypatch, name: str, **values) -> None:
    """Let a class of torchvision.datasets find these addresses and checksums."""
    for attribute, value in values.items():
        monkeypatch.setattr(getattr(torchvision.datasets, name), attribute, value)


# ---------------------------------------------------------------------------- published sets
# Every maker writes what the publisher serves into `web` and points torchvision at it.


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder whose files this machine serves at `url_of`."""
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # a client that hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("WEB", f"http://127.0.0.1:{server.server_port}/")
    yield tmp_path / "web"
    server.shutdown()


def url_of(file: Path | str) -> str:
    return os.environ["WEB"] + Path(file).name


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def make_cifar(monkeypatch, web: Path, name: str, per_class: int = 1, with_test: int = 10):
    """The pickled batches of CIFAR in their archive; returns the training pixels, random ones."""
    kind = getattr(torchvision.datasets, name.upper())
    folder, key, rng = web / kind.base_folder, kind.meta["key"], np.random.RandomState(0)
    folder.mkdir(parents=True)
    names = [f"class_{i:02d}" for i in range(100 if name == "cifar100" else 10)]
    lists, made = {}, []
    for attribute, n in (("train_list", per_class * len(names)), ("test_list", with_test)):
        files = [file for file, _ in getattr(kind, attribute)]
        made.append(rng.randint(0, 256, (n, 3072), dtype=np.uint8))
        xs, ys = (np.array_split(a, len(files)) for a in (made[-1], np.arange(n) % len(names)))
        for file, x, y in zip(files, xs, ys, strict=True):
            batch = {"data": x, "fine_labels" if name == "cifar100" else "labels": y.tolist()}
            (folder / file).write_bytes(pickle.dumps(batch))
        lists[attribute] = [[file, md5(folder / file)] for file in files]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({key: names}))
    meta = kind.meta | {"md5": md5(folder / kind.meta["filename"])}
    archive = pack(folder, web / kind.filename)
    lists |= {"url": url_of(archive), "tgz_md5": md5(archive), "meta": meta}
    serve(monkeypatch, name.upper(), **lists)
    return made[0].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_and_read_from_its_archive(monkeypatch, web, root, name):
    made = make_cifar(monkeypatch, web, name, per_class=2)
    first = load_data(name, str(root))
    shutil.rmtree(web)
    for data in (first, load_data(name, str(root))):  # the second time without a download
        np.testing.assert_array_equal(data.train.x, made)
        np.testing.assert_array_equal(data.train.y, np.arange(len(made)) % len(data.classes))
        assert data.test.x.shape == (10, 3, 32, 32) and data.classes[:2] == ["class 00", "class 01"]
        assert data.train.y.dtype == np.int64 and len(set(data.train.hashes())) == len(made)


def test_fashion_mnist_comes_from_the_publisher(monkeypatch, web, tmp_path):
    rng, made, resources = np.random.RandomState(0), {}, []
    for name in (file for file, _ in torchvision.datasets.FashionMNIST.resources):
        n = 30 if name.startswith("train") else 10
        shape = (n, 28, 28) if "images" in name else (n,)
        made[name] = rng.randint(0, 10, shape).astype(np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
        (web / name).write_bytes(gzip.compress(header + made[name].tobytes()))
        resources.append((name, md5(web / name)))
    serve(monkeypatch, "FashionMNIST", mirrors=[url_of("")], resources=resources)
    data = load_data("fashion_mnist", str(tmp_path))
    for split, part in ((data.train, "train"), (data.test, "t10k")):
        np.testing.assert_array_equal(split.x[:, 0], made[f"{part}-images-idx3-ubyte.gz"])
        np.testing.assert_array_equal(split.y, made[f"{part}-labels-idx1-ubyte.gz"])
    assert data.classes[0] == "T-shirt/top" and len(data.classes) == 10


def test_svhn_joins_train_and_extra_and_ten_means_zero(monkeypatch, web, root):
    rng, made, rows = np.random.RandomState(0), {}, {}
    for part, labels in (("train", [10, 1]), ("extra", [2, 10, 9]), ("test", [5, 10])):
        made[part] = rng.randint(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        file = web / f"{part}_32x32.mat"
        savemat(file, {"X": made[part], "y": np.array(labels, np.uint8)[:, None]})
        rows[part] = [url_of(file), file.name, md5(file)]
    serve(monkeypatch, "SVHN", split_list=rows)
    data = load_data("svhn", str(root))
    assert data.train.y.tolist() == [0, 1, 2, 0, 9] and data.test.y.tolist() == [5, 0]
    train = np.concatenate([made["train"], made["extra"]], axis=3)
    np.testing.assert_array_equal(data.train.x, train.transpose(3, 2, 0, 1))
    assert data.classes == list("0123456789")


def test_stl10_has_its_unlabeled_images_in_the_training_part(monkeypatch, web, root):
    folder, rng = web / "stl10_binary", np.random.RandomState(0)
    folder.mkdir()
    made = {part: rng.randint(0, 256, (n, 3, 96, 96), dtype=np.uint8)
            for part, n in (("train", 3), ("unlabeled", 2), ("test", 2))}  # fmt: skip
    for part, x in made.items():
        x.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # stored column by column
    np.array([10, 1, 2], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([3, 4], dtype=np.uint8).tofile(folder / "test_y.bin")
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    kind = torchvision.datasets.STL10
    lists = {attribute: [[file, md5(folder / file)] for file, _ in getattr(kind, attribute)]
             for attribute in ("train_list", "test_list")}  # fmt: skip
    archive = pack(folder, web / kind.filename)
    serve(monkeypatch, "STL10", url=url_of(archive), tgz_md5=md5(archive), **lists)
    data = load_data("stl10", str(root))
    assert data.train.y.tolist() == [9, 0, 1, -1, -1] and data.test.y.tolist() == [2, 3]
    np.testing.assert_array_equal(data.train.x, np.concatenate([made["train"], made["unlabeled"]]))
    np.testing.assert_array_equal(data.test.x, made["test"])
    assert data.classes == names


FOODS = ["apple_pie", "waffles"]


def make_food101(monkeypatch, web: Path, names: dict[str, list[str]], each: int) -> None:
    folder = web / "food-101"
    (folder / "meta").mkdir(parents=True)
    for at, part in enumerate(names):
        lists = {name: [f"{name}/{at}{i}" for i in range(each)] for name in reversed(names[part])}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(lists))
        for y, file in enumerate(file for name in names[part] for file in lists[name]):
            image = picture(1000 * at + y, 60, 40)
            save(image, folder / "images" / f"{file}.jpg", quality=95)
    archive = pack(folder, web / "food-101.tar.gz")
    serve(monkeypatch, "Food101", _URL=url_of(archive), _MD5=md5(archive))


def squash(image: Image.Image) -> Image.Image:
    return image.resize((256, 256), Image.Resampling.BILINEAR)


def short_side_and_center(image: Image.Image) -> Image.Image:
    scale = 256 / min(image.size)
    sides = [int(side * scale + 1e-6) for side in image.size]
    left, top = (round((side - 224) / 2) for side in sides)
    image = image.resize(sides, Image.Resampling.BILINEAR)
    return image.crop((left, top, left + 224, top + 224))


def test_food101_is_squashed_for_training_and_cropped_for_evaluation(monkeypatch, web, root):
    make_food101(monkeypatch, web, {"train": FOODS, "test": FOODS}, 2)
    data = load_data("food101", str(root))
    assert data.classes == ["apple pie", "waffles"]
    for split, slow in ((data.train, squash), (data.test, short_side_and_center)):
        folders = [Path(file).parent.name for file in split.files]
        assert sorted(zip(folders, split.y.tolist(), strict=True)) == [
            ("apple_pie", 0), ("apple_pie", 0), ("waffles", 1), ("waffles", 1)]  # fmt: skip
        for file, x in zip(split.files, split.x, strict=True):
            np.testing.assert_array_equal(x.transpose(1, 2, 0), slow(Image.open(file)))


def make_flowers102(monkeypatch, web: Path, num_test: int = 102) -> list[int]:
    """Class c is image 2c + 1 (train or val) and 2c + 2 (test); returns the ids for training."""
    ids = np.arange(1, 205)
    for i in ids:
        save(picture(int(i), 32, 24), web / "jpg" / f"image_{i:05d}.jpg")
    train, val, test = ids[0:100:2], ids[100::2], ids[1::2][:num_test]
    savemat(web / "imagelabels.mat", {"labels": (ids + 1)[None] // 2})
    savemat(web / "setid.mat", {"trnid": train[None], "valid": val[None], "tstid": test[None]})
    pack(web / "jpg", web / "102flowers.tgz")
    files = torchvision.datasets.Flowers102._file_dict
    sums = {key: (file, md5(web / file)) for key, (file, _) in files.items()}
    prefix = url_of("")
    serve(monkeypatch, "Flowers102", _download_url_prefix=prefix, _file_dict=sums)
    return [*train.tolist(), *val.tolist()]


def test_flowers102_trains_on_train_and_val(monkeypatch, web, root):
    ids = make_flowers102(monkeypatch, web)
    data = load_data("flowers102", str(root))
    assert [Path(file).name for file in data.train.files] == [f"image_{i:05d}.jpg" for i in ids]
    assert data.train.y.tolist() == data.test.y.tolist() == list(range(102))
    assert data.classes[:49:48] == ["pink primrose", "oxeye daisy"] and len(data.classes) == 102


def test_eurosat_keeps_the_last_fifth_of_every_class_for_test(monkeypatch, web, root):
    folders = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop "
        "Residential River SeaLake"
    ).split()
    for y, name in enumerate(folders):
        for i in range(1, 6 + 5 * (y == 3)):  # one class is larger
            save(picture(20 * y + i, 64, 64), web / "2750" / name / f"{name}_{i}.jpg")
    archive = pack(web / "2750", web / "EuroSAT.zip")

    def download(url, download_root, md5):  # the address and checksum are no attributes here
        torchvision.datasets.utils.extract_archive(str(archive), download_root)

    monkeypatch.setattr("torchvision.datasets.eurosat.download_and_extract_archive", download)
    data = load_data("eurosat", str(root))
    assert data.train.x.shape == (44, 3, 32, 32) and data.test.x.shape == (11, 3, 32, 32)
    last = [f"{name}_{i}" for name in folders for i in ((8, 9) if name == "Highway" else (5,))]
    assert [Path(file).stem for file in data.test.files] == last  # by name, 10 comes before 2
    assert data.test.y.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert data.classes[2::7] == ["herbaceous vegetation", "sea lake"]


def test_resisc45_takes_its_test_part_from_the_list(monkeypatch, web, root):
    folder = web / "NWPU-RESISC45"
    for y, name in enumerate(("airplane", "railway", "railway_station")):
        for i in (1, 2, 3):
            save(picture(10 * y + i, 256, 256), folder / name / f"{name}_{i:03d}.jpg")
    tests = ["railway_station_003.jpg", "airplane_002.jpg", "railway_001.jpg"]
    (web / "resisc45-test.txt").write_text("\n".join(tests))
    pack(folder, web / "NWPU-RESISC45.zip")

    def snapshot_download(repo_id, repo_type, revision, allow_patterns, local_dir):
        assert repo_type == "dataset" and len(revision) == 40
        for pattern in allow_patterns:
            Path(local_dir).mkdir(parents=True, exist_ok=True)
            shutil.copy(web / pattern, local_dir)

    monkeypatch.setattr(common, "snapshot_download", snapshot_download)
    data = load_data("resisc45", str(root))
    assert data.classes == ["airplane", "railway", "railway station"]
    assert data.train.y.tolist() == [0, 0, 1, 1, 2, 2] and data.test.y.tolist() == [0, 1, 2]
    assert [Path(file).name for file in data.test.files] == [tests[1], tests[2], tests[0]]


@pytest.mark.parametrize("what", ["no file", "wrong checksum", "damaged"])
def test_what_cannot_be_downloaded_or_read_ends_in_one_line(monkeypatch, web, root, capsys, what):
    make_cifar(monkeypatch, web, "cifar100")
    archive = web / "cifar-100-python.tar.gz"
    if what == "no file":
        serve(monkeypatch, "CIFAR100", url="http://127.0.0.1:9/cifar.tar.gz")  # nobody listens
    elif what == "wrong checksum":
        archive.write_bytes(archive.read_bytes()[:-100])
    else:
        archive.write_bytes(b"no archive")
        serve(monkeypatch, "CIFAR100", tgz_md5=md5(archive))
    command = "zeromatch.py --dataset cifar100 --num-labels 100 --data-dir".split()
    monkeypatch.setattr(sys, "argv", [*command, str(root)])
    with pytest.raises(SystemExit) as caught:
        common.cli(zeromatch.Args, zeromatch.main)
    lines = capsys.readouterr().err.splitlines()  # among them a progress bar
    (error,) = (line for line in lines if "error:" in line.lower() or "Traceback" in line)
    assert caught.value.code == 2 and "cifar100 could not be downloaded or read" in error
    assert str(root) in error


# ---------------------------------------------------------------------------- own pictures


RED = np.zeros((20, 30, 3), np.uint8)
RED[:, :10] = (250, 0, 0)  # the left third is red, the rest black
RGB = Image.fromarray(RED)
PALETTE, CLEAR, EXIF = RGB.quantize(8), RGB.copy(), Image.Exif()
CLEAR.putalpha(Image.fromarray((RED[:, :, 0] > 0).astype(np.uint8) * 255))  # the black part
CLEAR_INDEX = {"transparency": PALETTE.getpixel((20, 5))}
EXIF[0x0112] = 6  # to be turned by 90 degrees clockwise
ON_WHITE = np.where(RED.any(axis=2, keepdims=True), RED, 255)
RAMP = np.arange(200, dtype=np.uint8).reshape(10, 20)
GRAY, DEEP = Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.uint16) * 257)
BITS = GRAY.convert("1")
MODES = {  # file name: (picture, options of saving, what it shows)
    "rgb.png": (RGB, {}, RED),
    "palette.png": (PALETTE, {}, RED),
    "palette.gif": (PALETTE, {}, RED),
    "cmyk.jpg": (RGB.convert("CMYK"), {"quality": 100}, RED),
    "bits.png": (BITS, {}, np.asarray(BITS)[:, :, None] * np.full(3, 255)),
    "gray.png": (GRAY, {}, RAMP[:, :, None].repeat(3, 2)),
    "deep.png": (DEEP, {}, RAMP[:, :, None].repeat(3, 2)),
    "deep.tif": (DEEP, {}, RAMP[:, :, None].repeat(3, 2)),
    "gray_alpha.png": (GRAY.convert("LA"), {}, RAMP[:, :, None].repeat(3, 2)),
    "clear.png": (CLEAR, {}, ON_WHITE),
    "clear_index.png": (PALETTE, CLEAR_INDEX, ON_WHITE),
    "turned.png": (RGB, {"exif": EXIF}, np.rot90(RED, -1)),
}


@pytest.mark.parametrize("name", MODES)
def test_a_picture_of_any_mode_is_read_as_what_it_shows(tmp_path, name):
    image, options, expected = MODES[name]
    read = common.read_picture(save(image, tmp_path / name, **options))
    off = np.abs(np.asarray(read).astype(int) - expected)
    assert read.mode == "RGB" and off.max() <= (6 if name == "cmyk.jpg" else 0)


def make_folder(root: Path, each=3, test=0, classes="cat dog", side=90) -> Path:
    for y, name in enumerate(classes.split()):
        for i in range(each):
            image = picture(100 * y + i, side + 7 * i, side)
            save(image, root / "train" / name / f"{i:02d}.png")
        for i in range(test):
            save(picture(5000 + 100 * y + i, side, side), root / "test" / name / f"{i}.jpg")
    return root


@pytest.fixture
def pets(tmp_path):
    return make_folder(tmp_path / "pets", test=2)


def test_a_folder_of_pictures_of_every_mode_and_size(pets, root, capsys):
    for number, mode in enumerate(("L", "RGBA", "P", "LA", "1", "RGB")):
        at = pets / "unlabeled" / ("deep/er" if number % 2 else "")
        image = picture(900 + number, 10 + 40 * number, 300 - 40 * number)
        save(image.convert(mode), at / f"{mode}.png")
    save(Image.fromarray(np.full((50, 3), 40_000, np.uint16)), pets / "unlabeled" / "deep.tif")
    cut = (pets / "test/cat/0.jpg").read_bytes()[:600]
    for name in ("unlabeled/cut.jpg", "unlabeled/0.txt", "train/cat/01b.jpg", "test/dog/zz.png"):
        (pets / name).write_bytes(cut)
    (pets / "unlabeled" / ".DS_Store").write_bytes(b"x")
    save(picture(1, 50, 50), pets / "train" / "cat" / ".thumbnails" / "x.png")
    (pets / "train" / ".hidden").mkdir()
    data = load_data(str(pets), str(root))
    said = capsys.readouterr().out
    assert data.name == "pets" and data.classes == ["cat", "dog"]
    assert data.train.y.tolist() == [0] * 3 + [1] * 3 + [-1] * 7
    assert data.test.y.tolist() == [0, 0, 1, 1]
    assert data.train.x.shape == (13, 3, 256, 256) and data.test.x.shape == (4, 3, 224, 224)
    assert "unreadable" in said and "DS_Store" not in said
    assert all(name in said for name in ("cut.jpg", "0.txt", "01b.jpg", "zz.png"))
    for split, slow in ((data.train, squash), (data.test, short_side_and_center)):
        for file, x in zip(
            split.files, split.x, strict=True
        ):  # also behind the gaps of the unreadable ones
            shown = slow(common.read_picture(file))
            np.testing.assert_array_equal(x.transpose(1, 2, 0), shown)
    assert len(set(data.train.hashes())) == 13


def test_pictures_are_decoded_once_and_again_after_a_change(pets, root, monkeypatch):
    first, real, seen = load_data(str(pets), str(root)), common.decode_one, []

    def decode_one(file, *more):
        seen.append(file)
        return real(file, *more)

    monkeypatch.setattr(common, "decode_one", decode_one)
    again = load_data(str(pets), str(root))
    np.testing.assert_array_equal(again.train.x, first.train.x)
    assert again.train.hashes() == first.train.hashes() and not seen
    save(picture(7, 30, 30), pets / "train" / "dog" / "01.png")
    monkeypatch.setattr(common, "decode_one", lambda *row: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # interrupted: what there is stays, nothing half is left
        load_data(str(pets), str(root))
    kinds = sorted(file.suffix for file in (root / "decoded").iterdir())
    kept = [kind for kind in kinds if kind in (".json", ".raw")]
    assert kept == [".json", ".json", ".raw", ".raw"]
    monkeypatch.setattr(common, "decode_one", decode_one)
    later = load_data(str(pets), str(root))
    assert len(seen) == 6 and all("train" in file for file in seen)  # the test part is the old one
    differ = (np.asarray(later.train.x) != first.train.x).any(axis=(1, 2, 3))
    assert differ.tolist() == [False, False, False, False, True, False]


def test_copies_of_test_pictures_are_left_out_of_training_however_they_are_saved(pets, root):
    (pets / "unlabeled").mkdir()
    shutil.copy(pets / "test/cat/0.jpg", pets / "unlabeled/copy.jpg")
    save(Image.open(pets / "test/dog/1.jpg"), pets / "unlabeled/same_pixels.png")
    save(picture(77, 90, 90), pets / "unlabeled/other.png")
    train = load_data(str(pets), str(root)).train
    assert [Path(file).name for file in train.files[6:]] == ["other.png"]
    shutil.copy(pets / "train/cat/00.png", pets / "test/cat/later.png")
    data = load_data(str(pets), str(root))  # the stored training part is old by now
    assert len(data.test) == 5 and len(data.train) == 6 and data.train.y.tolist()[:2] == [0, 0]
    assert not set(data.test.hashes()) & set(data.train.hashes())


@pytest.mark.parametrize("array, shown", [
    (RAMP.astype(np.uint16) * 16, RAMP * (4080 / 4095)), (RAMP.astype(np.int32), RAMP),
    (RAMP.astype(np.float32) / 256, RAMP * (255 / 256)), (RAMP.astype(np.float32), RAMP),
    (RAMP.astype(np.int32) * 1_000_000, RAMP * (255 / 199)),
    (RAMP.astype(np.float32) / 50 - 2, RAMP * (255 / 199)),
])  # fmt: skip
def test_more_than_eight_bits_are_scaled_by_their_range(tmp_path, array, shown):
    Image.fromarray(array).save(tmp_path / "deep.tif")
    read = np.asarray(common.read_picture(tmp_path / "deep.tif"))[:, :, 0]
    assert np.abs(read - shown).max() <= 1


def test_damaged_exif_data_leave_a_picture_unturned(tmp_path, monkeypatch):
    file = save(RGB, tmp_path / "turned.png", exif=EXIF)

    def broken(image):
        raise ZeroDivisionError("a rational number with denominator 0")

    monkeypatch.setattr(common.ImageOps, "exif_transpose", broken)
    np.testing.assert_array_equal(np.asarray(common.read_picture(file)), RED)


def test_a_table_of_picture_files_is_read_as_a_folder_is(pets, root, tmp_path):
    files = sorted(pets.glob("train/*/*.png"))
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
    (tmp_path / "table.csv").write_text("\n".join(["image,class", *lines]))
    folder, table = (load_data(str(path), str(root)) for path in (pets, tmp_path / "table.csv"))
    assert table.classes == folder.classes and table.train.hashes() == folder.train.hashes()
    np.testing.assert_array_equal(table.train.x, folder.train.x)
    assert preset_of(str(tmp_path / "table.csv")).mean  # no recipe for texts


def test_an_empty_test_folder_is_named_and_a_fifth_is_held_out(tmp_path, root, capsys):
    pets = make_folder(tmp_path / "pets", each=10)
    (pets / "test" / "cat").mkdir(parents=True)
    data = load_data(str(pets), str(root))
    assert data.test.y.tolist() == [0, 0, 1, 1] and "test: no labeled" in capsys.readouterr().out


def test_a_folder_named_none_is_a_class(pets, root):
    (pets / "train" / "dog").rename(pets / "train" / "none")
    (pets / "test" / "dog").rename(pets / "test" / "none")
    assert load_data(str(pets), str(root)).classes == ["cat", "none"]


def test_a_picture_that_a_table_names_and_nobody_has_is_left_out(pets, root, tmp_path, capsys):
    lines = ["image,class", "pets/gone.png,cat"]
    lines += [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in pets.rglob("*/*.png")]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    assert len(load_data(str(tmp_path / "table.csv"), str(root)).train) == 6
    assert "gone.png" in capsys.readouterr().out


def test_pictures_below_train_unlabeled_have_no_label(pets, root):
    save(picture(1, 30, 30), pets / "train" / "unlabeled" / "x.png")
    data = load_data(str(pets), str(root))
    assert data.classes == ["cat", "dog"] and data.train.y.tolist() == [0] * 3 + [1] * 3 + [-1]


def test_without_a_test_folder_a_fifth_is_held_out_or_nothing(tmp_path, root):
    pets = make_folder(tmp_path / "pets", each=11)
    shutil.copytree(pets / "train", pets / "unlabeled")  # everything is in the pool once more
    data = load_data(str(pets), str(root))
    assert data.test.y.tolist() == [0, 0, 1, 1]
    assert data.train.y.tolist() == [0] * 9 + [1] * 9 + [-1] * 18
    assert not set(data.test.hashes()) & set(data.train.hashes())
    few = load_data(str(make_folder(tmp_path / "few", each=9)), str(root))
    assert few.test is None and len(few.train) == 18


@pytest.mark.parametrize("backbone, size, stored, seen", [
    (None, None, 32, 32), ("cnn", None, 32, 32), ("wrn_28_2", 48, 48, 48),
    ("vit_small_patch2_32", None, 32, 32), ("vit_small_patch16_224", None, 256, 224),
])  # fmt: skip
def test_own_pictures_have_the_size_of_the_backbone_or_that_given(
    pets, root, backbone, size, stored, seen
):
    preset = preset_of(str(pets), backbone, size)
    data = load_data(str(pets), str(root), preset=preset)
    assert data.train.x.shape == (6, 3, stored, stored)
    assert data.test.x.shape[2] == preset.size == seen and preset.num_labels == 0
    assert preset.backbone == ("cnn" if backbone in (None, "cnn", "wrn_28_2") else
                               "vit_small_patch16_224")  # fmt: skip


def test_a_size_for_a_published_set_is_refused():
    with pytest.raises(UserError, match="--size is for own data; cifar10 uses 32"):
        preset_of("cifar10", None, 64)


def test_a_folder_of_another_structure_is_refused_with_what_is_wrong(tmp_path, pets, root):
    def refused(folder, reason):
        with pytest.raises(UserError, match=reason):
            load_data(str(folder), str(root))

    refused(tmp_path / "nowhere", "a folder with pictures")
    (pets / "train" / "horse").mkdir()
    refused(pets, "empty: .*horse")
    (pets / "train" / "horse").rmdir()
    save(picture(3, 30, 30), pets / "test" / "cow" / "0.png")
    refused(pets, "has labels .*cow.*, expected only those of")
    shutil.rmtree(pets / "test" / "cow")
    for file in (pets / "test").rglob("*.jpg"):
        file.write_bytes(b"no picture")
    refused(pets, "none of the 4 test pictures")
