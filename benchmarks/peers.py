"""Samplers of other libraries on the problems of benchmarks/mixtures.py.

All solve dy/ds = (y - E[x0|y, s]) / s with y = x / alpha and s = sigma / alpha, the form of k-diffusion and EDM, which
every affine field has; diffusers gets y / sqrt(1 + s^2), its variance-preserving form. Grids are laid here and given to
the libraries (to diffusers through the scheduler's `sigmas`). A method stops either at t_min, and is measured there, or
takes its library's last step to s = 0, which lands on E[x0|x(t_min)], and is measured there. No method evaluates the
model more often than it is allowed to; where its number of evaluations has no such value it takes fewer.

The linear field's horizon has s = infinity: others start just before it, at t = 0.999 or 0.99, with y = s z + E[x0],
exact to second order and not counted.
"""

import importlib
import importlib.util
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

import torch
from mixtures import Case
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


class Counter:
    """The denoiser of a case, D(y, s), that counts its calls."""

    def __init__(self, case: Case):
        self.model, self.evaluations = case.model, 0

    def __call__(self, y: Tensor, s: Tensor | float) -> Tensor:
        self.evaluations += 1
        s = float(s.reshape(-1)[0]) if isinstance(s, Tensor) else s
        return self.model.posterior_mean(y.double(), 1.0, s)


class Peer(NamedTuple):
    """A method with its options; `run` takes (denoiser, y, falling noise levels) and gives y at the last of them."""

    row: str  # where it counts in the table
    method: str
    run: Callable[[Denoiser, Tensor, Tensor], Tensor]
    to_zero: bool = False  # a zero is appended to the levels: ends at E[x0|x(t_min)], not at x(t_min) / alpha
    cost: int = 1  # evaluations a step; the step to zero takes one
    grids: tuple[str, ...] = ("log", "karras", "t", "flow")

    def levels(self, evaluations: int) -> int:
        """How many noise levels above zero `evaluations` pay for."""
        return (evaluations - 1) // self.cost + 1 if self.to_zero else evaluations // self.cost + 1


def grid(case: Case, kind: str, levels: int) -> tuple[Tensor, Tensor]:
    """(y at the first level, the falling levels (levels,)), float64.

    "log": even in log s; "karras": even in s^(1/7); "t": even in the field's own time; "log0.99": "log" from t = 0.99;
    "flow": even in s / (1 + s), the linear field's time.
    """
    field = case.model.field
    before = 0.01 if kind == "log0.99" else 0.001
    y, first = case.start(before)
    last = case.noise_to_signal(field.t_min)
    if kind == "t":
        horizon = field.horizon if float(field.alpha(torch.tensor(field.horizon))) > 0 else field.horizon - before
        t = torch.linspace(horizon, field.t_min, levels, dtype=torch.float64)
        return y, field.sigma(t) / field.alpha(t)
    ramp = torch.linspace(0, 1, levels, dtype=torch.float64)
    if kind == "flow":
        u = first / (1 + first) * (1 - ramp) + last / (1 + last) * ramp
        return y, u / (1 - u)
    if kind == "karras":
        return y, (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    return y, first * (last / first) ** ramp


def kinds(case: Case, borrowed: bool) -> list[str]:
    """The grids in use for a case, and, if `borrowed`, the linear field's for the others."""
    field = case.name.rpartition("_")[0]
    more = {"variance_preserving": ["t"], "linear": ["t", "log0.99"]}
    return ["log", "karras", *more.get(field, []), *(["flow"] if borrowed and field != "linear" else [])]


def k_diffusion_sampling() -> types.ModuleType:
    """k_diffusion.sampling without the package's own __init__, which imports CLIP and data sets."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            raise ImportError("No module named 'k_diffusion'")
        package = types.ModuleType("k_diffusion")
        package.__path__, package.__spec__ = spec.submodule_search_locations, spec
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def k_diffusion() -> list[Peer]:
    sampling, peers = k_diffusion_sampling(), []

    def add(method: str, function: Callable, cost: int = 1, ends: tuple[bool, ...] = (False, True), **options) -> None:
        run, row = partial(function, disable=True, **options), "EDM's Heun" if "EDM" in method else "k-diffusion"
        peers.extend(Peer(row, method, run, to_zero, cost) for to_zero in ends)

    def fast(denoiser: Denoiser, y: Tensor, levels: Tensor, **options) -> Tensor:
        first, last = float(levels[0]), float(levels[-1])
        return sampling.sample_dpm_fast(denoiser, y, last, first, len(levels) - 1, **options)

    add("Heun (EDM)", sampling.sample_heun, cost=2)
    add("DPM-Solver-2", sampling.sample_dpm_2, cost=2)
    add("DPM-Solver++ 2M", sampling.sample_dpmpp_2m)
    add("DPM-Solver++ 2M, phi", sampling.sample_dpmpp_2m_sde, eta=0.0, solver_type="heun", noise_sampler=no_noise)
    add("DPM-Solver++ 3M", sampling.sample_dpmpp_3m_sde, eta=0.0, noise_sampler=no_noise)
    for order in (2, 3, 4):
        add(f"LMS {order}", sampling.sample_lms, ends=(False,), order=order)
    peers.append(Peer("k-diffusion", "DPM-Solver-fast", partial(fast, disable=True), grids=("log",)))
    return peers


def no_noise(sigma: Tensor, sigma_next: Tensor) -> float:
    return 0.0


def azula() -> list[Peer]:
    sample = importlib.import_module("azula.sample")
    denoise = importlib.import_module("azula.denoise")
    noise = importlib.import_module("azula.noise")

    class Levels(noise.Schedule):
        """The given noise levels at even times from 1 to 0, between them log-linear."""

        def __init__(self, levels: Tensor):
            self.log_levels = levels.log().flip(0)

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            place = t.double() * (len(self.log_levels) - 1)
            low = place.floor().long().clamp(0, len(self.log_levels) - 2)
            s = torch.lerp(self.log_levels[low], self.log_levels[low + 1], place - low).exp()
            return torch.ones_like(s), s

    class Exact(denoise.Denoiser):
        def __init__(self, denoiser: Denoiser, schedule: noise.Schedule):
            super().__init__()
            self.denoiser, self.schedule = denoiser, schedule

        def forward(self, x_t: Tensor, t: Tensor) -> denoise.DiracPosterior:
            return denoise.DiracPosterior(self.denoiser(x_t, self.schedule(t)[1]))

    def run(denoiser: Denoiser, y: Tensor, levels: Tensor, kind: type, **options) -> Tensor:
        model = Exact(denoiser, Levels(levels))
        return kind(model, steps=len(levels) - 1, silent=True, dtype=torch.float64, **options)(y)

    families = {
        "exponential AB of x0": (sample.xEABSampler, (2, 3, 4)),
        "exponential AB of z": (sample.zEABSampler, (2, 3, 4)),
        "AB of z": (sample.zABSampler, (3,)),
        "AB of v": (sample.vABSampler, (2, 3, 4)),
    }
    return [
        Peer(f"azula {name.rpartition(' of')[0]}", f"{name}, {order}", partial(run, kind=kind, order=order))
        for name, (kind, orders) in families.items()
        for order in orders
    ]


def diffusers() -> list[Peer]:
    library = importlib.import_module("diffusers")
    library.utils.logging.set_verbosity_error()

    def run(denoiser: Denoiser, y: Tensor, levels: Tensor, build: Callable, scaled: bool = True) -> Tensor:
        scheduler = build()
        scheduler.set_timesteps(len(levels) - 1)
        twice = 1 if scaled else 2  # Heun's scheduler lists each inner level twice and does not scale
        scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(twice), levels[-1:]])
        scheduler.set_begin_index(0)
        x, at = y / (1 + levels[0] ** 2).sqrt() if scaled else y, scheduler.sigmas[:-1]
        for s, t in zip(at, scheduler.timesteps, strict=True):
            D = denoiser(x * (1 + s**2).sqrt() if scaled else x, s)
            x = scheduler.step(D, t, x).prev_sample.double()
        return x * (1 + levels[-1] ** 2).sqrt() if scaled else x

    peers = []

    def add(row: str, note: str, kind: type, to_zero: bool, **options) -> None:
        if kind is not library.DEISMultistepScheduler:
            options["final_sigmas_type"] = "zero" if to_zero else "sigma_min"
        build = partial(kind, prediction_type="sample", **options)
        peers.append(Peer(f"diffusers {row}", f"{row}{note}", partial(run, build=build), to_zero))

    for order in (2, 3):
        for full, note in ((False, ""), (True, ", full order to the end")):
            options = {"solver_order": order, "lower_order_final": not full}
            add(f"DPM-Solver++ {order}M", note, library.DPMSolverMultistepScheduler, False, **options)
            add("UniPC", f" {order}{note}", library.UniPCMultistepScheduler, False, **options)
            add("DEIS", f" {order}{note}", library.DEISMultistepScheduler, False, **options)
        options = {"solver_order": order}
        add(f"DPM-Solver++ {order}M", "", library.DPMSolverMultistepScheduler, True, **options)
        add("UniPC", f" {order}", library.UniPCMultistepScheduler, True, **options)
    heun = partial(run, build=partial(library.HeunDiscreteScheduler, prediction_type="sample"), scaled=False)
    peers.append(Peer("diffusers Heun", "Heun", heun, True, cost=2))
    return peers


def torchdiffeq() -> list[Peer]:
    odeint = importlib.import_module("torchdiffeq").odeint

    def run(denoiser: Denoiser, y: Tensor, levels: Tensor, method: str) -> Tensor:
        """Even steps of log s between the levels, of y scaled to variance one."""

        def slope(log_s: Tensor, w: Tensor) -> Tensor:
            s = log_s.exp()
            scale = (1 + s**2).sqrt()
            return w / scale**2 - denoiser(scale * w, s) / scale

        scale = (1 + levels**2).sqrt()
        return odeint(slope, y / scale[0], levels.log(), method=method)[-1] * scale[-1]

    def in_time(denoiser: Denoiser, y: Tensor, levels: Tensor, method: str) -> Tensor:
        """Straight in u = s / (1 + s), the time of the linear field, of y / (1 + s)."""

        def slope(u: Tensor, x: Tensor) -> Tensor:
            return (x - denoiser(x / (1 - u), u / (1 - u))) / u

        u = levels / (1 + levels)
        return odeint(slope, y * (1 - u[0]), u, method=method)[-1] / (1 - u[-1])

    methods = {"midpoint": 2, "heun3": 3, "rk4": 4}
    clocks = {"log s": run, "s / (1 + s)": in_time}
    return [
        Peer("torchdiffeq", f"{method} in {clock}", partial(function, method=method), cost=cost)
        for method, cost in methods.items()
        for clock, function in clocks.items()
    ]


LIBRARIES = {"diffusers": diffusers, "k-diffusion": k_diffusion, "azula": azula, "torchdiffeq": torchdiffeq}


def adaptive(case: Case, missing: Collection[str]) -> Iterator[tuple[str, float, Tensor | None, int]]:
    """(method, tolerance, x / alpha at t_min or None, evaluations) of the methods that choose their own steps."""
    y, first = case.start(0.001)
    last = case.noise_to_signal(case.model.field.t_min)
    levels = torch.tensor([first, last], dtype=torch.float64)
    if "torchdiffeq" not in missing:
        odeint = importlib.import_module("torchdiffeq").odeint
        clocks = {"s": (levels, lambda u: u.clamp(last, first), lambda u: 1.0)}
        clocks["log s"] = (levels.log(), torch.exp, torch.exp)
        for method, (clock, (span, level, rate)) in itertools.product(("dopri5", "bosh3"), clocks.items()):
            for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
                counter = Counter(case)

                def slope(u, y, counter=counter, level=level, rate=rate):
                    return rate(u) * (y - counter(y, level(u))) / level(u)

                try:
                    result = odeint(slope, y, span, rtol=tolerance, atol=tolerance, method=method)[-1]
                except (ArithmeticError, AssertionError):  # the state or the step size is not finite
                    result = None
                yield f"torchdiffeq {method} in {clock}", tolerance, result, counter.evaluations
    if "k-diffusion" not in missing:
        sampler = partial(k_diffusion_sampling().sample_dpm_adaptive, disable=True, noise_sampler=no_noise)
        for tolerance in (5e-2, 5e-3, 5e-4, 5e-5):  # the library's own rtol and atol are the first
            counter = Counter(case)
            try:
                result = sampler(counter, y, last, first, rtol=tolerance, atol=0.156 * tolerance).double()
            except ArithmeticError:
                result = None
            yield "k-diffusion dpm_adaptive", tolerance, result, counter.evaluations


def installed() -> tuple[list[Peer], dict[str, str]]:
    """The methods of the libraries that can be imported, and why the others cannot."""
    peers, missing = [], {}
    for name, build in LIBRARIES.items():
        try:
            peers.extend(build())
        except ImportError as error:
            missing[name] = str(error)
    return peers, missing


def solutions(peer: Peer, case: Case, nfe: int, borrowed: bool = False) -> Iterator[tuple[str, Tensor, int]]:
    """(grid, result (N, d), evaluations made) of one method on each grid that suits; none where too few are allowed."""
    levels = peer.levels(nfe)
    if levels < 2:
        return
    for kind in kinds(case, borrowed):
        if kind.removesuffix("0.99") not in peer.grids:
            continue
        y, s = grid(case, kind, levels)
        if peer.to_zero:
            s = torch.cat([s, s.new_zeros(1)])
        counter = Counter(case)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = peer.run(counter, y, s)
        if counter.evaluations > nfe:
            raise RuntimeError(f"{peer.row} {peer.method} made {counter.evaluations} of {nfe} evaluations")
        yield kind, result.double(), counter.evaluations
