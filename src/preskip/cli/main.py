"""The `preskip` command: its subcommands, and how errors reach the user."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter, ValidationError
from rich.text import Text

from preskip.cli.audit import audit
from preskip.cli.bake import bake
from preskip.cli.bench import bench
from preskip.cli.compare import compare
from preskip.cli.data import data
from preskip.cli.doctor import doctor, extra_for
from preskip.cli.evaluate import evaluate
from preskip.cli.explain import explain
from preskip.cli.power import power
from preskip.cli.pretrain import pretrain
from preskip.cli.probe import probe
from preskip.cli.report import report
from preskip.cli.runs import ENDING
from preskip.cli.serve import serve
from preskip.errors import AfterOutputError, PreskipError, is_out_of_memory, one_line
from preskip.progress import console
from preskip.version import __version__

app = App(
    name="preskip",
    help="Pre-projection and content skip for transformer attention: insert, train frozen, measure.",
    help_flags=["-h", "--help"],
    version=__version__,
    version_flags=["--version"],
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=(), allow_repeating=True),
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    probe,
    evaluate,
    compare,
    power,
    audit,
    explain,
    report,
    pretrain,
    bake,
    serve,
    bench,
    data,
    doctor,
)
for place, command in enumerate(_COMMANDS):
    app.command(command, name="eval" if command is evaluate else command.__name__, sort_key=place)
app.register_install_completion_command()
# What the system says of a path that cannot even be looked at, and the mend.
_OUT_OF_REACH = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENAMETOOLONG: "give a shorter name",
}


@app.command(name="--show-completion")
def show_completion() -> None:
    """Print the completion script of the current shell."""
    print(app.generate_completion())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line on stderr and exit code 1.

    Ctrl-C ends in 130, SIGTERM in 143, a closed terminal (SIGHUP) in 129, and a stdout that nobody reads any more, as
    behind `| head`, in 141.

    With `--json` a mistake is also {"error": ...} on stdout, so that there is exactly one JSON document; not behind a
    result that is printed already.
    """
    is_process = arguments is None
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):  # what cannot be encoded, as a minus in ASCII, ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _stdout():
        try:
            with _terminated_like_ctrl_c():
                app(arguments, console=console())
        except (PreskipError, CycloptsError) as error:
            _fail(_words(error), as_json="--json" in arguments and not isinstance(error, AfterOutputError))
        except KeyboardInterrupt:
            sys.exit(130)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _fail(f"out of memory ({one_line(error, 120)}): give smaller batches", as_json="--json" in arguments)
        except ModuleNotFoundError as error:
            if (mend := extra_for(error.name)) is None:
                raise
            _fail(f"this needs {error.name}, which is not installed: {mend}", as_json="--json" in arguments)
        except OSError as error:
            if error.filename is None or error.errno not in _OUT_OF_REACH:
                raise
            words = f"{error.filename} is out of reach ({error.strerror}): {_OUT_OF_REACH[error.errno]}"
            _fail(words, as_json="--json" in arguments)
        finally:
            if is_process:  # a second Ctrl-C would only print a traceback of the libraries' clean-up
                signal.signal(signal.SIGINT, signal.SIG_IGN)


def _at_home(argument: str) -> str:
    """An argument with the home directory for ~/, which a shell leaves as it is in --out=~/run."""
    return re.sub(r"^(--[\w-]+=)?~(?=/)", lambda found: f"{found[1] or ''}{os.path.expanduser('~')}", argument)


@contextmanager
def _stdout() -> Iterator[None]:
    """Write what is printed before the process ends, so that a failure of that ends in order, too."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if not _is_stdout_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        _fail(f"stdout cannot be written ({error.strerror}): send it elsewhere", as_json=False)


def _is_stdout_broken() -> bool:
    """Whether one more line cannot be written; a flush alone may have nothing left to fail at."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _fail(words: str, *, as_json: bool) -> NoReturn:
    text = " ".join(words.split())
    if as_json:
        print(json.dumps({"error": text}))
    console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), f" {text}"))
    sys.exit(1)


def _words(error: Exception) -> str:
    """What an error says; of a value that a flag does not allow, the flag and what it allows."""
    if isinstance(error, ValidationError) and error.argument:
        return f"{error.argument.name} {error.exception_message}"
    if isinstance(error, CycloptsError):
        return f"{error} See {' '.join(['preskip', *(error.command_chain or ())])} --help."
    return str(error)


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let the signals of `ENDING` end a run in order: it is marked as interrupted and can be resumed.

    One that is ignored already, as by nohup, stays so.
    """

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
