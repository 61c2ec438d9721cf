"""Checkpoints that a run continues from, and model folders that transformers loads."""
