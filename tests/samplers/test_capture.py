"""Loops that a CUDA graph can hold, and what records and replays them. A sampler that has a plan joins PLANNED."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import FIELDS, names
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from diffusion import Generator
from diffusion.fields import gravity, linear, radial_gravity, variance_exploding
from diffusion.networks import MLP, UNet
from diffusion.samplers import Captured, Counted, Euler, Heun, Multistep, RungeKutta, capture, generate
from diffusion.samplers.base import Evaluations, Outcome

PLANNED = {
    "euler": Euler(4),
    "heun": Heun(4),
    "runge_kutta": RungeKutta(3),
    "runge_kutta_4": RungeKutta(3, order=4),
    "multistep": Multistep(4),
    "multistep_refined": Multistep(6, order=3, corrector=False),
    "multistep_denoised": Multistep(4, denoise=True),
}
EVALUATIONS = {
    "euler": 4,
    "heun": 7,
    "runge_kutta": 7,
    "runge_kutta_4": 9,
    "multistep": 4,
    "multistep_refined": 6,
    "multistep_denoised": 4,
}
every_sampler = pytest.mark.parametrize("name", PLANNED)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def prior(field, number, shape=(2,), seed=0):
    return field.sample_prior((number, *shape), torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(field, shape, seed=0, **options):
    """A generator with random weights."""
    torch.manual_seed(seed)
    net = MLP(shape, width=16, depth=1, **options) if len(shape) == 1 else UNet(shape, channels=8, **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Generator(field, net, shape).eval().requires_grad_(False)


class Waits(TorchDispatchMode):
    """The operations that make the host wait for the device, or the device for the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        devices = {value.device.type for value in tree_leaves((args, result)) if isinstance(value, torch.Tensor)}
        moved = ("copy" in name or "lift" in name) and devices != {"meta"}
        if moved or "lift_fresh" in name or "_local_scalar" in name:
            self.found.append(name)
        return result


def waits(sampler, generator, x, **conditions):
    """Those in the loop, on the device "meta", which has no values that one could ask for."""
    plan = sampler.plan(generator, x)
    model = copy.deepcopy(generator).to("meta")
    plan, x, conditions = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (plan, x, conditions))
    velocity = Evaluations(model, conditions)
    with torch.no_grad(), Waits() as mode:
        outcome = velocity.outcome(sampler.follow(plan, velocity, x, model.field))
    assert outcome.x_0.shape == x.shape
    return mode.found


@pytest.mark.parametrize("case", **names(FIELDS))
def test_the_loop_of_a_generator_waits_for_nothing(case):
    field = case.build()
    assert waits(Multistep(2), network(field, (case.dim,)), prior(field, 3, (case.dim,))) == []


@every_sampler
def test_the_loop_of_each_sampler_waits_for_nothing(name):
    field, label = gravity(2), torch.tensor([0, 2, 1])
    assert waits(PLANNED[name], network(field, (2,), num_classes=3), prior(field, 3), label=label) == []


def test_the_loop_of_an_image_network_waits_for_nothing():
    field, shape, label = gravity(64), (1, 8, 8), torch.tensor([0, 2, 1])
    assert waits(Multistep(2), network(field, shape, num_classes=3), prior(field, 3, shape), label=label) == []


class Impatient(Generator):
    """Asks for a value, or makes one."""

    def velocity(self, x, t, label=None):
        if label is not None and bool(label.sum() > 0):
            return x
        return x * torch.tensor([2.0], device=x.device)


def test_waiting_is_found():
    x = prior(linear(), 3)
    model = Impatient(linear(), MLP((2,), width=8, depth=1), (2,))
    assert waits(Euler(3), model, x)
    with pytest.raises(RuntimeError, match="meta"):
        waits(Euler(3), model, x, label=torch.tensor([0, 1, 2]))


class Curve:
    """A velocity of one line; the endpoint of its field is one too."""

    data_std = 0.5

    def __init__(self, field):
        self.field = field

    def velocity(self, x, t):
        return x / t[:, None] * (1 + 0.1 * torch.sin(x))


@every_sampler
@pytest.mark.parametrize("field", [radial_gravity(2), gravity(2)], ids=["one_plan", "own_plans"])
def test_the_loop_has_no_branches(name, field):
    """Traced whole: a graph break, as any decision by a value makes, is an error."""
    sampler, x, model = PLANNED[name], prior(field, 3), Curve(radial_gravity(2))

    def loop(plan, x):
        velocity = Evaluations(model, {})
        return velocity.outcome(sampler.follow(plan, velocity, x, model.field))

    plan = sampler.plan(Curve(field), x)
    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(loop, fullgraph=True, backend="eager")(plan, x)
        for mine, expected in zip(traced, loop(plan, x), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


class Recorder:
    """What a CUDA graph is, on a CPU: the operations of one run, done again on the same memory without its code."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, loop, device):
        self.recordings += 1
        loop()
        graph = make_fx(loop)()
        kept = [value.clone() for value in graph()]

        def replay():
            for mine, new in zip(kept, graph(), strict=True):
                mine.copy_(new)
            return Outcome(*kept)

        return replay


@pytest.mark.parametrize("name", ["euler", "multistep"])
def test_replays_give_the_same_samples_of_a_generator(name):
    model, record = network(gravity(2), (2,), num_classes=3), Recorder()
    label = torch.arange(13) % 3
    plain, captured = (
        generate(model, (13, 2), sampler, seed=1, label=label, batch_size=5)
        for sampler in (PLANNED[name], Captured(PLANNED[name], record))
    )
    torch.testing.assert_close(captured, plain, rtol=0, atol=1e-5)  # the network is single precision
    assert record.recordings == 1


@every_sampler
def test_replays_are_exact(name):
    """Heavy tails: the plan is another for each batch."""
    model = Curve(gravity(2))
    captured = Captured(PLANNED[name], Recorder())
    for seed, number in enumerate([4, 4, 4, 3, 1, 4]):
        x = prior(model.field, number, seed=seed)
        torch.testing.assert_close(captured(model, x), PLANNED[name](model, x), rtol=1e-12, atol=1e-12)


@every_sampler
def test_evaluations_are_counted_in_replays(name):
    field = variance_exploding()
    model, captured = Counted(Curve(field)), Captured(PLANNED[name], Recorder())
    for calls, number in enumerate([3, 3, 3, 2], start=1):
        captured(model, prior(field, number))
        assert model.evaluations == calls * EVALUATIONS[name]
        assert model.points == sum([3, 3, 3, 2][:calls]) * EVALUATIONS[name]


def test_results_are_not_overwritten():
    field = variance_exploding()
    model, captured, x = Curve(field), Captured(Heun(4), Recorder()), prior(field, 3)
    kept = [captured(model, x * factor) for factor in (1, 2, 3, 4)]
    for factor, x_0 in enumerate(kept, start=1):
        torch.testing.assert_close(x_0, Heun(4)(model, x * factor))


class Labelled(Curve):
    def velocity(self, x, t, label=None, shift=0.0):
        target = shift if label is None else shift + label.to(x)[:, None]
        return (x - target) / t[:, None]


def test_what_makes_a_new_recording():
    """Each kind is sampled once without; whatever comes, samples are those of the sampler itself."""
    field = variance_exploding()
    model, other, record = Labelled(field), Labelled(field), Recorder()
    captured, sampler = Captured(Heun(3), record), Heun(3)

    def sample(recordings, number=4, dims=2, model=model, dtype=torch.float64, **conditions):
        x = prior(field, number, (dims,)).to(dtype)
        x_0 = captured(model, x, **conditions)
        torch.testing.assert_close(x_0, sampler(model, x, **conditions))
        assert x_0.dtype == dtype
        assert record.recordings == recordings

    label = torch.arange(6)
    sample(0)
    sample(0, number=3)  # there is no recording yet, and this would not fill it
    sample(1)
    sample(1, number=1)
    sample(1, dtype=torch.float32)  # states are double precision anyway
    sample(1, number=5)
    sample(2, number=5)
    sample(2, dims=3)
    sample(3, dims=3)
    sample(3, dims=3, model=other)
    sample(4, dims=3, model=other)
    sample(4, label=label[:4])
    sample(5, label=label[2:])
    sample(5, number=2, label=label[:2])
    sample(5, label=label[:4].int())
    sample(5, shift=1.0)
    sample(6, shift=1.0)
    sample(6, shift=2.0)
    sample(6, shift=torch.tensor(1.0))
    shift = torch.tensor(2.0)
    sample(7, shift=shift)
    sample(7, shift=torch.tensor(3.0), number=2)
    assert shift == 2  # the recording has memory of its own


class Told(Curve):
    def velocity(self, x, t, shift=(0.0,), more=None):
        more = more or {}
        return (x - shift[0] - more.get("a", 0) * more.get("b", 1)) / t[:, None]


def test_conditions_that_change_within_are_new():
    model, record, x = Told(variance_exploding()), Recorder(), prior(variance_exploding(), 4)
    captured, sampler, shift, more = Captured(Heun(3), record), Heun(3), [1.0], {"a": torch.tensor([1.0, 2.0]), "b": 2}

    def sample(recordings):
        torch.testing.assert_close(
            captured(model, x, shift=shift, more=more), sampler(model, x, shift=shift, more=more)
        )
        assert record.recordings == recordings

    for recordings in (0, 1, 1):
        sample(recordings)
    shift[0] = 5.0
    sample(1)
    sample(2)
    more["a"] = torch.tensor([3.0, -1.0])
    sample(2)
    more["a"].add_(1)
    sample(2)
    more["b"] = 2.0
    sample(2)
    sample(3)


@pytest.mark.parametrize("value", [np.ones(2), [object()]], ids=["array", "object"])
def test_conditions_that_could_change_unnoticed_are_refused(value, user_error):
    with user_error("condition shift has a", type(value[0] if isinstance(value, list) else value).__name__):
        Captured(Heun(3), Recorder())(Told(variance_exploding()), prior(variance_exploding(), 4), shift=value)


def test_conditions_are_moved_to_the_device_of_the_states(monkeypatch):
    """One on a CPU would be a constant of the graph."""
    seen = []

    def kind(x, conditions):
        seen.append((x.device.type, conditions["shift"].device.type, conditions["more"]["a"].device.type))
        raise KeyboardInterrupt

    monkeypatch.setattr(capture, "_kind", kind)
    x = torch.ones(4, 2, dtype=torch.float64, device="meta")
    with pytest.raises(KeyboardInterrupt):
        Captured(Heun(3))(Told(linear()), x, shift=torch.tensor(1.0), more={"a": torch.ones(2)})
    assert seen == [("meta", "meta", "meta")]


@on_cuda
def test_conditions_on_the_cpu_are_read_anew():
    model, captured = Labelled(variance_exploding()), Captured(Heun(3))
    x = prior(model.field, 4).cuda()
    for value in (1.0, 2.0, 3.0):
        shift = torch.tensor(value)
        torch.testing.assert_close(captured(model, x, shift=shift), Heun(3)(model, x, shift=shift))


class Breaks(Curve):
    """Sample 2 of its batch has no velocity below t = 1, sample 0 none a little later."""

    def velocity(self, x, t):
        v = super().velocity(x, t)
        late = torch.arange(len(x), device=x.device) == 0
        bad = (t < 1) & (torch.arange(len(x), device=x.device) == 2) | (t < 0.5) & late
        return v.masked_fill(bad[:, None] & self.on, math.nan)


@every_sampler
def test_the_first_velocity_that_is_not_finite_is_reported(name, user_error):
    model = Breaks(variance_exploding())
    model.on = torch.tensor([False, True])
    watched = []

    class Watching(Breaks):
        def velocity(self, x, t):
            watched.append(float(t[0]))
            return super().velocity(x, t)

    watching = Watching(model.field)
    watching.on = torch.tensor([False, False])
    x = prior(model.field, 4)
    PLANNED[name](watching, x)
    first = next(t for t in watched if t < 1)
    expected = "sample 0" if first < 0.5 else "sample 2"
    captured = Captured(PLANNED[name], Recorder())
    for sampler in (PLANNED[name], captured):
        with user_error("velocity", expected, "not finite", f"t={first:.4g};"):
            sampler(model, x)
    model.on.fill_(False)
    captured(model, x)
    model.on.fill_(True)
    for number in (4, 3):
        with user_error("velocity", expected, "not finite", f"t={first:.4g};"):
            captured(model, x[:number])
    model.on.fill_(False)
    assert captured(model, x).isfinite().all()


def test_the_batch_with_a_velocity_that_is_not_finite_is_named(user_error):
    model = network(gravity(2), (2,), num_classes=2)
    model.network.register_forward_hook(lambda module, inputs, output: output / (1 - inputs[2].view(-1, 1)))
    label = torch.tensor([0, 0, 0, 0, 0, 1])
    for size, found in ((3, "in the batch from sample 3 on, velocity of sample 2"), (6, "velocity of sample 5")):
        with user_error(found):
            generate(model, (6, 2), Euler(3), label=label, batch_size=size)


def test_a_captured_sampler_is_called_as_the_sampler():
    assert str(Captured(Heun(5))) == str(Heun(5))


@on_cuda
@every_sampler
@pytest.mark.parametrize("field", [variance_exploding(), gravity(2)], ids=["variance_exploding", "gravity"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_cuda_graphs_give_the_same_samples(name, field, compiled):
    model = network(field, (2,), num_classes=3).cuda()
    label = torch.arange(18) % 3
    plain = generate(model, (18, 2), PLANNED[name], seed=1, label=label, batch_size=5)
    if compiled:
        model.network.compile()
    counted, captured = Counted(model), Captured(PLANNED[name])
    for _ in range(2):
        counted.evaluations = 0
        x = generate(counted, (18, 2), captured, seed=1, label=label, batch_size=5)
        torch.testing.assert_close(x, plain, rtol=0, atol=1e-4)
        assert counted.evaluations == 4 * EVALUATIONS[name]


@on_cuda
def test_a_loop_that_waits_is_refused(user_error):
    model = Impatient(linear(), MLP((2,), num_classes=3, width=8, depth=1), (2,)).cuda().eval()
    with user_error("CUDA graph", "compile=false"):
        generate(model, (8, 2), Captured(Euler(3)), label=torch.arange(8) % 3, batch_size=4)


@on_cuda
def test_cuda_graphs_report_velocities_that_are_not_finite(user_error):
    model, captured = Breaks(variance_exploding()), Captured(Heun(8))
    model.on = torch.tensor([False, False], device="cuda")
    x = prior(model.field, 4).cuda()
    for _ in range(3):
        captured(model, x)
    model.on.fill_(True)
    with user_error("sample 2", "not finite", "t=0."):
        captured(model, x)
