"""Commands as a user may paste them."""

import shlex


def command(*words: object) -> str:
    """The words as one shell command, quoted where the shell needs it. Print it unwrapped, and never as markup."""
    return shlex.join(map(str, words))
