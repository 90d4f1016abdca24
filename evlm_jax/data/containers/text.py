"""Text files as they are found: UTF-8, with or without a byte order mark, whatever ends their
lines.
"""

import codecs
import json

from evlm_jax.checkpoint.lazy_tensors import distinct

MOST_BYTES = 1 << 26  # of one text, a row of JSON or a caption
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode(content: bytes) -> str:
    """The text of a file, its lines ended by \\n.

    Raises ValueError for what is not UTF-8, and names UTF-16.
    """
    wide = next((name for mark, name in WIDE.items() if content.startswith(mark)), None)
    if wide or (content[:1] and b"\0" in content[:4]):
        raise ValueError(f"it is {wide or 'UTF-16 or no text'}: write it as UTF-8")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x}): write it as"
            " UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


DECODER = json.JSONDecoder(object_pairs_hook=distinct)


def parse(content: bytes):
    """The value of JSON. Raises ValueError."""
    try:
        return DECODER.decode(decode(content))
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def lines(content: bytes) -> list[str]:
    """The lines of a text file, split at newlines alone, not at other line ends of Unicode
    (U+2028).
    """
    return decode(content).removesuffix("\n").split("\n") if content else []
