"""Pictures of densities and their currents: one PNG of a few times, and an animation of all."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diffusion.fokker_planck.runs import Cloud, Lattice, Run

SHOWN = 4  # times in the still picture
ARROWS = 16  # along each coordinate
BINS = 60
MILLISECONDS = 80  # a frame


def save_picture(run: Run, path: str | Path) -> Path:
    """Write one PNG: the density and its current (d = 1: lines, beyond: maps of two coordinates) at a few times."""
    chosen = torch.linspace(0, len(run.times) - 1, min(SHOWN, len(run.times))).round().long().tolist()
    if _dim(run) == 1:
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        _draw_lines(figure.subplots(1, 2), run, chosen)
    else:
        figure = Figure(figsize=(4 * len(chosen), 4.2), layout="constrained")
        for axes, k in zip(figure.subplots(1, len(chosen)), chosen, strict=True):
            _draw_map(axes, run, k)
    figure.savefig(path, dpi=110)
    return Path(path)


def save_animation(run: Run, path: str | Path) -> Path:
    """Write one GIF, a frame for each time."""
    frames = []
    for k in range(len(run.times)):
        flat = _dim(run) == 1
        figure = Figure(figsize=(9, 3.6) if flat else (4.6, 4.6), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        if flat:
            _draw_lines(figure.subplots(1, 2), run, [k])
        else:
            _draw_map(figure.subplots(), run, k)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)
    return Path(path)


def _dim(run: Run) -> int:
    return run.picture.places.shape[2] if isinstance(run.picture, Cloud) else len(run.picture.axes)


def _draw_lines(axes, run: Run, chosen: list[int]) -> None:
    left, right = axes
    for k in chosen:
        label = f"t = {float(run.times[k]):.3g}"
        if isinstance(run.picture, Cloud):
            edges, density, current = histograms(*(values[k, :, 0].numpy() for values in run.picture))
            left.stairs(density, edges, label=label)
            right.stairs(current, edges, label=label)
            continue
        (x,), density, current = run.picture
        left.plot(x.numpy(), density[k].numpy(), label=label)
        right.plot(x.numpy(), current[k, 0].numpy(), label=label)
    if not isinstance(run.picture, Cloud):
        left.set_ylim(0, 1.05 * float(run.picture.density.max()))
        reach = 1.05 * float(run.picture.current.abs().max()) or 1.0
        right.set_ylim(-reach, reach)
    left.set(title="density", xlabel="x")
    right.set(title="current", xlabel="x")
    left.legend()


def histograms(x: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of bins, and the density and the current of particles (N,) in them."""
    mass, edges = np.histogram(x, bins=BINS)
    flow, _ = np.histogram(x, bins=edges, weights=velocity)
    share = 1 / (len(x) * np.diff(edges))
    return edges, share * mass, share * flow


def _draw_map(axes, run: Run, k: int) -> None:
    axes.set(title=f"t = {float(run.times[k]):.3g}", xlabel="$x_1$", ylabel="$x_2$")
    if isinstance(run.picture, Cloud):
        places, velocities = (values[..., :2] for values in run.picture)
        reach = places.flatten(0, 1).abs().amax(0).tolist()
        axes.scatter(*places[k].T.numpy(), s=2, linewidths=0)
        some = slice(None, ARROWS**2)
        axes.quiver(*places[k, some].T.numpy(), *velocities[k, some].T.numpy(), color="C1", width=0.003)
        axes.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
        return
    (x, y), density, current = _in_the_plane(run.picture)
    axes.pcolormesh(x.numpy(), y.numpy(), density[k].T.numpy(), cmap="magma", shading="nearest", rasterized=True)
    i, j = (slice(len(places) // ARROWS // 2, None, max(1, len(places) // ARROWS)) for places in (x, y))
    u, v = current[k][:, i, j]
    gap = float(torch.stack([x[i].diff().mean(), y[j].diff().mean()]).min())
    scale = (float(torch.hypot(u, v).max()) or 1.0) / (1.5 * gap)  # the longest arrow is one and a half gaps
    arrows = (part.numpy() for part in (x[i], y[j], u.T, v.T))
    axes.quiver(*arrows, color="white", pivot="mid", angles="xy", scale_units="xy", scale=scale, width=0.004)


def _in_the_plane(lattice: Lattice) -> Lattice:
    """The marginal of the first two coordinates."""
    axes, density, current = lattice
    for places in axes[2:][::-1]:
        density, current = torch.trapezoid(density, places), torch.trapezoid(current, places)
    return Lattice(axes[:2], density, current[:, :2])
