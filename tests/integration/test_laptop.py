"""Laws of a laptop: Ray started by the program itself, and commands that answer at once."""

import json
import subprocess
import sys
import textwrap

AS_ON_A_MAC = """
    import json
    from ray._private import accelerators
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    accelerators.AppleGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: 1)
    accelerators.get_accelerator_manager_for_resource.__dict__.clear()  # Ray looks again
    _, by_ray = ResourceAndLabelSpec._get_current_node_accelerator(None, {})

    from pipelines.planning.profiles import Profile
    from pipelines.recipes.catalog import load_recipe
    from pipelines.engine.session import start_ray
    from pipelines.planning.shares import share_cluster
    from pipelines.workflows import build_workflow

    cluster = start_ray(worker_start_timeout=60, verbose=False)
    share = share_cluster(build_workflow(load_recipe("smoke", [])), Profile(), cluster)["base"]
    print(json.dumps({"by ray": by_ray, "counted": cluster.gpus, "asked for": share.gpus_per_worker}))
"""


def test_apple_s_gpu_is_not_counted_so_no_training_asks_cuda_for_it():
    program = [sys.executable, "-c", textwrap.dedent(AS_ON_A_MAC)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {"by ray": 1, "counted": 0, "asked for": 0}


def test_help_and_cascade_data_wait_for_no_torch():
    program = """
        import sys
        from typer.testing import CliRunner
        from pipelines.command.cli import app

        assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
        import pipelines.command.data
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
