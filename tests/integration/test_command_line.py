"""Bad input at the command: one clear line, exit code 2, nothing started, nothing damaged."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import yaml

from components.configuration.usage import UsageError
from pipelines.engine import driver
from tests.benchmarks.photos import write_photos
from tests.emulators import lack
from tests.image_sets import write_tar
from tests.in_process import Done, in_process
from tests.refusals import assert_refused

ROOT = Path(__file__).resolve().parents[2]

Cascade = Callable[..., Done]


@pytest.fixture
def cascade(tmp_path: Path) -> Cascade:
    """The command in an empty folder."""
    return partial(in_process, cwd=tmp_path)


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The installed command in a process of its own."""
    installed = [str(Path(sys.executable).with_name("cascade")), *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(installed, cwd=cwd, env=settings, capture_output=True, text=True, timeout=120)


def test_the_package_is_the_command_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "show", "openmojy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no recipe 'openmojy'; did you mean 'openmoji'?, or a YAML file\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "openmojy"], "no recipe 'openmojy'; did you mean 'openmoji'?"),
        (["--set", "base.totl_steps=5"], "unknown field 'totl_steps'; did you mean 'total_steps'?"),
        (["--set", "base.total_steps=none at all"], "base.optimization.total_steps"),
        (["--set", "nonsense"], "write it as field.name=value"),
        (["--set", "upsamplers.7.total_steps=5"], "item '7' of 1"),
        (["--set", "upsamplers.0.low_res_resolution=32"], "must be 16"),
        (["--until", "tokenzier"], "did you mean 'tokenizer'?"),
        (["--only", "prior"], "prior needs tokens"),
        (["--profile", "kuberey"], "did you mean 'kuberay'?"),
        (["--set", "images.source=/no/such/place"], "/no/such/place"),
        (["--set", "images.source=empty"], "empty"),
        (["--profile-steps", "25:20"], "--profile-steps 25:20: write it as FIRST:LAST"),
        (["--storage", "s4://bucket"], "s4"),
        (["--storage", "/proc/nowhere"], "/proc/nowhere can't be written"),
        (["--set", "tokenizer.perceptual_network=vgg16_lpips"], "perceptual_weights_uri"),
        (
            ["--recipe", "imagenet_class_prior", "--set", "images.source=openmoji"],
            "perceptual_weights_uri vgg16_lpips.safetensors can't be used",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cascade: Cascade, arguments: list[str], says: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    done = cascade("run", *arguments)
    assert_refused(done, says)
    assert not list(tmp_path.glob("runs/stages/*"))


def test_a_missing_bucket_and_missing_credentials_are_refused(s3_server: str, tmp_path: Path):
    missing = in_process("run", "--storage", "s3://no-such-bucket/runs", cwd=tmp_path)
    assert missing.returncode == 2, missing.stderr
    assert "s3://no-such-bucket/runs" in missing.stderr
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/tmp"}
    refused = command("run", "--storage", "s3://bucket/runs", cwd=tmp_path, **nobody)
    assert refused.returncode == 2, refused.stderr
    assert "credentials" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["run", "--storage", "az://bucket/runs"], "azure"),
        (["verify", "--storage", "gs://bucket/runs"], "gcs"),
        (["gc", "--storage", "az://bucket/runs"], "azure"),
        (["run", "--recipe", "openmoji", "--set", "images.source=gs://bucket/images"], "gcs"),
        (["run", "--recipe", "openmoji", "--set", "images.source=az://bucket/*.tar"], "azure"),
        (["data", "folder", "gs://bucket/images", "--out", "there"], "gcs"),
        (["lecture"], "lecture"),
        (["serve", "--model", "models:/tiny@champion"], "serve"),
    ],
)
def test_what_is_not_installed_is_one_line_that_names_the_extra(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extra: str
):
    lack("adlfs", "az", monkeypatch=monkeypatch)
    lack("gcsfs", "gs", monkeypatch=monkeypatch)
    for package in ("fastapi", "latex2mathml"):
        lack(package, monkeypatch=monkeypatch)
    done = cascade(*arguments)
    assert_refused(done)
    assert done.stderr.strip().endswith(f" needs the extra {extra}: pip install 'image-cascade[{extra}]'")


def test_a_printed_recipe_runs_as_a_file_with_the_same_keys(cascade: Cascade, tmp_path: Path):
    shown = cascade("show", "smoke")
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    by_name = cascade("plan", "--recipe", "smoke")
    by_file = cascade("plan", "--recipe", "mine.yaml")
    assert by_name.stdout == by_file.stdout
    assert "tars" not in by_name.stdout  # there are none
    assert by_name.stdout.splitlines()[-1].startswith("code: image-cascade ")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**yaml.safe_load(shown.stdout), "extra": 1}))
    refused = cascade("plan", "--recipe", "mine.yaml")
    assert refused.returncode == 2
    assert "unknown field 'extra'" in refused.stderr


def test_changing_the_base_leaves_the_token_branch_cached(cascade: Cascade):
    def keys(*arguments: str) -> dict[str, str]:
        lines = cascade("plan", "--recipe", "smoke", *arguments).stdout.splitlines()[1:]
        return {line.split()[0]: line.split()[1] for line in lines}

    before, after = keys(), keys("--set", "base.total_steps=81")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"base", "cascade", "samples", "evaluation"}


def test_the_script_takes_the_same_options_as_the_command(cascade: Cascade, tmp_path: Path):
    script = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "full_cascade.py"), "--recipe", "smoke", "--plan"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert script.returncode == 0, script.stderr
    assert script.stdout == cascade("run", "--recipe", "smoke", "--plan").stdout


def test_a_plan_for_a_cluster_that_is_not_here_asks_neither_source_nor_storage(cascade: Cascade, tmp_path: Path):
    """Nothing is at the published recipes' source, their weights are not here, and storage can't be written to."""
    arguments = ("--recipe", "imagenet_class_prior", "--cluster", "gpus=64,cpus=512", "--storage", "/proc/nowhere")
    done = cascade("plan", *arguments)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert lines["tokenizer"].split()[1:6] == ["24", "24", "40", "1", "found"]
    assert "24 of 64 GPUs" in done.stdout
    assert lines["prior"].split()[1:4] == lines["samples"].split()[1:4] == ["64", "64", "0"]
    assert not list(tmp_path.iterdir())
    chosen = cascade("plan", *arguments, "--only", "prior", "--profile", "laptop")
    assert "prior" in chosen.stdout
    assert "tokenizer" not in chosen.stdout
    several = cascade("plan", *arguments, "--cluster", "gpus=8", "--only", "prior")
    assert [line.split(" | ")[1] for line in several.stdout.splitlines()[2:]] == ["prior"]


def test_a_stage_of_a_profile_that_the_recipe_lacks_is_said(cascade: Cascade, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("stages: {bsae: {threads: 1}, upsampler_32: {threads: 1}}")
    plan = cascade("plan", "--recipe", "smoke", "--profile", "mine.yaml")
    with mock.patch.object(driver, "start_ray", side_effect=UsageError("as far as a test goes")):
        run = cascade("run", "--recipe", "smoke", "--profile", "mine.yaml", "--tracking", "none")
    for done in (plan, run):
        assert "profile mine: this recipe has no stage 'bsae'; did you mean 'base'?" in done.stdout
        assert "'upsampler_32'" not in done.stdout


def large_tars(folder: Path) -> str:
    """Ten tars of a gigabyte, of which only the head of the first is there: a plan reads no more."""
    write_photos(folder, resolution=256, shards=1, samples=400)
    (folder / "photos-0000.tar").rename(folder / "0.tar")
    for number in range(10):
        with open(folder / f"{number}.tar", "ab") as file:
            file.truncate(10**9)
    return f"{folder}/*.tar"


def test_a_plan_says_how_often_large_tars_are_read_and_how_to_write_smaller_ones(cascade: Cascade, tmp_path: Path):
    """A base of 64² and an upsampler of 256², both with batches of 256."""
    tars = large_tars(tmp_path / "tars")
    numbers = ["base.global_batch_size=256", "upsamplers.0.global_batch_size=256", "images.holdout_fraction=0.05"]
    chosen = [part for number in numbers for part in ("--set", number)]
    done = cascade("plan", "--recipe", "adm_imagenet_64_256", "--set", f"images.source={tars}", *chosen)
    assert done.returncode == 0, done.stderr
    said = done.stdout[done.stdout.index("10 tars of 1.0 GB, read where they are") :]
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert rows["training"] == ["streams", "1", "worker", "8", "workers", "64", "workers"]
    often = [float(cell.rstrip(",")) for cell in rows["upsampler_256"][1::3]]
    assert often[0] == 1 < often[1] < often[2]
    assert "warning: 64 workers of" in said
    assert f"cascade data webdataset '{tars}' --out FOLDER --holdout-fraction 0.05 " in said


@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("nothing/*.tar", [], "nothing at"),
        ("tars/*.zip", [], "no tars at"),
        ("tars/*.tar", ["--out", "tars/small"], "lies in the source"),
        ("tars", ["--out", "tars"], "lies in the source"),
        ("tars/*.tar", ["--resolution", "64"], "tars stay as they are"),
        ("tars/*.tar", ["--out", "/proc/nowhere"], "can't be written"),
    ],
)
def test_tars_that_can_not_be_written_again_are_one_line_and_exit_code_2(
    cascade: Cascade, tmp_path: Path, path: str, arguments: list[str], says: str
):
    write_tar(tmp_path / "tars" / "a.tar", range(4), side=8)
    done = cascade("data", "webdataset", path, *([] if "--out" in arguments else ["--out", "out"]), *arguments)
    assert_refused(done, says)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.tar"]


def test_tars_for_which_a_disk_has_no_room_are_not_read(cascade: Cascade, tmp_path: Path):
    tars = large_tars(tmp_path / "tars")
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10**9)):
        done = cascade("data", "webdataset", tars, "--out", "out")
    assert done.returncode == 2, done.stderr
    assert "the shards need 10.0 GB" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_several_clusters_are_compared_in_one_table(cascade: Cascade):
    both = cascade("plan", "--recipe", "ldm_ffhq_f4", "--cluster", "gpus=8", "--cluster", "gpus=24")
    assert "| `ldm_ffhq_f4` | base | 42 | 7 × 6, 1 idle | 21 × 2, 3 idle |" in both.stdout.splitlines()
    every = cascade("plan", "--recipe", "published", "--cluster", "gpus=64")
    assert "| `ldm_ffhq_f4` | base | 42 | 42 × 1, 22 idle |" in every.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--cluster", "gpus=all"], "gpus needs one whole number, not 'all'"),
        (["plan", "--cluster", "gpus=8", "--cluster", "gpu=8"], "did you mean 'gpus'"),
        (["plan", "--cluster", "gpus=8", "--until", "tokenzier"], "did you mean 'tokenizer'"),
        (["plan", "--cluster", "cpus=8", "--profile", "kuberay"], "the cluster has 0"),
        (["plan", "--cluster", "gpus=8", "--profile", "three.yaml"], "can't be shared by 3 workers"),
        (["plan", "--cluster", "gpus=8", "--recipe", "published", "--set", "prior.seed=1"], "--set"),
        (["plan", "--recipe", "published"], "no recipe 'published'"),
        (["run", "--cluster", "gpus=8"], "none is joined here"),
    ],
)
def test_a_cluster_that_can_not_be_planned_for_is_one_line_and_exit_code_2(
    cascade: Cascade, arguments: list[str], says: str, tmp_path: Path
):
    (tmp_path / "three.yaml").write_text("num_workers: 3")
    done = cascade(*arguments)
    assert_refused(done, says)
    assert not list(tmp_path.glob("runs/stages/*"))
