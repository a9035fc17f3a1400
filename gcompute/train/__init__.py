"""Train the transformer: data, optimizer, step, checkpoints, loop."""
