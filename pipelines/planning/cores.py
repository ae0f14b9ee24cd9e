"""Cores that other programs use too. No torch is imported: its libgomp reads these settings as it is loaded.

Between two operations torch's threads wait for each other. By default they spin, up to 300,000 times; where another
program has one of their cores, that keeps the thread that is waited for from it. Measured with two threads of tiny
networks on two cores with a load of 15 to 40: 25 to 50 s of sampling, and 0.7 to 1 s with this; the same bits.
"""

import os

SHARED_CORES = {"GOMP_SPINCOUNT": "1000"}  # libgomp's own number where there are more threads than cores


def share_cores() -> None:
    """Let threads that wait give their core away soon; to be called before torch is imported. The user's own setting
    counts."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SHARED_CORES.items():
            os.environ.setdefault(name, value)
