"""The one exception that every package raises for invalid user input."""


class ChorusError(Exception):
    """Invalid user input. The message names the value, what was expected and what to do next.

    Commands print it without a traceback and exit with status 2.
    """
