"""Names of numerical precisions; `components.sampling.device` gives the meaning on each device."""

from typing import Literal

Precision = Literal["fp32", "tf32", "bf16"]
