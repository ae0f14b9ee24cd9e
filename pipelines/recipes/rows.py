"""Every row of the lecture and the recipe that runs it."""

from pipelines.recipes.diffusion_rows import DIFFUSION_ROWS
from pipelines.recipes.discrete_rows import DISCRETE_ROWS
from pipelines.recipes.fashion import FASHION

ROWS = {**DISCRETE_ROWS, **DIFFUSION_ROWS, **FASHION}  # recipe -> row
