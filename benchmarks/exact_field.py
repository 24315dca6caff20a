"""Cost and error of the exact field of a data set: python benchmarks/exact_field.py

60,000 smooth images of 28x28 pixels (scikit-learn's digits, enlarged and distorted at random) and 256 points drawn from
the field at each time, in float32 on one thread. The unit of time is the two matrix products that no method can avoid,
x @ data.T and weights @ data, at full size. Methods run in turns in one process; times are CPU time, ratios are taken
within a turn, and the median over turns is reported. Errors are relative, |result - reference| / |reference| over the
batch, against the same sums in float64. Memory is the peak of the resident set above what was there before the call.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from diffusion.fields import AffineField, EmpiricalField, gravity, pfgmpp, variance_exploding

POINTS, DIM, BATCH_SIZE = 60_000, 784, 256
FIELDS = {"Gaussian": variance_exploding(), "Student-t D=1": gravity(DIM), "Student-t D=128": pfgmpp(DIM, 128.0)}
NAIVE_ROWS = 4  # naive broadcasting and KeOps run on these rows only, their time scaled up to the batch


def images(number: int, randomness: torch.Generator) -> Tensor:
    """Distorted digits (number, 784) in [-1, 1]."""
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
    parts = []
    for size in torch.full((number // 5000,), 5000).tolist():
        chosen = digits[torch.randint(len(digits), (size,), generator=randomness)]
        map_ = torch.eye(2, 3) + 0.1 * torch.randn(size, 2, 3, generator=randomness)
        grid = F.affine_grid(map_, (size, 1, 28, 28), align_corners=False)
        parts.append(2 * F.grid_sample(chosen, grid, "bicubic", "zeros", False).clamp(0, 1).flatten(1) - 1)
    return torch.cat(parts)


def log_kernel(field: AffineField, squared: Tensor, t: float) -> Tensor:
    """log p_t(x|x0) up to a constant, written out."""
    dof = getattr(field.base, "dof", math.inf)
    if math.isinf(dof):
        return -squared / (2 * t * t)
    return -0.5 * (dof + DIM) * torch.log1p(squared / (dof * t * t))


def reference(field: AffineField, data: Tensor, x: Tensor, t: float) -> Tensor:
    """E[x0|x] in float64."""
    x, parts = x.double(), data.split(4000)
    squared = [(x.square().sum(1, keepdim=True) - 2 * x @ y.double().T + y.double().square().sum(1)) for y in parts]
    share = log_kernel(field, torch.cat(squared, 1).clamp_min_(0), t).softmax(1)
    return sum(w @ y.double() for w, y in zip(share.split(4000, 1), parts, strict=True))


def streaming(field: AffineField, data: Tensor, norms: Tensor, x: Tensor, t: float) -> Tensor:
    """A plain streaming softmax over chunks, all in float32."""
    peak, total, sums = torch.full((len(x), 1), -math.inf), torch.zeros(len(x), 1), torch.zeros_like(x)
    length = x.square().sum(1, keepdim=True)
    for y, norm in zip(data.split(4096), norms.split(4096), strict=True):
        logits = log_kernel(field, (length - 2 * x @ y.T + norm).clamp_min(0), t)
        top = torch.maximum(peak, logits.amax(1, keepdim=True))
        decay, weights = (peak - top).exp(), (logits - top).exp()
        peak, total, sums = top, total * decay + weights.sum(1, keepdim=True), sums * decay + weights @ y
    return sums / total


def naive(field: AffineField, data: Tensor, x: Tensor, t: float) -> Tensor:
    """Differences to all data points, row by row."""
    rows = [log_kernel(field, (row - data).square().sum(1), t).softmax(0) @ data for row in x]
    return torch.stack(rows)


def keops(field: AffineField, data: Tensor, x: Tensor, t: float) -> Tensor:
    from pykeops.torch import LazyTensor

    squared = ((LazyTensor(x[:, None]) - LazyTensor(data[None])) ** 2).sum(-1)
    dof = getattr(field.base, "dof", math.inf)
    if math.isinf(dof):
        logits = squared * (-0.5 / (t * t))
    else:
        logits = (1 + squared / (dof * t * t)).log() * (-0.5 * (dof + DIM))
    return logits.sumsoftmaxweight(LazyTensor(data[None]), dim=1)


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def extra_megabytes(call: Callable[[], Tensor]) -> float | None:
    """Peak of the resident set during the call above what it was before; Linux only."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def kilobytes(name: str) -> int:
        return int(status.read_text().partition(f"{name}:")[2].split()[0])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what is needed
    reset.write_text("5")
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--times", type=float, nargs="+", default=[1e-3, 0.1, 1, 5, 100, 1000])
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    randomness = torch.Generator().manual_seed(0)
    data = images(POINTS, randomness)
    norms = data.square().sum(1)
    has_keops = importlib.util.find_spec("pykeops") is not None
    if not has_keops:
        print("pykeops is not installed: its column is left out")
    sizes = {"points": POINTS, "dim": DIM, "batch_size": BATCH_SIZE, "turns": chosen.turns}
    results = {"torch": torch.__version__, **sizes}
    print(f"{'kernel':16}{'method':12}{'t':>7}  {'time':>6}  {'denoised':>8}  {'velocity':>8}   MB", flush=True)
    for name, field in FIELDS.items():
        exact = EmpiricalField(field, data)
        results[name] = rows = []
        for t in chosen.times:
            x = field.sample(data[torch.randint(POINTS, (BATCH_SIZE,), generator=randomness)], t, randomness)
            truth = reference(field, data, x, t)
            velocity = (x.double() - truth) / t
            methods = {"ours": partial(exact.denoised, x, t)}
            if t == 1:  # what others do is shown at one time
                methods["streaming"] = partial(streaming, field, data, norms, x, t)
                methods["naive"] = partial(naive, field, data, x[:NAIVE_ROWS], t)
                if has_keops:
                    methods["KeOps"] = partial(keops, field, data, x[:NAIVE_ROWS], t)
                    keops(field, data[:8], x[:2], t)  # compiles
            ratios = {method: [] for method in methods}
            for _ in range(chosen.turns):
                two_products = cpu_seconds(lambda x=x: (x @ data.T) @ data)
                for method, call in methods.items():
                    if method in ("ours", "streaming") or not ratios[method]:
                        ratios[method].append(cpu_seconds(call) / two_products)
            for method, call in methods.items():
                result = call()
                scale, part = BATCH_SIZE / len(result), slice(len(result))
                v = exact.velocity(x, t) if method == "ours" else (x[part] - result) / t
                row = {"method": method, "t": t, "time": scale * statistics.median(ratios[method])}
                row |= {"denoised": error(result, truth[part]), "velocity": error(v, velocity[part])}
                row |= {"megabytes": extra_megabytes(call)}
                rows.append(row)
                memory = "-" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
                print(
                    f"{name:16}{method:12}{t:7g}  {row['time']:6.3f}  {row['denoised']:8.1e}  {row['velocity']:8.1e}"
                    f"  {memory:>3}",
                    flush=True,
                )
        ours = [row for row in rows if row["method"] == "ours"]
        worst = {key: max(row[key] for row in ours if row[key] is not None) for key in ("time", "denoised", "velocity")}
        print(f"{name:16}ours, worst    {worst['time']:6.3f}  {worst['denoised']:8.1e}  {worst['velocity']:8.1e}")
    chosen.json.write_text(json.dumps(results, indent=2) + "\n")
    print(chosen.json)


if __name__ == "__main__":
    main()
