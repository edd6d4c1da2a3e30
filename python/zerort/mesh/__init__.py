"""Ranks and what is exchanged between them: the only room that imports torch.distributed."""

from zerort.mesh.comm import Comm, Work
from zerort.mesh.connect import connect
from zerort.mesh.consensus import Consensus
from zerort.mesh.gloo import GlooComm
from zerort.mesh.local import LocalComm
from zerort.mesh.nccl import NcclComm
from zerort.mesh.rendezvous import init_distributed

__all__ = [
    "Comm",
    "Consensus",
    "GlooComm",
    "LocalComm",
    "NcclComm",
    "Work",
    "connect",
    "init_distributed",
]
