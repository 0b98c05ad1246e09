"""Generation: a model writes, one token after the other.

What is asked is a ``request``, what comes a ``reply``, and ``engine`` is what others use. ``desk``
says who is answered when, ``slots`` is the memory. ``choosing`` and ``sampling`` pick tokens,
``stopping`` decides when a reply ends. ``reading`` asks the model, whose weights ``body`` lays out
for the passes ``lean`` and ``native``, and ``products`` multiplies. ``scoring`` reads a text that
is there already.
"""

from instar.generation.engine import Engine
from instar.generation.reply import Completion, Reply
from instar.generation.request import Constraint, Request
from instar.generation.sampling import GREEDY, Sampling
from instar.generation.stopping import Stopping

__all__ = [
    "GREEDY",
    "Completion",
    "Constraint",
    "Engine",
    "Reply",
    "Request",
    "Sampling",
    "Stopping",
]
