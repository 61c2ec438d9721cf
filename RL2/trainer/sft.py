"""Supervised fine-tuning, with any token loss."""

from RL2.trainer.main import run

if __name__ == "__main__":
    run("sft")
