"""What every network must do, whatever its architecture. A new one joins NETWORKS and inherits all of it."""

import pytest
import torch

from diffusion.networks import MLP, UNet

NETWORKS = {
    "mlp": lambda shape, num_classes=0: MLP(shape, width=32, depth=2, num_classes=num_classes),
    "unet": lambda shape, num_classes=0: UNet(
        shape, channels=8, multipliers=(1, 2, 2), blocks=1, attention=(1, 2), num_classes=num_classes
    ),
}
SHAPES = [(1, 8, 8), (1, 7, 7), (3, 28, 28), (2, 5, 12), (1, 1, 1)]
CLASSES = 4

every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def awake(network, seed=0):
    """The network with every parameter drawn anew, so that no layer is silent because it starts at zero."""
    randomness = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=randomness) / fan_in**0.5)
    return network.eval()


def inputs(shape, number=6, seed=1):
    randomness = torch.Generator().manual_seed(seed)
    return torch.randn(number, *shape, generator=randomness), torch.randn(number, 2, generator=randomness)


@every_network
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_like_the_input(build, shape):
    x, noise = inputs(shape)
    for num_classes in (0, CLASSES):
        output = awake(build(shape, num_classes))(x, noise)
        assert output.shape == x.shape
        assert output.dtype == x.dtype
        assert output.isfinite().all()
        assert output.std() > 1e-3


@every_network
def test_a_fresh_network_adds_little_to_the_best_linear_estimate(build):
    """Its output starts near zero (the preconditioner's skip connection is the rest), whatever it is told."""
    x, noise = inputs((1, 8, 8))
    assert build((1, 8, 8))(x, noise).abs().max() < 0.5


@every_network
def test_no_label_is_the_label_unknown(build):
    network = awake(build((1, 8, 8), CLASSES))
    x, noise = inputs((1, 8, 8))
    assert network(x, noise).equal(network(x, noise, torch.full((6,), CLASSES)))


@every_network
def test_each_label_and_each_noise_feature_matters(build):
    network = awake(build((1, 8, 8), CLASSES))
    x, noise = inputs((1, 8, 8))
    outputs = [network(x, noise, torch.full((6,), label)) for label in range(CLASSES + 1)]
    outputs += [network(x, noise + torch.tensor(shift)) for shift in ([0.3, 0.0], [0.0, 0.3])]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).flatten(1).norm(dim=1).min() > 1e-3


@every_network
def test_labels_need_classes(build, user_error):
    network = build((1, 8, 8))
    with user_error("without classes"):
        network(*inputs((1, 8, 8)), torch.zeros(6, dtype=torch.long))


@every_network
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_gradient_reaches_every_parameter(build, num_classes):
    network = awake(build((1, 8, 8), num_classes)).train()
    label = torch.arange(6) % (CLASSES + 1) if num_classes else None
    x, noise = inputs((1, 8, 8))
    network(x, noise, label).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-7, name


@every_network
def test_a_fresh_network_learns_in_all_its_parts(build):
    """Layers that start at zero must not keep each other silent: after a few steps all parameters have moved."""
    network = build((1, 8, 8), CLASSES)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, noise = inputs((1, 8, 8))
    label = torch.arange(6) % (CLASSES + 1)
    for _ in range(5):
        optimiser.zero_grad()
        (network(x, noise, label) - x.flip(-1)).square().mean().backward()
        optimiser.step()
    for name, parameter in network.named_parameters():
        assert (parameter - before[name]).norm() > 1e-4, name


@every_network
@pytest.mark.parametrize("training", [False, True])
def test_samples_do_not_talk_to_each_other(build, training):
    network = awake(build((1, 8, 8), CLASSES)).train(training)
    x, noise = inputs((1, 8, 8))
    label = torch.arange(6) % CLASSES
    output = network(x, noise, label)
    other = [a.clone() for a in (x, noise, label)]
    other[0][2] += 1
    other[1][2] += 1
    other[2][2] = CLASSES
    changed = (network(*other) - output).flatten(1).norm(dim=1)
    assert changed[2] > 1e-2
    assert (changed[torch.arange(6) != 2] < 1e-5).all()


@every_network
def test_the_whole_input_reaches_the_whole_output(build):
    network = awake(build((1, 8, 8)))
    x, noise = inputs((1, 8, 8), 1)
    for corner in ((0, 0), (7, 7)):
        moved = x.clone()
        moved[(0, 0, *corner)] += 3
        assert ((network(moved, noise) - network(x, noise)).abs() > 1e-7).float().mean() > 0.9


@every_network
def test_same_input_same_output(build):
    network = awake(build((1, 8, 8)))
    x, noise = inputs((1, 8, 8))
    assert network(x, noise).equal(network(x, noise))
    assert awake(build((1, 8, 8)))(x, noise).equal(network(x, noise))


@every_network
def test_double_precision(build):
    network = awake(build((1, 8, 8)))
    x, noise = inputs((1, 8, 8))
    single = network(x, noise)
    double = network.double()(x.double(), noise.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)


def test_points_in_a_plane():
    network = awake(NETWORKS["mlp"]((2,)))
    assert network(*inputs((2,))).shape == (6, 2)


def test_dropout_is_for_training_only():
    network = awake(UNet((1, 8, 8), channels=8, blocks=1, dropout=0.5))
    x, noise = inputs((1, 8, 8))
    assert network(x, noise).equal(network(x, noise))
    network.train()
    assert not network(x, noise).equal(network(x, noise))


def test_a_unet_needs_images(user_error):
    with user_error("(2,)", "mlp"):
        UNet((2,))
