"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Bad input: one line that names key or file and remedy; the command line prints it and exits with 2."""
