"""Means over times, for tests of what changes in time."""

from diffusion.fokker_planck.evolution import moments


def mean_over(values, start, stop, points=4):
    """The mean of a function of time, by Gauss' rule."""
    return sum(weight * values(time) for time, weight in moments(start, stop, points))


def means_of(mean):
    """Means over several times, by a function of one."""
    return lambda intervals: [mean(*interval) for interval in intervals]
