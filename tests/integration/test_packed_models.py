"""A packed model of every kind loads in a fresh process, runs the code that it carries, and answers its own row."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mlflow.models import Model

import components
from components.runtime.tracking.registry import save_model
from components.sampling.cascade import compose
from tests.bare_environment import bare_python
from tests.tiny_diffusion_branches import base, classifier, classifier_guided, contrastive, dalle2, imagen, latent
from tests.tiny_palette import write_palette
from tests.unit.test_frozen_text import pretrained_folder

PROGRAM = """
    import json, pathlib, sys
    import mlflow, torch
    torch.set_num_threads(1)
    answers = {}
    for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        model = mlflow.pyfunc.load_model(str(path))
        assert model.metadata.signature is not None, path
        example = model.input_example
        try:
            (answers[path.name],) = model.predict(example if example is not None else [{"prompt": "red", "label": "0"}])
        except Exception as error:
            answers[path.name] = f"{type(error).__name__}: {error}"
    ours = {name: str(module.__file__) for name, module in sys.modules.items() if name.startswith("image_cascade")}
    print(json.dumps([answers, ours]))
"""
SAVE = """
    import pathlib, sys
    from components.runtime.tracking.registry import save_model
    save_model(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, and the cascades that hold them, as the registry keeps them."""
    home, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("packed")
    cascades = {make.__name__: make(home / make.__name__) for make in (latent, imagen, dalle2, classifier_guided)}
    encoder = pretrained_folder(home / "text_encoder", "bert")
    reads = base(home, text_conditioning="cross_attention", text_states_dim=8)
    models = {
        **cascades,
        "diffusion_prior": cascades["dalle2"] / "diffusion_prior",
        "latent_base": cascades["latent"] / "base",
        "imagen_base": cascades["imagen"] / "base",
        "contrastive": contrastive(home),
        "classifier": classifier(home),
        "text_encoder": encoder,
        "pretrained_reader": compose(home / "pretrained_reader", base=reads, text_encoder=encoder),
        "image_to_image": write_palette(home / "palette") / "model",
    }
    for name, model in models.items():
        save_model(folder / name, model)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without the checkout, with others' packages under its names."""
    return bare_python(tmp_path_factory.mktemp("stranger"))


def answers_of(python: Path, packed: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What each model in `packed` answers in one process, and the files of our modules that it ran."""
    command = [python, "-c", textwrap.dedent(PROGRAM), str(packed)]
    done = subprocess.run(command, cwd=packed.parent, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_answers_without_the_checkout_by_the_code_that_it_carries(packed: Path, stranger: Path):
    answers, modules = answers_of(stranger, packed)
    assert all(Path(file).is_relative_to(packed) for file in modules.values())
    assert len({name.partition(".")[0] for name in modules}) == 1
    refused = {name for name, answer in answers.items() if "Error" in answer}
    assert refused == {"diffusion_prior", "latent_base", "imagen_base"}
    assert all("ValueError" in answers[name] and "load the composed cascade" in answers[name] for name in refused)
    lists = {name: len(json.loads(answers[name])) for name in ("contrastive", "text_encoder", "classifier")}
    assert lists == {"contrastive": 6, "text_encoder": 5, "classifier": 3}


def test_a_model_that_does_nothing_alone_has_a_signature_and_no_example(packed: Path):
    prior = Model.load(str(packed / "diffusion_prior"))
    assert prior.signature is not None
    assert prior.saved_input_example_info is None
    assert Model.load(str(packed / "dalle2")).saved_input_example_info is not None


def test_only_what_holds_a_pretrained_encoder_needs_its_library(packed: Path):
    asks = {path.name for path in packed.iterdir() if "transformers" in (path / "requirements.txt").read_text()}
    assert asks == {"text_encoder", "pretrained_reader"}


def test_two_versions_of_the_code_answer_in_one_process_each_by_its_own(packed: Path, stranger: Path, tmp_path: Path):
    """When both were called `components` the second silently ran the code of the first."""
    both, checkout = tmp_path / "both", tmp_path / "checkout"
    shutil.copytree(packed / "classifier", both / "1")
    shutil.copytree(Path(components.__file__).parent, checkout / "components")
    code = checkout / "components" / "sampling" / "generators" / "diffusion.py"
    code.write_text(code.read_text().replace(".log_softmax(dim=1)", ".log_softmax(dim=1) * 0 + 1"))
    (model,) = (packed / "classifier" / "artifacts").iterdir()
    subprocess.run([sys.executable, "-c", textwrap.dedent(SAVE), both / "2", model], cwd=checkout, check=True)
    for folder in ("1", "2"):
        shutil.copytree(both / folder, both / f"{folder} again")
    answers, modules = answers_of(stranger, both)
    first, second = (json.loads(answers[name]) for name in ("1", "2"))
    assert (answers["1 again"], answers["2 again"]) == (answers["1"], answers["2"])
    assert max(first.values()) < 1 < min(second.values())
    assert len({name.partition(".")[0] for name in modules}) == 2
