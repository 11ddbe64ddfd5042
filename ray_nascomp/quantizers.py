"""The quantizers and the bits at which each gives meaningful results. Free of torch.

Weights have one scale an output channel, embeddings one a row. At 8 bits a layer's input is
quantized too, with one affine scale; with fewer a layer computes in floating point from weights
of so many bits. Measured on two networks for digits (accuracy .974 and .981 before), all layers
at the same bits, three epochs of training for all but "ptq":

| bits | ptq | qat | lsq | lsq_plus | dorefa | bnn |
| --- | --- | --- | --- | --- | --- | --- |
| 8 | .974 .981 | .970 .981 | .981 .981 | .981 .981 | .978 .981 | |
| 4 | .967 .978 | .985 .985 | .978 .978 | .974 .978 | .970 .985 | |
| 3 | .426 .963 | .974 .981 | .967 .974 | .985 .978 | .970 .989 | |
| 2 | .159 .359 | .659 .819 | .896 .956 | .893 .952 | .637 .881 | |
| 1 | | | | | | .467 .874 |
"""

from __future__ import annotations

QUANTIZER_BITS: dict[str, tuple[int, ...]] = {
    "ptq": (3, 4, 8),
    "qat": (2, 3, 4, 8),
    "lsq": (2, 3, 4, 8),
    "lsq_plus": (2, 3, 4, 8),
    "dorefa": (2, 3, 4, 8),
    "bnn": (1,),
}
"""Method -> bits of weights, ascending."""

EMBEDDING_BITS = (4, 8)
"""Bits of embeddings, whatever the method.

Cosine of MiniLM's sentence embeddings to the original's with all three tables in so many bits, 120
sentences, without training: 8 bits .9998, 4 bits .967, 3 bits .886, 2 bits .512.
"""

_ONE_BIT = "one-bit integers of NNI are 0 alone; signs are what 'bnn' has"
_REASONS: dict[tuple[str, int], str] = {
    ("ptq", 2): "2 bits without training leave next to nothing (accuracy .97 became .16); 'qat' or 'lsq' train with it",
    **{(method, 1): _ONE_BIT for method in ("ptq", "qat", "lsq", "lsq_plus", "dorefa")},
    **{("bnn", bits): "signs take one bit" for bits in range(2, 9)},
}


def bits_for(kind: str, bits: int) -> int:
    """Bits that a layer gets when so many are asked for: tables and recurrent layers offer fewer choices.

    Args:
        kind: Kind of the layer, as in `LayerSpec`.
        bits: Bits of the plan, 1..8 or 32.
    """
    if bits == 32 or kind not in ("embedding", "recurrent"):
        return bits
    return 8 if kind == "recurrent" else next(offered for offered in EMBEDDING_BITS if offered >= bits)


def refusal(method: str, bits: int) -> str | None:
    """Why a method does not offer some bits, where the reason is known."""
    return _REASONS.get((method, bits))
