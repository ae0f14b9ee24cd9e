"""Laws of profiles: what they say stands, what they leave open is found, and nothing of it is identity."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from components.configuration.families import family_of
from components.configuration.usage import UsageError
from components.models.bundle import NETWORKS
from components.runtime.execution import Resources
from pipelines.planning.preflight import check_shares
from pipelines.planning.profiles import Cluster, Profile, load_profile
from pipelines.planning.shares import share_cluster
from pipelines.recipes.catalog import RECIPES
from pipelines.recipes.systems import smoke
from pipelines.workflows import build_workflow
from tests.refusals import one_line

EIGHT_CPUS = Cluster(cpus=8)


def test_a_file_gives_one_stage_another_share_than_the_rest(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("num_workers: 2\nstages:\n  base: {num_workers: 4, gpus_per_worker: 1}\n")
    profile = load_profile(str(tmp_path / "mine.yaml"))
    shares = share_cluster(build_workflow(smoke()), profile, Cluster(cpus=16, gpus=4))
    assert shares["prior"].num_workers == 2
    assert shares["base"].num_workers == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_worker: 2", "did you mean 'num_workers'"),
        ("num_workers: 0", "num_workers"),
        ("sharding: half", "sharding"),
        ("name: é", r"^profile .*bad\.yaml: 'utf-8' codec can't decode"),
        ("max_failures: -5\nstages: {base: {x: 1}}", r"bad\.yaml: max_failures: "),
        ("stages: {prior: {num_workers: 2}, base: {aim: fastest}}", "stages.base: unknown field 'aim'; there are num_"),
        ("stages: {base: {num_worker: 1}}", "stages.base: unknown field 'num_worker'; did you mean 'num_workers'"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    with one_line(UsageError, match=says):
        load_profile(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("cluster", [EIGHT_CPUS, Cluster(cpus=64, gpus=8)])
def test_workers_that_cannot_share_a_batch_are_refused_before_anything_starts(cluster: Cluster):
    workflow = build_workflow(smoke())
    shares = share_cluster(workflow, Profile(num_workers=3), cluster)
    assert {shares[name].num_workers for name in ("tokenizer", "prior", "base")} == {3}  # as the profile says
    with pytest.raises(UsageError, match=r"tokenizer.global_batch_size 16 can't be shared by 3 workers"):
        check_shares(workflow, shares)


def test_an_elastic_gang_has_only_numbers_of_workers_that_share_the_batch():
    workflow, elastic = build_workflow(smoke()), Profile(num_workers=6, min_workers=2)
    shares = share_cluster(workflow, elastic, EIGHT_CPUS)
    assert shares["tokenizer"].worker_counts(16) == [2, 4]
    check_shares(workflow, shares)
    with pytest.raises(UsageError, match=r"tokenizer.global_batch_size 16 can't be shared by 5 to 7 workers"):
        check_shares(workflow, share_cluster(workflow, Profile(num_workers=7, min_workers=5), EIGHT_CPUS))


def test_an_elastic_gang_grows_no_further_than_its_share_of_the_gpus():
    shares = share_cluster(build_workflow(smoke()), Profile(min_workers=2), Cluster(cpus=64, gpus=12))
    names = ("tokenizer", "base", "upsampler_32")
    assert [shares[name].worker_counts(16) for name in names] == [[2, 4]] * 3
    assert sum(shares[name].num_workers for name in names) == 12


def test_a_profile_shards_all_trainings_or_those_that_it_names():
    workflow = build_workflow(smoke())
    named = Profile(stages={"prior": {"sharding": "full"}})
    for profile, sharded in ((Profile(), set()), (named, {"prior"}), (Profile(sharding="full"), {*workflow.by_name})):
        shares = share_cluster(workflow, profile, EIGHT_CPUS)
        assert {name for name, resources in shares.items() if resources.sharding == "full"} == sharded


@pytest.mark.parametrize(
    ("recipe", "stage"), [("smoke", "tokenizer"), ("gan", "gan"), ("pixelcnn", "pixelcnn"), ("pixelrnn", "row_lstm")]
)
def test_a_network_that_can_only_be_whole_is_refused_with_what_to_write(recipe: str, stage: str):
    workflow = build_workflow(RECIPES[recipe]())
    shares = share_cluster(workflow, Profile(sharding="full"), EIGHT_CPUS)
    with one_line(UsageError, match=rf"^{stage}: sharding full .* stages: \{{{stage}: \{{sharding: none\}}\}}$"):
        check_shares(workflow, shares)
    whole = Profile(sharding="full", stages={stage: {"sharding": "none"}})
    check_shares(workflow, share_cluster(workflow, whole, EIGHT_CPUS))


def test_workers_hold_whole_copies_and_say_how_many_samples_there_is_room_for():
    workflow, prior = build_workflow(smoke()), {"sharding": 4, "gpus_per_worker": 1, "num_workers": 8}
    for settings, fault in (
        ({"num_workers": 8, "max_batch_per_device": 2}, None),
        ({"num_workers": 8}, "prior: copies of a network in shards can't try .* max_batch_per_device .* sharding 4"),
        ({"num_workers": 2, "max_batch_per_device": 2}, "can't be shared by 2 workers, 4 a copy"),
    ):
        resources = Resources(**prior | settings)
        assert (resources.shards(8), resources.worker_counts(16)) == (4, [8] if settings["num_workers"] == 8 else [])
        with nullcontext() if fault is None else one_line(UsageError, match=fault):
            check_shares(workflow, {"prior": resources})


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_can_be_sharded_or_says_why_not(kind: str):
    assert family_of(kind).whole is None or "its" in str(family_of(kind).whole)
