"""Specifications: what they hold, and that they import and call nothing but what is trusted."""

import functools
import math
import sys

import pytest
import torch
import yaml

from diffusion import specs
from diffusion.data import toy
from diffusion.expressions import Expression
from diffusion.fields import Gaussian, gravity

MODULE = """
import math
from os import getcwd as borrowed
from diffusion.fields import AffineField, Gaussian, gravity

borrowed_class = Gaussian

def psi(r, t):
    return r / (r + t)

nameless = lambda r, t: r

class Curve:
    def __init__(self, power=2.0):
        self.power = power

    def __call__(self, t):
        return t**self.power

    @staticmethod
    def inner(r, t):
        return r

def local():
    def psi(r, t):
        return r
    return psi

class Shadowed:
    pass

original = Shadowed

class Shadowed:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's own."""
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    yield __import__("own_module")
    sys.modules.pop("own_module", None)


@specs.recorded
class Holder:
    """Keeps what it is given."""

    def __init__(self, value, other=None):
        self.value, self.other = value, other


def built(value):
    """`value` after a journey as an argument through YAML."""
    stored = yaml.safe_load(yaml.safe_dump(specs.describe(Holder(value))))
    assert stored.pop("_target_") == f"{__name__}.Holder"
    return specs.build(stored["value"], "own_module")


def test_functions_and_classes_of_a_module_are_stored_by_name(own):
    assert specs.describe(Holder(own.psi))["value"] == {"_function_": "own_module.psi"}
    assert built(own.psi) is own.psi
    assert built(own.Curve) is own.Curve
    assert built([own.psi, {"a": own.psi, "b": 2}]) == [own.psi, {"a": own.psi, "b": 2}]


def test_parts_of_this_package_need_no_trust():
    assert specs.build({"_function_": "diffusion.fields.gravity"}) is gravity
    assert specs.build(specs.describe(Holder(toy))["value"]) is toy
    field = specs.build([{"_target_": "diffusion.fields.gravity", "dim": 4}, {"x": Gaussian(3).spec}])
    assert field[0].dim == 4 if hasattr(field[0], "dim") else field[0].horizon == 80
    assert isinstance(field[1]["x"], Gaussian)


def test_formulas_are_stored(own):
    again = built(Expression("r^t"))
    assert float(again(2.0, 3.0)) == 8


def test_what_no_other_process_finds_is_not_stored(own, monkeypatch):
    main = type(sys)("__main__")
    exec("def psi(r, t): return r", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    for value in (
        own.nameless, own.local(), own.original, own.Curve.inner, own.Curve(), functools.partial(own.psi, 1),
        torch.tanh, math.sin, len, main.psi, own, object(), lambda r, t: r,
    ):  # fmt: skip
        assert specs.describe(Holder(value))["value"] is None, value
        assert specs.describe(Holder({"a": [value]}))["value"] is None, value


@pytest.mark.parametrize("word", ["_target_", "_function_"])
class TestTrust:
    def test_a_users_module_is_not_imported_without_trust(self, word, tmp_path, monkeypatch, user_error):
        (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        for trust in (None, (), [], "evil", "evil_modul", ["evil_module.sub"]):
            for spec in ({word: "evil_module.f"}, [{"a": {word: "evil_module.f"}}]):
                with user_error("'evil_module.f'", "if that is code of your own, load with trust=evil_module"):
                    specs.build(spec, trust)
        assert "evil_module" not in sys.modules

    def test_trust_ends_at_the_module(self, word, own, user_error):
        """What a trusted module has imported from elsewhere belongs there."""
        with user_error("'own_module.borrowed'"):
            specs.build({word: "own_module.borrowed"}, "own_module")
        with user_error("no module own_module.math"):
            specs.build({word: "own_module.math.sin"}, ["own_module.math"])
        with user_error("'own_module.math'"):
            specs.build({word: "own_module.math"}, "own_module")
        for name in ("os.system", "diffusion.data.os.system", "builtins.eval", "diffusion.checkpoints.write"):
            with user_error(repr(name)):
                specs.build({word: name}, "own_module")

    @pytest.mark.parametrize(
        "name", [None, 3, "", "psi", "own_module.psi()", "own_module.", ".psi", ["own_module.psi"]]
    )
    def test_names_that_are_none(self, word, own, name, user_error):
        with user_error(repr(name)):
            specs.build({word: name}, "own_module")

    def test_dunders_lead_nowhere(self, word, own, user_error):
        for name in ("own_module.__class__", "own_module.__loader__", "own_module.__dict__", "own_module.__builtins__"):
            with user_error(repr(name)):
                specs.build({word: name}, "own_module")


def test_classes_of_a_trusted_module_are_built(own):
    spec = {"_target_": "own_module.Curve", "power": 3.0}
    assert specs.build(spec, "own_module")(2.0) == 8
    assert specs.build(spec, ["other", "own_module"])(2.0) == 8
    assert specs.build({"_target_": "own_module.gravity", "dim": 3}, "own_module").horizon == 80  # one of diffusion's


@pytest.mark.parametrize("trust", ["own_module.py", "./own_module", "", [""], [3], 3, True, "a b", ["a", None]])
def test_trust_is_names_of_modules(trust, user_error):
    with user_error(f"trust is {trust!r}", "such as my_module"):
        specs.build({}, trust)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = undefined", ["cannot import broken_module: NameError", "'undefined'", "(broken_module.py, line 1)"]),
        ("\ndef f(:", ["cannot import broken_module: SyntaxError", "(broken_module.py, line 2)"]),
        ("import no_such_package", ["cannot import broken_module: ModuleNotFoundError", "no_such_package"]),
        ("raise ValueError('two\\nlines')", ["ValueError: two lines"]),
        ("def other(): pass", ["module broken_module", "broken_module.py) has no 'f'"]),
        ("f = 3", ["a int, expected a function or a class"]),
        (None, ["no module broken_module for 'broken_module.f'"]),
    ],
)
def test_modules_that_cannot_be_imported_are_reported(source, words, tmp_path, monkeypatch, user_error):
    if source is not None:
        (tmp_path / "broken_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with user_error(*words):
        specs.build({"_function_": "broken_module.f"}, "broken_module")
    sys.modules.pop("broken_module", None)


class TestAttach:
    CALL = {"_target_": "own_module.Curve", "power": 3.0}  # noqa: RUF012

    def test_an_object_without_a_specification_gets_its_call(self, own):
        curve = own.Curve(3.0)
        specs.attach(curve, self.CALL)
        assert curve.spec == self.CALL
        assert built(curve)(2.0) == 8

    def test_functions_among_the_arguments(self, own):
        curve = own.Curve()
        specs.attach(curve, {"_target_": "own_module.Curve", "power": own.psi})
        assert curve.spec["power"] == {"_function_": "own_module.psi"}

    def test_an_object_with_a_specification_keeps_it(self):
        field = gravity(3)
        specs.attach(field, self.CALL)
        assert field.spec["dim"] == 3

    def test_a_specification_that_cannot_be_stored_is_replaced(self, own):
        holder = Holder(own.Curve(3.0))
        call = {"_target_": f"{__name__}.Holder", "value": self.CALL}
        specs.attach(holder, call)
        assert holder.spec == call

    @pytest.mark.parametrize(
        "call",
        [
            {"power": 3.0},
            {"_target_": "own_module.Curve", "power": object()},
            {"_target_": "own_module.Curve", "_partial_": True},
            {"_target_": "own_module.Curve", "power": [{"_target_": "own_module.psi", "_partial_": True}]},
        ],
    )
    def test_what_is_not_a_plain_call_is_not_attached(self, call, own):
        curve = own.Curve()
        specs.attach(curve, call)
        assert not hasattr(curve, "spec")

    def test_objects_that_take_no_attributes_stay_as_they_are(self):
        specs.attach((1, 2), self.CALL)
