"""The rooms keep their direction, and each framework its one door."""

import ast
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Callable

from tests.house import Module

MATHEMATICS = ("components.models.diffusion", "components.models.losses", "components.models.devices")
PACKAGES = ("components", "pipelines")
RAY_INTERNALS = "components/runtime/ray_internals.py"


def imported_names(module: Module) -> set[str]:
    """Every dotted name that a module imports; `from a import b` counts as a.b."""
    plain = [alias.name for node in module.nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [
        (node.module, alias.name) for node in module.nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return {*plain, *(f"{whole}.{part}" for whole, part in parts)}


def attributes(module: Module) -> set[str]:
    return {ast.unparse(node) for node in module.nodes if isinstance(node, ast.Attribute)}


def files(house: list[Module], uses: Callable[[str], bool]) -> list[str]:
    """Files of which an imported name or an attribute is such."""
    return [module.name for module in house if any(map(uses, imported_names(module) | attributes(module)))]


def test_import_linter_finds_every_contract_kept(repository):
    lint_imports = pathlib.Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint_imports, "--no-logo", "--no-cache"], cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_room_has_its_place_in_the_layers(repository):
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in settings["contracts"] if contract["id"] == "layers"]
    placed = {module.strip() for layer in layers for module in layer.split("|")}
    rooms = {".".join(path.parts[-3:-1]) for path in repository.glob("*/*/__init__.py") if path.parts[-3] in PACKAGES}
    graphs = {f"pipelines.{path.stem}" for path in (repository / "pipelines").glob("[!_]*.py")}
    assert rooms | graphs <= placed
    assert [path.name for path in (repository / "components").glob("*.py")] == ["__init__.py"]


def test_ray_train_serve_and_private_parts_enter_by_their_doors(house):
    """Import-linter knows packages from outside as a whole: to it all of Ray is one."""
    doors = files(house, lambda name: f"{name}.".startswith("ray.train."))
    rooms = ("runtime/ray_internals", "training/launch", "training/worker")
    assert doors == [f"components/{name}.py" for name in rooms]
    servers = [m.name for m in house if any(f"{name}.".startswith("ray.serve.") for name in imported_names(m))]
    assert {server.rpartition("/")[0] for server in servers} == {"components/serving"}
    assert files(house, lambda name: name.startswith("ray.") and "._" in name) == [RAY_INTERNALS]


def test_networks_import_torch_einops_and_the_standard_library_only(house):
    allowed = {"torch", "einops", "components", *sys.stdlib_module_names}
    for module in house:
        if module.name.startswith("components/models/"):
            weights = {"safetensors"} if module.name.endswith("/bundle.py") else set()
            assert {name.partition(".")[0] for name in imported_names(module)} <= allowed | weights, module.name


def test_diffusion_and_losses_import_no_network(house):
    for module in house:
        if module.name.startswith(("components/models/diffusion/", "components/models/losses/")):
            own = [name for name in imported_names(module) if name.startswith("components.")]
            assert all(name.startswith(MATHEMATICS) for name in own), module.name


def test_nothing_is_imported_that_only_unix_has(house):
    only_unix = {"fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"}
    found = {module.name: {name.partition(".")[0] for name in imported_names(module)} & only_unix for module in house}
    assert not any(found.values()), found


def test_where_models_work_is_decided_in_one_place(house):
    reports = ["components/training/checkpoint.py", "components/training/reporting.py"]  # what a GPU's state is
    assert files(house, {"torch.cuda.is_available"}.__contains__) == ["components/sampling/device.py", *reports]


def test_components_never_read_the_environment(house):
    """But for how long a store is waited for, and whether one driver is alone on it: every process of a run needs it,
    Ray's reading tasks too."""
    readers = files(house, {"os.environ", "os.getenv"}.__contains__)
    storage = [f"components/runtime/storage/{name}.py" for name in ("outages", "store")]
    assert [name for name in readers if name.startswith("components/")] == storage


def test_nothing_runs_at_import_and_package_files_hold_a_docstring_and_nothing_else(house):
    for module in house:
        body = module.tree.body
        calls = [ast.unparse(node) for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
        # MLflow's models-from-code asks for this one line at the end of the file that it loads.
        assert all(call.startswith(("set_model(", "mlflow.models.set_model(")) for call in calls), (module.name, calls)
        if module.name.endswith("__init__.py"):
            assert ast.get_docstring(module.tree), module.name
            assert len(body) == 1, module.name
