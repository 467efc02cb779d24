"""The choice of pictures on frames made by hand, and their drawing."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dragonclf.evaluate.galleries import (
    MAX_GALLERY_CLASSES,
    Gallery,
    captions,
    draw_gallery,
    image_bytes,
    random_images,
    read_pictures,
    select_galleries,
    top_losses,
)

# torchvision warns in each decoder; `decode` hides it with catch_warnings, which does not hold across threads

CLASSES = ["drogon", "viserion"]


def two_class_frame(rows: list[tuple[str, str | None, float]]) -> pd.DataFrame:
    """Rows of (uri, true class, probability of viserion), all scored."""
    uris, labels, probs = zip(*rows, strict=True)
    viserion = np.array(probs)
    return pd.DataFrame(
        {
            "uri": uris,
            "status": "ok",
            "input_label": labels,
            "prob_drogon": 1 - viserion,
            "prob_viserion": viserion,
        }
    )


def uris_by_slug(galleries: list[Gallery]) -> dict[str, list[str]]:
    return {gallery.slug: gallery.rows["uri"].tolist() for gallery in galleries}


FRAME = two_class_frame(
    [
        ("d1", "drogon", 0.02),
        ("d2", "drogon", 0.30),
        ("d3", "drogon", 0.10),
        ("d4", "drogon", 0.95),  # wrong, badly
        ("d5", "drogon", 0.55),  # wrong, barely
        ("v1", "viserion", 0.99),
        ("v2", "viserion", 0.52),
        ("v3", "viserion", 0.80),
        ("v4", "viserion", 0.20),  # wrong
    ]
)


def test_the_five_kinds() -> None:
    galleries = select_galleries(FRAME, classes=CLASSES, per_gallery=2)
    assert [gallery.title for gallery in galleries] == [
        "Random correct",
        "Random incorrect",
        "Most correct: drogon",
        "Most correct: viserion",
        "Most incorrect: drogon",
        "Most incorrect: viserion",
        "Most uncertain",
    ]
    assert len({gallery.section for gallery in galleries}) == 5
    found = uris_by_slug(galleries)
    assert found["most-correct-0-drogon"] == ["d1", "d3"]
    assert found["most-correct-1-viserion"] == ["v1", "v3"]
    assert found["most-incorrect-0-drogon"] == ["d4", "d5"]
    assert found["most-incorrect-1-viserion"] == ["v4"]
    assert found["most-uncertain"] == ["v2", "d5"]
    assert len(found["random-correct"]) == 2
    assert set(found["random-correct"]) <= {"d1", "d2", "d3", "v1", "v2", "v3"}
    assert len(found["random-incorrect"]) == 2
    assert set(found["random-incorrect"]) <= {"d4", "d5", "v4"}
    assert galleries[4].description == "2 of 2 images of drogon predicted wrong, the worst first."
    assert galleries[5].description == "1 of 1 image of viserion predicted wrong, the worst first."


def test_galleries_of_one_class_alone() -> None:
    galleries = select_galleries(FRAME, classes=CLASSES, per_gallery=2, own=[1])
    assert [gallery.title for gallery in galleries if ":" in gallery.title] == [
        "Most correct: viserion",
        "Most incorrect: viserion",
    ]


def test_top_losses_are_where_the_true_class_was_least_probable() -> None:
    found = top_losses(FRAME.sample(frac=1, random_state=0), classes=CLASSES, per_gallery=4)
    assert found.rows["uri"].tolist() == ["d4", "v4", "d5", "v2"]
    assert found.description == "4 of 9 images evaluated, the least probable true class first."


def test_random_ones_are_of_all() -> None:
    found = random_images(FRAME, classes=CLASSES, per_gallery=9, seed=1)
    assert sorted(found.rows["uri"]) == sorted(FRAME["uri"])
    again = random_images(FRAME.iloc[::-1], classes=CLASSES, per_gallery=9, seed=1)
    assert again.rows["uri"].tolist() == found.rows["uri"].tolist()


def test_more_asked_than_there_are() -> None:
    found = uris_by_slug(select_galleries(FRAME, classes=CLASSES, per_gallery=20))
    assert sorted(found["random-correct"]) == ["d1", "d2", "d3", "v1", "v2", "v3"]
    assert sorted(found["random-incorrect"]) == ["d4", "d5", "v4"]
    assert found["most-uncertain"] == ["v2", "d5", "d2", "v3", "v4", "d3", "d4", "d1", "v1"]


def test_ties_go_by_uri_and_row_order_does_not_matter() -> None:
    frame = two_class_frame([(f"image {i}", "drogon", 0.25) for i in range(9)])
    shuffled = frame.sample(frac=1, random_state=5)
    found = uris_by_slug(select_galleries(shuffled, classes=CLASSES, per_gallery=3))
    assert found["most-correct-0-drogon"] == found["most-uncertain"] == ["image 0", "image 1", "image 2"]
    assert found == uris_by_slug(select_galleries(frame, classes=CLASSES, per_gallery=3))


def test_random_ones_follow_the_seed() -> None:
    frame = two_class_frame([(f"image {i:03}", "viserion", 0.9) for i in range(200)])
    draws = [uris_by_slug(select_galleries(frame, classes=CLASSES, seed=seed))["random-correct"] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 8


def test_no_mistakes_keeps_empty_galleries_that_say_none() -> None:
    galleries = select_galleries(FRAME[FRAME["uri"].isin(["d1", "v1"])], classes=CLASSES)
    empty = [gallery for gallery in galleries if gallery.rows.empty]
    assert [gallery.slug for gallery in empty] == [
        "random-incorrect",
        "most-incorrect-0-drogon",
        "most-incorrect-1-viserion",
    ]
    assert empty[0].description == "None: no image predicted wrong."
    assert empty[1].description == "None: no image of drogon predicted wrong."


def test_many_classes_use_the_two_highest_probabilities() -> None:
    frame = pd.DataFrame(
        {
            "uri": ["sure", "torn", "flat top"],
            "status": "ok",
            "input_label": ["a", "b", "c"],
            "prob_a": [0.50, 0.46, 0.05],
            "prob_b": [0.30, 0.45, 0.475],
            "prob_c": [0.20, 0.09, 0.475],
        }
    )
    galleries = select_galleries(frame, classes=["a", "b", "c"])
    assert uris_by_slug(galleries)["most-uncertain"] == ["flat top", "torn", "sure"]
    said = captions(galleries[-1].rows, classes=["a", "b", "c"])
    assert [(one.predicted, one.actual) for one in said] == [("b", "c"), ("a", "b"), ("a", "a")]
    assert [one.prob_predicted for one in said] == [0.475, 0.46, 0.50]
    assert [one.prob_actual for one in said] == [0.475, 0.45, 0.50]


def test_past_the_limit_only_classes_with_most_mistakes_get_their_own() -> None:
    classes = [f"class {k:02}" for k in range(30)]
    probs = np.full((60, 30), 0.5 / 29)
    targets = np.repeat(np.arange(30), 2)
    predicted = targets.copy()
    predicted[1 : 2 * MAX_GALLERY_CLASSES : 2] = 29  # one mistake in each of the first twelve classes
    probs[np.arange(60), predicted] = 0.5
    frame = pd.DataFrame({"uri": [f"{i:02}" for i in range(60)], "status": "ok"})
    frame["input_label"] = [classes[target] for target in targets]
    frame = pd.concat([frame, pd.DataFrame(probs, columns=[f"prob_{name}" for name in classes])], axis=1)
    galleries = select_galleries(frame, classes=classes)
    assert len(galleries) == 3 + 2 * MAX_GALLERY_CLASSES
    shown = [gallery.title for gallery in galleries if gallery.section == "Most incorrect"]
    assert shown == [f"Most incorrect: class {k:02}" for k in range(MAX_GALLERY_CLASSES)]


def test_slugs_are_safe_and_unique_whatever_the_names() -> None:
    classes = ["<script>alert(1)</script>", "../../etc", "A b", "a-b", "дракон", "", "x" * 300]
    frame = pd.DataFrame({"uri": ["1"], "status": "ok", "input_label": ["A b"]})
    for name in classes:
        frame[f"prob_{name}"] = 1.0 if name == "A b" else 0.0
    slugs = [gallery.slug for gallery in select_galleries(frame, classes=classes)]
    assert len(set(slugs)) == len(slugs) == 3 + 2 * len(classes)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) and len(slug) < 64 for slug in slugs)


@pytest.mark.parametrize("per_gallery", [0, 25])
def test_per_gallery_out_of_range(per_gallery: int) -> None:
    with pytest.raises(ValueError, match=f"per_gallery is {per_gallery}: choose 1 to 24"):
        select_galleries(FRAME, classes=CLASSES, per_gallery=per_gallery)


def write_image(path: Path, *, size: tuple[int, int], colour: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


def test_pictures_are_small_and_say_why_they_are_missing(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    uris = [
        write_image(tmp_path / "wide.png", size=(900, 300), colour="red"),
        write_image(tmp_path / "tiny.png", size=(20, 30), colour="blue"),
        str(tmp_path / "text.jpg"),
        str(tmp_path / "gone.jpg"),
    ]
    frame = two_class_frame([(uri, "drogon", 0.1) for uri in uris])
    pictures = read_pictures(select_galleries(frame, classes=CLASSES))
    assert set(pictures) == set(uris)
    wide, tiny, text, gone = (pictures[uri] for uri in uris)
    assert isinstance(wide, np.ndarray)
    assert isinstance(tiny, np.ndarray)
    assert (wide.shape, wide.dtype) == ((75, 224, 3), np.uint8)
    assert wide[0, 0].tolist() == [255, 0, 0]
    assert tiny.shape == (30, 20, 3)
    assert text == "unsupported: not an image in a known format"
    assert gone == "missing: the object no longer exists"


def test_a_gallery_is_drawn_whatever_its_classes_are_called(tmp_path: Path) -> None:
    classes = ["$\\frac{broken", "龍 дракон"]
    uris = [write_image(tmp_path / f"{i}.png", size=(60, 40), colour="#00ff00") for i in range(5)]
    frame = two_class_frame([(uri, "drogon", 0.1) for uri in [*uris, str(tmp_path / "gone.png")]])
    frame.columns = ["uri", "status", "input_label", *(f"prob_{name}" for name in classes)]
    frame["input_label"] = classes[0]
    galleries = select_galleries(frame, classes=classes)
    pictures = read_pictures(galleries)
    for gallery in galleries:
        drawn = Image.open(io.BytesIO(image_bytes(draw_gallery(gallery, pictures=pictures, classes=classes))))
        assert drawn.format == "PNG"
        num_green = int((np.asarray(drawn.convert("RGB")) == [0, 255, 0]).all(axis=2).sum())
        num_pictures = len(gallery.rows[gallery.rows["uri"] != str(tmp_path / "gone.png")])
        assert num_green == pytest.approx(num_pictures * num_green_of_one(), rel=0.05)


def num_green_of_one() -> int:
    """Pixels of one picture of 60 x 40, drawn as wide as a quarter of the figure less the gaps."""
    width = 0.96 * 960 / (4 + 3 * 0.2)
    return round(width * width * 40 / 60)
