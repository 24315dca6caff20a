"""The inverse problem: coefficients within honest standard errors, misfit, identifiability, bad input."""

import json
import math
import warnings

import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck import test_functions as families
from diffusion.fokker_planck.dictionaries import (
    Term,
    full_covariance,
    isotropic_covariance,
    polynomial_drift,
)
from diffusion.fokker_planck.inverse import fit
from diffusion.fokker_planck.weak import weak_residual

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()
GRADED = (torch.linspace(0, 1, 13, dtype=torch.float64) ** 1.5).tolist()


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def ou(number, seed, dim=1, turn=0.0):
    problem, g = problems.ornstein_uhlenbeck(dim, turn=turn, start=problems.gaussian(2.0, 0.5, dim)), randomness(seed)
    return torch.stack([problem.law_at(t).sample(number, g) for t in TIMES])


def ou_path(number, seed):
    g = randomness(seed)
    x = problems.gaussian(2.0, 0.5, 1).sample(number, g)
    path, h = [x], TIMES[1]
    for _ in TIMES[1:]:
        x = math.exp(-h) * x + math.sqrt(1 - math.exp(-2 * h)) * torch.randn(x.shape, generator=g, dtype=x.dtype)
        path.append(x)
    return torch.stack(path)


LINEAR, CONSTANT = polynomial_drift(1, 1), isotropic_covariance(1)
OU = torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64)


def hermite(x, degree=3):
    return families.HermitePolynomials.adapted(x, degree)


@pytest.mark.parametrize("paths", [False, True], ids=["snapshots", "paths"])
@pytest.mark.parametrize("family", ["hermite", "fourier"])
def test_standard_errors_of_ou_are_honest(family, paths):
    z, p = [], []
    for seed in range(40):
        x = (ou_path if paths else ou)(1000, seed)
        phi = hermite(x) if family == "hermite" else families.RandomFourier.adapted(x, 12, randomness(seed))
        got = fit(x, TIMES, LINEAR, CONSTANT, phi, paths)
        z.append((got.coefficients - OU) / got.standard_errors)
        p.append(got.p_value)
    z, p = torch.stack(z), torch.tensor(p)
    assert 0.75 < float(z.square().mean().sqrt()) < 1.25
    assert float((z.abs() < 2).double().mean()) > 0.9
    assert float(z.mean(0).abs().max()) < 0.55  # 3.5 standard errors of the mean of 40
    assert 0.3 < float(p.median()) < 0.7 and int((p < 0.01).sum()) <= 3


def wells(number, seed=0):
    """Independent snapshots of the double well, from paths of small steps."""
    problem, g = problems.double_well(temperature=0.5), randomness(seed)
    start = problems.gaussian(0.0, 0.5, 1).sample(number, g)
    paths = problem.equation.simulate(start, GRADED, 30, g)
    return torch.stack([part[torch.randperm(number, generator=g)] for part in paths])


def test_the_double_well_is_recovered_within_its_standard_errors():
    many = wells(20 * 2500)
    truth = torch.tensor([0, 4, 0, -4, 1.0], dtype=torch.float64)
    z, p = [], []
    for seed in range(20):
        x = many[:, seed * 2500 : (seed + 1) * 2500]
        phi = families.RandomFourier.adapted(x, 16, randomness(seed), 0.7, 2.5)
        got = fit(x, GRADED, polynomial_drift(1, 3), CONSTANT, phi)
        z.append((got.coefficients - truth) / got.standard_errors)
        p.append(got.p_value)
    z = torch.stack(z)
    assert 0.75 < float(z.square().mean().sqrt()) < 1.25
    assert float((z.abs() < 2).double().mean()) > 0.9
    assert 0.25 < float(torch.tensor(p).median()) < 0.75


def test_two_dimensions_and_a_full_matrix():
    x = ou(8000, 0, dim=2, turn=0.5)
    got = fit(x, TIMES, polynomial_drift(2, 1), full_covariance(2), hermite(x, 3))
    truth = torch.tensor([0, -1, -0.5, 0, 0.5, -1, 2, 0, 2.0], dtype=torch.float64)
    assert [term.name for term in got.drift][:3] == ["f1: 1", "f1: x1", "f1: x2"]
    assert float(((got.coefficients - truth) / got.standard_errors).abs().max()) < 3.5
    assert float(got.standard_errors.max()) < 0.25
    points = x[0, :4]
    equation = got.equation()
    assert torch.allclose(
        equation.drift(points, 0.0),
        torch.cat([torch.ones(4, 1), points], 1).double() @ got.drift_coefficients.view(2, 3).T,
    )
    a, b, c = got.diffusion_coefficients.tolist()
    assert torch.allclose(equation.covariance(points, 0.0)[0], torch.tensor([[a, b], [b, c]], dtype=torch.float64))
    assert weak_residual(x, TIMES, equation.drift, lambda x, t: equation.diffusion(x, t[0]), hermite(x, 2)).passed


def test_noise_that_depends_on_the_state_and_a_time_dependent_drift():
    problem, g = problems.geometric_brownian(), randomness()
    x = torch.stack([problem.law_at(t).sample(20_000, g) for t in TIMES])
    got = fit(x, TIMES, [lambda x, t: x], [lambda x, t: x[:, 0] ** 2], hermite(x, 2))
    assert float(((got.coefficients - torch.tensor([0.3, 0.16])) / got.standard_errors).abs().max()) < 3.5
    assert float(got.standard_errors.max()) < 0.02
    problem = problems.variance_preserving(low=0.5, high=2.0)
    x = torch.stack([problem.law_at(t).sample(20_000, g) for t in TIMES])
    terms = [lambda x, t: x, lambda x, t: t[:, None] * x]
    got = fit(x, TIMES, terms, [lambda x, t: torch.ones_like(t), lambda x, t: t], hermite(x, 4))
    truth = torch.tensor([-0.25, -0.75, 0.5, 1.5], dtype=torch.float64)
    assert float(((got.coefficients - truth) / got.standard_errors).abs().max()) < 3.5


def test_a_known_part_is_added_and_sharpens_the_rest():
    x = ou(4000, 1)
    known = FokkerPlanck(lambda x, t: torch.zeros_like(x), lambda x, t: torch.full_like(x[:, 0], math.sqrt(2.0)))
    free, held = fit(x, TIMES, LINEAR, CONSTANT, hermite(x)), fit(x, TIMES, LINEAR, [], hermite(x), known=known)
    assert float(((held.coefficients - OU[:2]) / held.standard_errors).abs().max()) < 3.5
    assert bool((held.standard_errors < free.standard_errors[:2]).all())
    assert held.equation().covariance(x[0, :2], 0.0).tolist() == pytest.approx([2.0, 2.0])
    drifting = FokkerPlanck(lambda x, t: -0.4 * x, lambda x, t: torch.zeros_like(x))
    part = fit(x, TIMES, LINEAR, CONSTANT, hermite(x), known=drifting)
    assert torch.allclose(part.coefficients, free.coefficients + torch.tensor([0, 0.4, 0]), atol=1e-5)
    assert torch.allclose(part.equation().drift(x[0, :3], 0.0), free.equation().drift(x[0, :3], 0.0), atol=1e-4)


def test_a_dictionary_without_the_truth_has_a_misfit():
    x = wells(6000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = fit(x, GRADED, LINEAR, CONSTANT, families.RandomFourier.adapted(x, 16, randomness()))
    assert wrong.p_value < 1e-6


def test_stationary_snapshots_do_not_tell_the_scale_of_time():
    g = randomness()
    x = torch.randn(9, 2000, 1, generator=g, dtype=torch.float64)
    with pytest.raises(UserError, match=r"not identifiable: .*\(f1: x1\).*condition number [\d.e+]+"):
        fit(x, TIMES, LINEAR, CONSTANT, hermite(x))
    known = FokkerPlanck(lambda x, t: torch.zeros_like(x), lambda x, t: torch.full_like(x[:, 0], math.sqrt(2.0)))
    got = fit(x, TIMES, LINEAR, [], hermite(x), known=known)
    assert float(((got.coefficients - OU[:2]) / got.standard_errors).abs().max()) < 3.5


def test_terms_that_repeat_each_other_are_named():
    x = ou(2000, 0)
    twice = [*LINEAR, Term("again", lambda x, t: 3 * x)]
    with pytest.raises(UserError, match=r"\(again\)"):
        fit(x, TIMES, twice, CONSTANT, hermite(x))


def test_coarse_times_give_a_warning():
    problem, g, times = problems.ornstein_uhlenbeck(1), randomness(), [0.0, 1.0, 2.0]
    x = torch.stack([problem.law_at(t).sample(20_000, g) for t in times])
    with pytest.warns(UserWarning, match=r"3 times may put a coefficient off by [\d.e+]+ standard errors"):
        fit(x, times, LINEAR, CONSTANT, hermite(x))


def test_the_report_is_plain_data():
    x = ou(2000, 0)
    got = fit(x, TIMES, LINEAR, CONSTANT, hermite(x))
    plain = json.loads(json.dumps(got.to_dict()))
    assert plain["terms"] == ["f1: 1", "f1: x1", "a: 1"] and plain["degrees_of_freedom"] == got.degrees == 3
    lines = got.table().splitlines()
    assert len(lines) == 5 and lines[2].startswith("f1: x1") and "misfit" in lines[-1]
    assert len(got.drift_coefficients) == 2 and got.points == 2000


def test_an_impossible_covariance_is_refused_when_it_is_used():
    x = ou(2000, 0)
    got = fit(x, TIMES, LINEAR, [*CONSTANT, lambda x, t: -1.0 + 0 * t][:1], hermite(x))
    got.coefficients[-1] = -1.0
    with pytest.raises(UserError, match="covariance has -1"):
        got.equation().diffusion(x[0], 0.0)


def call(x=None, drift=LINEAR, diffusion=CONSTANT, degree=3, **options):
    x = ou(300, 0) if x is None else x
    return lambda: fit(x, TIMES, drift, diffusion, hermite(x, degree), **options)


BAD = {
    "no terms": (call(drift=[], diffusion=[]), "0 terms"),
    "moments": (call(time_moments=9), "time_moments=9"),
    "shape": (call(drift=[Term("flat", lambda x, t: x[:, 0])]), "'flat': drift"),
    "unnamed": (call(diffusion=[lambda x, t: x[:1]]), r"diffusion\[0\]"),
    "equations": (call(degree=2, time_moments=1), "have 2 independent"),
    "idle": (call(drift=[*LINEAR, Term("nothing", lambda x, t: 0 * x)]), "'nothing' does nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("number", "warned"), [(200, True), (2000, False)])
def test_few_samples_are_said(number, warned):
    x = ou(number, 0)
    waves = families.RandomFourier.adapted(x, 24, randomness())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(x, TIMES, LINEAR, CONSTANT, waves)
    assert ["samples at a time are few" in str(one.message) for one in found] == [True] * warned


def test_a_fit_whose_weights_go_to_and_fro_settles():
    """The rank of the covariance, as it is cut, differs from one update to the next and back for these draws."""
    g, times = randomness(5040), torch.linspace(0, 1, 9, dtype=torch.float64).tolist()

    def normal():
        return torch.randn(2000, 1, generator=g, dtype=torch.float64)

    x = [1 + 0.5 * normal()]
    for t in times[1:]:
        x.append(math.exp(-t) * (1 + 0.5 * normal()) + math.sqrt(1 - math.exp(-2 * t)) * normal())
    found = fit(torch.stack(x), times, LINEAR, CONSTANT, families.RandomFourier.adapted(torch.stack(x), 24, g))
    assert bool(((found.coefficients - OU).abs() < 3 * found.standard_errors).all())
