"""Laws of a step's seconds and of the number of GPUs: counted are a real step's operations, no term is lost, and the
knee lies between the cheapest and the fastest."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from components.configuration.usage import UsageError
from components.runtime.execution import Resources
from components.training.reporting import peak_flops
from components.training.step_model import WithoutNumbers, learners_of, take_gradients
from pipelines.command import cli
from pipelines.planning import profiles
from pipelines.planning.cost import Choice, choices, chosen, counted_flops, training_time
from pipelines.planning.memory import device_bytes, model_of
from pipelines.planning.profiles import GPUS, Cluster, Profile, gpu_named, gpu_of, load_profile, parse_cluster
from pipelines.planning.shares import resource_rows, share_cluster, worker_counts
from pipelines.planning.step_time import (
    BUCKET,
    COLLECTIVE,
    LAUNCH,
    TCP,
    Launches,
    StepTime,
    exposed,
    pass_work,
    update_work,
)
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.workflow import Stage
from pipelines.workflows import build_workflow
from tests.trained_networks import TRAININGS
from tests.unit.test_step_model import model_of as tiny_model
from tests.unit.test_step_model import real

# Copies into another order of memory, which devices choose on their own, and between host and device.
PLACEMENT = {"clone", "_to_copy", "copy_", "fill_", "scalar_tensor"}
DRAWS = ("normal_", "exponential_", "uniform_")  # zeros on the meta device
# The first has frozen encoders in its task; of the others draws are partly on the host, which is the device of a CPU.
ENCODING, DRAWN_ON_HOST = "diffusion_prior", ("masked_prior", "gan")
PLANNED = (("ldm_imagenet_f8", "base"), ("ldm_imagenet_f8", "tokenizer"), ("ddpm_cifar_10", "base"))
CLUSTERS = tuple(f"gpus=64,type=h100,network={network}" for network in ("tcp", "efa"))


def operations(name: str) -> tuple[Counter[str], Counter[str]]:
    """Operations of a step of a tiny training: of a real one on this CPU after another one, and as counted."""
    config = TRAININGS[name].config()
    (task, batch), model, step = real(name, config), tiny_model(config), config.optimization.total_steps
    on_cpu, on_meta = Launches("cpu"), Launches()
    with sdpa_kernel(SDPBackend.MATH):
        take_gradients(task, batch, step=step)  # makes its tables
        for learner in learners_of(task):
            learner.network.zero_grad(set_to_none=True)
        with on_cpu:
            take_gradients(task, batch, step=step)
        with on_meta, WithoutNumbers():
            take_gradients(model.loaded_task(), model.batch(len(batch["position"])), step=step)
    return on_cpu.operations, on_meta.operations


def planned(name: str, stage: str, text: str, **settings: object) -> tuple[Stage, list[Choice]]:
    """A training of a recipe, and its choices on a cluster."""
    workflow, cluster = build_workflow(RECIPES[name]()), parse_cluster(text)
    of = workflow.by_name[stage]
    counts = worker_counts(of, cluster, "none", least=1, most=int(cluster.gpus))
    return of, choices(of, Profile(**settings), cluster, counts)


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != ENCODING])
def test_counted_operations_are_those_of_a_real_step_but_for_copies(name: str) -> None:
    on_cpu, counted = operations(name)
    assert abs(counted.total() / on_cpu.total() - 1) < 0.1
    if name not in DRAWN_ON_HOST:
        named = [Counter[str](), Counter[str]()]
        for placed, names in zip(named, (on_cpu, counted), strict=True):
            for key, number in names.items():
                placed["zero_" if key in DRAWS else key] += 0 if key in PLACEMENT else number
        assert +named[0] == +named[1]


def test_operations_on_other_devices_and_views_launch_nothing() -> None:
    with (launches := Launches()):
        torch.zeros(4).add(1)
        matrix = torch.empty(4, 6, device="meta")
        row = matrix.t()[0]
        row.add_(torch.empty(4, device="meta"))
        matrix @ matrix.t()
    assert launches.operations == Counter(add_=1, mm=1)
    assert launches.moved == 4 * 3 * 4  # two read, one written, of the sum alone


@pytest.mark.parametrize("text", CLUSTERS)
@pytest.mark.parametrize(("name", "stage"), PLANNED)
def test_terms_add_up_and_a_step_is_never_below_its_launches(name: str, stage: str, text: str) -> None:
    of, made = planned(name, stage, text)
    work = pass_work(model_of(of))
    for choice in made:
        launches, memory, products, network = choice.time
        assert min(choice.time) >= 0
        assert choice.time.seconds == max(launches, memory + products) + network
        assert choice.time.seconds >= launches > LAUNCH * work.launches.fixed
        assert choice.hours == choice.time.seconds * of.config.optimization.total_steps / 3600


@pytest.mark.parametrize("text", CLUSTERS)
@pytest.mark.parametrize(("name", "stage"), PLANNED)
def test_more_gpus_never_lower_the_price_and_the_knee_lies_between(name: str, stage: str, text: str) -> None:
    _, made = planned(name, stage, text)
    hours = [choice.worker_hours for choice in made]
    assert hours == sorted(hours)
    cheapest, knee, fastest = (chosen(made, aim) for aim in ("cheapest", "knee", "fastest"))
    assert cheapest.workers <= knee.workers <= fastest.workers
    assert cheapest.worker_hours <= knee.worker_hours <= fastest.worker_hours
    assert cheapest.hours >= knee.hours >= fastest.hours
    assert fastest.hours == min(choice.hours for choice in made)


def test_twice_the_gpus_stand_at_the_knee_where_they_save_more_than_29_percent() -> None:
    for left, workers in ((1 / math.sqrt(2) - 0.01, 2), (1 / math.sqrt(2) + 0.01, 1)):
        made = [Choice(1, True, StepTime(0, 0, 1, 0), 1.0), Choice(2, True, StepTime(0, 0, left, 0), left)]
        assert chosen(made, "knee").workers == workers


def test_what_does_not_fit_is_chosen_only_where_nothing_fits() -> None:
    made = [Choice(1, False, StepTime(0, 0, 1, 0), 1.0), Choice(2, True, StepTime(0, 0, 1, 0), 1.0)]
    assert chosen(made, "cheapest").workers == 2
    assert chosen(made[:1], "cheapest").workers == 1
    _, shards = planned("dalle_text_prior", "prior", CLUSTERS[1], sharding="full")
    assert [choice.fits for choice in shards] == [choice.workers >= 4 for choice in shards]


def test_ldm_8_takes_a_handful_of_gpus_for_hours() -> None:
    """As much as divided its batch before: 48 GPUs for 8 minutes, 1 ms a step."""
    for text in CLUSTERS:
        knee = chosen(planned("ldm_imagenet_f8", "base", text)[1], "knee")
        assert 4 <= knee.workers <= 8
        assert 1 < knee.hours < 6
        assert knee.time.seconds > 0.01


@pytest.mark.parametrize("aim", ["knee", "fastest", "cheapest"])
def test_runs_share_a_cluster_as_the_plan_says(aim) -> None:
    workflow = build_workflow(RECIPES["ldm_imagenet_f8"]())
    cluster = parse_cluster(CLUSTERS[0])
    shares = share_cluster(workflow, Profile(aim=aim), cluster)
    for stage in ("base", "tokenizer"):
        assert shares[stage].num_workers == chosen(planned("ldm_imagenet_f8", stage, CLUSTERS[0])[1], aim).workers
    why = {row.stage: row.why for row in resource_rows(workflow, Profile(aim=aim), cluster, shares)}
    assert f"the {aim} by hours and price" in why["base"]
    assert share_cluster(workflow, Profile(aim=aim), parse_cluster("gpus=64"))["base"].num_workers == 48  # unknown GPUs


def test_workers_that_read_images_divide_the_streams_and_the_batch() -> None:
    workflow = build_workflow(RECIPES["ldm_imagenet_f8"]())
    counts = {
        (stage, text): worker_counts(workflow.by_name[stage], parse_cluster(text), "none", least=1, most=64)
        for stage in ("tokenizer", "base")
        for text in (CLUSTERS[0], "gpus=64")
    }
    assert counts["tokenizer", CLUSTERS[0]] == (1, 2, 4, 8, 16)  # of 80 samples and 192 streams
    assert counts["tokenizer", "gpus=64"] == (1, 2, 4, 5, 8, 10, 16, 20, 40)
    assert counts["base", CLUSTERS[0]] == counts["base", "gpus=64"]  # reads latents


def test_the_network_is_a_ring_of_nvlink_in_a_node_and_of_the_slower_network_between_nodes() -> None:
    model = model_of(build_workflow(RECIPES["ldm_imagenet_f8"]()).by_name["base"])
    gradients = device_bytes(model).gradients
    buckets = math.ceil(gradients / BUCKET)

    def waited(workers: int, text: str = CLUSTERS[0], *, busy: float = 0.0, **settings: str) -> float:
        resources = Resources(num_workers=workers, gpus_per_worker=1, **settings)
        return exposed(model, resources, parse_cluster(text), parts=1, busy=busy)

    assert waited(1) == 0
    assert waited(8) == pytest.approx(2 * gradients * 7 / 8 / 450e9 + COLLECTIVE * buckets)
    assert waited(16) == pytest.approx(2 * gradients * 15 / 16 / TCP + COLLECTIVE * buckets)
    assert waited(16, CLUSTERS[1]) < waited(16) / 10
    assert waited(8, busy=60.0) == pytest.approx(waited(8) / buckets)  # the last one
    pods = parse_cluster(CLUSTERS[0])._replace(node_gpus=1)
    assert exposed(model, Resources(num_workers=8, gpus_per_worker=1), pods, parts=1, busy=0) > 10 * waited(8)
    # Two gathers of weights, nearly all in bf16, and a scatter of gradients send what a ring does.
    assert waited(8, sharding="full") == pytest.approx(waited(8), rel=0.02)


def test_shards_in_bf16_gather_weights_of_maps_in_half_the_bytes() -> None:
    """In the forward and in the backward pass; norms and what belongs to no block stay whole."""
    recipes = (load_recipe("ldm_imagenet_f8", [f"base.precision={word}"]) for word in ("fp32", "bf16"))
    whole, short = (model_of(build_workflow(recipe).by_name["base"]) for recipe in recipes)
    how = {"resources": Resources(num_workers=8, gpus_per_worker=1, sharding="full"), "parts": 1, "busy": 0}
    saved, most = exposed(whole, cluster=parse_cluster(CLUSTERS[0]), **how), device_bytes(whole).weights * 7 / 8 / 450e9
    saved -= exposed(short, cluster=parse_cluster(CLUSTERS[0]), **how)
    assert 0.9 * most < saved < most


def test_shards_share_the_update_s_bytes_and_parts_of_a_batch_launch_again() -> None:
    stage, cluster = build_workflow(RECIPES["mindalle_text_prior"]()).by_name["prior"], parse_cluster(CLUSTERS[1])
    model = model_of(stage)
    (learner,) = model.learners
    assert update_work(learner, shards=8)[1] == pytest.approx(update_work(learner)[1] / 8, rel=0.01)
    once, twice = (
        training_time(stage, Resources(num_workers=64, gpus_per_worker=1, max_batch_per_device=most), cluster)
        for most in (8, 4)
    )
    assert twice.launches - once.launches == pytest.approx(LAUNCH * pass_work(model).launches.fixed)
    assert twice.products == once.products


def test_peaks_are_those_of_mfu_and_cards_are_known_by_name() -> None:
    assert {name: gpu.peak for name, gpu in GPUS.items()} == {name: peak_flops(name) for name in GPUS}
    cards = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "L40S": "l40s", "A100-80G": "a100"}
    assert {card: gpu_of(card) for card in cards} == cards
    assert gpu_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is gpu_of("NVIDIA H20") is None


def test_steps_are_those_measured_on_such_a_card_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage, resources = (
        build_workflow(RECIPES["ddpm_cifar_10"]()).by_name["base"],
        Resources(num_workers=2, gpus_per_worker=1),
    )
    plain = training_time(stage, resources, parse_cluster(CLUSTERS[0]))
    rows = [{"ours": ours, "modeled": 1.0, "machine": {"card": "NVIDIA H100 80GB HBM3"}} for ours in (1.0, 2.0, 9.0)]
    rows += [{"ours": 5.0, "machine": {"card": "NVIDIA H100 80GB HBM3"}}]
    profiles.MEASURED.write_text(json.dumps(rows))
    assert (gpu_named("h100").measured, gpu_named("a100").measured) == (2.0, None)
    measured = training_time(stage, resources, parse_cluster(CLUSTERS[0]))
    assert measured.seconds == pytest.approx(2 * plain.seconds)


def test_a_plan_shows_hours_and_price_over_gpus_and_marks_its_choice() -> None:
    command = ["plan", "--recipe", "ddpm_cifar_10", "--cluster", "gpus=8", "--gpu", "h100", "--price", "2"]
    for flag in ("--fastest", "--cheapest"):
        told = CliRunner().invoke(cli.app, [*command, flag])
        assert told.exit_code == 0, told.exception
        rows = [line.split() for line in told.stdout.splitlines() if line.split() and line.split()[0].isdigit()]
        workers = [row[0] for row in rows if row[1] == "*"]
        assert [row[0] for row in rows[-4:]] == ["1", "2", "4", "8"]
        assert workers == [str(chosen(planned("ddpm_cifar_10", "base", "gpus=8,type=h100")[1], flag[2:]).workers)]


def test_a_cluster_is_told_with_its_gpus_and_network_and_a_profile_with_its_aim() -> None:
    assert parse_cluster("gpus=8,type=l4,network=rdma") == Cluster(64, 8, gpu=GPUS["l4"], network="rdma")
    for text, line in (("gpus=8,type=h101", "did you mean 'h100'"), ("gpus=8,network=ib", "tcp, efa, rdma, not 'ib'")):
        with pytest.raises(UsageError, match=line):
            parse_cluster(text)
    aims = [load_profile("kuberay", fastest=fastest).aim for fastest in (None, True, False)]
    assert aims == ["knee", "fastest", "cheapest"]


def test_copies_in_shards_gather_inside_a_node_and_sum_between_nodes_in_a_ring_for_each_shard() -> None:
    """Eight nodes of eight GPUs over TCP: a node's eight rings share its network, so all of its gradients pass it."""
    model = model_of(build_workflow(RECIPES["imagenet_class_prior"]()).by_name["prior"])
    cluster = parse_cluster("gpus=64,type=h100,network=tcp")
    held = device_bytes(model)

    def network(sharding: str | int, workers: int = 64) -> float:
        how = {"num_workers": workers, "gpus_per_worker": 1, "max_batch_per_device": 1}
        return exposed(model, Resources(**how, sharding=sharding), cluster, parts=1, busy=0)

    gathered = network(8, workers=8)  # one copy, inside its node
    assert network(8) == pytest.approx(gathered + 2 * held.gradients * 7 / 8 / TCP)
    assert network(4) == pytest.approx(network(4, workers=4) + 2 * held.gradients * 15 / 16 / TCP)  # two of a node
    assert network(16) == pytest.approx(network(16, workers=16) + held.gradients * 3 / 4 / TCP)  # half of a copy
    by_links = 2 * held.gradients / 4 / 2 / GPUS["h100"].link  # in a node, where each GPU has its own
    assert network(4, workers=8) == pytest.approx(network(4, workers=4) + by_links)
    assert network(8) < network("full")


def test_frozen_networks_are_never_computed_again() -> None:
    """Activations that a backward pass computes again are the training's own: a third of its pass and products."""
    cluster, at_each = parse_cluster(CLUSTERS[0]), ["precompute=null"]
    once, again = (
        build_workflow(load_recipe("ldm_imagenet_f8", [*at_each, *settings])).by_name["base"]
        for settings in ([], ["base.gradient_checkpointing=true"])
    )
    plain, recomputed = (
        training_time(base, Resources(num_workers=8, gpus_per_worker=1), cluster) for base in (once, again)
    )
    model, gpu = model_of(once), cluster.known_gpu
    optimization, work = model.training.optimization, pass_work(model)
    share, own = optimization.global_batch_size / 8, counted_flops(model).total / optimization.total_steps
    assert recomputed.products - plain.products == pytest.approx(own / 3 / 8 / (gpu.peak * gpu.products))
    passed = work.launches.fixed + share * work.launches.sample
    assert recomputed.launches - plain.launches == pytest.approx(LAUNCH * passed / 3)
    moved = work.moved.fixed + share * work.moved.sample
    assert recomputed.memory - plain.memory == pytest.approx(moved / 3 / gpu.bandwidth)
