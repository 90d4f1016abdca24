"""Where models stand in a room, and what a camera sees of it.

In metres, x to the right, y up, z towards the camera, which is at z = 0 within the room; the floor
is y = 0, the wall at the back z = -depth:

        y  ___________
          |\\         /|          the walls at the sides are at x = +-width / 2
          | \\_______/ |
          |  |      | |
          |  |______| |
          | /  floor \\|      camera: looks along -z, `pitch` downwards
          |/__________\\
"""

import functools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evlm_jax.data.scenes.boxes import MARGIN, Box, close

VIEW = math.radians(50)  # of the camera, across and up
HEIGHT = (2.6, 3.4)
BEHIND, BESIDE = (0.3, 2.0), (0.2, 1.5)  # from the last model to the wall
EYES, PITCH = (1.2, 2.5), (0.1, 0.6)
FARTHER = (0.5, 1.1)  # of the size that is wanted: what stands apart on a floor is not equally near
ROOMS, TRIES = 12, 24  # that are tried; spots of a model in one of them
NEAR, PRECISE = 0.3, 0.05  # metres in front of the camera; of the longer side that is wanted


class Spot(NamedTuple):
    """Where a model stands, turned by radians about the vertical."""

    x: float
    z: float
    angle: float


class Room(NamedTuple):
    """Walls, and a camera at (0, eyes, 0)."""

    width: float
    depth: float
    height: float
    eyes: float
    pitch: float


@functools.cache
def hulls(folder: str) -> dict[str, dict[str, np.ndarray]]:
    """{name: {path in the folder of the asset: corners [n, 3] of the model's convex hull}}."""
    said = json.loads(Path(folder, "hulls.json").read_text("utf-8"))
    return {
        name: {path: np.array(corners) for path, corners in some.items()}
        for name, some in said.items()
    }


def stood(points: np.ndarray, spot: Spot) -> np.ndarray:
    """Points [n, 3] of a model in its spot."""
    c, s = math.cos(spot.angle), math.sin(spot.angle)
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return points @ turn.T + (spot.x, 0, spot.z)


def seen(room: Room, points: np.ndarray, size: int) -> np.ndarray | None:
    """Pixels across and down [n, 2] of points [n, 3]; None where one is not ahead of the camera."""
    x, y, z = (points - (0, room.eyes, 0)).T
    c, s = math.cos(room.pitch), math.sin(room.pitch)
    ahead = -s * y - c * z
    if ahead.min() < NEAR:
        return None
    focal = size / 2 / math.tan(VIEW / 2)
    return size / 2 + focal * np.stack([x, s * z - c * y], 1) / ahead[:, None]


def stand(
    chosen: Sequence[np.ndarray], longs: Sequence[float], size: int, rng: random.Random
) -> tuple[Room, list[tuple[Box, Spot]]] | None:
    """A room in which models stand apart, each seen whole, and no box of one near another's; None
    where none was found.

    Args:
      chosen: corners of hulls [n, 3].
      longs: pixels of the longer sides, of copies of one model about so many. The largest model
        takes the largest of them, so that what looks larger is larger.
    """
    order = sorted(range(len(chosen)), key=lambda i: np.ptp(chosen[i], 0).max())
    wanted = dict(zip(order, sorted(longs)))
    copies = len(chosen) > 1 and all(hull is chosen[0] for hull in chosen)
    for _ in range(ROOMS):
        eyes, pitch = rng.uniform(*EYES), rng.uniform(*PITCH)
        room = Room(0, 0, rng.uniform(*HEIGHT), eyes, pitch)
        found: list[tuple[Box, Spot]] = []
        for i, hull in enumerate(chosen):
            for _ in range(TRIES):
                long = wanted[i] * (rng.uniform(*FARTHER) if copies else 1)
                tried = _somewhere(room, hull, long, size, rng)
                if tried and not any(close(tried[0], box) for box, _ in found):
                    found.append(tried)
                    break
            else:
                break
        if len(found) == len(chosen):
            corners = [stood(hull, spot) for hull, (_, spot) in zip(chosen, found)]
            x, _, z = np.concatenate(corners).T
            wide, deep = abs(x).max() + rng.uniform(*BESIDE), rng.uniform(*BEHIND) - z.min()
            return room._replace(width=2 * float(wide), depth=float(deep)), found
    return None


def _somewhere(
    room: Room, hull: np.ndarray, long: float, size: int, rng: random.Random
) -> tuple[Box, Spot] | None:
    """A spot where the model's longer side is as wanted; None where it would not be whole."""
    angle, across = rng.uniform(-math.pi, math.pi), rng.uniform(-0.5, 0.5)
    away = size / long * np.ptp(hull, 0).max()
    for _ in range(3):
        spot = Spot(across * away, -away, angle)
        points = stood(hull, spot)
        pixels = seen(room, points, size)
        if pixels is None:
            return None
        low, high = np.floor(pixels.min(0)).astype(int), np.ceil(pixels.max(0)).astype(int)
        side = int((high - low).max())
        if abs(side - long) <= max(1, PRECISE * long):
            inside = low.min() >= MARGIN and high.max() <= size - MARGIN
            return ((*low.tolist(), *high.tolist()), spot) if inside else None
        away *= side / long
    return None
