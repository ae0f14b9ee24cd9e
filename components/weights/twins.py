"""Models as folders of diffusers: our weights under the names of a class that computes the same.

The rules that import a family are read the other way: the class of diffusers, built on the meta device by its
config.json, tells the names, and the rules say which tensor of ours each name is. So exporting and importing again
gives the same tensors. A network with a trait that the class lacks is refused by the trait."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models.bundle import ModelBundle
from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.objective import make_objective
from components.weights.files import CONFIG, PIPELINE, WEIGHTS
from components.weights.importing import FAMILIES
from components.weights.renaming import PART, WeightFamily, new_name, refuse_trait

SCHEDULER = "scheduler/scheduler_config.json"
EVERY_TENTH = 10  # of the training steps, for the scale of the time


def write_twin(bundle: ModelBundle, folder: Path) -> list[str]:
    """Writes a folder that diffusers opens; returns the names of its files.
    A model of diffusion has its network in `unet` and its schedule in `scheduler`, and is a whole pipeline where it
    makes images without a condition. Raises ValueError, before it writes, for a model without a twin."""
    if find_spec("diffusers") is None:
        raise ValueError(
            "the export needs the names in diffusers: pip install diffusers",
        )
    family = family_of_twin(bundle)
    assert family.config is not None
    config = family.config(bundle.network, bundle.module)
    tensors = foreign_tensors(bundle, family, config)
    files = {CONFIG: {"_class_name": family.class_name, **config}}
    if "objective" in bundle.settings:
        files = {
            f"unet/{CONFIG}": files[CONFIG],
            SCHEDULER: scheduler_config(bundle),
        }
        if not config["num_class_embeds"] and "latent_scale" not in bundle.settings:
            scheduler = files[SCHEDULER]["_class_name"]
            pipeline = {
                "_class_name": scheduler.replace("Scheduler", "Pipeline"),
                "unet": ["diffusers", "UNet2DModel"],
            }
            files[PIPELINE] = pipeline | {"scheduler": ["diffusers", scheduler]}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1))
    weights = next(name for name in files if name.endswith(CONFIG)).replace(CONFIG, WEIGHTS[0])
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    return [*files, weights]


def family_of_twin(bundle: ModelBundle) -> WeightFamily:
    """The family of diffusers whose class has the network's parts. Raises ValueError if there is none."""
    codes = bundle.network.get("bottleneck", {}).get("kind", "gaussian") != "gaussian"
    for family in FAMILIES:
        if family.config is not None and bundle.kind in family.kinds and ("VQ" in family.class_name) == codes:
            return family
    raise ValueError(
        f"no class of diffusers is a twin of a network {bundle.kind}",
    )


def foreign_tensors(bundle: ModelBundle, family: WeightFamily, config: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors by the names of the class. Raises ValueError if one has no place there."""
    import diffusers

    with torch.device("meta"):
        wanted = getattr(diffusers, family.class_name).from_config(config).state_dict()
    assert family.sizes is not None
    rules = family.rules(family.sizes(config))
    own = dict(bundle.module.state_dict())
    if "VQ" in family.class_name:  # codes as they are looked up, of length 1 where latents are compared so
        codebook: Any = bundle.module
        indices = torch.arange(codebook.codebook_size)[None, None]
        own = {name: each for name, each in own.items() if not name.startswith("bottleneck.")}
        own["bottleneck.codebook"] = codebook.lookup(indices)[0, :, 0].T
    places = {foreign: new_name(foreign, rules) for foreign in wanted}
    parts: dict[str, int] = {}  # our name -> how many foreign tensors it is
    for place in places.values():
        parts[PART.sub("", place)] = parts.get(PART.sub("", place), 0) + 1
    if parts.keys() != own.keys():
        other = sorted(parts.keys() ^ own.keys())[0]
        raise ValueError(
            f"{family.class_name} and the network differ in {other}",
        )
    found = {}
    for foreign, place in places.items():
        number = PART.search(place)
        whole = own[PART.sub("", place)].chunk(parts[PART.sub("", place)])
        piece = whole[int(number.group()[1:]) if number else 0]
        found[foreign] = piece.reshape(wanted[foreign].shape).detach().cpu().contiguous().clone()
    return found


def scheduler_config(bundle: ModelBundle) -> dict[str, Any]:
    """The scheduler of a model of diffusion, with our betas one by one.
    DDIM steps evenly from the last step on, so that both sample alike at a number of steps that divides the schedule;
    a learned variance is read by DDPM alone. Raises ValueError for another process, or another scale of the time."""
    objective = make_objective(bundle.settings["objective"])
    if not isinstance(objective, DiscreteObjective):
        raise ValueError(
            f"its process is {bundle.settings['objective']['kind']}, without steps",
        )
    times = torch.arange(0, len(objective.schedule), EVERY_TENTH)

    def time_of(x_t: Tensor, time: Tensor) -> Tensor:
        return time + 0 * x_t[:, 0, 0, 0]

    seen = objective.apply(time_of, torch.zeros(len(times), 1, 1, 1), times)
    refuse_trait(
        not torch.equal(seen.double(), times.double()),
        "its time is on another scale than its steps",
    )
    learned = objective.variance == "learned_range"
    return {
        "_class_name": "DDPMScheduler" if learned else "DDIMScheduler",
        "num_train_timesteps": len(objective.schedule),
        "trained_betas": objective.schedule.betas.tolist(),
        "prediction_type": objective.prediction_type,
        "clip_sample": "latent_scale" not in bundle.settings,
        "timestep_spacing": "trailing",
        **({"variance_type": "learned_range"} if learned else {"set_alpha_to_one": True}),
    }
