"""Folders of image files: layout, geometry, memory or stream, broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data import StreamedData, TensorData, image_folder


def save(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def classes(tmp_path):
    """Ten red images of class b, ten green ones of class a (one of them a folder deeper), of different brightness."""
    for i in range(10):
        save(tmp_path / "b" / f"{i}.png", (100 + i, 0, 0))
        save(tmp_path / "a" / ("deep" if i == 9 else "") / f"{i}.PNG", (0, 100 + i, 0))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "readme.txt").write_text("not an image")
    return tmp_path


def everything(splits):
    """(red, green, blue, label) of the first pixel of every image, sorted."""
    found = []
    for data in splits[:2]:
        x, label = data.take(torch.arange(len(data)))
        pixels = ((x[:, :, 0, 0] + 1) * 127.5).round().long()
        found += [(*pixel, None if label is None else label[i].item()) for i, pixel in enumerate(pixels.tolist())]
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_are_numbered_by_name_and_split_ninety_to_ten(classes, workers):
    splits = image_folder(classes, size=4, workers=workers)
    assert isinstance(splits.train, TensorData) and splits.name == classes.name
    assert (len(splits.train), len(splits.test), splits.train.num_classes) == (18, 2, 2)
    assert splits.train.shape == (3, 4, 4)
    red, green = ([(100 + i, 0, 0, 1) for i in range(10)], [(0, 100 + i, 0, 0) for i in range(10)])
    assert everything(splits) == sorted(red + green)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_gives_the_same_examples_as_in_memory(classes, workers):
    kept = image_folder(classes, size=4, workers=0)
    streamed = image_folder(classes, size=4, workers=workers, in_memory_gib=0.0)
    assert isinstance(streamed.train, StreamedData) and isinstance(streamed.test, StreamedData)
    assert (streamed.train.num_classes, streamed.train.shape, len(streamed.test)) == (2, (3, 4, 4), 2)
    order = [torch.tensor([5, 0, 17]), torch.tensor([2, 2])]
    for one, other in zip(kept.train.batches(order), streamed.train.batches(order), strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.label, other.label)


def test_memory_limit_counts_all_bytes(classes):
    limit = 20 * 3 * 4 * 4 / 2**30
    assert isinstance(image_folder(classes, 4, workers=0, in_memory_gib=limit).train, TensorData)
    assert isinstance(image_folder(classes, 4, workers=0, in_memory_gib=0.99 * limit).train, StreamedData)


def test_flat_folder_has_no_labels(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", (i, i, 50))
    splits = image_folder(tmp_path, size=8, workers=0)
    assert everything(splits) == [(i, i, 50, None) for i in range(5)]
    assert splits.train.num_classes == 0


def test_the_middle_of_the_longer_side_is_kept(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = (10, 20, 30)
    tall = np.zeros((48, 16, 3), dtype=np.uint8)
    tall[16:32] = (10, 20, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(tall).save(tmp_path / "tall.png")
    for data in image_folder(tmp_path, size=8, workers=0)[:2]:
        middle = data.values[0, :, 3:5, 3:5].flatten(1)
        assert middle.unique(dim=1).flatten().tolist() == [10, 20, 30]
        assert (data.values[0, :, 2:6, 2:6] == middle[:, :1, None]).all()


def test_grey_and_transparent_files_become_rgb(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "transparent.png")
    assert everything(image_folder(tmp_path, 4, workers=0)) == [(1, 2, 3, None), (77, 77, 77, None)]


@pytest.mark.parametrize(
    ("damage", "workers", "in_memory_gib"),
    [("truncated", 0, 0.0), ("truncated", 0, 1.0), ("truncated", 2, 0.0), ("truncated", 2, 1.0), ("garbage", 0, 1.0)],
)
def test_unreadable_file_is_named(tmp_path, user_error, damage, workers, in_memory_gib):
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i:02}.png")
    file = tmp_path / "11.png"
    file.write_bytes(file.read_bytes()[:300] if damage == "truncated" else b"not an image")
    with user_error(file, "cannot be decoded"):
        splits = image_folder(tmp_path, 8, workers=workers, in_memory_gib=in_memory_gib)
        for data in splits[:2]:
            list(data.batches(torch.arange(len(data)).split(4)))


def test_bad_folders_are_named(tmp_path, classes, user_error):
    with user_error(tmp_path / "none", "not a folder"):
        image_folder(tmp_path / "none", 8)
    empty = tmp_path / "x" / "empty"
    empty.mkdir(parents=True)
    with user_error(empty, "no images", ".png"):
        image_folder(empty, 8)
    with user_error(tmp_path / "x", "empty"):
        image_folder(tmp_path / "x", 8)
    save(tmp_path / "stray.png", (0, 0, 0))
    with user_error("stray.png", "beside folders"):
        image_folder(tmp_path, 8)
    save(empty / "only.png", (0, 0, 0))
    with user_error("1 example", "at least 2"):
        image_folder(empty, 8)


def test_bad_options_are_named(classes, user_error):
    with user_error("size is 0"):
        image_folder(classes, 0)
    with user_error("workers is -2"):
        image_folder(classes, 8, workers=-2)
