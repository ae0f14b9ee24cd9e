"""Pins what the images are built of: the packages that they install, by version and sha256, and their bases by digest.

    make pins

Writes requirements.txt beside each Dockerfile from pyproject.toml and constraints.txt. Hashes are those of PyPI's files
for Linux on x86_64 and the Python of the images, where this must run; only their metadata is downloaded. Digests are
asked for with `docker buildx imagetools`, and left as they are, with a line that says so, where there is no docker.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TORCH = "torch==2.13.0"  # constraints.txt leaves it to the machine; here it is PyPI's build, with CUDA
INSTALLED = {
    # certifi, aiohttp: those of the base image lack fixes that the constraints hold; hatchling builds the package
    "image": [".[azure,demo,gcs,hub,lecture,serve,text]", TORCH, "aiohttp", "certifi", "hatchling"],
    "mlflow": ["mlflow", "psycopg2-binary", "boto3", "google-cloud-storage", "azure-storage-blob", "azure-identity"],
}
PYTHON = (3, 11)
OTHER_SOURCES = ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")


def main() -> None:
    if (platform.system(), platform.machine(), sys.version_info[:2]) != ("Linux", "x86_64", PYTHON):
        sys.exit(
            "pins are those of the images: run this on Linux, x86_64, with Python 3.11 (make PYTHON=python3.11 pins)"
        )
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")  # one that resolves by metadata alone
        for image, wanted in INSTALLED.items():
            lines = [line for line in map(pin, resolved(python, wanted)) if line]
            path = REPOSITORY / "infra" / image / "requirements.txt"
            path.write_text("# Written by `make pins`.\n" + "\n".join(sorted(lines, key=str.lower)) + "\n")
            print(f"{path.relative_to(REPOSITORY)}: {len(lines)} packages")
    for image in INSTALLED:
        print(pin_base(REPOSITORY / "infra" / image / "Dockerfile"))


def resolved(python: str, wanted: list[str]) -> list[dict]:
    """The files that pip would install into an empty environment."""
    options = ("--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-")
    return json.loads(run(python, "-m", "pip", "install", *options, "-c", "constraints.txt", *wanted))["install"]


def pin(item: dict) -> str | None:
    """A line of requirements; None for the package itself."""
    archive = item["download_info"].get("archive_info")
    if archive is None:
        return None
    return f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{archive['hashes']['sha256']}"


def pin_base(dockerfile: Path) -> str:
    """Write the digest that the base's tag has today into `ARG BASE_DIGEST=`. Returns what was done, in a line."""
    name, text = dockerfile.relative_to(REPOSITORY), dockerfile.read_text()
    values = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE)) | {"BASE_DIGEST": ""}
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    base = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], base)
    if shutil.which("docker") is None:
        return f"{name}: its base is still {base} by its tag alone, for there is no docker here to ask for the digest"
    digest = run("docker", "buildx", "imagetools", "inspect", base, "--format", "{{.Manifest.Digest}}").strip()
    dockerfile.write_text(re.sub(r"^ARG BASE_DIGEST=.*$", f"ARG BASE_DIGEST=@{digest}", text, flags=re.MULTILINE))
    return f"{name}: {base}@{digest}"


def run(*command: str) -> str:
    """Returns the output of a command. It asks PyPI, or the index that `PIP_INDEX_URL` names, and no other place."""
    variables = {name: value for name, value in os.environ.items() if name not in OTHER_SOURCES}
    variables |= {"PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, cwd=REPOSITORY, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
