"""Gradient flows, all figures in one run: python benchmarks/gradient_flow.py [--json PATH] [--parts NAME ...]

gaussian    from a Gaussian to a Gaussian under KL, every scheme beside the exact law; MALA on a log-concave target
velocities  every functional of the tests: velocity beside autograd of the value, at rest on the data, falling; and
            f-divergences by exact ratios on a line
modes       eight modes from a log-density alone
energy      time and memory of the energy distance by N
digits      handwritten digits by particle flows and by a one-step generator (trains two generators: ten minutes)
distances   closed-form distances between Gaussians beside Monte Carlo and scipy
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradient_flow_digits
import gradient_flow_energy
import gradient_flow_gaussian
import gradient_flow_modes
import scipy.linalg
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from diffusion.gradient_flow import FDivergence, Functional, WassersteinFlow
from diffusion.gradient_flow.functionals.fdivergence import KINDS
from diffusion.metrics import gaussian_bhattacharyya, gaussian_kl, gaussian_wasserstein
from diffusion.metrics.gaussians import GaussianLaw

sys.path.append(str(Path(__file__).parents[1] / "tests" / "gradient_flow"))
from cases import FUNCTIONALS, LineRatio, draws, quantiles

DRAWS = 400_000


def velocities(number: int = 60, dim: int = 5) -> list[dict[str, Any]]:
    """For each functional: velocity beside autograd (relative), the largest at the data, the value before and after 20
    steps and its largest rise in one of them (below 0: it fell in all). Then `on_a_line`.

    Values are those of the functional fitted to the particles of each moment. Divergences are 0 or more; a potential,
    an entropy, and KL from a density that is not normed, may be below. Where Silverman's rule gives the bandwidth, the
    value may rise as that changes: a step falls on the functional fitted before it.
    """
    rows = []
    for case in FUNCTIONALS:
        data, x = draws(80, dim, 0), 0.5 + draws(number, dim, 1, spread=1.3)
        functional = case.build(data).fitted(x, torch.Generator().manual_seed(2))
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.value(at), at)
        velocity = functional.velocity(x)
        still = case.build(data).fitted(data).velocity(data).abs().max() if case.rest else None
        rows.append(
            {
                "functional": case.name,
                "relative_difference": float((velocity + number * gradient).norm() / velocity.norm()),
                "largest_velocity_at_data": None if still is None else float(still),
                **followed(case.build(data), x),
            }
        )
        print(rows[-1], flush=True)
    return rows + [on_a_line(kind) for kind in KINDS]


def on_a_line(kind: str, number: int = 400) -> dict[str, Any]:
    """An f-divergence of N(0, 1.1^2) from N(0.3, 1): by quadrature, and along its flow with the ratio that follows."""
    p, q, f = norm(0.3, 1.0), norm(0.0, 1.1), KINDS[kind].value

    def integrand(x: float) -> float:
        return q.pdf(x) * float(f(torch.tensor(p.logpdf(x) - q.logpdf(x), dtype=torch.float64)))

    ratio = LineRatio(torch.distributions.Normal(*p.args).log_prob)
    row = {
        "functional": f"{kind}, on a line",
        "by_quadrature": quad(integrand, -12, 12, epsabs=1e-10)[0],
        **followed(FDivergence(kind, ratio), quantiles(number, *q.args)),
    }
    print(row, flush=True)
    return row


def followed(functional: Functional, x: Tensor) -> dict[str, Any]:
    """Values in the flow from x."""
    moments = WassersteinFlow(functional).moments(x, 20, 0.05, torch.Generator().manual_seed(2))
    values = [moment.value() for moment in moments]
    rise = max(later - earlier for earlier, later in itertools.pairwise(values))
    return {"value": [values[0], values[-1]], "largest_rise": rise}


def distances(dim: int = 4) -> dict[str, dict[str, float]]:
    """Each distance between two Gaussians, and what stands beside it."""
    random = torch.Generator().manual_seed(0)

    def law(shift: float) -> GaussianLaw:
        root = torch.randn(dim, dim, generator=random, dtype=torch.float64)
        return GaussianLaw(torch.full((dim,), shift, dtype=torch.float64), root @ root.T + torch.eye(dim).double())

    a, b = law(0.0), law(0.7)

    def density(of: GaussianLaw) -> Callable[[Tensor], Tensor]:
        return torch.distributions.MultivariateNormal(of.mean, of.covariance).log_prob

    noise = torch.randn(DRAWS, dim, generator=random, dtype=torch.float64)
    x = a.mean + noise @ torch.linalg.cholesky(a.covariance).T
    ratio = density(b)(x) - density(a)(x)
    overlap = (ratio / 2).exp()
    root = scipy.linalg.sqrtm(a.covariance.numpy())
    cross = scipy.linalg.sqrtm(root @ b.covariance.numpy() @ root).real.trace()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    result = {
        "KL": {
            "closed_form": float(gaussian_kl(a, b)),
            "monte_carlo": -float(ratio.mean()),
            "standard_error": float(ratio.std()) / math.sqrt(DRAWS),
        },
        "Bhattacharyya": {
            "closed_form": float(gaussian_bhattacharyya(a, b)),
            "monte_carlo": -math.log(overlap.mean()),
            "standard_error": float(overlap.std() / overlap.mean()) / math.sqrt(DRAWS),
        },
        "W2": {"closed_form": float(gaussian_wasserstein(a, b)), "scipy": math.sqrt(squared)},
    }
    for name, row in result.items():
        print(name, row, flush=True)
    return result


PARTS: dict[str, Callable[[], Any]] = {
    "gaussian": gradient_flow_gaussian.benchmark,
    "velocities": velocities,
    "modes": gradient_flow_modes.modes,
    "energy": gradient_flow_energy.benchmark,
    "digits": gradient_flow_digits.benchmark,
    "distances": distances,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to keep the figures; parts that are not run stay as they are")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for part in options.parts:
        print(f"== {part}", flush=True)
        results[part] = PARTS[part]()
        if options.json:
            options.json.write_text(json.dumps(_finite(results), indent=1) + "\n")


def _finite(figures: Any) -> Any:
    """Figures as JSON knows them: None for what is infinite or not known."""
    if isinstance(figures, dict):
        return {name: _finite(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [_finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


if __name__ == "__main__":
    main()
