"""Meshes, sharding rules and (as they come) every parallel strategy as functions to import."""
