"""Stationary states of chains on a grid: Gibbs states in closed form, others as null vectors."""

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, diags
from scipy.sparse.csgraph import breadth_first_order
from scipy.sparse.linalg import splu
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.jump_process import JumpProcess

CLOSED = 1e-11  # what log ratios of rates may sum to, around a loop
ROUNDING = 1e-15  # relative, of these logs and their sums
KEPT = 1e-9  # of what jumps, that may be out of balance
KNOWN = 1e-4  # of the mass, that rounding may move by a bound that is some hundred times what it does
NEVER = 1e-200  # of the largest rate: cells with jumps so rare, both ways, are not connected


def stationary(process: JumpProcess) -> Tensor:
    """The masses (n,), of sum 1, that the chain keeps.

    In one dimension they are a closed form. Where no probability flows in circles they are the products of the ratios
    of rates along any path; otherwise the null vector of the generator by a sparse factorisation, which takes seconds
    for 256 x 256 cells and is not meant for many more.

    Raises:
        UserError: mass is absorbed; the grid falls into parts between which nothing moves, or so little that rounding
            decides how much mass each has.
    """
    if process.absorbing:
        raise UserError("nothing is stationary where a boundary is absorbing, expected reflecting or periodic ones")
    matrix = _rates(process)
    gibbs = _gibbs(matrix)
    mass = process.at_rest
    if mass is None:
        mass = gibbs
    if mass is None:
        mass = _null_vector(matrix)
    return torch.from_numpy(mass).to(process.exit)


def _rates(process: JumpProcess) -> csr_matrix:
    """The entry (j, i) is the rate from cell i to cell j."""
    values, places = [], []
    for shift, band in process.bands.items():
        moves = torch.stack(band)
        moves = moves * (moves.sum(0) > NEVER * process.rate)
        values.extend(moves.cpu().numpy())
        places.extend((-shift, shift))
    matrix = diags(values, places, format="csr")
    matrix.eliminate_zeros()
    return csr_matrix(matrix)


def _gibbs(matrix: csr_matrix) -> np.ndarray | None:
    """The state without currents; None where there is none."""
    number = matrix.shape[0]
    order, before = breadth_first_order(matrix + matrix.T, number // 2, directed=False)
    if len(order) < number:
        raise UserError(
            f"the grid falls into parts between which nothing moves: {number - len(order)} of {number} cells cannot be "
            "reached from the middle; is there noise in every coordinate?"
        )
    to = np.arange(number)
    before[number // 2] = number // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where(
            to == before, 0.0, np.log(np.asarray(matrix[to, before])[0]) - np.log(np.asarray(matrix[before, to])[0])
        )
        while (before != before[before]).any():
            log, before = log + log[before], before[before]
        largest, log = np.abs(log).max(), log - log.max()
        entries = matrix.tocoo()
        back = np.asarray(matrix[entries.col, entries.row])[0]
        open_by = np.abs(log[entries.row] - log[entries.col] - np.log(entries.data) + np.log(back))
    allowed = CLOSED + ROUNDING * (largest + np.abs(np.log(entries.data)).max())
    return np.exp(log) / np.exp(log).sum() if (open_by <= allowed).all() else None


def _null_vector(matrix: csr_matrix) -> np.ndarray:
    """The null vector, of sum 1.

    One cell is held at 1 and the others follow. Where it has next to no mass that is a step of inverse iteration: what
    follows is huge and points the right way, but for its sign. The second time it is the cell with the most.

    Raises:
        UserError: what is found is not kept by the generator, or so would others be.
    """
    generator, held, unbalanced = csc_matrix(matrix - diags(np.asarray(matrix.sum(0))[0])), matrix.shape[0] // 2, 1.0
    for _ in range(2):
        at = held
        others = np.delete(np.arange(matrix.shape[0]), held)
        part = generator[others][:, others]
        options = {"SymmetricMode": True}
        try:
            factors = splu(csc_matrix(part), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError:  # exactly singular
            break
        column = -generator[others][:, [held]].toarray()[:, 0]
        values = factors.solve(column)
        values += factors.solve(column - part @ values)
        mass = np.insert(values, held, 1.0)
        mass = np.maximum(mass / mass.sum(), 0)
        mass /= mass.sum()
        held, unbalanced = int(mass.argmax()), np.abs(generator @ mass).sum() / (matrix @ mass).sum()
    if not unbalanced <= KEPT:
        raise UserError(
            f"the stationary state cannot be found: {unbalanced:.2g} of what jumps is not balanced in the best that "
            "was found; take a domain of which less is empty, or more cells"
        )
    # a bound: the rounding of all that leaves a cell, times the mean time until the held one is reached
    times = np.insert(factors.solve(np.ones(len(others)), trans="T"), at, 0.0)
    moved = np.finfo(float).eps * float((np.asarray(matrix.sum(0))[0] * mass) @ np.abs(times))
    if not moved <= KNOWN:
        raise UserError(
            f"the stationary state cannot be found: rounding may move up to {min(moved, 1.0):.2g} of the mass, because "
            "so little goes from some places to others; less high barriers would help, or a smaller domain"
        )
    return mass
