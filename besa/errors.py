"""The error that a user can cause and mend."""


class BesaError(Exception):
    """One line: what is wrong and what to do. The command line prints it and exits with 2."""
