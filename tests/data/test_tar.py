"""Tars: rows as webdataset sees them, members as tarfile does."""

import io
import json
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from evlm_jax.data.containers import rows
from evlm_jax.data.containers.tar import Tar, headers
from evlm_jax.data.samples import SampleError
from evlm_jax.data.source import Source
from tests.data.made import png, shows, write_tar


def test_tar_rows_are_those_of_webdataset(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(7))
    found = rows.open_rows(path)
    expected = list(webdataset.WebDataset(path, shardshuffle=False))
    assert len(found) == len(expected) == 7
    for i in (3, 0, 6, 1, 2, 4, 5):
        row, theirs = found[i], expected[i]
        assert (row["__key__"], row["txt"], row["json"]) == (
            theirs["__key__"],
            theirs["txt"].decode(),
            json.loads(theirs["json"]),
        )
        with rows.open_ref(row["png"]) as file:
            assert file.read() == theirs["png"]
        assert shows(row["png"]) == i


def test_tar_with_folders_dots_and_other_members(tmp_path):
    names = [
        "deep/a.b.seg.png",
        "deep/a.JPG",
        "deep/b.JPG",
        ".hidden.jpg",
        "README",
        "deep/ü " + "x" * 120 + ".jpg",
        "deep/c::d.jpg",
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
    found = Tar(str(tmp_path / "a.tar"))
    assert [row["__key__"] for row in found] == [
        "deep/a",
        "deep/b",
        "deep/ü " + "x" * 120,
        "deep/c::d",
    ]
    assert {field: shows(ref) for field, ref in found[0].items() if field != "__key__"} == {
        "b.seg.png": 0,
        "jpg": 1,
    }
    assert [shows(found[i]["jpg"]) for i in (1, 2, 3)] == [2, 5, 6]


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_members_are_those_of_tarfile(kind, data):
    """Regular files, folders, links; short and long names, any characters that the format takes;
    sizes around whole blocks.
    """
    letters = "ab./ " if kind == "ustar" else "ab./ ü中="
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer,
        mode="w",
        format=FORMATS[kind],
        pax_headers={"comment": "x"} if kind == "pax" else None,
    ) as archive:
        for _ in range(data.draw(st.integers(1, 6))):
            name = data.draw(st.text(letters, min_size=1, max_size=9)) + "x"
            long = data.draw(st.sampled_from([0, 0, 20, 80]))
            member = tarfile.TarInfo(
                "/".join([name] * (1 + long // 10))
                if kind != "ustar" or long < 80
                else "d" * 90 + "/" + name
            )
            member.type = data.draw(
                st.sampled_from(
                    [tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
                )
            )
            member.linkname = "a" * long
            member.mtime = 1.5 if data.draw(st.booleans()) and kind == "pax" else 1
            member.size = (
                data.draw(st.sampled_from([0, 1, 511, 512, 513, 2000])) if member.isreg() else 0
            )
            archive.addfile(member, io.BytesIO(b"z" * member.size))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(headers(buffer)) == expected


def test_other_headers(tmp_path):
    """Sizes in base 256, as GNU writes them beyond 8 GB; sparse files; padding behind the end."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    block = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match="the file ends within big.jpg"):
        list(headers(io.BytesIO(block)))
    info.size, info.type = 0, tarfile.GNUTYPE_SPARSE
    with pytest.raises(ValueError, match="big.jpg is sparse"):
        list(headers(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT))))
    info.type = tarfile.REGTYPE
    content = info.tobuf(tarfile.USTAR_FORMAT)
    assert list(headers(io.BytesIO(content + bytes(5000) + b"x" * 999))) == [("big.jpg", 512, 0)]
    with pytest.raises(ValueError, match="no mark of its end"):
        list(headers(io.BytesIO(content)))
    for said in (b"0 a=b\n", b"-9 path=b\n", b"3 \n"):
        extended = tarfile.TarInfo("x")
        extended.type, extended.size = tarfile.XHDTYPE, len(said)
        with pytest.raises(
            ValueError, match="a header says that it has (0|-9|3) bytes|no mark of its end"
        ):
            list(
                headers(
                    io.BytesIO(extended.tobuf(tarfile.USTAR_FORMAT) + said + bytes(512 - len(said)))
                )
            )
    with pytest.raises(ValueError, match="no header at byte 512"):
        list(headers(io.BytesIO(content + b"x" * 512)))


def test_damaged_tars_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(4))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:2000])
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("cut.tar", "empty.tar"):
        with pytest.raises(ValueError, match=f"{name}: cannot read the file"):
            rows.open_rows(str(tmp_path / name))
    start = content.index(b'{"similarity": 0.2')
    (tmp_path / "a.tar").write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(SampleError, match=r"00002.json: .*a.tar: row 3"):
        Source("s", rows.open_rows(path), dict, where=path)[2]
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match="a.jpg comes twice"):
        rows.open_rows(str(tmp_path / "twice.tar"))[0]
