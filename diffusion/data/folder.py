"""A folder of image files, in memory where it fits and decoded on the way where it does not."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.v2 import InterpolationMode, functional

from diffusion.data.base import Splits, StreamedData, check_at_least, fixed_split, one_line
from diffusion.errors import UserError

# what Pillow raises for a file that it cannot decode
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageFiles(Dataset):
    """Item i is the image of file i, RGB uint8 (3, size, size), and its label.

    The shorter side is resized to `size` (bicubic with antialiasing), the middle of the longer one is kept.
    Transparency is dropped.

    Raises:
        UserError: on reading an item whose file cannot be decoded; names the file.
    """

    def __init__(self, files: list[tuple[str, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except _UNREADABLE as error:
            raise UserError(f"{path} cannot be decoded ({one_line(error)}): repair or remove the file") from error
        image = functional.resize(image, [self.size], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return functional.pil_to_tensor(functional.center_crop(image, [self.size])), label


def image_folder(path: str | Path, size: int, workers: int = 4, in_memory_gib: float = 2.0) -> Splits:
    """The images below a folder, (3, size, size), RGB; a fixed 90 % to train on, 10 % to test on.

    Either every class has a folder of its own (torchvision's ImageFolder layout; classes are numbered by name, hidden
    folders passed over), or the images lie in `path` itself and have no labels.

    Args:
        path: the folder.
        size: images are resized and cropped to (size, size).
        workers: processes that decode.
        in_memory_gib: up to this size in GiB all images are decoded once and kept in memory as uint8, otherwise they
            are decoded whenever they are read.

    Raises:
        UserError: no such folder, no images or fewer than two in it, images beside folders, a class without images, a
            file that cannot be decoded, a size below 1, a negative number of workers.
    """
    check_at_least("size", size, 1)
    folder = Path(path).expanduser()
    files, num_classes = _find(folder)
    images = ImageFiles(files, size)
    parts = (Subset(images, rows.tolist()) for rows in fixed_split(len(images)))
    train, test = (StreamedData(part, num_classes, workers) for part in parts)
    if len(images) * 3 * size * size <= in_memory_gib * 2**30:
        train, test = train.in_memory(), test.in_memory()
    return Splits(train, test, folder.absolute().name)


def _find(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Every (file, label) below `folder`, sorted, and the number of classes: 0 where the folder is flat."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, expected one with images: check data.path")
    entries = sorted(folder.iterdir())
    flat = [(str(entry), 0) for entry in entries if entry.is_file() and entry.suffix.lower() in IMG_EXTENSIONS]
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if flat and classes:
        raise UserError(
            f"{folder} holds images ({Path(flat[0][0]).name}) beside folders ({classes[0]}), "
            "expected either images or one folder a class: move one of the two away"
        )
    if not flat and not classes:
        raise UserError(f"{folder} holds no images, expected files in {', '.join(IMG_EXTENSIONS)}: check data.path")
    if flat:
        return flat, 0
    try:
        return make_dataset(folder, {name: label for label, name in enumerate(classes)}, IMG_EXTENSIONS), len(classes)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {one_line(error)}: add images, or remove the folder of that class") from error
