"""The `preskip` command: its subcommands, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from preskip.cli.doctor import doctor
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
app.command()(report)
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
    """Run the command line; a user's mistake ends in one line on stderr and exit code 1, Ctrl-C in 130."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        app(arguments)
    except PreskipError as error:
        console.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        sys.exit(130)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
