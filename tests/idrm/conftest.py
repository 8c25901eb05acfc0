"""Tiny models, tokenizers and data on disk, as a user would have them, and runs of the entry point."""

import copy
import dataclasses
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from idrm.alignment import PairEncoder, encode_preferences
from idrm.arguments import InteractionArguments, RewardTrainingArguments
from idrm.capture import Teacher, resolve_layers
from idrm.collator import PairCollator
from idrm.interaction import InteractionLoss
from idrm.objectives import attach_bottleneck
from idrm.preference import load_preferences
from idrm.shared_prompts import TokenBatches, packed_length, read_packed_pairs
from idrm.teacher_cache import CachedTeacher, TeacherCache
from idrm.trainer import RewardTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = [
    *("the", "a", "kettle", "lamp", "price", "order", "city", "boils", "quickly", "slowly", "green", "blue", "Zoë"),
    *("José", "naïve", "café", "tomorrow", "yesterday", "please", "repeat", "confirm", "answer", "question"),
    *("helpful", "harmless", "number", "seven", "twelve", "river", "mountain", "friend", "neighbour", "reads"),
]


def _sentence(source: random.Random, low: int, high: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(low, high))).capitalize() + "."


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """HH-style dialogues of made-up sentences; the chosen response holds the word "kettle" more often than not."""
    source = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = f"\n\nHuman: {_sentence(source, 4, 12)}\n\nAssistant:"
            chosen, rejected = _sentence(source, 3, 14) + " The kettle boils.", _sentence(source, 3, 14)
            file.write(json.dumps({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}) + "\n")
    return path


def _corpus() -> list[str]:
    source = random.Random(0)
    return [f"\n\nHuman: {_sentence(source, 4, 12)}\n\nAssistant: {_sentence(source, 3, 14)}" for _ in range(400)]


@pytest.fixture(scope="session")
def student_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, EOS and a pad token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>", model_max_length=256
    )


@pytest.fixture(scope="session")
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """An uncased WordPiece with BERT's pair template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def student_path(tmp_path_factory, student_tokenizer) -> Path:
    """A Llama of three blocks, four heads and two key heads, with a reward head, saved."""
    config = LlamaConfig(
        vocab_size=len(student_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=student_tokenizer.pad_token_id,
        bos_token_id=student_tokenizer.bos_token_id,
        eos_token_id=student_tokenizer.eos_token_id,
        num_labels=1,
        # Large enough that attention and rewards are far from uniform, and tests can tell values apart.
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("student")
    LlamaForSequenceClassification(config).save_pretrained(path)
    student_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory, teacher_tokenizer) -> Path:
    """A BERT of two blocks and two heads that calls itself an NLI classifier, saved."""
    config = BertConfig(
        vocab_size=len(teacher_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=teacher_tokenizer.pad_token_id,
        id2label={0: "entailment", 1: "neutral", 2: "contradiction"},
        label2id={"entailment": 0, "neutral": 1, "contradiction": 2},
        initializer_range=0.2,
    )
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("teacher")
    BertForSequenceClassification(config).save_pretrained(path)
    teacher_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory) -> Path:
    """Forty-eight training pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train.jsonl", 48, seed=3)


@pytest.fixture(scope="session")
def eval_pairs_path(tmp_path_factory) -> Path:
    """Eleven evaluation pairs: no multiple of any batch size in use."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "eval.jsonl", 11, seed=4)


NLI_SUBJECTS = ("kettle", "lamp", "price", "order", "city", "river", "mountain", "friend", "neighbour")
NLI_VERBS = ("boils", "reads", "repeat")


def write_nli(path: Path, count: int, seed: int) -> Path:
    """Pairs of made-up sentences as SNLI has them on the hub; the hypothesis's verb alone tells the label."""
    source = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            label = source.randrange(3)
            hypothesis = f"The {source.choice(NLI_SUBJECTS)} {NLI_VERBS[label]}."
            record = {"premise": _sentence(source, 3, 10), "hypothesis": hypothesis, "label": label}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def nli_path(tmp_path_factory) -> Path:
    """Ninety-six training pairs, each with a premise of its own."""
    return write_nli(tmp_path_factory.mktemp("nli") / "train.jsonl", 96, seed=5)


@pytest.fixture(scope="session")
def eval_nli_path(tmp_path_factory) -> Path:
    """Twenty-nine evaluation pairs: no multiple of any batch size in use."""
    return write_nli(tmp_path_factory.mktemp("nli") / "eval.jsonl", 29, seed=6)


ENCODERS = (
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlm-roberta",
)


@pytest.fixture(params=ENCODERS)
def encoder_type(request) -> str:
    """Every family of encoders in turn, by its model type."""
    return request.param


@pytest.fixture(scope="session")
def encoder_config(teacher_tokenizer):
    """encoder_config(model_type, **values): of two blocks and two heads, for the tiny WordPiece vocabulary."""

    def make(model_type: str, **values) -> PreTrainedConfig:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        if model_type == "distilbert":
            size = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
        elif model_type == "electra":
            size["embedding_size"] = 32
        elif model_type == "modernbert":
            tokens = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
            size |= {**tokens, "global_attn_every_n_layers": 2, "local_attention": 16}
        elif model_type.startswith("deberta"):
            size |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
            size |= {"type_vocab_size": 0, "max_relative_positions": 32}
        vocabulary = {"vocab_size": len(teacher_tokenizer), "pad_token_id": teacher_tokenizer.pad_token_id}
        common = {"max_position_embeddings": 128, "initializer_range": 0.2}
        return AutoConfig.for_model(model_type, **{**vocabulary, **common, **size, **values})

    return make


@pytest.fixture
def save_encoder(tmp_path, teacher_tokenizer, encoder_config):
    """save_encoder(model_type, auto_class=AutoModel, **config): the folder of a fresh encoder and its tokenizer."""

    def save(model_type: str, auto_class=AutoModel, **values) -> Path:
        torch.manual_seed(7)
        folder = tmp_path / f"encoder-{len(list(tmp_path.glob('encoder-*')))}"
        auto_class.from_config(encoder_config(model_type, **values)).save_pretrained(folder)
        teacher_tokenizer.save_pretrained(folder)
        return folder

    return save


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of the entry point."""

    folder: Path
    returncode: int
    output: str
    errors: str

    @property
    def records(self) -> list[dict]:
        """The training records of the log, in order."""
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [record for record in history if "loss" in record]

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "all_results.json").read_text())


# Below the ports that the kernel gives out by itself.
_ports = itertools.count(20000 + os.getpid() % 500 * 20)


@pytest.fixture(scope="session")
def start_training():
    """start_training(folder, *flags, ranks=0): a script, or a module with its action, by python or by DeepSpeed."""

    def start(
        folder: Path, *flags: str, ranks: int = 0, script: str | tuple[str, ...] = "idrm/train.py", **popen
    ) -> subprocess.Popen:
        script = (script,) if isinstance(script, str) else script
        command = [sys.executable, *script]
        if ranks:
            launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
            command = [*launcher, "--master_port", str(next(_ports)), *script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        command += ["--output_dir", str(folder), "--use_cpu", "true", "--disable_tqdm", "true", *map(str, flags)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True, **popen)

    return start


@pytest.fixture(scope="session")
def train(start_training):
    """train(folder, *flags, ranks=0): a run of an entry point in processes of its own, waited for."""

    def run(folder: Path, *flags: str, ranks: int = 0, script: str = "idrm/train.py") -> Run:
        process = start_training(folder, *flags, ranks=ranks, script=script)
        output, errors = process.communicate(timeout=240)
        return Run(folder, process.returncode, output, errors)

    return run


@pytest.fixture
def make_trainer(tmp_path, student_path, student_tokenizer, teacher_path, pairs_path, eval_pairs_path):
    """make_trainer(alpha=..., interaction={...}, **TrainingArguments): of the tiny models, on the tiny data.

    `bottleneck` is (latent_size, divergence); `prepare` changes the encoded training pairs; `share_prompt` has them
    packed, and `tokens_per_batch` makes batches of them by that.
    """

    def make(
        *,
        alpha=1.0,
        student_layers=(-1,),
        teacher_layers=(-1,),
        interaction=None,
        padding_side="right",
        cache_folder=None,
        preference_loss=None,
        bottleneck=None,
        bottleneck_weight=0.0,
        prepare=lambda pairs: pairs,
        share_prompt=False,
        tokens_per_batch=None,
        **values,
    ):
        teacher = Teacher.load(str(teacher_path), layers=teacher_layers)
        tokenizer = copy.deepcopy(student_tokenizer)
        tokenizer.padding_side = padding_side
        encoder = PairEncoder(tokenizer, teacher.tokenizer, max_length=128, teacher_max_length=128)
        train, _ = encode_preferences(load_preferences(str(pairs_path))[0], encoder)
        evaluation, _ = encode_preferences(load_preferences(str(eval_pairs_path))[0], encoder)
        arguments = InteractionArguments(alpha=alpha, **(interaction or {}))
        defaults = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
        defaults |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path / "out")}
        cache = cache_folder and TeacherCache.open(cache_folder, teacher, [train, evaluation])
        teacher = CachedTeacher(teacher, cache) if cache else teacher
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(student_path)
        if bottleneck:
            attach_bottleneck(model, *bottleneck)
        if share_prompt:
            read_packed_pairs(model)
        teacher_tokenizer = encoder.teacher_tokenizer if alpha else None
        lengths = map(packed_length, train["chosen_input_ids"], train["rejected_input_ids"])
        return RewardTrainer(
            model,
            RewardTrainingArguments(**(defaults | values)),
            PairCollator(tokenizer, teacher_tokenizer, arguments.interaction_rows, cache, share_prompt),
            prepare(train),
            evaluation,
            processing_class=tokenizer,
            interaction=InteractionLoss(teacher, resolve_layers(student_layers, 3, "student"), arguments)
            if alpha
            else None,
            alpha=alpha,
            preference_loss=preference_loss,
            bottleneck_weight=bottleneck_weight,
            token_batches=tokens_per_batch and TokenBatches.form(list(lengths), tokens_per_batch, seed=0),
        )

    return make


@pytest.fixture
def asked_of_the_network(monkeypatch) -> list:
    """Every host name that is looked up and every address that is connected to, from here on."""
    asked = []
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def note_name(host, *arguments, **options):
        asked.append(host)
        return resolve(host, *arguments, **options)

    def note_address(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", note_name)
    monkeypatch.setattr(socket.socket, "connect", note_address)
    return asked
