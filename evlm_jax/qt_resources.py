"""Compiled resources of Qt (.rcc): a tree of names, and the files in it.

Source: the documentation of rcc and QResource; formats 1 to 3. A node of the tree has 14 bytes, 22
from format 2 on, where a time is added; of a folder number and place of its children, of a file the
place of its content. Numbers are big-endian."""

import struct
import zlib

DIRECTORY, ZLIB, ZSTD = 2, 1, 4  # flags of a node


def read_resources(content: bytes) -> dict[str, bytes]:
    """The files of a .rcc file by their paths; of names with any content.

    Raises ValueError for something else, or a file that is cut off.
    """
    if content[:4] != b"qres":
        raise ValueError("no resources of Qt: the file does not begin with qres")
    try:
        version, tree, data, names = struct.unpack_from(">4I", content, 4)
        if version not in (1, 2, 3):
            raise ValueError(f"resources of Qt in format {version}; known are 1 to 3")
        node = 14 if version == 1 else 22
        files: dict[str, bytes] = {}
        todo = [(0, "")]
        while todo:
            number, folder = todo.pop()
            at = tree + number * node
            name, flags = struct.unpack_from(">IH", content, at)
            where = folder + "/" + _name(content, names + name) if number else ""
            if flags & DIRECTORY:
                count, first = struct.unpack_from(">2I", content, at + 6)
                if first <= number:
                    raise ValueError("resources of Qt whose folders hold each other")
                todo += [(child, where) for child in range(first, first + count)]
            else:
                (place,) = struct.unpack_from(">I", content, at + 10)
                files[where] = _file(content, data + place, flags)
    except struct.error as error:
        raise ValueError(f"resources of Qt that are cut off: {error}") from error
    return files


def _name(content: bytes, at: int) -> str:
    (length,) = struct.unpack_from(">H", content, at)  # behind it a hash of four bytes
    return content[at + 6 : at + 6 + 2 * length].decode("utf-16-be")


def _file(content: bytes, at: int, flags: int) -> bytes:
    (size,) = struct.unpack_from(">I", content, at)
    found = content[at + 4 : at + 4 + size]
    if len(found) < size:
        raise ValueError(f"resources of Qt that are cut off: {len(found)} of {size} bytes")
    if flags & ZSTD:
        import zstandard  # of few files, none of them an asset's

        return zstandard.ZstdDecompressor().decompress(found)
    return zlib.decompress(found[4:]) if flags & ZLIB else found  # behind the size
