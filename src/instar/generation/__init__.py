"""Generation: a model writes, one token after the other.

What is asked is a ``request``, what comes a ``reply``. ``sampling`` and ``choosing`` pick tokens,
``stopping`` decides when a reply ends. ``slots`` is the memory, ``desk`` says who is answered when,
``reading`` asks the model, and ``engine`` is what others use.
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
