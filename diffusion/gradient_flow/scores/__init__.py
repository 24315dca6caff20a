"""Estimates of grad log q from the particles of q."""
