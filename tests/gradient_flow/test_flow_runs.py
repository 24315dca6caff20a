"""Runs that are reported: what falls, how near the particles come to the data, and the pictures of it."""

import math

import pytest
import torch
from cases import draws
from PIL import Image

from diffusion.gradient_flow import Chase, EnergyDistance, Langevin, WassersteinFlow, recipes
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.drifting import Drifting
from diffusion.gradient_flow.pictures import save_animation, save_curve
from diffusion.gradient_flow.runs import Run, follow
from diffusion.metrics import nearest_distance

DATA, HELD_OUT, START = draws(80, 2, 0, 0.3), draws(50, 2, 1, 0.3), 2 + draws(60, 2, 2)


@pytest.fixture(scope="module")
def run():
    rows = []
    found = follow(
        WassersteinFlow(EnergyDistance(DATA)),
        START,
        40,
        1.0,
        DATA,
        HELD_OUT,
        frames=5,
        log=lambda *row: rows.append(row),
    )
    return found, rows


def test_figures_are_those_of_the_particles(run):
    found, rows = run
    assert found.steps == [0, 10, 20, 30, 40] and found.frames.shape == (5, 60, 2)
    for k in (0, 4):
        value = float(EnergyDistance(DATA, directions=512).value(found.frames[k]))
        assert found.columns["functional"][k] == pytest.approx(value, rel=0.05, abs=2e-3)
        nearest = float(nearest_distance(found.frames[k], DATA).median())
        assert found.columns["nearest"][k] == pytest.approx(nearest)
    assert found.held_out == pytest.approx(float(nearest_distance(HELD_OUT, DATA).median()))
    torch.testing.assert_close(found.frames[0], START)
    assert [step for step, _ in rows] == found.steps
    assert rows[-1][1] == {name: column[-1] for name, column in found.columns.items()}


def test_the_table_says_that_the_functional_fell_and_that_it_memorised(run):
    found, _ = run
    text = found.table()
    assert "the functional fell: " in text and "can memorise it" in text
    copies = Run(
        found.steps, {**found.columns, "nearest": [1.0] * 4 + [0.4 * found.held_out]}, found.frames, found.held_out
    )
    assert "most are copies" in copies.table()
    backwards = Run([0, 1], {**found.columns, "functional": [1.0, 2.0], "nearest": [1.0, 0.9]}, found.frames[:2], 1.0)
    assert "DID NOT FALL: 1 to 2" in "\n".join(backwards.remarks())
    assert "most are no copies" in "\n".join(backwards.remarks())


def test_a_functional_without_a_value_is_said_to_have_none():
    flow = WassersteinFlow(Drifting(DATA, (0.5,)), control=None)
    found = follow(flow, START, 4, 1.0, DATA, HELD_OUT, frames=3)
    assert all(map(math.isnan, found.columns["functional"]))
    assert found.to_dict()["functional"] == [None] * 3
    assert "no value that can be computed: the drifting field has no value" in found.table()


def test_too_few_frames_are_refused(user_error):
    with user_error("frames is 1", "at least 2"):
        follow(WassersteinFlow(EnergyDistance(DATA)), START, 4, 1.0, DATA, HELD_OUT, frames=1)


@pytest.mark.parametrize("shape", [(2,), (1,), (1, 4, 4)], ids=str)
def test_pictures_are_written(tmp_path, shape):
    size = math.prod(shape)
    data, start = draws(20, size, 0).view(-1, *shape), draws(20, size, 1).view(-1, *shape)
    found = follow(WassersteinFlow(EnergyDistance(data)), start, 3, 1.0, data, data, frames=4)
    with Image.open(save_animation(found, data, tmp_path / "flow.gif")) as picture:
        assert picture.n_frames == 4
    assert Image.open(save_curve(found, tmp_path / "curve.png")).size[0] > 100


def test_the_density_is_that_of_the_blurred_data():
    functional = recipes.density(DATA, std=0.4)
    x = draws(10, 2, 3)
    squares = (x[:, None] - DATA).square().sum(2) / (2 * 0.4**2)
    exact = (-squares).logsumexp(1) - math.log(len(DATA) * math.tau * 0.4**2)
    rest = functional.terms()[1].functional
    torch.testing.assert_close(rest.first_variation(x), -exact)


def test_birth_and_death_share_the_functional_of_langevin():
    functional = recipes.density(DATA, std=0.4)
    both = recipes.langevin_birth_death(functional)
    assert both.functional is functional and isinstance(both.flows[0], Langevin)
    assert both.run(START, 3, 0.01, torch.Generator().manual_seed(0)).shape == START.shape


def test_annealing_falls_through_the_levels_of_the_data():
    flow = recipes.annealed(recipes.model(DATA), levels=8, repeats=5)
    assert len(flow.times) == 8 and flow.times[0] == 80.0 and flow.times[-1] == pytest.approx(0.002)
    x = flow.run(START, 40, 0.2, torch.Generator().manual_seed(0))
    assert float(nearest_distance(x, DATA).median()) < 0.01


def test_every_public_name_is_there():
    import diffusion.gradient_flow as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    assert issubclass(package.SinkhornDivergence, Functional) and package.Chase is Chase
