"""The exact field of a data set against a plain sum over all pairs, and what must hold where that sum breaks down."""

import functools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from problems import FIELDS, PointMasses, gradient, names, times
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.fields import EmpiricalField, Field, Unavailable, gravity, linear, pfgmpp, variance_exploding, weighting
from diffusion.samplers import Heun, generate

POINTS = 37
every_field = pytest.mark.parametrize("case", **names(FIELDS))
of_images = pytest.mark.parametrize(
    "field", [variance_exploding(), gravity(784), pfgmpp(784, 128.0)], ids=["gaussian", "gravity", "pfgmpp"]
)


def problem(case, number=POINTS, rows=8):
    """A field, data of different weights, places x that it leads to, and times over the whole range."""
    randomness, field = torch.Generator().manual_seed(3), case.build()
    data = torch.randn(number, case.dim, generator=randomness, dtype=torch.float64)
    weights = torch.rand(number, generator=randomness, dtype=torch.float64)
    t = times(field, rows)
    x0 = data[torch.randint(number, (rows,), generator=randomness)]
    return field, data, weights, field.sample(x0, t, randomness), t


def relative_error(a, b):
    """Of each row of a, in the length of that of b, (B,); 0 where both are 0."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)


def everything(exact, x, t):
    return [exact.denoised(x, t), exact.velocity(x, t), exact.score(x, t), exact.target(x, t), exact.log_prob(x, t)]


def smooth_images(number):
    """(number, 784) float32: few directions of large variance, as images have, and a mean that is not 0."""
    randomness = torch.Generator().manual_seed(0)
    coarse = torch.randn(number, 1, 7, 7, generator=randomness)
    return torch.nn.functional.interpolate(coarse, size=28, mode="bicubic").flatten(1).mul(0.5).sub(0.6)


@every_field
def test_agrees_with_a_plain_sum_over_all_pairs(case, monkeypatch):
    monkeypatch.setattr(weighting, "PAIRS", 64)  # 8 points a block, the last one smaller
    field, data, weights, x, t = problem(case)
    exact, plain = EmpiricalField(field, data, weights), PointMasses(field, data, weights / weights.sum())
    leaf = x.clone().requires_grad_()
    log_prob = plain.log_prob(leaf, t)
    score = gradient(log_prob + 0 * leaf.sum(), leaf)
    expected = [
        plain.denoised(x, t),
        plain.velocity(x, t),
        score,
        plain.average(field.target, x, t),
        log_prob[:, None],
    ]
    *results, result = everything(exact, x, t)
    for value, reference in zip([*results, result[:, None]], expected, strict=True):
        assert value.dtype == x.dtype
        assert relative_error(value, reference.detach()).max() < 1e-10


@every_field
def test_images_numbers_as_times_and_equal_weights(case):
    """(B, 1, d) and (B, d) are the same points, t and (t, t, ...) the same times."""
    field, data, _, x, t = problem(case)
    exact, as_images = EmpiricalField(field, data), EmpiricalField(field, data[:, None])
    same = EmpiricalField(field, data, torch.full((POINTS,), 0.3))
    x, time = x[3:4].repeat(3, 1), float(t[3])
    for a, b, c in zip(
        everything(exact, x, time),
        everything(as_images, x[:, None], t[3].repeat(3)),
        everything(same, x, time),
        strict=True,
    ):
        assert b.shape == (a.shape if a.dim() == 1 else (3, 1, case.dim))
        torch.testing.assert_close(b.view_as(a), a, rtol=1e-12, atol=0)
        torch.testing.assert_close(c, a, rtol=1e-10, atol=0)


def test_images_of_two_dimensions():
    randomness = torch.Generator().manual_seed(0)
    data = torch.randn(50, 1, 8, 8, generator=randomness, dtype=torch.float64)
    field = gravity(64)
    x = field.sample(data[:5], 0.3, randomness)
    exact, plain = (
        EmpiricalField(field, data),
        PointMasses(field, data.flatten(1), torch.full((50,), 0.02, dtype=torch.float64)),
    )
    assert relative_error(exact.velocity(x, 0.3), plain.velocity(x.flatten(1), 0.3)).max() < 1e-10


@every_field
def test_many_rows_are_taken_some_at_a_time(case, monkeypatch):
    field, data, _, x, t = problem(case)
    exact = EmpiricalField(field, data)
    whole = everything(exact, x, t)
    monkeypatch.setattr("diffusion.fields.empirical.ROWS", 3)
    for part, all_rows in zip(everything(exact, x, t), whole, strict=True):
        torch.testing.assert_close(part, all_rows, rtol=1e-10, atol=0)
    assert exact.velocity(x[:0], t[:0]).shape == (0, case.dim)
    assert exact.log_prob(x[:0], t[:0]).shape == (0,)


@every_field
def test_score_is_the_gradient_of_log_prob(case):
    if case.has_jumps:
        pytest.skip("the density is constant between its jumps")
    field, data, _, x, t = problem(case)
    exact = EmpiricalField(field, data)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        score = exact.score(x, t)
    assert relative_error(score, gradient(exact.log_prob(leaf, t), leaf).detach()).max() < 1e-9


@pytest.mark.parametrize("field", [variance_exploding(), gravity(5), pfgmpp(5, 128.0)], ids=["gaussian", "1", "128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e3])
def test_extreme_noise_levels(field, dtype, sigma):
    """Near a data point the field points away from it; far from all it points away from their mean."""
    randomness = torch.Generator().manual_seed(0)
    data = torch.randn(300, 5, generator=randomness, dtype=dtype)
    x = field.sample(data[:40], sigma, randomness)
    exact = EmpiricalField(field, data)
    plain = PointMasses(field, data.double(), torch.full((300,), 1 / 300, dtype=torch.float64))
    wide, tolerance = x.double(), 2e-6 if dtype == torch.float32 else 1e-10
    for name in ("denoised", "velocity", "log_prob"):
        value = getattr(exact, name)(x, sigma).view(40, -1)
        assert value.dtype == dtype
        assert relative_error(value, getattr(plain, name)(wide, sigma).view(40, -1)).max() < tolerance


@of_images
@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0, 3.0, 30.0, 1e3])
def test_error_in_single_precision(field, t):
    """784 coordinates: the log-densities of heavy tails multiply errors of the distance by 392 and more."""
    randomness, data = torch.Generator().manual_seed(1), smooth_images(4000)
    x = field.sample(data[:64], t, randomness)
    single, double = EmpiricalField(field, data), EmpiricalField(field, data.double())
    error = single.denoised(x, t).double() - double.denoised(x.double(), t)
    assert error.norm() < 7e-7 * data[:64].norm()
    error, velocity = single.velocity(x, t).double() - double.velocity(x.double(), t), double.velocity(x.double(), t)
    assert error.norm() < 1.5e-6 * velocity.norm()


@of_images
def test_at_a_data_point_rounding_does_not_make_distances_negative(field):
    data = smooth_images(400)
    assert relative_error(EmpiricalField(field, data).denoised(data, 1e-3), data).max() < 1e-6


class Largest(TorchDispatchMode):
    """Records the largest tensor made, in bytes, views not counted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def without_gradients(x):
    return not (torch.is_grad_enabled() and x.requires_grad)


traced = functools.cache(functools.partial(torch.compile, dynamic=True, backend="aot_eager"))


@pytest.fixture
def fused(monkeypatch):
    """What a GPU does, on a CPU: a kernel of attention, and steps traced for a compiler but not compiled."""
    monkeypatch.setattr(weighting, "fused", without_gradients)
    monkeypatch.setattr(weighting, "_compiled", traced)


def of_all_kinds():
    """Data of several pieces and a rest, one piece without weight, and times that differ or not."""
    data, weights = smooth_images(2000), torch.rand(2000, generator=torch.Generator().manual_seed(2))
    weights[512:1024] = weights[1990:] = 0
    times = [1.0, torch.logspace(-3, 3, 64)]
    return data, weights, times


def disagreement(field, data, weights, t):
    """Of float32 with float64, in the denoised mean, relative."""
    x = field.sample(data[1024:1088], t, torch.Generator().manual_seed(1))
    with torch.no_grad():
        single = EmpiricalField(field, data, weights).denoised(x, t)
        double = EmpiricalField(field, data.double(), weights).denoised(x.double(), t)
    assert single.isfinite().all()
    return (single - double).norm() / double.norm()


@of_images
def test_weights_of_points_in_single_precision(field):
    data, weights, times = of_all_kinds()
    for t in times:
        assert disagreement(field, data, weights, t) < 1e-6


@of_images
def test_fused_blocks_have_the_same_error(field, fused):
    data, weights, times = of_all_kinds()
    for t in times:
        assert disagreement(field, data, weights, t) < 1e-6


@pytest.mark.parametrize(
    "columns, width, attended",
    [
        pytest.param(slice(36), 784, True, id="36"),
        pytest.param(slice(4, 40), 784, True, id="from_4"),
        pytest.param(slice(33), 784, False, id="33"),
        pytest.param(slice(1, 37), 784, False, id="from_1"),
        pytest.param(slice(36), 783, False, id="odd_rows"),
    ],
)
def test_attention_keeps_no_log_densities(columns, width, attended, fused, monkeypatch):
    """Where rows of the data lie as its kernels ask; other data are taken as ever."""
    monkeypatch.setattr(weighting, "PAIRS", 2**17)
    data = smooth_images(2000)[:, :width].contiguous()[:, columns]
    exact, x = EmpiricalField(variance_exploding(), data), data[:64] + 1
    with Largest() as largest, torch.no_grad():
        result = exact.denoised(x, 1.0)
    expected = EmpiricalField(variance_exploding(), data.double()).denoised(x.double(), 1.0)
    assert relative_error(result, expected).max() < 3e-6
    assert (largest.bytes < 4 * 64 * 1536) == attended  # the log-densities of three pieces


class Calls(TorchDispatchMode):
    """Records what is called, with the options given."""

    def __init__(self):
        super().__init__()
        self.options = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.options[function.overloadpacket] = kwargs
        return function(*args, **(kwargs or {}))


def test_attention_on_a_gpu_gives_a_block():
    """As far as shapes go: its kernel pads the rows of the log-sum-exp to a multiple of 32."""
    query, points, bias = (torch.empty(*size, device="meta") for size in ((40, 8), (1536, 8), (1, 1536)))
    with Calls() as calls:
        block = weighting.attention(query, points, bias)
    assert calls.options[torch.ops.aten._scaled_dot_product_efficient_attention] == {"scale": 1.0}
    assert block.logits.shape == (40, 3)
    assert block.weigh(block.logits).shape == (40, 8)


def test_fuses_on_a_gpu_what_is_not_to_be_differentiated():
    for on_gpu, graph in ((True, False), (True, True), (False, False)):
        x = SimpleNamespace(is_cuda=on_gpu, requires_grad=graph)
        assert weighting.fused(x) == (on_gpu and not graph and torch.version.hip is None)
        with torch.no_grad():
            assert weighting.fused(x) == (on_gpu and torch.version.hip is None)


def test_without_a_compiler_the_steps_are_the_same(monkeypatch):
    def no_compiler(function, **options):
        def call(*tensors):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand a long story")

        return call

    field, data = gravity(784), smooth_images(300)
    expected = EmpiricalField(field, data).denoised(data[:3], 0.5)
    monkeypatch.setattr(weighting, "fused", without_gradients)
    monkeypatch.setattr(torch, "compile", no_compiler)
    weighting._compiled.cache_clear()
    with pytest.warns(UserWarning, match=r"failed \(no C\+\+ compiler\)"):
        assert EmpiricalField(field, data).denoised(data[:3], 0.5).equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert EmpiricalField(field, data).denoised(data[:3], 0.5).equal(expected)
    weighting._compiled.cache_clear()


@pytest.mark.slow
@of_images
def test_compiled_steps_have_the_same_error(field, monkeypatch):
    monkeypatch.setattr(weighting, "fused", without_gradients)
    data, weights, times = of_all_kinds()
    for t in times:
        assert disagreement(field, data, weights, t) < 1e-6


@of_images
@pytest.mark.parametrize("fuses", [False, True], ids=["plain", "fused"])
def test_denoised_can_be_differentiated(field, fuses, monkeypatch):
    monkeypatch.setattr(weighting, "PAIRS", 64)
    monkeypatch.setattr(weighting, "fused", without_gradients if fuses else lambda x: False)
    data = smooth_images(40).double()
    x = field.sample(data[:8], 8.0, torch.Generator().manual_seed(1)).requires_grad_()
    plain = PointMasses(field, data, torch.full((40,), 1 / 40, dtype=torch.float64))
    direction = data[8:16]
    results = [
        gradient((model.denoised(x, 8.0) * direction).sum(1), x) for model in (EmpiricalField(field, data), plain)
    ]
    assert relative_error(*results).max() < 1e-9


@every_field
@pytest.mark.parametrize("quantity", ["velocity", "score"])
def test_memory_does_not_grow_with_the_data(case, quantity, monkeypatch):
    monkeypatch.setattr(weighting, "PAIRS", 128)
    monkeypatch.setattr(weighting, "COORDINATES", 128)
    monkeypatch.setattr("diffusion.fields.empirical.COORDINATES", 128)
    field, data, _, x, t = problem(case, number=200)
    exact = EmpiricalField(field, data)
    with Largest() as largest, torch.no_grad():
        getattr(exact, quantity)(x, t)
    assert largest.bytes < 10_000  # 8 x 200 distances alone would be 12,800


@pytest.mark.parametrize("build", [gravity, lambda dim: linear(), pfgmpp], ids=["gravity", "linear", "pfgmpp"])
def test_generates_its_data(build):
    data = torch.tensor([[1.0, 0.5], [-1.0, 1.0], [0.3, -1.2]], dtype=torch.float64)
    exact = EmpiricalField(build(2), data)
    images = generate(exact, (40, 2), Heun(steps=40), seed=0).double()
    distance, nearest = torch.cdist(images, data).min(1)
    assert (distance < 1e-4).double().mean() > 0.95  # at t_min a few lie between data points
    assert nearest.unique().numel() == 3


class Ring(Field):
    """Mass between the distances t and 2 t from the data point alone, with a velocity that is infinite outside."""

    horizon = 1.0

    def velocity(self, x, t, x0):
        inside = self.log_prob(x, t, x0).isfinite()[:, None]
        return ((x - x0) / torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)).where(inside, math.inf)

    def log_prob(self, x, t, x0):
        t = torch.as_tensor(t, dtype=x.dtype)
        radius = (x - x0).norm(dim=1) / t
        return (-(3 * math.pi * t.square()).log()).expand_as(radius).where((radius > 1) & (radius < 2), -math.inf)


def test_what_has_no_mass_does_not_count(user_error, monkeypatch):
    monkeypatch.setattr("diffusion.fields.empirical.ROWS", 1)
    data = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 0.2]], dtype=torch.float64)
    exact = EmpiricalField(Ring(), data)
    x = torch.tensor([[0.0, 1.5], [5.0, 5.0]], dtype=torch.float64)
    expected = (x[0] - data[[0, 2]]).mean(0)
    torch.testing.assert_close(exact.velocity(x[:1], 1.0), expected[None])
    assert exact.log_prob(x, 1.0)[0] == pytest.approx(math.log(2 / 3) - math.log(3 * math.pi))
    assert exact.log_prob(x, 1.0)[1] == -math.inf
    for mean in (exact.velocity, exact.denoised, exact.score, exact.target):
        with user_error("x[1]", "-inf", "t=1"):
            mean(x, 1.0)
    weights = torch.tensor([0.0, 1.0, 1.0])
    assert EmpiricalField(Ring(), data, weights).denoised(x[:1], 1.0).equal(data[2:])


def test_refuses_what_it_cannot_use(user_error):
    data, x = torch.zeros(3, 4), torch.zeros(2, 5)
    with user_error("(2, 5)", "(B, 4)"):
        EmpiricalField(linear(), data).velocity(x, 0.5)
    with user_error("(3,)", "(2,)"):
        EmpiricalField(linear(), data).velocity(x[:, :4], torch.ones(3))
    with user_error("(0, 4)"):
        EmpiricalField(linear(), data[:0])
    with user_error("torch.int64"):
        EmpiricalField(linear(), data.long())
    with user_error("data[1]", "not finite"):
        EmpiricalField(linear(), torch.tensor([[0.0], [math.nan]]))
    with user_error("(2,)", "(3,)"):
        EmpiricalField(linear(), data, torch.ones(2))
    for weights in (-torch.ones(3), torch.zeros(3), torch.full((3,), math.inf)):
        with user_error("weights"):
            EmpiricalField(linear(), data, weights)
    with user_error("dim=9"):
        EmpiricalField(gravity(9), data)


def test_a_field_without_a_density_is_unavailable():
    class Samples(Field):
        horizon = 1.0

        def velocity(self, x, t, x0):
            return x - x0

    with pytest.raises(Unavailable, match="Samples has no density"):
        EmpiricalField(Samples(), torch.zeros(3, 2))
