"""Laws of the classifier of noisy images, and of guidance by it."""

import pytest
import torch

from components.configuration.sampling import ClassifierSampling
from components.models.diffusion.objective import make_objective
from components.models.unet import AttentionPool2d, NoisyClassifier
from components.sampling.generators.diffusion import check_guides, class_log_probabilities, classifier_score
from components.sampling.model import SamplingModel
from tests.peer_unets import randomized
from tests.tiny_text_image import classifier_config
from tests.tiny_training import DATASET_INFO

SMALL = {"resolution": 8, "num_classes": 7, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (4,), "head_dim": 8}


def test_the_pool_is_attention_of_the_mean():
    """torch's own multi-head attention over the mean and all positions; of its answers the first one counts."""
    pool = randomized(AttentionPool2d(16, size=3, num_heads=2, out_features=7)).double()
    x = torch.randn(2, 16, 3, 3).double()
    tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)], dim=1) + pool.positions
    peer = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    weights = {"in_proj_weight": pool.qkv.weight, "in_proj_bias": pool.qkv.bias}
    peer.load_state_dict(weights | {"out_proj.weight": torch.eye(16), "out_proj.bias": torch.zeros(16)})
    with torch.no_grad():
        wanted = pool.proj(peer(tokens, tokens, tokens)[0][:, 0])
        torch.testing.assert_close(pool(x), wanted, atol=1e-12, rtol=0)
        assert (pool(x) - pool(x.flip(3))).abs().max() > 1e-3  # it knows where things are


def test_logits_depend_on_every_pixel_and_on_the_time():
    network = randomized(NoisyClassifier(**SMALL))
    x_t, time = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([1, 500])
    logits = network(x_t, time)
    assert logits.shape == (2, 7)
    gradient = torch.autograd.grad(logits.log_softmax(1)[:, 3].sum(), x_t)[0]
    assert (gradient != 0).all()
    assert (logits - network(x_t, time.flip(0))).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(logits[1:], network(x_t[1:], time[1:]), atol=1e-5, rtol=1e-5)


def test_training_under_bf16_autocast_reaches_every_weight():
    network, x_t = randomized(NoisyClassifier(**SMALL)).train(), torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x_t, torch.tensor([1, 500, 900, 20]))
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("change", [{"resolution": 9}, {"head_dim": None}, {"head_dim": 3}])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"halved|head_dim or num_heads"):
        NoisyClassifier(**(SMALL | change))
    with pytest.raises(ValueError, match="x_t is 4 x 4, this network takes 8 squared"):
        NoisyClassifier(**SMALL)(torch.zeros(1, 3, 4, 4), torch.tensor([0]))


def classifier(**changes: object) -> SamplingModel:
    config = classifier_config(**changes)
    arguments = config.network_arguments(DATASET_INFO)
    settings = {"noisy": config.noisy, "objective": config.process.objective()}
    module = NoisyClassifier(**arguments).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # residual branches start at zero
    return SamplingModel("classifier", "classifier", arguments, settings, module, None, ClassifierSampling())


@pytest.mark.parametrize("process", ["discrete", "edm", "flow"])
def test_the_score_is_the_gradient_of_the_log_probability(process: str) -> None:
    model, x_t = classifier(process=process), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    objective, labels = make_objective(model.settings["objective"]), torch.tensor([2, 0])
    time = objective.times(torch.tensor([0.3, 0.6], dtype=torch.float64))
    with torch.no_grad():  # as a sampler calls it
        score = classifier_score(model, labels, 2.0)(x_t, time)
    direction = torch.randn_like(x_t)

    def log_p(x: torch.Tensor) -> torch.Tensor:
        return objective.apply(model.module, x, time).log_softmax(1).gather(1, labels[:, None])[:, 0]

    with torch.no_grad():
        slope = (log_p(x_t + 1e-5 * direction) - log_p(x_t - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((score * direction).sum(dim=(1, 2, 3)), 2.0 * slope, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_images_score_does_not_depend_on_its_batch_and_the_null_label_pulls_nowhere() -> None:
    model, x_t = classifier(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    time, labels = torch.tensor([3, 30, 10]), torch.tensor([2, 0, DATASET_INFO.num_classes])
    together = classifier_score(model, labels, 1.0)(x_t, time)
    alone = classifier_score(model, labels[1:2], 1.0)(x_t[1:2], time[1:2])
    torch.testing.assert_close(together[1:2], alone)
    assert bool((together[2] == 0).all())
    assert not bool((together[:2] == 0).all())


def test_a_classifier_of_clean_images_guides_nothing_but_judges() -> None:
    model = classifier(noisy=False)
    with pytest.raises(ValueError, match="clean images only"):
        check_guides(model, model)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(class_log_probabilities(model, images).exp().sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("objective", ["discrete", "edm", "flow"])
def test_it_guides_models_of_its_own_process_only(objective: str) -> None:
    about = {"resolution": 8, "classes": ["a", "b", "c"]}
    model = classifier(process=objective)
    model = model._replace(settings=model.settings | about)
    process = model.settings["objective"] | {"prediction_type": "epsilon", "time_density": "logit_normal"}
    base = model._replace(name="base", settings={"objective": process, **about})
    check_guides(model, base)
    with pytest.raises(ValueError, match="can't guide base: they differ in classes"):
        check_guides(model, base._replace(settings=base.settings | {"classes": ["a", "b", "d"]}))
    other = {"discrete": {"schedule": "linear"}, "edm": {"sigma_data": 1.0}, "flow": {"kind": "edm"}}[objective]
    with pytest.raises(ValueError, match=f"differ in {next(iter(other))}"):
        check_guides(model, base._replace(settings={"objective": process | other, **about}))
