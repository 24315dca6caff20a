"""Where jumps between the cells of a box lead, against a walk along them."""

import itertools

import numpy as np
import pytest
import torch

from diffusion.fokker_planck.box import Box, line_rule

WORDS = ["reflecting", "absorbing", "periodic"]


def walk(place, offset, cells, words, steps=2400):
    """The cell that is reached, or the fraction of the way up to an absorbing face, or None at a reflecting one."""
    for k in range(1, steps + 1):
        at = [p + k / steps * o for p, o in zip(place, offset, strict=True)]
        for x, n, word in zip(at, cells, words, strict=True):
            if word != "periodic" and not -0.5 <= x <= n - 0.5:
                return k / steps if word == "absorbing" else None
    return tuple(round(x) % n if word == "periodic" else round(x) for x, n, word in zip(at, cells, words, strict=True))


@pytest.mark.parametrize("offset", [(0, 1), (1, 1), (1, -2), (-3, 2)], ids=str)
@pytest.mark.parametrize("words", list(itertools.product(WORDS, WORDS)), ids="-".join)
def test_neighbours(words, offset):
    cells = (5, 4)
    found = Box(((0, 1), (0, 1)), cells, words).neighbours(offset)
    lost = dict(zip(found.lost.tolist(), found.fraction.tolist(), strict=True))
    shifted = {i: i + shift for shift, mask in found.shifts for i in mask.nonzero()[:, 0].tolist()}
    leads = dict(found.ends.T.tolist())
    for index, place in enumerate(itertools.product(*map(range, cells))):
        end = walk(place, offset, cells, words)
        assert (index in leads) == isinstance(end, tuple)
        assert (index in lost) == isinstance(end, float)
        if isinstance(end, tuple):
            assert int(found.target[index]) == leads[index] == shifted.get(index, index) == end[0] * cells[1] + end[1]
        if isinstance(end, float):
            assert lost[index] == pytest.approx(end, abs=1e-3)


def test_line_rule():
    nodes, weights, integrals = line_rule(4)
    for power in range(4):
        torch.testing.assert_close(integrals @ nodes**power, nodes ** (power + 1) / (power + 1), rtol=0, atol=1e-14)
    assert float(weights @ nodes**7) == pytest.approx(1 / 8, abs=1e-15)


@pytest.mark.parametrize("words", list(itertools.product(WORDS, WORDS)), ids="-".join)
def test_walls(words):
    cells = (5, 3)
    faces = [
        sum((word == "reflecting") * ((p == 0) + (p == n - 1)) for p, n, word in zip(place, cells, words, strict=True))
        for place in itertools.product(*map(range, cells))
    ]
    assert Box(((0, 1), (0, 1)), cells, words).walls.tolist() == faces


@pytest.mark.parametrize("at_once", [1, 24, 10_000], ids=lambda points: f"{points}_at_once")
def test_averages_of_a_polynomial(at_once, monkeypatch):
    """Cell means of a density of degree 5 in each of two coordinates are exact, to rounding."""
    monkeypatch.setattr("diffusion.fokker_planck.box.AT_ONCE", at_once)
    box = Box(((0.0, 1.0), (1.0, 2.0)), (3, 4))
    means = box.averages(lambda x: 5 * x[:, 0].log() + 4 * x[:, 1].log()).reshape(3, 4)
    edges = torch.linspace(0, 1, 4, dtype=torch.float64), torch.linspace(1, 2, 5, dtype=torch.float64)
    exact = torch.outer((edges[0] ** 6).diff() / 6 * 3, (edges[1] ** 5).diff() / 5 * 4)
    torch.testing.assert_close(means, exact, rtol=1e-13, atol=0)


def test_numbers_of_cells(user_error):
    assert Box([(0, 1)], np.int64(5)).cells == Box([(0, 1)], torch.tensor([5])).cells == (5,)
    for cells in (5.0, [5.5], "abc"):
        with user_error(repr(cells), "whole numbers"):
            Box([(0, 1)], cells)
    with user_error("(-5, 5)", "each coordinate"):
        Box((-5, 5), 5)
