"""Policy gradients; the defaults are the Dr. GRPO baseline."""

from RL2.trainer.main import run

if __name__ == "__main__":
    run("ppo")
