"""Specifications: plain dictionaries that say how an object was built, so that a checkpoint can build it again.

A specification is ``{"_target_": "diffusion.fields.gravity", "dim": 64}``: an importable name and its arguments, which
are numbers, strings, lists, mappings, or specifications in turn. It is what Hydra instantiates and what YAML stores; no
code is ever pickled. A function or class that is itself an argument is ``{"_function_": "my_module.psi"}``.

Specifications may come from strangers. Only what is defined in `TRUSTED`, and in modules that the user trusts by name,
is imported, called, or passed on.
"""

import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion.errors import UserError

TRUSTED = (
    "diffusion.data", "diffusion.expressions", "diffusion.fields", "diffusion.generator",
    "diffusion.gradient_flow.one_step", "diffusion.networks",
)  # fmt: skip
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def recorded(build: Callable) -> Callable:
    """Decorate a class or a function so that what it returns carries ``spec``, the call that built it."""
    if inspect.isclass(build):
        original, signature = build.__init__, inspect.signature(build.__init__)

        @functools.wraps(original)
        def initialise(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if type(self) is build:  # a subclass is another thing, which this call would not build
                self.spec = _describe(build, signature.bind(self, *args, **kwargs), skip=1)

        build.__init__ = initialise
        return build

    signature = inspect.signature(build)

    @functools.wraps(build)
    def call(*args, **kwargs):
        result = build(*args, **kwargs)
        result.spec = _describe(build, signature.bind(*args, **kwargs))
        return result

    return call


def _describe(build: Callable, bound: inspect.BoundArguments, skip: int = 0) -> dict[str, Any]:
    bound.apply_defaults()
    arguments = {name: _plain(value) for name, value in list(bound.arguments.items())[skip:]}
    return {"_target_": f"{build.__module__}.{build.__qualname__}", **arguments}


def _plain(value: Any) -> Any:
    """The value as YAML can hold it; ``Unstorable`` where it cannot."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if inspect.isfunction(value) or inspect.isclass(value):
        return {"_function_": f"{value.__module__}.{value.__name__}"} if _importable(value) else Unstorable()
    spec = getattr(value, "spec", None)
    return spec if isinstance(spec, dict) else Unstorable()


def _importable(function: Callable) -> bool:
    """Whether another process finds the same function or class under its own name: lambdas, and all else, do not."""
    module = sys.modules.get(function.__module__)
    return function.__module__ != "__main__" and getattr(module, function.__qualname__, None) is function


class Unstorable:
    """Stands in a specification for an argument that plain data cannot express, such as a lambda."""


def attach(built: Any, call: Mapping[str, Any]) -> None:
    """Give `built`, made by the call that `call` specifies, that specification where it has none that can be stored.

    For objects of classes that are not `recorded`, such as a user's own. Nothing happens where `call` itself cannot be
    stored, asks for more than a call (Hydra's ``_partial_``, say), or `built` takes no attributes.
    """
    spec = _plain(call)
    if "_target_" in spec and _only_calls(spec) and not _storable(getattr(built, "spec", Unstorable())):
        with suppress(AttributeError):
            built.spec = spec


def _only_calls(spec: Any) -> bool:
    if isinstance(spec, Mapping):
        words = {"_target_", "_function_"}
        return all((key in words or key[:1] != "_") and _only_calls(value) for key, value in spec.items())
    if isinstance(spec, list):
        return all(_only_calls(item) for item in spec)
    return _storable(spec)


def describe(built: Any) -> dict[str, Any]:
    """The specification of `built`, with None for each argument that cannot be written to YAML in full.

    Empty for an object that was not built by something `recorded`.
    """
    spec = getattr(built, "spec", {})
    return {name: value if _storable(value) else None for name, value in spec.items()}


def difference(stored: Any, own: Any, name: str = "") -> str | None:
    """The first place in which two specifications differ, in words, or None."""
    if isinstance(stored, Mapping) and isinstance(own, Mapping):
        for key in [*stored, *(key for key in own if key not in stored)]:
            if found := difference(stored.get(key), own.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return None
    return None if stored == own else f"{name} is {stored!r} there and {own!r} here"


def _storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_storable(item) for item in value.values())
    if isinstance(value, list):
        return all(_storable(item) for item in value)
    return not isinstance(value, Unstorable)


def build(spec: Any, trust: str | Sequence[str] | None = None) -> Any:
    """Build the object that `spec` describes.

    Args:
        spec: a specification, or lists and mappings of them; anything else stays as it is.
        trust: names of modules besides `TRUSTED` of which, and below which, anything may be imported and called.

    Raises:
        UserError: something is outside of the trusted modules, does not exist, or refuses its arguments; `trust` is
            not names of modules.
    """
    return _build(spec, (*TRUSTED, *_modules(trust)))


def _modules(trust: str | Sequence[str] | None) -> list[str]:
    names = [trust] if isinstance(trust, str) else [] if trust is None else trust
    if isinstance(names, Sequence) and all(_is_module(name) for name in names):
        return list(names)
    raise UserError(f"trust is {trust!r}, expected the name of a module, such as my_module, or a list of names")


def _is_module(name: Any) -> bool:
    return isinstance(name, str) and DOTTED.fullmatch(name) is not None and not name.endswith(".py")


def _build(spec: Any, trusted: Sequence[str]) -> Any:
    if isinstance(spec, list):
        return [_build(item, trusted) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    if set(spec) == {"_function_"}:
        return _find(spec["_function_"], trusted)
    arguments = {key: _build(value, trusted) for key, value in spec.items() if key != "_target_"}
    if "_target_" not in spec:
        return arguments
    target = spec["_target_"]
    found = _find(target, trusted)
    try:
        return found(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot build {target}: {error}; was it written by another version?") from error


def _find(name: Any, trusted: Sequence[str]) -> Callable:
    """The function or class called `name`, if it is defined in a trusted module."""
    module, _, _ = str(name).rpartition(".")
    if not isinstance(name, str) or not DOTTED.fullmatch(name) or not _within(module, trusted):
        hint = f"if that is code of your own, load with trust={module}" if module else "expected a name in a module"
        raise UserError(
            f"the checkpoint names {name!r}, which is none of diffusion's fields, networks and data; {hint}"
        )
    found = locate(name)
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        raise UserError(f"the checkpoint names {name!r}, a {type(found).__name__}, expected a function or a class")
    if not _within(found.__module__, trusted):  # else diffusion.data.os.system would do
        raise UserError(
            f"the checkpoint names {name!r}, which belongs to {found.__module__}; expected something defined in "
            f"{', '.join(trusted)}"
        )
    return found


def _within(module: str, trusted: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in trusted)


def locate(name: str) -> Any:
    """What is called `name`, such as my_module.psi. The module is imported, so the name must be trusted.

    Raises:
        UserError: there is no such module, it fails while it is imported, or it has no such name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's own may raise
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"no module {error.name} for {name!r}; expected it where the command is run, or installed"
            ) from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise UserError(f"cannot import {module}: {type(error).__name__}: {_one_line(error)}{place}") from error
    if not hasattr(found, attribute):
        raise UserError(f"module {module} ({getattr(found, '__file__', 'built in')}) has no {attribute!r}")
    return getattr(found, attribute)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
