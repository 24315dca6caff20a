"""How good are the samples? Distances between sets, feature spaces to measure in, and the table of an evaluation."""

from diffusion.metrics.distances import (
    PrecisionRecall,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    precision_recall,
    sliced_wasserstein,
)
from diffusion.metrics.evaluation import Evaluation, Figures, evaluate
from diffusion.metrics.features import (
    ClassifierFeatures,
    Features,
    InceptionFeatures,
    PointFeatures,
    default_features,
    train_classifier_features,
)
from diffusion.metrics.gaussians import GaussianLaw, gaussian_bhattacharyya, gaussian_kl, gaussian_wasserstein

__all__ = [
    "ClassifierFeatures",
    "Evaluation",
    "Features",
    "Figures",
    "GaussianLaw",
    "InceptionFeatures",
    "PointFeatures",
    "PrecisionRecall",
    "default_features",
    "evaluate",
    "frechet_distance",
    "gaussian_bhattacharyya",
    "gaussian_kl",
    "gaussian_wasserstein",
    "kernel_distance",
    "nearest_distance",
    "precision_recall",
    "sliced_wasserstein",
    "train_classifier_features",
]
