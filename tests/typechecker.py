"""The run-time type checker that `conftest.py` puts under every signature of the package."""

from beartype import BeartypeConf, beartype

_of_a_signature = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is welcome where a float is


def check(what):
    """Functions within functions go unchecked: they are made at every call, and so would their checks be."""
    return what if "<locals>" in what.__qualname__ else _of_a_signature(what)
