"""Environments: files with `async def step`, and the processes they run in."""
