"""Fields: what moves the data."""

from diffusion.fields.affine import AffineField, gravity, linear, pfgmpp, variance_exploding, variance_preserving
from diffusion.fields.base import Field
from diffusion.fields.laws import Gaussian, Law, Product, StudentT

__all__ = [
    "AffineField",
    "Field",
    "Gaussian",
    "Law",
    "Product",
    "StudentT",
    "gravity",
    "linear",
    "pfgmpp",
    "variance_exploding",
    "variance_preserving",
]
