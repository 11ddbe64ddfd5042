from __future__ import annotations

import pytest
import torch
from torch import nn

from ray_nascomp.architecture.inherit import inherit_weights


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_a_narrower_recurrent_layer_takes_the_leading_units_of_each_gate(layer, gates):
    wide, narrow = layer(6, 8, bidirectional=True), layer(4, 3, bidirectional=True)
    assert inherit_weights(narrow, wide) == []
    rows = torch.cat([gate * 8 + torch.arange(3) for gate in range(gates)])
    for direction in ("", "_reverse"):
        expected = getattr(wide, f"weight_ih_l0{direction}")[rows, :4]
        assert torch.equal(getattr(narrow, f"weight_ih_l0{direction}"), expected)
        expected = getattr(wide, f"weight_hh_l0{direction}")[rows, :3]
        assert torch.equal(getattr(narrow, f"weight_hh_l0{direction}"), expected)
        assert torch.equal(getattr(narrow, f"bias_hh_l0{direction}"), getattr(wide, f"bias_hh_l0{direction}")[rows])


def test_a_gru_inherits_nothing_from_an_lstm():
    gru = nn.GRU(4, 4)
    before = {name: tensor.clone() for name, tensor in gru.state_dict().items()}
    assert len(inherit_weights(gru, nn.LSTM(4, 4))) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in gru.state_dict().items())
