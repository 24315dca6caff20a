"""Formulas: text such as ``tanh((r/t)^2)`` as a differentiable function of tensors.

The text is read as mathematics and nothing else: numbers, names, + - * / ^, parentheses and a closed list of
functions. It is never run as code, so that formulas may stand in checkpoints and on the command line.
"""

import ast
import functools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.functions import expm1, sigmoid, tanh
from diffusion.specs import recorded

LONGEST, DEEPEST = 1000, 100  # characters; levels of operations within operations


NAMED = {"pi": math.pi, "e": math.e}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: torch.pow,
}
OF_ONE = {
    "exp": torch.exp, "expm1": expm1, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "abs": torch.abs,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "atan": torch.atan,
    "sinh": torch.sinh, "cosh": torch.cosh, "tanh": tanh, "asinh": torch.asinh, "sigmoid": sigmoid,
    "erf": torch.erf, "erfc": torch.erfc, "lgamma": torch.lgamma,
}  # fmt: skip
OF_TWO = {
    "min": torch.minimum, "max": torch.maximum,
    "gammainc": torch.special.gammainc, "gammaincc": torch.special.gammaincc,
}  # fmt: skip
FUNCTIONS = {**OF_ONE, **OF_TWO}


@recorded
class Expression:
    """A formula as a function of tensors: ``Expression("tanh(r/t)")(r, t)``.

    Both ``^`` and ``**`` are powers and bind as in mathematics: -r^2 is -(r^2), r^t^2 is r^(t^2). The functions are
    those of `FUNCTIONS`; gammainc(a, x) and gammaincc(a, x) are the regularised incomplete gamma functions, and a must
    not depend on the variables, since they have no derivative in it. Results are differentiable twice.

    Args:
        text: at most 1000 characters.
        variables: their names, in the order of the arguments of a call.
        constants: further names and their values, besides pi and e.

    Raises:
        UserError: the text is not such a formula; the message says where.
    """

    def __init__(self, text: str, variables: Sequence[str] = ("r", "t"), constants: Mapping[str, float] | None = None):
        self.text, self.variables = text, tuple(variables)
        self.constants = {**NAMED, **(constants or {})}
        given = [*NAMED, *(constants or {}), *FUNCTIONS, *self.variables]
        for name in given:
            if not isinstance(name, str) or not name.isidentifier() or given.count(name) > 1:
                raise UserError(
                    f"formula {text!r} cannot have a variable or constant {name!r}: it is no name, or taken"
                )
        for name, value in self.constants.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"formula {text!r} has the constant {name}={value!r}, expected a number")
        self._program = _Parser(text, self.variables, self.constants).program

    def __call__(self, *values: Tensor | float) -> Tensor:
        """The value at one tensor or number for each variable, of shapes that broadcast; it has their joint shape.

        Raises:
            UserError: the number of values is not that of the variables.
        """
        if len(values) != len(self.variables):
            raise UserError(f"{self!r} got {len(values)} values, expected one for each of {', '.join(self.variables)}")
        tensors = [value for value in values if isinstance(value, Tensor)]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors)) if tensors else torch.float64
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        device = tensors[0].device if tensors else None

        def tensor(value: Tensor | float) -> Tensor:
            return value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device=device)

        names = {name: tensor(value) for name, value in zip(self.variables, values, strict=True)}
        size = torch.broadcast_shapes(*(value.shape for value in names.values()))
        stack: list[Tensor] = []
        for step in self._program:
            if isinstance(step, str):
                stack.append(names[step])
            elif isinstance(step, float):
                stack.append(tensor(step))
            else:
                function, count = step
                arguments = stack[-count:]
                stack[-count:] = [function(*arguments)]
        return stack[0].expand(size)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def _shorten(text: str, length: int = 60) -> str:
    """`text`, or its beginning and three dots."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Parser:
    """Turns text into `program`, steps for a stack: a number, the name of a variable, or (function, arguments)."""

    def __init__(self, text: Any, variables: Sequence[str], constants: Mapping[str, float]):
        self.text, self.variables, self.constants = text, variables, constants
        self.program: list = []
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"formula is {text!r}, expected text such as 'tanh(r/t)'")
        if len(text) > LONGEST:
            raise UserError(f"formula {_shorten(text)!r} has {len(text)} characters, expected at most {LONGEST}")
        if stray := re.search(r"[^A-Za-z0-9_.,()+\-*/^ ]", text):
            self.refuse(stray.start(), f"unexpected {stray[0]!r}")
        # Python's ^ binds more loosely than +, so it becomes ** first; `places` leads back to the text as given.
        self.places = [place for place, letter in enumerate(text) for _ in ("**" if letter == "^" else letter)]
        self.places.append(len(text))
        self.blanks = len(text) - len(text.lstrip())
        try:
            tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
        except SyntaxError as error:
            brackets = "never closed" in error.msg or "unmatched" in error.msg
            message = error.msg if brackets else "not a formula (products are written with *)"
            self.refuse(self.place(error.offset - 1) if error.offset else len(text), message)
        except (MemoryError, RecursionError):
            self.refuse(0, "too deeply nested")
        self.read(tree.body)

    def place(self, offset: int) -> int:
        """Where in the text the parser's character `offset` is."""
        return self.places[min(max(offset, 0) + self.blanks, len(self.places) - 1)]

    def piece(self, node: ast.expr) -> str:
        """The text of `node`, or its beginning."""
        return repr(_shorten(self.text[self.place(node.col_offset) : self.place(node.end_col_offset)], 20))

    def refuse(self, place: int, problem: str) -> NoReturn:
        names, functions = ", ".join([*self.variables, *self.constants]), ", ".join(FUNCTIONS)
        raise UserError(
            f"formula {_shorten(self.text)!r}: {problem} at character {place + 1}; "
            f"expected a formula of {names}, numbers, + - * / ^ ( ), {functions}"
        )

    def read(self, node: ast.expr, depth: int = 0) -> None:
        """Append the steps that compute `node`; whatever is not listed here is refused."""
        place = self.place(node.col_offset)
        if depth > DEEPEST:
            self.refuse(place, f"more than {DEEPEST} operations within each other")
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                self.program.append(self.number(node.value, place))
            case ast.Name(id=name) if name in self.variables:
                self.program.append(name)
            case ast.Name(id=name) if name in self.constants:
                self.program.append(float(self.constants[name]))
            case ast.Name(id=name):
                missing = "function without its argument" if name in FUNCTIONS else "unknown name"
                self.refuse(place, f"{missing} {name!r}")
            case ast.UnaryOp(op=ast.UAdd()):
                self.read(node.operand, depth + 1)
            case ast.UnaryOp(op=ast.USub()):
                self.read(node.operand, depth + 1)
                self.program.append((operator.neg, 1))
            case ast.BinOp() if type(node.op) in OPERATORS:
                self.read(node.left, depth + 1)
                self.read(node.right, depth + 1)
                self.program.append((OPERATORS[type(node.op)], 2))
            case ast.Call():
                self.call(node, place, depth)
            case _:
                self.refuse(place, f"unexpected {self.piece(node)}")

    def call(self, node: ast.Call, place: int, depth: int) -> None:
        """Append the steps of a call of one of `FUNCTIONS`."""
        if not isinstance(node.func, ast.Name):
            self.refuse(place, f"{self.piece(node.func)} is not a function (products are written with *)")
        name, count = node.func.id, 1 if node.func.id in OF_ONE else 2
        if name not in FUNCTIONS:
            self.refuse(place, f"unknown function {name!r}")
        if node.keywords:
            self.refuse(place, f"unexpected ** among the arguments of {name}")
        if len(node.args) != count:
            self.refuse(place, f"{name} with {len(node.args)} arguments, expected {count},")
        if name.startswith("gamma") and any(
            isinstance(part, ast.Name) and part.id in self.variables for part in ast.walk(node.args[0])
        ):
            self.refuse(place, f"the first argument of {name} depends on a variable")
        for argument in node.args:
            self.read(argument, depth + 1)
        self.program.append((FUNCTIONS[name], count))

    def number(self, value: int | float, place: int) -> float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if math.isinf(value):
            self.refuse(place, "number too large for float64")
        return value
