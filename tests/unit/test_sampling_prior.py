"""Laws of drawing tokens for requests, whatever the prior."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.sampling import autoregressive
from components.sampling.generators.tokens import (
    check_prior,
    mutual_information,
    prior_conditions,
    sample_best,
    sample_prior,
)
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import Plan, check_request, plan_of
from components.sampling.requests import Request
from tests.refusals import one_line
from tests.tiny_cascade import CLASSES
from tests.tiny_generators import PLAIN

NETWORK = PLAIN | {"num_layers": 2, "num_classes": len(CLASSES)}
IMAGE = {"condition_codebook_size": 6, "condition_grid": [2, 2]}
KINDS = ("transformer", "masked_transformer")


def load(folder: Path, kind: str, *, sampling: dict[str, Any] | None = None, **network: Any) -> SamplingModel:
    torch.manual_seed(0)
    module = NETWORKS[kind](**NETWORK | network)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_().mul_(0.3)
    known = {"grid": [4, 4], "classes": CLASSES}
    save_bundle(folder, ModelBundle(kind, NETWORK | network, known, module))
    return load_model("prior", folder, sampling=sampling)


def requests(count: int, **asked: Any) -> list[Request]:
    asked |= {"generator": "tokens", "guidance_scale": 2.0}
    return [Request(label=seed % 3, seed=seed, **asked) for seed in range(count)]


def plans(model: SamplingModel, count: int, **asked: Any) -> list[Plan]:
    return [plan_of(request, [model], model.classes) for request in requests(count, **asked)]


def test_a_cpu_decodes_as_before_where_a_gpu_would_by_a_compiled_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only a causal transformer takes the setting."""
    expected = sample_prior(model := load(tmp_path, "transformer"), plans(model, 2))
    monkeypatch.setattr(autoregressive, "BACKEND", "no such backend")
    model = load(tmp_path, "transformer", sampling={"compile_decoding": True})
    assert model.sampling.model_dump()["compile_decoding"]
    assert torch.equal(sample_prior(model, plans(model, 2)), expected)
    with pytest.raises(ValueError, match=r"prior\.compile_decoding: this model takes no such setting"):
        load(tmp_path / "masked", "masked_transformer", sampling={"compile_decoding": True})


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_other_images_of_the_same_seed(kind: str, tmp_path: Path) -> None:
    model = load(tmp_path, kind)
    drawn = [sample_prior(model, plans(model, 2), candidate=k) for k in range(3)]
    assert torch.equal(drawn[0], sample_prior(model, plans(model, 2)))
    assert torch.equal(drawn[2], sample_prior(model, plans(model, 2), candidate=2))
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 6


def test_the_best_of_several_is_one_of_them_and_always_the_same(tmp_path: Path) -> None:
    model = load(tmp_path, "transformer")
    best = sample_best(model, plans(model, 3), n=4)
    drawn = torch.stack([sample_prior(model, plans(model, 3), candidate=k) for k in range(4)])
    condition, null = prior_conditions(model, plans(model, 3))
    scores = [mutual_information(model.module, each.flatten(1), condition=condition, null=null) for each in drawn]
    assert torch.equal(best, drawn[torch.stack(scores).argmax(dim=0), torch.arange(3)])
    (alone,) = sample_best(model, plans(model, 3)[1:2], n=4)
    assert torch.equal(alone, best[1])
    assert torch.equal(sample_best(model, plans(model, 3), n=1), sample_prior(model, plans(model, 3)))


def test_steps_are_for_masked_priors_alone(tmp_path: Path) -> None:
    masked, causal = load(tmp_path / "a", "masked_transformer"), load(tmp_path / "b", "transformer")
    (request,) = requests(1, steps=5)
    check_request(request)
    check_prior(masked, request)
    with pytest.raises(ValueError, match="this prior takes no steps"):
        check_prior(causal, request)
    for steps, words in ((0, "num_inference_steps: Input should be"), (17, r"steps must be in \[1, 16\], not 17")):
        with pytest.raises(ValueError, match=words):
            check_prior(masked, request.replace(steps=steps))
    own = load(tmp_path / "c", "masked_transformer", sampling={"num_inference_steps": 5, "choice_temperature": 2.0})
    asked = load(tmp_path / "d", "masked_transformer", sampling={"num_inference_steps": 9, "choice_temperature": 2.0})
    assert torch.equal(sample_prior(own, plans(own, 3)), sample_prior(asked, plans(asked, 3, steps=5)))
    assert not torch.equal(sample_prior(own, plans(own, 3)), sample_prior(asked, plans(asked, 3)))


def test_a_larger_grid_is_drawn_by_a_causal_prior(tmp_path: Path) -> None:
    model = load(tmp_path, "transformer", **IMAGE)
    condition = torch.randint(0, 6, (2, 6))
    assert sample_prior(model, plans(model, 2), condition, grid=(4, 6)).shape == (2, 4, 6)
    same = sample_prior(model, plans(model, 2), condition[:, :4], grid=(4, 4))
    assert torch.equal(same, sample_prior(model, plans(model, 2), condition[:, :4]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_that_does_not_fit_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    with_image, without = load(tmp_path / "a", kind, **IMAGE), load(tmp_path / "b", kind)
    good = torch.zeros(2, 4, dtype=torch.int64)
    for model, condition, message in (
        (with_image, None, "prior needs a condition image of 4 tokens"),
        (without, good, "prior takes no condition image"),
        (with_image, good[:, :3], r"condition tokens of \(2, 3\) where \(2, 4\) are needed"),
        (with_image, good + 6, r"condition tokens must be in \[0, 5\]"),
        (with_image, good - 1, r"condition tokens must be in \[0, 5\]"),
    ):
        with one_line(ValueError, match=message):
            sample_prior(model, plans(model, 2), condition)
