"""What the house does in one place is done nowhere else: a second conversion of pixels would round in its own way."""

import re

from tests.house import Module

PLACES = {  # what a line of the product holds -> the files where it may stand
    r"127\.5|[/*] ?255\b|\.byte\(\)|\.to\(torch\.uint8\)": {
        "components/models/diffusion/corruption.py": "levels <-> [-1, 1]",
        "components/sampling/images.py": "arrays of bytes <-> [-1, 1]",
        "components/models/diffusion/discrete.py": "the step between two levels",
        "components/models/losses/reconstruction.py": "half of it",
        "components/weights/perceptual.py": "the scale that a pretrained network was trained on",
    },
    r"[\"']PNG[\"']|\.save\(.*\.png": {"components/sampling/image_files.py": "encoding, and what is decoded"},
    r"\bImage\.open\(": {
        "components/sampling/image_files.py": "files of anybody, under limits",
        "components/data/images.py": "a JPEG that was made in the line before",
        "components/evaluation/report.py": "a grid that was drawn here, however large",
        "components/runtime/tracking/delivery.py": "a grid that was drawn here, however large",
    },
    r"Resampling\.NEAREST": {
        "components/sampling/image_files.py": "small images enlarged, to be looked at",
        "components/data/images.py": "masks, whose values must not mix",
        "components/sampling/images.py": "maps of classes, which must not mix either",
    },
    r"mode=\"area\"": {"components/models/diffusion/corruption.py": "downsample"},
}


def test_pixels_are_converted_encoded_and_resized_in_one_place(house: list[Module]) -> None:
    found, used = [], set()
    for module in house:
        for line in module.text.splitlines():
            for pattern, places in PLACES.items():
                if re.search(pattern, line):
                    used.add((pattern, module.name))
                    found += [f"{module.name}: {line.strip()} (not in {next(iter(places))})"] * (
                        module.name not in places
                    )
    assert found == []
    assert used == {(pattern, name) for pattern, places in PLACES.items() for name in places}


def test_no_class_name_stands_for_two_things(house: list[Module]) -> None:
    """A name that two files define must be looked up each time it is read."""
    defined: dict[str, list[str]] = {}
    for module in house:
        for name in re.findall(r"^class (\w+)", module.text, flags=re.MULTILINE):
            defined.setdefault(name, []).append(module.name)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}
