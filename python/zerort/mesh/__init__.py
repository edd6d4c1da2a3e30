"""Ranks and what travels between them: the only room that imports torch.distributed."""

from zerort.mesh.comm import Comm, GlooComm, LocalComm, NcclComm, Work, connect, init_distributed

__all__ = ["Comm", "GlooComm", "LocalComm", "NcclComm", "Work", "connect", "init_distributed"]
