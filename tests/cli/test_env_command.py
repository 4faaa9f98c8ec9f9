"""``batchnorm env`` shows the stamp."""

import json

from click.testing import CliRunner

from batchnorm.cli.env import env
from batchnorm.environment import describe_environment


def test_json_is_the_stamp():
    result = CliRunner().invoke(env, ["--json"])
    assert result.exit_code == 0
    assert json.loads(result.output) == describe_environment()


def test_lines_show_every_field_and_every_package():
    record = describe_environment()
    result = CliRunner().invoke(env)
    assert result.exit_code == 0
    shown = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    packages = record.pop("packages")
    assert list(shown) == [*record, *packages]
    assert shown["torch"] == packages["torch"]
    assert shown["cuda"] == (record["cuda"] or "none")
