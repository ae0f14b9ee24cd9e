"""How exactly products are computed; what each word means on a device is in `components.sampling.device`."""

from typing import Literal

Precision = Literal["fp32", "tf32", "bf16"]
