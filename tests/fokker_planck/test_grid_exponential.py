"""The exponential of a chain on a line, by rational approximation, against products of positive matrices."""

import math

import numpy as np
import pytest
import torch

from diffusion.fokker_planck import FokkerPlanck, lines, problems
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.evolution import talbot
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.jump_process import JumpProcess
from diffusion.fokker_planck.jumps import jumps_at
from diffusion.fokker_planck.laws import GaussianMixture, gaussian


def flow(noise):
    return FokkerPlanck(lambda x, t: torch.ones_like(x), lambda x, t: noise)


WELL, RATCHET = problems.double_well(), problems.ratchet()
# the equation, the domain, cells, the boundary, the duration, where the mass starts, and whether the poles do in one go
CASES = {
    "ou": (problems.ornstein_uhlenbeck().equation, (-6.0, 6.0), 200, "reflecting", 1.0, 0.6, True),
    "ou_long": (problems.ornstein_uhlenbeck().equation, (-6.0, 6.0), 100, "reflecting", 1e4, 0.6, True),
    "double_well": (WELL.equation, (-3.0, 3.0), 128, "reflecting", 1.0, 0.33, True),
    "double_well_edge": (WELL.equation, (-3.0, 3.0), 128, "reflecting", 1.0, 0.999, True),
    "double_well_deep": (problems.double_well(barrier=6.0).equation, (-3, 3), 128, "reflecting", 1e4, 0.33, True),
    "ratchet": (RATCHET.equation, (0.0, math.tau), 96, "reflecting", 1.0, 0.5, True),
    "ratchet_absorbing": (RATCHET.equation, (0.0, math.tau), 96, "absorbing", 0.5, 0.5, True),
    "geometric_brownian": (problems.geometric_brownian().equation, (1e-3, 8.0), 256, "reflecting", 1.0, 0.12, True),
    "flow_with_noise": (flow(2.0), (0.0, 10.0), 200, "absorbing", 2.0, 0.3, True),
    "flow_with_little": (flow(0.5), (0.0, 10.0), 200, "reflecting", 2.0, 0.3, False),
    "flow": (flow(0.0), (0.0, 10.0), 200, "reflecting", 2.0, 0.3, False),
    "flow_absorbing": (flow(0.0), (0.0, 10.0), 200, "absorbing", 9.0, 0.3, False),
}


def chain(equation, domain, cells, boundary):
    box = Box([domain], cells, boundary)
    return JumpProcess(box, jumps_at(equation, box, 0.0))


def starts(process, place):
    """A point, and masses that spread over a twelfth of the cells; nothing absorbed so far, or a little."""
    number = process.number
    state = torch.zeros(2, number + process.absorbing, dtype=torch.float64)
    state[0, int(place * number)] = 2.0
    state[1, :number] = (-(((torch.arange(number) / number - place) * 12) ** 2)).double().exp()
    if process.absorbing:
        state[1, -1] = 0.3
    return state


def positive(process, state, duration):
    """exp(duration A) state by squaring a matrix that has no negative entry, so that nothing cancels."""
    size = state.shape[1]
    matrix = process.apply(torch.eye(size, dtype=torch.float64)).numpy().T
    squarings = max(0, math.ceil(math.log2(4 * process.rate * duration)))
    step = (matrix + process.rate * np.eye(size)) * duration / 2**squarings
    term = total = np.eye(size)
    for k in range(1, 30):
        term = term @ step / k
        total = total + term
    for _ in range(squarings):
        total = total / total.sum(0)
        total = total @ total
    return torch.from_numpy(state.numpy() @ (total / total.sum(0)).T)


@pytest.mark.parametrize("name", CASES)
def test_exponential_on_a_line(name):
    """Of the chain itself, as for states that the cells do not resolve."""
    *line, duration, place, rational = CASES[name]
    process = chain(*line)
    state = starts(process, place)
    process.ledger.smooth = np.zeros(2, bool)
    found, exact = process.advance(state, duration), positive(process, state, duration)
    assert (process._line._rational(state.numpy(), duration, None) is not None) == rational
    rounding = 1e-17 * process.rate * duration  # of the rates, that both add up
    assert float(((found - exact).abs().sum(1) / state.sum(1)).max()) < rounding + (3e-13 if rational else 1e-12)
    torch.testing.assert_close(found.sum(1), state.sum(1), rtol=1e-14, atol=0)
    assert float(found.min()) >= 0
    assert bool((found[:, process.number :] >= state[:, process.number :]).all())


@pytest.mark.parametrize("name", ["ou", "double_well", "ratchet_absorbing", "geometric_brownian"])
def test_series_and_poles_agree(name):
    *line, duration, place, _ = CASES[name]
    process = chain(*line)
    state = starts(process, place)[1:]
    process.ledger.smooth = np.zeros(1, bool)
    found = process.advance(state, duration)
    process._line = None
    series = process.advance(state, duration)
    assert float((found - series).abs().sum() / state.sum()) < 2e-11  # the growth of the terms costs the series digits
    assert not torch.equal(found, series)


@pytest.mark.parametrize("name", ["ou", "ratchet_absorbing"])
def test_batches_go_in_parts(name, monkeypatch):
    *line, duration, _, _ = CASES[name]
    process = chain(*line)
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(20, starts(process, 0.5).shape[1], generator=generator, dtype=torch.float64)
    parts, resolvents = [], lines._resolvents

    def counted(*args):
        parts.append(args[-1].shape[1])
        return resolvents(*args)

    monkeypatch.setattr(lines, "_resolvents", counted)
    monkeypatch.setattr(lines, "BATCH", 7 * states.shape[1])
    found = process.advance(states, duration)
    assert parts == [7, 7, 6]
    alone = torch.cat([chain(*line).advance(state[None], duration) for state in states])
    torch.testing.assert_close(found, alone, rtol=1e-13, atol=1e-15)


def test_poles_are_for_lines_with_ends_only():
    still = FokkerPlanck(lambda x, t: -x, lambda x, t: 1.0)
    for words, sides in (("periodic", 1), ("reflecting", 2), ("absorbing", 2)):
        box = Box([(-1.0, 1.0)] * sides, 3, words)
        process = JumpProcess(box, jumps_at(still, box, 0.0))
        state = starts(process, 0.4)
        exact = positive(process, state, 3.0)
        torch.testing.assert_close(process.advance(state, 3.0), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("number", [24, 28])
def test_talbot(number):
    z, w = talbot(number)
    assert len(z) == number // 2 and bool((z.imag > 0).all())
    x = -np.concatenate([[0.0], np.logspace(-8, 9, 2000)])
    error = np.abs((w / (x[:, None] - z)).real.sum(1) - np.exp(x)).max()
    assert error < 3e-14


def test_talbot_converges():
    x = -np.concatenate([[0.0], np.logspace(-3, 4, 1000)])
    errors = [np.abs((w / (x[:, None] - z)).real.sum(1) - np.exp(x)).max() for z, w in map(talbot, (8, 16))]
    assert (errors[0] / errors[1]) ** (1 / 8) == pytest.approx(3.89, rel=0.1)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("when", [0.05, 0.78, 1.03])
def test_an_equation_that_changes_for_a_while_is_seen(when):
    """A push for a quarter of the time, at its start, later or at its end."""

    def drift(x, t):
        return -x + 2.0 * (abs(t - when) < 0.13)[:, None]

    grid = GridSolver(FokkerPlanck(drift, lambda x, t: 1.0), [(-6.0, 6.0)], 48)
    found = grid.solve(gaussian(0.5, 0.6), [0.0, 1.0], tolerance=1e-2)
    mean = float((found.density[-1] * found.grid[0]).sum() * grid.box.volume)
    pushed = 2 * (math.exp(min(when + 0.13, 1) - 1) - math.exp(max(when - 0.13, 0) - 1))
    assert found.steps > 1 and mean == pytest.approx(0.5 * math.exp(-1) + pushed, abs=0.01)


def test_coarse_cells_are_named_for_the_worst_of_a_batch():
    problem = problems.double_well(barrier=4.0)
    grid = GridSolver(problem.equation, problem.domain, 64)
    tame, wild = torch.zeros(2, 64, dtype=torch.float64)
    tame[21] = wild[2] = 1.0
    texts = []
    for start in (torch.stack([tame, wild]), wild):
        with pytest.warns(UserWarning, match="too coarse") as caught:
            grid.solve(start, [0.0, 1e-3])
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1] and "drift: 1 of the mass" in texts[0]


def test_density_of_a_mixture():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.1 * torch.eye(2)
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    x = 3 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    gaps = x[:, None] - means
    forms = (gaps[:, :, None] @ torch.linalg.inv(covariances) @ gaps[..., None])[..., 0, 0]
    exact = (weights * (-forms / 2).exp() / (math.tau * torch.linalg.det(covariances).sqrt())).sum(1).log()
    torch.testing.assert_close(GaussianMixture(weights, means, covariances).log_prob(x), exact, rtol=1e-12, atol=1e-12)
