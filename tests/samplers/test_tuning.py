"""Grids tuned to a model: better on noise that they were not tuned on, kept beside the checkpoint."""

import pytest
import torch
from problems import mixture

from diffusion.fields import gravity, linear
from diffusion.samplers import BandGrid, Counted, Multistep, Tuned, store_tuned, tune, tuned_sampler
from diffusion.samplers.tuning import REFERENCE, _Descent, _Problem


def draws(model):
    def draw(number, generator):
        return model.field.sample_prior((number, 2), generator, dtype=torch.float64), {}

    return draw


@pytest.fixture(scope="module")
def found():
    model = mixture(linear(2))
    return model, tune(model, draws(model), 6, trajectories=24, iterations=40)


def test_error_falls_on_fresh_noise(found):
    """Measured here on noise of another seed than any that tuning has drawn."""
    model, tuned = found
    x_T = model.field.sample_prior((200, 2), torch.Generator().manual_seed(99), dtype=torch.float64)
    fine = Multistep(100)(model, x_T)

    def median(sampler):
        return float((sampler(model, x_T) - fine).square().mean(1).sqrt().median())

    assert median(tuned.sampler) < 0.6 * median(Multistep(6))
    assert tuned.error == pytest.approx(median(tuned.sampler), rel=0.5)
    assert tuned.default_error == pytest.approx(median(Multistep(6)), rel=0.5)


def test_what_is_found_takes_the_evaluations_that_it_was_tuned_for(found):
    model, tuned = found
    counted = Counted(model)
    tuned.sampler(counted, torch.ones(3, 2))
    assert counted.evaluations == 6


def test_tuning_is_the_same_for_the_same_seed(found):
    model, tuned = found
    again = tune(model, draws(model), 6, trajectories=24, iterations=40)
    assert again == tuned


def test_fresh_draws_judge():
    """Four times as many as were tuned on, and others."""
    model, asked = mixture(linear(2)), []

    def draw(number, generator):
        asked.append((number, draws(model)(number, generator)[0]))
        return asked[-1][1], {}

    tuned = tune(model, draw, 4, trajectories=5, iterations=8)
    assert [number for number, _ in asked] == [5, 20]
    fresh = asked[1][1]
    away = tuned.sampler(model, fresh) - REFERENCE(model, fresh)
    assert tuned.error == pytest.approx(float(away.square().mean(1).sqrt().median()))


def test_the_default_is_kept_where_nothing_better_is_found(monkeypatch):
    model = mixture(linear(2))
    worse = Multistep(5, 1, corrector=False, grid=BandGrid(0.01, 50.0, (0.0, 0.1, 0.15, 0.2, 0.25, 1.0)))

    def step(descent):
        descent.best, descent.least = worse, 0.0
        return 1.0

    monkeypatch.setattr(_Descent, "step", step)
    tuned = tune(model, draws(model), 5, trajectories=4, iterations=3)
    assert tuned.sampler == Multistep(5)
    assert tuned.error == tuned.default_error


def test_a_sampler_that_ends_with_the_estimate_is_tuned_as_such():
    model = mixture(linear(2))
    tuned = tune(model, draws(model), 6, trajectories=16, iterations=20, denoise=True)
    assert tuned.sampler.denoise
    assert tuned.error < 0.9 * tuned.default_error


def test_high_orders_win_where_there_are_many_evaluations():
    model = mixture(linear(2))
    assert tune(model, draws(model), 24, trajectories=6, iterations=5).sampler.order in (3, 4)


@pytest.mark.parametrize("build", [linear, gravity], ids=["linear", "gravity"])
def test_the_descent_follows_the_gradient(build):
    """Of the loss in the gaps between the times, against central differences."""
    model = mixture(build(2))
    x_T = model.field.sample_prior((8, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    run = _Descent(Multistep(5, 2), _Problem(model, REFERENCE, x_T, {}))

    def loss(k, change):
        with torch.no_grad():
            run.log_gaps.zero_()
            run.log_gaps[k] += change
        shares = torch.cat([torch.zeros(1, dtype=torch.float64), run.log_gaps.softmax(0).cumsum(0)])
        shares = (shares / shares[-1]).detach()
        arc = run.sampler.arc(model, x_T)
        times = run.sampler.evaluations(arc, run._times(shares))
        x = run.sampler.along(arc, times, run.problem.velocity, x_T)
        return float((run.problem.errors(x) + 1e-12).log().mean())

    run.adam.param_groups[0]["lr"] = 0.0
    run.step()
    for k in (0, 2, 4):
        expected = (loss(k, 1e-5) - loss(k, -1e-5)) / 2e-5
        assert float(run.log_gaps.grad[k]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


SAMPLER = Multistep(4, 3, grid=BandGrid(0.1, 2.0, (0.0, 0.2, 0.5, 0.8, 1.0)), std=0.6)


def test_what_is_stored_is_found_again(tmp_path):
    store_tuned(tmp_path, Tuned(SAMPLER, 0.01, 0.02))
    store_tuned(tmp_path, Tuned(Multistep(8), 0.01, 0.01))
    assert tuned_sampler(tmp_path, 4) == SAMPLER
    assert tuned_sampler(tmp_path, 8) == Multistep(8)


def test_other_budgets_are_named(tmp_path, user_error):
    store_tuned(tmp_path, Tuned(SAMPLER, 0.01, 0.02))
    with user_error("nfe=7", "only for 4", "scripts/tune.py", "nfe=7"):
        tuned_sampler(tmp_path, 7)


def test_a_checkpoint_that_is_not_tuned(tmp_path, user_error):
    with user_error("not tuned", "scripts/tune.py"):
        tuned_sampler(tmp_path, 8)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "4: {sampler: {steps: 4}}", "4: 7", "4: {sampler: 5}"])
def test_a_damaged_file_is_named(tmp_path, content, user_error):
    (tmp_path / "tuned.yaml").write_text(content)
    with user_error("tuned.yaml", "delete it"):
        tuned_sampler(tmp_path, 4)


@pytest.mark.parametrize(("nfe", "trajectories", "iterations"), [(1, 4, 4), (4, 1, 4), (4, 4, 0)])
def test_impossible_budgets_are_refused(nfe, trajectories, iterations, user_error):
    model = mixture(linear(2))
    with user_error(f"nfe={nfe}", f"trajectories={trajectories}", f"iterations={iterations}"):
        tune(model, draws(model), nfe, trajectories, iterations)
