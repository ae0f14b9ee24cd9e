"""VQ-GAN, transformer prior and cascaded diffusion as one resumable workflow on Ray, MLflow and object storage."""

import importlib.util

if importlib.util.find_spec(f"{__name__}.components") is None:  # an editable install; see there
    importlib.import_module(f"{__name__}.checkout")
