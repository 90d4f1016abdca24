"""ArrayRecord: records by number; its reader knows local files only, so a remote one is copied to
the cache.

A record is a row as JSON, as msgpack, or as the tf.train.Example that TensorFlow Datasets writes.
"""

import functools
from collections.abc import Sequence
from urllib.parse import quote, unquote

import msgpack
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from evlm_jax.checkpoint.lazy_tensors import distinct
from evlm_jax.data.containers import files, text
from evlm_jax.paths import here


class Records(Sequence):
    """Rows {field: value}; binary values are references."""

    def __init__(self, path: str):
        self.path, self._reader = path, _reader(path, files.version(path))

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = _row(self._reader.read([index])[0])
        return {
            name: _named(value, f"{index}/{quote(str(name), safe='')}", self.path)
            for name, value in row.items()
        }


def read(place: str, path: str, most: int) -> bytes:
    """The bytes of a reference: place = ROW/FIELD/...;
    names and numbers lead into maps and lists.
    """
    row, *steps = map(unquote, place.split("/"))
    value = _row(_reader(path, files.version(path)).read([int(row)])[0])
    for step in steps:
        value = value[int(step) if isinstance(value, list) else step]
    return value


def _named(value, place: str, path: str):
    """`value` with references in place of bytes."""
    if isinstance(value, bytes):
        return files.Ref(f"record://{place}::{path}")
    if isinstance(value, dict):
        return {
            name: _named(inner, f"{place}/{quote(str(name), safe='')}", path)
            for name, inner in value.items()
        }
    return (
        [_named(inner, f"{place}/{i}", path) for i, inner in enumerate(value)]
        if isinstance(value, list)
        else value
    )


@functools.lru_cache(1 << 12)
def _reader(path: str, version: str) -> ArrayRecordReader:
    reader = ArrayRecordReader(str(here(path)), "readahead_buffer_size:0")
    if not reader.ok():
        raise ValueError("it is damaged or cut off")
    return reader


def _row(record: bytes) -> dict:
    """A JSON object begins with {, an Example with the byte 10,
    a msgpack map with one above 127.
    """
    if record[:1] == b"{":
        return text.parse(record)
    if record[:1] == b"\n":
        entries = _example().FromString(record).features.feature
        return distinct([(entry.key, _feature(entry.value)) for entry in entries])
    row = msgpack.unpackb(record, object_pairs_hook=distinct)
    if not isinstance(row, dict):
        raise ValueError(f"a record must be a map of fields, not {type(row).__name__}")
    return row


def _feature(feature):
    """Bytes are text where they are UTF-8; one value stands for itself."""
    kind = next(
        (kind for kind in ("bytes_list", "float_list", "int64_list") if feature.HasField(kind)),
        None,
    )
    values = (
        [_text(value) if kind == "bytes_list" else value for value in getattr(feature, kind).value]
        if kind
        else []
    )
    return values[0] if len(values) == 1 else values


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


@functools.cache
def _example():
    """The message class of tf.train.Example, declared here so that TensorFlow is not needed.

    Its map is a list of entries on the wire.
    """
    kind = descriptor_pb2.FieldDescriptorProto
    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    messages = {
        "BytesList": [("value", kind.TYPE_BYTES, many)],
        "FloatList": [("value", kind.TYPE_FLOAT, many)],
        "Int64List": [("value", kind.TYPE_INT64, many)],
        "Feature": [
            ("bytes_list", "BytesList", one),
            ("float_list", "FloatList", one),
            ("int64_list", "Int64List", one),
        ],
        "Entry": [("key", kind.TYPE_STRING, one), ("value", "Feature", one)],
        "Features": [("feature", "Entry", many)],
        "Example": [("features", "Features", one)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="evlm", syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (title, of, label) in enumerate(fields, 1):
            type_ = (
                {"type": kind.TYPE_MESSAGE, "type_name": f".evlm.{of}"}
                if isinstance(of, str)
                else {"type": of}
            )
            message.field.add(name=title, number=number, label=label, **type_)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("evlm.Example"))
