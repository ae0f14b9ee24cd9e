"""Laws of the contrastive encoder and its loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from components.models.contrastive import MAX_SCALE, ContrastiveEncoder, unit_variance
from components.models.losses.cross_entropy import along_gradient, contrastive_gradients, contrastive_loss
from components.training.tasks.recognition import retrieval_accuracy

TEXT = {"vocab_size": 20, "context_length": 6, "model_dim": 8, "num_layers": 1, "num_heads": 2}


def encoder(resolution: int = 16) -> ContrastiveEncoder:
    sizes = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 4, "embedding_dim": 6}
    return ContrastiveEncoder(resolution=resolution, **sizes, text=TEXT)


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_the_loss_is_that_of_clip() -> None:
    image, text, log_scale = unit(7, 5), unit(7, 5), torch.tensor(2.3)
    similarity = text @ image.T * log_scale.exp()
    ours = contrastive_loss(image, text, log_scale=log_scale)
    torch.testing.assert_close(ours, image_text_contrastive_loss(similarity))
    same = unit(1, 5).expand(9, 5)  # embeddings that know nothing cost the logarithm of the batch
    loss = contrastive_loss(same, same, log_scale=torch.tensor(1.0))
    torch.testing.assert_close(loss, torch.tensor(math.log(9)))


def test_a_batch_in_parts_along_its_gradients_is_the_whole_batch() -> None:
    network = encoder().double()
    image, text = torch.randn(6, 3, 16, 16).double(), torch.randint(3, 20, (6, 6))
    whole = network(image, text)
    contrastive_loss(whole.image.double(), whole.text.double(), log_scale=whole.log_scale).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    known = contrastive_gradients(whole.image, whole.text, log_scale=whole.log_scale)
    for rows in (slice(0, 4), slice(4, 6)):
        part = network(image[rows], text[rows])
        share = (rows.stop - rows.start) / 6
        pull = along_gradient(part.image, known.image[rows]) + along_gradient(part.text, known.text[rows])
        (pull + share * along_gradient(part.log_scale, known.log_scale)).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_embeddings_have_length_one_and_that_of_noise_and_odd_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 8"):
        encoder(12)
    network = encoder()
    image, text = network.encode_image(torch.randn(4, 3, 16, 16)), network.encode_text(torch.tensor([[1, 5, 2, 0, 0]]))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(text.embedding.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(unit_variance(image).square().mean(dim=1), torch.ones(4))


def test_padding_changes_no_text_and_has_no_state() -> None:
    network = encoder()
    short, long = network.encode_text(torch.tensor([[1, 5, 2]])), network.encode_text(torch.tensor([[1, 5, 2, 0, 0]]))
    torch.testing.assert_close(short.embedding, long.embedding)
    torch.testing.assert_close(short.states, long.states[:, :3])
    assert bool((long.states[:, 3:] == 0).all())


def test_the_scale_is_limited_in_the_weights_so_that_it_can_come_down() -> None:
    network = encoder()
    assert network.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        network.log_scale.fill_(10.0)
    network.limit_scale()
    assert network.log_scale.exp().item() == pytest.approx(MAX_SCALE, rel=1e-5)
    output = network(torch.randn(3, 3, 16, 16), torch.randint(3, 20, (3, 6)))
    assert contrastive_gradients(*output[:2], log_scale=output.log_scale).log_scale != 0


def test_retrieval_counts_what_has_the_same_caption() -> None:
    query, found = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    assert float(retrieval_accuracy(query, found, same=torch.eye(3) == 1)) == pytest.approx(1 / 3)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]) == 1
    assert float(retrieval_accuracy(query, found, same=same)) == 1


def test_of_rows_that_are_as_near_each_is_the_nearest_for_its_share() -> None:
    query = torch.linalg.qr(torch.randn(6, 6)).Q
    found, own = query[[0, 0, 0, 3, 4, 4]], torch.eye(6) == 1  # rows 1, 2 and 5 of the query are as near to all
    expected = (1 / 3 + 1 / 6 + 1 / 6 + 1 + 1 / 2 + 1 / 6) / 6
    for order in (torch.arange(6), torch.randperm(6)):
        assert float(retrieval_accuracy(query[order], found[order], same=own)) == pytest.approx(expected)
