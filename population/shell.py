"""Shell commands that a user can paste."""

import shlex


def command(*words: object) -> str:
    """Join words into one shell command, quoted where needed. Print it unwrapped, and never as rich markup."""
    return shlex.join(map(str, words))
