"""Multistep where the model knows the mean of its data: the velocity at the horizon is not evaluated."""

import pytest
import torch
import yaml
from problems import AFFINE, FIELDS, names
from reference import BUILD, error, solved

from diffusion import Generator
from diffusion.fields import EmpiricalField, radial_gravity, variance_exploding
from diffusion.networks import MLP
from diffusion.samplers import BandGrid, Counted, Multistep, tune
from diffusion.samplers.tuned import Tuned, store_tuned, tuned_sampler


class Known:
    """A model that tells the mean of its data, and keeps the times at which it is asked."""

    def __init__(self, model, mean):
        self.model, self.field, self.data_mean, self.times = model, model.field, mean, []

    def velocity(self, x, t):
        self.times.append(float(t.max()))
        return self.model.velocity(x, t)


class OnePoint:
    """A single data point."""

    def __init__(self, field, data_mean):
        self.field, self.data_mean = field, data_mean

    def velocity(self, x, t):
        return self.field.velocity(x, t, self.data_mean.expand_as(x))


def knowing(model):
    return Known(model, model.weights @ model.means)


@pytest.mark.parametrize("case", **names(AFFINE))
def test_it_is_the_velocity_of_data_at_their_mean(case):
    """For a single data point it is exact: the sampler is that with an evaluation more."""
    field = case.build()
    model = OnePoint(field, torch.full((case.dim,), 0.4, dtype=torch.float64))
    x_T = field.sample_prior((5, case.dim), torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps, order in ((6, 1), (6, 2), (10, 3)):
        known, asked = (Multistep(steps + more, order, from_mean=not more, std=0.5) for more in (0, 1))
        counted = Counted(model)
        torch.testing.assert_close(known(counted, x_T), asked(model, x_T), rtol=1e-9, atol=1e-9)
        assert counted.evaluations == steps


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("steps", [5, 6, 8, 10, 12])
def test_few_evaluations_make_a_smaller_error(name, steps):
    problem = solved(name, t_min=1e-6)
    known = knowing(problem.model)
    assert error(Multistep(steps), problem._replace(model=known)) < error(Multistep(steps), problem)
    assert len(known.times) == steps and max(known.times) < problem.model.field.horizon


@pytest.mark.parametrize(
    "options",
    [{"steps": 13}, {"order": 2}, {"grid": BandGrid(0.1, 2.0)}, {"from_mean": False}, {"std": 2.0}],
    ids=["many steps", "order given", "grid given", "not wanted", "wide data"],
)
def test_otherwise_the_horizon_is_evaluated(options):
    """There the order is the declared one, and x tells more than the mean where the noise is not above 50 std."""
    model = knowing(solved("gravity").model)
    x_T = model.field.sample_prior((3, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = Multistep(**{"steps": 6} | options)
    assert sampler(model, x_T).equal(sampler(model.model, x_T))
    assert max(model.times) == model.field.horizon
    assert not sampler.starts_from_mean(model, x_T)


@pytest.mark.parametrize("case", **names([case for case in FIELDS if case not in AFFINE]))
def test_fields_whose_velocity_is_not_linear_in_the_data_are_evaluated(case, user_error):
    """The velocity of data at their mean is not the mean of their velocities there."""
    model, x = OnePoint(case.build(), torch.zeros(case.dim)), torch.ones(2, case.dim)
    assert not Multistep(6).starts_from_mean(model, x)
    with user_error("from_mean=True", "affine field"):
        Multistep(6, from_mean=True).starts_from_mean(model, x)


def test_data_of_many_coordinates_may_be_seen_from_farther():
    """Along a main axis they may reach as far as sqrt(d) std."""
    for dim, horizon, expected in ((2, 41, True), (2, 39, False), (400, 65, True), (400, 63, False)):
        model = OnePoint(variance_exploding(horizon=float(horizon)), torch.zeros(dim))
        assert Multistep(8, std=0.8).starts_from_mean(model, torch.zeros(1, dim)) == expected


def test_tuning_takes_it_and_a_file_keeps_it(tmp_path):
    model = knowing(solved("gravity").model)

    def draw(number, generator):
        return model.field.sample_prior((number, 2), generator, dtype=torch.float64), {}

    found, without = (tune(one, draw, 4, trajectories=48, rounds=4) for one in (model, model.model))
    assert found.sampler.from_mean and not without.sampler.from_mean
    assert found.error < without.error
    model.times.clear()
    x_T = draw(7, torch.Generator().manual_seed(1))[0]
    found.sampler(model, x_T)
    assert len(model.times) == 4 and max(model.times) < model.field.horizon
    store_tuned(tmp_path, Tuned(found.sampler, 0.1, 0.2))
    assert tuned_sampler(tmp_path, 4) == found.sampler


def test_a_file_of_before_samples_as_it_was_tuned_to(tmp_path):
    """It does not say where from, and evaluates the horizon."""
    sampler = Multistep(4, 2, grid=BandGrid(0.1, 2.0, (0.0, 0.2, 0.5, 0.8, 1.0)), std=0.6)
    path = store_tuned(tmp_path, Tuned(sampler, 0.1, 0.2))
    entries = yaml.safe_load(path.read_text())
    del entries[4]["sampler"]["from_mean"]
    path.write_text(yaml.safe_dump(entries))
    model, x_T = knowing(solved("linear").model), solved("linear").x_T
    assert tuned_sampler(tmp_path, 4)(model, x_T).equal(sampler(model.model, x_T))


def test_generators_and_data_sets_know_their_mean():
    x0 = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + 3
    generator = Generator(variance_exploding(), MLP((2,), width=8), (2,)).calibrate(x0)
    torch.testing.assert_close(generator.data_mean, x0.mean(0))
    assert Generator(variance_exploding(), MLP((2,), width=8, num_classes=3), (2,)).calibrate(x0).data_mean is None
    assert Generator(radial_gravity(2), MLP((2,), width=8), (2,)).calibrate(x0).data_mean is None
    torch.testing.assert_close(EmpiricalField(variance_exploding(), x0).data_mean.float(), x0.mean(0))
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weighted = EmpiricalField(variance_exploding(), x0, weights).data_mean
    torch.testing.assert_close(weighted, (weights / weights.sum()) @ x0.double())


def test_what_cannot_be_taken_is_an_error(user_error):
    problem = solved("linear")
    with user_error("from_mean=True", "data_mean"):
        Multistep(6, from_mean=True)(problem.model, problem.x_T)
    for mean, found in ((torch.zeros(3), "(3,)"), ([0.0, 0.0], "list")):
        with user_error("data_mean", found, "(2,)"):
            Multistep(6)(Known(problem.model, mean), problem.x_T)
        Multistep(30)(Known(problem.model, mean), problem.x_T)  # asks for none
    with user_error("from_mean=1", "true, false or null"):
        Multistep(6, from_mean=1)
