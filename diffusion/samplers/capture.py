"""The loop of a fixed-step sampler as one CUDA graph: the host starts all its kernels at once and leaves no gaps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from diffusion.conditions import is_of_points, of_points
from diffusion.errors import UserError
from diffusion.samplers.base import (
    Counted,
    Evaluations,
    Model,
    Outcome,
    PlannedSampler,
    Randomness,
    Sampler,
    started,
)

Loop = Callable[[], Outcome]
PLAIN = bool | int | float | complex | str | torch.dtype | torch.device | None


def cuda_graph(loop: Loop, device: torch.device) -> Loop:
    """What does on `device` all that `loop` does, on the same memory, so that each result overwrites the last.

    The loop is run once before, as CUDA libraries and compilers get ready in a first run. Weights that autocast has
    cast are not kept for later, as they are the graph's.

    Raises:
        UserError: the loop does what a graph cannot hold, such as wait for a value.
    """
    casting = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    fresh = torch.autocast("cuda", enabled=casting[0], dtype=casting[1], cache_enabled=False)
    with torch.cuda.device(device), fresh:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph, stream=side):
                outcome = loop()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the sampler's loop cannot become a CUDA graph ({reason}); try compile=false") from error

    def replay() -> Outcome:
        graph.replay()
        return outcome

    return replay


class Captured(Sampler):
    """A sampler whose loop is recorded once and replayed for batches of one kind: same model, shapes and types.

    The first batch of a kind is sampled without, the second makes the recording. Smaller ones, such as the last of
    many, are filled up with copies of their last sample, larger ones are a new kind. The recording is of one kind at a
    time, and of the model as it was then: weights may change in place, nothing else.

    Args:
        sampler: any that makes a plan.
        record: record(loop, device) -> a function that repeats the loop on the same memory.
    """

    def __init__(self, sampler: PlannedSampler, record: Callable[[Loop, torch.device], Loop] = cuda_graph):
        self.sampler, self.record = sampler, record
        self._model: Model | None = None
        self._kind: tuple = ()
        self._size = 0
        self._tape: _Tape | None = None

    def __str__(self) -> str:
        return str(self.sampler)

    @torch.no_grad()
    def __call__(self, model: Model, x_T: Tensor, generator: Randomness = None, **conditions: Any) -> Tensor:
        """As any sampler. Conditions that are tensors (B, ...) go with their samples, others are for all.

        Raises:
            UserError: a condition is, or holds, neither tensor, number nor text, so that a change would go unnoticed.
        """
        number, x = len(x_T), started(x_T)
        conditions = tree_map_only(Tensor, lambda value: value.to(x.device), conditions)
        kind = _kind(x, conditions)
        if known := model is self._model and kind == self._kind and number <= self._size:
            index = torch.arange(self._size, device=x.device).clamp_max(number - 1)
            x, conditions = x[index], of_points(conditions, index, number)
        else:
            self._model, self._kind, self._size, self._tape = model, kind, number, None
        before = (model.evaluations, model.points) if isinstance(model, Counted) else (0, 0)
        inputs = self.sampler.plan(model, x), x, conditions
        if known and self._tape is None and number == self._size:
            self._tape = _Tape(lambda *inputs: _loop(self.sampler, model, *inputs), inputs, self.record)
        outcome = _loop(self.sampler, model, *inputs) if self._tape is None else self._tape.play(inputs)
        if isinstance(model, Counted):  # a replay evaluates the network, but calls no function
            model.evaluations = before[0] + len(outcome.finite)
            model.points = before[1] + len(outcome.finite) * number
        return outcome.checked()[:number].to(x_T.dtype)


class _Tape:
    """A recording, and the memory that it reads its inputs from."""

    def __init__(self, loop: Callable[..., Outcome], inputs: tuple, record: Callable[[Loop, torch.device], Loop]):
        self.inputs = tree_map_only(Tensor, torch.clone, inputs)
        self.replay = record(lambda: loop(*self.inputs), inputs[1].device)

    def play(self, inputs: tuple) -> Outcome:
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        return Outcome(*(result.clone() for result in self.replay()))


def _loop(sampler: PlannedSampler, model: Model, plan: tuple, x: Tensor, conditions: dict[str, Any]) -> Outcome:
    velocity = Evaluations(model, conditions)
    return velocity.outcome(sampler.follow(plan, velocity, x, model.field))


def _kind(x: Tensor, conditions: dict[str, Any]) -> tuple:
    """What inputs have in common in all batches of a kind: of tensors (B, ...) all but B, of others all but values."""

    def of_tensor(value: Tensor, of_each: bool) -> tuple:
        return of_each, value.shape[1:] if of_each else value.shape, value.dtype, value.device

    kind = [of_tensor(x, True)]
    for name, condition in sorted(conditions.items()):
        leaves, structure = tree_flatten(condition)
        for leaf in leaves:
            if not isinstance(leaf, Tensor | PLAIN):
                found = f"condition {name} has a {type(leaf).__name__}"
                raise UserError(f"{found}, expected tensors, numbers and text; try compile=false")
        kind.append((name, structure))
        kind += [
            of_tensor(leaf, is_of_points(condition, len(x))) if isinstance(leaf, Tensor) else (type(leaf), leaf)
            for leaf in leaves
        ]
    return tuple(kind)
