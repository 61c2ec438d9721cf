"""The engine that runs in the trainer's process, on transformers."""
