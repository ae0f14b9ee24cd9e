"""Python that finds this folder first lacks the packages that LACKING names: as where they are not installed."""

import os
import sys

for name in os.environ.get("LACKING", "").split():
    sys.modules[name] = None  # type: ignore[assignment]
