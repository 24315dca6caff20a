"""Integration by torchdiffeq in the field's clock."""

import pytest
from reference import error, solved

from diffusion.samplers import Adaptive, Counted

every_problem = pytest.mark.parametrize("name", ["variance_exploding", "linear", "gravity"])


@every_problem
def test_error_falls_with_the_tolerance(name):
    problem = solved(name)
    loose, middle, tight = (error(Adaptive(rtol=tol, atol=tol), problem) for tol in (1e-3, 1e-5, 1e-7))
    assert middle < loose / 3
    assert tight < middle / 10
    assert tight < 1e-5


@every_problem
def test_defaults_resolve_the_modes(name):
    """In t instead of the clock dopri5 takes one step over everything and is 0.4 off, silently."""
    problem = solved(name)
    model = Counted(problem.model)
    assert error(Adaptive(), problem._replace(model=model)) < 2e-3
    assert model.evaluations < 300


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "adaptive_heun"])
def test_other_adaptive_methods(method):
    assert error(Adaptive(method, rtol=1e-5, atol=1e-5), solved("variance_exploding")) < 1e-3


@pytest.mark.parametrize(("method", "stages", "order"), [("rk4", 4, 4), ("midpoint", 2, 2)])
def test_fixed_step_methods_take_the_steps_that_they_are_given(method, stages, order):
    problem = solved("linear")
    errors = []
    for steps in (64, 128):
        model = Counted(problem.model)
        errors.append(error(Adaptive(method, steps=steps), problem._replace(model=model)))
        assert model.evaluations == stages * steps
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_the_call_adds_one_evaluation_for_the_endpoint():
    problem = solved("variance_exploding")
    inner, whole = Counted(problem.model), Counted(problem.model)
    error(Adaptive(), problem._replace(model=inner))
    Adaptive()(whole, problem.x_T)
    assert whole.evaluations == inner.evaluations + 1


def test_unknown_method_lists_the_known(user_error):
    with user_error("'dopri6'", "dopri5", "dopri8", "rk4"):
        Adaptive(method="dopri6")
