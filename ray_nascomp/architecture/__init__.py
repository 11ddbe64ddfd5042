"""Networks of other architectures that start from a trained model's weights."""

from ray_nascomp.architecture.elastic import ElasticTransformer, elastic_transformer

__all__ = ["ElasticTransformer", "elastic_transformer"]
