"""Annealing: exact moves, an adaptive path, and modes found with their weights."""

import math
import warnings

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.flows.ensemble import jumped, log_kernels, neighbour_widths
from diffusion.gradient_flow.flows.tempering import Bridge, Known, Tempered, _rise
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.targets import ScorePotential

CENTRES = 3 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def log_prob(x):
    """Four modes of standard deviation 0.2 with unequal weights, off the centre of the first particles."""
    squares = (x[:, None] - 1 - CENTRES).square().sum(2)
    return (WEIGHTS.log() - squares / (2 * 0.2**2)).logsumexp(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


EARLY = pytest.mark.filterwarnings("ignore:annealing ended")


def last(flow, x, steps, step_size=1.0, seed=0):
    *_, moment = flow.moments(x, steps, step_size, seeded(seed))
    return moment


@pytest.mark.parametrize(("jumps", "number"), [(0, 2000), (2, 400)], ids=["without_jumps", "jumps"])
def test_modes_are_found_with_their_weights(jumps, number):
    """Without jumps shares are as wrong as resampling left them, so particles are more."""
    moment = last(Tempered(KL(log_prob), jumps=jumps, loss=0.03), draws(number, 2, 0, spread=3.0), 80)
    assert moment.memory.share == 1.0
    nearest = torch.cdist(moment.particles - 1, CENTRES).argmin(1)
    shares = torch.bincount(nearest, minlength=4) / number
    assert float((shares - WEIGHTS).abs().max()) < 0.08
    within = moment.particles - 1 - CENTRES[nearest]
    assert float(within.square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)
    assert moment.memory.evaluations == 81


@EARLY
def test_evaluations_are_one_value_and_one_gradient_of_each_particle_a_step():
    asked = {True: 0, False: 0}

    def counted(x):
        asked[x.requires_grad] += len(x)
        return log_prob(x)

    last(Tempered(KL(counted)), draws(50, 2, 0), 10)
    assert asked[True] == 50 * 11
    assert asked[False] <= 50 * 11 + 10  # and one particle a step, by which KL tells a density from a score


def test_the_moments_of_a_gaussian_are_exact():
    """At temperature 0.5, from particles of another place and scale."""
    variances = torch.tensor([0.04, 1.0, 4.0], dtype=torch.float64)
    functional = 0.5 * Entropy() + Potential(lambda x: 0.25 * ((x - 1).square() / variances).sum(1))
    x = last(Tempered(functional, loss=0.05), draws(1000, 3, 0, spread=2.0), 60).particles
    assert float(((x.mean(0) - 1) / variances.sqrt()).abs().max()) < 0.1
    assert float((x.var(0) / variances - 1).abs().max()) < 0.15


def test_a_jump_leaves_the_law_as_it_is():
    """A uniform law on [0, 1], where kernels reach over the edges: means of x, x^2, |x - 1/2|, of fresh draws, stay."""
    bridge = Bridge(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    def ask(x):
        inside = ((x > 0) & (x < 1)).all(1)
        return Known(x, torch.where(inside, 0.0, -math.inf).double(), torch.zeros_like(x))

    generator, total, moved = seeded(), 0, 0
    for _ in range(400):
        x = torch.rand(40, 1, generator=generator, dtype=torch.float64)
        now, rate = jumped(ask(x), bridge, 1.0, ask, generator)
        assert rate == float((now.x != x).double().mean())
        total, moved = total + torch.cat([now.x, now.x**2, (now.x - 0.5).abs()], 1).mean(0), moved + rate
    expected = torch.tensor([1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    deviations = torch.tensor([1 / 12, 4 / 45, 1 / 48], dtype=torch.float64).sqrt()
    assert float(((total / 400 - expected) / (deviations / math.sqrt(16000))).abs().max()) < 6
    assert 0.3 < moved / 400 < 0.95


def test_kernels_are_a_density_with_widths_of_neighbours():
    points = draws(30, 1, 0)
    widths = neighbour_widths(points)
    distances = (points - points.T).abs().sort(1).values
    torch.testing.assert_close(widths, distances[:, 8])
    line = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    mass = log_kernels(line, points, widths).exp().sum() * (line[1, 0] - line[0, 0])
    assert float(mass) / (30 * math.sqrt(math.tau)) == pytest.approx(1, abs=1e-4)


def test_the_bridge_goes_from_the_first_law_to_the_target():
    bridge = Bridge(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 3.0]).double())
    x = draws(5, 2, 0).requires_grad_()
    known = Known(x, log_prob(x), torch.autograd.grad(log_prob(x).sum(), x)[0])
    for share in (0.0, 0.3, 1.0):
        normal = torch.distributions.Normal(bridge.centre, bridge.scale).log_prob(x).sum(1)
        expected = share * log_prob(x) + (1 - share) * normal
        gap = bridge.log_density(known, share) - expected
        assert float(gap.detach().std()) < 1e-12
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(bridge.score(known, share), gradient)
    assert float((bridge.gain(known) - (log_prob(x) - normal)).detach().std()) < 1e-12


def test_a_rise_costs_the_loss_of_the_effective_sample_size():
    gain = 5 * draws(300, 1, 0)[:, 0]
    weights = (_rise(gain, 1.0, 0.1) * gain).exp()
    assert float(weights.sum() ** 2 / weights.square().sum() / 300) == pytest.approx(0.9, abs=1e-9)
    assert _rise(gain, 1e-4, 0.1) == 1e-4


@EARLY
def test_units_of_the_first_particles_do_not_matter():
    """Another origin and other scales of coordinates: the same run in other units."""
    x, shift = draws(60, 2, 0), torch.tensor([5.0, -40.0]).double()
    scale = torch.tensor([0.01, 100.0]).double()
    plain = Tempered(KL(log_prob)).run(x, 12, 1.0, seeded())
    scaled = Tempered(KL(lambda y: log_prob((y - shift) / scale))).run(shift + scale * x, 12, 1.0, seeded())
    torch.testing.assert_close((scaled - shift) / scale, plain, rtol=1e-6, atol=1e-8)


def test_a_support_with_an_edge_is_kept():
    x = last(Tempered(KL(lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf))), draws(300, 1, 0), 40).particles
    assert bool((x > 0).all())
    assert float(x.mean()) == pytest.approx(1, abs=0.2)


@EARLY
def test_images_and_single_precision_are_served():
    x = draws(30, 4, 0).float().view(30, 1, 2, 2)
    moved = Tempered(KL(lambda x: -x.flatten(1).square().sum(1))).run(x, 6, 1.0, seeded())
    assert moved.shape == x.shape and moved.dtype == torch.float32


@EARLY
def test_another_flow_in_between_is_taken_note_of():
    kl = KL(log_prob)
    moment = last(Tempered(kl) + Tempered(kl), draws(20, 2, 0), 3)
    memory = moment.memory[1]
    torch.testing.assert_close(memory.known.log_density, log_prob(moment.particles))


def test_what_cannot_be_annealed_is_refused(user_error):
    x = draws(10, 2, 0)
    with user_error("no entropy among its terms"):
        Tempered(Potential(log_prob))
    with user_error("Interaction", "expected potentials"):
        Tempered(KL(log_prob) + Interaction(lambda gaps: gaps.square().sum(-1))).run(x, 1, 1.0)
    with user_error("known by its score alone"):
        Tempered(KL(ScorePotential(lambda x: -x))).run(x, 1, 1.0)
    with user_error("spread 0 in coordinate 1"):
        Tempered(KL(log_prob)).run(x * torch.tensor([1.0, 0.0]), 1, 1.0)
    with user_error("loss is 1.5"):
        Tempered(KL(log_prob), loss=1.5)
    with user_error("jumps is -1"):
        Tempered(KL(log_prob), jumps=-1)
    with user_error("weight of particle", "nan"):
        Tempered(KL(lambda x: torch.where(x[:, 0] > 0, x[:, 0], math.nan))).run(x, 1, 1.0)


def test_a_run_that_ends_before_the_target_warns():
    flow, x = Tempered(KL(log_prob), loss=0.03), draws(100, 2, 0, spread=3.0)
    with pytest.warns(UserWarning, match="annealing ended at the share") as caught:
        moment = last(flow, x, 3)
    (warning,) = caught
    assert f"share {moment.memory.share:.3g} of the way to the target after 3 steps" in str(warning.message)
    with pytest.warns(UserWarning, match="after 2 steps"):
        (flow + flow).run(x, 2, 1.0, seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last(flow, x, 80).memory.share == 1.0
