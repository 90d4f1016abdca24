"""Into which tiles a large picture is cut, and what stands in front of each in the text."""


def grid_for(size, tile, most):
    """Tiles down and across of a picture: of the grids of at most `most` tiles the one whose sides
    are most like its own; of several the largest of less than twice its area.

    Args:
      size: width and height of the picture.
      tile: height and width of a tile.
    """
    (width, height), (high, wide) = size, tile
    grids = [(a, b) for b in range(1, most + 1) for a in range(1, most // b + 1)]
    best, least = (1, 1), float("inf")
    for down, across in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        other = abs(width / height - across * wide / (down * high))
        if other < least or other == least and 2 * width * height > down * high * across * wide:
            best, least = (down, across), other
    return best


def tag(number):
    """What stands in front of a tile, whose number counts from 0, row by row."""
    return f"<tile_{number + 1}>"


def box(number, across, tile):
    """Left, top, right, bottom of a tile in the stretched picture, `across` tiles wide."""
    (row, column), (high, wide) = divmod(number, across), tile
    return column * wide, row * high, (column + 1) * wide, (row + 1) * high
