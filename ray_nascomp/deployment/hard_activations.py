"""Hard sigmoids and HardSwish that are spelled out, as operators of their own."""

from __future__ import annotations

import onnx

_PARTS = {"Add", "Clip", "Div"}


def name_hard_activations(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with HardSigmoid for relu6(x + 3) / 6, and HardSwish for x times that.

    ONNX Runtime computes these within the convolution before; their integer form is in `gates`.
    """
    if not {node.op_type for node in proto.graph.node} >= _PARTS:
        return proto
    import onnx_ir
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import fuse_hardswish_rules

    return onnx_ir.to_proto(rewriter.rewrite(onnx_ir.from_proto(proto), pattern_rewrite_rules=fuse_hardswish_rules()))
