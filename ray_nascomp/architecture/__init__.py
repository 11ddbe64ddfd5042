"""Networks of other architectures that start from a trained model's weights."""

from ray_nascomp.architecture.blocks import find_blocks
from ray_nascomp.architecture.cnn import ElasticCNN, elastic_cnn
from ray_nascomp.architecture.elastic import ElasticTransformer, elastic_transformer
from ray_nascomp.architecture.nni_space import NNISpace, nni_space
from ray_nascomp.architecture.pretrained import save_network, write_card

__all__ = [
    "ElasticCNN",
    "ElasticTransformer",
    "NNISpace",
    "elastic_cnn",
    "elastic_transformer",
    "find_blocks",
    "nni_space",
    "save_network",
    "write_card",
]
