"""NLI pairs as an encoder reads them: premise and hypothesis in one input, by the tokenizer's template for pairs."""

from hashlib import sha256
from pathlib import Path

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

_FEATURES = Features(
    {
        "input_ids": [Value("int32")],
        "attention_mask": [Value("int8")],
        "token_type_ids": [Value("int8")],
        "label": Value("int64"),
        "length": Value("int32"),
        "cut": Value("bool"),
    }
)


def encode_nli(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    token_types: bool,
    length_column: str = "length",
    num_proc: int | None = None,
) -> tuple[Dataset, int]:
    """Tokenises all pairs; what is too long loses tokens from the end of the longer side.

    Args:
        pairs: from `load_nli`.
        tokenizer: a fast tokenizer. Tables are cached by `datasets` under a digest of it, of the pairs and the length.
        max_length: the most tokens of an input, special ones included.
        token_types: whether the encoder reads token types (`classifier.reads_token_types`).
        length_column: what the column of lengths in tokens is called.
        num_proc: processes to share the work; None for this one alone.

    Returns:
        (dataset, cut): columns input_ids, attention_mask, token_type_ids (only with `token_types`), label and lengths;
        and how many pairs were too long.
    """

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["premise"],
            batch["hypothesis"],
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=token_types,
            return_attention_mask=True,
        )
        # A fast tokenizer tells what it cut off: `overflowing`.
        columns = {name: encoded[name] for name in _FEATURES if name in encoded}
        columns["length"] = [len(ids) for ids in encoded["input_ids"]]
        columns["cut"] = [bool(encoding.overflowing) for encoding in encoded.encodings]
        columns["label"] = batch["label"]
        return columns

    encoded = pairs.map(
        encode,
        batched=True,
        num_proc=num_proc,
        remove_columns=pairs.column_names,
        features=Features({name: kind for name, kind in _FEATURES.items() if token_types or name != "token_type_ids"}),
        new_fingerprint=_fingerprint(pairs, tokenizer, f"{max_length} {token_types}"),
        desc="Tokenising",
    )
    _reset(tokenizer)  # what is saved beside a model truncates nothing
    cut = sum(encoded["cut"][:])
    encoded = encoded.remove_columns("cut")
    return (encoded.rename_column("length", length_column) if length_column != "length" else encoded), cut


def _fingerprint(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, options: str) -> str:
    """A digest of all that decides what comes out: pairs, tokenizer, options and this code."""
    _reset(tokenizer)  # an earlier call's truncation would be part of the serialised tokenizer
    digest = sha256(f"{pairs._fingerprint} {options} {tokenizer.special_tokens_map}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    folder = Path(__file__).parent
    for module in (folder / "encoding.py", folder / "loading.py", folder.parent / "sources.py"):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]  # datasets refuses long ones


def _reset(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
