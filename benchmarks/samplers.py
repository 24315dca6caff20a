"""Error of samplers against the exact probability-flow ODE: python benchmarks/samplers.py [--cases linear_2 --nfe 10]

The problems are Gaussian mixtures whose E[x0|x] is known in closed form (benchmarks/mixtures.py), the prior draws are
the same for all, and an evaluation is one of the model for every sample: a call with the whole batch, or, where samples
have steps of their own, the mean over samples; "calls" are those of the model then. Each sampler is compared with the
answer that it converges to: x(t_min) / alpha on the exact ODE if it stops at t_min ("state"), E[x0|x(t_min)] if it ends
with a denoising step ("denoised"), the ODE at t = 0 if it goes there ("limit"); the JSON has how far these are apart.

Each cell is RMSE/median: the root mean square over all samples and coordinates, and the median over samples of the root
mean square over a sample's coordinates. A row of another library is the best, in the median, of its methods, orders and
grids in that cell (benchmarks/peers.py); "best of them" is the best of all rows, the RMSE and the median each from
whichever has it.

Libraries that are not installed are left out. All that is needed: pip install diffusers k-diffusion azula
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mixtures
import peers
import torch
from mixtures import Case
from torch import Tensor

from diffusion.samplers import Adaptive, AdaptiveMultistep, Euler, Heun, Multistep, Sampler, tune
from diffusion.samplers.arc import data_mean, data_std


class Ours(NamedTuple):
    """One of our samplers: `build` gives one of at most so many evaluations, None where there is none."""

    build: Callable[[int], Sampler | None]
    aim: str = "denoised"  # the answer of the case that it converges to: denoised or limit


OURS = {
    "Euler": Ours(lambda nfe: Euler(steps=nfe)),
    "Heun": Ours(lambda nfe: Heun(steps=(nfe + 1) // 2) if nfe >= 3 else None),
    "Multistep": Ours(lambda nfe: Multistep(steps=nfe), aim="limit"),
    "Multistep, data_mean not told": Ours(lambda nfe: Multistep(steps=nfe, from_mean=False), aim="limit"),
}
DEFAULT = "Multistep"
ADAPTIVE: dict[str, Callable[[float], Sampler]] = {
    "ours: Adaptive dopri5": lambda tolerance: Adaptive("dopri5", rtol=tolerance, atol=tolerance),
    "ours: Adaptive bosh3": lambda tolerance: Adaptive("bosh3", rtol=tolerance, atol=tolerance),
    "ours: AdaptiveMultistep": lambda tolerance: AdaptiveMultistep(rtol=tolerance, atol=tolerance),
}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 5.5e-6, 1e-6)
CASES = [f"{field}_{dim}" for field in mixtures.FIELDS if field != "pfgmpp" for dim in mixtures.DIMS]
NFE = (5, 6, 8, 10, 15, 20, 35)
BEST, BORROWED = "best of them", "best, linear's grid too"


class Evaluated:
    """A model that keeps the sizes of the batches it is called with."""

    def __init__(self, model: mixtures.Mixture):
        self.model, self.field, self.sizes = model, model.field, []
        self.data_std, self.data_mean = data_std(model), data_mean(model)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.sizes.append(len(x))
        return self.model.velocity(x, t)


def errors(result: Tensor, reference: Tensor) -> dict:
    squared = (result - reference).square().mean(1)
    figures = {"rmse": squared.mean().sqrt(), "median": squared.sqrt().median()}
    return {name: float(f"{figure:.3e}") for name, figure in figures.items()}


def ours(case: Case, sampler: Sampler, aim: str, allowed: int | None = None) -> dict:
    model = Evaluated(case.model)
    result = sampler(model, case.x_T)
    evaluations = sum(model.sizes) / len(case.x_T)
    evaluations = int(evaluations) if evaluations.is_integer() else round(evaluations, 1)
    if allowed is not None and evaluations > allowed:
        raise RuntimeError(f"{sampler} made {evaluations} of {allowed} evaluations")
    others = {
        f"median_to_{end}": errors(result, getattr(case, end))["median"] for end in ("state", "denoised", "limit")
    }
    counts = {"aim": aim, "evaluations": evaluations, "calls": len(model.sizes)}
    return counts | errors(result, getattr(case, aim)) | others


def theirs(case: Case, methods: list[peers.Peer], nfe: int, borrowed: bool) -> list[dict]:
    rows = []
    for peer in methods:
        for grid, result, evaluations in peers.solutions(peer, case, nfe, borrowed):
            aim = "denoised" if peer.to_zero else "state"
            row = {"row": peer.row, "method": peer.method, "grid": grid, "aim": aim, "evaluations": evaluations}
            rows.append(row | errors(result, getattr(case, aim)))
    return rows


def tuned(case: Case, nfe: int) -> Sampler:
    """Tuned on prior draws of another seed than those of the case."""

    def draw(number: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        return case.model.field.sample_prior((number, *case.x_T.shape[1:]), generator, dtype=torch.float64), {}

    return tune(case.model, draw, nfe, seed=1000).sampler


def cell(case: Case, methods: list[peers.Peer], nfe: int, borrowed: bool, tuning: bool) -> dict[str, dict]:
    """Row -> figures: the best of each row in the median, the best of all, and ours."""
    found: dict[str, dict] = {}
    rows = sorted(theirs(case, methods, nfe, borrowed), key=lambda row: row["median"])
    usual = [row for row in rows if row["grid"] != "flow"]
    for row in usual:
        found.setdefault(row["row"], row)
    for name, some in ((BEST, usual), (BORROWED, rows if borrowed else [])):
        if some:
            found[name] = some[0] | {"rmse": min(row["rmse"] for row in some)}
    for name, (build, aim) in OURS.items():
        sampler = build(nfe)
        if sampler is not None:
            found[f"ours: {name}"] = ours(case, sampler, aim, nfe)
    if tuning:
        found["ours: tuned"] = ours(case, tuned(case, nfe), "limit", nfe)
    return found


def table(case: Case, cells: dict[int, dict[str, dict]]) -> None:
    names = dict.fromkeys(name for found in cells.values() for name in found)
    print(f"\n{case.name}: RMSE/median at evaluations\n{'':28}" + "".join(f"{nfe:>17}" for nfe in cells))
    for name in names:
        figures = [found.get(name) for found in cells.values()]
        print(f"{name:28}" + "".join(f"{'-' if f is None else brief(f):>17}" for f in figures))
    winners = [f"{found[BEST]['method']} ({found[BEST]['grid']})" for found in cells.values() if BEST in found]
    if winners:
        print("best in the median: " + "; ".join(winners), flush=True)


def brief(figures: dict) -> str:
    return f"{figures['rmse']:.1e}/{figures['median']:.1e}" if "rmse" in figures else "diverges"


def adaptive(case: Case, missing: dict[str, str]) -> list[dict]:
    rows = []
    for method, tolerance, result, evaluations in peers.adaptive(case, missing):
        figures = {} if result is None else errors(result, case.state)
        rows.append({"method": method, "tolerance": tolerance, "evaluations": evaluations} | figures)
    for method, build in ADAPTIVE.items():
        for tolerance in TOLERANCES:
            try:
                figures = ours(case, build(tolerance), "denoised")
            except ArithmeticError:
                figures = {"evaluations": 0}
            rows.append({"method": method, "tolerance": tolerance} | figures)
    print(f"{case.name}, adaptive: evaluations: RMSE/median")
    for method in dict.fromkeys(row["method"] for row in rows):
        figures = [f"{row['evaluations']}: {brief(row)}" for row in rows if row["method"] == method]
        print(f"{method:30}" + "".join(f"{text:>24}" for text in figures), flush=True)
    return rows


def verdict(results: dict) -> str:
    """In how many cells from 6 evaluations up our default is at least as good as the best of the others."""
    behind, compared = [], 0
    for name, result in results.items():
        for nfe, found in result["fixed"].items():
            default = found.get(f"ours: {DEFAULT}")
            if nfe >= 6 and default and BEST in found:
                compared += 1
                if default["median"] > found[BEST]["median"]:
                    behind.append(f"{name} at {nfe} ({default['median'] / found[BEST]['median']:.2f})")
    halves = [
        found["ours: tuned"]["median"] / found[BEST]["median"]
        for result in results.values()
        for nfe, found in result["fixed"].items()
        if 6 <= nfe <= 20 and "ours: tuned" in found and BEST in found
    ]
    half = f"; tuned at 6 to 20 has {min(halves):.2f} to {max(halves):.2f} of the best's error" if halves else ""
    good = f"{DEFAULT} is at least as good in {compared - len(behind)} of {compared} cells"
    return f"{good}; behind: {', '.join(behind) or 'none'}{half}"


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=mixtures.NAMES, default=CASES, metavar="CASE")
    options.add_argument("--nfe", type=int, nargs="+", default=NFE)
    options.add_argument("--mixture-seed", type=int, default=0, help="0 is the kept run; others are fresh problems")
    options.add_argument("--number", type=int, default=256, help="samples a case")
    options.add_argument("--borrowed", action="store_true", help="also the linear field's grid for the other fields")
    options.add_argument("--tuned", action="store_true", help="also our sampler tuned to each case; minutes a case")
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    methods, missing = peers.installed()
    for library, reason in missing.items():
        print(f"{library} cannot be imported ({reason}): left out")
    results, started = {}, time.perf_counter()
    setting = {"torch": torch.__version__, "mixture_seed": chosen.mixture_seed, "number": chosen.number}
    for name in chosen.cases:
        case = mixtures.named(name, chosen.number, chosen.mixture_seed)
        cells = {nfe: cell(case, methods, nfe, chosen.borrowed, chosen.tuned) for nfe in chosen.nfe}
        table(case, cells)
        between = {end: errors(getattr(case, end), case.denoised)["median"] for end in ("state", "limit")}
        result = {"reference_uncertainty": case.uncertainty, "median_from_denoised": between, "fixed": cells}
        results[name] = result | {"adaptive": adaptive(case, missing)}
        chosen.json.write_text(json.dumps(setting | {"missing": missing, "cases": results}, indent=1) + "\n")
    print(f"\n{verdict(results)}\n{time.perf_counter() - started:.0f} s")
    print(f"figures: {chosen.json.name}")


if __name__ == "__main__":
    main()
