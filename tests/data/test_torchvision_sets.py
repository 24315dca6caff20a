"""MNIST, FashionMNIST and CIFAR10 from files of their format, written here; downloads lead to a closed local port."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from diffusion.data import torchvision_set

NOWHERE = "http://127.0.0.1:9/"
CLASSES = {"MNIST": datasets.MNIST, "FashionMNIST": datasets.FashionMNIST}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for source in CLASSES.values():
        monkeypatch.setattr(source, "mirrors", [NOWHERE])
    monkeypatch.setattr(datasets.CIFAR10, "url", NOWHERE + datasets.CIFAR10.filename)


def idx(array):
    """The idx format: 0, 0, 8 (unsigned byte), number of dimensions, big-endian sizes, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def parts(shape):
    random = np.random.default_rng(0)
    return {
        part: (random.integers(0, 256, (count, *shape), dtype=np.uint8), random.integers(0, 10, count))
        for part, count in (("train", 6), ("t10k", 4))
    }


def write_mnist(folder, zipped):
    """The four files below `folder`, and what they hold."""
    folder.mkdir(parents=True)
    content = parts((28, 28))
    for part, (images, labels) in content.items():
        for name, data in ((f"{part}-images-idx3-ubyte", idx(images)), (f"{part}-labels-idx1-ubyte", idx(labels))):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return content


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_holds(data, images, labels):
    """`data` is images (N, C, H, W) with their labels."""
    assert torch.equal(data.values, torch.from_numpy(images))
    assert data.labels.tolist() == labels.tolist() and data.num_classes == 10


@pytest.mark.parametrize(("name", "short"), [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist")])
def test_idx_files_are_read(tmp_path, name, short):
    content = write_mnist(tmp_path / name / "raw", zipped=False)
    splits = torchvision_set(name, tmp_path, download=False)
    assert splits.name == short and splits.train.shape == (1, 28, 28)
    assert_holds(splits.train, content["train"][0][:, None], content["train"][1])
    assert_holds(splits.test, content["t10k"][0][:, None], content["t10k"][1])


def test_downloaded_gz_files_are_unpacked(tmp_path, monkeypatch):
    folder = tmp_path / "MNIST" / "raw"
    content = write_mnist(folder, zipped=True)
    sums = [(file, md5(folder / file)) for file, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    splits = torchvision_set("MNIST", str(tmp_path))
    assert_holds(splits.test, content["t10k"][0][:, None], content["t10k"][1])


def test_size_resizes(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, zipped=False)
    half = np.zeros((6, 28, 28), dtype=np.uint8)
    half[:, :, 14:] = 200
    (folder / "train-images-idx3-ubyte").write_bytes(idx(half))
    train = torchvision_set("MNIST", tmp_path, size=8).train
    assert train.shape == (1, 8, 8)
    assert (train.values[..., :3] == 0).all() and (train.values[..., 5:] == 200).all()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Batches of CIFAR10's format (their checksums put in place of the published ones), and what they hold."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    content = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content[name] = random.integers(0, 256, (3, 3072), dtype=np.uint8), random.integers(0, 10, 3)
        entry = {"data": content[name][0], "labels": content[name][1].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2))
    for sums in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.CIFAR10, sums)]
        monkeypatch.setattr(datasets.CIFAR10, sums, [[name, md5(folder / name)] for name in names])
    meta = {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path, content


def test_cifar_batches_are_read(cifar):
    path, content = cifar
    splits = torchvision_set("CIFAR10", path)
    assert splits.name == "cifar10" and splits.train.shape == (3, 32, 32)
    batches = [content[f"data_batch_{i}"] for i in range(1, 6)]
    images = np.concatenate([batch[0] for batch in batches]).reshape(-1, 3, 32, 32)  # red, green, blue planes
    assert_holds(splits.train, images, np.concatenate([batch[1] for batch in batches]))
    assert_holds(splits.test, content["test_batch"][0].reshape(-1, 3, 32, 32), content["test_batch"][1])


def test_damaged_cifar_batch_is_an_error(cifar, user_error):
    path, _ = cifar
    (path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"something else")
    with user_error("CIFAR10", path / "cifar-10-batches-py", "test_batch"):
        torchvision_set("CIFAR10", path, download=False)


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("MNIST", "MNIST/raw", "train-images-idx3-ubyte"),
        ("FashionMNIST", "FashionMNIST/raw", "t10k-labels-idx1-ubyte"),
        ("CIFAR10", "cifar-10-batches-py", "data_batch_1"),
    ],
)
def test_missing_files_without_network_are_named(tmp_path, user_error, name, folder, file, download):
    with user_error(name, tmp_path / folder, file):
        torchvision_set(name, tmp_path, download=download)


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08\x03", b"<html>not found</html>"])
def test_damaged_idx_file_is_an_error(tmp_path, user_error, damage):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, zipped=False)
    (folder / "train-images-idx3-ubyte").write_bytes(damage)
    with user_error("MNIST", folder):
        torchvision_set("MNIST", tmp_path, download=False)


def test_truncated_idx_file_is_an_error(tmp_path, user_error):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, zipped=False)
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with user_error("MNIST", folder):
        torchvision_set("MNIST", tmp_path, download=False)


def test_bad_options_are_named(user_error):
    with user_error("'mnist'", "MNIST, FashionMNIST, CIFAR10"):
        torchvision_set("mnist")
    with user_error("size is 0"):
        torchvision_set("MNIST", size=0)
