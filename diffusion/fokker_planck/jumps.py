"""The Fokker-Planck equation on a grid as jumps between cells, at rates that fit the exponentials between them.

Along a line the current is J = -D exp(psi) d(p exp(-psi)), psi' = (f - D') / D with D = a / 2, and a current that is
constant from one centre to the next takes p from x_k to x_(k+1) at the rate 1 / (h int exp(psi(x_k) - psi) / D)
(Scharfetter & Gummel 1969; Allen & Southwell 1955). With phi' = f / D this is D_k / (h int exp(phi_k - phi)): D is not
differentiated. Rates of both directions have the ratio exp(psi_(k+1) - psi_k), so that a Gibbs state is stationary, to
rounding; their upwind limit for vanishing noise is |f| / h.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.line_rates import Axes, Matrix, Offset, as_array, mean_coefficients, namespace
from diffusion.fokker_planck.stepping import Rule


@dataclass(frozen=True)
class Jumps:
    """Rates, per unit of time, out of each cell x of a box.

    Attributes:
        rates: for each offset e: (2, n), from x to x + e and from x + e to x; 0 where x + e is no cell.
        lost: (n,), through absorbing faces.
        way: (d, n), the same times the way from the centre to the face.
        drives: for each offset e: (n,), the increase of phi (of psi, for a full matrix) from x to x + e, or 0.
        swings: (n,), by how much what drives the jumps differs, on the way from one cell to the next, from the nearest
            linear function, next to itself or to the noise of a cell; large where it is not resolved.
    """

    rates: dict[Offset, Tensor]
    lost: Tensor
    way: Tensor
    drives: dict[Offset, Tensor]
    swings: Tensor

    def scaled(self, factor: float) -> "Jumps":
        """All rates times a factor."""
        rates = {e: factor * rates for e, rates in self.rates.items()}
        return Jumps(rates, factor * self.lost, factor * self.way, self.drives, self.swings)


def jumps_at(equation: FokkerPlanck, box: Box, time: Tensor | float, stacklevel: int = 2) -> Jumps:
    """The rates at one time.

    Warns:
        a full matrix is so nearly singular that noise had to be added.
    """
    return mean_jumps(equation, box, [[(time, 1.0)]], stacklevel + 1)[0]


def mean_jumps(equation: FokkerPlanck, box: Box, rules: Sequence[Rule], stacklevel: int = 2) -> list[Jumps]:
    """The rates of drifts and covariances that are weighted means, by each of the rules.

    Warns:
        a full matrix is so nearly singular that noise had to be added.
    """
    if box.dim > 1:
        a = mean_coefficients(equation, box.centres, rules, full=True)[:, :, box.dim :]
        if bool(a.reshape(-1, box.dim, box.dim)[:, ~torch.eye(box.dim, dtype=torch.bool, device=box.device)].any()):
            found = []
            for rule in rules:
                found.extend(_jumps(box, Matrix(equation, box, rule, stacklevel + 1), 1))
            return found
    return _jumps(box, Axes(equation, box, rules), len(rules))


def _jumps(box: Box, lines: "Axes | Matrix", number: int) -> list[Jumps]:
    """Of so many rates that the lines give at once."""
    rates, drives = {}, {}
    lost, way, swings = (box.centres.new_zeros(number, *shape, box.number) for shape in ((), (box.dim,), ()))
    swinging = as_array(swings)  # a view, as all of these
    for e in lines.offsets:
        found = box.neighbours(e)
        start = as_array(found.ends[0])
        rates[e], drives[e] = box.centres.new_zeros(number, 2, box.number), box.centres.new_zeros(number, box.number)
        if len(start):
            both, drive, swing = map(as_array, lines.between(e, found.ends))
            as_array(rates[e])[..., start], as_array(drives[e])[:, start] = both, drive
            swinging[:, start] = namespace(swing).maximum(swinging[:, start], swing)
        for sign in (1, -1) if "absorbing" in box.boundary else ():
            signed = tuple(sign * step for step in e)
            out = box.neighbours(signed)
            if len(out.lost):
                leaving = torch.as_tensor(lines.leaving(e, sign, out.lost, out.fraction))
                lost[:, out.lost] += leaving
                vector = box.spacing * torch.tensor(signed, dtype=torch.float64, device=box.device)
                way[..., out.lost] += vector[:, None] * (leaving * out.fraction)[:, None]
    return [
        Jumps(
            {e: values[k] for e, values in rates.items()},
            lost[k],
            way[k],
            {e: values[k] for e, values in drives.items()},
            swings[k],
        )
        for k in range(number)
    ]
