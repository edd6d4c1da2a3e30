"""Ranks and what is exchanged between them: the only room that imports torch.distributed.

`Mesh` is named communicators, each a `Comm` over explicit ranks with a `Control` for small facts;
`Consensus` is how ranks decide all or none.
"""

from zerort.mesh.comm import Comm, Control, GatherMemory, Piece, Scatter, ScatterMemory, Work
from zerort.mesh.consensus import Consensus
from zerort.mesh.control import beside, meet
from zerort.mesh.gate import Gate
from zerort.mesh.hosts import Hierarchy, Seat, arrange, this_seat
from zerort.mesh.last_words import leave as leave_last_words
from zerort.mesh.mesh import Mesh, connect, job_rank, usual_device
from zerort.mesh.patience import Patience
from zerort.mesh.rendezvous import init_distributed, is_whole_job

__all__ = [
    "Comm",
    "Consensus",
    "Control",
    "Gate",
    "GatherMemory",
    "Hierarchy",
    "Mesh",
    "Patience",
    "Piece",
    "Scatter",
    "ScatterMemory",
    "Seat",
    "Work",
    "arrange",
    "beside",
    "connect",
    "init_distributed",
    "is_whole_job",
    "job_rank",
    "leave_last_words",
    "meet",
    "this_seat",
    "usual_device",
]
