"""The loop, on models small enough to follow by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from diffusion import UserError, checkpoints
from diffusion.data import TensorData
from diffusion.ema import EMA
from diffusion.randomness import derive_seed, example_order
from diffusion.trainer import Trainer


class Regressor(nn.Module):
    """Has dropout and a 4-d weight in another memory layout, the two things that an inexact resume gets wrong."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(8, 2, 3, padding=1)
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.layers(x)


def denoise(network, batch):
    noise = torch.randn(batch.x.shape, generator=batch.generator)
    return (network(batch.x + noise) - batch.x).square()


def image_data(number=50):
    values = torch.randint(0, 256, (number, 2, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TensorData(values)


def regressor(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Regressor()


def options(**changes):
    return Trainer(**{"steps": 24, "batch_size": 16, "warmup": 4, "checkpoint_every": 8, "device": "cpu", **changes})


class Killed(Exception):
    pass


def kill_at(wanted):
    def callback(step, module):
        if step == wanted:
            raise Killed

    return callback


def weights(folder):
    return {name: checkpoints.read_tensors(folder, name) for name in ("model", "training")}


def assert_identical(first, second):
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), (name, key)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_ends_with_identical_bits(tmp_path, accumulate):
    trainer = options(accumulate=accumulate)
    trainer.fit(regressor(), denoise, image_data(), tmp_path / "whole", image_data(20))
    for place, module in [(8, regressor()), (16, regressor(1))]:  # what is resumed does not depend on the fresh weights
        resume = tmp_path / "cut" / "last" if place == 16 else None
        with pytest.raises(Killed):
            callbacks = [kill_at(place)]
            trainer.fit(module, denoise, image_data(), tmp_path / "cut", image_data(20), resume, callbacks=callbacks)
    average = trainer.fit(
        regressor(2), denoise, image_data(), tmp_path / "cut", image_data(20), tmp_path / "cut" / "last"
    )
    for name in ("last", "best"):
        assert_identical(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))
    stored = checkpoints.read_tensors(tmp_path / "whole" / "last", "model")
    assert all(torch.equal(value, stored[key]) for key, value in average.state_dict().items())


def test_resuming_with_other_options_says_so(tmp_path):
    options(steps=8).fit(regressor(), denoise, image_data(), tmp_path)
    with pytest.warns(UserWarning, match="options: steps 8 -> 16, learning_rate 0.001 -> 0.01; it is not the same"):
        changed = options(steps=16, learning_rate=0.01, log_every=3)
        changed.fit(regressor(), denoise, image_data(), tmp_path, resume=tmp_path / "last")


def test_whole_run_depends_on_the_seed_and_not_on_the_global_one(tmp_path):
    ends = []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        options(seed=seed).fit(regressor(), denoise, image_data(), tmp_path / "run")
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(weights(tmp_path / "run" / "last"))
    assert_identical(ends[0], ends[1])
    assert not torch.equal(*(end["model"]["layers.0.weight"] for end in ends[1:]))


def test_accumulated_parts_make_the_same_step_as_the_whole_batch(tmp_path):
    def plain(network, batch):
        return (network(batch.x) - batch.x).square()

    ends = []
    for accumulate in (1, 4):
        module = regressor()
        module.layers[2].p = 0.0  # dropout draws anew in each part
        options(accumulate=accumulate).fit(module, plain, image_data(), tmp_path / "run")
        ends.append(module.layers[0].weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_first_step_is_clipped_adam(tmp_path):
    """Adam's first step is the learning rate times the sign of the gradient, whatever the clipping."""
    module, start = regressor(), regressor()
    trainer = options(steps=1, warmup=10, learning_rate=1e-2, clip=1e-3)
    logged = []
    trainer.fit(module, denoise, image_data(), tmp_path, log=lambda step, values: logged.append(values))
    moved = (module.layers[0].weight - start.layers[0].weight).abs()
    assert moved.quantile(0.1).item() == pytest.approx(1e-3, rel=0.02)  # the smallest gradients feel epsilon
    assert logged[0]["gradient_norm"] > 1e-2  # before clipping
    moments = checkpoints.read_tensors(tmp_path / "last", "training")
    norm = math.sqrt(sum(v.square().sum().item() for k, v in moments.items() if ".exp_avg." in k)) / 0.1
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_learning_rate_warms_up_and_decays_along_a_cosine():
    trainer = options(steps=110, warmup=10, learning_rate=2.0, final_rate=0.1)
    rates = [trainer.learning_rate_at(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[110] == pytest.approx(0.2)


def test_average_follows_its_recursion():
    module = nn.Linear(1, 1, bias=False)
    average, expected = EMA(module, decay=0.9), module.weight.item()
    for step in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(math.sin(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert module.weight.item() == pytest.approx(math.sin(199))


def test_checkpoint_holds_the_average_and_not_the_last_weights(tmp_path):
    module = regressor()
    average = options().fit(module, denoise, image_data(), tmp_path)
    stored = checkpoints.read_tensors(tmp_path / "last", "model")["layers.0.weight"]
    assert torch.equal(stored, average.layers[0].weight)
    assert not torch.equal(stored, module.layers[0].weight)
    assert not average.training


def test_best_is_the_checkpoint_of_lowest_test_loss(tmp_path):
    """A task that gets worse after step 8: `best` stays there."""
    module, steps = nn.Linear(1, 1), []

    def objective(network, batch):
        if not network.training:
            return torch.full((len(batch.x), 1), float([3, 1, 2][len(steps) - 1]))
        return network(batch.x.flatten(1)[:, :1]).square()

    trainer, data = options(), TensorData(torch.zeros(20, 1))

    def log(step, values):
        if "loss" in values and step % 8 == 0:
            steps.append(step)

    trainer.fit(module, objective, data, tmp_path, data, log=log)
    assert checkpoints.read_description(tmp_path / "best")["step"] == 16
    assert checkpoints.read_description(tmp_path / "best")["best_test_loss"] == 1.0
    assert checkpoints.read_description(tmp_path / "last")["step"] == 24


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    calls = []

    def objective(network, batch):
        calls.append(1)
        return denoise(network, batch) * (math.nan if len(calls) == 11 else 1.0)

    with pytest.raises(UserError, match=r"not finite at step 11; the last good checkpoint is .*learning_rate") as error:
        options().fit(regressor(), objective, image_data(), tmp_path)
    assert "\n" not in str(error.value)
    assert checkpoints.read_description(tmp_path / "last")["step"] == 8
    assert all(value.isfinite().all() for value in checkpoints.read_tensors(tmp_path / "last", "training").values())


def test_infinite_gradient_of_a_finite_loss_is_caught(tmp_path):
    def objective(network, batch):
        return (network(batch.x).flatten(1)[:, :1] * 0).sqrt()  # 0, with an infinite slope

    with pytest.raises(UserError, match="not finite at step 1; there is no checkpoint yet"):
        options().fit(regressor(), objective, image_data(), tmp_path)


def test_each_epoch_shows_each_example_once():
    order = torch.cat(list(example_order(number=10, batch_size=4, seed=0, first_step=0, steps=5)))
    first, second = order[:10], order[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(10))
    later = torch.cat(list(example_order(number=10, batch_size=4, seed=0, first_step=3, steps=5)))
    assert torch.equal(order[12:], later)
    assert not torch.equal(order, torch.cat(list(example_order(10, 4, seed=1, first_step=0, steps=5))))
    assert len(next(example_order(number=3, batch_size=8, seed=0, first_step=0, steps=1))) == 8


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many', expected a value of type int"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"precision": "fp8"}, "precision is 'fp8', expected no or bf16"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, expected 0 or more"),
        ({"accumulate": 3}, "batch_size is 16, expected a multiple"),
    ],
)
def test_bad_options_are_named(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        options(**changes).fit(regressor(), denoise, image_data(), tmp_path)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    options(steps=1).fit(regressor(), denoise, image_data(), tmp_path / "run")
    other = regressor()
    other.layers[0] = nn.Conv2d(2, 9, 3, padding=1)
    with pytest.raises(UserError, match=r"another architecture: it holds \(8, 2, 3, 3\) for layers.0.weight"):
        options().fit(copy.deepcopy(other), denoise, image_data(), tmp_path / "new", resume=tmp_path / "run" / "last")
