"""Laws of costs: counted operations are those that papers publish, hours and prices follow, the page shows them."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.configuration.optimization import OptimizationConfig
from components.configuration.usage import UsageError
from pipelines.command import cli, plan
from pipelines.planning.cost import (
    StageCost,
    checkpoints_of,
    columns_of,
    counted_flops,
    longest_path,
    stage_costs,
    training_reads,
)
from pipelines.planning.cost_table import (
    COMPUTE,
    GMACS,
    IMAGENET,
    V100,
    V100S,
    compute_lines,
    cost_notes,
    published_flops,
)
from pipelines.planning.memory import (
    ROOM,
    checkpoint_bytes,
    device_bytes,
    images_of,
    memory_warning,
    model_bytes,
    model_of,
    step_memory,
    step_model,
)
from pipelines.planning.profiles import GPUS, Profile, parse_cluster
from pipelines.planning.shares import share_cluster, trainings
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.published_networks import PAPER_DIFFUSION
from pipelines.workflow import Workflow
from pipelines.workflows import build_workflow
from tests.refusals import one_line

PAGE = Path(__file__).parents[2] / "docs" / "SPEED.md"
COMMAND = "cascade plan --recipe published --cluster gpus=64 --gpu h100 --price 2.5"
H100 = GPUS["h100"]
WITHIN = 0.02

# Dhariwal and Nichol (2021), table 7: images that a V100 at 120 TFLOP/s could train on in a second.
ADM_IMAGES = {
    "adm_imagenet_64": 182.3,
    "adm_imagenet_128": 65.2,
    "adm_imagenet_256": 17.9,
    "adm_upsampler_64_256": 31.7,
    "adm_upsampler_128_512": 8.0,
}
# Peebles and Xie (2023), table 4: billions of multiply-adds forward of one 256² image, in latents of 32² x 4.
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DIT_GMACS = {("S", 8): 0.36, ("B", 4): 5.56, ("L", 4): 19.70, ("XL", 2): 118.64}  # each size, each patch


def near(counted: float, published: float) -> bool:
    return abs(counted / published - 1) < WITHIN


def per_image(config: DiffusionTraining, info: DatasetInfo = IMAGENET) -> float:
    return counted_flops(step_model(config, info)).step / config.optimization.global_batch_size


def costs_of(name: str, *, images: int | None = None):
    workflow, of = build_workflow(RECIPES[name]()), cluster(64)
    return workflow, stage_costs(workflow, share_cluster(workflow, Profile(num_workers=8), of), of, images=images)


def cluster(gpus: int):
    return parse_cluster(f"gpus={gpus},type=h100")


@pytest.mark.parametrize(("recipe", "stage"), GMACS)
def test_operations_of_a_published_network_are_within_two_percent_of_those_published(recipe: str, stage: str):
    config = build_workflow(PAPER_RECIPES[recipe]()).by_name[stage].config
    assert isinstance(config, DiffusionTraining)
    assert near(per_image(config), published_flops(recipe, stage) or 0)


@pytest.mark.parametrize("name", ADM_IMAGES)
def test_operations_of_a_training_of_adm_are_within_two_percent_of_those_published(name: str):
    assert near(V100 / per_image(PAPER_DIFFUSION[name]), ADM_IMAGES[name])


@pytest.mark.parametrize(("size", "patch"), DIT_GMACS)
def test_operations_of_a_dit_are_within_two_percent_of_those_published(size: str, patch: int):
    width, layers, heads = DIT_SIZES[size]
    numbers = {"model_dim": width, "num_layers": layers, "num_heads": heads, "patch_size": patch}
    numbers |= {"total_steps": 100, "global_batch_size": 256, "learning_rate": 1e-4, "resolution": 32, "in_channels": 4}
    noise = {"variance": "learned_range", "loss": "hybrid", "min_snr_gamma": None}
    config = DiffusionTraining.of(network="dit", **numbers, **noise)
    assert near(per_image(config) / 6e9, DIT_GMACS[size, patch])


ADM = [system for system in COMPUTE if system.cluster is V100S]


@pytest.mark.parametrize("part", dict.fromkeys(p for system in ADM for p in system.parts), ids=lambda p: p.model)
def test_a_training_of_adm_has_the_published_steps_and_batch(part):
    optimization = PAPER_DIFFUSION[part.model].optimization
    assert (optimization.total_steps, optimization.global_batch_size) == (part.steps, part.samples)


@pytest.mark.parametrize("system", ADM, ids=lambda s: s.name)
def test_days_of_adm_by_the_modeled_step_are_within_a_tenth_of_those_published(system):
    assert abs(system.modeled_days / system.v100_days - 1) < 0.1


def test_a_prior_reads_the_tokens_of_the_samples_of_its_steps():
    prior = build_workflow(RECIPES["imagenet_class_prior"]()).by_name["prior"]
    row = 16**2 + images_of(prior).text_length
    assert training_reads(prior) == 1_000_000 * 64 * row * 4


def test_hours_price_and_bytes_follow_from_the_step_s_seconds_gpus_samples_and_checkpoints():
    workflow, (cost,) = costs_of("ddpm_cifar_10")
    assert cost.time is not None
    assert cost.time.products == pytest.approx(cost.flops / 800_000 / 8 / (989e12 * 0.45))
    assert cost.flops == 800_000 * (cost.step_flops or 0)
    assert (cost.gpus, cost.hours) == (8, pytest.approx(800_000 * cost.time.seconds / 3600))
    assert cost.gpu_hours == 8 * cost.hours
    notes = "\n".join(cost_notes(workflow, {}, [cost], cluster(8), 2.0))
    assert f"{cost.gpu_hours * 2:,.2f}" in notes  # all 8 work
    model = model_of(workflow.by_name["base"])
    assert cost.read == 800_000 * 128 * 3 * 32**2
    checkpoints = checkpoints_of(model.training.optimization, hours=cost.hours)
    assert cost.written == checkpoints * checkpoint_bytes(model) + model_bytes(model)
    assert cost.step is not None
    assert cost.step.held == sum(device_bytes(model)) == 5 * 4 * 35_746_307


def test_a_plan_s_memory_is_that_of_shards_where_the_profile_has_them():
    workflow = build_workflow(RECIPES["mindalle_text_prior"]())
    profile = Profile(num_workers=64, stages={"prior": {"sharding": "full"}})
    tokenizer, prior = stage_costs(workflow, share_cluster(workflow, profile, cluster(64)), cluster(64))
    whole = stage_costs(workflow, share_cluster(workflow, Profile(num_workers=64), cluster(64)), cluster(64))
    assert tokenizer == whole[0]
    model = model_of(workflow.by_name["prior"])
    assert prior.step is not None is not whole[1].step
    assert prior.step.held == sum(device_bytes(model, shards=64)) < whole[1].step.held / 10
    assert prior.flops == whole[1].flops


def share_of(name: str, stage: str, gpus: int, **settings: object):
    """A stage of a recipe, and what it gets of a cluster."""
    workflow = build_workflow(RECIPES[name]())
    shares = share_cluster(workflow, Profile(stages={stage: settings}), parse_cluster(f"gpus={gpus}"))
    return workflow.by_name[stage], shares[stage]


def memory_of(name: str, stage: str, gpus: int, **settings: object):
    of, resources = share_of(name, stage, gpus, **settings)
    return step_memory(model_of(of), resources)


def test_a_plan_counts_the_activations_of_the_samples_that_a_worker_takes_at_a_time():
    whole, parts = (
        memory_of("adm_imagenet_256", "base", 64, **settings) for settings in ({}, {"max_batch_per_device": 3})
    )
    assert (whole.samples, parts.samples, whole.held) == (8, 3, parts.held)
    assert whole.activations - parts.activations == 5 * whole.needed.sample
    assert whole.total == whole.held + whole.activations


def test_a_plan_warns_where_a_batch_does_not_fit_and_the_largest_part_that_it_names_fits():
    memory = H100.memory
    line = memory_warning(*share_of("adm_imagenet_128_512", "upsampler_512", 64), memory=memory)
    assert line is not None
    assert "upsampler_512 needs 145.1 GB" in line
    assert "`max_batch_per_device: 8` in the profile fits" in line
    fitting, larger = (share_of("adm_imagenet_128_512", "upsampler_512", 64, max_batch_per_device=n) for n in (8, 9))
    kept = [step_memory(model_of(stage), own).total for stage, own in (fitting, larger)]
    assert kept[0] <= ROOM * memory < kept[1]
    assert memory_warning(*fitting, memory=memory) is None
    assert memory_warning(*larger, memory=memory) is not None


REMEDIES = {  # where no part of a batch fits beside the weights, not even one sample, nothing at all
    "`sharding: full` in the profile fits.": ("dalle_text_prior", "prior", 64, H100.memory),
    "`--set upsampler_512.gradient_checkpointing=true`": ("adm_imagenet_128_512", "upsampler_512", 1, 12e9),
    "no batch fits; take a GPU with more memory, or a smaller model.": ("adm_imagenet_256", "base", 1, 1e9),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_plan_names_the_remedy_where_no_part_of_a_batch_fits(remedy: str):
    name, stage, gpus, memory = REMEDIES[remedy]
    assert remedy in (memory_warning(*share_of(name, stage, gpus), memory=memory) or "")
    if "sharding" in remedy:
        assert memory_warning(*share_of(name, stage, gpus, sharding="full"), memory=memory) is None


def test_checkpoints_are_those_of_the_clock_or_of_the_steps():
    numbers = {"total_steps": 1000, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 10}
    by_steps = OptimizationConfig(**numbers, checkpoint_every=300)
    assert checkpoints_of(by_steps, hours=5) == 4
    assert checkpoints_of(by_steps.replace(checkpoint_minutes=20.0), hours=5) == 16


def test_frozen_networks_are_counted_where_a_training_runs_them_at_each_step_and_not_where_they_ran_before():
    at_each = build_workflow(load_recipe("dalle2", ["precompute=null"])).by_name["diffusion_prior"]
    assert [*columns_of(at_each)] == ["text_states", "image_embedding"]
    dalle2 = build_workflow(RECIPES["dalle2"]())
    made = {column for stage in dalle2.stages if stage.name == "precompute" for column in stage.config.columns}
    for name in ("diffusion_prior", "base"):
        assert not made & columns_of(dalle2.by_name[name]).keys()
    assert made


def test_stages_that_go_through_the_set_once_are_counted_when_its_size_is_told():
    assert {cost.stage for cost in costs_of("smoke")[1]}.isdisjoint({"tokens"})
    costs = [costs_of("smoke", images=images)[1] for images in (1000, 2000)]
    once, twice = (next(cost for cost in each if cost.stage == "tokens") for each in costs)
    assert (2 * once.flops, 2 * once.read, 2 * once.written) == (twice.flops, twice.read, twice.written)


def test_the_longest_path_is_that_of_the_stages_that_wait_for_each_other_the_longest():
    workflow = build_workflow(RECIPES["adm_imagenet_64_256"]())
    hours = {"classifier": 1.0, "base": 5.0, "upsampler_256": 7.0}
    costs = [StageCost(name, 1, 1, 0, 1, 1, 1, 1, None, None, own, own) for name, own in hours.items()]
    assert longest_path(workflow, costs) == (["upsampler_256"], 7.0)
    chain = build_workflow(RECIPES["ldm_imagenet_f4"]())
    costs = [StageCost(name, 1, 1, 0, 1, 1, 1, 1, None, None, 2.0, 2.0) for name in ("tokenizer", "base")]
    assert longest_path(chain, costs) == (["tokenizer", "base"], 4.0)
    assert longest_path(Workflow("empty", workflow.stages), []) == ([], 0.0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h101", "--cluster", "gpus=8"], "--gpu: unknown 'h101'; did you mean 'h100'?"),
        (["--gpu", "h100"], "--gpu needs one --cluster"),
        (["--gpu", "h100", "--cluster", "cpus=8"], "--gpu needs a cluster with GPUs"),
        (["--price", "2"], "--price needs --gpu"),
        (["--gpu", "h100", "--cluster", "gpus=8", "--mfu", "1.5"], "--mfu must be above 0 and at most 1"),
        (["--gpu", "h100", "--cluster", "gpus=8,type=a100"], "--gpu h100: --cluster 'gpus=8,type=a100' says type=a100"),
        (["--cheapest", "--cluster", "gpus=8,network=efa"], "--cheapest: --cluster 'gpus=8,network=efa' says no type"),
        (["--fastest", "--cluster", "gpus=8,type=h100", "--cluster", "gpus=8"], "--fastest: --cluster 'gpus=8' says"),
        (
            ["--recipe", "published", "--gpu", "h100", "--cluster", "gpus=8", "--images", "9"],
            "--recipe published is all of them: --set, --only, --from, --until and --images need one",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], line: str):
    result = CliRunner().invoke(cli.app, ["plan", "--recipe", "smoke", *arguments])
    assert isinstance(result.exception, UsageError)
    assert line in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sharding: 8\nmax_batch_per_device: 1", "can't be shared by 4 workers, 8 a copy"),
        ("num_workers: 12", "can't be shared by 12 workers"),
    ],
)
def test_a_price_is_of_shares_that_a_run_takes(tmp_path: Path, text: str, line: str):
    (tmp_path / "mine.yaml").write_text(text)
    command = ["plan", "--profile", str(tmp_path / "mine.yaml"), "--recipe", "published", "--cluster", "gpus=4"]
    for options in ([], ["--gpu", "h100"]):
        with one_line(UsageError, match=line):
            CliRunner().invoke(cli.app, [*command, *options], catch_exceptions=False)


def test_the_numbers_of_workers_in_a_plan_hold_whole_copies(tmp_path: Path):
    """Of eight shards on a cluster of four GPUs there is the run's own number alone, which waits for eight."""
    (tmp_path / "mine.yaml").write_text("stages: {base: {num_workers: 8, sharding: 8}}")
    command = ["plan", "--profile", str(tmp_path / "mine.yaml"), "--recipe", "dit_imagenet_256", "--gpu", "h100"]
    told = CliRunner().invoke(cli.app, [*command, "--cluster", "gpus=4"], catch_exceptions=False)
    _, choices = told.stdout.split("base: uncalibrated")
    assert re.findall(r"^ *(\d+)(?: \*)? ", choices, re.MULTILINE) == ["8"]


def test_a_plan_for_a_cluster_warns_of_a_profile_s_stages_that_no_recipe_has(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("stages: {pirior: {num_workers: 2}, base: {num_workers: 2}}")
    command = ["plan", "--profile", str(tmp_path / "mine.yaml"), "--recipe", "smoke", "--cluster"]
    for clusters in (["gpus=8"], ["gpus=8", "--cluster", "gpus=4"], ["gpus=8,type=h100", "--gpu", "h100"]):
        told = CliRunner().invoke(cli.app, [*command, *clusters], catch_exceptions=False)
        assert "this recipe has no stage 'pirior'; did you mean 'prior'?" in " ".join(told.stdout.split())
        assert "no stage 'base'" not in told.stdout


def test_the_plan_says_what_each_stage_costs():
    result = CliRunner().invoke(cli.app, ["plan", "--recipe", "ddpm_cifar_10", *COMMAND.split()[4:]])
    assert result.exit_code == 0, result.exception
    words = ["base", "GPU-hours", "714.9 MB", "Longest path: base", "base: uncalibrated", "launches", "products"]
    assert not [
        text for text in (*words, "64 GPUs: h100, products at 45 % of 989 TFLOP/s") if text not in result.stdout
    ]


def test_published_recipes_stand_in_tables_that_the_command_prints(monkeypatch: pytest.MonkeyPatch):
    """Each training among the costs, and the compute of each published system."""
    recipes = {name: PAPER_RECIPES[name] for name in ("ddpm_cifar_10", "adm_imagenet_128_512")}
    monkeypatch.setattr(plan, "PAPER_RECIPES", recipes)
    result = CliRunner().invoke(cli.app, COMMAND.split()[1:])
    assert result.exit_code == 0, result.exception
    rows = [line.split(" | ")[:2] for line in result.stdout.splitlines() if line.startswith("| `")]
    workflows = [build_workflow(recipe()) for recipe in recipes.values()]
    trained = [[f"| `{workflow.name}`", name] for workflow in workflows for name in trainings(workflow)]
    assert rows == trained
    assert "| ADM, 128² to 512² | 6,093 | 1878 | 31 % | 1744 |" in result.stdout
    assert all(line in result.stdout and line in PAGE.read_text() for line in compute_lines())


def test_no_page_repeats_the_figures_of_published_recipes():
    assert COMMAND in PAGE.read_text()
    for page in PAGE.parent.glob("*.md"):
        assert not re.findall(r"^\| `(?:" + "|".join(PAPER_RECIPES) + r")` \|.*[GM]B", page.read_text(), re.MULTILINE)
