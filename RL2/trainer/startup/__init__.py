"""What a run checks, logs and loads before its first step."""
