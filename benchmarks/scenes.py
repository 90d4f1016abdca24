"""Scenes a second on one core, with cut-outs and grounds in memory: `python -m benchmarks.scenes`.

The shipped scenes (`evlm fetch scenes`), or with `--rooms` rendered ones (`evlm fetch rooms`); with
`--smoke` a few of flat shapes, which need no assets.
A second is one of this process's time, so that other programs do not count."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks import parser
from evlm_jax.data.sources import open_source

SCENES = 1000


def write_shapes(folder: Path) -> None:
    """A folder of one's own, as `scenes:DIR` takes it."""
    for name, colour in (("ball", "red"), ("stone", "gray")):
        (folder / "objects" / name).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGBA", (120, 80 + 20 * number))
            ImageDraw.Draw(image).ellipse((0, 0, 119, 79 + 20 * number), colour)
            image.save(folder / "objects" / name / f"{number}.png")
    (folder / "grounds").mkdir()
    for number, colour in enumerate(("green", "navy", "beige")):
        Image.new("RGB", (200, 200), colour).save(folder / "grounds" / f"{colour}{number}.png")


def rate(make: Callable[[int], object], count: int) -> float:
    """How many are made in a second, of those that were made once before."""
    for number in range(count):
        make(number)
    since = time.process_time()
    for number in range(count):
        make(number)
    return count / (time.process_time() - since)


def main() -> None:
    """Prints what a second makes."""
    options = parser(__doc__)
    options.add_argument("--rooms", action="store_true", help="rendered rooms, a tenth as many")
    args = options.parse_args()
    count = 20 if args.smoke else SCENES // 10 if args.rooms else SCENES
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            write_shapes(Path(folder))
        kind = folder if args.smoke else "rooms" if args.rooms else "assets"
        source = open_source(f"scenes:{kind}?scenes={count}")
        print(f"{rate(source.scenes.scene, count):8.0f} truths a second, of {count}")
        print(f"{rate(source.__getitem__, count):8.0f} samples a second: truths and questions")
        print(f"{rate(source.picture, count):8.0f} pictures a second: truths, drawn and written")


if __name__ == "__main__":
    main()
