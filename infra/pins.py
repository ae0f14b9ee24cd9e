"""Pins what the images are built of: the packages that they install, by version and sha256, and their bases by digest.

    make pins

Writes requirements.txt beside each Dockerfile from pyproject.toml and constraints.txt, and sbom.cdx.json: the same
packages with their licenses, a bill of materials of CycloneDX 1.6, as the library of cyclonedx.org checks. Hashes are
those of PyPI's files for Linux on x86_64 and the Python of the images, where this must run. Digests are
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
    "image": [".[azure,demo,fidelity,gcs,hub,lecture,serve,text]", TORCH, "aiohttp", "certifi", "hatchling"],
    "mlflow": ["mlflow", "psycopg2-binary", "boto3", "google-cloud-storage", "azure-storage-blob", "azure-identity"],
}
PYTHON = (3, 11)
CHECK = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()):
    sys.exit(str(fault))
"""
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
        run(python, "-m", "pip", "install", "--quiet", "cyclonedx-python-lib[json-validation]==11.12.0")
        for image, wanted in INSTALLED.items():
            items = [item for item in resolved(python, wanted) if "archive_info" in item["download_info"]]
            path = REPOSITORY / "infra" / image / "requirements.txt"
            path.write_text("# Written by `make pins`.\n" + "\n".join(sorted(map(pin, items), key=str.lower)) + "\n")
            materials = bill(image, items)
            run(python, "-c", CHECK, said=materials)
            path.with_name("sbom.cdx.json").write_text(materials)
            print(f"{path.relative_to(REPOSITORY)}: {len(items)} packages")
    for image in INSTALLED:
        print(pin_base(REPOSITORY / "infra" / image / "Dockerfile"))


def resolved(python: str, wanted: list[str]) -> list[dict]:
    """The files that pip would install into an empty environment."""
    options = ("--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-")
    return json.loads(run(python, "-m", "pip", "install", *options, "-c", "constraints.txt", *wanted))["install"]


def pin(item: dict) -> str:
    """A line of requirements."""
    return f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{sha256_of(item)}"


def sha256_of(item: dict) -> str:
    return item["download_info"]["archive_info"]["hashes"]["sha256"]


def bill(image: str, items: list[dict]) -> str:
    """The bill of materials of an image as JSON, a component a line. Not in it: what the image's base brings."""
    lines = [json.dumps(component(item)) for item in sorted(items, key=lambda item: item["metadata"]["name"].lower())]
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
    }
    head |= {"version": 1, "metadata": {"component": {"type": "container", "name": f"image-cascade/{image}"}}}
    return json.dumps(head)[:-1] + ', "components": [\n' + ",\n".join(lines) + "\n]}\n"


def component(item: dict) -> dict:
    """A package by version, sha256 and license: an SPDX expression, else names of its classifiers, else its words."""
    about = item["metadata"]
    purl = f"pkg:pypi/{re.sub('[-_.]+', '-', about['name']).lower()}@{about['version']}"
    named = [each.rpartition(" :: ")[2] for each in about.get("classifier", []) if each.startswith("License :: ")]
    words = about.get("license", "").strip().partition("\n")[0]  # some hold the whole text
    licenses = [{"license": {"name": name}} for name in named or [words] if name]
    if expression := about.get("license_expression"):
        licenses = [{"expression": expression}]
    found = {"type": "library", "bom-ref": purl, "name": about["name"], "version": about["version"], "purl": purl}
    return found | {"hashes": [{"alg": "SHA-256", "content": sha256_of(item)}], "licenses": licenses}


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


def run(*command: str, said: str = "") -> str:
    """Returns the output of a command. It asks PyPI, or the index that `PIP_INDEX_URL` names, and no other place."""
    variables = {name: value for name, value in os.environ.items() if name not in OTHER_SOURCES}
    variables |= {"PIP_CONFIG_FILE": os.devnull}
    options = {"cwd": REPOSITORY, "env": variables, "input": said, "stdout": subprocess.PIPE, "text": True}
    return subprocess.run(command, check=True, **options).stdout


if __name__ == "__main__":
    main()
