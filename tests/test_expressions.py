"""Formulas: the same as torch's own functions, exact in the tails, and nothing but mathematics."""

import copy
import math
import time

import pytest
import torch

from diffusion import specs
from diffusion.expressions import FUNCTIONS, LONGEST, Expression

GENERATOR = torch.Generator().manual_seed(0)
R, T = (0.1 + 3 * torch.rand(50, generator=GENERATOR, dtype=torch.float64) for _ in range(2))

SAME = {
    "r + t - 2.5e-1": lambda r, t: r + t - 0.25,
    "r - t - 1": lambda r, t: (r - t) - 1,
    "r/t/2": lambda r, t: (r / t) / 2,
    "1/2*r": lambda r, t: r / 2,
    "-r^2": lambda r, t: -(r**2),
    "-r**2": lambda r, t: -(r**2),
    "(-r)^2": lambda r, t: r**2,
    "2^-t": lambda r, t: 2 ** (-t),
    "r^t^2": lambda r, t: r ** (t**2),
    "(r^t)^2": lambda r, t: r ** (2 * t),
    "r^2*t + 1": lambda r, t: r**2 * t + 1,
    "2*r^2/t^2": lambda r, t: 2 * r**2 / t**2,
    "+r - -t": lambda r, t: r + t,
    " ( r ) ": lambda r, t: r,
    "3": lambda r, t: torch.full_like(r, 3),
    "pi*r + e^t": lambda r, t: math.pi * r + torch.exp(t),
    "tanh((r/t)^(1+t/T))": lambda r, t: 1 - 2 / (1 + torch.exp(2 * (r / t) ** (1 + t / 80))),
    "gammainc(d/2, r^2/(2*t^2))": lambda r, t: torch.special.gammainc(torch.full_like(r, 1.5), r**2 / (2 * t**2)),
    "gammaincc(d/2, r)": lambda r, t: torch.special.gammaincc(torch.full_like(r, 1.5), r),
    "min(r, t)": torch.minimum,
    "max(r, max(t, 1))": lambda r, t: torch.maximum(r, t.clamp(min=1)),
    "exp(-r) + expm1(-t)": lambda r, t: torch.exp(-r) + torch.expm1(-t),
    "log(r)*log1p(t)": lambda r, t: r.log() * t.log1p(),
    "sqrt(r) + abs(r - t)": lambda r, t: r.sqrt() + (r - t).abs(),
    "sin(r) + cos(t) + tan(r)": lambda r, t: r.sin() + t.cos() + r.tan(),
    "sinh(r)/cosh(t)": lambda r, t: r.sinh() / t.cosh(),
    "tanh(r - t)": lambda r, t: torch.tanh(r - t),
    "expm1(r - t)": lambda r, t: torch.expm1(r - t),
    "sigmoid(r - t)": lambda r, t: torch.sigmoid(r - t),
    "atan(r) + asinh(t)": lambda r, t: r.atan() + t.asinh(),
    "erf(r) - erfc(t) + lgamma(r)": lambda r, t: r.erf() - t.erfc() + r.lgamma(),
}


def derivatives(function, *values):
    """First derivatives by torch.func.vjp, and second ones by autograd through them."""
    values = [value.clone().requires_grad_() for value in values]
    result, pull_back = torch.func.vjp(function, *values)
    first = pull_back(torch.ones_like(result))
    total = sum(d.sum() for d in first) + 0 * values[0].sum()  # of the latter, where the first ones are constant
    second = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
    return result.detach(), [d.detach() for d in first], second


@pytest.mark.parametrize("text", SAME)
def test_values_and_two_derivatives_are_those_of_torch(text):
    expression = Expression(text, constants={"T": 80, "d": 3})
    if text == "3":
        assert expression(R, T).equal(SAME[text](R, T))
        return
    for found, expected in zip(derivatives(expression, R, T), derivatives(SAME[text], R, T), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_every_function_is_tried():
    assert all(any(f"{name}(" in text for text in SAME) for name in FUNCTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_and_the_joint_shape_of_the_values(dtype):
    r, t = R.to(dtype), torch.tensor(2.0, dtype=dtype)
    for text in ("tanh(r/t) + 1e300", "r", "t", "2", "gammainc(1/2, t)*min(1, t)"):
        assert Expression(text)(r, t).dtype == dtype
        assert Expression(text)(r, t).shape == r.shape
        assert Expression(text)(r[:, None], r).shape == (50, 50)
    assert Expression("r/t")(r, 2).equal(r / 2)
    assert float(Expression("r/t")(1, 4)) == 0.25
    assert Expression("r/t")(torch.tensor([1, 2]), 4).tolist() == [0.25, 0.5]


def test_a_constant_never_widens_the_network_dtype_nor_meets_whole_numbers():
    assert Expression("0.5*r", ["r"])(torch.tensor(3, dtype=torch.float32)).dtype == torch.float32
    assert float(Expression("0.5*r", ["r"])(torch.tensor(3))) == 1.5


TAILS = {  # formula in r, its derivative, its second derivative
    "tanh(r)": (lambda r: 1 / r.cosh() ** 2, lambda r: -2 * r.tanh() / r.cosh() ** 2),
    "-tanh(-r)": (lambda r: 1 / r.cosh() ** 2, lambda r: -2 * r.tanh() / r.cosh() ** 2),
    "-expm1(-r)": (lambda r: (-r).exp(), lambda r: -(-r).exp()),
    "sigmoid(r)": (
        lambda r: (-r).exp() / (1 + (-r).exp()) ** 2,
        lambda r: (-r).exp() * torch.expm1(-r) / (1 + (-r).exp()) ** 3,
    ),
    "erf(r/10)": (
        lambda r: 0.2 / math.sqrt(math.pi) * (-((r / 10) ** 2)).exp(),
        lambda r: -0.004 / math.sqrt(math.pi) * r * (-((r / 10) ** 2)).exp(),
    ),
    "gammainc(3/2, r)": (
        lambda r: 2 / math.sqrt(math.pi) * r.sqrt() * (-r).exp(),
        lambda r: 2 / math.sqrt(math.pi) * (-r).exp() * (0.5 / r.sqrt() - r.sqrt()),
    ),
}


@pytest.mark.parametrize("text", TAILS)
def test_derivatives_keep_their_digits_in_the_tail_and_near_zero(text):
    """To 1e-13 relative, up to where they underflow; 1e-12 for second ones, some of which are differences."""
    r = torch.cat([torch.logspace(-12, 2, 200), torch.linspace(0.9, 1.1, 21), torch.linspace(2, 170, 200)]).double()
    _, (first,), (second,) = derivatives(Expression(text, ["r"]), r)
    torch.testing.assert_close(first, TAILS[text][0](r), rtol=1e-13, atol=0)
    inner = r > 0.6  # sigmoid's second derivative vanishes at 0, gammainc's at 1/2
    torch.testing.assert_close(second[inner], TAILS[text][1](r)[inner], rtol=1e-12, atol=1e-300)


def test_tanh_keeps_its_digits_until_it_underflows():
    r = torch.tensor([0.0, 1e-300, 1e-9, 1e-3, 0.5, 0.999999, 1.0, 2.0, 18.0, 40.0, 300.0, 350.0], dtype=torch.float64)
    value, (first,), _ = derivatives(Expression("tanh(r)", ["r"]), r)
    torch.testing.assert_close(value, torch.tanh(r), rtol=1e-15, atol=0)
    torch.testing.assert_close(first, 1 / torch.cosh(r) ** 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["tanh", "expm1", "sigmoid"])
def test_extremes_have_no_nan(name):
    r = torch.tensor([-1e308, -800.0, -1.0, 0.0, 1.0, 800.0], dtype=torch.float64)
    results = derivatives(Expression(f"{name}(r)", ["r"]), r)
    assert not any(torch.stack([results[0], *results[1], *results[2]]).isnan().flatten())


WRONG = {
    "": "expected text", "   ": "expected text",
    "foo": "unknown name 'foo' at character 1; expected a formula of r, t, pi, e, numbers",
    "  r^2 + foo": "unknown name 'foo' at character 9",
    "R": "unknown name 'R'", "foo(r)": "unknown function 'foo'", "r(t)": "unknown function 'r'",
    "__import__(r)": "unknown function '__import__'", "eval(r)": "unknown function 'eval'",
    "exp": "function without its argument 'exp'",
    "r.x": "unexpected 'r.x'", "my_module.psi": "unexpected 'my_module.psi'", "os.system(r)": "'os.system' is not",
    "().__class__.__bases__": "unexpected", "r.__class__": "unexpected", "r" + ".a" * 400: "unexpected 'r.a.a.a",
    "(1).real": "unexpected", "lambda r: r": "unexpected ':' at character 9", "lambda: r": "unexpected ':'",
    "[r for r in t]": "unexpected '['", "(r for r in t)": "unexpected", "{r}": "unexpected '{'",
    "r[0]": "unexpected '['",
    "'a'": 'unexpected "\'"', '"a"*9': "unexpected '\"'", "exp(x=r)": "unexpected '='", "exp(*r)": "unexpected '*r'",
    "exp(**r)": "unexpected **", "(r:=t)": "unexpected ':'", "r if t else 1": "unexpected", "r and t": "unexpected",
    "not r": "unexpected", "r < t": "unexpected '<'", "r, t": "unexpected", "r; t": "unexpected ';'",
    "True": "unexpected 'True'", "None": "unexpected 'None'", "2j": "unexpected '2j'", "await r": "unexpected",
    "yield r": "not a formula", "r//t": "unexpected 'r//t'", "r % t": "unexpected '%'", "~r": "unexpected '~'",
    "r\n+1": "unexpected '\\n'", "r\0": "unexpected '\\x00'", "r²": "unexpected '²'", "r # t": "unexpected '#'",
    "2r": "not a formula", "2(r)": "'2' is not a function (products", "tanh(r)(t)": "'tanh(r)' is not a function",
    "r t": "not a formula (products are written with *) at character 3", "r +": "not a formula",
    "r^^2": "not a formula (products are written with *) at character 3",
    "(r": "'(' was never closed at character 1", "r^2 + (t": "'(' was never closed at character 7",
    "r)": "unmatched ')' at character 2", "exp()": "exp with 0 arguments, expected 1",
    "exp(r, t)": "exp with 2 arguments, expected 1", "max(r)": "max with 1 arguments, expected 2",
    "gammainc(t, r)": "the first argument of gammainc depends on a variable",
    "1e999": "number too large", "9" * 400: "number too large",
    "r" * (LONGEST + 1): "has 1001 characters, expected at most 1000", "(" * 10_000 + "r" + ")" * 10_000: "characters",
    "(" * 400 + "r" + ")" * 400: "", "-" * 900 + "r": "", "r" + "**r" * 300: "within each other",
    "r" + "+r" * 300: "within each other", "exp(" * 150 + "r" + ")" * 150: "within each other",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_whatever_is_not_a_formula_is_refused(text, user_error):
    with user_error("formula", WRONG[text]):
        Expression(text)


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_nesting_that_exhausts_the_parser_is_refused(error, monkeypatch, user_error):
    """Depending on its version, Python's parser gives up in one of these ways."""

    def parse(*args, **kwargs):
        raise error

    monkeypatch.setattr("ast.parse", parse)
    with user_error("too deeply nested"):
        Expression("--r")


@pytest.mark.parametrize("text", [None, 3, ["r"], b"r"])
def test_formulas_are_text(text, user_error):
    with user_error(repr(text), "expected text"):
        Expression(text)


def test_powers_of_numbers_are_floats_and_cannot_hang():
    began = time.monotonic()
    assert float(Expression("r + 9**9**9**9")(1.0, 1.0)) == math.inf
    assert float(Expression("0*r - 10^-10^10")(1.0, 1.0)) == 0
    assert float(Expression("r + 1/0")(1.0, 1.0)) == math.inf
    assert math.isnan(Expression("r*(-8)^(1/3)")(1.0, 1.0))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("variables", "constants"),
    [(["r", "r"], {}), (["e"], {}), (["exp"], {}), (["r"], {"r": 1}), (["r-t"], {}), ([3], {}), (["r"], {"a b": 1})],
)
def test_names_that_are_none_or_taken_are_refused(variables, constants, user_error):
    with user_error("cannot have a variable or constant"):
        Expression("1", variables, constants)


@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_constants_are_numbers(value, user_error):
    with user_error(f"constant T={value!r}"):
        Expression("T", ["r"], {"T": value})


def test_the_number_of_values_is_that_of_the_variables(user_error):
    with user_error("got 1 values", "r, t"):
        Expression("r/t")(R)


def test_order_of_the_variables():
    assert float(Expression("a/b", ["b", "a"])(2.0, 6.0)) == 3


def test_a_stored_formula_is_the_same(tmp_path):
    expression = Expression("tanh(r/T)", ["r"], {"T": 4.0})
    assert expression.spec == {
        "_target_": "diffusion.expressions.Expression",
        "text": "tanh(r/T)",
        "variables": ["r"],
        "constants": {"T": 4.0},
    }
    for other in (specs.build(expression.spec), copy.deepcopy(expression)):
        assert other(R).equal(expression(R))
