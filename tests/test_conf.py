"""Every file of conf/ composes and builds what it promises."""

import inspect
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion import Generator
from diffusion.fields import Field
from diffusion.fokker_planck import problems
from diffusion.fokker_planck.runs import Recipe
from diffusion.gradient_flow import Flow, Functional
from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.objectives import FieldMatching
from diffusion.samplers import Multistep, Sampler, Tuned, store_tuned
from diffusion.trainer import Trainer

CONF = Path(__file__).parents[1] / "conf"
SHAPES = {"digits": [1, 8, 8], "mnist": [1, 28, 28], "cifar10": [3, 32, 32], "toy2d": [2]}
FILES = sorted(CONF.glob("*/*.yaml"))
TUNED = CONF / "sampler/tuned.yaml"  # only for checkpoints that have been tuned
DENSITY = ("problem", "solver")  # groups of scripts/fokker_planck.py
OWN = {"own": ["field._target_=diffusion.fields.variance_exploding"]}  # what the choices for one's own leave open


def read(*overrides, command="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, overrides=list(overrides))


def build(config):
    return hydra.utils.instantiate(config, _convert_="all")


def build_all(config, shape):
    """Everything but the data, on the meta device: large networks take no memory."""
    config.shape, config.dim, config.num_classes = shape, torch.Size(shape).numel(), 0
    OmegaConf.resolve(config)
    with torch.device("meta"):
        network = build(config.model)
    options = {key: value for key, value in config.trainer.items() if key != "devices"}
    make = build(config.objective)
    generator = (
        OneStepGenerator(network, shape) if make.func is Chase else Generator(build(config.field), network, shape)
    )
    return generator, make(generator), build(config.sampler), build(options)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").iterdir()))
def test_every_experiment_builds(name):
    config = read(f"experiment={name}")
    generator, objective, sampler, trainer = build_all(config, SHAPES[name.split("_")[0]])
    assert isinstance(sampler, Sampler) and isinstance(trainer, Trainer)
    if isinstance(objective, Chase):
        assert isinstance(objective.functional(torch.zeros(2, 3)), Functional)
    else:
        assert isinstance(generator.field, Field) and isinstance(objective, FieldMatching)
    with torch.device("meta"):
        x = torch.zeros(2, *generator.shape)
        assert generator.network(x, torch.zeros(2, 2)).shape == x.shape


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.parent.name not in ("experiment", "flow", *DENSITY) and path != TUNED],
    ids=lambda path: path.stem,
)
def test_every_choice_builds_in_the_default_experiment(path):
    group, name = path.parent.name, path.stem
    config = read(f"{group}={name}", *OWN.get(name, []))
    if group == "data":
        assert config.data._target_.startswith("diffusion.data.")
    else:
        build_all(config, [2] if name == "mlp" else [1, 8, 8])


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in DENSITY], ids=lambda path: path.stem)
def test_every_problem_and_solver_builds(path):
    group, name = path.parent.name, path.stem
    own = [f"problem._target_={problems.__name__}.double_well"] if name == "own" else []
    config = read(f"{group}={name}", *own, command="fokker_planck")
    OmegaConf.resolve(config)
    assert isinstance(build(config.problem), problems.Problem)
    assert isinstance(build(config.solver), Recipe)
    if group == "problem" and name != "own":
        options = {key: value for key, value in config.problem.items() if key != "_target_"}
        defaults = inspect.signature(getattr(problems, name)).parameters
        assert options == {key: value.default for key, value in defaults.items() if key != "start"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "flow").iterdir()))
def test_every_flow_takes_a_step(name):
    config = read(f"flow={name}", command="flow").flow
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    flow = build(config.geometry)(build(config.functional)(data=data))
    assert isinstance(flow, Flow)
    particles = 1 + torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    moved = flow.run(particles, 1, config.step_size, torch.Generator().manual_seed(2))
    assert moved.shape == particles.shape and not torch.equal(moved, particles)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "field").iterdir()))
def test_every_field_is_the_same_in_all_commands(name):
    """And moves data points of the size that it was built for."""
    assert read(f"field={name}").field == read(f"field={name}", command="validate").field
    config = read(f"field={name}", *OWN.get(name, []), command="validate")
    config.shape, config.dim = [1, 8, 8], 64
    field = build(config.field)
    x0 = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    x = field.sample(x0, field.horizon, torch.Generator().manual_seed(0))
    assert field.velocity(x, field.horizon, x0).shape == x0.shape
    assert 0 < field.t_min < 0.01 * field.horizon


def test_command_line_wins_over_the_experiment():
    config = read("experiment=digits_flow", "field=pfgmpp", "trainer.steps=7", "data=mnist")
    assert config.field._target_ == "diffusion.fields.pfgmpp"
    assert config.trainer.steps == 7
    assert config.data._target_ == "diffusion.data.torchvision_set"


def test_trainer_options_are_the_trainers_own():
    """The defaults of conf/ and of Python are the same, so that neither can drift."""
    options = OmegaConf.to_container(read().trainer, resolve=True)
    options.pop("_target_"), options.pop("devices")
    assert Trainer(**options) == Trainer()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_says_when_to_choose_it(path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# Choose it ") and first.endswith(".")


def test_commands_share_the_samplers():
    for command in ("sample", "evaluate"):
        config = read("checkpoint=somewhere", "sampler=adaptive", "sampler.rtol=0.5", command=command)
        assert build(config.sampler).rtol == 0.5


def test_a_tuned_sampler_is_that_of_the_checkpoint(tmp_path):
    store_tuned(tmp_path, Tuned(Multistep(6, 2), 0.1, 0.2))
    for command in ("sample", "evaluate"):
        config = read(f"checkpoint={tmp_path}", "sampler=tuned", "sampler.nfe=6", command=command)
        assert build(config.sampler) == Multistep(6, 2)


def test_nothing_in_the_package_reads_configurations():
    sources = [path.read_text() for path in Path(CONF.parent, "diffusion").rglob("*.py")]
    assert len(sources) > 20
    assert not any(word in source for source in sources for word in ("import hydra", "from hydra", "omegaconf"))
