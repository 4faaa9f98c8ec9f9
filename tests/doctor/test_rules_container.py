"""BN001 to BN005: each finds its fault in a file that has it, and nothing in the files that torch writes."""

import importlib

import pytest
import safetensors.torch
import torch
from torch import nn

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.read.open import read
from batchnorm.doctor.rule import Needs, Rule, Subject
from doctor.container_corpus import (
    ATTACKS,
    FOUR,
    PLAIN,
    attack,
    bomb,
    named,
    old_tar,
    packed_again,
    with_flipped_bit,
    with_shared_bytes,
    with_short_safetensors,
)
from hostile_files import torch_file, write_zip

MODULES = {
    "BN001": "bn001_unsafe_globals",
    "BN002": "bn002_checksum_mismatch",
    "BN003": "bn003_inconsistent_sizes",
    "BN004": "bn004_damaged_container",
    "BN005": "bn005_unfit_names",
}


def module(code: str):
    return importlib.import_module(f"batchnorm.doctor.rules.{MODULES[code]}")


def findings(path) -> list[Finding]:
    checkpoint = read(path)
    subject = Subject(checkpoint.source, checkpoint.layers, checkpoint)
    return [finding for code in MODULES for finding in module(code).RULE.check(subject)]


def only(path, code: str) -> Finding:
    (finding,) = findings(path)
    assert (finding.code, finding.layer) == (code, "")
    return finding


@pytest.mark.parametrize("code", MODULES)
def test_a_container_rule_needs_a_file(code):
    rule: Rule = module(code).RULE
    assert rule.code == code
    assert rule.container
    assert rule.needs == {Needs.FILE}
    assert list(rule.check(Subject("Model", []))) == []


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_healthy_files_have_no_findings(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({"model": state, "epoch": 3, "name": "résumé"}, tmp_path / "b.ckpt")
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    for path in tmp_path.iterdir():
        assert findings(path) == []


def test_model_saved_whole_is_a_warning_with_its_classes(tmp_path):
    torch.save(network(), tmp_path / "model.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "model.pt")
    finding = only(tmp_path / "model.pt", "BN001")
    assert finding.severity == Severity.WARNING
    assert finding.measured["count"] == 3
    assert "torch.nn.modules.batchnorm.BatchNorm2d" in finding.message


@pytest.mark.parametrize("name", ATTACKS)
def test_name_known_from_attacks_is_an_error(tmp_path, name):
    path = attack(name)(tmp_path)
    finding = only(path, "BN001")
    assert finding.severity == Severity.ERROR
    assert finding.measured["known_from_attacks"] == 1
    assert name.split(" ")[1] in finding.message
    assert list(read(path).tensors) == ["a"]


def test_flipped_bit_is_found_which_torch_load_does_not_see(tmp_path):
    state = network().state_dict()
    path = with_flipped_bit(5, 3, lambda: state)(tmp_path)
    assert not torch.equal(torch.load(path)["1.running_var"], state["1.running_var"])
    finding = only(path, "BN002")
    assert finding.severity == Severity.ERROR
    assert "data/5" in finding.message
    assert finding.measured["expected"] != finding.measured["found"]


def test_archive_packed_again_is_a_warning_and_its_compressed_values_are_not_read(tmp_path):
    path = packed_again(tmp_path, lambda: network().state_dict())
    result = findings(path)
    assert {(finding.code, finding.severity) for finding in result} == {("BN003", Severity.WARNING)}
    checkpoint = read(path)
    assert len(checkpoint.tensors) == 7
    assert checkpoint.facts["left_out"] == {"1": "5 of its tensors cannot be read"}


def test_bomb_is_a_warning_with_both_sizes(tmp_path):
    finding = findings(bomb(tmp_path))[-1]
    assert finding.code == "BN003"
    assert finding.measured["bytes"] < 70_000
    assert finding.measured["unpacked"] == 1 << 26


@pytest.mark.parametrize(
    ("others", "options", "problem"),
    [
        ([FOUR, FOUR], {}, "stands in the directory twice"),
        ([FOUR, ("archive/../../x", b"")], {}, "leads out of the folder"),
        ([FOUR, ("/etc/x", b"")], {}, "leads out of the folder"),
        ([FOUR, ("archive\\x", b"")], {}, "leads out of the folder"),
        ([("archive/data/0", bytes(20))], {}, "another size than its tensors"),
    ],
)
def test_contradictions_of_an_archive_are_errors(tmp_path, others, options, problem):
    finding = only(torch_file(tmp_path / "model.pt", PLAIN, *others, **options), "BN003")
    assert finding.severity == Severity.ERROR
    assert problem in finding.message


def test_members_that_share_bytes_are_errors(tmp_path):
    problems = " ".join(finding.message for finding in findings(with_shared_bytes(tmp_path)))
    assert "shares bytes with the member before it" in problems
    assert "another name in its own header" in problems


def test_contradictions_of_a_safetensors_header_are_errors(tmp_path):
    assert only(with_short_safetensors(tmp_path), "BN003").measured == {"bytes": 4, "expected": 8}


def test_old_formats_and_files_that_were_cut_off_are_told_apart(tmp_path):
    torch.save(network().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert only(tmp_path / "old.pth", "BN004").severity == Severity.WARNING
    torch.save(network().state_dict(), tmp_path / "new.pth")
    data = (tmp_path / "new.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:-500])
    finding = only(tmp_path / "cut.pth", "BN004")
    assert finding.severity == Severity.ERROR
    assert finding.measured["lost_storages"] == 0
    (tmp_path / "other.pkl").write_bytes(b"\x80\x04}.")
    assert only(tmp_path / "other.pkl", "BN004").severity == Severity.ERROR


def test_tar_of_the_first_versions_is_listed(tmp_path):
    path = old_tar(tmp_path)
    assert only(path, "BN004").severity == Severity.ERROR
    assert read(path).facts["members"] == ["sys_info", "pickle", "tensors", "storages"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bn\x1b[2J", "do not print"),
        ("bn\n", "do not print"),
        ("bn\u202egnp", "do not print"),
        ("bn\ud800", "do not print"),
        ("<script>alert(1)</script>", "markup"),
        ("[click](http://x)", "markup"),
        ("n" * 300, "unusual length"),
    ],
)
def test_unfit_names_are_warnings_and_escaped(tmp_path, name, problem):
    path = named(name)(tmp_path)
    finding = only(path, "BN005")
    assert finding.severity == Severity.WARNING
    assert problem in finding.message
    assert finding.message.isprintable()
    assert finding.message.isascii()
    assert list(read(path).tensors) == [name]


def test_name_of_a_megabyte_is_an_error_and_not_listed(tmp_path):
    path = named("n" * 1_000_000)(tmp_path)
    finding = only(path, "BN005")
    assert finding.severity == Severity.ERROR
    assert len(finding.message) < 300
    assert read(path).tensors == {}


def test_thousands_of_faults_are_counted_and_not_listed(tmp_path):
    members = [(f"archive/../{i}", b"") for i in range(1000)]
    path = write_zip(tmp_path / "model.pt", [("archive/data.pkl", PLAIN), FOUR, *members])
    result = findings(path)
    assert len(result) == 100
    assert result[-1].measured["more"] == 900


@pytest.mark.parametrize(("format", "said"), [("torch", True), ("tensorflow", False)])
def test_a_wrong_checksum_speaks_of_torch_in_its_files_alone(format, said):
    fault = {"where": "data", "problem": "has another checksum", "grave": True}
    checkpoint = Checkpoint("model", format, {}, [], {"BN002": [fault]})
    (finding,) = module("BN002").RULE.check(Subject("model", [], checkpoint))
    assert ("torch.load does not notice" in finding.message) == said
