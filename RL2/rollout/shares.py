"""Distribution of groups over drivers."""


def spread(held: list[int], n: int) -> list[int]:
    """The owner of each of n more groups: the driver with the fewest, the first among equals."""
    held = list(held)
    owners = []
    for _ in range(n):
        owner = held.index(min(held))
        held[owner] += 1
        owners.append(owner)
    return owners


def shares(held: list[int], n: int) -> list[int]:
    """How many of its groups each driver must finish, n in all, as evenly as possible."""
    left, share = list(held), [0] * len(held)
    for _ in range(min(n, sum(held))):
        owner = left.index(max(left))
        left[owner] -= 1
        share[owner] += 1
    return share
