"""Preference optimization: DPO and its relatives, and KTO."""

from RL2.runtime.leaving import one_line_for_ctrl_c

if __name__ == "__main__":
    one_line_for_ctrl_c()  # imports take a second
    from RL2.trainer.main import run

    run("dpo")
