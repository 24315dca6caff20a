"""Samples from seeds: the same whatever the batches; failures that say where."""

import math

import pytest
import torch
from problems import mixture

from diffusion.fields import gravity, variance_exploding
from diffusion.samplers import Adaptive, Heun, generate

BUILD = {"variance_exploding": variance_exploding, "gravity": lambda: gravity(2)}


@pytest.mark.parametrize("name", BUILD)
class TestSeeds:
    def samples(self, name, number=10, **options):
        return generate(mixture(BUILD[name]()), (number, 2), Heun(12), **options)

    @pytest.mark.parametrize("batch_size", [1, 7, 10, 100])
    def test_batch_size_does_not_matter(self, name, batch_size):
        torch.testing.assert_close(self.samples(name, batch_size=batch_size), self.samples(name), rtol=0, atol=1e-6)

    def test_fewer_samples_are_the_first_of_more(self, name):
        torch.testing.assert_close(self.samples(name, 10)[:5], self.samples(name, 5), rtol=0, atol=1e-6)

    def test_seeds_differ_and_so_do_samples(self, name):
        first, again, second = (self.samples(name, seed=seed) for seed in (0, 0, 1))
        assert first.equal(again)
        assert not torch.isclose(first, second, atol=1e-4).all(1).any()
        assert (torch.cdist(first, first) + torch.eye(10)).min() > 1e-4

    def test_results_are_single_precision_on_the_cpu(self, name):
        x = self.samples(name)
        assert x.dtype == torch.float32
        assert x.device.type == "cpu"
        assert x.shape == (10, 2)

    def test_global_randomness_is_neither_used_nor_changed(self, name):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = self.samples(name)
        assert torch.get_rng_state().equal(state)
        torch.manual_seed(2)
        assert first.equal(self.samples(name))


class Recorded:
    """Falls straight onto the label, and remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self):
        self.field, self.labels = variance_exploding(), []

    def velocity(self, x, t, label=None):
        self.labels.append(label)
        target = torch.zeros_like(x) if label is None else label.double()[:, None].expand_as(x)
        assert t.shape == x.shape[:1]
        return (x - target) / t[:, None]


def test_each_sample_gets_its_label():
    label = torch.arange(7)
    x = generate(Recorded(), (7, 2), Heun(5), label=label, batch_size=3)
    torch.testing.assert_close(x, label.float()[:, None].expand(7, 2), rtol=0, atol=1e-5)


def test_no_label_is_passed_where_none_is_given():
    model = Recorded()
    generate(model, (2, 2), Heun(3))
    assert set(model.labels) == {None}


class Broken:
    """Sample 3 of its batch has no velocity below t = 1."""

    device = torch.device("cpu")

    def __init__(self, value):
        self.field, self.value = variance_exploding(), value

    def velocity(self, x, t):
        v = x / t[:, None]
        if t[0] < 1:
            v[3, 1] = self.value
        return v


@pytest.mark.parametrize("sampler", [Heun(8), Adaptive()], ids=["heun", "adaptive"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_is_reported_with_its_sample_and_time(sampler, value, user_error):
    with user_error("sample 3", "not finite", "t=0.") as _:
        sampler(Broken(value), torch.ones(5, 2))


@pytest.mark.parametrize(("number", "batch_size"), [(0, None), (-2, None), (3, 0), (3, -1)])
def test_impossible_numbers_of_samples_are_refused(number, batch_size, user_error):
    with user_error(f"{number} samples", f"batches of {batch_size}"):
        generate(mixture(variance_exploding()), (number, 2), Heun(3), batch_size=batch_size)
