"""`torchrun --nproc_per_node=N -m zerort.doctor`: the ranks of a job, looked into by themselves."""

import sys

from zerort.doctor.commands import doctor_parser
from zerort.terminal import execute

if __name__ == "__main__":
    sys.exit(execute(doctor_parser()))
