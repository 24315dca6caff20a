"""Flows: one geometry or one integrator a file; the loop is in `base`."""
