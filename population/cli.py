"""The entry point of `chorus`. It lists the subcommands and imports a package only when its command is called."""

import errno
import importlib
import io
import os
import sys

import click

from chorus.population.errors import ChorusError

# name: (module:attribute, help line). Modules are named, not imported, since this package imports no other package of chorus.
_COMMANDS = {
    "train": ("chorus.train.command:train", "Train a population of models from text."),
    "distil": ("chorus.train.candidates:distil", "Distil the mixture into one student that joins the population."),
    "average": ("chorus.train.candidates:average", "Add weight averages of each trajectory's last members."),
    "prior": ("chorus.prior.command:prior", "Fit the weights and members for every budget."),
    "serve": ("chorus.serve.gateway.command:serve", "Serve a population over HTTP, with a budget per request."),
    "engine": (
        "chorus.serve.engine.command:engine",
        "Run one engine without a gateway, for gateways on other machines.",
    ),
    "bench": ("chorus.serve.loadtest.command:bench", "Load-test a gateway and print the results."),
    "population": ("chorus.population.command:population", "Inspect a population, or make one from checkpoints."),
}

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class _LazyGroup(click.Group):
    """A group that imports a subcommand only when it is used; `--help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chorus-lm", message="chorus %(version)s")
def cli() -> None:
    """Many imperfect language models, mixed at every token, answer as one better model.

    \b
    chorus train stdlib --out my-population    text in, a population out
    chorus prior fit my-population             weights and members for every budget
    chorus serve my-population                 serve the mixture behind an OpenAI API
    """


def main() -> None:
    """Run the command. A user's mistake gives one sentence on stderr and exit status 2, never a traceback."""
    # Keep the working directory out of `sys.path` in all child processes, so that they never import a user's `types.py`,
    # `train.py` or `chorus.py`.
    os.environ["PYTHONSAFEPATH"] = "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes; stderr does this by default
    try:
        cli.main(standalone_mode=False)
    except ChorusError as error:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, missing permissions
        if error.filename is None and error.errno not in _DISK:
            raise
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        where = "" if error.filename is None else f"{error.filename}: "
        click.echo(
            f"{where}{error.strerror}. Existing files are intact. Fix the cause and run the command again.", err=True
        )
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
