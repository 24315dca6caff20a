"""The values that a run reports along the way are those of one functional, whatever its steps follow."""

import pytest
import torch
from cases import draws, ratio_of

from diffusion.fields import EmpiricalField, variance_exploding
from diffusion.fokker_planck.correction import Correction
from diffusion.gradient_flow import (
    JKO,
    KL,
    AnnealedLangevin,
    Blob,
    EnergyDistance,
    Entropy,
    FisherRaoFlow,
    Interaction,
    Langevin,
    Metropolis,
    SinkhornDivergence,
    SlicedWasserstein,
    SteinFlow,
    Tempered,
    WassersteinFlow,
)
from diffusion.gradient_flow.runs import follow
from diffusion.trainer import Trainer

DATA = draws(40, 3, 0, spread=0.5)
MODEL = EmpiricalField(variance_exploding(), DATA)
SHORT = Trainer(steps=3, batch_size=20, learning_rate=1e-2, warmup=0, checkpoint_every=10**6, device="cpu")


def log_prob(x):
    return -2 * (x - 1).square().sum(1)


RULED, HELD = KL(log_prob, Entropy(Blob())), KL(log_prob, Entropy(Blob(0.5)))
NETWORK = Correction(3, (8,), torch.Generator().manual_seed(0))
FLOWS = {
    "sliced": (WassersteinFlow(SlicedWasserstein(DATA, 5)), 3.0),
    "energy": (WassersteinFlow(EnergyDistance(DATA, 5), control=None), 1.0),
    "sinkhorn": (WassersteinFlow(SinkhornDivergence(DATA, 0.5, tolerance=1e-12)), 1.0),
    "bandwidth by a rule": (WassersteinFlow(RULED), 0.2),
    "ratio": (WassersteinFlow(ratio_of("neyman", 2 * DATA)), 0.02),
    "heavy ball": (WassersteinFlow(ratio_of("reverse_kl", DATA), momentum=0.5), 0.2),
    "langevin": (Langevin(RULED), 0.1),
    "interacting": (Langevin(RULED + Interaction(lambda gaps: gaps.square().sum(-1))), 0.1),
    "metropolis": (Langevin(RULED, Metropolis()), 0.1),
    "annealed": (AnnealedLangevin(MODEL, (2.0, 0.7, 0.3), repeats=2), 0.3),
    "tempered": (Tempered(RULED), 1.0),
    "birth and death": (FisherRaoFlow(RULED), 0.5),
    "alternating": (Langevin(HELD) + FisherRaoFlow(HELD), 0.1),
    "stein": (SteinFlow(RULED), 0.2),
    "jko": (JKO(RULED, NETWORK, SHORT), 0.1),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.filterwarnings("ignore:annealing ended")
@pytest.mark.parametrize("name", FLOWS)
def test_a_run_says_of_its_particles_what_one_that_starts_from_them_says(name):
    flow, step_size = FLOWS[name]
    for moment in flow.moments(1.5 + draws(30, 3, 1), 6, step_size, seeded(2)):
        first = next(flow.moments(moment.particles, 1, step_size, seeded(3)))
        assert moment.value() == pytest.approx(first.value(), rel=1e-9, abs=1e-12)


def test_annealing_reports_the_divergence_from_the_last_level():
    """At every level, so that first and last can be compared: from the divergences of many levels nothing follows."""
    flow, last = AnnealedLangevin(MODEL, (2.0, 0.7, 0.3), repeats=3), KL(MODEL, time=0.3)
    run = follow(flow, 3 * draws(60, 3, 1), 9, 0.3, DATA, DATA, seeded(2), frames=10)
    for value, particles in zip(run.columns["functional"], run.frames, strict=True):
        assert value == pytest.approx(float(last.value(particles)), rel=1e-9)
    assert len(run.steps) == 10 and "the functional fell" in run.table()
    assert (flow.functional.target, flow.functional.time) == (MODEL, 0.3)
