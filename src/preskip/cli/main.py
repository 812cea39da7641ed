"""The `preskip` command: its subcommands, and how errors reach the user."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from preskip.cli.audit import audit
from preskip.cli.bake import bake
from preskip.cli.compare import compare
from preskip.cli.doctor import doctor
from preskip.cli.evaluate import evaluate
from preskip.cli.explain import explain
from preskip.cli.power import power
from preskip.cli.pretrain import pretrain
from preskip.cli.probe import probe
from preskip.cli.report import report
from preskip.errors import PreskipError
from preskip.version import __version__

app = typer.Typer(
    name="preskip",
    help="Pre-projection and content skip for transformer attention: insert, train frozen, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(probe)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(power)
app.command()(audit)
app.command()(explain)
app.command()(report)
app.command()(pretrain)
app.command()(bake)
app.command()(doctor)


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line on stderr and exit code 1, Ctrl-C in 130, SIGTERM in 143.

    With `--json` a mistake is also {"error": ...} on stdout, so that there is exactly one JSON document.
    """
    is_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _terminated_like_ctrl_c():
            app(arguments)
    except PreskipError as error:
        text = " ".join(str(error).split())
        if "--json" in arguments:
            print(json.dumps({"error": text}))
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)
        sys.exit(1)
    finally:
        if is_process:  # a second Ctrl-C would only print a traceback of the libraries' clean-up
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, as batch systems send it, end a run in order: it is marked as interrupted and can be resumed."""

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
