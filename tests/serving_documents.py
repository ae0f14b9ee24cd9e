"""Write what is committed of the service's HTTP: its OpenAPI description, and the table of bad input.

python -m tests.serving_documents
"""

import json
from pathlib import Path

from components.serving.app import build_app
from components.serving.settings import ServedModel, ServiceSettings
from tests.serving_bad_input import table

ROOT = Path(__file__).parents[1]
OPENAPI, SERVING = ROOT / "components/serving/openapi.json", ROOT / "docs/SERVING.md"
COMMAND = "python -m tests.serving_documents"
FIRST, LAST = "<!-- bad input -->\n", "<!-- /bad input -->"


def openapi_text() -> str:
    settings = ServiceSettings(models=(ServedModel(name="tiny", source="models:/tiny@champion"),))
    return json.dumps(build_app({}, settings).openapi(), indent=1, ensure_ascii=False) + "\n"


def serving_text() -> str:
    """docs/SERVING.md with the table as it is now."""
    before, rest = SERVING.read_text().split(FIRST)
    return f"{before}{FIRST}{table()}\n{LAST}{rest.split(LAST)[1]}"


if __name__ == "__main__":
    OPENAPI.write_text(openapi_text())
    SERVING.write_text(serving_text())
