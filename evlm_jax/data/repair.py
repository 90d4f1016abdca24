"""Files that Pillow does not read though their pixels are whole, and what a file is that holds
none.
"""

import struct

from simplejpeg import decode_jpeg

TELLING = (
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"iCCP",
)  # parts of a PNG that say something about its pixels, and change none
PNG, JPEG, END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
OTHERS = {
    b"ftypavif": "AVIF",
    b"ftypheic": "HEIC",
    b"ftypheix": "HEIC",
    b"ftypmif1": "HEIF",
    b"jP  ": "JPEG 2000",
    b"JXL ": "JPEG XL",
}


def mend(content: bytes) -> bytes | None:
    """The same pixels in a file that Pillow reads, or None: without texts and profiles that are too
    long, with the end mark of a JPEG.
    """
    if content.startswith(PNG):
        return _without_telling(content)
    if content.startswith(JPEG) and not content.endswith(END) and _is_baseline(content):
        try:
            decode_jpeg(content + END)  # an error where a single pixel lacks
        except ValueError:
            return None
        return content + END
    return None


def foreign(content: bytes) -> ValueError | None:
    """What a file is that is no picture of ours."""
    kind = next((name for mark, name in OTHERS.items() if mark in content[4:12]), None)
    if kind is None and content.lstrip()[:1] == b"<":
        kind = "HTML, XML or SVG"
    return (
        ValueError(f"it is {kind or 'an empty file'}, which is not read")
        if kind or not content
        else None
    )


def _without_telling(content: bytes) -> bytes | None:
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        if kind not in TELLING:
            kept.append(content[at : at + size + 12])
        at += size + 12
    made = b"".join(kept)
    return made if len(made) < len(content) else None


def _is_baseline(content: bytes) -> bool:
    """Whether a JPEG has one pass: of several, one that lacks would not be missed."""
    at = len(JPEG)
    while at + 4 <= len(content) and content[at] == 0xFF:
        if content[at + 1] in (0xC0, 0xC1, 0xC2):
            return content[at + 1] != 0xC2
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return False
