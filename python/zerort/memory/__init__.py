"""Buckets' memory, of which the module's parameters are views."""

from zerort.memory.buckets import FlatBucket
from zerort.memory.fingerprint import digest
from zerort.memory.flat import Memory, Side
from zerort.memory.forms import Alone, Form
from zerort.memory.held import HeldBucket, Layout
from zerort.memory.homes import Homes, HostRoom
from zerort.memory.model import FlatModel
from zerort.memory.origins import Origin, Present
from zerort.memory.parameters import DTYPES, PlannedParameter, Signature, plannable
from zerort.memory.rooms import Kept, Placed, Room, Stepped, exchanged
from zerort.memory.secondary import Secondary
from zerort.memory.sizes import Asked, Dtypes, Kind, Piece, Places, Shape, pieces, shared_pieces
from zerort.memory.unintercepted import undisturbed, unintercepted, version_of
from zerort.memory.values import Freeable, Resident

__all__ = [
    "DTYPES",
    "Alone",
    "Asked",
    "Dtypes",
    "FlatBucket",
    "FlatModel",
    "Form",
    "Freeable",
    "HeldBucket",
    "Homes",
    "HostRoom",
    "Kept",
    "Kind",
    "Layout",
    "Memory",
    "Origin",
    "Piece",
    "Placed",
    "Places",
    "PlannedParameter",
    "Present",
    "Resident",
    "Room",
    "Secondary",
    "Shape",
    "Side",
    "Signature",
    "Stepped",
    "digest",
    "exchanged",
    "pieces",
    "plannable",
    "shared_pieces",
    "undisturbed",
    "unintercepted",
    "version_of",
]
