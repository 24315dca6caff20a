"""Fields: what moves the data."""

from diffusion.fields.affine import AffineField, gravity, linear, pfgmpp, variance_exploding, variance_preserving
from diffusion.fields.base import Field, Isotropic, Unavailable, expand_time
from diffusion.fields.empirical import EmpiricalField
from diffusion.fields.laws import Gaussian, IsotropicLaw, Law, Product, StudentT, laplace, uniform
from diffusion.fields.principal import PrincipalGaussian
from diffusion.fields.radial import (
    RadialField,
    radial_exponential,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
)
from diffusion.fields.trajectory import TrajectoryField, curved, drifting, straight
from diffusion.fields.validation import Report, validate

__all__ = [
    "AffineField",
    "EmpiricalField",
    "Field",
    "Gaussian",
    "Isotropic",
    "IsotropicLaw",
    "Law",
    "PrincipalGaussian",
    "Product",
    "RadialField",
    "Report",
    "StudentT",
    "TrajectoryField",
    "Unavailable",
    "curved",
    "drifting",
    "expand_time",
    "gravity",
    "laplace",
    "linear",
    "pfgmpp",
    "radial_exponential",
    "radial_gaussian",
    "radial_gravity",
    "radial_stretched",
    "radial_tanh",
    "straight",
    "uniform",
    "validate",
    "variance_exploding",
    "variance_preserving",
]
