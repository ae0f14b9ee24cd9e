"""Requests: the sampling settings of stages are one thing in a command, in a row and in a request."""

import json

import pytest

from components.sampling.requests import Request, RequestRow, nested_settings, stage_settings
from pipelines.command.loading import parsed_settings
from tests.refusals import one_line

NESTED = {"base": {"eta": 0.5, "guidance_interval": [0.2, 5.0], "spacing": None}, "upsampler_64": {"noise_level": 20}}
FROZEN = (
    ("base", "eta", 0.5),
    ("base", "guidance_interval", (0.2, 5.0)),
    ("base", "spacing", None),
    ("upsampler_64", "noise_level", 20),
)


def test_a_command_a_row_and_nested_settings_say_the_same() -> None:
    written = ["base.eta=0.5", "base.guidance_interval=[0.2, 5.0]", "base.spacing=null", "upsampler_64.noise_level=20"]
    assert parsed_settings(written) == stage_settings(NESTED) == FROZEN
    assert RequestRow(sampling=json.dumps(NESTED)).request().sampling == FROZEN
    assert hash(FROZEN) == hash(stage_settings(nested_settings(FROZEN)))


def test_the_last_of_a_setting_counts() -> None:
    assert parsed_settings(["base.eta=0.5", "base.eta=1"]) == (("base", "eta", 1),)


def test_a_row_of_a_request_asks_for_it_with_its_settings_and_what_is_zero() -> None:
    request = Request(label="0", sampling=FROZEN, guidance_scale=0.0, classifier_scale=0.0, temperature=0.0)
    assert RequestRow.of(request).request() == request


@pytest.mark.parametrize("wrong", ["base", ["base"], {"base": 3}, {"base": {"eta": {"a": 1}}}, {"base": {"eta": [{}]}}])
def test_settings_of_another_form_are_one_line(wrong: object) -> None:
    with one_line(ValueError, match=r"^(sampling must be such as|a sampling setting is)"):
        RequestRow(sampling=json.dumps(wrong)).request()


@pytest.mark.parametrize("text", ["[1", "2020-01-01", "!!set {a}"])
def test_a_value_that_no_stage_could_take_is_one_line(text: str) -> None:
    with one_line(ValueError, match=r"^(--set 'base.eta=|a sampling setting is)"):
        parsed_settings([f"base.eta={text}"])
