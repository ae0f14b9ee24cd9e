"""The rooms keep their direction, and each framework its one door."""

import ast
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator

MATHEMATICS = ("components.models.diffusion", "components.models.losses", "components.models.devices")
PACKAGES = ("components", "pipelines")
RAY_INTERNALS = "components/runtime/ray_internals.py"


def imported_names(path: pathlib.Path) -> Iterator[str]:
    """Every dotted name that a module imports; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes(path: pathlib.Path) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


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


def test_ray_train_enters_by_one_door_for_drivers_one_for_their_data_and_one_for_workers(repository, sources):
    def uses_train(path: pathlib.Path) -> bool:
        names = {*imported_names(path), *attributes(path)}
        return any(name == "ray.train" or name.startswith("ray.train.") for name in names)

    doors = [path.relative_to(repository).as_posix() for path in sources if uses_train(path)]
    rooms = ("data/crews", "runtime/ray_internals", "training/launch", "training/worker")
    assert doors == [f"components/{name}.py" for name in rooms]


def test_ray_serve_enters_by_the_room_of_serving(repository, sources):
    """Import-linter knows packages from outside as a whole: to it all of Ray is one."""
    users = [path.relative_to(repository) for path in sources if any(map(is_ray_serve, imported_names(path)))]
    assert {path.parent.as_posix() for path in users} == {"components/serving"}


def is_ray_serve(name: str) -> bool:
    return name == "ray.serve" or name.startswith("ray.serve.")


def test_ray_s_private_parts_enter_by_one_door(repository, sources):
    def uses_private(path: pathlib.Path) -> bool:
        names = {*imported_names(path), *attributes(path)}
        return any(name.startswith("ray.") and "._" in name for name in names)

    assert [path.relative_to(repository).as_posix() for path in sources if uses_private(path)] == [RAY_INTERNALS]


def test_networks_import_torch_einops_and_the_standard_library_only(repository, sources):
    allowed = {"torch", "einops", "components", *sys.stdlib_module_names}
    for path in (repository / "components" / "models").rglob("*.py"):
        weights = {"safetensors"} if path.name == "bundle.py" else set()
        assert {name.partition(".")[0] for name in imported_names(path)} <= allowed | weights, path


def test_diffusion_and_losses_import_no_network(repository):
    for room in ("diffusion", "losses"):
        for path in (repository / "components" / "models" / room).glob("*.py"):
            own = [name for name in imported_names(path) if name.startswith("components.")]
            assert all(name.startswith(MATHEMATICS) for name in own), path


def test_nothing_is_imported_that_only_unix_has(sources):
    only_unix = {"fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"}
    found = {path: {name.partition(".")[0] for name in imported_names(path)} & only_unix for path in sources}
    assert not any(found.values()), found


def test_where_models_work_is_decided_in_one_place(repository, sources):
    asks = {"torch.cuda.is_available"}
    found = [path.relative_to(repository).as_posix() for path in sources if asks & attributes(path)]
    reports = ["components/training/checkpoint.py", "components/training/reporting.py"]  # what a GPU's state is
    assert found == ["components/sampling/device.py", *reports]


def test_components_never_read_the_environment(repository, sources):
    for path in sources:
        if path.relative_to(repository).parts[0] == "components":
            assert not {"os.environ", "os.getenv"} & {*attributes(path), *imported_names(path)}, path


def test_nothing_runs_at_import(sources):
    for path in sources:
        calls = [
            ast.unparse(node)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]
        # MLflow's models-from-code asks for this one line at the end of the file that it loads.
        assert all(call.startswith(("set_model(", "mlflow.models.set_model(")) for call in calls), (path, calls)


def test_package_files_hold_a_docstring_and_nothing_else(sources):
    for path in sources:
        if path.name == "__init__.py":
            module = ast.parse(path.read_text())
            assert ast.get_docstring(module), path
            assert len(module.body) == 1, path
