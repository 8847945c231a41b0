"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Bad input. The message is one line that names the key or file and the remedy; the CLI prints it and exits with 2."""
