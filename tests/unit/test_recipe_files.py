"""Recipe files: what comes with the package, what is refused, and that a run's own gives the same options again."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragonclf import storage
from dragonclf.config import TrainConfig, recipes

OPTIONS = TrainConfig.model_fields


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_shipped_recipe_is_a_record_and_can_be_trained(name: str):
    found = recipes.read(name, OPTIONS)
    assert set(found.about) == {"data", "accuracy", "time", "command"}
    config = TrainConfig(data="d", out="o", recipe=name)
    assert config.model_dump(include=set(found.train)) == found.train
    assert name in str(OPTIONS["recipe"].description)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[train]\nepoch = 3", "has 'epoch', which is no option of train: did you mean epochs?"),
        ("[train]\ncrop-pct = 1.0", "has 'crop-pct', which is no option of train: did you mean crop_pct"),
        ("[train]\nzzz = 1", "has 'zzz', which is no option of train: see `dragonclf train --help`"),
        ('[train]\naddress = "auto"', "has 'address', which is for the command to say"),
        ("[trian]\nepochs = 3", "has 'trian' beside its tables about and train"),
        ("train = 3", "has 'train' beside its tables"),
        ("epochs: 3", "is no TOML: "),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, part: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="the recipe") as caught:
        recipes.read(str(path), OPTIONS)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_value_is_checked_as_an_option_is(tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nepochs = 0")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TrainConfig(data="d", out="o", recipe=str(path))


def test_options_come_back_from_what_was_written(tmp_path: Path):
    config = TrainConfig(
        data="d", out="o", precompute=False, lr="auto", crop_pct=1.0, layer_decay=0.8, weight_decay=1e-5, size=96
    )
    options = config.model_dump(exclude={"data", "out", "name", "address", "recipe"})
    storage.put(str(tmp_path / "args.toml"), recipes.as_toml(recipes.Recipe(train=options)).encode())
    again = TrainConfig(data="d", out="o", recipe=str(tmp_path / "args.toml"))
    assert again.model_copy(update={"recipe": None}) == config


VALUES = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES | st.lists(VALUES, max_size=3), max_size=5))
def test_every_value_comes_back(table: dict):
    assert tomllib.loads(recipes.as_toml(recipes.Recipe(about=table, train={"nothing": None}))) == {
        "about": table,
        "train": {},
    }
