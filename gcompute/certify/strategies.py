"""The names that rows are asked for by; importing this loads no JAX."""

from gcompute.config.mesh import Axis

STRATEGIES = (*(axis.value for axis in Axis), "zero", "sequence", "vocabulary", "collectives")
