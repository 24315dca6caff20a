"""Pictures and files: samples, and what a validation found."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid, save_image

from diffusion.audit import Audit
from diffusion.data import to_uint8
from diffusion.fields import Field, Report
from diffusion.fields.checks import STRONG
from diffusion.fields.lines import follow


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


def save_report(report: Report, field: Field, x0: Tensor, path: str | Path) -> Path:
    """Write one PNG of a validation: field lines of one data point, residual against time, radius law against draws.

    Args:
        x0: (*shape), the data point.
    """
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    lines, residual, radius = figure.subplots(1, 3)
    times, places = follow(field, x0, 24)
    places = places.flatten(2)
    if places.shape[2] == 2:
        late = places[times >= 0.02 * times[-1]] if field.rho > 1 else places
        for line in late.unbind(1):
            lines.plot(line[:, 0], line[:, 1], color="C0", linewidth=0.8)
        lines.plot(*x0.flatten().tolist(), "o", color="C3")
        lines.set(title="field lines of one data point", xlabel="$x_1$", ylabel="$x_2$")
        lines.set_aspect("equal", adjustable="datalim")
    else:
        distance = (places - x0.double().flatten()).square().mean(2).sqrt()
        lines.plot(times, distance, color="C0", linewidth=0.8)
        scale = "log" if field.rho > 1 else "linear"
        lines.set(title="field lines of one data point", xscale=scale, yscale=scale)
        lines.set(xlabel="time t", ylabel=r"$|x_t - x_0| / \sqrt{d}$")
    scale = "log" if field.rho > 1 else "linear"
    time, value = report.residuals
    title = "continuity (strong)" if len(value) else "continuity (strong): not checked"
    residual.set(title=title, xlabel="time t", ylabel="relative residual")
    if bool(value.isfinite().any()):
        residual.plot(time, value.abs().clamp_min(1e-18), ".")
        residual.axhline(STRONG, color="C3", linewidth=0.8)
        residual.set(xscale=scale, yscale="log")
    for t, u in report.quantiles.items():
        share = torch.linspace(0, 1, len(u))
        radius.plot(share, u.sort().values, label=f"t = {t:.3g}")
    radius.plot([0, 1], [0, 1], color="C3", linewidth=0.8)
    radius.set(title="radius: law against draws", xlabel="share of the draws", ylabel="share of the law")
    if report.quantiles:
        radius.legend()
    figure.savefig(path, dpi=110)
    return Path(path)


def save_audit(audit: Audit, path: str | Path) -> Path:
    """Write one PNG of an audit: residuals of the test functions against time, and the share of the flux missing."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    residual, share = figure.subplots(1, 2)
    scale = "log" if audit.times[0] < 0.05 * audit.times.diff().median() else "linear"
    residual.plot(audit.times, audit.z.abs(), ".", color="C0", markersize=3)
    residual.plot(audit.times, audit.z.square().mean(1).sqrt(), color="C1", label="root mean square")
    residual.axhline(audit.limit, color="C3", linewidth=0.8, label="limit of an exact velocity")
    residual.set(
        title="weak continuity", xscale=scale, yscale="log", xlabel="time t", ylabel="residual, standard errors"
    )
    residual.legend()
    share.plot(audit.times, audit.share, color="C1")
    share.set(title="share of the flux", xscale=scale, xlabel="time t", ylabel="missing")
    figure.savefig(path, dpi=110)
    return Path(path)
