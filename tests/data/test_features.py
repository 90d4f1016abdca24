"""The feature store: computed once, right after any crash, keyed by content."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from evlm_jax.data.features import CHUNK, STEP, FeatureStore, fingerprint
from evlm_jax.data.image import ImageError, pixels
from evlm_jax.data.pipeline import batches, load_pictures
from evlm_jax.data.samples import ImageRef, Sample, question
from evlm_jax.data.text import encode as encode_sample
from tests.data.made import TOKENIZER, write_images
from tests.helpers.tiny import tiny_config

CFG = tiny_config(vit=dict(image_size=(8, 12)), data=dict(cache_features=True))
SHAPE = (len(CFG.vit.taps), CFG.vit.tokens, CFG.vit.width)


class Encoder:
    """A function of the picture, and a count of the pictures it saw."""

    def __init__(self):
        self.seen = self.calls = 0

    def __call__(self, images):
        assert len(images) <= CHUNK and len(images) % STEP == 0  # few compiled shapes
        assert images.shape[1:] == (8, 12, 3) and images.dtype == np.uint8
        self.calls += 1
        self.seen += int((images.reshape(len(images), -1).max(1) > 0).sum())
        return self.of(images)

    @staticmethod
    def of(images):
        mean = images.reshape(len(images), -1).mean(1) / 7
        return np.sin(np.arange(np.prod(SHAPE)).reshape(SHAPE) + mean[:, None, None, None]).astype(
            np.float32
        )


@pytest.fixture
def refs(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(75):
        Image.fromarray(rng.integers(1, 256, (8, 8, 3)).astype(np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png"
        )
    return [ImageRef(str(tmp_path / "pictures" / f"{i}.png")) for i in range(75)]


def expected(refs):
    return Encoder.of(pixels(refs, CFG)).astype(ml_dtypes.bfloat16)


def test_each_image_is_computed_once(tmp_path, refs):
    encode = Encoder()
    store = FeatureStore(tmp_path / "store", encode, CFG)
    store.fill(refs[:40], progress=False)
    order = refs[60:30:-1]
    found = store.get(order)
    assert found.dtype == ml_dtypes.bfloat16 and found.shape == (30, *SHAPE)
    np.testing.assert_array_equal(found, expected(order))
    again = FeatureStore(tmp_path / "store", encode, CFG)
    np.testing.assert_array_equal(again.get(order), found)
    assert encode.seen == len(again) == 40 + 21
    assert again.get([]).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    "lost",
    [
        "nothing",
        "half a key",
        "key",
        "half a record",
        "records without keys",
        "keys without records",
    ],
)
def test_a_crash_loses_at_most_what_was_not_on_disk(tmp_path, refs, lost):
    store = FeatureStore(tmp_path / "store", Encoder(), CFG)
    store.fill(refs[:70], progress=False)
    keys, taps, record = (
        tmp_path / "store/keys.txt",
        tmp_path / "store/taps.bin",
        2 * int(np.prod(SHAPE)),
    )
    lines, content = keys.read_text(), taps.read_bytes()
    assert len(content) == 70 * record
    cut = len(lines) // 70
    keep = {
        "nothing": (lines, content),
        "half a key": (lines[: -cut // 2], content),
        "key": (lines[:-cut], content),
        "half a record": (lines[: -cut * 32], content[: -record // 2]),
        "records without keys": (lines[: cut * 32], content),
        "keys without records": (lines, content[: 20 * record]),
    }[lost]
    keys.write_text(keep[0])
    taps.write_bytes(keep[1])
    again = FeatureStore(tmp_path / "store", Encoder(), CFG)
    np.testing.assert_array_equal(again.get(refs), expected(refs))
    assert len(keys.read_text().split()) == len(set(keys.read_text().split())) == 75
    assert taps.stat().st_size == 75 * record


def test_keys_follow_the_content(tmp_path, refs):
    encode = Encoder()
    store = FeatureStore(tmp_path / "store", encode, CFG)
    store.get(refs[:2])
    shutil.copy(refs[0].path, tmp_path / "copy.png")  # moved: known
    assert (
        np.array_equal(store.get([ImageRef(str(tmp_path / "copy.png"))]), store.get(refs[:1]))
        and encode.seen == 2
    )
    Image.new("RGB", (8, 8), (3, 2, 1)).save(refs[0].path)  # changed: computed
    np.testing.assert_array_equal(store.get(refs[:1]), expected(refs[:1]))
    assert encode.seen == 3


def test_unreadable_images_do_not_stop_the_filling(tmp_path, refs):
    with open(refs[1].path, "r+b") as file:
        file.truncate(30)
    store = FeatureStore(tmp_path / "store", Encoder(), CFG)
    store.fill([*refs[:4], ImageRef("missing.png")], progress=False)
    assert len(store) == 3
    np.testing.assert_array_equal(store.get(refs[2:4]), expected(refs[2:4]))
    with pytest.raises(ImageError, match="1.png"):
        store.get(refs[:2])
    with pytest.raises(ImageError, match="missing.png"):
        store.get([ImageRef("missing.png")])


def test_a_wrong_encoder_is_named(tmp_path, refs):
    store = FeatureStore(tmp_path / "store", lambda images: np.zeros((CHUNK, 1, 2, 3)), CFG)
    with pytest.raises(ValueError, match=r"encode returned \(1, 2, 3\)"):
        store.get(refs[:1])


def test_fingerprint_tells_towers_and_preprocessing_apart():
    weights = {"vit/cls": np.arange(4.0), "llm/embed": np.ones(3)}
    cfg = tiny_config()
    base = fingerprint(cfg, weights)
    assert base == fingerprint(cfg, weights | {"llm/embed": np.zeros(3)})  # not the tower's
    assert base == fingerprint(tiny_config(data=dict(cache_features=True, seed=9)), weights)
    others = [
        fingerprint(cfg, weights | {"vit/cls": np.arange(4.0) + 1e-9}),
        fingerprint(cfg, weights | {"vit/pos": np.ones(1)}),
        fingerprint(CFG, weights),
    ]
    others += [
        fingerprint(tiny_config(data=dict(resize="pad")), weights),
        fingerprint(tiny_config(vit=dict(taps=(1, 3, 4))), weights),
    ]
    assert len({base, *others}) == 6


def test_missing_taps_of_a_batch_are_computed_together(tmp_path, refs):
    encode = Encoder()
    store = FeatureStore(tmp_path / "store", encode, CFG)
    samples = [
        Sample(str(i), "made", ((ref,),), (question("<image>q", "a"),))
        for i, ref in enumerate(refs[:20])
    ]
    made = [encode_sample(sample, TOKENIZER, CFG) for sample in samples]
    loaded = list(load_pictures([made[:9], made[9:]], CFG, store))
    np.testing.assert_array_equal(np.concatenate(loaded), expected(refs[:20]))
    assert (encode.calls, encode.seen) == (1, 20)


def test_batches_carry_taps(tmp_path):
    write_images(tmp_path / "pictures", 6)
    for i in range(6):
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"{i}")
    cfg = tiny_config(
        vit=dict(image_size=(8, 12)),
        data=dict(
            sources=(f"folder:{tmp_path / 'pictures'}",),
            weights=(1.0,),
            length=96,
            cache_features=True,
        ),
    )
    store = FeatureStore(tmp_path / "store", Encoder(), cfg)
    iterator = batches(cfg, TOKENIZER, store)
    batch, info = next(iterator)
    iterator.close()
    assert batch.pixels is None and batch.taps.dtype == ml_dtypes.bfloat16
    for b, keys in enumerate(info["keys"]):
        refs = [ImageRef(key.removeprefix("folder:")) for key in keys]
        np.testing.assert_array_equal(batch.taps[b, : len(refs)], expected(refs))
        assert not batch.taps[b, len(refs) :].any()
