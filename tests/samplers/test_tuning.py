"""Samplers tuned to a model: better on noise that they were not tuned on, kept beside the checkpoint."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from problems import mixture
from scipy.integrate import solve_ivp

from diffusion.errors import UserError
from diffusion.fields import EmpiricalField, gravity, linear, radial_stretched
from diffusion.samplers import BandGrid, Captured, Counted, Multistep, Tuned, store_tuned, tune, tuned_sampler, tuning
from diffusion.samplers.on_arc import FAR
from diffusion.samplers.tuning import REFERENCE, TAIL, _changed, _Fit, _Problem


def flat(model, nfe):
    """A sampler of order 2 with even gaps."""
    grid = Multistep(nfe).default_grid(model, torch.zeros(1, 2))
    return Multistep(nfe, 2, grid=replace(grid, shares=tuple(torch.linspace(0, 1, nfe + 1).tolist())), std=0.8)


def draws(model):
    def draw(number, generator):
        return model.field.sample_prior((number, 2), generator, dtype=torch.float64), {}

    return draw


@pytest.fixture(scope="module")
def found():
    model = mixture(linear(2))
    return model, tune(model, draws(model), 6, trajectories=32, rounds=1)


@pytest.fixture(autouse=True)
def short_race(monkeypatch):
    """For the tests' time; `found` is set up before, with a whole one."""
    monkeypatch.setattr(tuning, "RACE", 1)


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


def test_tuning_is_the_same_for_the_same_seed():
    model = mixture(linear(2))
    once, again, other = (tune(model, draws(model), 2, trajectories=8, rounds=1, seed=seed) for seed in (1, 1, 2))
    assert once == again != other


def test_fresh_draws_judge():
    """Twice as many as were tuned on, and others."""
    model, asked = mixture(linear(2)), []

    def draw(number, generator):
        asked.append((number, draws(model)(number, generator)[0]))
        return asked[-1][1], {}

    tuned = tune(model, draw, 4, trajectories=5, rounds=1)
    assert [number for number, _ in asked] == [5, 10]
    fresh = asked[1][1]
    assert not fresh[:5].equal(asked[0][1])
    away = tuned.sampler(model, fresh) - REFERENCE(model, fresh)
    assert tuned.error == pytest.approx(float(away.square().mean(1).sqrt().median()))


def test_the_default_stays_where_nothing_better_is_found(monkeypatch):
    model = mixture(linear(2))
    monkeypatch.setattr(_Fit, "advance", lambda fit, problem, rounds: replace(fit.start, std=30.0))
    tuned = tune(model, draws(model), 5, trajectories=4)
    assert tuned.sampler == Multistep(5)
    assert tuned.error == tuned.default_error


def test_points_of_few_coordinates_are_tuned_on_more_of_them():
    model, asked = mixture(linear(2)), []

    def draw(number, generator):
        asked.append(number)
        return draws(model)(number, generator)

    tune(model, draw, 2, rounds=1)
    assert asked == [1, 512, 1024]


def test_a_sampler_that_ends_with_the_estimate_is_tuned_as_such():
    model = mixture(linear(2, t_min=0.05))
    tuned = tune(model, draws(model), 5, trajectories=32, rounds=2, denoise=True)
    assert tuned.sampler.denoise
    assert tuned.error < 0.9 * tuned.default_error
    fresh = _Problem.solved(
        model, replace(REFERENCE, denoise=True), *draws(model)(200, torch.Generator().manual_seed(9))
    )
    assert tuned.error == pytest.approx(float(fresh.errors(tuned.sampler).median()), rel=0.15)


@pytest.mark.parametrize("dim", [2, 64])
def test_the_reference_is_exact_where_lines_bend_up_to_the_horizon(dim):
    """Beside an eighth-order method in the field's clock u = t^(1 / 7)."""
    field = radial_stretched(dim, t_min=0.1 * dim**0.5)
    g = torch.Generator().manual_seed(1)
    model = EmpiricalField(field, torch.randn(20, dim, generator=g, dtype=torch.float64))
    x_T = field.sample_prior((4, dim), g, dtype=torch.float64)

    def slope(u, x):
        return 7 * u**6 * model.velocity(torch.from_numpy(x).view(-1, dim), u**7).flatten().numpy()

    ends = (field.horizon ** (1 / 7), field.t_min ** (1 / 7))
    x = solve_ivp(slope, ends, x_T.flatten().numpy(), "DOP853", rtol=1e-7, atol=1e-7).y[:, -1]
    x = torch.from_numpy(x).view(-1, dim)
    expected = field.endpoint(x, field.t_min, model.velocity(x, field.t_min))
    away = (_Problem.solved(model, replace(REFERENCE, denoise=True), x_T, {}).x_0 - expected).square().mean(1).sqrt()
    assert away.median() < 1e-5


@pytest.mark.parametrize("failing", [[2], [3], [2, 3]], ids=str)
def test_an_order_that_fails_where_it_starts_is_passed_over(failing, monkeypatch):
    model, residuals = mixture(linear(2)), _Problem.residuals

    def sometimes(problem, sampler, first=True):
        if sampler.order in failing:
            raise UserError("velocity of sample 0 is not finite")
        return residuals(problem, sampler, first)

    monkeypatch.setattr(_Problem, "residuals", sometimes)
    tuned = tune(model, draws(model), 5, trajectories=8, rounds=1)
    assert tuned.sampler.order == ({2, 3} - {*failing} or {None}).pop()
    assert tuned.error <= tuned.default_error < math.inf


def never(problem, sampler, first=True):
    raise UserError("velocity of sample 0 is not finite")


def test_an_order_that_fails_where_it_starts_is_given_up_at_once(monkeypatch):
    """No derivatives are taken there."""
    model, told = mixture(linear(2)), []
    problem = _Problem.solved(model, REFERENCE, *draws(model)(4, torch.Generator().manual_seed(0)))
    monkeypatch.setattr(_Problem, "residuals", never)
    _Fit(SAMPLER, told.append).advance(problem, 2)
    assert not told


def test_where_all_fail_tuning_says_why(monkeypatch, user_error):
    model = mixture(linear(2))
    monkeypatch.setattr(_Problem, "residuals", never)
    with user_error("velocity of sample 0 is not finite"):
        tune(model, draws(model), 4, trajectories=4)


def test_the_better_order_wins_where_there_are_many_evaluations():
    model = mixture(linear(2))
    tuned = tune(model, draws(model), 16, trajectories=12, rounds=2)
    assert tuned.sampler.order == 4 and tuned.error < tuned.default_error


@pytest.mark.parametrize(("nfe", "orders"), [(2, [1]), (3, [2]), (10, [2, 3]), (11, [2, 4])])
def test_two_orders_are_tried_and_the_better_goes_on(nfe, orders, monkeypatch):
    """They race on a quarter of the trajectories."""
    model, tried = mixture(linear(2)), []

    def advance(fit, problem, rounds):
        tried.append((fit.start.order, rounds, len(problem.x_T)))
        return fit.start

    monkeypatch.setattr(_Fit, "advance", advance)
    for better in range(len(orders)):
        tried.clear()
        losses = iter([float(i != better) for i in range(len(orders))])
        monkeypatch.setattr(_Problem, "loss", lambda *args, losses=losses: next(losses))
        tune(model, draws(model), nfe, trajectories=128, rounds=7)
        assert tried == [*((order, 1, 32) for order in orders), (orders[better], 7, 128)]


def test_the_winner_of_the_race_goes_on_from_what_it_found(monkeypatch):
    model, advance, unknowns = mixture(linear(2)), _Fit.advance, []

    def seen(fit, problem, rounds):
        unknowns.append(fit.unknowns)
        return advance(fit, problem, rounds)

    monkeypatch.setattr(_Fit, "advance", seen)
    tune(model, draws(model), 4, trajectories=16, rounds=1)
    assert len(unknowns) == 3 and not unknowns[0].any() and not unknowns[1].any()
    assert unknowns[2].any()


def test_all_trajectories_judge_the_race(monkeypatch):
    """Each by the error of the better order."""
    model, judged, loss = mixture(linear(2)), [], _Problem.loss

    def seen(problem, residuals, usual):
        judged.append((len(residuals), usual.item()))
        return loss(problem, residuals, usual)

    def residuals(problem, sampler, first=True):
        return torch.full((len(problem.x_T), 2), 1.0 if sampler.order == 2 else 3.0, dtype=torch.float64)

    monkeypatch.setattr(_Fit, "advance", lambda fit, problem, rounds: fit.start)
    monkeypatch.setattr(_Problem, "loss", seen)
    monkeypatch.setattr(_Problem, "residuals", residuals)
    assert tune(model, draws(model), 4, trajectories=128, rounds=1).sampler.order in (None, 2)
    assert judged == [(128, pytest.approx(TAIL * 2**0.5))] * 2


def test_a_part_has_the_conditions_and_the_ends_of_its_draws():
    model = mixture(linear(2))
    x_T, label = draws(model)(8, torch.Generator().manual_seed(0))[0], torch.arange(8)
    whole = _Problem(model, x_T, {"label": label, "strength": 2.0}, x_T + label[:, None])
    part = whole.part(3)
    assert part.x_T.equal(x_T[[0, 3, 6]]) and part.x_0.equal(part.x_T + part.conditions["label"][:, None])
    assert part.conditions["strength"] == 2.0


def test_few_trajectories_are_not_divided_further(monkeypatch):
    model, seen = mixture(linear(2)), []
    monkeypatch.setattr(_Fit, "advance", lambda fit, problem, rounds: seen.append(len(problem.x_T)) or fit.start)
    for number in (20, 70):
        tune(model, draws(model), 2, trajectories=number)
    assert seen == [20, 20, 35, 70]


def test_rounds_after_the_first_try_dampings_next_to_the_last():
    """And all of them where it goes on with other trajectories."""
    (model, problem), told = problem_of(16, linear(2)), []
    fit, solutions = _Fit(flat(model, 4), told.append), []
    for rounds in (1, 2):
        before = len(told)
        fit.advance(problem, rounds)
        solutions.append(len(told) - before - rounds * len(fit.unknowns))
    assert solutions == [8, 8 + 3]


@pytest.mark.parametrize(("best", "tried"), [(0, (0, 1)), (4, (3, 4, 5)), (7, (6, 7))])
def test_dampings_next_to_the_best_are_tried_then(best, tried, monkeypatch):
    (model, problem), solutions = problem_of(16, linear(2)), itertools.count()
    fit = _Fit(flat(model, 4), lambda error: None)
    losses = [1.0, *(0.5 + (i != best) for i in range(8))]  # that of the start, then those of the trials
    monkeypatch.setattr(_Problem, "loss", lambda *args: losses[next(solutions)])
    fit.advance(problem, 1)
    assert fit.dampings == tuple(tuning.DAMPING[i] for i in tried)


def test_the_reference_is_finer_than_many_evaluations(monkeypatch):
    model = mixture(linear(2))
    monkeypatch.setattr(_Fit, "advance", lambda fit, problem, rounds: fit.start)
    assert tune(model, draws(model), 128, trajectories=4).default_error > 0


@pytest.mark.parametrize(("gain", "expected"), [(100.0, 1), (0.0, 3)])
def test_a_small_gain_ends_the_rounds_and_is_kept(gain, expected, monkeypatch):
    monkeypatch.setattr(tuning, "GAIN", gain)
    model, problem = problem_of(16, linear(2))
    start, told = flat(model, 4), []
    found = _Fit(start, told.append).advance(problem, 3)
    assert len(set(told)) == expected  # the error at the start of each round
    usual = problem.errors(start).median()
    assert problem.loss(problem.residuals(found), usual) < problem.loss(problem.residuals(start), usual)


@pytest.mark.parametrize("call", [8, 35])
def test_a_trial_that_fails_is_passed_over(call, monkeypatch):
    """The eighth solution is for a derivative, the thirty-fifth a trial of the first round."""
    model, calls, residuals = mixture(linear(2)), itertools.count(1), _Problem.residuals

    def sometimes(problem, sampler, first=True):
        if next(calls) == call:
            raise UserError("the velocity is not finite")
        return residuals(problem, sampler, first)

    monkeypatch.setattr(_Problem, "residuals", sometimes)
    tuned = tune(model, draws(model), 6, trajectories=16, rounds=1)
    assert tuned.error <= tuned.default_error


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_a_trial_that_is_no_sampler_is_passed_over(size, monkeypatch):
    """Its times do not fall, or are not numbers."""
    model, solve = mixture(linear(2)), torch.linalg.solve

    def far(system, right):
        return torch.full_like(right, size) if right.ndim == 1 else solve(system, right)

    monkeypatch.setattr(torch.linalg, "solve", far)
    tuned = tune(model, draws(model), 6, trajectories=16, rounds=1)
    assert tuned.error <= tuned.default_error


def test_a_trial_that_is_far_off_warns_nobody(recwarn):
    """Its samples lie outside the data, of which a sampler warns by itself."""
    model, problem = problem_of()
    start, unknowns = flat(model, 4), torch.zeros(4 + sum(map(sum, flat(model, 4).shapes())), dtype=torch.float64)
    unknowns[4:] = 100.0
    with pytest.warns(UserWarning, match="the samples have a std"):
        problem.residuals(_changed(start, unknowns))
    assert problem.attempt(start, unknowns).norm() > 100
    assert not recwarn


def test_progress_is_told_of_every_solution(found):
    model, told = mixture(linear(2)), []
    tune(model, draws(model), 2, trajectories=4, rounds=2, progress=lambda *state: told.append(state))
    done, totals, errors = zip(*told, strict=True)
    assert list(done) == list(range(1, len(told) + 1))
    rounds = (1, 2)  # of the one order on a part, then on all
    assert set(totals) == {sum(n * (1 + 1 + 4 + 3) + 5 for n in rounds)}  # times, scale, weights and dampings
    assert len(told) <= totals[0] and min(errors) > 0 and 1 < len(set(errors)) <= sum(rounds)


@pytest.mark.parametrize(
    ("field", "nfe", "number"), [(gravity(2), 3, 48), (linear(2), 11, 48)], ids=["weights too", "times alone"]
)
def test_no_unknown_lowers_the_error_much_further(field, nfe, number):
    """At what is found the loss is nearly as small as it gets along each unknown."""
    model = mixture(field)
    problem = _Problem.solved(model, REFERENCE, *draws(model)(number, torch.Generator().manual_seed(3)))
    start = flat(model, nfe)
    found = _Fit(start, lambda error: None).advance(problem, 8)
    usual = TAIL * problem.errors(found).median()
    least = problem.loss(problem.residuals(found), usual)
    assert least < 0.4 * problem.loss(problem.residuals(start), usual)
    assert (found.factors is None) == (nfe > 10)
    weights = sum(map(sum, found.shapes())) if found.factors else 0
    for unknown in torch.eye(nfe + weights, dtype=torch.float64):
        for size in (-0.02, 0.02):
            assert problem.loss(problem.residuals(moved(found, size * unknown)), usual) > 0.85 * least


def problem_of(number=32, field=None):
    model = mixture(gravity(2) if field is None else field)
    return model, _Problem.solved(model, REFERENCE, *draws(model)(number, torch.Generator().manual_seed(3)))


def test_the_bias_of_known_residuals():
    """A shift of half a std, and an extent that is wrong by a tenth along the second axis alone."""
    _, problem = problem_of()
    ends = (problem.x_0 - problem.x_0.mean(0)) / 2**0.5
    std = ends.square().sum(1).mean().sqrt()
    _, axes = torch.linalg.eigh(ends.T @ ends)
    shift, second = torch.tensor([[0.3, 0.4]], dtype=torch.float64) * std, axes[:, :1]
    narrow = 0.1 * (ends @ second) @ second.T
    extent = (narrow.square().sum(1).mean().sqrt() / std).item()
    bias = problem.bias(torch.stack([shift.expand(32, 2), narrow, 0 * ends]))
    torch.testing.assert_close(bias[0], torch.tensor([0, 0, 0.3, 0.4], dtype=torch.float64))
    torch.testing.assert_close(bias[1].abs(), torch.tensor([0, extent, 0, 0], dtype=torch.float64))
    assert not bias[2].any()


def test_the_loss_of_known_residuals():
    """Those of twice the usual size count a fifth in the bias."""
    _, problem = problem_of()
    shift = torch.tensor([[0.3, 0.4]], dtype=torch.float64).expand(32, 2)
    bias = (100 * 0.5 / 5 / problem.std.item()) ** 2
    assert problem.loss(shift, torch.tensor(0.25)) == pytest.approx(math.log(5) + bias)
    for bad in (math.inf, math.nan):
        worse = shift.clone()
        worse[3, 1] = bad
        assert problem.loss(worse, torch.tensor(1.0)) == math.inf


def test_a_sample_that_cannot_be_reached_hides_no_other():
    """As one near a border between modes may end in another."""
    found = []
    for far in (0.0, 5.0):
        model, problem = problem_of(64, linear(2))
        problem.x_0[7] += far
        errors = problem.errors(_Fit(flat(model, 4), lambda error: None).advance(problem, 5))
        found.append(torch.cat([errors[:7], errors[8:]]).median().item())
    assert found[1] < 1.5 * found[0]


def test_samples_have_the_mean_and_the_extent_of_the_exact_ones(monkeypatch):
    """On fresh noise, better than where only errors count."""
    biases = []
    for weight in (100.0, 0.0):
        monkeypatch.setattr(tuning, "BIAS", weight)
        model, problem = problem_of(128, linear(2))
        found = _Fit(flat(model, 4), lambda error: None).advance(problem, 6)
        fresh = _Problem.solved(model, REFERENCE, *draws(model)(512, torch.Generator().manual_seed(4)))
        biases.append(fresh.bias(fresh.residuals(found)).norm().item())
    assert biases[0] < 0.6 * biases[1]


def test_rounds_go_on_from_what_the_last_have_found():
    model, problem = problem_of(16, linear(2))
    once, twice = (_Fit(flat(model, 4), lambda error: None) for _ in range(2))
    first = twice.advance(problem, 1)
    assert twice.advance(problem, 2) == once.advance(problem, 3) != first


def test_a_round_moves_every_unknown():
    """One without a derivative would stay, and the others make up for it."""
    model = mixture(gravity(2))
    problem = _Problem.solved(model, REFERENCE, *draws(model)(16, torch.Generator().manual_seed(3)))
    found = _Fit(flat(model, 4), lambda error: None).advance(problem, 1)
    left = 1 - torch.tensor(found.grid.shares, dtype=torch.float64)
    ratios = left[:-2] / left[1:-1] - 1
    assert float((ratios - torch.tensor([1 / 3, 1 / 2, 1])).abs().min()) > 1e-4
    assert abs(found.std - 0.8) > 1e-4
    assert min(abs(factor - 1) for pair in found.factors for side in pair for factor in side) > 1e-4


def moved(sampler, unknowns):
    """Changed from where it is: factors multiply."""
    changed = _changed(replace(sampler, factors=None), unknowns)
    if sampler.factors is None:
        return changed
    pairs = zip(sampler.factors, changed.factors, strict=True)
    factors = [[[a * b for a, b in zip(f, g, strict=True)] for f, g in zip(*pair, strict=True)] for pair in pairs]
    return replace(changed, factors=tuple(tuple(map(tuple, pair)) for pair in factors))


def test_factors_lower_the_error(found):
    model, tuned = found
    fresh = _Problem.solved(model, REFERENCE, *draws(model)(256, torch.Generator().manual_seed(6)))
    without = fresh.errors(replace(tuned.sampler, factors=None)).mean()
    assert fresh.errors(tuned.sampler).mean() < 0.8 * without


def test_nothing_changed_is_the_sampler_itself():
    model = mixture(linear(2))
    start = Multistep(5, grid=BandGrid(0.1, 2.0, (0.0, 0.2, 0.5, 0.7, 0.8, 1.0)), std=0.7)
    x_T = draws(model)(9, torch.Generator().manual_seed(0))[0]
    same = _changed(start, torch.zeros(5 + sum(map(sum, start.shapes())), dtype=torch.float64))
    torch.testing.assert_close(same(model, x_T), start(model, x_T), rtol=1e-12, atol=1e-12)
    assert _changed(start, torch.eye(5)[4]).std == pytest.approx(math.e * 0.7)
    far = [_changed(start, side * torch.eye(5)[4]).std for side in (9, -9)]
    assert far == pytest.approx([3 * 0.7, 0.7 / 3]) and FAR > 3
    later = _changed(start, torch.eye(5)[1]).grid.shares
    assert later[:2] == pytest.approx((0.0, 0.2)) and later[2] > 0.51  # and the rest in proportion
    assert (later[3] - later[2]) / (1 - later[2]) == pytest.approx(0.4)


def test_what_starts_alike_is_not_evaluated_again():
    model, start = Counted(mixture(gravity(2))), Multistep(6, 3)
    start = replace(start, grid=replace(start.default_grid(model, torch.zeros(1, 2)), shares=SIX), std=0.8)
    problem = _Problem.solved(model, REFERENCE, *draws(model)(9, torch.Generator().manual_seed(2)))
    unknowns = torch.eye(6 + sum(map(sum, start.shapes())), dtype=torch.float64)
    problem.residuals(_changed(start, 0 * unknowns[0]))
    for unknown, evaluations in ((0, 5), (3, 2), (5, 6), (6, 5), (-1, 0)):  # times, scale, first and last factor
        changed, before = _changed(start, unknowns[unknown] / 10), model.evaluations
        residuals = problem.residuals(changed, first=False)
        assert model.evaluations - before == evaluations
        torch.testing.assert_close(residuals, (problem.x_0 - changed(model, problem.x_T)) / 2**0.5)


def test_derivatives_share_what_starts_alike():
    """A round costs about half of what its solutions would cost one by one."""
    model, start = Counted(mixture(gravity(2))), Multistep(6, 3)
    start = replace(start, grid=replace(start.default_grid(model, torch.zeros(1, 2)), shares=SIX), std=0.8)
    problem, solutions = _Problem.solved(model, REFERENCE, *draws(model)(9, torch.Generator().manual_seed(2))), []
    before = model.evaluations
    _Fit(start, solutions.append).advance(problem, 1)
    assert model.evaluations - before < 0.75 * start.steps * len(solutions)


def test_each_factor_is_of_one_weight():
    values = itertools.count(1.0)
    shapes = Multistep(6, 3).shapes()
    factors = tuple(tuple(tuple(next(values) for _ in range(k)) for k in pair) for pair in shapes)
    sampler, angles = Multistep(6, 3, factors=factors), torch.linspace(1.4, 0.2, 6, dtype=torch.float64)[None]
    plain = sampler._weights(angles, 0.0)
    for weights, scaled, pair in zip(plain, sampler._scaled(plain), factors, strict=True):
        for w, s, f in zip(weights, scaled, pair, strict=True):
            torch.testing.assert_close(s, w * torch.tensor([f], dtype=torch.float64))


def test_a_recording_keeps_the_factors(found):
    model, tuned = found
    x_T = draws(model)(8, torch.Generator().manual_seed(0))[0]
    captured = Captured(tuned.sampler, lambda loop, device: loop)
    for _ in range(3):
        torch.testing.assert_close(captured(model, x_T), tuned.sampler(model, x_T), rtol=0, atol=0)


@pytest.mark.parametrize("factors", [(((), (1.0,)), ((1.0,), (1.0,))), 1.0, (1.0, 2.0)], ids=["few", "number", "flat"])
def test_factors_that_do_not_fit_are_refused(factors, user_error):
    with user_error("factors", "expected as many as it has weights", "(0, 1)"):
        Multistep(2, 1, factors=factors)


def test_factors_are_stored(tmp_path, found):
    _, tuned = found
    store_tuned(tmp_path, tuned)
    assert tuned_sampler(tmp_path, 6) == tuned.sampler
    assert hash(tuned_sampler(tmp_path, 6)) == hash(tuned.sampler)


def test_files_without_factors_are_read(tmp_path):
    store_tuned(tmp_path, Tuned(SAMPLER, 0.01, 0.02))
    path = tmp_path / "tuned.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "factors" not in line))
    assert tuned_sampler(tmp_path, 4) == SAMPLER


SIX = (0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0)
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


def test_a_file_that_was_cut_short_is_no_other_sampler(tmp_path):
    """Wherever it ends, it is refused, unless all that the sampler is made of is there."""
    found = replace(SAMPLER, factors=tuple(tuple((0.5,) * n for n in pair) for pair in SAMPLER.shapes()))
    store_tuned(tmp_path, Tuned(found, 0.01, 0.02))
    path = tmp_path / "tuned.yaml"
    text, read = path.read_text(), 0
    for end in range(len(text)):
        path.write_text(text[:end])
        try:
            assert tuned_sampler(tmp_path, 4) == found
            read += 1
        except UserError:
            pass
    assert read < 20


@pytest.mark.parametrize(
    "change", [("steps: 4", "steps: 7"), ("denoise: false", "denoise: f"), ("- 0.2\n", "")], ids=lambda c: c[0]
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, user_error):
    store_tuned(tmp_path, Tuned(SAMPLER, 0.01, 0.02))
    path = tmp_path / "tuned.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with user_error("tuned.yaml", "delete it"):
        tuned_sampler(tmp_path, 4)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "4: {sampler: {steps: 4}}", "4: 7", "4: {sampler: 5}"])
def test_a_damaged_file_is_named(tmp_path, content, user_error):
    (tmp_path / "tuned.yaml").write_text(content)
    with user_error("tuned.yaml", "delete it"):
        tuned_sampler(tmp_path, 4)


def test_factors_for_other_weights_are_refused(tmp_path, user_error):
    store_tuned(tmp_path, Tuned(SAMPLER, 0.01, 0.02))
    path = tmp_path / "tuned.yaml"
    path.write_text(path.read_text().replace("rule: 2", "rule: 1"))
    with user_error("tuned.yaml", "other weights", "tune.py again"):
        tuned_sampler(tmp_path, 4)


@pytest.mark.parametrize(("nfe", "trajectories", "rounds"), [(1, 4, 4), (4, 1, 4), (4, 4, 0)])
def test_impossible_budgets_are_refused(nfe, trajectories, rounds, user_error):
    model = mixture(linear(2))
    with user_error(f"nfe={nfe}", f"trajectories={trajectories}", f"rounds={rounds}"):
        tune(model, draws(model), nfe, trajectories, rounds)
