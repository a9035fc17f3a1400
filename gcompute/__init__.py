"""gcompute: a compute lab for generative AI in JAX. Predict it, prove it with the real compiler, measure it."""

__version__ = "0.1.0"
