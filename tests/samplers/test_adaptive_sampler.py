"""Integration by torchdiffeq on the arc."""

import pytest
import torch
from reference import error, solved

from diffusion.samplers import Adaptive, Counted
from diffusion.samplers.adaptive import METHODS

every_problem = pytest.mark.parametrize("name", ["variance_exploding", "variance_preserving", "linear", "gravity"])


@every_problem
def test_error_falls_with_the_tolerance(name):
    problem = solved(name)
    loose, middle, tight = (error(Adaptive(rtol=tol, atol=tol), problem) for tol in (1e-3, 1e-5, 1e-7))
    assert middle < loose / 3
    assert tight < middle / 10
    assert tight < 1e-5


@every_problem
def test_defaults_resolve_the_modes(name):
    """In t itself dopri5 takes one step over everything and is 0.4 off, silently."""
    problem = solved(name)
    model = Counted(problem.model)
    assert error(Adaptive(), problem._replace(model=model)) < 1e-3
    assert model.evaluations < 100


@pytest.mark.parametrize(("options", "said"), [({"rtol": 1e-3}, 1), ({"atol": 1e-2}, 1), ({"rtol": 1e-4}, 0)])
def test_tolerances_that_lose_single_samples_are_named(options, said, recwarn):
    problem = solved("variance_preserving")
    Adaptive(**options)(problem.model, problem.x_T)
    assert len([w for w in recwarn if "samples end elsewhere" in str(w.message)]) == said
    Adaptive("rk4", **options)(problem.model, problem.x_T)
    assert len([w for w in recwarn if "samples end elsewhere" in str(w.message)]) == said


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "adaptive_heun"])
def test_other_adaptive_methods(method):
    assert error(Adaptive(method, rtol=1e-5, atol=1e-5), solved("variance_exploding")) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error:Solver")
def test_every_method_that_is_offered_works(method):
    assert error(Adaptive(method, rtol=1e-4, atol=1e-4, steps=100), solved("linear")) < 0.05


@pytest.mark.parametrize(("method", "stages", "order"), [("rk4", 4, 4), ("midpoint", 2, 2)])
def test_fixed_step_methods_take_the_steps_that_they_are_given(method, stages, order):
    problem = solved("linear")
    errors = []
    for steps in (256, 512):
        model = Counted(problem.model)
        errors.append(error(Adaptive(method, steps=steps), problem._replace(model=model)))
        assert model.evaluations == stages * steps + 1
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("allowed", [10, 40])
def test_spent_evaluations_end_in_a_warning_and_the_estimate_from_there(allowed):
    problem = solved("linear")
    model = Counted(problem.model)
    with pytest.warns(UserWarning, match=f"after {allowed - 1} of {allowed} evaluations.*max_evaluations"):
        x = Adaptive(max_evaluations=allowed)(model, problem.x_T)
    assert model.evaluations == allowed
    assert x.isfinite().all()
    assert x.abs().max() < 3


def test_steps_that_become_too_small_end_in_a_warning():
    class Rough:
        """No step is small enough for a velocity that is random at every call."""

        field = solved("linear").model.field

        def velocity(self, x, t):
            return 1e6 * torch.randn(x.shape, generator=randomness, dtype=x.dtype)

    randomness = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="stopped at t="):
        Adaptive(max_evaluations=5000)(Rough(), torch.ones(2, 2, dtype=torch.float64))


def test_unknown_method_lists_the_known(user_error):
    with user_error("'dopri6'", "dopri5", "dopri8", "rk4"):
        Adaptive(method="dopri6")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_evaluations": 3}, ("max_evaluations=3", "at least 4")),
        ({"rtol": -1.0}, ("rtol=-1.0", "positive")),
        ({"rtol": 0.0, "atol": 0.0}, ("atol=0.0", "positive")),
        ({"atol": float("nan")}, ("atol=nan", "positive")),
        ({"std": -1.0}, ("std=-1.0", "positive")),
        ({"method": "rk4", "steps": 0}, ("steps=0", "at least 1")),
    ],
    ids=["evaluations", "negative tolerance", "no tolerance", "nan", "std", "steps"],
)
def test_impossible_options_are_refused(options, parts, user_error):
    with user_error(*parts):
        Adaptive(**options)


def test_the_fewest_evaluations_end_in_a_warning():
    problem = solved("linear")
    with pytest.warns(UserWarning, match="after 3 of 4 evaluations"):
        assert Adaptive(max_evaluations=4)(problem.model, problem.x_T).isfinite().all()
