"""Laws of configurations: they mirror what they build, and a value has one place."""

import inspect
from typing import get_args

import pytest
from pydantic import ValidationError

from components.configuration import networks
from components.configuration.config import KIND, Config, PlaceError, kind_of
from components.configuration.diffusion import DegradationConfig, DiffusionTraining
from components.configuration.sampling import DiffusionSampling, MaskedTokenSampling, TokenSampling
from components.configuration.trainings import AutoencoderTraining
from components.models.autoencoder import BOTTLENECKS
from components.models.bundle import NETWORKS
from components.models.diffusion.steps import SAMPLERS, SamplerName
from tests.tiny_text_image import prior_config
from tests.tiny_training import autoencoder_config, diffusion_config

CONFIGS = {
    str(kind_of(config)): config
    for config in vars(networks).values()
    if inspect.isclass(config) and issubclass(config, Config) and kind_of(config) is not None
}
BUILT = NETWORKS | BOTTLENECKS


def arguments_of(network: type) -> set[str]:
    """What a constructor takes, and what those take that it hands `**settings` to."""
    found: set[str] = set()
    for base in network.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found


@pytest.mark.parametrize("kind", BUILT)
def test_fields_are_arguments_of_the_constructor(kind: str):
    assert {*CONFIGS[kind].model_fields} - {KIND} <= arguments_of(BUILT[kind])


def test_a_short_name_means_its_only_place():
    config = diffusion_config(total_steps=7, dropout=0.25, cond_drop_prob=0.5)
    assert config.optimization.total_steps == 7
    assert config.network.dropout == 0.25
    assert config.conditioning.cond_drop_prob == 0.5
    assert config.replace(total_steps=9).optimization.total_steps == 9
    assert config.replace(total_steps=9).replace(total_steps=7) == config
    with pytest.raises(PlaceError, match="unknown field 'total_stepz'"):
        diffusion_config(total_stepz=1)


def test_a_name_with_two_places_is_refused_and_a_path_is_not():
    class Pair(Config):
        left: DegradationConfig = DegradationConfig()
        right: DegradationConfig = DegradationConfig()

    with pytest.raises(PlaceError, match=r"mask_area stands in several places: left\.mask_area and right"):
        Pair.of(mask_area=(0.2, 0.3))
    assert Pair.of(**{"right.mask_area": (0.2, 0.3)}).right.mask_area == (0.2, 0.3)


def test_a_kind_stands_in_the_place_of_its_part_and_has_only_its_own_fields():
    flow = diffusion_config(process={"kind": "flow", "time_density": "logit_normal"})
    assert flow.process.model_dump() == {"kind": "flow", "time_density": "logit_normal"}
    assert flow.replace(process="edm").process.model_dump() == {"kind": "edm", "sigma_data": 0.5}
    with pytest.raises(PlaceError, match="unknown field 'min_snr_gamma'"):
        flow.replace(min_snr_gamma=None)
    with pytest.raises(PlaceError, match="unknown kind 'resnet': choose unet or image_attention_unet or dit"):
        flow.replace(network="resnet")


def test_a_kind_may_be_written_as_the_field_that_it_is():
    """So what a printed recipe shows, `network: {kind: dit}`, can be set by its name."""
    config = diffusion_config()
    numbers = {"model_dim": 16, "num_heads": 2}
    chosen = config.replace(network="dit", **numbers)
    assert config.replace(**numbers, **{"network.kind": "dit"}) == chosen  # the kind first, wherever it stands
    assert chosen.replace(**{"network.kind": "dit"}) == chosen
    scalars = autoencoder_config(bottleneck="fsq", levels=(4, 4))
    assert autoencoder_config(levels=(4, 4), **{"network.bottleneck.kind": "fsq"}) == scalars
    with pytest.raises(PlaceError, match="unknown kind 'resnet': choose unet or image_attention_unet or dit"):
        config.replace(**{"network.kind": "resnet"})
    with pytest.raises(PlaceError, match="a part of kind unet stays one: give dit in the place of the part"):
        config.network.replace(kind="dit")


def test_a_part_of_a_part_has_a_kind_too():
    config = autoencoder_config()
    codes = config.replace(codebook_dim=8, bottleneck="gumbel").network.bottleneck
    assert codes.model_dump() == {"kind": "gumbel", "codebook_size": 16, "codebook_dim": 8, "codebook_init": "data"}
    assert config.replace(bottleneck={"codebook_decay": 0.5}) == config.replace(codebook_decay=0.5)
    scalars = config.replace(levels=(4, 4), bottleneck="fsq")  # the kind first: it decides which fields there are
    assert scalars.replace(bottleneck="gaussian").network.bottleneck.model_dump() == {"kind": "gaussian"}
    with pytest.raises(PlaceError, match="unknown field 'codebook_size'"):
        scalars.replace(codebook_size=8)


def test_a_part_is_created_by_one_of_its_fields_with_its_other_defaults_and_read_again_as_it_was_printed():
    assert diffusion_config().low_res is None
    upsampler = diffusion_config(low_res_resolution=4)
    assert upsampler.low_res is not None
    assert upsampler.low_res.low_res_resolution == 4
    assert diffusion_config(degradation={}).degradation == DegradationConfig()
    process = prior_config(num_train_timesteps=7).process
    assert (process.num_train_timesteps, process.prediction_type, process.min_snr_gamma) == (7, "sample", None)
    for config in (diffusion_config(low_res_resolution=4), autoencoder_config()):
        assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_kinds_of_networks_and_samplers_that_can_be_chosen_are_those_that_there_are():
    assert CONFIGS.keys() == BUILT.keys()
    assert get_args(SamplerName) == tuple(SAMPLERS)


def test_a_typo_and_a_field_of_another_training_are_refused():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        DiffusionTraining.model_validate(diffusion_config().model_dump() | {"losses": {}})
    with pytest.raises(PlaceError):
        AutoencoderTraining.of(num_train_timesteps=10)


OUT_OF_RANGE = {
    TokenSampling: ({"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"temperature": -1}, {"guidance_scale": -1}),
    MaskedTokenSampling: ({"num_inference_steps": 0}, {"choice_temperature": -1}),
    DiffusionSampling: (
        *({"eta": 1.5}, {"threshold_percentile": 0}, {"strength": 0}, {"strength": 1.5}, {"noise_level": -1}),
        *(
            {"guidance_rescale": 2},
            {"guided_channels": 0},
            {"guidance_scale": float("inf")},
            {"num_inference_steps": 0},
        ),
        *({"guidance_interval": (2.0, 1.0)}, {"guidance_scale": 2.0, "autoguidance_scale": 2.0}),
    ),
}


@pytest.mark.parametrize(
    ("config", "values"), [(config, values) for config, each in OUT_OF_RANGE.items() for values in each], ids=str
)
def test_settings_of_sampling_out_of_range_are_refused_by_name(config: type[Config], values: dict[str, object]):
    with pytest.raises(ValidationError, match=next(iter(values))):
        config(**values)
