"""Laws of the likelihood of texts; those of images' tokens stand with their networks."""

import math

import torch

from components.models.losses.cross_entropy import text_loss, text_nats, token_loss

TEXT = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 7, 2], [0, 0, 0, 0, 0, 0]])


def test_a_uniform_model_has_the_logarithm_of_the_vocabulary_as_loss():
    tokens = torch.randint(0, 7, (3, 4))
    torch.testing.assert_close(token_loss(torch.zeros(3, 4, 7), tokens=tokens), torch.tensor(math.log(7)))
    torch.testing.assert_close(text_loss(torch.zeros(3, 5, 12), text=TEXT[:3]), torch.tensor(math.log(12)))


def test_text_loss_is_what_the_hand_computes():
    """Logit i is of token i + 1; pads count nothing; each text is averaged over its own tokens."""
    logits = torch.randn(4, 5, 12)
    log_p = logits.log_softmax(dim=-1)
    first = -(log_p[0, 0, 7] + log_p[0, 1, 9] + log_p[0, 2, 2])
    second = -log_p[1, 0, 2]
    third = -(log_p[2, 0, 4] + log_p[2, 1, 5] + log_p[2, 2, 6] + log_p[2, 3, 7] + log_p[2, 4, 2])
    nats, count = text_nats(logits, text=TEXT)
    torch.testing.assert_close(nats, torch.stack([first, second, third, torch.tensor(0.0)]))
    assert count.tolist() == [3, 1, 5, 0]
    torch.testing.assert_close(text_loss(logits, text=TEXT), (first / 3 + second + third / 5) / 4)


def test_pads_have_no_gradient():
    logits = torch.randn(4, 5, 12, requires_grad=True)
    text_loss(logits, text=TEXT).backward()
    assert torch.equal(logits.grad.abs().sum(dim=-1) > 0, TEXT[:, 1:] != 0)


def test_a_batch_in_parts_has_the_same_text_loss():
    logits = torch.randn(4, 5, 12)
    parts = [text_loss(logits[i : i + 1], text=TEXT[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), text_loss(logits, text=TEXT))
