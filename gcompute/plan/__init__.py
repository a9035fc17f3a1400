"""Predict from formulae, in milliseconds and without JAX: parameters, memory, floating-point operations, step time."""
