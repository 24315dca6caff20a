"""Langevin dynamics annealed over noise levels: it finds modes, and each level is its own."""

import itertools
import math
import warnings

import pytest
import torch
from cases import draws
from torch import Tensor

from diffusion import Generator
from diffusion.data import TensorData
from diffusion.fields import EmpiricalField, gravity, radial_tanh, variance_exploding, variance_preserving
from diffusion.gradient_flow.flows.annealed import AnnealedLangevin
from diffusion.networks import MLP
from diffusion.objectives import FieldMatching
from diffusion.samplers.grids import LogSNRGrid
from diffusion.trainer import Trainer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CENTRES = 5 * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)


def mixture(number: int, seed: int) -> Tensor:
    places = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]).repeat(number // 8)
    return CENTRES[places] + 0.3 * draws(len(places), 2, seed)


@pytest.mark.parametrize(
    "field, levels",
    [(variance_exploding(), 12), (variance_preserving(), 12), (gravity(2), 24)],
    ids=["ve", "vp", "gravity"],
)
def test_annealing_finds_the_modes_and_their_weights(field, levels):
    """Without the steps between levels 12 % of the particles get near a mode under gravity, whose noise is wide."""
    model, number = EmpiricalField(field, mixture(80, 20)), 300
    times = tuple(t for t in LogSNRGrid()(model.field, levels).tolist() if t > 0.02)
    start = model.field.sample_prior((number, 2), seeded(21)).double()
    annealed = AnnealedLangevin(model, times, repeats=10)
    x = annealed.run(start, 10 * len(times), 0.3, seeded(22))
    gaps = torch.cdist(x, CENTRES)
    shares = torch.bincount(gaps.argmin(1), minlength=4) / number
    assert (gaps.min(1).values < 1.5).double().mean() > 0.95
    assert (shares - torch.tensor([4, 2, 1, 1]) / 8).abs().max() < 0.1


@pytest.mark.parametrize("field, heads", [(variance_exploding(), 1), (gravity(2), 2)], ids=["ve", "gravity"])
def test_a_trained_generator_is_sampled(field, heads, tmp_path):
    """Two modes, 6 apart, of weights 3/4 and 1/4, learned in few steps."""
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    data = centres[(torch.arange(400) % 4 == 0).long()] + 0.5 * draws(400, 2, 0).float()
    torch.manual_seed(0)
    generator = Generator(field, MLP((2,), 32, 2, heads=heads), (2,)).calibrate(data)
    trainer = Trainer(
        steps=300, batch_size=256, learning_rate=5e-3, warmup=20, ema_decay=0.98, checkpoint_every=10**6, device="cpu"
    )
    trainer.fit(generator, FieldMatching(generator), TensorData(data), tmp_path, progress=False)
    times = tuple(t for t in LogSNRGrid()(field, 16).tolist() if t > 0.2)
    x = field.sample_prior((400, 2), seeded(1)).double()
    x = AnnealedLangevin(generator, times, 6).run(x, 6 * len(times), 0.3, seeded(2))
    gaps = torch.cdist(x, centres.double())
    assert x.dtype == torch.float64
    assert (gaps.min(1).values < 2.0).double().mean() > 0.85
    assert abs(float((gaps.argmin(1) == 1).double().mean()) - 0.25) < 0.12


def test_steps_of_annealing_are_in_units_of_the_noise():
    model = EmpiricalField(variance_exploding(), mixture(16, 0))
    annealed = AnnealedLangevin(model, (8.0, 2.0, 0.5), repeats=2)
    times = [moment.time for moment in annealed.moments(draws(4, 2, 0), 7, 0.1, seeded(0))]
    expected = [0.1 * sigma**2 for sigma in (8.0, 8.0, 2.0, 2.0, 0.5, 0.5, 0.5)]
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == pytest.approx(expected)


def test_each_level_of_annealing_follows_its_own_score():
    model = EmpiricalField(variance_exploding(), mixture(16, 0))
    annealed, x = AnnealedLangevin(model, (8.0, 0.5), repeats=1), draws(4, 2, 0)
    generator = seeded(3)
    for time in (8.0, 0.5):
        if time == 0.5:
            x = x + (0.5 - 8.0) * model.velocity(x, 8.0)
        x = (
            x
            + 0.1 * time**2 * model.score(x, time)
            + math.sqrt(0.2) * time * torch.randn(4, 2, generator=generator, dtype=torch.float64)
        )
    torch.testing.assert_close(annealed.run(draws(4, 2, 0), 2, 0.1, seeded(3)), x)


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"times": (1.0, 2.0)}, ("(1.0, 2.0)", "that fall")),
        ({"times": ()}, ("one or more that fall",)),
        ({"times": (1000.0, 1.0)}, ("time is 1000",)),
        ({"times": (1.0,), "repeats": 0}, ("repeats=0",)),
    ],
    ids=["rising", "none", "beyond", "repeats"],
)
def test_bad_annealing_is_refused(options, texts, user_error):
    with user_error(*texts):
        AnnealedLangevin(EmpiricalField(variance_exploding(), mixture(16, 0)), **options)


def test_annealing_needs_a_noise_level_and_a_velocity(user_error):
    with user_error("the model is function", "velocity(x, t)"):
        AnnealedLangevin(lambda x: -x, (1.0, 0.5))
    with user_error("RadialField", "affine"):
        AnnealedLangevin(EmpiricalField(radial_tanh(2), mixture(16, 0)), (1.0, 0.5))


def test_a_run_that_ends_before_the_last_level_warns():
    annealed = AnnealedLangevin(EmpiricalField(variance_exploding(), mixture(16, 0)), (8.0, 2.0, 0.5), repeats=2)
    with pytest.warns(UserWarning, match="ended at time 2 after 4 steps, and is done at 0.5; take more than 4 steps"):
        annealed.run(draws(4, 2, 0), 4, 0.1, seeded(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annealed.run(draws(4, 2, 0), 5, 0.1, seeded(0))
