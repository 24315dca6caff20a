"""What of a functional is not finite at a particle is named, whatever flow meets it."""

import math
import warnings

import pytest
import torch
from cases import draws

from diffusion.fields import EmpiricalField, variance_exploding
from diffusion.fokker_planck.correction import Correction
from diffusion.gradient_flow import (
    JKO,
    KL,
    AnnealedLangevin,
    Entropy,
    EulerMaruyama,
    FDivergence,
    FisherRaoFlow,
    Interaction,
    Langevin,
    LeimkuhlerMatthews,
    Metropolis,
    Potential,
    ScorePotential,
    SteinFlow,
    StochasticHeun,
    ThirdOrder,
    Underdamped,
    WassersteinFlow,
)
from diffusion.gradient_flow.runs import follow
from diffusion.trainer import Trainer

START = draws(8, 2, 0).clamp(-2, 2)
START[3, 0] = 5.0
SHORT = Trainer(steps=2, batch_size=4, warmup=0, checkpoint_every=10**6, device="cpu")
FLOWS = {
    "wasserstein": WassersteinFlow,
    "without control": lambda f: WassersteinFlow(f, control=None),
    "fourth order": lambda f: WassersteinFlow(f, order=4, control=None),
    **{
        type(kind).__name__: lambda f, kind=kind: Langevin(f, kind)
        for kind in (EulerMaruyama(), LeimkuhlerMatthews(), StochasticHeun(), ThirdOrder(), Underdamped(), Metropolis())
    },
    "stein": SteinFlow,
    "jko": lambda f: JKO(f, Correction(2, (4,), torch.Generator().manual_seed(0)), SHORT),
    "alternating": lambda f: Langevin(f) + FisherRaoFlow(f),
}


def seeded():
    return torch.Generator().manual_seed(0)


def with_nan(x):
    return -x.square().sum(1) + (4 - x[:, 0]).sqrt()


def with_wall(x):
    """-inf, and a derivative that is NaN, beyond 4."""
    return -x.square().sum(1) + ((4 - x[:, 0]) * (x[:, 0] < 4)).log()


@pytest.mark.parametrize("flow", FLOWS)
def test_a_log_density_that_is_not_finite(flow, user_error):
    with user_error("the negative log-density is nan at particle 3, [5.0, ", "mend the function"):
        FLOWS[flow](KL(with_nan)).run(START, 2, 0.01, seeded())
    with user_error("the negative log-density is inf at particle 3, [5.0, "):
        FLOWS[flow](KL(with_wall)).run(START, 2, 0.01, seeded())


@pytest.mark.parametrize("flow", FLOWS)
def test_a_derivative_does_not_hide_it(flow, user_error):
    """As those of log below 0 and of what torch.where chooses."""
    for log_prob in (lambda x: (4 - x[:, 0]).log(), lambda x: torch.where(x[:, 0] > 4, math.nan, -x.square().sum(1))):
        with user_error("the negative log-density is nan at particle 3, [5.0, "):
            FLOWS[flow](KL(log_prob)).run(START, 2, 0.01, seeded())


@pytest.mark.parametrize("flow", FLOWS)
def test_a_derivative_that_is_not_finite_where_the_log_density_is(flow, user_error):
    """As of torch.where, whose other side is derived too."""

    def trap(x):
        return -x.square().sum(1) + torch.where(x[:, 0] > 4, 0.0, (4 - x[:, 0]).sqrt())

    with user_error("the gradient of the negative log-density is nan at particle 3, [5.0, "):
        FLOWS[flow](KL(trap)).run(START, 2, 0.01, seeded())


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if flow not in ("wasserstein", "Metropolis", "alternating")])
def test_a_score_that_is_not_finite(flow, user_error):
    with user_error("the score is nan at particle 3, [5.0, "):
        FLOWS[flow](KL(lambda x: -x * (4 - x[:, :1]).sqrt())).run(START, 2, 0.01, seeded())


@pytest.mark.parametrize("kind", [EulerMaruyama(), Metropolis()], ids=["euler", "metropolis"])
@pytest.mark.parametrize(("step_size", "steps"), [(4.0, 0), (0.7, 2)])
def test_where_the_flow_before_led_to_it(kind, step_size, steps, user_error):
    """The start is not to blame, nor the only remedy, and steps are counted."""
    functional = 1e-12 * Entropy() + Potential(lambda x: (4 - x[:, 0]).sqrt() * 0 - x[:, 0])
    flow = WassersteinFlow(functional, control=None) + Langevin(functional, kind)
    with user_error("the energy is nan at particle 1, [", f"after {steps} steps", "try a smaller step_size"):
        flow.run(torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double(), 5, step_size, seeded())


def test_a_model_that_is_not_finite_at_one_of_the_levels(user_error):
    class Broken(EmpiricalField):
        def score(self, x, t):
            return super().score(x, t) / (t != 0.7)

    flow = AnnealedLangevin(Broken(variance_exploding(), draws(20, 2, 1)), (2.0, 0.7, 0.3), 1)
    with user_error("the score is ", " at particle 0"):
        flow.run(START, 3, 0.2, seeded())


@pytest.mark.parametrize(
    ("functional", "text"),
    [
        (Potential(lambda x: (4 - x[:, 0]).sqrt()), "the energy is nan at particle 3"),
        (2.0 * Potential(lambda x: x[:, 0]) + Potential(lambda x: (4 - x).sqrt().sum(1)), "the energy is nan"),
        (ScorePotential(lambda x: x / (x != x[3])), "the score is inf at particle 3"),
        (Interaction(lambda z: z.square().sum(-1) / (z[..., 0].abs() < 3)), "the velocity of Interaction is "),
        (FDivergence("pearson", lambda x: (4 - x[:, 0]).sqrt()), "the velocity of FDivergence is nan at particle 3"),
    ],
    ids=["potential", "sum", "score", "interaction", "ratio"],
)
def test_other_functionals(functional, text, user_error):
    with user_error(text):
        WassersteinFlow(functional, control=None).run(START, 2, 0.01)


def test_a_value_that_is_not_a_number_says_why(user_error):
    """Where the score is known, particles move on; values tell."""
    hidden = ScorePotential(lambda x: -x, lambda x: (4 - x[:, 0]).log())
    flow = Langevin(KL(hidden))
    *_, moment = flow.moments(START, 2, 0.01, seeded())
    with user_error("the negative log-density is nan at particle 3"):
        moment.value()
    run = follow(flow, START, 2, 0.01, START, START, seeded(), frames=2)
    assert "no value that can be computed: the negative log-density is nan at particle 3" in run.table()
    with user_error("the negative log-density is nan at particle 3"):
        WassersteinFlow(KL(hidden)).run(START, 2, 0.01)


def test_an_infinite_value_is_one(user_error):
    moment = next(Langevin(KL(with_wall)).moments(START, 1, 0.01))
    assert moment.value() == math.inf


def test_steps_that_lead_out_of_a_finite_function_are_the_steps_fault(user_error):
    with user_error("after step 1", "smaller step_size"):
        Langevin(KL(lambda x: -x.square().sum(1)), StochasticHeun()).run(START.float(), 3, 1e30, seeded())


def test_points_that_only_proposals_and_stages_meet_are_no_fault():
    """Beyond the edge of a support: a proposal is refused, a step is halved."""
    inside = 0.2 + 0.1 * draws(30, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Langevin(KL(lambda x: (1 - x.square().sum(1)).log()), Metropolis()).run(inside, 30, 0.3, seeded())
        WassersteinFlow(Potential(lambda x: -(1 - x.square().sum(1)).log()), order=2).run(inside, 5, 50.0)
