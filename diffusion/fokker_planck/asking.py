"""How the drift and the noise, functions of users, are asked: with checks, at one time, at many, or at none."""

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.errors import UserError

Function = Callable[[Tensor, Tensor], Tensor]
Found = TypeVar("Found")

SAME = 1e-6  # relative to the largest number, up to which one call gives what several give


def shown(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


class Unread(Tensor):
    """A time (B,) without numbers: whatever looks at it, in Python or below, is counted and gets an error."""

    looks = 0

    @staticmethod
    def like(x: Tensor) -> "Unread":
        return Tensor._make_wrapper_subclass(Unread, x.shape[:1], dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Unread.looks += 1
        raise TypeError("this time is not to be looked at")

    __torch_dispatch__ = __torch_function__


def at_any_time(ask: Callable[[Tensor], Found]) -> Found | None:
    """What `ask`, of a time, makes of drift and diffusion if these do nothing with the time; otherwise None.

    They are called with a time that has no numbers; if they do without, it never matters.
    """
    before = Unread.looks
    try:
        found = ask(Unread.like(torch.empty(0)))
    except Exception:
        return None
    return found if Unread.looks == before else None


class Asked:
    """A function of (x, t), from points (B, d) to (B, d), or for noise to (B,), (B, d), (B, d, d) or one number.

    It gets t as a tensor (B,), the same for all points, or 0-dimensional if it only takes that.

    Raises:
        UserError: it returns another shape, or numbers that are not finite; when it is asked.
    """

    def __init__(self, name: str, function: Function):
        self.name, self.function = name, function
        self._of_number: bool | None = None  # whether it takes times without a dimension only
        self._together: bool | None = None  # whether torch's vmap takes it over times

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        if x.dim() != 2 or not x.is_floating_point():
            raise UserError(f"points have shape {tuple(x.shape)} and type {x.dtype}, expected (B, d), floating-point")
        if isinstance(t, Unread):
            return self._checked(self.function(x, Unread.like(x)), x)
        if self._of_number is None:
            self._of_number = self._takes_number(x, t)
        return self._checked(self.function(x, self._time(t, x, self._of_number)), x)

    def over(self, x: Tensor, times: Tensor) -> Tensor:
        """What it gives at each of the times (K,), (K, B, ...): in one call where that gives the same."""
        if self._of_number is None:
            self(x[:1], times[0])
        found = None if self._together is False else self._at_once(x, times)
        if found is not None and self._together is None:
            some = [0, len(times) // 2, len(times) - 1]
            apart = self._one_by_one(x, times[some])
            gap = (found[some] - apart).abs().max() if found[some].shape == apart.shape else math.inf
            self._together = bool(gap <= SAME * apart.abs().max())
        return found if self._together and found is not None else self._one_by_one(x, times)

    def _one_by_one(self, x: Tensor, times: Tensor) -> Tensor:
        """(K, B, ...), of the fullest shape that occurs: numbers, diagonals and matrices of noise may take turns."""
        values = [self(x, t) for t in times]
        most = max(value.dim() for value in values)
        if most > 1:
            values = [value[:, None].expand_as(x) if value.dim() == 1 else value for value in values]
        if most > 2:
            values = [value.diag_embed() if value.dim() == 2 else value for value in values]
        return torch.stack(values)

    def _at_once(self, x: Tensor, times: Tensor) -> Tensor | None:
        """By vmap; None where it fails, or gives numbers that are not finite."""

        def at(t: Tensor) -> Tensor:
            value = self.function(x, t if self._of_number else t.expand(len(x)))
            if self.name != "drift" and (not isinstance(value, Tensor) or value.dim() == 0):
                value = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x))
            return value

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of vmap, about its speed
                found = torch.func.vmap(at)(times).to(x)
        except Exception:  # what vmap does not take: branches by the time, Python's numbers, ...
            self._together = False
            return None
        return found if found.shape[1:2] == x.shape[:1] and math.isfinite(found.detach().sum().item()) else None

    @staticmethod
    def _time(t: Tensor | float, x: Tensor, of_number: bool) -> Tensor:
        """(), or (B,) for points `x` (B, d)."""
        if isinstance(t, float):
            return x.new_full(() if of_number else x.shape[:1], t)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(())
        return t if of_number else t.expand(len(x))

    def _takes_number(self, x: Tensor, t: Tensor | float) -> bool:
        """Whether the function wants the time as one number: asked with a number of points that is no dimension."""
        probe, reasons = torch.cat([x[:1].detach()] * (x.shape[1] + 2)), []
        for of_number in (False, True):
            try:
                self._checked(self.function(probe, self._time(t, probe, of_number)), probe)
                return of_number
            except UserError as error:
                reasons.append(error)
            except Exception as error:  # whatever the user's function raises
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                text = f"{self.name}(x, t) fails for x {tuple(probe.shape)}, expected torch operations: {reason}"
                reasons.append(UserError(text))
        raise reasons[0]

    def _checked(self, value: object, x: Tensor) -> Tensor:
        (number, dim), noise = x.shape, self.name != "drift"
        allowed = [(number,), (number, dim), (number, dim, dim)] if noise else [(number, dim)]
        if noise and (isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)):
            value = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(number)
        if not isinstance(value, Tensor) or tuple(value.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"{self.name}(x, t) gives {shown(value)} for x {tuple(x.shape)}, expected {expected}")
        if value.is_complex():
            raise UserError(f"{self.name}(x, t) gives {value.dtype}, expected real numbers")
        value = value.to(x)
        if not math.isfinite(value.detach().sum().item()) and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).reshape(number, -1).any(1).nonzero()[0])
            raise UserError(f"{self.name}(x, t) is not finite at x={x[bad].tolist()}")
        return value
