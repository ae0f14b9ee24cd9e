"""Laws of decoding by one compiled step: the same tokens, and nothing that is compiled twice."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from components.configuration.sampling import TokenSampling
from components.models.transformer import Transformer
from components.sampling import autoregressive
from components.sampling.autoregressive import KEPT, OnToken, generate
from tests.token_models import GIVEN, POSITIONS, assert_own_streams, generators, rows, transformer
from tests.trained_networks import forget_compiled


@pytest.fixture(autouse=True)
def without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autoregressive, "BACKEND", "aot_eager")
    forget_compiled()
    yield
    forget_compiled()


def made(**changes: Any) -> Transformer:
    return transformer(**{"num_tokens": 12, "grid": (3, 4)} | changes)


def drawn(
    model: Transformer, part: slice = slice(3), *, compiled: bool, on_token: OnToken | None = None, **settings: float
) -> Tensor:
    how = {"generators": generators(*range(5)[part]), "sampling": TokenSampling(**settings)}
    return generate(model, rows(part), **how, compiled=compiled, on_token=on_token)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("text", [True, False])
def test_a_step_at_a_position_of_the_device_gives_the_logits_of_a_step(positions: str, text: bool) -> None:
    """Also where the cache holds another batch: what has not been written over is not looked at."""
    model = made(positions=positions, **({} if text else {"vocab_size": None, "text_length": None}))
    conditions = {name: value[:3] for name, value in GIVEN.items() if text or name == "label"}
    (_, plain), (_, other) = (model.start(3, **conditions) for _ in range(2))
    for keys in (*other.keys, *other.values):
        keys.normal_(std=10)
    _, fixed = model.start(3, **conditions, cache=other)
    for number in range(model.num_tokens - 1):
        tokens = torch.tensor([number, 1, 2])
        expected = model.step(tokens, cache=plain)
        position = torch.tensor(model.num_conditions + number)
        torch.testing.assert_close(model.step_at(tokens, position, cache=fixed), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_compiled_greedy_decoding_gives_the_tokens_of_eager_decoding(positions: str, guidance_scale: float) -> None:
    model = made(positions=positions)
    settings = {"temperature": 0.0, "guidance_scale": guidance_scale}
    tokens = drawn(model, compiled=True, **settings)
    assert torch.equal(tokens, drawn(model, compiled=False, **settings))
    assert len(tokens.unique(dim=0)) > 1


def test_one_compilation_serves_every_position_and_every_batch_of_its_size() -> None:
    model = made()
    for part in (slice(0, 2), slice(1, 3), slice(0, 2)):
        drawn(model, part, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        drawn(model, slice(1, 3), compiled=True, temperature=0.5)
    drawn(model, compiled=True)
    assert counters["stats"]["unique_graphs"] == 2


def test_the_same_seed_gives_the_same_tokens_in_whatever_company_also_compiled() -> None:
    model, sampling = made(), TokenSampling(guidance_scale=2.0, temperature=0.9, top_k=10, top_p=0.95)
    how = {"sampling": sampling, "compiled": True}
    assert_own_streams(lambda part, seeds: generate(model, rows(part), generators=generators(*seeds), **how), 3)


def test_a_batch_that_broke_off_leaves_its_cache_to_no_other() -> None:
    model, seen = made(), list[bool]()

    def on_token(done: int, total: int) -> None:
        seen.append(model in KEPT)
        if done == 3:
            raise InterruptedError

    drawn(model, compiled=True)
    assert model in KEPT
    with pytest.raises(InterruptedError):
        drawn(model, compiled=True, on_token=on_token)
    assert not any(seen)
    assert model not in KEPT


def test_generated_code_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoregressive, "BACKEND", "inductor")
    model = made(num_layers=1)
    tokens = drawn(model, compiled=True, temperature=0.0)
    assert counters["inductor"]
    assert torch.equal(tokens, drawn(model, compiled=False, temperature=0.0))
