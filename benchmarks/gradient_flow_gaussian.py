"""From a Gaussian to a Gaussian under KL, by every scheme: python benchmarks/gradient_flow_gaussian.py [--json PATH]

d = 5, from N(0, 1) to N(m, C) with |m| = sqrt(5) and C of eigenvalues 0.5 to 2 and no axis of its own. The flow's law
is exact (an Ornstein-Uhlenbeck process), and so are the laws of the schemes: mean and covariance are propagated through
the code of the integrators (diffusion.gradient_flow.responses) or carried by 2 d particles that have them; nothing is
sampled. Errors are Bures-Wasserstein distances at the horizon 1.5, and of the law that the same steps end in from the
target. The setting was chosen, among some hundred, so that plain Langevin has 5.2e-2 with 20 steps and 1.0e-2 with 100.

Then MALA beside ULA on a log-concave target with known moments, in standard errors.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.gradient_flow.flows.dynamics import Integrator
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama, LeimkuhlerMatthews, StochasticHeun, ThirdOrder
from diffusion.gradient_flow.flows.underdamped import Underdamped
from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.gaussian_flow import GaussianFlow
from diffusion.gradient_flow.responses import gaussian_laws
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.metrics.gaussians import GaussianLaw, gaussian_wasserstein

DIM, HORIZON = 5, 1.5
FEW, MANY = 20, 100
VELOCITIES = {"EulerMaruyama": 1, "LeimkuhlerMatthews": 1, "StochasticHeun": 2, "ThirdOrder": 4, "Underdamped": 1}


def laws() -> tuple[GaussianLaw, GaussianLaw]:
    """Start and target."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    spread = torch.logspace(-1, 1, DIM, base=2, dtype=torch.float64)
    start = GaussianLaw(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))
    return start, GaussianLaw(axes.sum(1), axes @ (spread[:, None] * axes.T))


def divergence(target: GaussianLaw) -> KL:
    precision = torch.linalg.inv(target.covariance)
    return KL(lambda x: (target.mean - x) @ precision, Entropy(GaussianScore()))


def slope(few: float, many: float) -> float | None:
    """The order that errors with FEW and MANY steps show; None where they are rounding or do not depend on steps."""
    return round(math.log(few / many) / math.log(MANY / FEW), 2) if few / 2 > many > 1e-10 else None


def row(name: str, velocities: int, declared: int | None, way: list[float], end: list[float]) -> dict[str, Any]:
    return {
        "scheme": name,
        "velocities_a_step": velocities,
        "declared_order": declared,
        "at_horizon": dict(zip(("20", "100"), way, strict=True)) if way else None,
        "order_at_horizon": slope(*way) if way else None,
        "in_the_end": dict(zip(("20", "100"), end, strict=True)),
        "order_in_the_end": slope(*end),
    }


def noisy(integrator: Integrator) -> dict[str, Any]:
    start, target = laws()
    flow, exact = Langevin(divergence(target), integrator), GaussianFlow(target).at(start, HORIZON)
    settled = (
        24.0 if isinstance(integrator, LeimkuhlerMatthews | Underdamped) else 9.0
    )  # what is left is rounding, or 1 %
    way, end = [], []
    for steps in (FEW, MANY):
        h = HORIZON / steps
        way.append(gaussian_wasserstein(gaussian_laws(flow, start, steps, h)[-1], exact))
        end.append(gaussian_wasserstein(gaussian_laws(flow, target, round(settled / h), h)[-1], target))
    if isinstance(integrator, Underdamped):
        way = []  # on its way it has another law
    name = type(integrator).__name__
    return row(name, VELOCITIES[name], integrator.order if way else None, way, end)


def deterministic(order: int) -> dict[str, Any]:
    start, target = laws()
    flow, exact = WassersteinFlow(divergence(target), order, control=None), GaussianFlow(target).at(start, HORIZON)
    particles = DIM**0.5 * torch.cat([torch.eye(DIM), -torch.eye(DIM)]).double()  # of mean 0 and covariance 1
    way, end = [], []
    for steps in (FEW, MANY):
        h = HORIZON / steps
        way.append(gaussian_wasserstein(GaussianLaw.of(flow.run(particles, steps, h)), exact))
        end.append(gaussian_wasserstein(GaussianLaw.of(flow.run(particles, round(40 / h), h)), target))
    return row(f"WassersteinFlow({order=})", order, order, way, end)


def logistic(x: Tensor) -> Tensor:
    return -(x + 2 * torch.nn.functional.softplus(-x)).sum(1)


def log_concave(number: int = 20000, steps: int = 100, step_size: float = 1.5) -> list[dict[str, Any]]:
    """Independent logistic coordinates: mean 0, E x^2 = pi^2 / 3, E x^4 = 7 pi^4 / 15, E x^8 = 127 pi^8 / 15."""
    second, fourth, eighth = math.pi**2 / 3, 7 * math.pi**4 / 15, 127 * math.pi**8 / 15
    start = 2 * torch.randn(number, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count, rows = number * DIM, []
    for integrator in (Metropolis(), EulerMaruyama()):
        generator = torch.Generator().manual_seed(1)
        *_, moment = Langevin(KL(logistic), integrator).moments(start, steps, step_size, generator)
        x = moment.particles
        rows.append(
            {
                "scheme": type(integrator).__name__,
                "acceptance": moment.memory.rate if isinstance(integrator, Metropolis) else None,
                "standard_errors_off": {
                    "mean": float(x.mean()) / math.sqrt(second / count),
                    "second": (float((x**2).mean()) - second) / math.sqrt((fourth - second**2) / count),
                    "fourth": (float((x**4).mean()) - fourth) / math.sqrt((eighth - fourth**2) / count),
                },
            }
        )
    return rows


def benchmark() -> dict[str, Any]:
    """Everything, as JSON takes it."""
    integrators = (EulerMaruyama(), LeimkuhlerMatthews(), StochasticHeun(), ThirdOrder(), Underdamped(2.0))
    gaussian = [noisy(integrator) for integrator in integrators] + [deterministic(order) for order in (1, 2, 4)]
    return {
        "dim": DIM,
        "horizon": HORIZON,
        "gaussian": gaussian,
        "best_with_20_steps": min(entry["at_horizon"]["20"] for entry in gaussian if entry["at_horizon"]),
        "log_concave": log_concave(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    path = parser.parse_args().json
    torch.set_num_threads(1)
    results = benchmark()
    print(f"{'scheme':<26}{'velocities':>10}", end="")
    print("".join(f"{name:>11}" for name in ("20 steps", "100 steps", "order", "in the end", "100 steps", "order")))
    for entry in results["gaussian"]:
        way, end = entry["at_horizon"] or {"20": math.nan, "100": math.nan}, entry["in_the_end"]
        orders = [math.nan if o is None else o for o in (entry["order_at_horizon"], entry["order_in_the_end"])]
        print(
            f"{entry['scheme']:<26}{entry['velocities_a_step']:>10}{way['20']:>11.2e}{way['100']:>11.2e}{orders[0]:>11.2f}"
            f"{end['20']:>11.2e}{end['100']:>11.2e}{orders[1]:>11.2f}"
        )
    for entry in results["log_concave"]:
        off = ", ".join(f"{name} {value:+.1f}" for name, value in entry["standard_errors_off"].items())
        print(f"log-concave, {entry['scheme']}: standard errors off: {off}; acceptance {entry['acceptance']}")
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
