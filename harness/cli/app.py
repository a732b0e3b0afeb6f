"""The command line: a table of commands, each imported when it is asked for, and errors as one line.

Nothing here measures, plans or lays out a table.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cached_property
from typing import Annotated, Any, TextIO, cast

import typer
import typer.core
import typer.main

from engines.errors import UserError, plainly
from harness import __version__
from harness.cli.by_name import by_name
from harness.contacts import contacts_watched
from harness.signals import INTERRUPTED, interrupt, no_core_dumps, on_first_signal
from profiles.system.gpu_allocator import allocator_environment

PROGRAM = "lspzo-bench"

_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""click's UsageError, which newer versions of typer bring along under another name."""

COMMANDS: dict[str, tuple[str, str]] = {
    "probe": (
        "harness.cli.machine:probe",
        "Measure this machine: GPU, link, CPU, memory, disk. Takes up to a minute.",
    ),
    "doctor": (
        "harness.cli.machine:doctor",
        "Say what is not as it should be on this machine, with evidence, likely cause and remedy.",
    ),
    "profiles": ("harness.cli.machine:profiles_app", "List, show and compare machines."),
    "recommend": (
        "harness.cli.recommend:recommend",
        "Plan every method for a job on a machine: does it fit, how long, what limits it, what to change.",
    ),
    "compare": (
        "harness.cli.compare:compare",
        "Run every plan, each in its own process, interleaved; one record per run, kept whatever happens.",
    ),
    "report": (
        "reports.commands:report",
        "Judge saved runs and write report.md and report.html. Reads only what was saved; needs no GPU.",
    ),
    "criteria": (
        "reports.commands:criteria_app",
        "Write down what would count as success, before measuring.",
    ),
    "submit": (
        "reports.commands:submit",
        "Turn a record into one small file to share, without paths or names: it is shown, then written.",
    ),
    "poc": (
        "reports.poc:poc",
        "The whole line in one go: probe, recommend, compare, report. Its last line is the report's path.",
    ),
    "data": (
        "harness.cli.data:data",
        "Show a file as a model will see it: examples in tokens, what the loss counts, labels, lengths.",
    ),
    "run": (
        "harness.cli.train:run",
        "Fine-tune with one engine and export a Hugging Face folder. Its last line is that folder.",
    ),
    "export": (
        "harness.cli.train:export",
        "Write the model of a run as a Hugging Face folder, without training. Its last line is that folder.",
    ),
    "generate": (
        "harness.cli.generate:generate",
        "Continue prompts with weights that stream from host memory, once per new token for all prompts.",
    ),
    "engines": (
        "harness.cli.listing:engines",
        "List the engines, what each is, whether it can run here, and its settings.",
    ),
    "models": (
        "harness.cli.listing:models",
        "List the named shapes that `--model NAME --random-weights` takes.",
    ),
}
"""Name -> `module:function` or `module:app`, and its line in `--help`, which is the first of its own help."""


TABLE_COLUMNS = 100
"""Of a terminal, from which `--help` is a table: in a narrower one its columns would cut words."""


def _tell_plainly(command: Any) -> None:
    """Let it and its own commands tell their help as text."""
    command.rich_markup_mode = None
    for each in getattr(command, "commands", {}).values():
        _tell_plainly(each)


class LazyCommand(typer.core.TyperCommand):
    """A line of `--help`, and the command itself once it is called."""

    def __init__(self, name: str, target: str, line: str) -> None:
        super().__init__(name, help=line, rich_markup_mode="markdown")
        self._target = target

    @cached_property
    def real(self) -> Any:
        found = by_name(self._target)
        if not isinstance(found, typer.Typer):
            app_of_one = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            app_of_one.command(self.name)(found)
            found = app_of_one
        command = typer.main.get_command(found)
        command.name = self.name
        if shutil.get_terminal_size().columns < TABLE_COLUMNS:
            _tell_plainly(command)
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        return self.real.make_context(*args, **extra)


class LazyCommands(typer.core.TyperGroup):
    """`COMMANDS`, in their order."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (target, line) in COMMANDS.items():
            self.add_command(LazyCommand(name, target, line))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    name=PROGRAM,
    cls=LazyCommands,
    help=(
        "Can this machine fine-tune this model by offloading, how slow, how good, with which method? "
        "Probe the machine, predict, measure every method in its own process, and write the decision up."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def fold_help() -> None:
    """Long words of the options' table go on in the next line, where typer's table cuts them: at 80 columns
    that was every third example."""
    import rich.columns
    import typer.rich_utils
    from rich.table import Table

    class Folding(Table):
        def add_row(self, *cells: Any, **styles: Any) -> None:
            super().add_row(*cells, **styles)
            for column in self.columns:
                column.overflow = "fold"

    for module in (typer.rich_utils, rich.columns):
        module.Table = Folding  # type: ignore[attr-defined]


LOUD_WHEN_IMPORTED = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers that warn of libraries' own parts as transformers imports torchao, or PEFT bitsandbytes: of none
that is used here."""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2; a signal is exit code 130."""
    _open_standard_streams()
    no_core_dumps()
    os.environ.update(allocator_environment())  # before torch is imported: `run` trains in this process
    for name in LOUD_WHEN_IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)
    stdout, stderr = sys.stdout, sys.stderr
    if "--help" in sys.argv or len(sys.argv) == 1:
        fold_help()
    try:
        with (
            redirect_stdout(cast(TextIO, _Stdout(stdout))),
            redirect_stderr(cast(TextIO, _Stderr(stderr))),
            on_first_signal(interrupt),
            contacts_watched(),
        ):
            code = app(prog_name=PROGRAM, standalone_mode=False)
    except UserError as error:
        _Stderr(stderr).write(f"error: {error}\n")
        if isinstance(error, _CannotPrint) and stdout is not None:
            # Nor could Python, at its end, what is left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except _USAGE_ERROR as error:
        if message := _message_of(error):  # else there were no arguments, and the help has been printed
            sys.stderr.write(f"error: {message}\n")
        sys.exit(2)
    sys.exit(code)


def _message_of(error: Any) -> str:
    """A usage error as one line, or nothing where it has no message."""
    message = " ".join(error.format_message().split())
    if not message:
        return ""
    before, colon, said = message.partition(": ")
    message = f"{before}{colon}{plainly(said)}"
    message = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", message).removesuffix(".")
    command = PROGRAM if error.ctx is None else error.ctx.command_path
    return str(UserError(command, message[0].lower() + message[1:], f"see '{command} --help'"))


def _open_standard_streams() -> None:
    """Gives the numbers of standard streams that were closed to nothing: else the next file to be opened
    would get one, and what is printed would go there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class _Stderr:
    """Standard error that is written to as long as it goes: after a lost connection there is nobody to tell,
    and what is being saved then must be."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream or io.StringIO(), name)


class _CannotPrint(UserError):
    """Standard output cannot be written."""


class _Stdout:
    """Standard output whose failure is a `UserError`, but for a reader that has gone: typer ends the program
    then, without a word."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is None:
            raise _CannotPrint("standard output", "is closed", "leave it open, or send it to a file")
        with self._reporting_failures():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # of a terminal that knows few letters, or a name that is no text
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with self._reporting_failures():
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream or io.StringIO(), name)

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _CannotPrint(
                "standard output", f"cannot be written ({error.strerror})", "free space or send it elsewhere"
            ) from None
