"""Every file of conf/data says when to choose it and names every option of its loader with the loader's default."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import diffusion.data

FILES = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))
MANDATORY = {"name", "law", "path", "size"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_options_are_those_of_the_loader(file):
    assert file.read_text().startswith("# Choose it ")
    options = OmegaConf.to_container(OmegaConf.load(file))
    module, _, name = options.pop("_target_").rpartition(".")
    assert module == "diffusion.data" and name in diffusion.data.__all__
    parameters = inspect.signature(getattr(diffusion.data, name)).parameters
    assert list(options) == list(parameters)
    for key, parameter in parameters.items():
        assert options[key] == parameter.default or (parameter.default is parameter.empty and key in MANDATORY)


@pytest.mark.parametrize("name", ["digits", *diffusion.data.LAWS])
def test_data_that_need_no_file_instantiate(name):
    train, test, found = instantiate(OmegaConf.load(next(file for file in FILES if file.stem == name)))
    assert found == name and len(train) >= len(test) > 0


def test_the_groups_are_these():
    assert [file.stem for file in FILES] == sorted(
        [*diffusion.data.LAWS, "array", "cifar10", "cities", "digits", "fashion_mnist", "image_folder", "mnist"]
    )
