"""What calibration measures of the data."""

import pytest
import torch

from diffusion.fields import gravity
from diffusion.preconditioning import Preconditioner


def test_power_of_independent_coordinates_is_gamma_with_half_the_dimension():
    precondition = Preconditioner(gravity(16), (16,))
    x0 = 3 + 2 * torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0))
    precondition.calibrate(x0)
    assert precondition.power_shape.item() == pytest.approx(8, rel=0.05)
    assert precondition.std.item() == pytest.approx(2, rel=0.01)
