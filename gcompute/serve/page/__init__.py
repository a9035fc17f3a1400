"""The page of `gcompute serve`: talk to the model, and watch the engine work."""
