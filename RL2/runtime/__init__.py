"""The lowest layer: errors, secrets, processes, signals and folders. Imports nothing of RL2."""
