"""Adaptive multistep integration of each sample on its own."""

import warnings

import numpy as np
import pytest
import torch
from problems import GaussianMixture
from reference import error, solved
from torchdiffeq import odeint

from diffusion.adaptive_adams import CUT, GROWTH, LONGEST, ORDER, SAFETY, integrate
from diffusion.errors import UserError
from diffusion.fields import linear, variance_exploding
from diffusion.samplers import AdaptiveMultistep

every_problem = pytest.mark.parametrize("name", ["variance_exploding", "variance_preserving", "linear", "gravity"])


class Recorded:
    """A model that keeps the sizes of the batches it is called with, and multiplies by what goes with each sample."""

    def __init__(self, model):
        self.model, self.field, self.sizes = model, model.field, []

    def velocity(self, x, t, scale=1.0, centre=0.0):
        self.sizes.append(len(x))
        scale = torch.as_tensor(scale, dtype=x.dtype).reshape(-1, 1)
        return self.model.velocity(x / scale - centre, t) * scale


def rows(B, tolerance, order=None):
    """y' = rate y cos(6 u) for rates of each problem, and evaluations."""
    rate = torch.linspace(0.5, 6, B, dtype=torch.float64)[:, None]
    seen = []

    def slope(u, y, index):
        seen.append(len(index))
        return rate[index] * y * (6 * u)[:, None].cos()

    y = torch.ones(B, 3, dtype=torch.float64)
    arrived = integrate(slope, y, lambda off, y, index: off.abs().amax(1) / tolerance, 10_000)
    return arrived, (arrived.y - (rate * torch.sin(torch.tensor(6.0).double()) / 6).exp()).abs().amax(1), seen


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_integrator_keeps_its_tolerance(tolerance):
    arrived, off, seen = rows(5, tolerance)
    assert bool((arrived.u == 1).all())
    assert off.max() < 30 * tolerance
    assert (off < arrived.error * tolerance * 10).all()
    assert sum(seen) == int(arrived.evaluations.sum())
    assert arrived.evaluations[0] < arrived.evaluations[-1]


def test_integrator_is_of_high_order():
    """Four digits cost less than 2.8 times the evaluations: order p costs 10^(4 / (p + 1)), 3.7 at 6."""
    some, more = (int(rows(1, tolerance)[0].evaluations) for tolerance in (1e-7, 1e-11))
    assert more < 2.8 * some
    assert more < 110


def test_polynomials_are_exact():
    def slope(u, y, index):
        return (7 * u**6)[:, None].expand_as(y)

    arrived = integrate(slope, torch.zeros(1, 2).double(), lambda off, y, index: off.abs().amax(1) / 1e-12, 1000)
    torch.testing.assert_close(arrived.y, torch.ones(1, 2).double(), rtol=0, atol=1e-11)


def through(places, f):
    """The integral's antiderivative of the polynomial through the values of `f` at these places."""
    scale, middle = max(places) - min(places) or 1.0, places[0]
    y = (np.array(places) - middle) / scale
    whole = np.polynomial.Polynomial(np.linalg.solve(np.vander(y, increasing=True), f(np.array(places)))).integ()
    return lambda u: scale * whole((u - middle) / scale)


def test_estimates_and_steps_are_those_of_interpolation():
    """Slopes that do not depend on y: corrections of all orders are integrals of polynomials through the last ones."""

    def f(u):
        return np.exp(2 * u) * np.cos(9 * u) + np.tanh(40 * (u - 0.6))

    ends, asked = [0.0], []

    def slope(u, y, index):
        if float(u) > 0:
            ends.append(float(u))
        return torch.from_numpy(f(u.numpy()))[:, None].expand_as(y)

    def ratio(off, y, index):
        asked.append((float(off[0, 0]), float(y[0, 0])))
        return off.abs().amax(1) / tolerance

    tolerance, y = 3e-5, 0.0
    arrived = integrate(slope, torch.zeros(1, 1, dtype=torch.float64), ratio, 1000)
    assert len(asked) == 3 * (len(ends) - 1)  # of the order, the one below and the one above
    nodes, order, orders = [0.0], 1, []
    for number, end in enumerate(ends[1:]):
        (own, corrected), (below, _), (above, _) = asked[3 * number : 3 * number + 3]
        places, start = [end, *nodes], nodes[0]

        def correction(k, places=places, start=start, end=end):
            whole = through(places[: k + 1], f)
            return whole(end) - whole(start)

        def estimate(k):
            return correction(k) - correction(k - 1)

        assert corrected == pytest.approx(y + correction(order), abs=1e-12)
        assert own == pytest.approx(estimate(order), abs=1e-12)
        fine, known = abs(own) <= tolerance, len(nodes)
        possible = {order: own}
        if order > 1:
            assert below == pytest.approx(estimate(order - 1), abs=1e-12)
            possible[order - 1] = below
        if fine and order < ORDER and known > order:
            assert above == pytest.approx(estimate(order + 1), abs=1e-12)
            possible[order + 1] = above
        lengths = {k: (abs(off) / tolerance) ** (-1 / (k + 1)) for k, off in possible.items()}
        best = max(lengths, key=lengths.get)
        if number + 2 < len(ends) and ends[number + 2] < 1:
            expected = (end - start) * min(max(SAFETY * lengths[best], CUT), GROWTH if fine else SAFETY)
            found = ends[number + 2] - (end if fine else start)
            assert found == pytest.approx(min(expected, LONGEST), rel=1e-6)
        order = order + 1 if fine and known == order and order < ORDER else best
        orders.append(order)
        if fine:
            nodes, y = [end, *nodes], corrected
    assert float(arrived.y) == pytest.approx(y)
    assert max(orders) >= 4 and len(ends) - 1 > len(nodes) - 1 and min(np.diff(orders)) < 0


def two_levels(field, apart):
    """24 modes in 6 groups, `apart` as far as the groups; and draws from the prior."""
    randomness = torch.Generator().manual_seed(0)
    groups, each = (torch.randn(6, n, 2, generator=randomness, dtype=torch.float64) for n in (1, 4))
    means = (groups + apart * each).view(-1, 2)
    stds, weights = torch.full((24,), apart / 8, dtype=torch.float64), torch.full((24,), 1 / 24, dtype=torch.float64)
    return GaussianMixture(field, means, stds, weights), field.sample_prior((32, 2), randomness, dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize("apart", [0.02, 0.3])
@pytest.mark.parametrize("field", [variance_exploding(2), linear(2)], ids=["variance_exploding", "linear"])
def test_loose_tolerances_find_the_modes(field, apart, tolerance):
    """Where steps are long the slope at the prediction is what is wrong."""
    model, x_T = two_levels(field, apart)
    off = AdaptiveMultistep(tolerance, tolerance)(model, x_T) - AdaptiveMultistep(1e-7, 1e-7)(model, x_T)
    assert off.norm(dim=1).median() < 0.01
    assert off.norm(dim=1).max() < 0.05


def test_the_correction_is_bounded():
    """An estimate that is blind leaves the bound alone to shorten the steps."""

    def run(largest):
        seen = []

        def slope(u, y, index):
            seen.append((float(u), y.clone()))
            return 40 * (torch.cos(40 * u)[:, None] - y)

        arrived = integrate(slope, torch.zeros(1, 1).double(), lambda off, y, index: 0 * off[:, 0], 1000, largest)
        exact = 0.5 * (np.cos(40) + np.sin(40)) - 0.5 * np.exp(-40)
        return abs(float(arrived.y) - exact), len(seen)

    errors, counts = zip(*[run(largest) for largest in (np.inf, 1e-2, 1e-4)], strict=True)
    assert errors[0] > 0.1 and errors[1] < 0.02 and errors[2] < 2e-4
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(("size", "std", "warned"), [(0.02, None, True), (0.02, 0.02, False), (20.0, 0.8, True)])
def test_data_of_another_size_than_was_assumed_are_reported(size, std, warned):
    model, x_T = two_levels(variance_exploding(2), 0.3)
    model = GaussianMixture(model.field, size * model.means, size * model.stds, model.weights)
    sampler = AdaptiveMultistep(1e-3, 1e-3, std=std)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler(model, x_T)
        sampler(model, x_T[:15])  # too few to tell
    assert len(caught) == warned
    for warning in caught:
        assert "steps were made for 0.8" in str(warning.message) and warning.filename == __file__


@every_problem
def test_error_falls_with_the_tolerance(name):
    problem = solved(name)
    errors = [error(AdaptiveMultistep(tol, tol), problem) for tol in (1e-4, 1e-6, 1e-8)]
    assert errors[1] < errors[0] / 20
    assert errors[2] < errors[1] / 20
    assert errors[2] < 3e-7


@every_problem
def test_defaults_reach_1e_4_within_60_evaluations(name):
    problem = solved(name)
    model = Recorded(problem.model)
    assert error(AdaptiveMultistep(), problem._replace(model=model)) < 1e-4
    assert sum(model.sizes) / len(problem.x_T) < 60


@every_problem
def test_samples_do_not_depend_on_their_batch(name):
    problem = solved(name)
    sampler = AdaptiveMultistep(1e-4, 1e-4)
    together = sampler(problem.model, problem.x_T)
    alone = torch.cat([sampler(problem.model, one[None]) for one in problem.x_T])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    backwards = sampler(problem.model, problem.x_T.flip(0)).flip(0)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-12)


@every_problem
def test_only_samples_on_their_way_are_evaluated(name):
    problem = solved(name)
    model = Recorded(problem.model)
    AdaptiveMultistep()(model, problem.x_T)
    assert model.sizes[0] == model.sizes[-1] == len(problem.x_T)
    assert model.sizes[:-1] == sorted(model.sizes[:-1], reverse=True)
    assert len(set(model.sizes)) > 1


def test_modes_that_steps_in_the_time_itself_jump_over_are_found():
    problem = solved("variance_exploding")
    field = problem.model.field

    def slope(t, x):
        return problem.model.velocity(x, t.expand(len(x)))

    span = torch.tensor([field.horizon, field.t_min], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        jumped = odeint(slope, problem.x_T, span, rtol=1e-2, atol=1e-2, method="dopri5")[-1]
        ours = AdaptiveMultistep(1e-2, 1e-2)(problem.model, problem.x_T)
    assert (jumped - problem.x_0).norm(dim=1).median() > 0.1
    assert (ours - problem.x_0).norm(dim=1).median() < 0.02


def test_labels_and_other_conditions_go_with_their_samples():
    """Data of another size for each sample: x / scale has the velocity of the problem's own model."""
    problem = solved("linear")
    scale = torch.linspace(0.5, 2, len(problem.x_T), dtype=torch.float64)
    sampler = AdaptiveMultistep(1e-4, 1e-4)
    together = sampler(Recorded(problem.model), problem.x_T, scale=scale, centre=torch.tensor(0.0))
    for i in (0, len(scale) - 1):
        alone = sampler(Recorded(problem.model), problem.x_T[i, None], scale=scale[i, None], centre=0.0)
        torch.testing.assert_close(together[i, None], alone, rtol=0, atol=1e-12)
    assert len({round(float(s), 6) for s in (together / sampler(problem.model, problem.x_T)).flatten()}) > 2


@pytest.mark.parametrize("allowed", [4, 30])
def test_spent_evaluations_end_in_a_warning_and_the_estimate_from_there(allowed):
    problem = solved("linear")
    model, number = Recorded(problem.model), len(problem.x_T)
    message = f"{number} of {number} samples.*sample 0, stopped at t=.* after {allowed - 1} of {allowed} evaluations"
    with pytest.warns(UserWarning, match=message) as caught:
        x = AdaptiveMultistep(max_evaluations=allowed)(model, problem.x_T)
    assert caught[0].filename == __file__
    assert model.sizes == [number] * allowed
    assert x.isfinite().all()
    assert x.abs().max() < 3


def test_the_warning_counts_those_that_stopped_and_leaves_the_others():
    problem = solved("linear")
    counts = []
    for one in problem.x_T:
        model = Recorded(problem.model)
        AdaptiveMultistep()(model, one[None])
        counts.append(len(model.sizes))
    allowed = min(counts)
    late = [i for i, count in enumerate(counts) if count > allowed]
    assert late
    with pytest.warns(UserWarning, match=f"^{len(late)} of {len(counts)} samples.*sample {late[0]},"):
        x = AdaptiveMultistep(max_evaluations=allowed)(problem.model, problem.x_T)
    whole = AdaptiveMultistep()(problem.model, problem.x_T)
    others = [i for i in range(len(counts)) if i not in late]
    torch.testing.assert_close(x[others], whole[others], rtol=0, atol=1e-12)


def test_a_velocity_that_is_random_ends_in_a_warning():
    class Rough:
        field = solved("linear").model.field

        def velocity(self, x, t):
            return 1e6 * torch.randn(x.shape, generator=randomness, dtype=x.dtype)

    randomness = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="2 of 2 samples"):
        assert AdaptiveMultistep(max_evaluations=300)(Rough(), torch.ones(2, 2, dtype=torch.float64)).isfinite().all()


def test_the_sample_whose_velocity_is_not_finite_is_named():
    """By its place in the batch, when others have arrived already."""
    problem, broken = solved("variance_exploding"), []

    class Broken:
        field = problem.model.field

        def velocity(self, x, t, label):
            value = problem.model.velocity(x, t)
            if len(x) < len(problem.x_T):
                broken.append((len(x) - 1, int(label[-1])))
                value[-1] = torch.nan
            return value

    with pytest.raises(UserError) as raised:
        AdaptiveMultistep()(Broken(), problem.x_T.flip(0), label=torch.arange(len(problem.x_T)))
    ((place, sample),) = broken
    assert place != sample
    assert f"sample {sample} is not finite at t=" in str(raised.value)


def test_shapes_and_dtypes():
    problem = solved("linear")

    class Images:
        field = problem.model.field

        def velocity(self, x, t):
            return problem.model.velocity(x.view(len(x), 2).double(), t).view(x.shape)

    x = AdaptiveMultistep(1e-4, 1e-4)(Images(), problem.x_T.view(-1, 1, 2, 1).float())
    assert x.shape == (len(problem.x_T), 1, 2, 1)
    assert x.dtype == torch.float32
    assert (x.view(-1, 2) - problem.x_0).abs().max() < 0.01


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_evaluations": 3}, ("max_evaluations=3", "at least 4")),
        ({"rtol": -1.0}, ("rtol=-1.0", "positive")),
        ({"rtol": 0.0, "atol": 0.0}, ("atol=0.0", "positive")),
        ({"atol": float("nan")}, ("atol=nan", "positive")),
        ({"std": -1.0}, ("std=-1.0", "positive")),
    ],
    ids=["evaluations", "negative tolerance", "no tolerance", "nan", "std"],
)
def test_impossible_options_are_refused(options, parts, user_error):
    with user_error(*parts):
        AdaptiveMultistep(**options)
