"""Functionals of a law that is seen through particles, one family a file."""
