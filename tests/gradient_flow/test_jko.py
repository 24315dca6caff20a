import itertools
import math

import pytest
import torch
from cases import draws
from torch import nn

from diffusion.fokker_planck.correction import Correction
from diffusion.gradient_flow.flows.jko import JKO, JKOObjective
from diffusion.gradient_flow.flows.langevin import Noised
from diffusion.gradient_flow.functionals.base import Sum, Term
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.targets import ScorePotential
from diffusion.gradient_flow.gaussian_flow import GaussianFlow
from diffusion.metrics import GaussianLaw, gaussian_wasserstein
from diffusion.objectives import Batch
from diffusion.trainer import Trainer

TRAINER = Trainer(
    steps=120, batch_size=256, learning_rate=2e-2, warmup=5, ema_decay=0.95, checkpoint_every=10**6, device="cpu"
)
SHORT = Trainer(steps=3, batch_size=8, learning_rate=1e-3, warmup=0, checkpoint_every=10**6, device="cpu")
TARGET = GaussianLaw(torch.tensor([1.0, -1.0]).double(), torch.tensor([[1.0, 0.4], [0.4, 0.5]]).double())

STEP = 0.5


def network(dim=2, width=16, bent=False):
    made = Correction(dim, (width,), torch.Generator().manual_seed(0))
    if bent:
        with torch.no_grad():
            made.last.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return made


def log_target(x):
    return torch.distributions.MultivariateNormal(*TARGET).log_prob(x)


@pytest.fixture(scope="module")
def moments():
    return list(JKO(KL(log_target), network(), TRAINER).moments(draws(500, 2, 0, 1.5), steps=2, step_size=STEP))


class TestGaussian:
    """KL between Gaussians, whose proximal steps are known."""

    def test_the_steps_are_the_proximal_ones(self, moments):
        law = GaussianLaw.of(moments[0].particles)
        for moment in moments[1:]:
            start, law = law, GaussianFlow(TARGET).proximal(law, STEP)
            found = GaussianLaw.of(moment.particles)
            # A step that is explicit, or without the transport, is off by more than 0.1.
            assert float((found.covariance - law.covariance).norm()) < 0.015 * float(law.covariance.norm())
            assert float((found.mean - law.mean).norm()) < 0.01
            flow = GaussianFlow(TARGET)
            transport = gaussian_wasserstein(start, law) ** 2 / (2 * STEP)
            assert moment.memory.transport == pytest.approx(transport, rel=0.03)
            assert moment.memory.change == pytest.approx(flow.value(law) - flow.value(start), rel=0.03)

    def test_the_functional_falls_by_more_than_the_way_costs(self, moments):
        for before, moment in itertools.pairwise(moments):
            assert moment.memory.objective < 0
            assert moment.memory.total == before.memory.total + moment.memory.change
        assert [moment.time for moment in moments] == [0, STEP, 2 * STEP]

    def test_the_second_step_starts_from_the_map_of_the_first(self):
        flow = JKO(KL(log_target), network(), SHORT, first=TRAINER)
        one, two = list(flow.moments(draws(200, 2, 0), steps=2, step_size=0.1))[1:]
        gap = [p - q for p, q in zip(one.memory.network.parameters(), two.memory.network.parameters(), strict=True)]
        assert 0 < max(float(part.abs().max()) for part in gap) < 0.01


def test_without_entropy_it_is_the_proximal_map_at_any_step_size():
    """Of 5 |x|^2 / 2 with tau = 1: x / 6. An explicit step would go to -4 x."""
    flow = JKO(Potential(lambda x: 2.5 * x.square().sum(1)), network(), TRAINER)
    x = draws(200, 2, 0)
    moved = flow.run(x, 1, 1.0)
    assert float((moved - x / 6).norm() / (x / 6).norm()) < 0.1


class TestObjective:
    def test_its_gradient_is_that_of_the_proximal_functional(self):
        """By autograd through the values of particles that a bent map moves, and through determinants."""
        net, x, tau = network(3, bent=True), draws(12, 3, 0), 0.3
        rest = Potential(lambda x: x.cos().sum(1)) + 0.7 * Interaction(lambda gaps: (-gaps.square().sum(-1)).exp())
        split = Noised((Term(0.6, Entropy()),), rest)
        found = torch.autograd.grad(JKOObjective(split, tau)(net, Batch(x, None, None)).mean(), net.parameters())

        moved = x + tau * net(x)
        log_dets = []
        for point in x:
            jacobian = torch.autograd.functional.jacobian(
                lambda point: point + tau * net(point[None])[0], point, create_graph=True
            )
            log_dets.append(jacobian.det().abs().log())
        value = rest.value(moved) - 0.6 * torch.stack(log_dets).mean()
        value = value + (moved - x).square().sum(1).mean() / (2 * tau)
        expected = torch.autograd.grad(value / tau, net.parameters())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_it_moves_images_as_points(self):
        class Reshaped(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = network(4, bent=True)

            def forward(self, x):
                return self.body(x.flatten(1)).view(x.shape)

        x = draws(5, 4, 0)
        objective = JKOObjective(Noised((Term(1.0, Entropy()),), Sum(())), 0.2)
        images, log_det = objective.moved(Reshaped(), x.view(5, 1, 2, 2))
        points, expected = objective.moved(network(4, bent=True), x)
        torch.testing.assert_close(images.flatten(1), points)
        torch.testing.assert_close(log_det, expected)
        batch = Batch(x.view(5, 1, 2, 2), None, None)
        torch.testing.assert_close(objective(Reshaped(), batch), objective(network(4, bent=True), Batch(x, None, None)))


class TestRuns:
    def test_a_run_is_a_function_of_its_input_and_leaves_all_else_alone(self):
        net, x = network(), draws(20, 2, 0)
        before, state = [parameter.clone() for parameter in net.parameters()], torch.get_rng_state()
        flow = JKO(KL(log_target), net, SHORT)
        assert torch.equal(flow.run(x, 2, 0.1), flow.run(x, 2, 0.1))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, before, net.parameters()))
        assert flow.run(x.float(), 1, 0.1).dtype == torch.float32

    def test_an_entropy_alone_spreads_and_knows_its_value(self):
        moment = list(JKO(Entropy(), network(), SHORT).moments(draws(20, 2, 0), steps=1, step_size=0.1))[-1]
        assert math.isfinite(moment.memory.objective)

    def test_a_target_known_by_its_score_has_no_objective(self):
        moment = list(JKO(KL(lambda x: -x), network(), SHORT).moments(draws(20, 2, 0), steps=1, step_size=0.1))[-1]
        assert math.isnan(moment.memory.objective) and bool(moment.particles.isfinite().all())


class TestErrors:
    def test_many_coordinates_are_refused_where_determinants_are_needed(self, user_error):
        with user_error("particles have 33 coordinates, expected at most 32", "Langevin"):
            JKO(KL(lambda x: -x.square().sum(1)), network(33), SHORT).run(draws(5, 33, 0), 1, 0.1)
        JKO(Potential(lambda x: x.square().sum(1)), network(33), SHORT).run(draws(5, 33, 0), 1, 0.1)

    def test_networks_of_another_shape_are_refused(self, user_error):
        with user_error("output (2, 3), expected (2, 2)"):
            JKO(KL(log_target), nn.Linear(2, 3), SHORT).run(draws(5, 2, 0).float(), 1, 0.1)

    def test_a_map_that_folds_space_is_refused(self, user_error):
        net = network()
        with torch.no_grad():
            net.last.weight[:, -2:] = torch.diag(torch.tensor([-30.0, 1.0]))
        with user_error("the map folds space over at particle 0", "smaller step_size"):
            JKO(Entropy(), net, SHORT).run(draws(5, 2, 0), 1, 0.1)


def test_a_step_costs_two_log_densities():
    """Of its ends, for the change: a model's is an integral along its flow."""
    asked = []

    def log_density(x):
        asked.append(len(x))
        return -x.square().sum(1) / 2

    functional = KL(ScorePotential(lambda x: -x, log_density))
    JKO(functional, network(), SHORT).run(draws(20, 2, 0), 3, 0.1)
    assert asked == [20] * 6
