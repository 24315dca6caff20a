"""Cost and error of the energy distance's velocity: python benchmarks/gradient_flow_energy.py --json PATH

N particles and as many data points, normal, the means apart by half a standard deviation in each coordinate and the
scales by a factor of 1.3, in d = 2 and d = 64, float32 on one thread. Three ways to a velocity: by slices and sorting
(EnergyDistance, fitted anew each time, as a flow does), by a chunked sum over all pairs, and by geomloss (energy,
value and backward pass): with tensors, which are N x N, and with KeOps where pykeops is installed, without them.
Times are CPU time, median over turns; of what takes minutes at 100,000, one call. Memory is the peak of the resident
set above what was there before the call. The error is |velocity - exact| / |exact| against the sum over all pairs in
float64, for one draw of directions, and for the mean over `DRAWS` draws, which a flow of small steps sees. The slope
is that of log time in log N, by least squares; for N log N it is shown beside.
"""

import argparse
import json
import math
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from exact_field import cpu_seconds, extra_megabytes
from geomloss import SamplesLoss
from torch import Tensor

from diffusion.gradient_flow.functionals.energy import EnergyDistance

NUMBERS, DIMS, DRAWS = (1000, 2000, 10_000, 100_000), (2, 64), 25
MANY = 100_000  # from here on what takes minutes is called once
LARGEST = {"geomloss": 10_000}
"""Particles up to which a method is measured: 3 GB with tensors at 10,000 would be 300. KeOps in d = 64 takes 40
minutes at 100,000."""


def slices(x: Tensor, y: Tensor, randomness: torch.Generator) -> Tensor:
    return EnergyDistance(y).fitted(x, randomness).velocity(x)


def all_pairs(x: Tensor, y: Tensor) -> Tensor:
    """2 E (x - x') / |x - x'| - 2 E (x - y) / |x - y|, 2^22 pairs at a time."""

    def pull(points: Tensor) -> Tensor:
        parts = []
        for rows in x.split(max(1, 2**22 // len(points))):
            distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
            weights = torch.where(distances > 0, 1 / distances, 0)
            parts.append(weights.sum(1, keepdim=True) * rows - weights @ points)
        return torch.cat(parts) / len(points)

    return 2 * (pull(x) - pull(y))


def geomloss_energy(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """geomloss has half the energy distance, and adds 1e-8 to squared distances."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = SamplesLoss("energy", backend=backend)(x, y)
        return -2 * len(x) * torch.autograd.grad(loss, x)[0]


def relative(velocity: Tensor, exact: Tensor) -> float:
    return float((velocity.double() - exact).norm() / exact.norm())


def slope(numbers: list[int], seconds: list[float]) -> float:
    logs, times = [math.log(n) for n in numbers], [math.log(s) for s in seconds]
    return statistics.linear_regression(logs, times).slope


def measure(dim: int, numbers: tuple[int, ...] = NUMBERS, turns: int = 7) -> dict:
    """The table of one dimension."""
    randomness = torch.Generator().manual_seed(0)
    rows = []
    for number in numbers:
        x = 1.3 * torch.randn(number, dim, generator=randomness) + 0.5
        y = torch.randn(number, dim, generator=randomness)
        methods = {"slices": partial(slices, x, y, randomness), "all pairs": partial(all_pairs, x, y)}
        methods["geomloss"] = partial(geomloss_energy, x, y, "tensorized")
        if find_spec("pykeops"):
            methods["geomloss, KeOps"] = partial(geomloss_energy, x, y, "online")
            geomloss_energy(x[:9], y[:9], "online")  # compiles
        exact = all_pairs(x.double(), y.double()) if number <= 2000 else None
        for name, call in methods.items():
            if number > LARGEST.get(name, math.inf):
                continue
            row = {"method": name, "number": number}
            seconds = [cpu_seconds(lambda call=call, row=row: row.update(extra_mb=extra_megabytes(call)))]
            if number < MANY or name == "slices":
                seconds = [cpu_seconds(call) for _ in range(turns if number < 10_000 else max(1, turns // 3))]
            row["cpu_ms"] = 1e3 * statistics.median(seconds)
            if exact is not None:
                row["error"] = relative(call(), exact)
                if name == "slices":
                    row["error_of_mean"] = relative(sum(call() for _ in range(DRAWS)) / DRAWS, exact)
            rows.append(row)
            print(json.dumps({"dim": dim, **row}), flush=True)
    times = [row["cpu_ms"] for row in rows if row["method"] == "slices"]
    report = {"dim": dim, "directions": EnergyDistance(y).number(dim), "rows": rows}
    if len(numbers) > 1:
        report["slope"] = slope(numbers, times)
        report["slope_of_n_log_n"] = slope(numbers, [n * math.log(2 * n) for n in numbers])
    return report


def benchmark(turns: int = 7) -> list[dict]:
    """All tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [measure(dim, turns=turns) for dim in DIMS]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--turns", type=int, default=7, help="repetitions of each measurement")
    options = parser.parse_args()
    results = benchmark(options.turns)
    for result in results:
        print(f"d = {result['dim']}: slope {result['slope']:.3f}, N log N {result['slope_of_n_log_n']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
