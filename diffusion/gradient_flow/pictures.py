"""Pictures of flows: the functional against time, and an animation of the particles."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from diffusion.data import to_uint8
from diffusion.gradient_flow.runs import Run

MILLISECONDS = 80  # a frame
TILES = 64  # images in a frame
SHOWN_POINTS = 2000  # of the data


def save_curve(run: Run, path: str | Path) -> Path:
    """Write one PNG: the functional and the distance from the nearest training points against time."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    time = run.columns["time"]
    left.plot(time, run.columns["functional"])
    left.set(title="functional", xlabel="time")
    left.set_yscale("log" if min(run.columns["functional"]) > 0 else "symlog")
    right.plot(time, run.columns["nearest"], label="particles")
    right.axhline(run.held_out, linestyle="--", color="grey", label="held-out points")
    right.set(title="distance from the nearest training point (median)", xlabel="time", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=110)
    return Path(path)


def save_animation(run: Run, data: Tensor, path: str | Path) -> Path:
    """Write one GIF: images as a grid; points, of which the first two coordinates are seen, on the data (M, d)."""
    draw = _grid if run.frames.dim() == 5 else _Scatter(run.frames, data)
    frames = [draw(k, particles) for k, particles in enumerate(run.frames)]
    pictures = [Image.fromarray(frame).quantize(64) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0)
    return Path(path)


def _grid(k: int, particles: Tensor) -> np.ndarray:
    zoom = max(1, 32 // particles.shape[-1])
    levels = to_uint8(particles[:TILES]).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return make_grid(levels, nrow=round(len(levels) ** 0.5), padding=2, pad_value=64).movedim(0, -1).numpy()


class _Scatter:
    """Particles over the data, in one window for all frames."""

    def __init__(self, frames: Tensor, data: Tensor):
        self.data = _in_the_plane(data[:SHOWN_POINTS])
        both = torch.cat([self.data, _in_the_plane(frames[-1])])
        low, high = torch.quantile(both, torch.tensor([0.005, 0.995], dtype=both.dtype), dim=0)
        margin = 0.2 * (high - low)
        (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
        self.window = {"xlim": (left, right), "ylim": (bottom, top)}

    def __call__(self, k: int, particles: Tensor) -> np.ndarray:
        figure = Figure(figsize=(4.6, 4.6), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.scatter(*self.data.T.numpy(), s=2, color="lightgrey", linewidths=0)
        axes.scatter(*_in_the_plane(particles).T.numpy(), s=4, linewidths=0)
        axes.set(**self.window)
        axes.set_aspect("equal")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _in_the_plane(points: Tensor) -> Tensor:
    """(N, 2) float32: the first two coordinates; with one alone, points are spread over the height."""
    points = points.flatten(1)[:, :2].float()
    if points.shape[1] == 1:
        return torch.cat([points, torch.linspace(-1, 1, len(points))[:, None]], 1)
    return points
