"""The `sanawm` command: names every command and imports nothing of ours before one is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from sanawm import __version__
from sanawm.errors import UserError

# name -> (module, attribute, one-line help, extra that the module needs)
COMMANDS: dict[str, tuple[str, str, str, str]] = {
    "demo": ("sanawm.demo", "demo", "Make a tiny world and stream a clip from it: the whole path on a CPU.", "cpu,export"),
    "checkpoint": ("sanawm.model.checkpoint.cli", "checkpoint", "Synthesize or inspect checkpoints.", "export"),
    "calibrate": ("sanawm_calibration.cli", "calibrate", "Record what quantization needs to know about a checkpoint.", "export"),
    "export": ("sanawm_export.cli", "export", "Write a checkpoint's programs as ONNX graphs.", "export"),
    "build-engine": ("sanawm_export.cli", "build_engine", "Build an engine bundle for a target.", "export"),
    "kernels": ("sanawm_kernels.aot.cli", "kernels_group", "Compile the Triton kernels ahead of time for a target.", "export"),
    "plan": ("sanawm_export.cuda.cli", "plan", "Print the CUDA engine's launch plan: kernels, shapes, bytes, floor times.", "export"),
    "bench": ("sanawm_export.cuda.cli", "bench", "Time a bundle's programs on the GPU here.", "cuda,export"),
    "run": ("sanawm_runtime.cli", "run", "Stream a clip from a bundle.", "cpu"),
    "inspect": ("sanawm_runtime.cli", "inspect", "Show what a bundle is.", ""),
    "verify": ("sanawm_runtime.cli", "verify", "Check every file of a bundle against its manifest.", ""),
    "serve": ("sanawm_runtime.serve.cli", "serve", "Steer worlds live on a page.", "cpu,serve"),
    "sign": ("sanawm_runtime.sign_cli", "sign", "Sign bundles, and check who signed one.", "serve"),
    "parity": ("sanawm_export.cli", "parity", "Compare the model with recorded reference vectors.", "export"),
}


def _missing(command: str | None, error: ModuleNotFoundError) -> Exception:
    """The sentence that says which extra brings a missing package; the error itself where the package is ours."""
    if command not in COMMANDS or not error.name or error.name.startswith("sanawm"):
        return error
    extra = COMMANDS[command][3]
    return UserError(f"`sanawm {command}` needs {error.name.split('.')[0]}, which is not installed; run `pip install 'sanawm[{extra}]'`")


class _Door(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _, _ = COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise _missing(cmd_name, error) from error
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:  # commands import what is heavy when they run
            raise _missing(ctx.invoked_subcommand, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


@click.group(cls=_Door, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sanawm")
def door() -> None:
    """SANA-WM from checkpoint to engine bundle to live video."""


def invoke(arguments: list[str] | None = None) -> None:
    """Run a command line within this process; a command that ends with a code other than 0 raises click's Exit."""
    # Without its standalone mode click returns an exit code instead of raising it.
    code: Any = door.main(args=arguments, prog_name="sanawm", standalone_mode=False)
    if isinstance(code, int) and code:
        raise click.exceptions.Exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; exits 0, 1 (a check failed), 2 (a user's mistake) or 130 (interrupted)."""
    try:
        invoke(arguments)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"sanawm: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("sanawm: interrupted", err=True)
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
