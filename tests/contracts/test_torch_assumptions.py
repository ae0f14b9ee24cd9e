"""What is assumed of torch beyond what it promises, a case each: on another version they say which assumption broke."""

import ast
import inspect
from pathlib import Path
from pkgutil import resolve_name as part

import pytest
import torch

from components.training.parallel import shard_rows

COMPONENTS = Path(__file__).parents[2] / "components"
PRIVATE = sorted(
    {
        (path.relative_to(COMPONENTS).as_posix(), node.module, alias.name)
        for path in COMPONENTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.") and "._" in str(node.module)
        for alias in node.names
    }
)
COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"


@pytest.mark.parametrize(("file", "module", "name"), PRIVATE)
def test_torch_still_has_what_is_imported(file: str, module: str, name: str) -> None:
    assert hasattr(part(module), name), f"torch {torch.__version__}: {module} has no {name} (components/{file})"


def test_collectives_of_fsdp_are_called_as_those_in_their_place() -> None:
    """training/sharding.py: collectives"""
    for name, given in (
        ("DefaultAllGather", ["self", "output_tensor", "input_tensor", "group", "async_op"]),
        ("DefaultReduceScatter", ["self", "output_tensor", "input_tensor", "group", "op", "async_op"]),
    ):
        assert list(inspect.signature(part(f"{COLLECTIVES}:{name}").__call__).parameters) == given
    module = part("torch.distributed.fsdp:FSDPModule")
    methods = ("set_custom_all_gather", "set_custom_reduce_scatter", "set_requires_all_reduce", "reset_iter_state")
    assert all(callable(getattr(module, method, None)) for method in methods)


def test_a_gather_knows_its_parameters_and_whether_a_forward_pass_asks() -> None:
    """training/sharding.py: collectives; the equal bits of `distributed/test_sharding.py` hold the meaning"""
    fsdp = "torch.distributed.fsdp._fully_shard"
    assert "_fsdp_param_group" in inspect.getsource(part(f"{fsdp}._fsdp_state:FSDPState"))
    group = inspect.getsource(part(f"{fsdp}._fsdp_param_group:FSDPParamGroup"))
    assert all(name in group for name in ("self.fsdp_params", "self._training_state", "TrainingState.FORWARD"))
    parameter = inspect.getsource(part(f"{fsdp}._fsdp_param:FSDPParam"))
    assert all(f"self.{name}" in parameter for name in ("padded_sharded_param_size", "_module_info"))


def test_a_network_in_shards_knows_whether_it_is_the_root() -> None:
    """training/sharding.py: load_weights"""
    assert "_is_root" in inspect.getsource(part("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState"))
    assert callable(part("torch.distributed.fsdp:FSDPModule")._get_fsdp_state)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_rows_are_cut_as_fsdp_cuts_them(parts: int) -> None:
    """training/parallel.py: shard_rows; FSDP2 pads what `torch.chunk` gives to none"""
    chunks = part("torch.distributed.fsdp._fully_shard._fsdp_common:_chunk_with_empty")
    for length in range(1, 20):
        cut = chunks(torch.arange(length), parts, dim=0)
        ends = [shard_rows(length, number, parts) for number in range(parts)]
        assert [torch.arange(*rows).tolist() for rows in ends] == [chunk.tolist() for chunk in cut]


def test_tensors_of_a_rank_by_itself_are_of_the_group_in_the_world_s_place() -> None:
    """training/parallel.py: by_itself; collectives without a group take dist.group.WORLD when they are called"""
    assert isinstance(torch.distributed.group, type)
    assert "WORLD" in vars(type(torch.distributed.group))
