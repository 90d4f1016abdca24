"""Rules of whole documents: pictures that they lose, and which are dropped."""

import numpy as np
import pytest

from evlm_jax.data.clean import Documents, clean
from evlm_jax.data.samples import ImageRef, SampleError
from tests.data.test_clean import CFG, FREE, noise, page, rules, saved, sums


def test_documents_lose_pictures_or_are_dropped(tmp_path):
    good, other = saved(tmp_path / "a.png", noise(64, 64)), saved(tmp_path / "b.png", noise(70, 64))
    small, none = saved(tmp_path / "c.png", noise(63, 64)), ImageRef("none.png")
    cfg = rules(web_similarity=0.0, web_images=3, web_characters=40)
    samples = [
        page("<image>One. <image>Two.<image>", good, small, other, key="0", scores=(0.1, 0.2, 0.3)),
        page("<image>One.", none, key="1"),
        page("<image>" * 4, *[good] * 4, key="2"),
        page("<image>" + "x" * 41, good, key="3"),
        page("<image>" + "x" * 40, good, key="4"),
        page("No picture.", key="5"),
    ]
    cleaner = Documents(cfg)
    kept = dict(clean(samples, cleaner))
    assert list(kept) == [0, 4]
    assert (
        kept[0] == page("<image>One. Two.<image>", good, other, key="0", scores=(0.1, 0.3))
        and kept[4] == samples[4]
    )
    receipt = cleaner.receipt
    assert (receipt.seen, receipt.kept) == (
        {"document": 6, "image": 10},
        {"document": 2, "image": 3},
    ) and sums(receipt)
    assert receipt.dropped["document"] == {
        "no picture left": 2,
        "web_images": 1,
        "web_characters": 1,
    }
    assert receipt.dropped["image"] == {"side": 1, "damaged": 1, "of a dropped document": 5}


def test_relevance_of_documents(tmp_path):
    good, other = saved(tmp_path / "a.png", noise(64, 64)), saved(tmp_path / "b.png", noise(70, 64))
    told = page("<image>One. <image>Two.", good, other, scores=(0.2, 0.24))
    ((_, kept),) = clean([told], Documents(CFG))
    assert kept.dialogs[0][0].text == "One. <image>Two." and kept.refs == (other,)

    def scorer(refs, texts):
        assert [text.strip() for text in texts] == ["One.", "Two!", "三。", "Four"]
        return np.array([[0.5, 0.3, 0, 0], [0.4, 0.1, 0, 0]])[
            [[good, other].index(ref) for ref in refs]
        ]

    cleaner = Documents(CFG, scorer)
    ((_, kept),) = clean([page("<image>One. Two!<image>三。Four", good, other)], cleaner)
    assert kept.refs == (good, other)  # one sentence a picture: 0.3 + 0.4 is more than 0.5 + 0.1
    cleaner = Documents(rules(web_similarity=0.35), scorer)
    ((_, kept),) = clean([page("<image>One. Two!<image>三。Four", good, other)], cleaner)
    assert kept.refs == (other,) and cleaner.receipt.dropped["image"] == {"web_similarity": 1}


def test_a_wrong_document_is_named():
    with pytest.raises(SampleError, match="made/k: must be one document with 2 <image> markers"):
        Documents(FREE).judge(page("<image>x", *[ImageRef("a")] * 2))
