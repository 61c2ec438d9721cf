"""The engine that runs in the trainer: transformers."""
