"""An environment that has what the suite's has, but not the checkout, and strangers under the names of our folders."""

import site
import subprocess
import sys
from pathlib import Path

STRANGER = "raise ImportError('this is another package that is called so')\n"


def bare_python(folder: Path) -> Path:
    """A new virtual environment's Python, with `uvicorn`, which MLflow starts by its name, next to it.

    It finds the suite's packages by their path alone: no `.pth` in there is read, so the checkout is on no path.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (packages / "suite.pth").write_text("\n".join(site.getsitepackages()))
    for name in ("components", "pipelines"):
        (packages / f"{name}.py").write_text(STRANGER)
    program = folder / "bin" / "uvicorn"
    program.write_text(f"#!{python}\nfrom uvicorn.main import main\n\nmain()\n")
    program.chmod(0o755)
    return python
