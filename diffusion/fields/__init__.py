"""Fields: what moves the data."""

from diffusion.fields.affine import AffineField, gravity, linear, pfgmpp, variance_exploding, variance_preserving
from diffusion.fields.base import Field, Isotropic, Unavailable
from diffusion.fields.laws import Gaussian, IsotropicLaw, Law, Product, StudentT

__all__ = [
    "AffineField",
    "Field",
    "Gaussian",
    "Isotropic",
    "IsotropicLaw",
    "Law",
    "Product",
    "StudentT",
    "Unavailable",
    "gravity",
    "linear",
    "pfgmpp",
    "variance_exploding",
    "variance_preserving",
]
