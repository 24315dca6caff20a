"""The one training loop. It knows nothing of what it trains: objective(module, batch) -> loss, not reduced.

Every step is a function of (weights, optimiser state, seed, step number): which examples it sees, and in what order,
and all its randomness are derived from the last two. A run that is resumed therefore continues exactly, and needs no
state of random number generators.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import adam, checkpoints, devices, specs
from diffusion.ema import EMA
from diffusion.errors import UserError
from diffusion.objectives import Batch, Objective
from diffusion.randomness import derive_seed, example_order

Log = Callable[[int, Mapping[str, float]], None]
Callback = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Trainer:
    """AdamW with warm-up and cosine decay, gradient clipping, EMA, checkpoints, exact resume.

    Args:
        steps: updates of the weights.
        batch_size: examples a step, over all processes and accumulated parts together.
        learning_rate: the highest; reached after warmup, then decaying along a half cosine to final_rate of it.
        warmup: steps of linear warm-up.
        final_rate: the last learning rate as a fraction of the highest.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; longer ones are scaled down to it.
        accumulate: parts into which each batch is split to save memory.
        ema_decay: see EMA.
        precision: "no" for float32 or "bf16" for mixed precision.
        device: "auto", "cpu", "cuda" or "mps".
        checkpoint_every: steps between checkpoints, which are also written at the end.
        log_every: steps between lines of metrics.
        test_examples: held-out examples on which the averaged weights are tested at each checkpoint; the lowest test
            loss so far is the checkpoint `best`.
        seed: of everything random.

    Raises:
        UserError: an option is out of its range.
    """

    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    final_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.999
    precision: str = "no"
    device: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 20
    test_examples: int = 1024
    seed: int = 0

    def __post_init__(self):
        may_be_zero = ("warmup", "final_rate", "weight_decay", "ema_decay", "seed")
        for option in fields(self):
            name, value, kind = option.name, getattr(self, option.name), option.type
            if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool):
                raise UserError(f"trainer.{name} is {value!r}, expected a value of type {kind.__name__}")
            if kind is not str and (value < 0 or (value == 0 and name not in may_be_zero)):
                least = "0 or more" if name in may_be_zero else "a positive number"
                raise UserError(f"trainer.{name} is {value}, expected {least}")
        if self.precision not in ("no", "bf16"):
            raise UserError(f"trainer.precision is {self.precision!r}, expected no or bf16")
        if not self.ema_decay < 1:
            raise UserError(f"trainer.ema_decay is {self.ema_decay}, expected a number below 1")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step` (0, 1, ...)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    def fit(
        self,
        module: nn.Module,
        objective: Objective,
        data,
        folder: str | Path,
        test_data=None,
        resume: str | Path | None = None,
        description: Mapping | None = None,
        log: Log = lambda step, metrics: None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> nn.Module:
        """Train `module` in place and return the copy with averaged weights, in evaluation mode.

        Args:
            data: has `__len__`, `to(device)` and `batches(order)` (see diffusion.data).
            folder: where the checkpoints `last` and `best` are written.
            test_data: held-out data, for `best`; without it there is no `best`.
            resume: a checkpoint to continue from.
            description: stored in each checkpoint, beside the specification of `module` under "model".
            log: called with (step, metrics), in the main process.
            callbacks: called with (step, averaged module) at each checkpoint, in the main process.
            progress: show a bar, in the main process.

        Raises:
            UserError: the loss stops being finite, a checkpoint cannot be read or written, the batch cannot be split.
        """
        description = {"model": specs.describe(module), **(description or {})}
        run = _Run(self, module, objective, data, Path(folder), test_data, description, log, callbacks, progress)
        return run.go(resume)


@dataclass
class _Run:
    """One call of `fit`: the state of the loop."""

    options: Trainer
    module: nn.Module
    objective: Objective
    data: object
    folder: Path
    test_data: object
    description: Mapping
    log: Log
    callbacks: Sequence[Callback]
    progress: bool = True
    step: int = 0
    best: float = math.inf
    bad_step: Tensor = field(init=False)

    def __post_init__(self):
        options = self.options
        self.accelerator = devices.accelerator(options.device, options.precision)
        self.device, world = self.accelerator.device, self.accelerator.num_processes
        if options.batch_size % (world * options.accumulate):
            raise UserError(
                f"trainer.batch_size is {options.batch_size}, expected a multiple of devices x accumulate = "
                f"{world} x {options.accumulate}"
            )
        self.module.to(self.device).train()
        self.ema = EMA(self.module, options.ema_decay)
        self.parameters = list(self.module.parameters())
        self.optimiser = adam.create(self.module, options.learning_rate, options.weight_decay)
        self.network = self.accelerator.prepare_model(self.module)
        self.data = self.data.to(self.device)
        if self.test_data is not None:
            self.test_data = self.test_data.to(self.device)
        self.bad_step = torch.full((), -1, device=self.device)

    def go(self, resume: str | Path | None) -> nn.Module:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            if resume is not None:
                self._load(Path(resume))
            self._loop()
        return self.ema.module

    def _loop(self) -> None:
        options, total = self.options, torch.zeros((), device=self.device)
        started, since = time.perf_counter(), self.step
        batches = self.data.batches(self._order())
        silent = not (self.progress and self.accelerator.is_main_process)
        with tqdm(total=options.steps, initial=self.step, unit="step", disable=silent) as bar:
            while self.step < options.steps:
                total += self._update(batches)
                self.step += 1
                self.ema.update(self.step)
                saving = self.step % options.checkpoint_every == 0 or self.step == options.steps
                if self.step % options.log_every == 0 or saving:
                    self._stop_if_bad()
                    now, steps = time.perf_counter(), self.step - since
                    metrics = {
                        "loss": self.accelerator.reduce(total / steps, "mean").item(),
                        "gradient_norm": self.norm.item(),
                        "images_per_second": steps * options.batch_size / (now - started),
                        "learning_rate": options.learning_rate_at(self.step - 1),
                    }
                    self._log(metrics)
                    speed = f"{metrics['images_per_second']:.0f}"
                    bar.set_postfix({"loss": f"{metrics['loss']:.4f}", "images/s": speed}, refresh=False)
                    total.zero_()
                    started, since = now, self.step
                bar.update()
                if saving:
                    self._checkpoint()
                    started = time.perf_counter()

    def _order(self) -> Iterator[Tensor]:
        """The indices of this process's part of each batch, one tensor for each part that is accumulated."""
        options, world = self.options, self.accelerator.num_processes
        for indices in example_order(len(self.data), options.batch_size, options.seed, self.step, options.steps):
            yield from indices.view(options.accumulate, world, -1)[:, self.accelerator.process_index]

    def _randomness(self, *parts: int | str) -> torch.Generator:
        """The generator for a step; the global one, which dropout uses, is seeded too."""
        seed = derive_seed(self.options.seed, "global", *parts)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond to record who called it
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        device = "cpu" if self.device.type == "mps" else self.device
        return torch.Generator(device).manual_seed(derive_seed(self.options.seed, *parts))

    def _update(self, batches: Iterator) -> Tensor:
        options, loss = self.options, torch.zeros((), device=self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate_at(self.step)
        randomness = self._randomness(self.step, self.accelerator.process_index)
        for part in range(options.accumulate):
            last = part == options.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.network):
                batch = Batch(*next(batches), randomness)
                part_loss = self.objective(self.network, batch).mean() / options.accumulate
                self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        self.norm = self.accelerator.clip_grad_norm_(self.parameters, options.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        bad = ~torch.isfinite(loss + self.norm) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, self.step, self.bad_step)
        if self.device.type == "cpu":  # elsewhere the question would wait for the device; it is asked when logging
            self._stop_if_bad()
        return loss

    def _stop_if_bad(self) -> None:
        if (step := int(self.bad_step)) >= 0:
            last = self.folder / "last"
            kept = f"the last good checkpoint is {last}" if checkpoints.exists(last) else "there is no checkpoint yet"
            raise UserError(
                f"the loss is not finite at step {step + 1}; {kept}; try a lower trainer.learning_rate, a longer "
                "trainer.warmup, a smaller trainer.clip or trainer.precision=no"
            )

    def _log(self, metrics: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.log(self.step, metrics)

    @torch.no_grad()
    def _test_loss(self) -> float:
        """The objective of the averaged weights on held-out examples, with the same randomness each time."""
        seed = derive_seed(self.options.seed, "test")
        order = torch.randperm(len(self.test_data), generator=torch.Generator().manual_seed(seed))
        parts = order[: self.options.test_examples].split(self.options.batch_size)
        randomness, total, count = self._randomness("test"), 0.0, 0
        for examples in self.test_data.batches(parts):
            loss = self.objective(self.ema.module, Batch(*examples, randomness))
            total, count = total + loss.mean().item() * len(examples.x), count + len(examples.x)
        return total / count

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            names = ["last"]
            if self.test_data is not None:
                test_loss = self._test_loss()
                self._log({"test_loss": test_loss})
                if test_loss < self.best:
                    self.best, names = test_loss, ["best", "last"]
            for name in names:  # `last` is written last: a run killed in between comes here again
                self._save(self.folder / name)
            for callback in self.callbacks:
                callback(self.step, self.ema.module)
        self.accelerator.wait_for_everyone()

    def _save(self, folder: Path) -> None:
        training = {f"weights.{key}": value for key, value in self.module.state_dict().items()}
        state = adam.state_tensors(self.module, self.optimiser)
        training |= {f"optimiser.{key}": value for key, value in state.items()}
        progress = {"step": self.step, "best_test_loss": self.best, "trainer": asdict(self.options)}
        tensors = {"model": self.ema.module.state_dict(), "training": training}
        checkpoints.write(folder, {**self.description, **progress}, tensors)

    def _load(self, folder: Path) -> None:
        description, training = checkpoints.read_description(folder), checkpoints.read_tensors(folder, "training")
        if other := specs.difference(description.get("model"), self.description["model"], "model"):
            raise UserError(f"checkpoint {folder} is of another architecture: {other}; resume it with its own options")

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in training.items() if key.startswith(prefix)}

        checkpoints.load_weights(self.ema.module, checkpoints.read_tensors(folder, "model"), folder)
        checkpoints.load_weights(self.module, part("weights."), folder)
        adam.restore(self.module, self.optimiser, part("optimiser."))
        self.step, self.best = checkpoints.read_step(folder), description["best_test_loss"]
        best, here = folder.parent / "best", self.folder / "best"
        if self.accelerator.is_main_process and checkpoints.exists(best) and not checkpoints.exists(here):
            checkpoints.copy(best, here)  # continued in another folder, the best so far comes along
        now = asdict(self.options) | {"data": self.description.get("data")}
        then = description["trainer"] | {"data": description.get("data")}
        free = ("device", "checkpoint_every", "log_every")
        differing = [key for key in now if key not in free and now[key] != then.get(key)]
        if differing:
            changes = ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in differing)
            warnings.warn(f"resuming with other options: {changes}; it is not the same run", stacklevel=2)
