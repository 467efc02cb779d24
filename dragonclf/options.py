"""Command-line parameters out of a config model, so that an option is named, typed, documented and defaulted in one place."""

import inspect
import types
import typing
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def parameters(config_type: type[BaseModel], *, defaults: dict[str, Any] | None = None) -> list[inspect.Parameter]:
    """Typer's view of each field: an argument if it is marked positional, else an option. `defaults` replaces some fields' own."""
    given = defaults or {}
    fields = config_type.model_fields
    ordered = sorted(fields, key=lambda name: (not _is_positional(fields[name]), not fields[name].is_required()))
    return [_parameter(name, fields[name], given) for name in ordered]


def given(context: typer.Context, values: dict[str, Any], *, defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a command's `values` those that its user gave, over `defaults`: a config model, or a recipe in it, has the others."""
    sources = {name: context.get_parameter_source(name) for name in values}
    chosen = {name: values[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return (defaults or {}) | chosen


def arguments(config: BaseModel) -> list[str]:
    """The command-line arguments that give this config: positional ones, then options that do not follow from the others."""
    fields = type(config).model_fields
    values = {name: getattr(config, name) for name in fields if name in config.model_fields_set}
    chosen = [name for name, value in values.items() if value is not None and value != _implied(config, values, name)]
    found = [str(getattr(config, name)) for name in chosen if _is_positional(fields[name])]
    for name in chosen:
        value = getattr(config, name)
        if _is_positional(fields[name]):
            continue
        if isinstance(value, bool):
            found.append(_option(name) if value else _option(f"no_{name}"))
        else:
            for item in value if isinstance(value, list) else [value]:
                found += [_option(name), str(item)]
    return found


def _implied(config: BaseModel, values: dict[str, Any], name: str) -> Any:
    """What an option is if it is not given beside the others; None: it has to be."""
    try:
        made = type(config).model_validate({other: value for other, value in values.items() if other != name})
    except ValidationError:
        return None
    return getattr(made, name)


def explain(error: ValidationError) -> str:
    """A validation error in one line: each option, what is wrong, what was given; or what is wrong with several together."""
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        if item["loc"]:
            message = f"{_option(str(item['loc'][0]))}: {message} (given: {item['input']!r})"
        lines.append(message)
    return "; ".join(lines)


def _parameter(name: str, field: FieldInfo, defaults: dict[str, Any]) -> inspect.Parameter:
    if _is_positional(field):
        info = typer.Argument(help=field.description, metavar=name.upper(), show_default=False)
    else:
        default = defaults.get(name, field.default)
        info = typer.Option(
            _declaration(name, field),
            help=field.description,
            show_default=not field.is_required() and default not in (None, []),
        )
    required = field.is_required() and name not in defaults
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else defaults.get(name, field.default),
        annotation=Annotated[_typed(field.annotation), info],
    )


def _typed(annotation: Any) -> Any:
    """The type as Typer knows it: a choice of several is text there, which the model's validation reads."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return str if typing.get_origin(annotation) in (types.UnionType, typing.Union) and len(kinds) > 1 else annotation


def _is_positional(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("positional"))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _declaration(name: str, field: FieldInfo) -> str:
    return f"{_option(name)}/--no-{name.replace('_', '-')}" if field.annotation is bool else _option(name)
