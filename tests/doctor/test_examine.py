"""examine() on files, state dicts and live models, and the layers of live models in the normal form."""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.doctor import examine as module
from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.checkpoint import ROLES
from batchnorm.doctor.examine import NotRun, examine
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.live_layers import live_layers, read_state
from batchnorm.doctor.read.open import read
from batchnorm.doctor.rule import Needs, Rule, Subject
from commands import run_command
from doctor.corpus import FAULTS, HEALTHY
from every_layer import KINDS, Kind


def broken() -> nn.Module:
    """A layer whose variance is negative in a trained model."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model(torch.randn(8, 2))
    model[2].running_var[1] = -1.0
    return model


def test_file_state_dict_and_model_have_the_same_findings(tmp_path: Path):
    model = broken()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    targets = [tmp_path / "model.pth", str(tmp_path / "model.pth"), model.state_dict(), model]
    found = [[(f.code, f.severity, f.layer, f.measured) for f in examine(target).findings] for target in targets]
    assert [finding[:3] for finding in found[0]] == [("BN102", "error", "2")]
    assert all(one == found[0] for one in found)


def test_the_source_is_the_path_or_the_class(tmp_path: Path):
    torch.save(broken().state_dict(), tmp_path / "model.pth")
    targets = [tmp_path / "model.pth", broken().state_dict(), broken()]
    assert [examine(target).source for target in targets] == [str(tmp_path / "model.pth"), "state dict", "Sequential"]


def test_it_is_public():
    assert batchnorm.examine is examine


def test_a_file_is_examined_without_torch_kernels_or_layers(tmp_path: Path):
    torch.save(broken().state_dict(), tmp_path / "model.pth")
    code = (
        "import sys; from batchnorm.doctor.examine import examine; "
        f"print(len(examine({str(tmp_path / 'model.pth')!r}).findings)); "
        "print([name for name in ('torch', 'numba', 'batchnorm.nn', 'batchnorm.statistics') if name in sys.modules])"
    )
    result = run_command([sys.executable, "-c", code])
    assert result.stdout.split("\n")[:2] == ["1", "[]"], result.stderr


class TestOrder:
    @pytest.fixture
    def rules(self, monkeypatch: pytest.MonkeyPatch):
        def rule(code: str, needs: set[Needs], *found: tuple[Severity, str], container: bool = False) -> Rule:
            findings = [Finding(code, "a-name", severity, layer, "") for severity, layer in found]
            return Rule(code, "a-name", Severity.ERROR, frozenset(needs), "", lambda subject: findings, container)

        rules = (
            rule("BN001", {Needs.FILE}, (Severity.ERROR, ""), container=True),
            rule("BN101", {Needs.FILE}, (Severity.INFO, "1"), (Severity.ERROR, "2"), (Severity.ERROR, "1")),
            rule("BN102", {Needs.FILE}, (Severity.ERROR, "0"), (Severity.ERROR, "")),
            rule("BN207", {Needs.MODEL, Needs.DATA}, (Severity.WARNING, "0")),
            rule("BN303", {Needs.OPTIMIZER, Needs.MODEL}),
            rule("BN403", {Needs.RANKS}),
        )
        monkeypatch.setattr(module, "RULES", rules)

    def test_findings_stand_by_severity_code_and_layer(self, rules: None):
        found = examine(broken()).findings
        assert [(f.severity, f.code, f.layer) for f in found] == [
            ("error", "BN101", "1"),
            ("error", "BN101", "2"),
            ("error", "BN102", ""),
            ("error", "BN102", "0"),
            ("info", "BN101", "1"),
        ]

    def test_rules_that_need_more_are_listed(self, rules: None):
        assert examine(broken()).not_run == [
            NotRun("BN001", "a-name", ["file"]),
            NotRun("BN207", "a-name", ["data"]),
            NotRun("BN303", "a-name", ["optimizer"]),
            NotRun("BN403", "a-name", ["ranks"]),
        ]
        assert [rule.needs for rule in examine({}).not_run] == [
            ["file"],
            ["data", "model"],
            ["model", "optimizer"],
            ["ranks"],
        ]

    def test_a_loader_and_an_optimizer_let_more_rules_run(self, rules: None):
        model = broken()
        result = examine(model, [torch.randn(4, 2)], torch.optim.SGD(model.parameters()))
        assert [rule.code for rule in result.not_run] == ["BN001", "BN403"]

    @pytest.mark.parametrize(
        ("select", "ignore", "codes"),
        [
            ("BN101", (), {"BN101"}),
            (["BN101", "BN102"], (), {"BN101", "BN102"}),
            ("BN1", "BN102", {"BN101"}),
            ((), ["BN1", "BN2"], set()),
        ],
    )
    def test_rules_are_selected_by_how_their_code_begins(self, rules: None, select, ignore, codes):
        assert {finding.code for finding in examine(broken(), select=select, ignore=ignore).findings} == codes

    @pytest.mark.parametrize("wrong", ["BN9", "", "bn1"])
    def test_a_selection_of_nothing_is_refused(self, rules: None, wrong: str):
        for options in ({"select": wrong}, {"ignore": ["BN1", wrong]}):
            with pytest.raises(ValueError, match=f"no rule's code begins with '{wrong}'; codes are BN001 to BN403"):
                examine({}, **options)


class TestBadInput:
    def test_what_is_no_target(self):
        with pytest.raises(TypeError, match="expected a path, a model or a state dict, got int"):
            examine(3)  # pyright: ignore[reportArgumentType]

    def test_a_loader_without_a_model(self):
        with pytest.raises(TypeError, match="needs a model, but the target is a dict"):
            examine({}, [torch.randn(2, 2)])

    def test_an_optimizer_without_a_model(self, tmp_path: Path):
        torch.save({}, tmp_path / "empty.pth")
        with pytest.raises(TypeError, match="needs a model, but the target is a"):
            examine(tmp_path / "empty.pth", optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()))

    def test_a_loader_that_is_used_up_by_one_rule(self):
        with pytest.raises(ValueError, match="can be iterated only once"):
            examine(broken(), iter([torch.randn(2, 2)]))

    def test_a_missing_file(self, tmp_path: Path):
        with pytest.raises(batchnorm.errors.DataError, match="nowhere"):
            examine(tmp_path / "nowhere.pth")

    def test_a_lazy_layer(self):
        with pytest.raises(ValueError, match="layer '0' is lazy"):
            examine(nn.Sequential(nn.LazyBatchNorm1d()))

    def test_a_layer_without_memory(self):
        with pytest.raises(ValueError, match="layer '0' is on the meta device"):
            examine(nn.Sequential(nn.BatchNorm1d(2, device="meta")))


class TestLiveLayers:
    @pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name != "whitening"])
    def test_every_layer_is_the_one_of_its_file(self, kind: Kind, tmp_path: Path):
        model = nn.Sequential(kind.make(3))
        torch.save(model.state_dict(), tmp_path / "model.pth")
        live, stored = live_layers(model), read(tmp_path / "model.pth").layers
        assert [(layer.path, layer.num_features) for layer in live] == [
            (layer.path, layer.num_features) for layer in stored
        ]
        for one, other in zip(live, stored, strict=True):
            assert one.expected == other.expected
            assert one.tensors.keys() == other.tensors.keys()
            for role in one.tensors:
                assert (one.tensors[role].name, one.tensors[role].dtype) == (
                    other.tensors[role].name,
                    other.tensors[role].dtype,
                )
                np.testing.assert_array_equal(one.values(role), other.values(role))

    def test_eps_and_momentum_are_filled_in(self):
        made = nn.ModuleDict({"a": nn.BatchNorm2d(2, eps=0.1, momentum=0.3), "b": nn.SyncBatchNorm(2, momentum=None)})
        assert [(layer.eps, layer.momentum) for layer in live_layers(made)] == [(0.1, 0.3), (1e-5, None)]

    def test_a_layer_in_two_places_is_one(self):
        layer = nn.BatchNorm1d(2)
        assert [found.path for found in live_layers(nn.Sequential(layer, layer))] == ["0"]

    def test_other_normalizations_are_none(self):
        others = nn.ModuleList(
            [nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)]
        )
        assert live_layers(others) == []
        assert live_layers(KINDS["whitening"].make(4)) == []

    def test_frozen_layers_of_other_libraries_are_layers(self):
        from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

        [layer] = live_layers(DetrFrozenBatchNorm2d(4))
        assert layer.tensors.keys() == set(ROLES) - {"num_batches_tracked"}

    def test_a_layer_built_without_statistics_needs_none(self):
        layers = [nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2, affine=False)]
        assert [sorted(layer.expected) for layer in live_layers(nn.ModuleList(layers))] == [
            ["bias", "weight"],
            ["num_batches_tracked", "running_mean", "running_var"],
        ]
        assert not examine(nn.ModuleList(layers), select="BN100").findings

    def test_a_layer_that_lost_one_statistic_lacks_it(self):
        layer = nn.BatchNorm1d(2)
        layer.running_var = None
        assert [finding.code for finding in examine(layer, select="BN100").findings] == ["BN100"]

    def test_a_parametrized_weight_is_read(self):
        layer = nn.utils.parametrize.register_parametrization(nn.BatchNorm1d(2), "weight", nn.Softplus())
        assert "weight" in live_layers(layer)[0].tensors

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_values_of_any_type_are_read_exactly(self, dtype: torch.dtype):
        layer = nn.BatchNorm1d(50).to(dtype)
        layer.running_mean.normal_()
        [found] = live_layers(layer)
        assert found.tensors["running_mean"].dtype == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.values("running_mean"), layer.running_mean.double().numpy())

    def test_values_are_copies_of_the_moment_when_they_are_read(self):
        layer = nn.BatchNorm1d(2)
        [found] = live_layers(layer)
        before = found.tensors["running_mean"].load()
        layer.running_mean.fill_(3.0)
        assert (before == 0).all()
        assert (found.values("running_mean") == 3).all()

    def test_the_model_stays_as_it_is(self):
        model = broken()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        examine(model, [torch.randn(4, 2)], torch.optim.SGD(model.parameters()))
        assert model.training
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class TestStateDicts:
    def test_arrays_and_inner_state_dicts_are_read(self):
        state = {name: value.numpy() for name, value in nn.BatchNorm1d(2).state_dict().items()}
        given = {"ema": OrderedDict(state), "model": {"bn": state}, "epoch": 3, "names": ["a"]}
        assert [layer.path for layer in read_state(given).layers] == ["ema", "model.bn"]

    def test_what_has_no_values_is_left_out(self):
        assert read_state(nn.BatchNorm1d(2, device="meta").state_dict()).layers == []
        sparse = torch.ones(2).to_sparse()
        assert read_state({"running_mean": sparse, "running_var": sparse}).layers == []

    @pytest.mark.parametrize("fault", ["moving average of the parameters", "no counters, against the metadata"])
    def test_findings_are_those_of_the_file(self, fault: str, tmp_path: Path):
        state, path = {"epoch": {"state": FAULTS[fault].make()}}, tmp_path / "model.pth"
        torch.save(state, path)
        assert examine(state).findings == examine(path).findings != []

    def test_a_model_and_its_average_are_no_peers(self):
        assert examine(HEALTHY["model and moving average"].make()).findings == []

    def test_nothing_is_nothing(self):
        assert examine({}).findings == []


class TestCatalogue:
    def test_codes_are_sorted_and_used_once(self):
        codes = [rule.code for rule in RULES]
        assert codes == sorted(set(codes))

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
    def test_a_rule_is_the_module_of_its_name_and_its_page_is_there(self, rule: Rule):
        home = sys.modules[rule.check.__module__]
        stem = f"{rule.code.lower()}_{rule.name.replace('-', '_')}"
        assert home.__name__ == f"batchnorm.doctor.rules.{stem}"
        assert home.__doc__
        title = home.__doc__.splitlines()[0].removeprefix("# ").replace(":", "")
        assert title == f"{rule.code} {rule.name}"

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
    def test_a_rule_finds_nothing_where_there_is_nothing(self, rule: Rule):
        if rule.needs <= {Needs.FILE}:
            assert list(rule.check(Subject("", []))) == []
