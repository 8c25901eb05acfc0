"""Responses of a policy to prompts, in a file that `idrm judge` reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from idrm.command_line import FlagParser, fields_of, require_at_least
from idrm.errors import InputError
from idrm.evaluation.evaluation import Scoring, device_of
from idrm.policy.dialogues import load_examples
from idrm.policy.models import load_policy, load_policy_tokenizer
from idrm.policy.prompts import prompt_ids
from idrm.run_folder import require_writable, write_whole

logger = logging.getLogger("idrm.policy")


@dataclass
class GenerationArguments:
    """What `idrm policy generate` is told."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Policy: folder or hub name."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference pairs, of any source and format, whose prompts are answered."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of --dataset_name."})
    output_file: str | None = field(default=None, metadata={"help": "Response file to write, .jsonl."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_file where it is there already."})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Answer the first so many prompts. Default: all of them."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens, cut from its left. Default: what the policy's limit leaves."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest response in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 takes the likeliest token every time."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability that tokens are drawn from."})
    seed: int = field(default=42, metadata={"help": "Of sampling."})
    batch_size: int = field(default=16, metadata={"help": "Prompts answered at once."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="auto", metadata={"help": "Dtype of the weights ('auto': as saved)."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda:1 or cpu. Default: the accelerator, else the CPU."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2. Default: transformers' choice."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the policy's repository run its own code on this machine."}
    )


def run(action: str, argv: Sequence[str]) -> None:
    """Writes what the flags of `idrm policy generate` ask for."""
    generate(parse_arguments(argv))


def parse_arguments(argv: Sequence[str]) -> GenerationArguments:
    """The flags; raises InputError for an unknown one, a value of the wrong kind, or one that is missing."""
    values, _ = FlagParser((GenerationArguments,), "idrm policy generate").values(argv)
    needed = {
        "model_name_or_path": "the policy",
        "dataset_name": "the prompts",
        "output_file": "a .jsonl file to write",
    }
    for flag, meaning in needed.items():
        if not values[flag]:
            raise InputError(f"--{flag} is missing: give {meaning}")
    lowest = {"max_prompts": 1, "max_prompt_length": 8, "max_new_tokens": 1, "temperature": 0.0, "batch_size": 1}
    require_at_least(values, {**lowest, "seed": 0})
    if not 0 < values["top_p"] <= 1:
        raise InputError(f"--top_p: expected more than 0 and at most 1, got {values['top_p']:g}")
    return GenerationArguments(**fields_of(GenerationArguments, values))


def generate(arguments: GenerationArguments) -> list[dict[str, Any]]:
    """Answers every prompt once and writes the response file, whole or not at all.

    Raises:
        InputError: anything the user can put right; nothing has been written then.
    """
    path = Path(arguments.output_file).expanduser()
    if path.suffix != ".jsonl":
        raise InputError(f"--output_file {path}: expected a name that ends with .jsonl")
    if path.is_dir() or (path.exists() and not arguments.overwrite):
        raise InputError(f"--output_file {path}: is there already; give another name, or --overwrite true")
    require_writable("--output_file", path.parent)
    device = device_of(Scoring(device=arguments.device))
    tokenizer = load_policy_tokenizer(arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code)
    examples, summary = load_examples(
        "prompts", arguments.dataset_name, arguments.dataset_split, bool(tokenizer.chat_template)
    )
    logger.info(summary)
    if arguments.max_prompts is not None:
        examples = examples.select(range(min(arguments.max_prompts, len(examples))))
    model = load_policy(
        arguments.model_name_or_path,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    model = model.to(device).eval()
    set_seed(arguments.seed)
    limit = _prompt_limit(arguments, model)
    responses: list[str] = []
    starts = range(0, len(examples), arguments.batch_size)
    for start in track(starts, description="Answering", disable=len(starts) < 2):
        batch = examples[start : start + arguments.batch_size]["prompt"]
        responses += _answers(model, tokenizer, batch, limit, arguments)
    lines = []
    for example, response in zip(examples, responses, strict=True):
        messages, conversational = example["messages"], example["conversational"]
        prompt = messages if conversational else "".join(message["content"] for message in messages)
        lines.append({"prompt": prompt, "response": response.strip()})
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    empty = sum(not line["response"] for line in lines)
    logger.info("%s: %s responses%s", path, f"{len(lines):,}", f", {empty:,} of them empty" if empty else "")
    return lines


def _prompt_limit(arguments: GenerationArguments, model: PreTrainedModel) -> int | None:
    reads = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if reads is None else reads - arguments.max_new_tokens
    if room is not None and room < 8:
        raise InputError(
            f"--max_new_tokens {arguments.max_new_tokens}: leaves no room for a prompt; the policy reads {reads} tokens"
        )
    asked = arguments.max_prompt_length
    if asked is not None and room is not None and asked > room:
        raise InputError(
            f"--max_prompt_length {asked}: with the response, more than the {reads} tokens the policy reads"
        )
    return room if asked is None else asked


@torch.inference_mode()
def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    limit: int | None,
    arguments: GenerationArguments,
) -> list[str]:
    """One response to each prompt, without special tokens."""
    sequences = prompt_ids(tokenizer, prompts)
    if limit is not None:
        sequences = [_cut(ids, limit, tokenizer.bos_token_id) for ids in sequences]
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        if arguments.temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    written = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: EOS, and those of the generation configuration, such as an end of turn."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def _cut(ids: list[int], limit: int, bos: int | None) -> list[int]:
    """The last tokens of a prompt; a leading BOS stays."""
    if len(ids) <= limit:
        return ids
    return [ids[0], *ids[len(ids) - limit + 1 :]] if bos is not None and ids[0] == bos else ids[-limit:]
