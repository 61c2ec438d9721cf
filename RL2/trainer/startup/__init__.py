"""What a run checks, says and loads before its first step."""
