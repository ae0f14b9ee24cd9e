"""Laws of the shares that stages get: nobody can starve the tasks that feed him, and nothing of it is identity."""

from pathlib import Path

import pytest

from pipelines.preflight import check_batches
from pipelines.profiles import Profile, load_profile
from pipelines.recipes.smoke import smoke
from pipelines.workflow import UsageError
from pipelines.workflows import build_workflow


@pytest.mark.parametrize("cpus", [1, 2, 8, 96])
@pytest.mark.parametrize("branches", [1, 3, 5])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_all_trainings_at_once_leave_half_of_the_logical_cpus_to_the_readers(cpus: int, branches: int, workers: int):
    resources = Profile(num_workers=workers).resources("base", cluster={"CPU": cpus}, branches=branches)
    rounding = 0.01 * branches * workers
    assert branches * resources.num_workers * resources.cpus_per_worker <= cpus / 2 + rounding


def test_gpus_are_used_where_there_are_some_and_shared_by_the_branches():
    resources = Profile().resources("base", cluster={"CPU": 64, "GPU": 8}, branches=3)
    assert (resources.gpus_per_worker, resources.num_workers) == (1, 2)
    assert Profile().resources("base", cluster={"CPU": 8}, branches=3).gpus_per_worker == 0


def test_readers_follow_the_workers_of_each_stage_unless_they_are_given():
    workers = {"base": {"num_workers": 4}, "prior": {"readers": 1}}
    for readers, found in ((None, (6, 8, 1)), (5, (5, 5, 1))):
        profile = Profile(num_workers=3, readers=readers, stages=workers)
        shares = [profile.resources(stage, cluster={"CPU": 8}, branches=1) for stage in ("tokenizer", "base", "prior")]
        assert tuple(share.readers for share in shares) == found


def test_a_file_gives_one_stage_another_share_than_the_rest(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("num_workers: 2\nstages:\n  base: {num_workers: 4, gpus_per_worker: 1}\n")
    profile = load_profile(str(tmp_path / "mine.yaml"))
    cluster = {"CPU": 16.0, "GPU": 4.0}
    assert profile.resources("prior", cluster=cluster, branches=3).num_workers == 2
    assert profile.resources("base", cluster=cluster, branches=3).num_workers == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_worker: 2", "did you mean 'num_workers'"),
        ("num_workers: 0", "num_workers"),
        ("stages: {base: {x: 1}}", "x"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        load_profile(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_workers_that_cannot_share_a_batch_are_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"tokenizer.global_batch_size 16 can't be shared by 3 workers"):
        check_batches(build_workflow(smoke()), Profile(num_workers=3), cluster={"CPU": 8})


def test_an_elastic_gang_has_only_numbers_of_workers_that_share_the_batch():
    elastic = Profile(num_workers=6, min_workers=2)
    resources = elastic.resources("tokenizer", cluster={"CPU": 8}, branches=1)
    assert resources.worker_counts(16) == [2, 4]
    check_batches(build_workflow(smoke()), elastic, cluster={"CPU": 8})
    with pytest.raises(UsageError, match=r"tokenizer.global_batch_size 16 can't be shared by 5 to 7 workers"):
        check_batches(build_workflow(smoke()), Profile(num_workers=7, min_workers=5), cluster={"CPU": 8})
