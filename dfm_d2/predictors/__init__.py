"""One predictor, the stack of D, those of backbone stages, time embedding, feature pooling."""

from dfm_d2.predictors.class_predictor import ClassPredictor
from dfm_d2.predictors.flow_head import FlowHead, HeadAnswer
from dfm_d2.predictors.pooling import FeaturePooler
from dfm_d2.predictors.stack import PredictorStack
from dfm_d2.predictors.stage import StagePredictor
from dfm_d2.predictors.time_embedding import TimeEmbedding

__all__ = [
    "ClassPredictor",
    "FeaturePooler",
    "FlowHead",
    "HeadAnswer",
    "PredictorStack",
    "StagePredictor",
    "TimeEmbedding",
]
