import itertools
import math

import pytest
import torch
from torch import nn

from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.fdivergence import FDivergence
from diffusion.gradient_flow.functionals.ratios import ClassifierRatio, RatioNetwork
from diffusion.metrics import GaussianLaw, gaussian_kl
from diffusion.objectives import Batch, DensityRatio
from diffusion.trainer import Trainer

SHORT = Trainer(steps=20, batch_size=64, warmup=0, checkpoint_every=10)


def normal(number, seed, mean=(0.0, 0.0), std=(1.0, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(mean).double() + torch.tensor(std) * torch.randn(
        number, 2, generator=generator, dtype=torch.float64
    )


def log_normal(x, mean, std):
    return torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(std).double()).log_prob(x).sum(1)


TARGET, LAW = ((0.0, 0.0), (1.0, 0.7)), ((1.0, -0.5), (1.2, 1.2))


def exact(x):
    return log_normal(x, *TARGET) - log_normal(x, *LAW)


class TestObjective:
    def test_the_best_network_is_the_log_ratio_whatever_the_numbers(self):
        """The loss of c + log p/q is least at c = 0, with three times as many data as others."""
        data, others = normal(30_000, 0, *TARGET), normal(10_000, 1, *LAW)
        label = torch.cat([torch.ones(30_000), torch.zeros(10_000)]).long()
        batch = Batch(torch.cat([data, others]), label, None)
        objective = DensityRatio(30_000, 10_000)
        losses = torch.stack([objective(lambda x, c=c: c + exact(x), batch).mean() for c in (-0.1, 0.0, 0.1)])
        # A parabola through three points; its standard error is about 0.01.
        lowest = 0.05 * (losses[0] - losses[2]) / (losses[0] + losses[2] - 2 * losses[1])
        assert abs(float(lowest)) < 0.04

    def test_numbers_must_be_positive(self, user_error):
        with user_error("0 data and 3 other points"):
            DensityRatio(0, 3)


@pytest.fixture(scope="module")
def fitted():
    return ClassifierRatio(normal(3000, 0, *TARGET)).fitted(normal(1500, 1, *LAW))


class TestClassifier:
    def test_it_is_near_the_ratio_of_two_gaussians(self, fitted):
        x = normal(4000, 2, *LAW)
        velocity = FDivergence("reverse_kl", fitted).velocity(x)
        expected = FDivergence("reverse_kl", exact).velocity(x)
        assert float((velocity - expected).norm() / expected.norm()) < 0.25
        assert float(FDivergence("reverse_kl", fitted).value(x)) == pytest.approx(
            float(FDivergence("reverse_kl", exact).value(x)), rel=0.12
        )

    def test_the_target_gets_the_mass_that_its_density_has(self, fitted):
        """E_q r = 1, from twice as many data as particles: without the correction it would be 2."""
        x = normal(20_000, 3, *LAW)
        assert float(fitted.log_ratio(x).exp().mean()) == pytest.approx(1, abs=0.12)

    def test_it_does_not_learn_single_points(self):
        """Equal laws, few points and long training: a network that is not stopped says ratios of e^3 and more."""
        long = Trainer(steps=600, batch_size=64, learning_rate=1e-2, warmup=0, ema_decay=0.9, checkpoint_every=20)
        found = ClassifierRatio(normal(60, 0), RatioNetwork((2,)), long, long).fitted(normal(60, 1))
        assert float(found.log_ratio(normal(1000, 2)).abs().max()) < 1.5

    def test_a_second_fit_starts_from_the_first(self, fitted):
        again = ClassifierRatio(fitted.data, fitted.network, SHORT, fits=1).fitted(normal(1500, 1, *LAW))
        x = normal(1000, 2, *LAW)
        assert float((again.log_ratio(x) - fitted.log_ratio(x)).abs().mean()) < 0.15
        assert again.fits == 2

    def test_fits_are_a_function_of_the_points_and_leave_all_else_alone(self):
        network = RatioNetwork((2,))
        before = [parameter.clone() for parameter in network.parameters()]
        state = torch.get_rng_state()
        ratio = ClassifierRatio(normal(100, 0), network, SHORT, SHORT)
        x = normal(100, 1, *LAW)
        one, two = ratio.fitted(x), ratio.fitted(x)
        assert torch.equal(one.log_ratio(x), two.log_ratio(x))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, before, network.parameters()))
        assert one.log_ratio(x).dtype == torch.float64 and one.log_ratio(x.float()).dtype == torch.float32
        assert not one.log_ratio(x).requires_grad

    def test_a_flow_with_it_reaches_the_data(self):
        data, x = normal(1000, 0, *TARGET), normal(1000, 1, (2.0, 2.0))
        trainer = Trainer(
            steps=60,
            batch_size=256,
            learning_rate=1e-2,
            warmup=0,
            weight_decay=0.5,
            ema_decay=0.95,
            checkpoint_every=20,
        )
        functional = FDivergence("reverse_kl", ClassifierRatio(data, trainer=trainer))
        moments = list(WassersteinFlow(functional).moments(x, steps=14, step_size=0.15))
        values = [float(moment.functional.value(moment.particles)) for moment in moments[:1] + moments[4::5]]
        laws = [GaussianLaw.of(points) for points in (data, x, moments[-1].particles)]
        assert values[-1] < 0.2 * values[0]
        assert all(later < earlier for earlier, later in itertools.pairwise(values[:4]))
        assert gaussian_kl(laws[2], laws[0]) < 0.05 * gaussian_kl(laws[1], laws[0])


class TestErrors:
    def test_a_ratio_that_was_never_fitted_says_so(self, user_error):
        functional = FDivergence("pearson", ClassifierRatio(normal(10, 0)))
        for call in (functional.value, functional.velocity, functional.first_variation):
            with user_error("never fitted", "run a flow"):
                call(normal(10, 1))

    def test_bad_input_is_refused(self, user_error):
        with user_error("network has output (2, 3)", "(2,) or (2, 1)"):
            ClassifierRatio(normal(10, 0), nn.Linear(2, 3))
        with user_error("data has entries that are not finite"):
            ClassifierRatio(normal(10, 0) / 0)
        with user_error("data is of 1 point"):
            ClassifierRatio(normal(1, 0))
        with user_error("particles have shape (3,), expected (2,), as the data"):
            ClassifierRatio(normal(10, 0)).fitted(torch.zeros(4, 3))


def test_a_network_of_the_users_own_may_say_a_column():
    ratio = ClassifierRatio(normal(50, 0), nn.Linear(2, 1), SHORT, SHORT).fitted(normal(50, 1, *LAW))
    assert ratio.log_ratio(normal(7, 2)).shape == (7,)
    assert math.isfinite(float(FDivergence("pearson", ratio).value(normal(7, 2))))
