"""`zerort simulate`: what a step would take on ranks and wires that nobody has rented yet.

A *subject* is what is computed: read out of a recorded run, or a model that is planned without
memory. It is planned anew for each number of ranks, and the core's cost model runs the plan's own
lists. What this does not know is said in docs/planning.md.
"""

from zerort.simulate.model import of_model
from zerort.simulate.recorded import of_trace
from zerort.simulate.scales import Cluster, Fixed, Point, at
from zerort.simulate.subject import Subject

__all__ = ["Cluster", "Fixed", "Point", "Subject", "at", "of_model", "of_trace"]
