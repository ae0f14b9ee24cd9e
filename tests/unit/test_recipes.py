"""Recipes of every workflow: they build, they share what has equal numbers, and their errors name the field."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from components.configuration.usage import UsageError
from pipelines.planning.shares import concurrent_trainings, stands_alone, trainings
from pipelines.recipes.catalog import RECIPES, ROWS, apply_overrides, load_recipe, resolved_yaml
from pipelines.recipes.diffusion_rows import FASHION
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.systems import openmoji
from pipelines.suites.lecture import chosen_rows
from pipelines.workflow import Workflow, stage_keys
from pipelines.workflows import build_workflow


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_its_workflow_and_survives_its_own_yaml(name: str, tmp_path: Path):
    recipe = RECIPES[name]()
    workflow = build_workflow(recipe)
    assert workflow.name == recipe.name == name
    assert trainings(workflow)
    file = tmp_path / "edited.yaml"
    file.write_text(resolved_yaml(recipe))
    assert load_recipe(str(file), []) == recipe


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_first_which_row_it_is(name: str):
    assert re.fullmatch(r"[TPDG]\d+", ROWS[name]), RECIPES[name].summary


@pytest.mark.parametrize("name", ["scenes", "pixelcnn_32", "maskgit", "vqvae_pixelcnn", "smoke"])
def test_a_field_set_to_what_it_is_changes_nothing(name: str) -> None:
    """A null too: it once took the first kind of a part for the chosen one."""
    plain = RECIPES[name]().model_dump(mode="json")

    def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
        for field, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, (*path, field))
            elif value is None or isinstance(value, bool | int | float):
                yield ".".join((*path, field)), value

    for path, value in leaves(plain):
        text = "null" if value is None else yaml.safe_dump(value).split("\n")[0]
        assert apply_overrides(plain, [f"{path}={text}"], type(RECIPES[name]())) == plain, path


def test_a_short_name_begins_a_part_that_is_null_and_a_value_is_whole() -> None:
    tree = RECIPES["smoke"]().model_dump(mode="json")
    assert apply_overrides(tree, ["base.rank=8"], type(RECIPES["smoke"]()))["base"]["adapter"]["rank"] == 8
    assert load_recipe("openmoji", ["images.source=/data/pics #2"]).images.source == "/data/pics #2"
    assert load_recipe("openmoji", ["images.source='/data/a b'"]).images.source == "/data/a b"


@pytest.mark.parametrize("text", ["2024", "2024-05-01", "*.tar", "010", "a: b", "[a]", "true", "null", "&a #b"])
def test_a_field_of_text_takes_it_as_it_is_typed(text: str) -> None:
    assert load_recipe("openmoji", [f"images.source={text}"]).images.source == text
    assert load_recipe("openmoji", [f"images.source='{text}'"]).images.source == text
    prompts = ['samples.prompts=["a","b"]', f"samples.prompts.1={text}"]
    assert load_recipe("openmoji", prompts).samples.prompts == ("a", text)


def test_a_field_of_text_that_may_be_null_is_so_where_null_is_not_quoted() -> None:
    tree, shape = RECIPES["smoke"]().model_dump(mode="json"), type(RECIPES["smoke"]())
    for text, value in (("null", None), ("~", None), ("", None), ("'null'", "null"), ("7", "7")):
        changed = apply_overrides(tree, [f"evaluation.feature_weights={text}"], shape)
        assert changed["evaluation"]["feature_weights"] == value


def test_numbers_are_decimal() -> None:
    """They once were octal behind a 0, and of base 60 around a colon."""
    assert load_recipe("smoke", ["base.seed=010"]).base.optimization.seed == 10


def test_rows_that_share_numbers_share_stages():
    """The demo's tokenizer and tokens are found by the priors of rows P3 and P6, the VAE-GAN of T1 by row D13."""
    names = ("scenes", "vqgan_transformer", "maskgit", "vae_gan", "latent_diffusion")
    demo, transformer, masked, first, latent = (stage_keys(workflow_of(name).stages) for name in names)
    for stage in ("images", "tokenizer", "tokens"):
        assert demo[stage] == transformer[stage] == masked[stage]
    assert len({row["prior"] for row in (demo, transformer, masked)}) == 3
    assert first["vae"] == latent["vae"]


def test_the_cascade_that_is_measured_at_256_goes_on_from_the_stages_of_openmoji():
    measured, drawn = load_recipe("cascade_256", []), openmoji()
    assert isinstance(measured, DiffusionBranchRecipe)
    assert (measured.base, measured.upsamplers[:1]) == (drawn.base, drawn.upsamplers)
    assert [upsampler.data.resolution for upsampler in measured.upsamplers] == [64, 256]
    assert measured.samples.measured_samples > 0


def test_only_a_model_with_a_known_distribution_of_latents_is_drawn_from():
    stages = {name: workflow_of(name).by_name.keys() for name in ("vae", "vae_gan", "vqgan")}
    assert "samples" in stages["vae"]
    assert "samples" not in stages["vae_gan"] | stages["vqgan"]
    with pytest.raises(ValidationError, match="samples is missing: a pixelcnn is known by the images that it makes"):
        RECIPES["pixelcnn"]().replace(samples=None)


@pytest.mark.parametrize(
    ("recipe", "assignment"),
    [
        ("openmoji", "sampling.base.guidance_scale=3"),
        ("openmoji", "sampling.prior.top_k=50"),
        ("openmoji", "sampling.upsamplers.0.num_inference_steps=4"),
        ("palette", "sampling.model.num_inference_steps=4"),
        ("gan", "sampling.truncation=0.5"),
        ("maskgit", "sampling.prior.num_inference_steps=4"),
        ("dalle2", "sampling.diffusion_prior.candidates=3"),
        ("autoguidance", "sampling.base.autoguidance_scale=3"),
    ],
)
def test_what_only_sampling_uses_trains_nothing_again(recipe: str, assignment: str):
    before, after = (stage_keys(build_workflow(load_recipe(recipe, asked)).stages) for asked in ([], [assignment]))
    moved = {stage for stage, key in before.items() if after[stage] != key}
    assert moved <= {"cascade", "samples", "evaluation", "agreement", "restoration", "obedience"}
    assert "cascade" in moved


def workflow_of(name: str) -> Workflow:
    return build_workflow(RECIPES[name]())


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("depth_transformer", {"tokenizer": 2, "condition_tokenizer": 2, "prior": 1}),  # the prior has all cores
        ("classifier_guided", {"vae": 1, "classifier": 2, "base": 2}),  # two wait for the first
        ("ddpm", {"base": 1}),
    ],
)
def test_trainings_that_do_not_wait_for_each_other_run_at_once(recipe: str, counts: dict[str, int]):
    workflow = workflow_of(recipe)
    assert {name: concurrent_trainings(workflow, name) for name in trainings(workflow)} == counts
    assert concurrent_trainings(workflow, "samples") == max(counts.values())  # no training: in so many processes


def test_a_training_that_nothing_waits_for_lets_the_longer_branch_go_first():
    workflow = workflow_of("openmoji")
    # One of each branch, and two that judge.
    assert {concurrent_trainings(workflow, name) for name in trainings(workflow)} == {5}
    alone = [name for name in trainings(workflow) if stands_alone(workflow, name)]
    assert alone == ["base", "upsampler_64", "judge", "matcher"]  # the prior waits for the tokenizer
    only = workflow_of("ddpm")
    assert not any(stands_alone(only, name) for name in trainings(only))  # there is nobody to let go first


@pytest.mark.parametrize("name", RECIPES)
def test_a_sampling_step_lies_inside_the_training(name: str):
    for config in trainings(workflow_of(name)).values():
        steps = config.optimization
        assert steps.sample_every <= steps.total_steps
        assert steps.checkpoint_every <= steps.total_steps


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_published_sizes_are_saved_by_the_clock_and_compiled(name: str):
    """A checkpoint of the largest is 22.6 GB: by steps it would be written as often as a GPU is fast."""
    for config in trainings(workflow_of(name)).values():
        assert (config.optimization.checkpoint_minutes, config.optimization.compile_network) == (20, True)
        assert config.optimization.streams % 64 == 0  # workers on 8 nodes of 8 GPUs read each shard once


FAULTS = [  # recipe and assignments, words of the line that refuses them
    ("maskgit prior.num_layer=2", "prior.num_layer|num_layers"),
    ("maskgit prior.num_layers=0", "prior.network.num_layers|got 0"),
    ("vae model.kl_weigth=1", "model.kl_weigth|kl_weight"),
    ("vae model.channel_mult=[]", "model.network.channel_mult|at least 1 item"),
    ("smoke base.total_steps=20:00", "base.optimization.total_steps: |got '20:00'"),
    ("smoke base.total_steps=2024-05-01", "base.optimization.total_steps: |got '2024-05-01'"),
    ("openmoji base.network=dot", "unknown kind 'dot'|dit"),
    ("openmoji base.network.kind=dot", "unknown kind 'dot'|dit"),
    ("openmoji base.total_steps.kind=5", "plain value"),
    ("gan model.resolution=30", "resolution 30"),
    ("gan sampling.model.truncation=0", "sampling.model.truncation: Input should be greater than 0|got 0"),
    ('gan sampling.model={"top_k":4}', "sampling.model: a gan takes truncation"),
    ('vae sampling.model={"truncation":0.5}', "sampling.model must be empty|autoencoder"),
    ("latent_diffusion stages_study={}", "stages_study must be empty"),
    ('glide stages_study={"steps":[2000]}', "stages_study.steps must be at most num_train_timesteps 1000, not 2000"),
    ("vae codes_study={}", "codes_study must be empty: this autoencoder has no codes"),
    ("dalle tokenizer.bottleneck=gaussian", "gaussian"),
    ("depth_transformer condition.tokens.member=mask", "mask|depth"),
    ("vae images.resolution=16", "images.resolution|32"),
    ("maskgit sampling.prior.num_inference_steps=65", "sampling.prior.num_inference_steps|64"),
    ("depth_transformer condition=null", "condition is missing"),
    ("gan channel_mult=[1,2", "--set channel_mult: '[1,2' is no YAML"),
    ("depth_transformer prior.conditions=[label]", "condition is given|label"),
    ("vqvae_pixelcnn prior.resolution=8 prior.channels=66", "prior.resolution"),
    ("vqvae_pixelcnn sampling.prior.compile_decoding=true", "sampling.prior|compile_decoding"),
    ("gan model.gradient_checkpointing=true", "model.optimization.gradient_checkpointing|got True"),
    ("fashion_guidance judge=null", "judge is missing|guidance_study"),
    ("fashion_guidance weaker=null", "weaker is missing|autoguidance"),
    ("fashion_guidance classifier.noisy=false", "classifier.noisy"),
    ("fashion_guidance judge.noisy=true", "judge.noisy"),
    ("fashion_guidance weaker.resolution=16", "weaker.resolution|28"),
    ("fashion_guidance base.conditions=[] weaker.conditions=[]", "base.conditions|label"),
    ("fashion_guidance guidance_study.feature_network=none", "guidance_study.feature_network"),
    ("fashion_guidance images.resolution=16", "images.resolution|28"),
    ("fashion_guidance weaker.conditions=[]", "weaker.conditions|label"),
    ("fashion_guidance classifier.schedule=linear", "classifier.process.schedule|cosine"),
    ("fashion_guidance guidance_study.num_inference_steps=1001", "guidance_study.num_inference_steps|1000"),
    ("fashion_guidance guidance_study.scales=[-1.0]", "guidance_study.scales"),
    ("fashion_guidance guidance_study.methods=[]", "guidance_study.methods"),
    ("fashion_steps steps_study.steps=[5,2000]", "steps_study.steps"),
    ("fashion_steps steps_study.steps=[0]", "steps_study.steps"),
    ("fashion_steps steps_study.reference_steps=1001", "steps_study.reference_steps"),
    ("fashion_likelihood_ddpm likelihood.timesteps_per_image=1", "likelihood.timesteps_per_image"),
    ("fashion_likelihood_ddpm likelihood.timesteps_per_image=1001", "likelihood.timesteps_per_image"),
    ("fashion_likelihood_ddpm base.process=flow", "likelihood needs base.process discrete, not flow"),
    ("vqgan model.shared_scale=true", "shared_scale needs reconstruction logit_laplace or discretized_logistic"),
    ("ddpm base.process=flow", "noising_study needs base.process discrete, not flow"),
    ("classifier_guided classifier.schedule=linear", "classifier.process.schedule|'cosine'"),
    ("classifier_guided classifier.num_train_timesteps=500", "classifier.process.num_train_timesteps|1000"),
    ("classifier_guided classifier.process=edm", "classifier.process.kind|'discrete'"),
    ("classifier_guided classifier.noisy=false", "classifier|in_channels must be 3|noisy=true"),
    ("classifier_guided classifier.resolution=8 classifier.attention_resolutions=[4]", "classifier.data.resolution|16"),
    ("classifier_guided classifier.in_channels=3", "classifier.data.in_channels must be base.data.in_channels 4"),
    ("autoguidance weaker=null", "sampling.base.autoguidance_scale"),
    ("autoguidance weaker.process=edm", "weaker.process|base.process"),
    ("autoguidance weaker.conditions=[]", "weaker.conditions|label"),
    ("autoguidance weaker.resolution=32", "weaker.resolution|16"),
    ("autoguidance sampling.base.guidance_scale=2", "guidance_scale and autoguidance_scale"),
    ("image_cross_attention base.image_patch_size=5", "image_patch_size 5|32"),
    ("image_cross_attention base.conditions=[] base.condition_member=null", "condition_image"),
    ("class_guided images.source=/home/ada/photos", "held_out_pairs are colors|set images.held_out_pairs=0"),
    ("class_guided sampling.base.spacing=even", "unknown spacing 'even'|linspace"),
    ("class_guided sampling.base.spacing=[0,1000] sampling.base.num_inference_steps=2", "sampling.base: |0, 999"),
    ("zero_terminal_snr sampling.base.spacing=leading_from_1", "sampling.base.spacing|skips the last step"),
    ("class_guided base.process=flow sampling.base.spacing=leading", "sampling.base.spacing must be empty|flow"),
    ("class_guided sampling.base.spacing=[0,5,5] sampling.base.num_inference_steps=3", "names a step twice"),
    ("class_guided base.cond_drop_prob=0", "sampling.base.guidance_scale must be 1: cond_drop_prob 0"),
    ("scenes prior.cond_drop_prob=0", "sampling.prior.guidance_scale must be 1: cond_drop_prob 0"),
    ("fashion_guidance base.cond_drop_prob=0", "base.cond_drop_prob must be above 0|classifier_free"),
    ("fashion_steps sampling.base.sampler=ddim sampling.base.eta=0.5", "sampling.base.eta must be 0: steps_study"),
    ("class_guided base.model_channels=33 base.head_dim=null base.num_heads=1", "base.network.model_channels|2"),
    ("latent_diffusion base.in_channels=3", "base.data.in_channels|4"),
    ("latent_diffusion sampling.base.threshold=static", "sampling.base.threshold"),
    ("imagen text_encoder=null", "text_states|contrastive or text_encoder"),
    ("imagen upsamplers.0.low_res_resolution=8", "upsamplers.0.low_res_resolution|16"),
    ("imagen sampling.upsamplers.0.noise_level=501", "sampling.upsamplers.0.noise_level|500"),
    (
        "dalle2 base.conditions=[image_embedding,text_states] base.text_states_dim=32",
        "base.text_states_dim|64|contrastive",
    ),
    ("dalle2 base.image_embedding_dim=32", "base.image_embedding_dim|64|contrastive"),
    ("dalle2 contrastive.resolution=32 diffusion_prior.resolution=32", "contrastive.resolution|16"),
    ("dalle2 diffusion_prior.resolution=8", "diffusion_prior.resolution|16"),
    ("dalle2 text_encoder.uri=somewhere", "leave text_encoder out"),
    ("dalle2 precompute.columns=[latents]", "latents among precompute.columns|no model"),
    ("class_guided precompute.resolution=16 precompute.columns=[text_states]", "text_states|no model"),
    ("class_guided precompute.resolutoin=16", "precompute.resolutoin|'resolution'"),
    ("class_guided precompute.resolution=128", "images.resolution 64|precompute.resolution"),
    ("glide precompute.resolution=8", "precompute.kept_resolution|16"),
    ("latent_diffusion precompute.resolution=32", "precompute.resolution|64"),
    ("dalle2 precompute.columns=[text_states] precompute.kept_resolution=8", "kept_resolution|16"),
]


@pytest.mark.parametrize(("asked", "words"), FAULTS)
def test_an_error_names_the_field_as_it_is_written(asked: str, words: str):
    recipe, *assignments = asked.split()
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, assignments)
    assert all(word in str(caught.value) for word in words.split("|")), caught.value
    assert not re.search(r"\n|got \{", str(caught.value))


@pytest.mark.parametrize(
    ("recipe", "part", "kind", "numbers"),
    [
        ("openmoji", "base.network", "dit", ["base.model_dim=96", "base.num_heads=4"]),
        ("openmoji", "upsamplers.0.network", "dit", ["upsamplers.0.model_dim=96", "upsamplers.0.num_heads=4"]),
        ("openmoji", "tokenizer.bottleneck", "fsq", ["tokenizer.levels=[8,8,8]"]),
        ("openmoji", "tokenizer.network.bottleneck", "fsq", ["tokenizer.levels=[8,8,8]"]),
        ("openmoji", "base.process", "flow", []),
        ("pixelcnn", "model.network", "row_lstm", []),
        ("vqgan_transformer", "prior.network", "masked_transformer", []),  # `prior` is another training then
    ],
)
def test_a_kind_is_set_in_place_of_its_part_or_by_its_name(recipe: str, part: str, kind: str, numbers: list[str]):
    chosen = load_recipe(recipe, [f"{part}={kind}", *numbers])
    assert load_recipe(recipe, [f"{part}.kind={kind}", *numbers]) == chosen
    assert chosen != load_recipe(recipe, [])


def test_an_unknown_workflow_of_a_file_is_named(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("workflow: token_rod\nname: mine\n")
    with pytest.raises(UsageError, match=r"token_rod.*token_branch"):
        load_recipe(str(file), [])


def test_rows_are_chosen_by_row_or_recipe():
    assert chosen_rows(["T2", "gan"]) == {"vqvae": "T2", "vqvae_ema": "T2", "gan": "G1"}
    assert len(chosen_rows([])) == len(ROWS)
    with pytest.raises(UsageError, match=r"maskgti.*maskgit"):
        chosen_rows(["maskgti"])


def test_a_study_that_is_not_asked_for_is_no_stage():
    names = {row.name: list(build_workflow(row()).by_name) for row in FASHION}
    common = {"images", "base", "cascade", "samples", "evaluation"}
    assert set(names["fashion_steps"]) == common | {"steps_study"}
    assert set(names["fashion_guidance"]) == common | {"weaker", "classifier", "judge", "guidance_study"}
    assert set(names["fashion_likelihood_ddpm"]) == set(names["fashion_likelihood_hybrid"]) == common | {"likelihood"}
    assert set(names["fashion_pixelcnn"]) == common - {"base"} | {"pixelcnn"}
    assert RECIPES["fashion_steps"]().base == RECIPES["fashion_guidance"]().base  # trained once for both


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_published_recipes_do_the_work_of_frozen_networks_once(name: str):
    recipe = PAPER_RECIPES[name]()
    if not isinstance(recipe, DiffusionBranchRecipe):
        return
    asked = {"latents"} if recipe.autoencoder is not None else set()
    asked |= {"text_states", "image_embedding"} & {*recipe.base.conditioning.conditions}
    asked |= {"text_states", "text_embedding"} if recipe.diffusion_prior is not None else set()
    assert asked == set(() if recipe.precompute is None else recipe.precompute.columns)
    assert ("precompute" in build_workflow(recipe).before("base")) == bool(asked)
