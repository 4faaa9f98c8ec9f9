"""``json`` and ``sarif``: programs read them."""

import json
import re
import unicodedata
from typing import Any
from urllib.parse import unquote

import pytest

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Severity
from batchnorm.doctor.output import json as json_format
from batchnorm.doctor.output import sarif
from batchnorm.report.text import UNPRINTABLE
from examinations import HOSTILE, finding, healthy, hostile, numbers, usual, whole_file

EVERY = [usual, healthy, numbers, hostile]
FINDING_KEYS = [
    "code",
    "name",
    "severity",
    "layer",
    "message",
    "measured",
    "threshold",
    "remedy",
    "safe",
    "confidence",
]


def strict(text: str) -> Any:
    """As a parser of JSON reads it that knows no NaN."""

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("form", [json_format, sarif])
def test_the_same_input_gives_the_same_bytes_in_ascii(make: Any, form: Any):
    assert form.render(make()) == form.render(make())
    assert form.render(make()).isascii()
    strict(form.render(make()))


def test_json_has_the_agreed_keys_in_order():
    record = strict(json_format.render(usual()))
    assert list(record) == ["schema_version", "source", "layers", "findings", "not_run"]
    assert record["schema_version"] == 1
    assert record["source"] == "models/net.pt"
    assert [list(found) for found in record["findings"]] == [FINDING_KEYS] * 14
    assert record["findings"][0]["measured"] == {"missing": ["running_mean", "running_var"]}
    assert record["not_run"][1] == {"code": "BN207", "name": "gap", "needs": ["data", "model"]}
    first, second = record["layers"][:2]
    assert list(first["tensors"]) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert second["tensors"] == {
        "weight": {"name": "layer1.0.bn1.weight", "shape": [4], "dtype": "float32"},
        "bias": {"name": "layer1.0.bn1.bias", "shape": [4], "dtype": "float32"},
    }
    assert (second["path"], second["num_features"], second["eps"]) == ("layer1.0.bn1", 4, None)


def test_json_keeps_names_as_they_are_in_the_file():
    record = strict(json_format.render(hostile()))
    assert [found["layer"] for found in record["findings"]] == HOSTILE
    assert [found["path"] for found in record["layers"]] == HOSTILE


def test_what_json_cannot_say_is_null():
    measured = strict(json_format.render(numbers()))["findings"][0]["measured"]
    assert measured == {"share": None, "limits": [None, 1e300, 3], "trained": True, "none": None, "count": 12345}


@pytest.mark.parametrize("make", [*EVERY, *(lambda name=name: whole_file(name) for name in HOSTILE)])
def test_sarif_has_what_the_schema_requires(make: Any):
    log = strict(sarif.render(make()))
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    [run] = log["runs"]
    assert set(run) <= {"tool", "invocations", "artifacts", "results"}
    driver = run["tool"]["driver"]
    assert driver["name"]
    for rule in driver["rules"]:
        assert set(rule) <= {"id", "name", "shortDescription", "fullDescription", "help", "defaultConfiguration"}
    for invocation in run["invocations"]:
        assert invocation["executionSuccessful"] is True
        for notification in invocation["toolConfigurationNotifications"]:
            assert notification["message"]["text"]
            assert notification["level"] == "note"
    for result in run["results"]:
        check_result(result, driver["rules"], run["artifacts"])


def check_result(result: dict[str, Any], rules: list[dict[str, Any]], artifacts: list[dict[str, Any]]) -> None:
    """Required properties, the types of all, and nothing that the schema does not have."""
    assert set(result) == {
        "ruleId",
        "ruleIndex",
        "level",
        "message",
        "locations",
        "partialFingerprints",
        "properties",
    }
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert result["level"] in ("none", "note", "warning", "error")
    assert set(result["message"]) == {"text"}
    assert isinstance(result["message"]["text"], str)
    assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    [location] = result["locations"]
    assert set(location) <= {"physicalLocation", "logicalLocations"}
    place = location["physicalLocation"]["artifactLocation"]
    assert artifacts[place["index"]]["location"]["uri"] == place["uri"]
    assert place["uri"].isascii()
    assert not set(place["uri"]) & set(' "<>\\^`{|}\n\0')
    assert location["physicalLocation"]["region"]["startLine"] >= 1


def test_sarif_names_the_layer_and_what_a_service_shows_about_the_rule():
    run = strict(sarif.render(usual()))["runs"][0]
    first = run["results"][0]
    assert first["message"]["text"] == (
        "layer1.0.bn1: Evaluation is wrong. Measure them again. This changes the evaluation output."
    )
    assert first["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == "layer1.0.bn1"
    assert [result["level"] for result in run["results"][-2:]] == ["warning", "note"]
    rule = run["tool"]["driver"]["rules"][0]
    assert rule["help"]["markdown"].startswith("# BN100")
    assert rule["defaultConfiguration"] == {"level": "error"}
    notes = run["invocations"][0]["toolConfigurationNotifications"]
    assert notes[1]["message"]["text"] == "BN207 gap did not run: it needs --model and --data."


def test_fingerprints_differ_between_findings_and_stay_from_run_to_run():
    several = [finding("BN002", "", message=f"member {i}") for i in range(3)]
    examination = Examination("net.pt", [], [*several, *usual().findings], [])
    prints = [
        result["partialFingerprints"]["primaryLocationLineHash"]
        for result in strict(sarif.render(examination))["runs"][0]["results"]
    ]
    assert len(set(prints)) == len(prints)
    graver = Examination("net.pt", [], [finding("BN107", "bn1", Severity.ERROR, message="other")], [])
    again = strict(sarif.render(graver))["runs"][0]["results"][0]["partialFingerprints"]["primaryLocationLineHash"]
    assert again == prints[15]


def test_a_service_gets_no_character_that_does_not_print():
    log = json.loads(sarif.render(hostile()))
    texts = re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(log["runs"][0]["results"]))
    assert all(unicodedata.category(c) not in UNPRINTABLE for text in texts for c in json.loads(text))
    whole = json.loads(sarif.render(whole_file("\0")))["runs"][0]["results"][0]
    assert "locations" in whole
    assert "logicalLocations" not in whole["locations"][0]


@pytest.mark.parametrize(
    ("source", "uri"),
    [
        ("a/net 1.pt", "a/net%201.pt"),
        ("/data/net.pt", "file:///data/net.pt"),
        ("package.module:make", "package.module%3Amake"),
        ("b\udcff.pt", "b%ED%B3%BF.pt"),
    ],
)
def test_sources_are_uris(source: str, uri: str):
    assert sarif.uri(source) == uri


def test_a_link_cannot_begin_in_a_message():
    text = sarif.message(finding("BN001", "", message="see [here](https://example.com)", remedy=""))
    assert text == r"see \[here\](https://example.com)"
    assert sarif.message(finding("BN001", "", message="[0, 1] \\", remedy="")) == "[0, 1] \\"
    assert unquote(sarif.uri("a[1].pt")) == "a[1].pt"
