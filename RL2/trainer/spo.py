"""Exploring Paths, max-probability target (sections 3.1 and 3.2)."""

from RL2.trainer.main import run

if __name__ == "__main__":
    run("spo")
