"""besa's version, for every floor of the package to read."""

__version__ = "0.1.0"
