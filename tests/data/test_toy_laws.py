"""The toy laws against their exact densities, supports and moments."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion.data import LAWS, toy, toy_law

SIZE = 20_000


def draw(name, seed=0, size=SIZE):
    return toy_law(name).draw(size, torch.Generator().manual_seed(seed))


def normal_pvalue(values):
    return stats.kstest(values.numpy(), "norm").pvalue


def uniform_pvalue(values):
    return stats.kstest(values.numpy(), "uniform").pvalue


@pytest.mark.parametrize("name", LAWS)
def test_same_seed_same_points_other_seed_others_train_and_test_apart(name):
    first, again, other = toy(name, size=50), toy(name, size=50), toy(name, size=50, seed=1)
    assert first.name == name and len(first.train) == len(first.test) == 50 and first.train.shape == (2,)
    assert first.train.num_classes == LAWS[name].num_classes
    for part in ("train", "test"):
        assert torch.equal(getattr(first, part).values, getattr(again, part).values)
        assert not torch.isin(getattr(first, part).values, getattr(other, part).values).any()
    assert not torch.isin(first.train.values, first.test.values).any()


@pytest.mark.parametrize("name", LAWS)
def test_global_random_state_plays_no_part(name):
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = toy(name, size=10)
    torch.manual_seed(2)
    assert torch.equal(toy(name, size=10).train.values, first.train.values)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    toy(name, size=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


@pytest.mark.parametrize("name", LAWS)
def test_standard_deviations_are_about_one(name):
    assert (draw(name).points.std(0) - 1).abs().max() < 0.06


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.num_classes])
def test_parts_are_equally_likely(name):
    label = draw(name).label
    counts = torch.bincount(label, minlength=LAWS[name].num_classes)
    assert len(counts) == LAWS[name].num_classes
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_eight_gaussians_have_the_stated_density():
    law = toy_law("8gaussians")
    covariance = law.std**2 * np.eye(2)
    components = [stats.multivariate_normal(mean, covariance) for mean in law.means.numpy()]
    points, _ = draw("8gaussians", size=200)
    expected = np.log(np.mean([component.pdf(points.numpy()) for component in components], axis=0))
    np.testing.assert_allclose(law.log_prob(points).numpy(), expected, rtol=1e-12)


def test_eight_gaussians_are_drawn_from_that_density():
    law = toy_law("8gaussians")
    points, label = draw("8gaussians")
    residual = (points - law.means[label]) / law.std
    assert normal_pvalue(residual[:, 0]) > 1e-4 and normal_pvalue(residual[:, 1]) > 1e-4
    # neighbouring means are 7.65 standard deviations apart: the entropy is that of one Gaussian + log 8
    entropy = math.log(8) + 1 + math.log(2 * math.pi * law.std**2)
    log_prob = law.log_prob(points)
    assert abs(-log_prob.mean().item() - entropy) < 4 * log_prob.std().item() / math.sqrt(SIZE)


def test_eight_gaussians_sit_on_a_circle():
    means = toy_law("8gaussians").means
    torch.testing.assert_close(means.norm(dim=1), torch.full((8,), 1.4, dtype=torch.float64))
    torch.testing.assert_close(means[2], torch.tensor([0.0, 1.4], dtype=torch.float64), rtol=0, atol=1e-12)
    step = (means[1:] * means[:-1]).sum(1) / 1.4**2
    torch.testing.assert_close(step, torch.full((7,), math.cos(math.pi / 4), dtype=torch.float64))


def test_moons_lie_on_their_half_circles():
    law = toy_law("moons")
    points, label = draw("moons")
    x, y = (points * torch.tensor(law.scale) + torch.tensor(law.centre)).unbind(1)
    x, y = torch.where(label == 0, x, 1 - x), torch.where(label == 0, y, 0.5 - y)
    # to first order in the noise, radius - 1 is normal and the angle from the middle uniform in [-pi / 2, pi / 2]
    assert abs((x.hypot(y) - 1).std().item() / law.std - 1) < 0.03
    angle = torch.atan2(x, y)
    assert angle.abs().max() < math.pi / 2 + 6 * law.std
    assert uniform_pvalue((angle[angle.abs() < 1] + 1) / 2) > 1e-4
    assert points.mean(0).abs().max() < 4 / math.sqrt(SIZE)


def test_checkerboard_fills_the_black_squares_evenly_and_no_others():
    law = toy_law("checkerboard")
    points, label = draw("checkerboard")
    assert label is None
    board = points / law.side + 2
    cell = board.floor().long()
    assert cell.min() == 0 and cell.max() == 3
    assert (cell.sum(1) % 2 == 0).all()
    counts = torch.bincount(4 * cell[:, 0] + cell[:, 1])
    assert (counts > 0).sum() == 8
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-4
    for coordinate in (board - cell).unbind(1):
        assert uniform_pvalue(coordinate) > 1e-4


def test_swiss_roll_lies_on_its_spiral():
    law = toy_law("swiss_roll")
    points, label = draw("swiss_roll")
    assert label is None
    # the spiral's arm of number `turn` that is nearest in angle: a = angle + 2 pi turn, radius a / scale
    angle, radius = torch.atan2(points[:, 1], points[:, 0]), points.norm(dim=1)
    turn = ((radius * law.scale - angle) / math.tau).round()
    along = angle + math.tau * turn
    off = (radius - along / law.scale) * (along / (1 + along**2).sqrt())  # distance to the curve, to first order
    assert normal_pvalue(off / law.std) > 1e-4
    assert turn.unique().tolist() == [0, 1, 2] or turn.unique().tolist() == [1, 2]
    inner = along[(along > 1.6 * math.pi) & (along < 4.4 * math.pi)]
    assert uniform_pvalue((inner / math.pi - 1.6) / 2.8) > 1e-4


def test_pinwheel_arms_undo_to_one_gaussian():
    law = toy_law("pinwheel")
    points, label = draw("pinwheel")
    complex_points = torch.view_as_complex(points.contiguous()) * law.scale
    unturned = torch.view_as_real(complex_points * torch.exp(-1j * math.tau / 5 * label))
    # turning by an angle of r itself: r = |point| to first order in tangential_std / r
    radius = unturned.norm(dim=1)
    assert abs(radius.square().mean().item() - (1 + 0.3**2 + 0.1**2)) < 0.02
    bend = torch.atan2(unturned[:, 1], unturned[:, 0]) - 0.25 * radius.exp()
    bend = torch.remainder(bend + math.pi, math.tau) - math.pi
    middle = (radius - 1).abs() < 0.1
    assert abs(bend[middle].mean().item()) < 0.01
    assert abs(bend[middle].std().item() - 0.1) < 0.02
    covariance = torch.cov(points.T)
    torch.testing.assert_close(covariance, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)


def test_unknown_law_lists_the_known(user_error):
    with user_error("'9gaussians'", *LAWS):
        toy("9gaussians")


def test_bad_size_is_named(user_error):
    with user_error("size is 0"):
        toy("moons", size=0)
