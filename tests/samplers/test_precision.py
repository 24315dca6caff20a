"""One call, whatever the precision of the network, compiled or not: the same samples within rounding."""

import copy

import pytest
import torch

from diffusion import Generator
from diffusion.fields import gravity, linear
from diffusion.networks import MLP
from diffusion.samplers import Counted, Heun, Multistep, RungeKutta, generate

FIELDS = {"linear": lambda: linear(2), "gravity": lambda: gravity(2)}
SAMPLERS = {"multistep": Multistep(8), "single steps": RungeKutta(4, 3), "heun": Heun(6)}


def generator(name):
    """With weights that are not those of a start, where the network is zero."""
    torch.manual_seed(0)
    made = Generator(FIELDS[name](), MLP((2,), width=32, depth=2), (2,))
    made.calibrate(torch.randn(200, 2, generator=torch.Generator().manual_seed(1)))
    for weight in made.network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
def test_single_and_double_precision_agree(name, sampler):
    single = generator(name)
    double = copy.deepcopy(single)
    double.network.double()
    torch.testing.assert_close(double.sample(6, sampler), single.sample(6, sampler), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_networks_are_compiled_once_for_all_steps_and_batches(name):
    plain = generator(name)
    compiled, graphs = copy.deepcopy(plain), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled.network.compile(backend=backend, fullgraph=True)
    for sampler in SAMPLERS.values():
        counted = [Counted(plain), Counted(compiled)]
        first, second = (generate(model, (8, 2), sampler, batch_size=4) for model in counted)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
        assert counted[0].evaluations == counted[1].evaluations
    assert len(graphs) == 1


def test_compiled_networks_have_likelihoods():
    """Many derivatives of one evaluation are taken."""
    plain = generator("linear")
    compiled = copy.deepcopy(plain)
    compiled.network.compile(backend="aot_eager")
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(compiled.log_likelihood(x), plain.log_likelihood(x), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_compiled_networks_give_the_same_samples(name):
    plain = generator(name)
    compiled = copy.deepcopy(plain)
    compiled.network.compile()
    torch.testing.assert_close(compiled.sample(6, Multistep(8)), plain.sample(6, Multistep(8)), rtol=0, atol=1e-5)
