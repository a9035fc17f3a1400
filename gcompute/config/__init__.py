"""What to run: frozen dataclasses, validated on construction, loaded without JAX."""
