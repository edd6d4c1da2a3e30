"""Buckets' memory, of which the module's parameters are views."""

from zerort.memory.buckets import FlatBucket, FlatModel, Layout
from zerort.memory.parameters import DTYPES, PlannedParameter, Signature, plannable
from zerort.memory.unintercepted import undisturbed, unintercepted
from zerort.memory.values import Form, Memory, Resident

__all__ = [
    "DTYPES",
    "FlatBucket",
    "FlatModel",
    "Form",
    "Layout",
    "Memory",
    "PlannedParameter",
    "Resident",
    "Signature",
    "plannable",
    "undisturbed",
    "unintercepted",
]
