"""The Flax transformer: modules of dims, never of mesh axes."""
