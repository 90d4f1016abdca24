"""Files that Pillow does not read though their pixels are whole, and what a file is that holds
none.
"""

import codecs
import struct

from simplejpeg import decode_jpeg

TELLING = (
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"iCCP",
)  # parts of a PNG that say something about its pixels, and change none
PNG, JPEG, END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
BRANDS = {b"avi": "AVIF", b"hei": "HEIC", b"hev": "HEIC", b"mif": "HEIF", b"msf": "HEIF"}
BEGINS = {
    b"<": "HTML, XML or SVG",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"%PDF": "PDF",
    b"PK\3\4": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
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
    if content[4:8] == b"ftyp":
        kind = BRANDS.get(content[8:11], "a video")
    else:
        start = content.removeprefix(codecs.BOM_UTF8).lstrip()
        kinds = (kind for mark, kind in BEGINS.items() if start.startswith(mark))
        kind = next(kinds, None) if content else "an empty file"
    return ValueError(f"it is {kind}, which is not read") if kind else None


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
