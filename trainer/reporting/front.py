"""Which points no other beats."""

from collections.abc import Sequence


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Returns for each point (bytes, error) whether no other is no worse in both and better in one: the Pareto front."""
    return [
        not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
        for one in points
    ]
