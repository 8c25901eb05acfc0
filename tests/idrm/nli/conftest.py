"""Encoded NLI pairs and trainers of tiny classifiers."""

import pytest

from idrm.nli import encode_nli, load_classifier, load_classifier_config, load_classifier_tokenizer, load_nli
from idrm.nli.arguments import parse_arguments
from idrm.nli.classifier import reads_token_types
from idrm.nli.trainer import NliTrainer

LABELS = ("entailment", "neutral", "contradiction")


@pytest.fixture
def make_trainer(tmp_path, nli_path, eval_nli_path):
    """make_trainer(folder, *flags, pooling=None): of the encoder saved there, on the tiny NLI data."""

    def make(folder, *flags, pooling=None, labels=LABELS):
        config, tokenizer = load_classifier_config(str(folder)), load_classifier_tokenizer(str(folder))
        options = {"max_length": 64, "token_types": reads_token_types(config, tokenizer)}
        train, evaluation = (
            encode_nli(load_nli(str(path))[0], tokenizer, **options)[0] for path in (nli_path, eval_nli_path)
        )
        flags = ["--model_name_or_path", str(folder), "--dataset_name", str(nli_path), *map(str, flags)]
        flags += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--disable_tqdm", "true"]
        run = parse_arguments(flags)
        model = load_classifier(str(folder), config, labels, pooling=pooling)
        return NliTrainer(model, run.training_arguments(), train, evaluation, processing_class=tokenizer, labels=labels)

    return make
