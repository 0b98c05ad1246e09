"""Generation: a model writes, one token after the other.

``sampling`` chooses a token, ``stopping`` decides when a reply ends, ``engine`` does the writing.
"""

from instar.generation.engine import Completion, Engine
from instar.generation.sampling import GREEDY, Sampling
from instar.generation.stopping import Stopping

__all__ = ["GREEDY", "Completion", "Engine", "Sampling", "Stopping"]
