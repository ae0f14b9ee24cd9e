"""On the path of a program that starts a Ray whose workers are forked: see tests/warm_workers.py."""

import sys
from pathlib import Path

sys.executable = str(Path(__file__).with_name("python"))
