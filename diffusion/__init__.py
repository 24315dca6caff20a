"""Fields that become generators: define a force law, learn it, integrate it from noise to data."""

from diffusion.errors import UserError
from diffusion.generator import Generator

__all__ = ["Generator", "UserError"]
