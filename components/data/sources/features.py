"""What a Parquet file says of its columns: the features that Hugging Face's `datasets` writes into the schema."""

import json
from typing import Any

import pyarrow as pa

HUGGINGFACE = b"huggingface"


def features(schema: pa.Schema) -> dict[str, Any]:
    """Column -> its feature, such as {"_type": "ClassLabel", "names": […]}; empty where nothing is written."""
    try:
        written = json.loads((schema.metadata or {}).get(HUGGINGFACE, b"{}"))
        found = written.get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # another program's note
        return {}
    return found if isinstance(found, dict) else {}


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a column of class numbers; empty if it is none."""
    feature = features(schema).get(column)
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    return tuple(str(name) for name in feature.get("names") or ())
