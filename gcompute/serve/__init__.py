"""Serve a trained model: requests, scheduling, sampling, the engine, and its HTTP face."""
