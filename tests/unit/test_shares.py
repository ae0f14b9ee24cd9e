"""Laws of sharing a cluster: every GPU works that can, nobody waits for what another holds, readers find CPUs, and
threads come from the node that works."""

import itertools
from pathlib import Path

import pytest

from components.configuration.optimization import Training
from components.configuration.usage import UsageError
from components.runtime.events import Recorder
from components.runtime.execution import Resources, threads_of
from components.runtime.storage.store import Store
from components.stages import images
from components.stages.context import StageContext
from pipelines.command.plan import overview
from pipelines.planning.preflight import check_shares
from pipelines.planning.profiles import CPUS_PER_CORE, Cluster, Profile, load_profile, local_cpus, parse_cluster
from pipelines.planning.reads import reads_of
from pipelines.planning.shares import concurrent_stages, concurrent_trainings, resource_rows, share_cluster, trainings
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.systems import openmoji
from pipelines.workflow import Selection, Workflow
from pipelines.workflows import build_workflow
from tests.refusals import one_line

GPUS = (1, 4, 8, 24, 64)


def shares_of(recipe, *, gpus: int, cpus: int | None = None, profile: Profile | None = None) -> dict[str, Resources]:
    cluster = Cluster(cpus=cpus or 8 * gpus, gpus=gpus)
    return share_cluster(build_workflow(recipe()), profile or Profile(), cluster)


def may_run_at_once(workflow: Workflow, names) -> bool:
    return all(one not in workflow.before(other) for one in names for other in names)


def sets_at_once(workflow: Workflow) -> list[tuple[str, ...]]:
    """Every set of trainings of which none waits for another."""
    names = [*trainings(workflow)]
    sets = itertools.chain(*(itertools.combinations(names, size) for size in range(1, len(names) + 1)))
    return [found for found in sets if may_run_at_once(workflow, found)]


@pytest.mark.parametrize("profile", ["auto", "kuberay"])
@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_training_takes_the_most_workers_that_share_its_batch_on_the_gpus_it_may_use(name: str, profile: str):
    workflow = build_workflow(PAPER_RECIPES[name]())
    at_once = sets_at_once(workflow)
    for gpus in GPUS:
        shares = share_cluster(workflow, load_profile(profile), Cluster(cpus=8 * gpus, gpus=gpus))
        check_shares(workflow, shares)  # none is refused
        workers = {training: shares[training].num_workers for training in trainings(workflow)}
        for training, config in trainings(workflow).items():
            others = max(sum(map(workers.get, found)) for found in at_once if training in found) - workers[training]
            may_use = max(1, gpus - others)
            divisors = [count for count in range(1, may_use + 1) if config.optimization.global_batch_size % count == 0]
            assert workers[training] == max(divisors), (training, gpus)
            assert shares[training].gpus_per_worker == 1
        crowded = [found for found in at_once if sum(map(workers.get, found)) > gpus]
        assert all(len(found) > gpus for found in crowded)  # only where there are fewer GPUs than trainings at once


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_is_refused_and_none_has_less_than_an_equal_share_holds(name: str):
    workflow = build_workflow(RECIPES[name]())
    at_once = sets_at_once(workflow)
    for gpus in GPUS:
        shares = share_cluster(workflow, Profile(), Cluster(cpus=8 * gpus, gpus=gpus))
        check_shares(workflow, shares)
        for training, config in trainings(workflow).items():
            equal = max(1, gpus // max(len(found) for found in at_once if training in found))
            held = max(count for count in range(1, equal + 1) if config.optimization.global_batch_size % count == 0)
            assert shares[training].num_workers >= held, (training, gpus)


def test_what_an_equal_share_leaves_goes_to_those_that_can_use_it():
    shares = shares_of(RECIPES["adm_imagenet_64_256"], gpus=64)  # 21 for each of three; batches of 256, 2,048, 256
    assert [shares[name].num_workers for name in ("classifier", "base", "upsampler_256")] == [16, 32, 16]
    shares = shares_of(RECIPES["adm_imagenet_128_512"], gpus=64)  # of equal batches the longest training comes first
    assert [shares[name].num_workers for name in ("classifier", "base", "upsampler_512")] == [16, 32, 16]


def test_trainings_in_turn_have_all_gpus_each():
    shares = shares_of(RECIPES["depth_transformer"], gpus=8)
    assert shares["tokenizer"].num_workers + shares["condition_tokenizer"].num_workers == 8
    assert shares["prior"].num_workers == 8
    # Base and prior wait for the contrastive encoder, and then run at once; what waits for nothing is left out.
    recipe = RECIPES["dalle2"]()
    sampling = recipe.sampling.replace(upsamplers=())
    shares = shares_of(lambda: recipe.replace(upsamplers=(), sampling=sampling, obedience=None), gpus=8)
    assert shares["contrastive"].num_workers == 8
    assert shares["base"].num_workers + shares["diffusion_prior"].num_workers == 8


def test_stages_that_are_finished_leave_their_gpus():
    workflow, cluster = build_workflow(RECIPES["adm_imagenet_64_256"]()), Cluster(cpus=512, gpus=64)
    shares = share_cluster(workflow, Profile(), cluster, running=["base", "cascade", "samples", "evaluation"])
    assert shares["base"].num_workers == 64
    assert "classifier" not in shares


@pytest.mark.parametrize("gpus", [1, 4, 8, 64])
def test_stages_that_train_nothing_use_every_gpu_that_trainings_leave(gpus: int):
    shares = shares_of(openmoji, gpus=gpus)
    assert shares["samples"].num_actors == shares["evaluation"].num_actors
    assert shares["samples"].num_actors + shares["agreement"].num_actors == max(gpus, 2)  # one takes turns
    trained = ("base", "upsampler_64", "judge", "matcher")
    left = gpus - sum(shares[name].num_workers for name in trained)
    assert shares["tokens"].num_actors == (left if left > 0 else gpus)
    assert shares["images"].gpus_per_worker == shares["cascade"].gpus_per_worker == 0  # for which a CPU will do
    assert shares_of(RECIPES["ldm_text_to_image"], gpus=gpus)["text_encoder"].gpus_per_worker == 0


@pytest.mark.parametrize("gpus", [4, 8, 64])
@pytest.mark.parametrize(
    "profile", [Profile(), Profile(num_workers=2), Profile(num_workers=4), Profile(num_workers=64)]
)
def test_pools_that_run_at_once_never_wait_for_gpus_that_another_pool_holds(gpus: int, profile: Profile):
    """Two pools with half of the GPUs each, both waiting for the other half before they begin, would wait for ever."""
    workflow = build_workflow(RECIPES["fashion_guidance"]())
    shares = share_cluster(workflow, profile, Cluster(cpus=8 * gpus, gpus=gpus))
    pools = [stage.name for stage in workflow.stages if not isinstance(stage.config, Training)]
    pools = [name for name in pools if shares[name].gpus_per_worker]
    groups = concurrent_stages(workflow, pools)
    assert max(map(len, groups)) > 1  # there are such pools
    for group in groups:
        assert sum(shares[name].num_actors for name in group) <= max(gpus, len(group))


def test_workers_that_a_profile_names_stay_though_there_are_fewer_gpus():
    shares = shares_of(RECIPES["imagenet_class_prior"], gpus=8, profile=Profile(num_workers=12))
    assert shares["tokenizer"].num_workers == 12
    with pytest.raises(UsageError, match=r"prior.global_batch_size 64 can't be shared by 12 workers"):
        check_shares(build_workflow(RECIPES["imagenet_class_prior"]()), shares)


def test_a_cluster_without_the_gpus_of_a_profile_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r"tokenizer: profile kuberay .* 1 GPU, the cluster has 0; .*--cluster"):
        share_cluster(build_workflow(openmoji()), load_profile("kuberay"), Cluster(cpus=8))


def test_parts_of_a_gpu_are_workers_too():
    shares = shares_of(RECIPES["imagenet_class_prior"], gpus=8, profile=Profile(gpus_per_worker=0.5))
    assert (shares["tokenizer"].num_workers, shares["prior"].num_workers) == (12, 16)  # of 16


@pytest.mark.parametrize("cpus", [8, 32, 96])
@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("profile", [Profile(), Profile(num_workers=4), Profile(cpus_per_worker=32)])
@pytest.mark.parametrize("recipe", ["openmoji", "depth_transformer", "dalle2"])
def test_all_that_trains_at_once_leaves_half_of_the_logical_cpus_to_short_tasks(
    recipe: str, profile: Profile, gpus: int, cpus: int
):
    workflow = build_workflow(RECIPES[recipe]())
    shares = share_cluster(workflow, profile, Cluster(cpus=cpus, gpus=gpus))
    for found in sets_at_once(workflow):
        assert sum(shares[name].num_workers * shares[name].cpus_per_worker for name in found) <= cpus / 2


def test_a_worker_claims_no_more_cpus_than_its_gpu_s_node_has_for_it():
    cluster = Cluster(cpus=16 + 100, gpus=8, cpus_per_gpu=2)  # one node with GPUs, and many that only read
    shares = share_cluster(build_workflow(RECIPES["imagenet_class_prior"]()), load_profile("kuberay"), cluster)
    assert (shares["tokenizer"].num_workers, shares["tokenizer"].cpus_per_worker) == (8, 2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_laptop_has_the_threads_that_its_bits_are_of(name: str):
    """Other numbers of threads are other bits: this formula is a promise."""
    workflow = build_workflow(RECIPES[name]())
    for cores in (1, 2, 3, 4, 8, 16, 64):
        cpus = CPUS_PER_CORE * max(2, cores)
        shares = share_cluster(workflow, Profile(), Cluster(cpus=cpus, cpus_per_core=CPUS_PER_CORE, here=True))
        for stage in workflow.stages:
            found = threads_of(shares[stage.name], cpus=cpus, gpus=0, cores=cores)
            assert found == max(1, cores // min(2, concurrent_trainings(workflow, stage.name))), (stage.name, cores)


def test_workers_have_the_threads_of_their_pod_and_share_a_node_by_their_gpus():
    shares = shares_of(RECIPES["imagenet_class_prior"], gpus=4, cpus=36, profile=load_profile("kuberay"))
    assert {threads_of(shares[name], cpus=8, gpus=1, cores=192) for name in ("tokenizer", "samples")} == {8}
    shares = shares_of(RECIPES["adm_imagenet_64_256"], gpus=64)
    found = {threads_of(shares[name], cpus=96, gpus=8, cores=192) for name in ("base", "classifier", "samples")}
    assert found == {12}
    half = Resources(threads=None, gpus_per_worker=0.5)
    assert threads_of(half, cpus=96, gpus=8, cores=192) == 6


def test_workers_without_gpus_share_the_cores_of_as_many_as_find_room():
    workflow, cluster = build_workflow(RECIPES["imagenet_class_prior"]()), Cluster(cpus=32, nodes=4)
    packed = share_cluster(workflow, Profile(num_workers=4), cluster)["tokenizer"]
    assert threads_of(packed, cpus=8, gpus=0, cores=8) == 2  # all four may come to one node
    spread = share_cluster(workflow, Profile(num_workers=4, cpus_per_worker=4), cluster)["tokenizer"]
    assert threads_of(spread, cpus=8, gpus=0, cores=8) == 4  # two at most


def test_a_profile_s_threads_are_taken_as_they_are():
    profile = Profile(threads=3, stages={"prior": {"threads": 5}})
    shares = shares_of(RECIPES["imagenet_class_prior"], gpus=4, profile=profile)
    assert (shares["tokenizer"].threads, shares["prior"].threads) == (3, 5)


def test_pools_without_gpus_use_the_cores_of_every_node():
    shares = share_cluster(build_workflow(RECIPES["imagenet_class_prior"]()), Profile(), Cluster(cpus=32, nodes=4))
    assert shares["samples"].num_actors == 4  # one training at a time: one with all cores on each node
    shares = share_cluster(build_workflow(openmoji()), Profile(), Cluster(cpus=32, nodes=4))
    assert shares["samples"].num_actors == 8
    here = Cluster(cpus=local_cpus(), cpus_per_core=CPUS_PER_CORE, here=True)
    assert share_cluster(build_workflow(openmoji()), Profile(threads=1), here)["samples"].num_actors >= 2


@pytest.mark.parametrize(
    ("profile", "cluster", "claim"),
    [
        ("kuberay", Cluster(cpus=36, gpus=4), 1),
        ("auto", Cluster(cpus=36, gpus=4), 1),
        ("auto", Cluster(cpus=8, cpus_per_core=CPUS_PER_CORE, here=True), CPUS_PER_CORE),
    ],
)
def test_a_task_of_one_thread_that_writes_shards_claims_one_core(
    profile: str, cluster: Cluster, claim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """It claimed four CPUs on a cluster, so that three of four idled while shards were written."""
    claimed = []

    def ingest(*source: object, num_cpus: float, **options: object) -> None:
        claimed.append(num_cpus)
        raise InterruptedError

    monkeypatch.setattr(images, "ingest", ingest)
    workflow = build_workflow(openmoji())
    resources = share_cluster(workflow, load_profile(profile), cluster)["images"]
    context = StageContext("images", "key", Store(str(tmp_path)), resources, Recorder(), tmp_path)
    with pytest.raises(InterruptedError):
        images.ingest_images(workflow.by_name["images"].config, context)
    assert claimed == [claim]


def test_a_cluster_is_read_as_it_is_written():
    assert parse_cluster(" cpus = 4 , gpus = 2 ") == Cluster(cpus=4, gpus=2)
    assert parse_cluster("gpus=4") == Cluster(cpus=32, gpus=4)
    assert parse_cluster("cpus=16") == Cluster(cpus=16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu=64", "did you mean 'gpus'"),
        ("64", "unknown '64'"),
        ("gpus=many", "not 'many'"),
        ("gpus=-1", "not '-1'"),
        ("gpus=1.5,cpus=8", "not '1.5'"),
        ("gpus=1,gpus=2", "gpus needs one"),
        ("gpus=1,", "unknown ''"),
        ("gpus=0", "needs CPUs"),
        ("", "unknown ''"),
    ],
)
def test_a_cluster_that_is_written_wrongly_is_one_line(text: str, says: str):
    with one_line(UsageError, match=says) as caught:
        parse_cluster(text)
    assert "gpus=64,cpus=512" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "stage", "profile", "row"),
    [
        ("imagenet_class_prior", "tokenizer", {}, (24, 40, 1, None, "24 of 64 GPUs: a batch of 24")),
        ("ldm_imagenet_f8", "tokenizer", {}, (40, 24, 2, None, "40 of 64 GPUs: 80 divides by 40, next by 80")),
        ("imagenet_class_prior", "prior", {"max_batch_per_device": 1}, (64, 0, 1, 1, "")),
        ("mindalle_text_prior", "prior", {"max_batch_per_device": 3}, (64, 0, 8, 3, "")),
        ("adm_imagenet_256", "base", {"max_batch_per_device": 8}, (32, 0, 8, 1, "with classifier")),
        (
            "imagenet_class_prior",
            "prior",
            {"num_workers": 8},
            (8, 56, 8, None, "8 of 64 GPUs: num_workers of the profile"),
        ),
        ("imagenet_class_prior", "prior", {"num_workers": 128}, (128, 0, 0, None, "waits until there are 128 GPUs")),
        ("adm_imagenet_256", "base", {"num_workers": 64}, (64, 0, 4, None, "takes turns with classifier")),
    ],
)
def test_a_plan_says_how_many_gpus_idle_and_why(recipe: str, stage: str, profile: dict, row: tuple):
    workflow, cluster, chosen = build_workflow(RECIPES[recipe]()), Cluster(cpus=512, gpus=64), Profile(**profile)
    rows = resource_rows(workflow, chosen, cluster, share_cluster(workflow, chosen, cluster))
    (found,) = [found for found in rows if found.stage == stage]
    assert (found.workers, found.idle, found.share, found.parts, found.why) == row


def test_trainings_on_latents_of_the_first_set_read_none_of_its_tars(tmp_path: Path):
    planned = build_workflow(load_recipe("dalle2", [])).plan(Store(str(tmp_path)), Selection())
    assert [row.stage for row in reads_of(planned, Profile(), [10**9] * 10)] == ["contrastive", "upsampler_32"]


def test_the_table_of_published_recipes_has_a_row_for_each_training():
    workflows = [build_workflow(recipe()) for recipe in PAPER_RECIPES.values()]
    lines = overview(workflows, Profile(), [parse_cluster(f"gpus={gpus}") for gpus in GPUS])
    rows = [line.split(" | ")[:2] for line in lines[2:]]
    assert rows == [[f"| `{workflow.name}`", name] for workflow in workflows for name in trainings(workflow)]
    cells = "1 × 42 | 3 × 14, 1 idle | 7 × 6, 1 idle | 21 × 2, 3 idle | 42 × 1, 22 idle"
    assert f"| `ldm_ffhq_f4` | base | 42 | {cells} |" in lines
