"""Specifications: plain dictionaries that say how an object was built, so that a checkpoint can build it again.

A specification is ``{"_target_": "diffusion.fields.gravity", "dim": 64}``: an importable name and its arguments, which
are numbers, strings, lists, or specifications in turn. It is what Hydra instantiates and what YAML stores; no code is
ever pickled.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion.errors import UserError

TRUSTED = ("diffusion.data", "diffusion.fields", "diffusion.generator", "diffusion.networks")


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
    spec = getattr(value, "spec", None)
    return spec if isinstance(spec, dict) else Unstorable()


class Unstorable:
    """Stands in a specification for an argument that plain data cannot express, such as a lambda."""


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


def build(spec: Any, trust: Sequence[str] = TRUSTED) -> Any:
    """Build the object that `spec` describes, from classes and functions defined in the modules `trust` or below.

    Raises:
        UserError: the target is outside `trust`, does not exist, or refuses its arguments.
    """
    if isinstance(spec, list):
        return [build(item, trust) for item in spec]
    if not isinstance(spec, Mapping) or "_target_" not in spec:
        return spec
    arguments = {key: build(value, trust) for key, value in spec.items() if key != "_target_"}
    target = str(spec["_target_"])
    module, _, name = target.rpartition(".")
    if not _within(module, trust):
        raise UserError(f"specification names {target!r}, expected something from {', '.join(trust)}")
    try:
        found = getattr(importlib.import_module(module), name)
        if not _within(found.__module__, trust):
            raise UserError(f"specification names {target!r}, which belongs to {found.__module__}, not to this package")
        return found(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"cannot build {target}: {error}; was it written by another version?") from error


def _within(module: str, trust: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{trusted}.") for trusted in trust)
