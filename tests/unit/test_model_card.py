"""Laws of a model's description: everything that somebody who finds it in the registry must know."""

from typing import Any

from components.runtime.storage.artifact import Artifact
from pipelines.engine.naming import LONGEST, model_card

COMMIT = "0123456789" * 4
REPORT = "s3://bucket/runs/openmoji-abc/report.html"
COMMAND = ["cascade", "run", "--recipe", "openmoji", "--set", "images.source=~/my photos"]


def made(kind: Any, stage: str, *, commit: str = COMMIT, **metadata: Any) -> Artifact:
    code = {"image-cascade": "0.1.0", "python": "3.11", "torch": "2.13.0", "modules": {"a.py": ["1", "2"]}}
    provenance = {"git_commit": commit, "code": code}
    return Artifact(kind=kind, stage=stage, key="k", files=(), metadata=metadata, provenance=provenance)


def card(*artifacts: Artifact, commit: str = COMMIT) -> str:
    named = {artifact.stage: artifact for artifact in artifacts}
    told = {"run": "openmoji-abc", "report": REPORT, "command": COMMAND, "commit": commit}
    return "\n".join(model_card(named, recipe="openmoji", **told))


def images(source: str, license_: str) -> Artifact:
    return made("shards", "images", source=source, license=license_, train_samples=3577)


def evaluation(rows: int = 1) -> Artifact:
    row = {"name": "diffusion branch, 64²", "samples": 3577, "distance": 98.44, "standard_error": 1.26}
    table = [row | {"purpose": "model", "name": f"{row['name']}{'x' * 100 * number}"} for number in range(rows)]
    return made("report", "evaluation", feature_network="efficientnet_lite0", distances=table)


def test_it_names_recipe_report_data_license_figures_code_and_command() -> None:
    text = card(images("openmoji", "CC BY-SA 4.0"), made("model", "base"), made("model", "cascade"), evaluation())
    assert text.startswith("Recipe `openmoji`.")
    assert f"Run `openmoji-abc`, report `{REPORT}`" in text
    assert "3,577 images of `openmoji`, from [openmoji.org](https://openmoji.org); their license: CC BY-SA 4.0" in text
    assert "| diffusion branch, 64² | 3,577 | 98.4 ± 1.3 |" in text
    assert "fd_efficientnet_lite0" in text
    assert "Nobody states the license of that network's pretrained weights" in text
    assert "- base, cascade: made by 012345678901, image-cascade 0.1.0, python 3.11, torch 2.13.0" in text
    assert f"    git checkout {COMMIT}\n    cascade run --recipe openmoji --set 'images.source=~/my photos'" in text


def test_own_images_have_a_license_that_is_not_known_and_without_an_evaluation_there_are_no_figures() -> None:
    assert "of `folder`; their license: unknown, the source states none" in card(images("folder", "unspecified"))
    assert "pretrained" not in card(images("scenes", "CC0-1.0"), made("model", "base"))


def test_models_of_several_commits_are_told_apart_and_a_source_without_one_is_not_checked_out() -> None:
    text = card(made("model", "base"), made("model", "prior", commit="source:abc"), commit="source:abc")
    assert "- base: made by 012345678901" in text
    assert "- prior: made by source:abc" in text
    assert "git checkout" not in text


def test_however_much_was_measured_mlflow_takes_it_and_the_command_is_whole() -> None:
    text = card(images("openmoji", "CC BY-SA 4.0"), evaluation(60))
    assert len(text) <= LONGEST
    assert "cascade run --recipe openmoji" in text
