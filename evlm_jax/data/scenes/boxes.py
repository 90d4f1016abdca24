"""Boxes of things in a picture."""

MARGIN = 2  # pixels between things, and to the border

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def close(a: Box, b: Box) -> bool:
    """Whether there are less than MARGIN pixels between two boxes."""
    across = a[0] < b[2] + MARGIN and b[0] < a[2] + MARGIN
    return across and a[1] < b[3] + MARGIN and b[1] < a[3] + MARGIN
