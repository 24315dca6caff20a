"""The picture of the README: gravity pulling points onto the map of the world.

    python docs/picture.py                                  train about 5 minutes on one core, then draw for 2
    python docs/picture.py --checkpoint outputs/picture     draw with the generator of an earlier run

Needs `pip install -e ".[cities]"`. Writes docs/gravity_on_the_map.png and keeps the generator in outputs/picture.

The plane is the map (the data space, d = 2) and the height above it is time t, the extra dimension of the gravity
field. Curves are trajectories of the trained generator, dx/dt = f_t(x), from the prior at t = T = 80, far above the
frame, down to the map: the field lines of a gravity whose mass is the cities. Every point of light on the map is
where such a trajectory ends. Nothing of the data set itself is drawn.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from diffusion import Generator
from diffusion.data import cities
from diffusion.fields import gravity
from diffusion.networks import MLP
from diffusion.objectives import FieldMatching
from diffusion.samplers import Heun
from diffusion.trainer import Trainer

ROOT = Path(__file__).parents[1]


class WaveMLP(nn.Module):
    """The library's MLP fed with waves of many lengths: fine coasts are then within reach of a small network."""

    def __init__(self, width: int = 128, depth: int = 3, waves: int = 96, longest: float = 10.0, shortest: float = 0.2):
        super().__init__()
        self.num_classes = 0
        lengths = torch.logspace(math.log10(longest), math.log10(shortest), waves)
        directions = nn.functional.normalize(torch.randn(2, waves), dim=0)
        self.register_buffer("waves", math.tau * directions / lengths)
        self.body = MLP((2 + 2 * waves,), width, depth)
        self.last = nn.Linear(2 + 2 * waves, 2)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        phases = x @ self.waves
        return self.last(self.body(torch.cat([x, phases.cos(), phases.sin()], 1), noise, label))


def train(folder: Path, steps: int) -> Generator:
    """A gravity generator of the inhabited places of the world, with at least 5000 inhabitants each."""
    places, _, _ = cities()
    torch.manual_seed(0)
    generator = Generator(gravity(dim=2), WaveMLP(), (2,)).calibrate(places.values)
    objective = FieldMatching(generator, mean=-1.5, std=1.8)  # fine structure needs low noise levels
    trainer = Trainer(
        steps=steps, batch_size=1024, learning_rate=3e-3, device="cpu", checkpoint_every=steps, log_every=100
    )
    average = trainer.fit(generator, objective, places, folder / "training")
    average.save(folder)
    return average


class Paths(NamedTuple):
    """Trajectories: the states at the falling times."""

    times: Tensor  # (K,)
    states: Tensor  # (K, N, 2)


@torch.no_grad()
def trajectories(generator: Generator, number: int, sampler: Heun, seed: int = 0) -> Paths:
    """`number` whole trajectories from the prior to the map, the last state at t = 0."""
    field = generator.field
    x_T = field.sample_prior((number, 2), torch.Generator().manual_seed(seed), dtype=torch.float64)
    times, parts = sampler.grid(field, sampler.steps), []
    for x in x_T.split(1000):
        states = [x]
        for t, t_next in itertools.pairwise(times):
            states.append(sampler.step(generator.velocity, states[-1], t, t_next))
        velocity = generator.velocity(states[-1], times[-1])
        states.append(field.endpoint(states[-1], times[-1], velocity))
        parts.append(torch.stack(states))
    return Paths(torch.cat([times, times.new_zeros(1)]), torch.cat(parts, 1))


class Camera:
    """A pinhole above the south of the map that looks down on it; turns (x, y, height) into pixels."""

    def __init__(self, width: int, height: int, eye=(-0.25, -2.6, 5.6), aim=(-0.25, -0.13, 0.0), focal: float = 1.58):
        self.width, self.height, self.eye = width, height, np.array(eye)
        forward = np.array(aim) - self.eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        self.axes = np.stack([right, np.cross(forward, right), forward])
        self.scale = focal * width / 2

    def __call__(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates (N, 2), column and row, and depths (N,) of `points` (N, 3)."""
        across, down, depth = ((points - self.eye) @ self.axes.T).T
        depth = np.where(depth > 0.1, depth, np.nan)
        columns = self.width / 2 + self.scale * across / depth
        rows = self.height / 2 + self.scale * down / depth
        return np.stack([columns, rows], 1), depth


def expose(camera: Camera, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    """The light (height, width, 3) that falls on each pixel from `points` (N, 3) of colour `light` (N, 3)."""
    places, _ = camera(points)
    film = np.zeros((camera.height * camera.width, 3))
    whole = np.floor(places - 0.5)
    rest = places - 0.5 - whole
    for right, down in itertools.product((0, 1), (0, 1)):
        column, row = whole[:, 0] + right, whole[:, 1] + down
        seen = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        share = np.abs(1 - right - rest[:, 0]) * np.abs(1 - down - rest[:, 1])
        index = (row[seen] * camera.width + column[seen]).astype(np.int64)
        for channel in range(3):
            weights = (share * light[:, channel])[seen]
            film[:, channel] += np.bincount(index, weights, camera.height * camera.width)
    return film.reshape(camera.height, camera.width, 3)


def draw_curves(camera: Camera, paths: Paths, top: float, dots: int) -> np.ndarray:
    """Light of the trajectories below the height `top`: cold and faint far up, warm where they land."""
    order = np.argsort(paths.times.numpy())
    heights, states = paths.times.numpy()[order], paths.states.numpy()[order]
    t = top * np.linspace(0, 1, dots) ** 1.5  # lines bend most where they are close to the map
    right = np.searchsorted(heights, t).clip(1, len(heights) - 1)
    weight = ((t - heights[right - 1]) / (heights[right] - heights[right - 1]))[:, None, None]
    places = states[right - 1] * (1 - weight) + states[right] * weight  # (dots, N, 2)
    points = np.concatenate([places, np.broadcast_to(t[:, None, None], (*places.shape[:2], 1))], 2)
    # Dots of equal light would be bright where they crowd; light by length on film makes even lines.
    film = np.stack([camera(p)[0] for p in points])
    length = np.linalg.norm(np.gradient(film, axis=0), axis=2)
    near = (1 - np.sqrt(t / top))[:, None]  # 1 on the map, 0 at the top
    cold, warm = np.array([0.08, 0.30, 1.0]), np.array([1.0, 0.42, 0.16])
    colour = cold + (warm - cold) * near[..., None] ** 2
    strength = np.clip(near, 0.02, 1) * np.clip((1 - t / top) * 2, 0, 1)[:, None]
    length *= np.clip((4 - length) / 3, 0, 1)  # wider gaps, close to the camera, would show as dots
    light = (length * strength)[..., None] * colour
    return expose(camera, points.reshape(-1, 3), light.reshape(-1, 3))


def draw_map(camera: Camera, places: np.ndarray) -> np.ndarray:
    """Light of the ends of trajectories, (N, 2), on the plane t = 0."""
    points = np.concatenate([places, np.zeros((len(places), 1))], 1)
    return expose(camera, points, np.broadcast_to([1.0, 0.74, 0.36], points.shape))


def draw(generator: Generator, path: Path, number: int, curves: int, width: int = 1600, height: int = 740) -> None:
    paths = trajectories(generator, number, Heun(steps=40))
    zoom = 2  # drawn twice as large and averaged, so that lines are smooth
    camera = Camera(zoom * width, zoom * height)
    lines = draw_curves(camera, Paths(paths.times, paths.states[:, :curves]), top=1.6, dots=2000)
    lights = draw_map(camera, paths.states[-1].numpy())
    film = 0.7 * gaussian_filter(lines, (0.8, 0.8, 0))
    film += 1.4 * gaussian_filter(lights, (0.9, 0.9, 0)) + 1.5 * gaussian_filter(lights, (6, 6, 0))
    film = film.reshape(height, zoom, width, zoom, 3).mean((1, 3))
    background = np.array([0.006, 0.010, 0.030])
    levels = 1 - np.exp(-(film + background))  # film saturates: bright things whiten and nothing is cut off
    levels = (levels**0.75 * 255).round().astype(np.uint8)
    small_png(levels).save(path, optimize=True)


def small_png(levels: np.ndarray, colours: int = 72) -> Image.Image:
    """The picture with a palette chosen for bright and for dark pixels apart: the few bright ones are what one sees."""
    bright = levels.max(2) > 60
    palettes = [Image.fromarray(levels[part][None]).quantize(colours // 2) for part in (bright, ~bright)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for each in palettes for value in each.getpalette()[: 3 * (colours // 2)]])
    return Image.fromarray(levels).quantize(palette=palette, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a generator trained before; without it one is trained")
    parser.add_argument("--steps", type=int, default=7000, help="of training")
    parser.add_argument("--samples", type=int, default=40000, help="points on the map")
    parser.add_argument("--curves", type=int, default=800, help="trajectories drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.checkpoint is None:
        generator = train(ROOT / "outputs" / "picture", arguments.steps)
    else:
        generator = Generator.load(arguments.checkpoint, network=WaveMLP())
    picture = ROOT / "docs" / "gravity_on_the_map.png"
    draw(generator, picture, arguments.samples, arguments.curves)
    print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
