"""Is a field right? `validate` asks the continuity equation, the sampler, the mass and both ends, and reports."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import checks, draws, totals
from diffusion.fields.base import Field, Unavailable
from diffusion.fields.checks import Check, Subject, skipped

EXACT = ("relative", "std of the data")  # units of figures that owe nothing to chance


@dataclass(frozen=True)
class Report:
    """What `validate` found.

    Attributes:
        checks: in the order of the table.
        residuals: times (N,) and relative residuals (N,) of the strong continuity equation; empty where not checked.
        quantiles: for each of three times, the quantile of each draw's radius in the field's own law: uniform if right.
    """

    checks: tuple[Check, ...]
    residuals: tuple[Tensor, Tensor] = field(default=(torch.empty(0), torch.empty(0)), repr=False)
    quantiles: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.passed is False)

    def table(self) -> str:
        """One line for each check: figure, tolerance, verdict."""
        lines = [f"{'check':<20} {'figure':>10} {'tolerance':>10}  {'':<6}  of what"]
        for check in self.checks:
            if check.passed is None:
                lines.append(f"{check.name:<20} {'-':>10} {'-':>10}  {'-':<6}  not checked: {check.note}")
                continue
            verdict = "pass" if check.passed else "FAIL"
            what = "; ".join(filter(None, (check.unit, check.note)))
            lines.append(f"{check.name:<20} {check.figure:>10.3g} {check.tolerance:>10.3g}  {verdict:<6}  {what}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            vars(check) | {"figure": number(check.figure), "tolerance": number(check.tolerance)}
            for check in self.checks
        ]
        return {"passed": self.passed, "failed": list(self.failed), "checks": rows}


def validate(field: Field, x0: Tensor, seed: int = 0, effort: float = 1.0) -> Report:
    """Check a field independently from every side.

    continuity (strong)  d_t log p + f . grad log p + div f = 0 at single points, relative to the terms
    continuity (weak)    d/dt E[phi(x_t)] = E[f . grad phi] for bounded functions phi, by samples alone
    field lines          the velocity is the time derivative of transport at a fixed label
    sampler              draws have the radii of the density, and obey its Stein identities
    mass                 the density integrates to 1
    start                x_t -> x0 as t -> 0
    end                  p_T(.|x0) is the prior, for x0 across the data
    prior                draws of the prior have the radii of its density

    No single one suffices: any scale family satisfies continuity, whatever its exponent. The statistical checks allow
    for chance (see diffusion.fields.checks); one that fails is repeated once, on twice as many fresh draws, and must
    fail again: a correct field is refused in fewer than 1 run in 1,000.

    Args:
        x0: (N, *shape) data points, such as the field is to be used with; everything is computed in float64.
        effort: multiplies the number of draws; 0.1 takes a tenth of the time.

    Raises:
        UserError: `x0` has no points, or the field gives results of the wrong shape.
    """
    x0 = _checked_data(x0)
    if not isinstance(getattr(field, "horizon", None), int | float):
        raise UserError(f"{type(field).__name__} has no horizon, expected a number, the time of the prior")
    if not 0 < field.t_min < field.horizon < math.inf:
        raise UserError(f"t_min is {field.t_min} and horizon {field.horizon}, expected 0 < t_min < horizon")
    subject = Subject(field, x0, seed, effort)
    _check_shapes(subject)
    found: list[Check] = []
    residuals, quantiles = (torch.empty(0), torch.empty(0)), {}

    again = Subject(field, x0, seed + 1_000_003, 2 * effort)

    def attempt(name: str, check: Callable[[Subject], Any]) -> Any:
        found = _attempt(name, check, subject)
        first = found if isinstance(found, Check) else found[0]
        by_chance = first.passed is False and math.isfinite(first.figure) and first.unit not in EXACT
        return _attempt(name, check, again) if by_chance else found

    strong = attempt("continuity (strong)", checks.strong_continuity)
    if not isinstance(strong, Check):
        strong, *residuals = strong
    found += [strong, attempt("continuity (weak)", checks.weak_continuity), attempt("field lines", checks.field_lines)]
    sampler = attempt("sampler", draws.sampler_follows_density)
    if not isinstance(sampler, Check):
        sampler, quantiles = sampler
    found.append(sampler)
    found += [attempt("mass", totals.mass), attempt("start", checks.start), attempt("end", totals.end)]
    found.append(attempt("prior", totals.prior_follows_density))
    return Report(tuple(found), tuple(residuals), quantiles)


def _attempt(name: str, check: Callable[[Subject], Any], subject: Subject) -> Any:
    try:
        with torch.no_grad():
            return check(subject)
    except Unavailable as error:
        return skipped(name, str(error))
    except Exception as error:  # of the user's own code
        reason = str(error).partition("\n")[0]
        note = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        return Check(name, math.inf, math.nan, "", False, note)


def _checked_data(x0: Tensor) -> Tensor:
    if not isinstance(x0, Tensor) or x0.dim() < 2 or not len(x0):
        got = f"shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
        raise UserError(f"x0 has {got}, expected a tensor of data points (N, *shape), at least one")
    x0 = x0.detach().double().cpu()
    if not bool(x0.isfinite().all()):
        raise UserError("x0 holds numbers that are not finite, expected data points")
    return x0


def _check_shapes(subject: Subject) -> None:
    field, x0 = subject.field, subject.rows(4)
    t = subject.time(torch.tensor([0.3, 0.5, 0.6, 0.7], dtype=x0.dtype))

    def call(name: str, *args: Tensor) -> Tensor:
        try:
            return getattr(field, name)(*args)
        except Unavailable:
            raise
        except Exception as error:  # of the user's own code
            shapes = f"x and x0 of shape {tuple(x0.shape)} and t of shape (4,)"
            reason = str(error).partition("\n")[0]
            raise UserError(f"{name} fails for {shapes}: {reason}; fields.expand_time(t, x) makes t fit x") from error

    state = subject.randomness.get_state()
    x = call("sample", x0, t, subject.randomness)
    subject.randomness.set_state(state)
    if not torch.equal(x, call("sample", x0, t, subject.randomness)):
        raise UserError("sample does not follow its generator: two draws from one state differ; pass it to torch.randn")
    results = {"sample": x, "velocity": call("velocity", x, t, x0) if x.shape == x0.shape else x0}
    for name, result in results.items():
        if not isinstance(result, Tensor) or result.shape != x0.shape:
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise UserError(f"{name} gives {got} for points {tuple(x0.shape)}, expected the same")
        if result.dtype != x0.dtype:
            raise UserError(f"{name} gives {result.dtype} for points of {x0.dtype}, expected the same")
    try:
        log_p = call("log_prob", x, t, x0)
    except Unavailable:
        return
    if log_p.shape != (4,):
        raise UserError(f"log_prob gives shape {tuple(log_p.shape)} for 4 points, expected (4,), one number for each")
