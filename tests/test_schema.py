"""The JSON Schema of gateway.toml takes what the program takes, and refuses what it refuses."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edge.cli import main
from edge.drivers import registry
from tests.test_config import GATEWAY, MISTAKES

DOCS = Path(__file__).parent.parent / "docs"
NEEDED = {"gateway": {"path": "a/b/c/d/e"}, "mqtt": {"url": "mqtt://127.0.0.1"}}
EXAMPLES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in ("controls-engineer.md", "data-protection.md", "ot-engineer.md")
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
]
# Mistakes that are in the file alone; the others need what it names, or say more than a schema can.
SHAPES = (
    "unknown key", "unknown table", "unknown key of a source", "another driver's key", "unknown driver", "wrong type",
    "wrong type of an option", "missing key", "missing key of a source", "missing table", "a choice",
    "unknown key of a task", "wrong type in the second task", "a key that is none",
)  # fmt: skip


@pytest.fixture
def validator(capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["edge", "check", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_docs_examples_are_valid(validator: Any, text: str) -> None:
    assert [error.message for error in validator.iter_errors(NEEDED | tomllib.loads(text))] == []


@pytest.mark.parametrize("name", SHAPES)
def test_what_check_refuses_the_schema_refuses(validator: Any, name: str) -> None:
    old, new, *_ = MISTAKES[name]
    assert validator.is_valid(tomllib.loads(GATEWAY))
    assert not validator.is_valid(tomllib.loads(GATEWAY.replace(old, new)))


@pytest.mark.parametrize("driver", registry.driver_names())
def test_every_option_of_every_driver_is_there(validator: Any, driver: str) -> None:
    sources = validator.schema["properties"]["source"]["items"]["oneOf"]
    (keys,) = (one["properties"] for one in sources if one["properties"]["driver"] == {"const": driver})
    assert set(keys) == {"name", "driver", "url", "tags", *registry.load(driver).OPTIONS}


def test_check_without_a_file_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edge", "check"]) == 2
    assert capsys.readouterr().err == "tundish: --config: missing; write -c gateway.toml\n"
