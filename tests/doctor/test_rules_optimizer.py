"""BN303: which parameters of which layers an optimizer pulls to zero."""

import pytest
import torch
from torch import nn

from examined import NORMS, found, network

both = pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours"])


def split(model, decay=0.1):
    """Weights of more than one dimension decay, the others do not."""
    groups = [[p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False)]
    return [{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}]


@both
def test_weight_decay_on_gamma_and_beta_is_found(norm):
    model = network(norm)
    (finding,) = found("BN303", model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-4))
    assert (finding.severity, finding.layer) == ("info", "")
    assert finding.measured == {"weight_decay": 5e-4, "layers": ["1", "4", "9"]}
    (finding,) = found("BN303", model, optimizer=torch.optim.AdamW(model.parameters()))
    assert finding.measured["weight_decay"] == 0.01
    only_one = torch.optim.SGD([model[4].bias], 0.1, weight_decay=1.0)
    assert found("BN303", model, optimizer=only_one)[0].measured["layers"] == ["4"]


@both
def test_no_decay_on_gamma_and_beta_is_fine(norm):
    model = network(norm)
    assert found("BN303", model, optimizer=torch.optim.AdamW(split(model))) == []
    assert found("BN303", model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) == []
    model.requires_grad_(False)
    assert found("BN303", model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)) == []
    other = nn.Linear(2, 2)
    assert found("BN303", model, optimizer=torch.optim.SGD(other.parameters(), 0.1, weight_decay=1.0)) == []
