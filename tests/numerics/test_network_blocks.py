"""Laws of the blocks of networks: each network is one graph, compiled it trains to the same weights, and so it does
when it computes its blocks again in the backward pass, from fewer bytes.
"""

from collections import Counter
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from components.models.bundle import NETWORKS
from components.models.layers import (
    GroupNorm,
    NetworkBlock,
    Normalized16Bits,
    blocks_of,
    compile_blocks,
    recompute_blocks,
)
from components.training.activations import step_keeps
from components.training.batches import to_batch
from pipelines.planning.memory import counted_activations, model_of
from pipelines.planning.step_time import Launches
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.workflows import build_workflow
from tests.tiny_training import assert_close, assert_equal_bits, batches
from tests.trained_networks import LAST_STEP, TRAININGS, forget_compiled, trained, whole_graph

RECOMPUTED = [name for name in TRAININGS if name != "gan"]  # whose configuration refuses it
ONE_OF_EACH_BLOCK = ("tokenizer", "prior", "pixelcnn", "row_lstm", "base", "dit", "gan", "contrastive")
ONE_LEVEL = {"channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "conditions": ("label",)}
GENERATED = {"base": ONE_LEVEL, "prior": {}}  # a U-Net, with attention in its middle, and a transformer
plain = cache(trained)


def made(name: str, **changes: object) -> nn.Module:
    return TRAININGS[name].task(TRAININGS[name].config(**changes)).learner.network


def test_every_network_of_the_catalogue_is_trained_here_and_has_blocks() -> None:
    """A new network has to be added to TRAININGS, and its repeated part has to be a NetworkBlock."""
    kinds = {TRAININGS[name].config().network.kind: name for name in TRAININGS}
    assert kinds.keys() == NETWORKS.keys()
    assert all(blocks_of(made(name)) for name in kinds.values())


def test_blocks_are_outermost_and_have_the_names_of_modules() -> None:
    network = made("spatial_transformer")
    blocks = blocks_of(network)
    assert all(network.get_submodule(name) is block for name, block in blocks.items())
    inside = [part for block in blocks.values() for part in block.modules() if isinstance(part, NetworkBlock)]
    assert len(inside) == len(blocks)
    assert "middle" in blocks
    assert "text_encoder.blocks.0" in blocks


@pytest.mark.parametrize("name", TRAININGS)
def test_the_training_of_no_network_leaves_the_graph_and_it_ends_with_the_same_weights(name: str) -> None:
    forget_compiled()
    assert_close(trained(name, whole_graph), plain(name))


@pytest.mark.parametrize("name", ONE_OF_EACH_BLOCK)
def test_compiled_block_by_block_a_training_ends_with_the_same_weights(name: str) -> None:
    forget_compiled()
    assert_close(trained(name, partial(compile_blocks, backend="aot_eager")), plain(name))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", GENERATED)
def test_with_generated_code_a_training_ends_with_the_same_weights(name: str) -> None:
    """Code of the real backend; it draws its own units to drop, so none are dropped."""
    forget_compiled()
    changes = {"dropout": 0.0, **GENERATED[name]}
    assert_close(trained(name, **changes, compile_network=True), trained(name, **changes))
    assert counters["inductor"]


def test_equal_blocks_are_compiled_once_however_many_there_are() -> None:
    for layers in (2, 5):
        forget_compiled()
        trained("prior", partial(compile_blocks, backend="eager"), num_layers=layers)
        assert counters["stats"]["unique_graphs"] == 1


def test_blocks_of_many_sizes_are_all_compiled() -> None:
    """torch gives up after eight sizes of one class, without a word that a test would see."""
    forget_compiled()
    network = made("base", channel_mult=(1, 2, 3, 4), num_res_blocks=2, attention_resolutions=(), conditions=())
    compile_blocks(network, backend="eager")
    network(torch.randn(1, 3, 8, 8), torch.tensor([3]))
    assert len(blocks_of(network)) > 8 < counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


def test_a_compiled_and_recomputed_network_keeps_its_names_and_its_copies_are_plain() -> None:
    network = made("prior")
    names = list(network.state_dict())
    compile_blocks(network)
    recompute_blocks(network)
    copy = deepcopy(network)
    assert list(network.state_dict()) == list(copy.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in blocks_of(network).values())
    assert all(block._compiled_call_impl is None for block in blocks_of(copy).values())
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert all(parameter.any() for name, parameter in network.named_parameters() if parameter.ndim == 2)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_blocks_that_are_computed_again_give_the_same_bits_from_fewer_bytes(name: str) -> None:
    assert_equal_bits(trained(name, gradient_checkpointing=True), plain(name))
    assert bytes_kept(name, gradient_checkpointing=True) < bytes_kept(name)


def bytes_kept(name: str, **changes: object) -> int:
    config = TRAININGS[name].config(**changes)
    task, batch = TRAININGS[name].task(config), next(batches(config, to_batch))
    return max(kept.whole for kept in step_keeps(task, batch, step=LAST_STEP))


def test_compiled_blocks_that_are_computed_again_give_the_same_weights_with_dropout() -> None:
    forget_compiled()
    prepare = partial(compile_blocks, backend="aot_eager")
    assert_close(trained("prior", prepare, gradient_checkpointing=True), plain("prior"))


def test_a_gan_refuses_to_compute_its_blocks_again() -> None:
    """Each pass moves the singular vectors: the second one would have other weights."""
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        TRAININGS["gan"].config(gradient_checkpointing=True)


class Recorded(NetworkBlock):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return (x * self.weight).exp()


def test_a_block_is_computed_again_only_where_there_is_a_gradient() -> None:
    network = nn.Sequential(Recorded(), Recorded())
    recompute_blocks(network)
    with torch.no_grad():
        network(torch.zeros(3))
    assert [block.passes for block in network] == [1, 1]
    network(torch.zeros(3)).sum().backward()
    assert [block.passes for block in network] == [3, 3]


SHIFT = 30.0  # deviations that the mean lies away from zero: statistics of 16 bits would be off by a twentieth of one


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """x of 16 bits, weight and bias."""
    x = (torch.randn(3, 8, 5, 5) + SHIFT).bfloat16().to(memory_format=torch.channels_last)
    return x, torch.randn(8).requires_grad_(), torch.randn(8).requires_grad_()


def test_a_norm_of_16_bits_is_that_of_fp32_rounded_once():
    x, weight, bias = parts()
    given, wanted = (x.clone().requires_grad_() for _ in range(2))
    ours = Normalized16Bits.apply(given, weight, bias, 2, 1e-5)
    exact = nn.functional.group_norm(wanted.float().contiguous(), 2, weight, bias, 1e-5)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())
    gradient = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (given, weight, bias), gradient)
    for one, other in zip(found, torch.autograd.grad(exact, (wanted, weight, bias), gradient.float()), strict=True):
        torch.testing.assert_close(one, other)
    assert found[0].dtype == torch.bfloat16
    assert ours.stride() == found[0].stride() == given.stride()  # NHWC


def test_a_norm_of_16_bits_changes_type_and_order_of_each_tensor_in_one_pass():
    x, weight, bias = (tensor.to("meta").requires_grad_() for tensor in parts())
    with (launches := Launches()):
        y = Normalized16Bits.apply(x, weight, bias, 2, 1e-5)
        torch.autograd.grad(y, x, torch.empty_like(y))
    norms = Counter(native_group_norm=1, native_group_norm_backward=1)
    assert +launches.operations == norms + Counter(_to_copy=3, copy_=2)


def test_on_a_cpu_a_norm_returns_the_type_of_its_weights_and_elsewhere_what_it_was_given():
    norm = GroupNorm(8)
    assert norm(torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    there = norm.to("meta")(torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16, device="meta"))
    assert there.dtype == torch.bfloat16
    assert norm(torch.zeros(1, 8, 2, 2, device="meta")).dtype == torch.float32


# GB that a sample more keeps for the backward pass on a GPU, in bf16, with its loss: before the norm gave back its type
# U-Nets kept 0.50, 5.12 and 0.45; transformers have no such norm.
GIGABYTES = {
    ("adm_imagenet_64_256", "base"): 0.283,
    ("adm_imagenet_256", "base"): 2.908,
    ("ldm_imagenet_f4", "base"): 0.345,
    ("mindalle_text_prior", "prior"): 0.766,
}


@pytest.mark.parametrize(("recipe", "stage"), GIGABYTES)
def test_a_published_network_keeps_so_many_bytes_a_sample(recipe: str, stage: str) -> None:
    kept = counted_activations(model_of(build_workflow(PAPER_RECIPES[recipe]()).by_name[stage]))
    assert kept.whole.sample / 1e9 == pytest.approx(GIGABYTES[recipe, stage], abs=0.001)
