"""The one exception that every room raises for what a user sent."""


class ChorusError(Exception):
    """A user's input cannot be used. The message names the value, what was expected and what to do next.

    Commands print it without a traceback and exit with status 2.
    """
