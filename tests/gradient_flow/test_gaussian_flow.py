import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from diffusion.gradient_flow.gaussian_flow import GaussianFlow
from diffusion.metrics import GaussianLaw, gaussian_wasserstein


def law(dim, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, rank or dim + 2, generator=generator, dtype=torch.float64)
    return GaussianLaw(torch.randn(dim, generator=generator, dtype=torch.float64), root @ root.T / dim)


START, FLOW = law(3, 0), GaussianFlow(law(3, 1))


def apart(found, expected):
    """The largest gap between two laws."""
    return max(float((p - q).abs().max()) for p, q in zip(found, expected, strict=True))


class TestFlow:
    def test_it_solves_the_equations_of_the_moments(self):
        """dm/dt = -C^-1 (m - b), dS/dt = 2 - C^-1 S - S C^-1."""
        inverse = np.linalg.inv(FLOW.target.covariance.numpy())

        def slopes(t, y):
            m, s = y[:3], y[3:].reshape(3, 3)
            return np.concatenate(
                [-inverse @ (m - FLOW.target.mean.numpy()), (2 * np.eye(3) - inverse @ s - s @ inverse).flatten()]
            )

        y = np.concatenate([START.mean.numpy(), START.covariance.numpy().flatten()])
        expected = solve_ivp(slopes, (0, 0.7), y, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        found = FLOW.at(START, 0.7)
        np.testing.assert_allclose(found.mean, expected[:3], atol=1e-10)
        np.testing.assert_allclose(found.covariance.flatten(), expected[3:], atol=1e-10)

    def test_the_value_falls_by_the_mean_square_of_the_velocity(self):
        """v(x) = -C^-1 (x - b) + S^-1 (x - m)."""
        t, h = 0.3, 1e-4
        law, (b, c) = FLOW.at(START, t), FLOW.target
        slope = (FLOW.value(FLOW.at(START, t + h)) - FLOW.value(FLOW.at(START, t - h))) / (2 * h)
        linear = torch.linalg.inv(law.covariance) - torch.linalg.inv(c)
        pull = torch.linalg.solve(c, law.mean - b)
        square = (linear @ law.covariance @ linear.T).trace() + pull.square().sum()
        assert slope == pytest.approx(-square.item(), rel=1e-5)

    def test_two_times_in_turn_are_their_sum(self):
        assert apart(FLOW.at(FLOW.at(START, 0.2), 0.5), FLOW.at(START, 0.7)) < 1e-12

    def test_ends(self):
        assert apart(FLOW.at(START, 0.0), START) < 1e-13
        assert apart(FLOW.at(START, 1e3), FLOW.target) < 1e-12
        assert apart(FLOW.at(FLOW.target, 0.4), FLOW.target) < 1e-12

    def test_a_point_spreads_like_heat(self):
        point = GaussianLaw(START.mean, torch.zeros(3, 3).double())
        assert apart(FLOW.at(point, 1e-9), GaussianLaw(START.mean, 2e-9 * torch.eye(3).double())) < 1e-6
        assert float(FLOW.at(point, 1e-9).covariance.trace()) == pytest.approx(6e-9, rel=1e-6)


class TestProximal:
    @pytest.mark.parametrize("step_size", [0.05, 1.0, 20.0])
    def test_no_affine_map_does_better(self, step_size):
        """The minimum over x -> A (x - m) + m' with A = exp(symmetric), found by BFGS from the identity."""
        (m, s), (b, c) = START, FLOW.target
        rows, columns = torch.triu_indices(3, 3)

        def law_of(parameters):
            matrix = torch.zeros(3, 3).double()
            matrix[rows, columns] = matrix[columns, rows] = parameters[3:]
            return parameters[:3], torch.matrix_exp(matrix)

        def objective(numbers):
            parameters = torch.tensor(numbers, requires_grad=True)
            mean, a = law_of(parameters)
            gap = a - torch.eye(3).double()
            cost = (mean - m).square().sum() + (gap @ s @ gap.T).trace()
            kl = (torch.linalg.solve(c, a @ s @ a.T).trace() + (mean - b) @ torch.linalg.solve(c, mean - b)) / 2
            value = cost / (2 * step_size) + kl - torch.linalg.slogdet(a).logabsdet
            value.backward()
            return value.item(), parameters.grad.numpy()

        begin = np.concatenate([m.numpy(), np.zeros(6)])
        best = minimize(objective, begin, jac=True, method="BFGS", options={"gtol": 1e-9})
        mean, a = law_of(torch.tensor(best.x))
        assert apart(FLOW.proximal(START, step_size), GaussianLaw(mean, a @ s @ a.T)) < 1e-6

    @pytest.mark.parametrize("rank", [3, 1])
    def test_every_change_of_the_step_makes_it_worse(self, rank):
        """By the distances of Gaussians: second order in the change, from a singular start too."""
        start, step_size = law(3, 0, rank), 0.4
        found = FLOW.proximal(start, step_size)

        def objective(law):
            return gaussian_wasserstein(law, start) ** 2 / (2 * step_size) + FLOW.value(law)

        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            shift = torch.randn(3, generator=generator, dtype=torch.float64)
            turn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            worse = []
            for size in (1e-2, -1e-2):
                a = torch.eye(3).double() + size * turn
                worse.append(
                    objective(GaussianLaw(found.mean + size * shift, a @ found.covariance @ a.T)) - objective(found)
                )
            assert min(worse) > 0
            assert abs(worse[0] - worse[1]) < 0.2 * max(worse)

    def test_steps_converge_to_the_flow_at_first_order(self):
        gaps = []
        for steps in (16, 32, 64, 128):
            law = START
            for _ in range(steps):
                law = FLOW.proximal(law, 0.5 / steps)
            gaps.append(apart(law, FLOW.at(START, 0.5)))
        slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(gaps)]
        assert slopes[-1] == pytest.approx(1, abs=0.15)
        assert gaps[-1] > 1e-6

    def test_each_step_pays_for_its_way(self):
        """F falls by at least W2^2 / (2 tau), for any tau."""
        for step_size in (0.01, 1.0, 100.0):
            found = FLOW.proximal(START, step_size)
            paid = gaussian_wasserstein(found, START) ** 2 / (2 * step_size)
            assert FLOW.value(START) - FLOW.value(found) > paid > 0

    def test_the_target_rests_and_a_long_step_reaches_it(self):
        assert apart(FLOW.proximal(FLOW.target, 0.7), FLOW.target) < 1e-12
        assert apart(FLOW.proximal(START, 1e9), FLOW.target) < 1e-7


class TestErrors:
    def test_bad_input_is_refused(self, user_error):
        with user_error("the target has a singular covariance"):
            GaussianFlow(law(3, 0, rank=1))
        with user_error("the start has 2 dimensions, expected 3"):
            FLOW.at(law(2, 0), 1.0)
        with user_error("time is -1.0, expected"):
            FLOW.at(START, -1.0)
        with user_error("step_size is 0, expected a positive number"):
            FLOW.proximal(START, 0)
