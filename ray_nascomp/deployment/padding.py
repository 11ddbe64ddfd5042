"""Zeros around inputs as a part of the convolutions that read them."""

from __future__ import annotations

from typing import Any

import onnx

_MOST = 64
"""Numbers that a folded constant may have: weights stay as they are."""


def fold_padding(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the Pad nodes that a convolution can do the work of.

    Between a quantization and a convolution a Pad would keep both in floating point.
    """
    if not any(node.op_type == "Pad" for node in proto.graph.node):
        return proto
    import onnx_ir
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    # How wide the margin is comes as a chain of nodes on constants.
    optimizer.fold_constants(model, should_fold=_should_fold, output_size_limit=_MOST)
    return onnx_ir.to_proto(rewriter.rewrite(model, pattern_rewrite_rules=[fuse_pad_into_conv_rule]))


def _should_fold(node: Any) -> bool | None:
    return True if node.op_type == "ConstantOfShape" else None
