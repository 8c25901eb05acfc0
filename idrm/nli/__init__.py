"""Natural language inference: its data, classifiers of it, and how well they do; what makes an encoder a teacher."""

from idrm.nli.classifier import load_classifier, load_classifier_config, load_classifier_tokenizer
from idrm.nli.encoding import encode_nli
from idrm.nli.evaluation import evaluate_classifier
from idrm.nli.loading import NliReport, load_nli

__all__ = [
    "NliReport",
    "encode_nli",
    "evaluate_classifier",
    "load_classifier",
    "load_classifier_config",
    "load_classifier_tokenizer",
    "load_nli",
]
