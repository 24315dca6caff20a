"""Problems with exact answers: an equation, a law at time 0, a box that holds it, and what is known of the density."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import leggauss
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.box import BOUNDARIES
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.laws import GaussianMixture, Law, gaussian


@dataclass(frozen=True)
class Problem:
    """What a solver is given, and what it is compared with.

    Attributes:
        equation: the equation.
        start: law at time 0.
        domain: (low, high) of each coordinate.
        horizon: the last time.
        boundary: of the domain: "reflecting", "absorbing" or "periodic", in all coordinates.
        law_at: the exact law at each time, where there is one.
        log_stationary: x (N, d) -> log of the stationary density, up to a constant (N,), where it is known.
    """

    equation: FokkerPlanck
    start: Law
    domain: tuple[tuple[float, float], ...]
    horizon: float
    boundary: str = "reflecting"
    law_at: Callable[[float], Law] | None = None
    log_stationary: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        if not isinstance(self.equation, FokkerPlanck):
            raise UserError(f"the problem has equation={type(self.equation).__name__}, expected a FokkerPlanck")
        if self.boundary not in BOUNDARIES:
            raise UserError(f"the problem has boundary={self.boundary!r}, expected one of {', '.join(BOUNDARIES)}")
        if not (isinstance(self.horizon, int | float) and 0 < self.horizon < math.inf):
            raise UserError(f"the problem has horizon={self.horizon!r}, expected a positive number")
        if not hasattr(self.start, "log_prob"):
            raise UserError(f"the problem has start={type(self.start).__name__}, expected a law with log_prob, sample")
        try:
            sides = [(float(low), float(high)) for low, high in self.domain]
        except (TypeError, ValueError):
            sides = []
        if not sides:
            raise UserError(f"the problem has domain={self.domain!r}, expected (low, high) of each coordinate")

    @property
    def dim(self) -> int:
        return len(self.domain)


def _check(dim: int = 1, positive: dict[str, float] | None = None, **numbers: float) -> None:
    """Raise a UserError that names the first that is no dimension, no number, or not positive where that is asked."""
    if type(dim) is not int or dim < 1:
        raise UserError(f"dim is {dim!r}, expected a whole number, 1 or more")
    positive = positive or {}
    for name, value in {**positive, **numbers}.items():
        kind = "a positive number" if name in positive else "a number"
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (name in positive and value <= 0):
            raise UserError(f"{name} is {value!r}, expected {kind}")


def two_gaussians(dim: int = 1) -> GaussianMixture:
    """Two unequal Gaussians, the one narrower than the other, in `dim` dimensions."""
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[:, 0] = torch.tensor([-1.2, 0.8])
    stds = torch.tensor([0.3, 0.5], dtype=torch.float64)
    covariances = stds[:, None, None] ** 2 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=torch.float64), means, covariances)


def _box(dim: int, reach: float) -> tuple[tuple[float, float], ...]:
    return ((-reach, reach),) * dim


def ornstein_uhlenbeck(
    dim: int = 1,
    rate: float = 1.0,
    turn: float = 0.0,
    noise: float = math.sqrt(2.0),
    start: GaussianMixture | None = None,
    horizon: float = 1.0,
) -> Problem:
    """dx = -A x dt + noise dw, with A = rate I + turn R, R the turn by a right angle of coordinates 1, 2 and 3, 4, ...

    With a turn the stationary state has a current, though its density stays that of the gradient field.

    Args:
        start: a Gaussian of mean 1 and std 0.5 in each coordinate, unless given.
    """
    _check(dim, positive={"rate": rate}, turn=turn, noise=noise)  # of a rate that is not positive nothing comes to rest
    matrix = rate * torch.eye(dim, dtype=torch.float64)
    for i in range(0, dim - 1, 2):
        matrix[i, i + 1], matrix[i + 1, i] = turn, -turn
    start = start or gaussian(1.0, 0.5, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    final = torch.from_numpy(solve_continuous_lyapunov(matrix.numpy(), (noise**2 * eye).numpy()))

    def law_at(t: float) -> GaussianMixture:
        decay = torch.matrix_exp(-t * matrix)
        return start.moved(decay, final - decay @ final @ decay.T)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -x @ matrix.to(x).T

    def log_stationary(x: Tensor) -> Tensor:
        return -rate * x.square().sum(1) / noise**2

    equation = FokkerPlanck(drift, lambda x, t: torch.full_like(x[:, 0], noise))
    return Problem(equation, start, _box(dim, 8.0), horizon, law_at=law_at, log_stationary=log_stationary)


def variance_preserving(
    start: GaussianMixture | None = None, dim: int = 1, low: float = 0.1, high: float = 20.0, horizon: float = 1.0
) -> Problem:
    """dx = -beta x / 2 dt + sqrt(beta) dw, beta rising linearly from `low` at 0 to `high` at 1 (Song et al. 2021)."""
    _check(dim, low=low, high=high)
    start = start or two_gaussians(dim)
    eye = torch.eye(start.dim, dtype=torch.float64)

    def beta(t: Tensor) -> Tensor:
        return low + (high - low) * t

    def law_at(t: float) -> GaussianMixture:
        kept = math.exp(-(low * t + (high - low) * t**2 / 2))  # of the variance
        return start.moved(math.sqrt(kept) * eye, (1 - kept) * eye)

    equation = FokkerPlanck(lambda x, t: -0.5 * beta(t)[:, None] * x, lambda x, t: beta(t).sqrt())
    box = _box(start.dim, 6.0)
    return Problem(equation, start, box, horizon, law_at=law_at, log_stationary=lambda x: -x.square().sum(1) / 2)


def variance_exploding(
    start: GaussianMixture | None = None, dim: int = 1, low: float = 0.05, high: float = 2.0, horizon: float = 1.0
) -> Problem:
    """dx = sqrt(d sigma^2/dt) dw, sigma = low (high / low)^t (Song et al. 2021)."""
    _check(dim, positive={"low": low, "high": high})
    start = start or two_gaussians(dim)
    eye = torch.eye(start.dim, dtype=torch.float64)
    growth = math.log(high / low)

    def law_at(t: float) -> GaussianMixture:
        return start.moved(eye, low**2 * math.expm1(2 * growth * t) * eye)

    equation = FokkerPlanck(
        lambda x, t: torch.zeros_like(x), lambda x, t: low * math.sqrt(2 * growth) * (growth * t).exp()
    )
    return Problem(equation, start, _box(start.dim, 6 * high), horizon, law_at=law_at)


def gradient_flow(
    potential: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    start: Law,
    domain: Sequence[tuple[float, float]],
    temperature: float = 1.0,
    horizon: float = 1.0,
) -> Problem:
    """dx = -grad V dt + sqrt(2 temperature) dw, whose stationary density is exp(-V / temperature).

    Args:
        potential: V, points (N, d) -> (N,).
        slope: its gradient, (N, d) -> (N, d).
    """
    _check(positive={"temperature": temperature})
    equation = FokkerPlanck(lambda x, t: -slope(x), lambda x, t: torch.full_like(x[:, 0], math.sqrt(2 * temperature)))
    domain = tuple(map(tuple, domain))
    return Problem(equation, start, domain, horizon, log_stationary=lambda x: -potential(x) / temperature)


def double_well(dim: int = 1, barrier: float = 1.0, temperature: float = 0.5, horizon: float = 1.0) -> Problem:
    """V = barrier (x_1^2 - 1)^2 + (x_2^2 + ...) / 2; starts in the left well."""
    _check(dim, positive={"barrier": barrier})

    def potential(x: Tensor) -> Tensor:
        return barrier * (x[:, 0].square() - 1).square() + x[:, 1:].square().sum(1) / 2

    def slope(x: Tensor) -> Tensor:
        return torch.cat([4 * barrier * x[:, :1] * (x[:, :1].square() - 1), x[:, 1:]], 1)

    mean = torch.zeros(dim, dtype=torch.float64)
    mean[0] = -1.0
    domain = [(-3.0, 3.0)] + [(-5.0, 5.0)] * (dim - 1)
    return gradient_flow(potential, slope, gaussian(mean, 0.3), domain, temperature, horizon)


def banana(bend: float = 1.0, temperature: float = 0.5, horizon: float = 1.0) -> Problem:
    """V = x_1^2 / 2 + 2 (x_2 - bend (x_1^2 - 1))^2, a bent valley in the plane; starts at its bottom."""
    _check(bend=bend)

    def gap(x: Tensor) -> Tensor:
        return x[:, 1] - bend * (x[:, 0].square() - 1)

    def slope(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] - 8 * bend * x[:, 0] * gap(x), 4 * gap(x)], 1)

    return gradient_flow(
        lambda x: x[:, 0].square() / 2 + 2 * gap(x).square(),
        slope,
        gaussian([0.0, -bend], 0.4),
        [(-4.0, 4.0), (-5.0, 10.0)],
        temperature,
        horizon,
    )


def ratchet(force: float = 1.0, height: float = 1.0, temperature: float = 0.5, horizon: float = 1.0) -> Problem:
    """Brownian motion in a tilted periodic potential V = height (sin x + sin(2x) / 4) - force x, on a circle of 2 pi.

    Out of equilibrium: its stationary state has a constant current, see `ratchet_stationary`.
    """
    _check(positive={"temperature": temperature}, force=force, height=height)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return force - height * (x.cos() + (2 * x).cos() / 2)

    equation = FokkerPlanck(drift, lambda x, t: torch.full_like(x[:, 0], math.sqrt(2 * temperature)))
    return Problem(equation, gaussian(math.pi, 0.3), ((0.0, math.tau),), horizon, "periodic")


def ratchet_stationary(
    x: Tensor, force: float = 1.0, height: float = 1.0, temperature: float = 0.5, points: int = 512
) -> tuple[Tensor, float]:
    """The stationary density (N,) of the ratchet at `x` (N,), and its current, by the closed formula.

    p(x) = C exp(-V(x) / T) int_x^(x + 2 pi) exp(V / T) (Stratonovich 1958; Risken 1989, eq. 11.37), J = C T
    (1 - exp(-2 pi force / T)); the integrand is periodic but for a factor, and the integral is by Gauss-Legendre.
    """

    def potential(x: Tensor) -> Tensor:
        return (height * (x.sin() + (2 * x).sin() / 4) - force * x) / temperature

    nodes, weights = (torch.from_numpy(v) for v in leggauss(points))

    def unnormalised(x: Tensor) -> Tensor:
        y = x[:, None] + math.pi * (nodes + 1)
        return math.pi * ((potential(y) - potential(x)[:, None]).exp() @ weights)

    total = math.pi * (weights @ unnormalised(math.pi * (nodes + 1)))
    current = temperature * (1 - math.exp(-math.tau * force / temperature)) / float(total)
    return unnormalised(x.double()) / total, current


@dataclass(frozen=True)
class LogNormal:
    """exp of a Gaussian: of mean `mean` and standard deviation `std`, on the line (d = 1)."""

    mean: float
    std: float

    def log_prob(self, x: Tensor) -> Tensor:
        safe = x[:, 0].clamp_min(torch.finfo(x.dtype).tiny)
        z = (safe.log() - self.mean) / self.std
        value = -z.square() / 2 - safe.log() - math.log(self.std * math.sqrt(math.tau))
        return torch.where(x[:, 0] > 0, value, -math.inf)

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(number, 1, generator=generator, dtype=torch.float64)
        return (self.mean + self.std * noise).exp()


def geometric_brownian(
    rate: float = 0.3, volatility: float = 0.4, start: LogNormal | None = None, horizon: float = 1.0
) -> Problem:
    """dx = rate x dt + volatility x dw: noise that depends on the state; x > 0 stays log-normal."""
    _check(positive={"volatility": volatility}, rate=rate)
    start = start or LogNormal(0.0, 0.2)

    def law_at(t: float) -> LogNormal:
        mean = start.mean + (rate - volatility**2 / 2) * t
        return LogNormal(mean, math.sqrt(start.std**2 + volatility**2 * t))

    equation = FokkerPlanck(lambda x, t: rate * x, lambda x, t: volatility * x)
    end = math.exp(law_at(horizon).mean + 7 * law_at(horizon).std)
    return Problem(equation, start, ((1e-3, end),), horizon, law_at=law_at)
