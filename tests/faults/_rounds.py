"""How long the fault tests try: a short round with every run of the suite, a long one with `make soak`."""

import os

SOAK = os.environ.get("PERQUEUE_SOAK") == "1"


def rounds(short, long):
    """Return the number of rounds of this run."""
    return long if SOAK else short
