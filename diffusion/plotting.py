"""Pictures and files of samples."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid, save_image

from diffusion.data import to_uint8


def save_samples(x: Tensor, folder: str | Path, name: str = "samples") -> Path:
    """Write NAME.png and NAME.npz into `folder` and return the path of the PNG.

    Images (N, C, H, W) in [-1, 1] become a grid, and uint8 `images` (N, H, W, C); other data a scatter plot of the
    first two coordinates, and float32 `points` (N, *shape).
    """
    folder = Path(folder)
    picture = save_picture(x, folder / f"{name}.png")
    arrays = {"images": to_uint8(x).movedim(1, -1).numpy()} if x.dim() == 4 else {"points": x.numpy()}
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return picture


def save_picture(x: Tensor, path: str | Path) -> Path:
    """Write one PNG: a grid of images, or a scatter plot of points."""
    if x.dim() == 4:
        zoom = max(1, 32 // x.shape[-1])  # small images are enlarged, so that the grid can be read
        levels = to_uint8(x)[:400].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        columns = round(len(levels) ** 0.5)
        save_image(make_grid(levels, nrow=columns, padding=2, pad_value=64).float() / 255, path)
    else:
        save_points(x.flatten(1), path)
    return Path(path)


def save_points(points: Tensor, path: str | Path) -> None:
    """Scatter plot of the first two coordinates of `points` (N, d), framed on their central 98 %.

    Points of one coordinate are spread over the height of the picture.
    """
    if points.shape[1] == 1:
        points = torch.cat([points, torch.linspace(0, 1, len(points))[:, None]], 1)
    figure = Figure(figsize=(6, 6), layout="constrained")  # no pyplot: it would choose a backend for the whole process
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=min(1.0, 2000 / len(points)), linewidths=0)
    low, high = torch.quantile(points[:100_000, :2], torch.tensor([0.01, 0.99]), dim=0)
    margin = 0.15 * (high - low)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_aspect("equal")
    figure.savefig(path, dpi=120)
