"""What the commands share: errors as one line and exit status 2, pieces built from the configuration, processes."""

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import hydra
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException
from torch import Tensor

from diffusion import Generator, UserError, checkpoints, devices, specs
from diffusion.data import Splits
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.samplers import AdaptiveMultistep, Captured, Counted, PlannedSampler, Sampler, generate

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError, torch.OutOfMemoryError)


def command(config_name: str) -> Callable:
    """Make `main(config)` a command that composes conf/`config_name`.yaml with the overrides of the command line.

    The user's own modules, which options may name, are found where the command is run.
    What the user can put right ends in one line and exit status 2. Hydra's own switch, HYDRA_FULL_ERROR=1, shows the
    whole traceback instead.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        debugging = "HYDRA_FULL_ERROR" in os.environ
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors in its own way, over many lines

        @contextlib.contextmanager
        def one_line():
            try:
                yield
            except KeyboardInterrupt:
                sys.exit("interrupted; checkpoints are kept")
            except USER_ERRORS as error:
                if debugging:
                    raise
                with contextlib.suppress(OSError, ValueError, OmegaConfBaseException):
                    run_folder().rmdir()  # only if the run has left nothing in it
                if os.environ.get("RANK", "0") == "0":  # one line, not one a process
                    print(f"error: {_one_line(error)}", file=sys.stderr)
                sys.exit(2)

        @functools.wraps(main)
        def task(config: DictConfig) -> None:
            with one_line():
                main(config)

        @functools.wraps(main)
        def run() -> None:
            with one_line():
                warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of our source
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # torch about itself
                sys.path.append(os.getcwd())  # last, so that no file there hides an installed module
                sys.argv[1:] = map(_as_text, sys.argv[1:])
                hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)(task)()

        return run

    return decorate


def _as_text(argument: str) -> str:
    """`option=value`, with the value quoted where Hydra cannot read it as it is, such as tanh(r/t)^2."""
    option, equals, value = argument.partition("=")
    if not equals or option.startswith("-") or not re.search(r"[(^]", value) or re.search(r"""['"\\$\[{]""", value):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{option}='{value}'"
    return argument


def _one_line(error: BaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; give {error.full_key}=... on the command line"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; try a smaller batch_size, or a larger trainer.accumulate"
    if isinstance(error, InterpolationKeyError) and error.full_key == "sampler.checkpoint":
        return "sampler=tuned is for a checkpoint that scripts/tune.py has tuned; expected another sampler here"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        known = ", ".join(map(str, cause.parent_node)) if cause.parent_node is not None else "see --help"
        return f"unknown option {cause.full_key}; expected one of: {known}"
    if isinstance(error, InstantiationException) and isinstance(cause, UserError):
        return str(cause)
    return " ".join(str(error).split("Config search path")[0].split())


def expect(config: DictConfig, **kinds: type | UnionType) -> None:
    """Check the types of options that no class checks; int | None lets null pass.

    Raises:
        UserError: an option has a value of another type, or is too large a number.
    """
    for name, kind in kinds.items():
        allowed, value = get_args(kind) or (kind,), config[name]
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if type(value) not in (*allowed, *([int] if float in allowed else [])):
            shown = "null" if value is None else repr(value)
            raise UserError(f"{name} is {shown}, expected a value of type {allowed[0].__name__}")
        if type(value) is int and abs(value) >= 2**63:
            raise UserError(f"{name} is {value}, expected a number below 2^63")


def build(config: DictConfig, **extra):
    """The object that a group of the configuration describes, with the specification by which checkpoints keep it.

    Where the target takes a function, an option may name one of the user's own, such as field.cdf=my_module.psi.

    Raises:
        UserError: a module of the user's own cannot be imported, or lacks what an option names.
    """
    plain = config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=True)
    functions = _functions(plain)
    try:
        built = hydra.utils.instantiate(config, **functions, **extra, _convert_="all")
    except InstantiationException as error:
        if target := re.match(r"Error locating target '([^']+)'", str(error)):
            specs.locate(target[1])  # raises with what is wrong with it
        if isinstance(error.__cause__, TypeError):
            _check_kinds(plain)
        raise
    if not extra:
        specs.attach(built, plain | functions)
    return built


def _check_kinds(plain: dict) -> None:
    """Say which option is a word where its class wants a number, or the like.

    Raises:
        UserError: one is.
    """
    target = specs.locate(plain["_target_"])
    if not dataclasses.is_dataclass(target):
        return
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}
    for name, kind in get_type_hints(target).items():
        kinds, value = get_args(kind) or (kind,), plain.get(name)
        plainly = get_origin(kind) in (None, Union, UnionType) and all(kind in names for kind in kinds)
        if isinstance(value, dict) and "_target_" in value:
            _check_kinds(value)
        elif name in plain and plainly and type(value) not in (*kinds, *([int] * (float in kinds))):
            expected = " or ".join(names[kind] for kind in kinds)
            raise UserError(f"{target.__name__} has {name}={value!r}, expected {expected}")


def _functions(plain: dict) -> dict[str, Callable]:
    """The options that name a function, such as my_module.psi, where the target's parameter is a Callable."""
    named = {name: value for name, value in plain.items() if name != "_target_" and _is_path(value)}
    if not named:
        return {}
    parameters = inspect.signature(specs.locate(plain["_target_"])).parameters
    return {
        name: specs.locate(value)
        for name, value in named.items()
        if name in parameters and "Callable" in str(parameters[name].annotation)
    }


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "." in value and specs.DOTTED.fullmatch(value) is not None


def load(config: DictConfig) -> tuple[Generator | OneStepGenerator, Sampler | None]:
    """The generator of the option `checkpoint`, and the sampler of the option `sampler`, which a one-step one has not.

    With `compile` the network is compiled. On CUDA the loop of a sampler that has a plan is one CUDA graph, and with
    other samplers, and for one batch alone, which would end before its graph is made, the network is. With
    AdaptiveMultistep, whose batches shrink, none is: each size would need its own.
    """
    kinds = (Generator, OneStepGenerator)
    generator = checkpoints.restore(config.checkpoint, kinds, devices.pick(config.device), config.trust)
    graphs = generator.device.type == "cuda"
    if isinstance(generator, OneStepGenerator):
        refuse_choices("a one-step generator", "sampler")
        if config.compile:
            generator.network.compile(mode="reduce-overhead" if graphs else None)
        return generator, None
    sampler = build(config.sampler)
    if config.compile:
        whole = graphs and isinstance(sampler, PlannedSampler) and config.num_samples > config.batch_size
        each = graphs and not whole and not isinstance(sampler, AdaptiveMultistep)
        generator.network.compile(mode="reduce-overhead" if each else None)
        sampler = Captured(sampler) if whole else sampler
    return generator, sampler


def refuse_choices(subject: str, *groups: str) -> None:
    """Check that the command line chooses nothing in groups of options that `subject` has no use for.

    Raises:
        UserError: it does.
    """
    for option in hydra.core.hydra_config.HydraConfig.get().overrides.task:
        name = option.lstrip("+~").partition("=")[0]
        if name.partition(".")[0] in groups:
            raise UserError(f"{subject} has no {name.partition('.')[0]}, but {option} was given; leave it out")


def draw(
    generator: Generator | OneStepGenerator,
    sampler: Sampler | None,
    number: int,
    seed: int,
    label: Tensor | int | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[Tensor, float]:
    """`number` samples, and how often the network was evaluated for each."""
    if isinstance(generator, OneStepGenerator):
        return generator.sample(number, seed, label, batch_size, progress), 1
    counted, size = Counted(generator), (number, *generator.shape)
    x = generate(counted, size, sampler, seed, generator.labels(label, number), batch_size, progress)
    return x, counted.points / number


def checkpoint_data(config: DictConfig, generator: Generator | OneStepGenerator) -> Splits:
    """The data set of the option `data`, or else the one that the checkpoint was trained on.

    Raises:
        UserError: the checkpoint does not know it, or its shape is not the generator's.
    """
    trained_on = checkpoints.read_description(config.checkpoint).get("data")
    chosen = config.get("data")
    if not (chosen or trained_on):
        raise UserError(f"checkpoint {config.checkpoint} does not say what data it was trained on; give data=...")
    splits = build(chosen) if chosen else specs.build(trained_on, config.trust)
    if splits.train.shape != generator.shape:
        shapes = f"data {splits.name} has shape {splits.train.shape}, expected {generator.shape} as in the checkpoint"
        raise UserError(f"{shapes}; give other data=...")
    return splits


def run_folder() -> Path:
    """The folder of this run, as Hydra made it."""
    return Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)


def write_config(config: DictConfig, folder: Path) -> None:
    """The configuration with everything filled in, as config.yaml."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))


def launch(processes: int, overrides: list[str]) -> None:
    """Run this command again in `processes` processes on this machine and exit as they do; one failure ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    inherited = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    children = []
    for rank in range(processes):
        own = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        children.append(subprocess.Popen([sys.executable, *sys.argv, *overrides], env=inherited | own))
    status = 0
    while children and status == 0:
        for child in list(children):
            try:
                status = child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            children.remove(child)
            if status:
                break
    for child in children:
        child.terminate()
        child.wait()
    sys.exit(status)
