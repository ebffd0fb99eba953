"""What `test_mpi_gives_the_same_bits` starts: one process calls, the others compute parts."""

import os
import sys

from mpi4py import MPI
from mpi4py.futures import MPIPoolExecutor

os.environ["BNN_TEST_CALLER"] = "another" if MPI.COMM_WORLD.rank else str(os.getpid())

import bnn
from tests.bnn import test_parts as parts

if __name__ == "__main__":
    method = parts.METHODS["nuts"]
    with MPIPoolExecutor() as executor:
        far = parts.fit(method, parts.mortal, executor=executor, checkpoint=sys.argv[1])
        print("same" if parts.same(far, parts.fit(method)) else "other")
        try:
            parts.fit(method, parts.odd, executor=executor)
        except bnn.FitError as error:
            print("FitError", error)
