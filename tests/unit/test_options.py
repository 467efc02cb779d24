"""Every field of a config is an option or an argument, with help; and errors name the option."""

import inspect
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from dragonclf import cli, config, options
from dragonclf.cli import VERBS

CONFIGS = [verb.config for verb in VERBS.values()]
VALUES = {
    "images": "x.jpg",
    "precision": "bf16",
    "runs": "/other",
}  # of required options that are no place, or one of two
LISTS = {"images", "runs"}


def app_of(config_type: type[BaseModel], received: list[BaseModel]) -> typer.Typer:
    """A command line of one command that validates what it is given."""

    def command(context: typer.Context, **values: Any) -> None:
        received.append(config_type.model_validate(options.given(context, values)))

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options.parameters(config_type)])  # pyright: ignore[reportFunctionMemberAccess]
    app = typer.Typer()
    app.command()(command)
    return app


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_field_is_an_option_or_argument_with_help(config_type: type[BaseModel]):
    command = typer.main.get_command(app_of(config_type, []))
    found = {parameter.name: parameter for parameter in command.params}
    assert set(config_type.model_fields) <= set(found)
    for name, field in config_type.model_fields.items():
        parameter = found[name]
        assert field.description, name
        assert getattr(parameter, "help", None) == field.description
        is_argument = isinstance(parameter, click.Argument) or parameter.param_type_name == "argument"
        positional = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("positional", False)
        assert is_argument == bool(positional)
        if not is_argument:
            assert parameter.opts == [f"--{name.replace('_', '-')}"]
        assert parameter.required == field.is_required()


@pytest.mark.parametrize("config_type", CONFIGS)
def test_defaults_come_through_the_command_line(config_type: type[BaseModel]):
    required = {
        name: VALUES.get(name, "/somewhere") for name, field in config_type.model_fields.items() if field.is_required()
    }  # fmt: skip
    given: list[str] = []
    for parameter in options.parameters(config_type):
        if parameter.name in required:
            field, value = config_type.model_fields[parameter.name], required[parameter.name]
            given += [value] if isinstance(field.json_schema_extra, dict) else [f"--{parameter.name}", value]
    received: list[BaseModel] = []
    result = CliRunner().invoke(app_of(config_type, received), given)
    assert result.exit_code == 0, result.output
    wanted = {name: [value] if name in LISTS else value for name, value in required.items()}
    assert received == [config_type.model_validate(wanted)]


def test_values_of_each_kind_come_through():
    received: list[BaseModel] = []
    arguments = [
        "d",
        "--out",
        "s3://b/o",
        "--no-precompute",
        "--lr",
        "0.5",
        "--size",
        "96",
        "--name",
        "n1",
        "--runtime",
        "torch",
    ]
    result = CliRunner().invoke(app_of(config.TrainConfig, received), arguments)
    assert result.exit_code == 0, result.output
    [made] = received
    assert isinstance(made, config.TrainConfig)
    assert (made.precompute, made.lr, made.size, made.name, made.runtime, made.out) == (
        False,
        0.5,
        96,
        "n1",
        "torch",
        "s3://b/o",
    )
    assert made.data.endswith("/d")
    assert made.data.startswith("/")


@pytest.mark.parametrize(("given", "lr"), [("0.5", 0.5), ("1", 1.0), ("1e-3", 0.001), ("auto", "auto")])
def test_an_option_that_is_a_number_or_a_word(given: str, lr: float | str):
    received: list[BaseModel] = []
    result = CliRunner().invoke(app_of(config.TrainConfig, received), ["d", "--out", "o", "--lr", given])
    assert result.exit_code == 0, result.output
    [made] = received
    assert isinstance(made, config.TrainConfig)
    assert (made.lr, type(made.lr)) == (lr, type(lr))
    assert options.arguments(made)[1:3] == ["--lr", str(lr)]


@pytest.mark.parametrize(
    ("options_given", "lr"),
    [({}, 0.01), ({"precompute": False}, 0.001), ({"precompute": False, "lr": 0.01}, 0.01), ({"precompute": True, "lr": 0.02}, 0.02)],
)  # fmt: skip
def test_the_learning_rate_suits_what_is_trained(options_given: dict[str, Any], lr: float):
    made = config.TrainConfig.model_validate({"data": "/d", "out": "/o"} | options_given)
    assert made.lr == lr
    received: list[BaseModel] = []
    result = CliRunner().invoke(app_of(config.TrainConfig, received), options.arguments(made))
    assert result.exit_code == 0, result.output
    assert received == [made]


def test_arguments_leave_out_what_a_recipe_gives():
    given = {"data": "/d", "out": "/o", "recipe": "elpv-head", "num_workers": 2}
    made = config.TrainConfig.model_validate(given)
    assert options.arguments(made) == ["/d", "--out", "/o", "--recipe", "elpv-head", "--num-workers", "2"]


def test_replaced_defaults():
    [parameter] = [p for p in options.parameters(config.IndexConfig, defaults={"out": "o"}) if p.name == "out"]
    assert parameter.default == "o"


def test_options_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path):
    """Also those that are given as what is the default anyway."""
    recipe = tmp_path / "own.toml"
    recipe.write_text('[train]\nprecompute = false\nlr = 0.002\nepochs = 9\nflips = "both"\n')
    received: list[BaseModel] = []
    arguments = ["d", "--out", "o", "--recipe", str(recipe), "--epochs", "3", "--flips", "none"]
    result = CliRunner().invoke(app_of(config.TrainConfig, received), arguments)
    assert result.exit_code == 0, result.output
    [made] = received
    assert isinstance(made, config.TrainConfig)
    assert (made.epochs, made.flips, made.lr, made.precompute, made.erase) == (3, "none", 0.002, False, 0.0)
    in_python = {"data": "d", "out": "o", "recipe": str(recipe), "epochs": 3, "flips": "none"}
    assert config.TrainConfig.model_validate(in_python) == made


@pytest.mark.parametrize(
    ("config_type", "given", "parts"),
    [
        (config.IndexConfig, {"source": "gs://b/x", "out": "o"}, ["gs:// is not supported", "'gs://b/x'"]),
        (config.IndexConfig, {"source": "s", "out": "o", "valid_fraction": 1.5}, ["--valid-fraction: ", "less than 1", "1.5"]),
        (config.TrainConfig, {"data": "d", "out": "o", "name": "../up", "epochs": 0}, ["--name: ", "'../up'", "--epochs: ", "0"]),
        (config.ScoreConfig, {"model": "m", "source": "s", "out": "o", "typo": 1}, ["--typo: ", "not permitted"]),
        (config.ScoreConfig, {"model": "m", "source": "s", "out": "o", "runtime": "tf"}, ["--runtime: ", "'auto', 'torch', 'inductor' or"]),
        (config.PredictConfig, {"model": "m", "images": []}, ["at least 1 item"]),
        (config.TrainConfig, {"data": "d", "out": "o", "recipe": "typo"}, ["there is no recipe 'typo': ", "elpv-finetune, elpv-head"]),
    ],
)  # fmt: skip
def test_a_validation_error_in_one_line(config_type: type[BaseModel], given: dict[str, Any], parts: list[str]):
    with pytest.raises(ValidationError) as caught:
        config_type.model_validate(given)
    text = options.explain(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    for part in parts:
        assert part in text


def test_a_summary_names_many_classes_by_the_first(capsys: pytest.CaptureFixture[str]):
    class Summary(BaseModel):
        classes: list[str]
        counts: dict[str, int]

    names = [f"c{i:04}" for i in range(1_000)]
    cli._print(Summary(classes=names, counts=dict.fromkeys(names, 1)))
    classes, counts = capsys.readouterr().out.splitlines()
    assert classes.endswith("c0038, c0039, ... (1,000 in all)")
    assert counts.endswith("c0038 1, c0039 1, ... (1,000 in all)")
