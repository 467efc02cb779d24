"""`dragonclf`: one command a verb. Progress and errors go to stderr, the result to stdout.

Exit codes: 0 done; 1 done, with images that could not be predicted; 2 the request is wrong (the message says what and how to mend it);
3 storage, network, credentials, disk or workers failed (the same command resumes); 4 another driver is at work on it; 5 done, with more
errors than --max-error-rate; 6 refused: what was to be proven does not hold; 7 stopped at --max-hours or --max-cost (likewise); 130 or
143 interrupted by Ctrl-C or SIGTERM (likewise).
"""

import importlib
import inspect
import itertools
import logging
import signal
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dragonclf import config, options
from dragonclf.outcomes import BudgetSpentError, BusyError, RefusedError, TooManyErrorsError
from dragonclf.storage import StorageError

log = logging.getLogger("dragonclf")

MAX_LISTED = 40  # classes, say; --json has all
MAX_WIDTH = 10_000  # of a table: URIs are printed whole, and it is the terminal that breaks lines


@dataclass(frozen=True)
class Verb:
    """A verb's options, the library function that does it, and its help."""

    name: str
    config: type[BaseModel]
    function: str  # module:name, imported when called, so that --help is quick
    help: str
    example: str


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "index", config.IndexConfig, "dragonclf.verbs.index:index",
            "Make an immutable snapshot of a folder or prefix of labelled images: checked, hashed, split.",
            "dragonclf index s3://photos/dragons --out s3://work/dragons",
        ),
        Verb(
            "train", config.TrainConfig, "dragonclf.verbs.train:train",
            "Fine-tune a classifier on a snapshot. The same command resumes a run that was killed.",
            "dragonclf train s3://work/dragons --out s3://work/models --epochs 3 --lr 0.01 --num-workers 2",
        ),
        Verb(
            "evaluate", config.EvaluateConfig, "dragonclf.verbs.evaluate:evaluate",
            "Measure a model on a split and write a report with its right, wrong and uncertain pictures.",
            "dragonclf evaluate s3://work/models/RUN/model s3://work/dragons --out report",
        ),
        Verb(
            "predict", config.PredictConfig, "dragonclf.verbs.predict:predict",
            "Print the probabilities of a few images, without Ray.",
            "dragonclf predict s3://work/models/RUN/model drogon.jpg viserion.jpg",
        ),
        Verb(
            "score", config.ScoreCommandConfig, "dragonclf.verbs.estimate:score_or_estimate",
            "Write a row of probabilities for every object under a prefix. The same command resumes, or does nothing if all is done.",
            "dragonclf score s3://work/models/RUN/model s3://photos/new --out s3://work/scores",
        ),
        Verb(
            "rescore", config.RescoreConfig, "dragonclf.verbs.rescore:rescore",
            "Apply a new head to the embeddings that `score --embeddings` wrote. No image is read.",
            "dragonclf rescore s3://work/models/NEW/model s3://work/scores --out s3://work/scores",
        ),
        Verb(
            "export", config.ExportConfig, "dragonclf.verbs.export:export",
            "Prove that a model may be run in a lower precision on this class of processor, or refuse it with the figures.",
            "dragonclf export s3://work/models/RUN/model s3://work/dragons --precision int8",
        ),
        Verb(
            "diff", config.DiffConfig, "dragonclf.verbs.diff:diff",
            "Compare two published scoring runs: images, statuses, labels, probabilities.",
            "dragonclf diff s3://work/scores/runs/3786b5735ccd-00001 s3://work/scores --out changes",
        ),
        Verb(
            "review", config.ReviewConfig, "dragonclf.verbs.review:review",
            "Make a page of the pictures whose labels a person should look at; it ends in a file for `index --corrections`.",
            "dragonclf review report --worst 200 --out review",
        ),
        Verb(
            "quality", config.QualityConfig, "dragonclf.verbs.quality:quality",
            "Rank what is wrong with a snapshot: bad images, copies, suspected label errors. No image is read.",
            "dragonclf quality s3://work/dragons --features s3://work/models --out quality",
        ),
        Verb(
            "compare", config.CompareConfig, "dragonclf.verbs.compare:compare",
            "Compare training runs with the first: options, figures, slices, and the images that only one has right.",
            "dragonclf compare s3://work/models/RUN s3://work/models/OTHER --out comparison",
        ),
        Verb(
            "report", config.ReportConfig, "dragonclf.verbs.report:report",
            "Write a page on a published scoring run: statuses, classes, confidence, uncertain pictures, errors, drift, throughput.",
            "dragonclf report s3://work/scores --model s3://work/models/RUN/model --out report",
        ),
    )
}  # fmt: skip

app = typer.Typer(
    help="Fine-tune an image classifier on Ray from a bucket of labelled images, and score whole buckets with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app()


def job(name: str) -> None:
    """Run a verb as a job on the cluster that this machine belongs to; the last line printed is one JSON object."""
    single = typer.Typer(pretty_exceptions_enable=False)
    verb = VERBS[name]
    command = _command(verb, as_job=True)
    single.command(help=_help(verb), context_settings={"help_option_names": ["-h", "--help"]})(command)
    single()


def report_errors(action: Callable[[], int], *, debug: bool) -> int:
    """Run `action` and return its exit code; turn what a user can mend into one line and a code of its own."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return action()
    except (ValueError, StorageError) as error:
        if debug:
            raise
        text = options.explain(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        typer.echo(f"dragonclf: error: {text}", err=True)
        return 3 if isinstance(error, StorageError) else 2
    except (BusyError, TooManyErrorsError, RefusedError, BudgetSpentError) as error:
        typer.echo(f"dragonclf: {error}", err=True)
        return {BusyError: 4, TooManyErrorsError: 5, RefusedError: 6, BudgetSpentError: 7}[type(error)]
    except OSError as error:  # this machine's: a full disk, no file descriptors
        if debug:
            raise
        typer.echo(f"dragonclf: error: {error}; the same command resumes", err=True)
        return 3
    except KeyboardInterrupt as interrupt:
        typer.echo("dragonclf: interrupted; the same command resumes", err=True)
        return 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends. It ends a command as Ctrl-C does."""


def _terminate(number: int, frame: types.FrameType | None) -> None:
    raise _Terminated


def configure_logging(*, debug: bool) -> None:
    """Send dragonclf's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s" if debug else "%(message)s")
    )
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False


def _command(verb: Verb, *, as_job: bool) -> Callable[..., None]:
    defaults = {"address": "auto"} if as_job else {}

    def run(context: typer.Context, json_output: bool, debug: bool, **values: Any) -> None:
        configure_logging(debug=debug)

        def action() -> int:
            chosen = verb.config.model_validate(options.given(context, values, defaults=defaults))
            module, _, function = verb.function.partition(":")
            summary = getattr(importlib.import_module(module), function)(chosen)
            summary = getattr(summary, "info", summary)
            if json_output or as_job:
                typer.echo(summary.model_dump_json())
            else:
                _print(summary)
            return getattr(summary, "exit_code", 0)

        raise typer.Exit(report_errors(action, debug=debug))

    extra = [
        ("json_output", typer.Option("--json", help="Print the result as one JSON object."), False),
        ("debug", typer.Option("--debug", help="Show tracebacks, and the logs of Ray and its workers."), False),
    ]
    signature = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    signature += options.parameters(verb.config, defaults=defaults) + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[bool, info])
        for name, info, default in extra
    ]
    run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]  typer reads options from here
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    return run


def _help(verb: Verb) -> str:
    return f"{verb.help}\n\nExample: {verb.example}"


def _print(summary: BaseModel) -> None:
    console = Console(soft_wrap=True, width=MAX_WIDTH)
    for name in type(summary).model_fields:
        value = getattr(summary, name)
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            console.print(f"\n{name.replace('_', ' ')}", highlight=False, markup=False)
            console.print(_table(value), highlight=False)
        else:
            console.print(f"{name.replace('_', ' '):>18}  {_text(value)}", highlight=False, markup=False)


def _table(rows: list[Any]) -> Table:
    """A column a field, and one a key of a field that is a dict; those that are empty in every row are left out."""
    cells = [_cells(row) for row in rows]
    names = [
        name for name in dict.fromkeys(itertools.chain(*cells)) if any(row.get(name) not in (None, "") for row in cells)
    ]
    table = Table(box=None)
    for name in names:
        is_number = all(isinstance(row.get(name), int | float | None) for row in cells)
        table.add_column(Text(name), justify="right" if is_number else "left")
    for row in cells:
        table.add_row(*(Text("" if row.get(name) is None else _text(row[name])) for name in names))
    return table


def _cells(row: BaseModel) -> dict[str, Any]:
    fields = row.model_dump()
    return {
        key: cell
        for name, value in fields.items()
        for key, cell in (value.items() if isinstance(value, dict) else [(name.replace("_", " "), value)])
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _listed(
            f"{key} {_text(item)}" if not isinstance(item, dict) else f"{key}: {_text(item)};"
            for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        return _listed(map(_text, value))
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _listed(texts: Iterable[str]) -> str:
    found = list(texts)
    more = [f"... ({len(found):,} in all)"] if len(found) > MAX_LISTED else []
    return ", ".join([*found[:MAX_LISTED], *more])


for _verb in VERBS.values():
    app.command(_verb.name, help=_help(_verb))(_command(_verb, as_job=False))


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(help="Folder for report, model and predictions.")] = Path("demo-run"),
    limit: Annotated[int | None, typer.Option(min=50, help="Take only this many photographs. None: all 2,624.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Go the whole way on real photographs and a local S3 server: index, train, evaluate, score. Needs the extra `demo`.

    Example: dragonclf demo --out demo-run
    """
    configure_logging(debug=debug)

    def action() -> int:
        from dragonclf.demo.story import demo

        summary = demo(out, limit=limit)
        if json_output:
            typer.echo(summary.model_dump_json())
        else:
            _print(summary)
        return 0

    raise typer.Exit(report_errors(action, debug=debug))
