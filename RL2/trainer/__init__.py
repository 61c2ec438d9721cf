"""Entry points, the loop, its checkpoints and its metrics."""
