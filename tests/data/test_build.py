"""`evlm data build`: what comes out is what went in, less what was dropped, whatever the number of
processes and kills.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evlm_jax import assets
from evlm_jax.data import image
from evlm_jax.data.sources import open_source
from evlm_jax.data.tools.build import Job, build, build_shard
from tests.data.made import config, png, said, write_images, write_json

CONFIG = config()


@pytest.fixture
def source(tmp_path):
    """Captions of 40 pictures of noise: one damaged, one not there; captions that rules object to;
    rows that are no samples.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        side = (20, 90)[i % 2]
        Image.fromarray(rng.integers(0, 255, (side, side + 10, 3), np.uint8)).save(
            folder / f"{i}.png"
        )
    (folder / "3.png").write_bytes(png(3)[:50])
    (folder / "4.png").unlink()
    texts = ["a dog and its ball", "12345", "see https://a.b/c now please"]
    rows = [
        {
            "id": f"r{i}",
            "image": f"pictures/{i}.png",
            "conversations": turns(texts[(i % 10 > 7) * (1 + i % 2)]),
        }
        for i in range(40)
    ]
    rows[10], rows[20] = {"id": "bad"}, {"id": "worse", "conversations": [{}]}
    return f"llava:{write_json(tmp_path / 'rows.json', rows)}"


def turns(text):
    return [{"from": "human", "value": "<image>Describe"}, {"from": "gpt", "value": text}]


def job(source, out, **changes):
    cfg = replace(CONFIG, clean=replace(CONFIG.clean, similarity=0.0, aspect=9.0))
    return Job(cfg, source, str(out), "none", "tar", side=32, size=7)._replace(**changes)


@pytest.mark.parametrize("container", ["tar", "array_record"])
def test_what_comes_out_is_what_went_in(source, tmp_path, container):
    outcome = build(job(source, tmp_path / "out", container=container), workers=1)
    assert (outcome.seen, outcome.written, dict(outcome.dropped)) == (
        40,
        36,
        {"bad row": 2, "unreadable image": 2},
    )
    assert "r3" in outcome.examples["unreadable image"] and "bad" in outcome.examples["bad row"]
    before, after = open_source(source), open_source(f"built:{tmp_path / 'out'}")
    assert len(after) == 36
    wanted = [i for i in range(40) if i not in (3, 4, 10, 20)]
    for sample, number in zip(after, wanted, strict=True):
        assert (sample.key, said(sample)) == (f"r{number}", said(before[number]))
        picture = image.decode(sample.refs[0].path)
        original = image.decode(before[number].refs[0].path)
        if number % 2:
            assert picture.size == (36, 32)
            expected = np.asarray(original.resize((36, 32), Image.Resampling.BICUBIC), float)
            assert np.abs(np.asarray(picture, float) - expected).mean() < 6
        else:
            assert np.array_equal(picture, original)  # small ones keep their bytes


def test_receipts_sum_under_rules(source, tmp_path):
    outcome = build(job(source, tmp_path / "out", rules="captions"), workers=1)
    assert outcome.seen == 40 == outcome.written + outcome.dropped.total()
    rules = outcome.rules
    assert rules.seen["caption"] == rules.kept["caption"] + rules.dropped["caption"].total() == 38
    assert set(rules.dropped["caption"]) >= {"damaged", "letters", "links"} and rules.dropped[
        "row"
    ] == {"bad row": 2}
    assert "sample: 40 seen" in (tmp_path / "out" / "receipt.txt").read_text()
    assert (
        json.loads((tmp_path / "out" / "receipt.json").read_text())["written"]
        == outcome.written
        == len(open_source(f"built:{tmp_path / 'out'}"))
    )


def test_the_receipt_of_real_pictures_and_junk_sums_exactly(tmp_path):
    """Drawings of OpenMoji and of easy-VQA with good captions, and as many files of each kind of
    junk as the receipt must say.
    """
    try:
        drawings = (
            sorted(assets.path("openmoji").glob("*.png"))[:40]
            + sorted((assets.path("easy-vqa") / "train" / "images").glob("*.png"))[:40]
        )
    except assets.AssetError as error:
        pytest.skip(str(error))
    folder = tmp_path / "mixed"
    folder.mkdir()

    def add(name, content, caption="one small drawing here"):
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text(caption)

    def picture(width, height, noise=True):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8) * noise
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    for i, drawing in enumerate(drawings):
        add(f"good{i}", drawing.read_bytes())
    good = drawings[0].read_bytes()
    junk = {
        "damaged": (good[: len(good) // 2], {}),
        "single colour": (picture(40, 40, noise=False), {}),
        "aspect": (picture(400, 40), {}),
        "side": (picture(7, 7), {}),
        "letters": (good, {"caption": "12 34 56"}),
        "digits": (good, {"caption": "call this number 123456789 now"}),
        "duplicates": (good, {"caption": "buy buy buy buy"}),
        "links": (good, {"caption": "picture from https://a.b"}),
        "dates": (good, {"caption": "a picture of 2020-01-02 taken"}),
        "words": (good, {"caption": "drawing"}),
    }
    for number, (rule, (content, caption)) in enumerate(junk.items(), 1):
        for i in range(number):
            add(f"{rule}{i}", content, **caption)
    outcome = build(job(f"folder:{folder}", tmp_path / "out", rules="captions", size=20), workers=1)
    expected = {rule: number for number, rule in enumerate(junk, 1)}
    assert dict(outcome.rules.dropped["caption"]) == expected
    total = len(drawings) + sum(expected.values())
    assert outcome.seen == outcome.rules.seen["caption"] == total
    assert (
        outcome.written
        == outcome.rules.kept["caption"]
        == len(drawings)
        == len(open_source(f"built:{tmp_path / 'out'}"))
    )
    assert dict(outcome.dropped) == {"cleaned away": sum(expected.values())}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_videos_several_dialogs_and_text_alone(tmp_path):
    clip = tmp_path / "a.png"
    clip.write_bytes(png(9))
    rows = [
        {"id": "t", "conversations": turns("x")[1:]},
        {"id": "two", "image": ["a.png", "a.png"], "conversations": turns("y")},
    ]
    rows[1]["conversations"][0]["value"] = "<image><image>same?"
    source = f"llava:{write_json(tmp_path / 'rows.json', rows)}"
    build(job(source, tmp_path / "out"), workers=1)
    text, two = open_source(f"built:{tmp_path / 'out'}")
    assert not text.visuals and said(text) == said(open_source(source)[0])
    assert len(two.refs) == 2 and two.refs[0] != two.refs[1]


def test_after_a_failure_only_what_is_missing_is_made(source, tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    build(job(source, whole), workers=1)
    other.mkdir()
    for shard in (0, 2):
        build_shard(job(source, other), shard)
    (other / "00001.tar.part").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in other.glob("*.tar")}
    build(job(source, other), workers=1)
    assert all(path.stat().st_mtime_ns == at for path, at in times.items()) and len(times) == 2
    assert contents(whole) == contents(other)
    with pytest.raises(ValueError, match="begun with another side"):
        build(job(source, other, side=16), workers=1)


def test_a_build_over_a_source_that_changed_is_refused(source, tmp_path):
    """It would miss samples, or have them twice."""
    build(job(source, tmp_path / "out"), workers=1)
    (tmp_path / "out/receipts/00001.txt").unlink()
    rows = json.loads((tmp_path / "rows.json").read_text())
    for changed in (rows[::-1], rows[:-1], [*rows, rows[0]]):
        write_json(tmp_path / "rows.json", changed)
        with pytest.raises(
            ValueError,
            match=(
                "begun with another state of the source .build.json.: give a new --out, or"
                " delete it"
            ),
        ):
            build(job(source, tmp_path / "out"), workers=1)
    facts = json.loads((tmp_path / "out/build.json").read_text())
    del facts["state of the source"]  # as former versions wrote it
    write_json(tmp_path / "out/build.json", facts)
    write_json(tmp_path / "rows.json", rows)
    build(job(source, tmp_path / "out"), workers=1)
    for name in ("receipts/00000.txt", "build.json"):
        for content in ("[]", "", '{"rules": 5}' if "receipts" in name else "5"):
            (tmp_path / "out" / name).write_text(content)
            with pytest.raises(ValueError, match=f"out/{name}: not what a build wrote"):
                build(job(source, tmp_path / "out"), workers=1)


def test_the_state_of_a_source(tmp_path):
    """Another one when a caption, a picture, a file of rows or what is kept of them changes; the
    same one otherwise.
    """
    name = f"folder:{tmp_path}/pictures"
    write_images(tmp_path / "pictures", 2)
    for number in range(2):
        (tmp_path / f"pictures/{number}.txt").write_text("a")
    np.save(tmp_path / "keep.npy", [1])
    change = {
        name: lambda: (tmp_path / "pictures/1.txt").write_text("bb"),
        f"ocr-en:{name}?pages=4": lambda: (tmp_path / "pictures/0.txt").write_text("ccc"),
        f"{name}?keep={tmp_path}/keep.npy": lambda: np.save(tmp_path / "keep.npy", [0]),
    }
    for source, work in change.items():
        before = open_source(source).state()
        assert open_source(source).state() == before
        work()
        assert open_source(source).state() != before


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path):
    """Killed six times while it runs, the folder is that of an undisturbed build; two processes
    then, one at the end.
    """
    (tmp_path / "large").mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 255, (600, 600, 3), np.uint8)).save(
            tmp_path / "large" / f"{i}.png", compress_level=1
        )
        (tmp_path / "large" / f"{i}.txt").write_text(f"picture {i}")
    source, killed = f"folder:{tmp_path / 'large'}", tmp_path / "killed"

    def made(out):
        return job(source, out, side=500, size=1)

    script = (
        f"from tests.data.test_build import *\nbuild(job({source!r}, {str(killed)!r}, side=500,"
        " size=1), workers=2)"
    )

    def finished():
        return len(list((killed / "receipts").glob("*.txt")))

    counts = []
    for pause in (0, 0.01, 0.02, 0.03, 0.04, 0.05):
        before, until = finished(), time.monotonic() + 60
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while finished() == before and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(pause)
        assert process.poll() is None, "the build ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts.append(finished())
    assert 0 < counts[0] and counts == sorted(counts) and counts[-1] < 100, counts
    build(made(killed), workers=1)
    build(made(tmp_path / "whole"), workers=2)
    assert contents(tmp_path / "whole") == contents(killed)
