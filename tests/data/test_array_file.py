""".npz and .npy files: what they hold is what is read; whatever is wrong with one is named."""

import numpy as np
import pytest
import torch

from diffusion.data import array

GREY = np.arange(20 * 4 * 5, dtype=np.uint16).reshape(20, 4, 5).astype(np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
POINTS = np.random.default_rng(1).normal(size=(20, 3))
LABELS = np.arange(20) % 4
SPLIT = (np.arange(20) % 5 == 2).astype(np.uint8)


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "some.npz", **arrays)
        return tmp_path / "some.npz"

    return write


def restored(splits, index):
    """All values in the file's order, from the two parts and the file's rows that they should hold."""
    values = torch.empty(20, *splits.train.shape, dtype=splits.train.values.dtype)
    values[index == 0], values[index == 1] = splits.train.values, splits.test.values
    return values.numpy()


def test_colour_images_with_labels_and_split(save):
    splits = array(save(images=COLOUR, labels=LABELS.astype(np.int16), split=SPLIT, meta="passed over"))
    assert splits.name == "some" and splits.train.shape == (3, 4, 5) and splits.train.num_classes == 4
    np.testing.assert_array_equal(restored(splits, SPLIT), COLOUR.transpose(0, 3, 1, 2))
    assert splits.train.labels.tolist() == LABELS[SPLIT == 0].tolist()
    assert splits.test.labels.tolist() == LABELS[SPLIT == 1].tolist()


@pytest.mark.parametrize("split", [SPLIT.astype(bool), SPLIT.astype(np.int64), np.array(["train", "test"])[SPLIT]])
def test_split_may_be_bool_int_or_text(save, split):
    np.testing.assert_array_equal(restored(array(save(images=GREY, split=split)), SPLIT), GREY[:, None])


@pytest.mark.parametrize("images", [GREY, GREY[..., None]])
def test_grey_images_without_split_are_split_ninety_to_ten(save, images):
    splits = array(save(images=images))
    assert (len(splits.train), len(splits.test)) == (18, 2) and splits.train.num_classes == 0
    both = torch.cat([splits.train.values, splits.test.values]).numpy()
    assert sorted(map(bytes, both)) == sorted(map(bytes, GREY)) and both.shape == (20, 1, 4, 5)
    assert torch.equal(array(save(images=images)).test.values, splits.test.values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points(save, dtype):
    splits = array(save(points=POINTS.astype(dtype), split=SPLIT, labels=LABELS), num_classes=7)
    assert splits.train.values.dtype == torch.float32 and splits.train.num_classes == 7 and not splits.train.is_image
    np.testing.assert_array_equal(restored(splits, SPLIT), POINTS.astype(np.float32))


@pytest.mark.parametrize(("content", "expected"), [(GREY, GREY[:, None]), (POINTS, POINTS.astype(np.float32))])
def test_npy(tmp_path, content, expected):
    np.save(tmp_path / "a.npy", content)
    splits = array(str(tmp_path / "a.npy"))
    both = torch.cat([splits.train.values, splits.test.values]).numpy()
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))


@pytest.mark.parametrize(
    ("arrays", "texts"),
    [
        ({"images": GREY.astype(np.float32)}, ["float32", "(20, 4, 5)", "uint8"]),
        ({"images": GREY.astype(np.int64)}, ["int64", "uint8"]),
        ({"images": GREY[0]}, ["(4, 5)", "(N, H, W)"]),
        ({"images": COLOUR[..., :2]}, ["(20, 4, 5, 2)", "(N, H, W, 3)"]),
        ({"images": COLOUR.transpose(0, 3, 1, 2)}, ["(20, 3, 4, 5)", "(N, H, W, 3)"]),
        ({"images": GREY[:0]}, ["(0, 1, 4, 5)", "at least one"]),
        ({"images": GREY[:0], "labels": LABELS[:0]}, ["(0, 1, 4, 5)", "at least one"]),
        ({"images": GREY[:1]}, ["1 example", "at least 2"]),
        ({"images": GREY, "labels": LABELS[:19]}, ["(19,)", "(20,)"]),
        ({"images": GREY, "labels": LABELS[:, None]}, ["(20, 1)", "(20,)"]),
        ({"images": GREY, "labels": LABELS - 1}, ["label -1", "0 to 2"]),
        ({"images": GREY, "labels": LABELS - 10}, ["label -10"]),
        ({"images": GREY, "labels": LABELS + 0.5}, ["float64", "whole numbers"]),
        ({"images": GREY, "split": SPLIT[:5]}, ["(5,)", "(20,)"]),
        ({"images": GREY, "split": SPLIT + 1}, ["1, 2", "0 or 'train'"]),
        ({"images": GREY, "split": 0 * SPLIT}, ["values 0;", "both in use"]),
        ({"images": GREY, "split": np.array(["train", "val"])[SPLIT]}, ["train, val"]),
        ({"image": GREY, "labels": LABELS}, ["image, labels", "images or points"]),
        ({"images": GREY, "points": POINTS}, ["images, points", "either"]),
        ({}, ["none", "images or points"]),
        ({"points": LABELS}, ["int64", "(20,)", "float32"]),
        ({"points": POINTS[:, 0]}, ["(20,)", "(N, d)"]),
        ({"points": np.where(np.arange(20)[:, None] == 6, np.nan, POINTS)}, ["row 6", "nan"]),
        ({"images": np.array([None, {}], dtype=object)}, ["Python objects"]),
    ],
)
def test_bad_arrays_are_named(save, user_error, arrays, texts):
    path = save(**arrays)
    with user_error(path, *texts):
        array(path)


def test_num_classes_bounds_the_labels(save, user_error):
    path = save(images=GREY, labels=LABELS)
    with user_error(path, "label 3", "0 to 2"):
        array(path, num_classes=3)
    path = save(images=GREY)
    with user_error(path, "num_classes is 3 without labels"):
        array(path, num_classes=3)


@pytest.mark.parametrize("keep", [0, 1, 10, 200, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", ["a.npz", "a.npy", "packed.npz"])
def test_truncated_files_are_named(tmp_path, user_error, name, keep):
    path = tmp_path / name
    {"a.npz": np.savez, "packed.npz": np.savez_compressed}.get(name, lambda file, images: np.save(file, images))(
        path, images=COLOUR
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with user_error(path, "cannot be read", "whole .npz or .npy"):
        array(path)


def test_flipped_bytes_are_noticed(save, user_error):
    path = save(images=COLOUR)
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF
    path.write_bytes(content)
    with user_error(path, "cannot be read"):
        array(path)


def test_other_files_are_named(tmp_path, user_error):
    with user_error(tmp_path / "none.npz", "not a file"):
        array(tmp_path / "none.npz")
    with user_error(tmp_path, "not a file"):
        array(tmp_path)
    (tmp_path / "text.npz").write_text("hello\nworld\n" * 50)
    with user_error(tmp_path / "text.npz", "cannot be read"):
        array(tmp_path / "text.npz")
