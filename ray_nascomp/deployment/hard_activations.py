"""Hard sigmoids and HardSwish that are spelled out, as operators of their own."""

from __future__ import annotations

import onnx

_PARTS = {"Add", "Clip", "Div"}
_BETA = 0.5
"""What ONNX takes where a HardSigmoid does not say it."""


def name_hard_activations(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with HardSigmoid for relu6(x + 3) / 6, and HardSwish for x times that.

    ONNX Runtime computes these within the convolution before; their integer form is in `gates`.

    Args:
        proto: An exported model; it may be changed in place.
    """
    if {node.op_type for node in proto.graph.node} >= _PARTS:
        import onnx_ir
        from onnxscript import rewriter
        from onnxscript.rewriter.rules.common import fuse_hardswish_rules

        fused = rewriter.rewrite(onnx_ir.from_proto(proto), pattern_rewrite_rules=fuse_hardswish_rules())
        proto = onnx_ir.to_proto(fused)
    for node in proto.graph.node:
        if node.op_type == "HardSigmoid":
            said = [attribute for attribute in node.attribute if attribute.name != "beta" or attribute.f != _BETA]
            del node.attribute[:]
            node.attribute.extend(said)
    return proto
