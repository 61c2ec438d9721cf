"""The ground floor: errors, secrets, processes, signals and folders. It imports nothing of RL2."""
