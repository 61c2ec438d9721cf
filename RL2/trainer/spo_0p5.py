"""Exploring Paths, fixed target 0.5 (section 3.3)."""

from RL2.trainer.main import run

if __name__ == "__main__":
    run("spo_0p5")
