"""Densities in 10 and 50 dimensions by particles with a learned score, against exact answers, with figures for context.

KL is KL(law found || exact) in nats with its standard error: of the particles along their paths; of the Gaussian, and
of the kernel density estimate (Scott's rule), fitted to as many exact paths' ends of the SDE (weak order 2).
"""

import time
from collections.abc import Callable

import torch
from scipy.stats import gaussian_kde
from torch import Tensor
from torch.distributions import MultivariateNormal

from diffusion.fokker_planck import ParticleSolution, ParticleSolver
from diffusion.fokker_planck.laws import GaussianMixture, Law
from diffusion.fokker_planck.problems import Problem, ornstein_uhlenbeck, variance_preserving
from diffusion.trainer import Trainer


def three_gaussians(dim: int) -> GaussianMixture:
    """Three Gaussians of unequal weights and widths, apart in the first two coordinates."""
    means = torch.zeros(3, dim, dtype=torch.float64)
    means[:, :2] = torch.tensor([[-3.0, 0.0], [2.0, 1.5], [0.0, -3.0]])
    stds = torch.tensor([0.5, 0.8, 0.6], dtype=torch.float64)
    covariances = stds[:, None, None] ** 2 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64), means, covariances)


def gaussian_problem(dim: int = 50) -> Problem:
    """Ornstein and Uhlenbeck's process with a turn: out of equilibrium, its stationary state too."""
    return ornstein_uhlenbeck(dim, turn=1.0)


def turning_mixture(dim: int = 10) -> Problem:
    return ornstein_uhlenbeck(dim, turn=1.0, start=three_gaussians(dim), horizon=0.5)


def diffused_mixture(dim: int = 10) -> Problem:
    """The forward process of a generative model, up to half its time."""
    return variance_preserving(three_gaussians(dim), low=0.1, high=8.0, horizon=0.4)


def _kl(sampled: Tensor, log_density: Tensor, law: Law) -> list[float]:
    ratio = log_density - law.log_prob(sampled)
    return [float(ratio.mean()), float(ratio.std() / len(ratio) ** 0.5)]


def plain(problem: Problem, number: int, steps: int = 50, seed: int = 0) -> dict:
    """KL of the fits to particles of the SDE at the horizon."""
    generator, law = torch.Generator().manual_seed(seed), problem.law_at(problem.horizon)
    x = torch.cat([problem.start.sample(min(1000, number - n), generator) for n in range(0, number, 1000)])
    x = problem.equation.simulate(x, [0.0, problem.horizon], steps, generator)[-1]
    fit = MultivariateNormal(x.mean(0), x.T.cov())
    drawn = x.mean(0) + torch.randn(2000, problem.dim, generator=generator, dtype=x.dtype) @ fit.scale_tril.T
    kernels = gaussian_kde(x.T.numpy())
    near = torch.from_numpy(kernels.resample(500, seed=seed).T)
    return {
        "gaussian_fit_kl": _kl(drawn, fit.log_prob(drawn), law),
        "kernels_kl": _kl(near, torch.from_numpy(kernels.logpdf(near.T.numpy())), law),
    }


def errors(problem: Problem, solution: ParticleSolution, index: int = -1) -> dict:
    """KL, errors of the mean (in standard deviations), and relative ones of the covariance and the learned score."""
    t, x = float(solution.times[index]), solution.particles[index].clone().requires_grad_()
    law = problem.law_at(t)
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    gap = solution.learned[index](x.detach()) - score
    covariance = law.covariance
    return {
        "time": t,
        "kl": list(solution.kl(law, index)),
        "kl_bound": float(solution.kl_bound[index]),
        "mean": float(((solution.mean[index] - law.mean) / covariance.diagonal().sqrt()).abs().max()),
        "covariance": float((solution.covariance[index] - covariance).norm() / covariance.norm()),
        "score": float((gap.square().sum() / score.square().sum()).sqrt()),
    }


MANY = {
    "hidden": (64, 256),
    "first": Trainer(steps=4000, batch_size=512, learning_rate=3e-3, ema_decay=0.99),
    "draws": 40_000,
}
STUDIES: dict[str, tuple[Callable[[], Problem], dict, dict]] = {
    "gaussian, d = 50": (gaussian_problem, {"hidden": (32,)}, {"number": 2000, "steps": 40}),
    "turning mixture, d = 10": (turning_mixture, MANY, {"number": 6000, "steps": 30}),
    "diffused mixture, d = 10": (diffused_mixture, MANY, {"number": 6000, "steps": 30}),
}


def study(name: str, seed: int = 0) -> dict:
    """The figures of one of the STUDIES: a few minutes on one core."""
    make, options, run = STUDIES[name]
    problem, began = make(), time.process_time()
    solver = ParticleSolver(problem.equation, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    solution = solver.solve(problem.start, [0.0, problem.horizon], generator=generator, **run)
    seconds = time.process_time() - began
    found = {"problem": name, "cpu_seconds": seconds, **run, **errors(problem, solution)}
    return found | plain(problem, run["number"], seed=seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for problem_name in STUDIES:
        print(study(problem_name), flush=True)
