import itertools
import math

import pytest
import torch
from cases import GaussianRatio, LineRatio, draws, quantiles
from scipy.integrate import quad
from scipy.stats import norm

from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.fdivergence import KINDS, Divergence, FDivergence, power
from diffusion.gradient_flow.gaussian_flow import GaussianFlow
from diffusion.metrics import GaussianLaw, gaussian_bhattacharyya, gaussian_kl

ALL = {**KINDS, "power 3/2": power(1.5), "power 1/2": power(0.5), "power 0": power(0), "power 1": power(1)}
every = pytest.mark.parametrize("name", ALL)
P, Q = norm(0.3, 1.0), norm(0.0, 1.1)  # the ratio of the tails is such that all integrals below exist


def kind(name):
    return name if name in KINDS else ALL[name]


def log_ratio(x):
    """log p/q of P and Q at x (N, 1)."""
    return (-(((x - 0.3) / 1.0) ** 2) / 2 + (x / 1.1) ** 2 / 2 + math.log(1.1)).flatten()


def line(law):
    mean, std = law.args
    return GaussianLaw(torch.tensor([mean]).double(), torch.tensor([[std**2]]).double())


def integral(integrand):
    return quad(lambda x: integrand(P.pdf(x), Q.pdf(x)), -12, 12, epsabs=1e-12, epsrel=1e-12)[0]


KNOWN = {
    "reverse_kl": lambda: gaussian_kl(line(Q), line(P)),
    "forward_kl": lambda: gaussian_kl(line(P), line(Q)),
    "jeffreys": lambda: gaussian_kl(line(P), line(Q)) + gaussian_kl(line(Q), line(P)),
    "pearson": lambda: integral(lambda p, q: (p - q) ** 2 / q),
    "neyman": lambda: integral(lambda p, q: (p - q) ** 2 / p),
    "jensen_shannon": lambda: integral(lambda p, q: p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) / 2,
    "squared_hellinger": lambda: 1 - math.exp(-gaussian_bhattacharyya(line(P), line(Q))),
    "power 3/2": lambda: integral(lambda p, q: (p**1.5 / q**0.5 - q) / 0.75),
    "power 1/2": lambda: 4 * (1 - math.exp(-gaussian_bhattacharyya(line(P), line(Q)))),
    "power 0": lambda: gaussian_kl(line(Q), line(P)),
    "power 1": lambda: gaussian_kl(line(P), line(Q)),
}
CURVATURE = {"jeffreys": 2, "pearson": 2, "neyman": 2, "jensen_shannon": 0.25, "squared_hellinger": 0.25}


class TestKinds:
    @every
    def test_the_value_is_the_divergence(self, name):
        functional = FDivergence(kind(name), log_ratio)
        # Neyman's integrand grows in the tails that the last of the quantiles cut off.
        rel = 1e-2 if name == "neyman" else 1e-4
        assert float(functional.value(quantiles(200_000, *Q.args))) == pytest.approx(KNOWN[name](), rel=rel)

    @every
    def test_the_velocity_is_minus_the_gradient_of_the_first_variation(self, name):
        x = torch.linspace(-4, 4, 41).double()[:, None].requires_grad_()
        functional = FDivergence(kind(name), log_ratio)
        (gradient,) = torch.autograd.grad(functional.first_variation(x).sum(), x)
        torch.testing.assert_close(functional.velocity(x), -gradient, rtol=1e-10, atol=1e-12)

    @every
    def test_the_divergence_falls_by_the_mean_square_of_the_velocity(self, name):
        """With the ratio that follows the law: of x + e v(x) by the change of variables, at two small e."""
        functional, e, h = FDivergence(kind(name), log_ratio), 1e-6, 1e-5
        x = torch.linspace(-9, 9, 20001).double()[:, None]
        density = torch.from_numpy(Q.pdf(x[:, 0].numpy())) * (x[1, 0] - x[0, 0])
        velocity = functional.velocity(x)
        stretch = (functional.velocity(x + h) - functional.velocity(x - h))[:, 0] / (2 * h)

        def value(e):
            log_p = -((x + e * velocity - 0.3)[:, 0] ** 2) / 2
            log_q = -((x / 1.1)[:, 0] ** 2) / 2 - math.log(1.1) - (e * stretch).log1p()
            return float(density @ functional.divergence.value(log_p - log_q))

        inside = density @ velocity[:, 0].square()
        assert (value(e) - value(-e)) / (2 * e) == pytest.approx(-float(inside), rel=1e-4)

    @every
    def test_near_its_minimum_it_is_a_multiple_of_kl(self, name):
        divergence = ALL[name]
        at_one = torch.zeros(1, dtype=torch.float64)
        assert float(divergence.speed(at_one)) == CURVATURE.get(name, 1)
        assert float(divergence.value(at_one)) == 0

    def test_powers_are_the_named_ones(self):
        y = torch.linspace(-3, 3, 13).double()
        for name, order, factor in (("reverse_kl", 0, 1), ("forward_kl", 1, 1), ("pearson", 2, 2), ("neyman", -1, 2)):
            torch.testing.assert_close(ALL[name].speed(y), factor * power(order).speed(y))
            one, other = ALL[name].variation(y), factor * power(order).variation(y)
            torch.testing.assert_close(one - one[6], other - other[6])


class TestTangent:
    @every
    def test_fitted_or_not_the_value_is_the_same_at_these_particles(self, name):
        x, functional = quantiles(1000, *Q.args), FDivergence(kind(name), log_ratio)
        assert float(functional.fitted(x).value(x)) == pytest.approx(float(functional.value(x)), rel=1e-10)

    @every
    def test_elsewhere_it_is_a_lower_bound_of_second_order(self, name):
        """Of Q moved by s: the gap is positive and grows as s^2."""
        x, functional = quantiles(200_000, *Q.args), FDivergence(kind(name), log_ratio)
        fitted, gaps = functional.fitted(x), []
        for s in (0.05, 0.1):
            moved = x + s
            carried = log_ratio(moved) + (x.square() - moved.square())[:, 0] / (2 * 1.1**2)  # the density comes along
            exact = functional.divergence.value(carried)
            gaps.append(float(exact.mean() - fitted.value(moved)))
        assert gaps[0] > 0
        assert gaps[1] / gaps[0] == pytest.approx(4, rel=0.25)


class TestFlow:
    TARGET = GaussianLaw(torch.tensor([1.0, 0.0]).double(), torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double())

    def test_reverse_kl_moves_gaussians_as_their_exact_flow(self):
        x = 2 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        flow = WassersteinFlow(FDivergence("reverse_kl", GaussianRatio(self.TARGET)), control=None)
        exact = GaussianFlow(self.TARGET).at(GaussianLaw.of(x), 0.4)
        gaps = []
        for steps in (20, 40):
            found = GaussianLaw.of(flow.run(x, steps, 0.4 / steps))
            gaps.append(float((found.covariance - exact.covariance).norm() + (found.mean - exact.mean).norm()))
        assert gaps[1] < 0.04
        assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.3)

    @every
    def test_every_divergence_falls(self, name):
        """With the exact ratio, which follows the particles: from its known value, through positive ones, to near 0."""
        ratio = LineRatio(torch.distributions.Normal(*P.args).log_prob)
        moments = list(WassersteinFlow(FDivergence(kind(name), ratio)).moments(quantiles(400, *Q.args), 20, 0.05))
        values = [moment.value() for moment in moments]
        assert values[0] == pytest.approx(KNOWN[name](), rel=3e-2 if name == "neyman" else 1e-2)
        assert all(0 < later < earlier for earlier, later in itertools.pairwise(values))
        assert values[-1] < 0.7 * values[0]
        if name == "reverse_kl":
            law = GaussianFlow(line(P)).at(line(Q), moments[-1].time)
            assert values[-1] == pytest.approx(gaussian_kl(law, line(P)), rel=0.1)

    def test_the_value_along_the_way_is_that_of_the_ratio_there(self):
        """After steps so long that the tangent of the step before is far off."""
        x = 2 + draws(60, 2, 0)
        flow = WassersteinFlow(FDivergence("reverse_kl", GaussianRatio(self.TARGET)), control=None)
        for moment in flow.moments(x, 3, 0.3):
            expected = gaussian_kl(GaussianLaw.of(moment.particles), self.TARGET)
            assert moment.value() == pytest.approx(expected, rel=1e-9)

    @every
    def test_every_kind_nears_the_target(self, name):
        """At small steps, while the particles' law stays close to Gaussian, KL falls with every one of them."""
        x = 0.5 + torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        flow = WassersteinFlow(FDivergence(kind(name), GaussianRatio(self.TARGET)))
        moments = list(flow.moments(x, steps=20, step_size=0.01))
        kl = [gaussian_kl(GaussianLaw.of(moment.particles), self.TARGET) for moment in moments]
        assert kl[-1] < 0.97 * kl[0]
        assert all(later < earlier for earlier, later in itertools.pairwise(kl))

    def test_images_move_as_points(self):
        x = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        functional = FDivergence("pearson", lambda x: -x.flatten(1).square().sum(1) / 2)
        expected = FDivergence("pearson", lambda x: -x.square().sum(1) / 2).velocity(x.flatten(1))
        torch.testing.assert_close(functional.velocity(x), expected.view(x.shape))


class TestErrors:
    def test_unknown_names_are_refused(self, user_error):
        with user_error("kind is 'kl', expected one of reverse_kl, forward_kl", "squared_hellinger"):
            FDivergence("kl", log_ratio)
        with user_error("kind is ['pearson']"):
            FDivergence(["pearson"], log_ratio)
        with user_error("ratio is 3, expected"):
            FDivergence("pearson", 3)

    def test_functions_that_are_no_divergence_are_refused(self, user_error):
        good = KINDS["pearson"]
        with user_error("f(1) = 1, expected 0"):
            FDivergence(good._replace(value=lambda y: 1 + good.value(y)), log_ratio)
        with user_error("variation", "from its value"):
            FDivergence(good._replace(variation=lambda y: -y), log_ratio)
        with user_error("speed", "from its variation"):
            FDivergence(good._replace(speed=torch.exp), log_ratio)
        with user_error("r^2 f''(r) = -1", "convex"):
            FDivergence(Divergence(lambda y: y, lambda y: y - 1, lambda y: -torch.ones_like(y)), log_ratio)
        with user_error("order of a power divergence is nan"):
            power(math.nan)

    def test_variations_may_differ_by_a_constant(self):
        good = KINDS["pearson"]
        FDivergence(good._replace(variation=lambda y: 3 + good.variation(y)), log_ratio)

    def test_ratios_of_another_shape_are_refused(self, user_error):
        x = torch.zeros(4, 2)
        with user_error("the log ratio has shape (4, 2), expected (4,)"):
            FDivergence("pearson", lambda x: x).value(x)
        with user_error("has no derivative in x"):
            FDivergence("pearson", lambda x: torch.zeros(4)).velocity(x)
