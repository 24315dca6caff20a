"""Steps that are too long are warned of, those that are short enough never."""

import math
import re
import warnings

import pytest
import torch
from cases import draws

from diffusion.fields import EmpiricalField, variance_exploding
from diffusion.gradient_flow import (
    KL,
    AnnealedLangevin,
    EnsembleCovariance,
    Entropy,
    EulerMaruyama,
    Identity,
    Interaction,
    Langevin,
    LeimkuhlerMatthews,
    Matrix,
    Metropolis,
    Potential,
    StochasticHeun,
    ThirdOrder,
    Underdamped,
    WassersteinFlow,
)
from diffusion.gradient_flow.responses import gaussian_laws
from diffusion.metrics import GaussianLaw

RATES = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
PRECONDITIONER = Matrix(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.2], [0.5, 0.2, 0.6]], dtype=torch.float64))
INTEGRATORS = {
    "euler": EulerMaruyama(),
    "limit": LeimkuhlerMatthews(),
    "heun": StochasticHeun(),
    "third": ThirdOrder(),
    "inertia": Underdamped(1.0),
    "friction": Underdamped(20.0, mass=0.5),
}
every = pytest.mark.parametrize("name", INTEGRATORS)


def quadratic(x):
    return -(RATES.to(x.dtype) * x.flatten(1).square()).sum(1) / 2


def rate_of(preconditioner):
    if isinstance(preconditioner, Identity):
        return 100.0
    return float(torch.linalg.eigvals(preconditioner.matrix * RATES).real.max())


def logistic(x):
    return -(x + 2 * torch.nn.functional.softplus(-x)).sum(1)


def heavy(x):
    return -2 * x.square().log1p().sum(1)


def modes(x):
    return torch.stack([-50 * (x - side).square().sum(1) for side in (-3, 3)]).logsumexp(0)


def ran(flow, x, steps, step_size):
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = flow.run(x, steps, step_size, torch.Generator().manual_seed(1))
    assert bool(x.isfinite().all())
    return [str(warning.message) for warning in caught]


def told(messages):
    """By what the only one of them says that step_size is to be divided."""
    (message,) = messages
    assert message.startswith("the steps are too long: the particles are ")
    return float(re.search(r"a step_size divided by ([\d.e+]+) would do there$", message)[1])


@pytest.mark.parametrize("preconditioner", [Identity(), PRECONDITIONER], ids=["plain", "matrix"])
@every
def test_the_longest_step_is_where_stability_ends(name, preconditioner):
    integrator, start = INTEGRATORS[name], GaussianLaw(torch.zeros(3).double(), torch.eye(3).double())
    longest = integrator.longest(rate_of(preconditioner))
    flow = Langevin(KL(quadratic), integrator, preconditioner)
    for share, stable in ((0.98, True), (1.02, False)):
        laws = gaussian_laws(flow, start, 200, share * longest)
        half, whole = (float(laws[k].covariance.norm()) for k in (100, 200))
        assert (whole < 100) if stable else (whole > 10 * half > 100)


@pytest.mark.parametrize("number", [2, 100])
@pytest.mark.parametrize("preconditioner", [Identity(), PRECONDITIONER], ids=["plain", "matrix"])
@every
def test_steps_that_grow_are_warned_of_and_the_remedy_is_one(name, preconditioner, number):
    integrator, rate = INTEGRATORS[name], rate_of(preconditioner)
    flow, size = Langevin(KL(quadratic), integrator, preconditioner), 1.5 * integrator.longest(rate)
    x = draws(number, 3, 0)
    messages = ran(flow, x, 60, size)
    assert told(messages) == pytest.approx(3, rel=0.05)
    assert f"a step of {size:.3g} takes them no nearer" in messages[0] and f"at the rate {rate:.3g};" in messages[0]
    assert ran(flow, x, 60, size / told(messages)) == []


@pytest.mark.filterwarnings("ignore:the steps are too long")
@every
def test_where_squares_are_infinite(name):
    """In single precision, of images."""
    flow = Langevin(KL(quadratic), INTEGRATORS[name])
    x = draws(20, 3, 0).float().view(20, 1, 3)
    steps, size = (
        {"euler": 31, "limit": 31, "heun": 19, "third": 13}.get(name, 16),
        3 * INTEGRATORS[name].longest(100.0),
    )
    assert float(flow.run(x, steps, size, torch.Generator().manual_seed(1)).square().max()) == math.inf
    assert told(ran(flow, x, steps, size)) == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("log_prob", [logistic, lambda x: -x.abs().sum(1)], ids=["logistic", "laplace"])
@every
def test_forces_that_are_bounded(name, log_prob):
    """Nothing grows without end, but the law is a hundred times too wide."""
    flow = Langevin(KL(log_prob), INTEGRATORS[name])
    told(ran(flow, draws(50, 2, 0), 200, 100.0))


@pytest.mark.parametrize(
    "scale", [None, torch.tensor([[4.0]]), torch.tensor([4.0])], ids=["plain", "matrix", "diagonal"]
)
def test_what_the_plain_scheme_makes_far_too_wide(scale):
    """Of variance 1 / (1 - h / 2), with P = 1."""
    preconditioner, rate = (Identity(), 1.0) if scale is None else (Matrix(scale.double()), 4.0)
    flow = Langevin(KL(lambda x: -x.square().sum(1) / 2), EulerMaruyama(), preconditioner)
    told(ran(flow, draws(2000, 1, 0), 300, 1.9 / rate))
    assert ran(flow, draws(2000, 1, 0), 300, 1.5 / rate) == []


RIGHT = {
    "far": (KL(quadratic), lambda n: draws(n, 3, 0, spread=1e3), 0.01),
    "narrow": (KL(quadratic), lambda n: draws(n, 3, 0, spread=1e-6), 0.01),
    "beside": (KL(quadratic), lambda n: 1e3 + draws(n, 3, 0), 0.01),
    "logistic": (KL(logistic), lambda n: draws(n, 2, 0, spread=5.0), 1.0),
    "heavy tails": (KL(heavy), lambda n: draws(n, 2, 0, spread=20.0), 0.3),
    "modes": (KL(modes), lambda n: draws(n, 2, 0), 0.005),
    "double well": (KL(lambda x: -(x.square() - 1).square().sum(1)), lambda n: draws(n, 2, 0), 0.02),
    "kinks": (KL(lambda x: -x.abs().sum(1)), lambda n: draws(n, 2, 0), 0.3),
    "no drift": (0.5 * Entropy(), lambda n: draws(n, 2, 0), 10.0),
    "interacting": (
        KL(logistic) + Interaction(lambda z: z.square().sum(-1)),
        lambda n: draws(n, 2, 0, spread=5.0),
        0.1,
    ),
}


@pytest.mark.parametrize("number", [1, 50])
@pytest.mark.parametrize("problem", RIGHT)
@every
def test_steps_that_are_short_enough_are_not(name, problem, number):
    """On the way and at rest; the sizes are up to half of what is stable."""
    functional, start, size = RIGHT[problem]
    for steps in (1, 3, 100):
        assert ran(Langevin(functional, INTEGRATORS[name]), start(number), steps, size) == []


@pytest.mark.parametrize(
    "matrix", [None, 4.0 * torch.eye(2), torch.tensor([4.0, 4.0])], ids=["1", "matrix", "diagonal"]
)
@pytest.mark.parametrize("name", [name for name in INTEGRATORS if name != "euler"])
def test_steps_at_the_edge_of_stability_are_not_where_the_law_is_right(name, matrix):
    """The plain scheme is wrong there; the others have a variance of the order of the law's."""
    preconditioner, rate = (Identity(), 1.0) if matrix is None else (Matrix(matrix.double()), 4.0)
    flow = Langevin(KL(lambda x: -x.square().sum(1) / 2), INTEGRATORS[name], preconditioner)
    assert ran(flow, draws(100, 2, 0), 300, 0.9 * INTEGRATORS[name].longest(rate)) == []


def test_proposals_may_be_of_any_length():
    assert ran(Langevin(KL(quadratic), Metropolis()), draws(20, 3, 0), 20, 1e6) == []


def test_preconditioners_that_move_with_the_particles():
    flow = Langevin(KL(quadratic), EulerMaruyama(), EnsembleCovariance())
    assert ran(flow, 0.1 * draws(50, 3, 0), 200, 0.3) == []


def test_the_size_is_that_of_the_steps_taken():
    """Which control chose, of at most 100; and which annealing gives in units of the noise."""
    kl = KL(quadratic)
    assert ran(WassersteinFlow(kl) + Langevin(kl), draws(50, 3, 0), 100, 100.0) == []
    model = EmpiricalField(variance_exploding(), draws(16, 2, 0))
    annealed = AnnealedLangevin(model, (8.0, 2.0, 0.5), repeats=30)
    assert ran(annealed, draws(50, 2, 1), 90, 0.9) == []
    assert told(ran(annealed, draws(50, 2, 1), 90, 4.0)) == pytest.approx(4, rel=0.1)


def test_others_in_a_sum_are_asked_too():
    kl = KL(quadratic)
    assert told(ran(Langevin(kl) + Langevin(kl, Metropolis()), draws(50, 3, 0), 60, 0.03)) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("number", [1, 3])
def test_particles_in_one_place_say_nothing(number):
    still = Langevin(1e-300 * Entropy() + Potential(lambda x: x.square().sum(1)), EulerMaruyama())
    assert ran(still, torch.ones(number, 2), 1, 0.5) == []
