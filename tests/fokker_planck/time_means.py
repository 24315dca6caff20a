"""Means over times, for tests of what changes in time."""

from diffusion.fokker_planck.stepping import moments


def weighted(values, rule):
    """The weighted sum of a function of time."""
    return sum(weight * values(time) for time, weight in rule)


def mean_over(values, start, stop, points=4):
    """The mean of a function of time, by Gauss' rule."""
    return weighted(values, moments(start, stop, points))


def means_of(operator):
    """Means by several rules, from the operator of one."""
    return lambda rules: [operator(rule) for rule in rules]
