"""The policy: a language model and its tokenizer, with something to pad with."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from idrm.alignment import frozen_chat_template
from idrm.errors import InputError, refusals, require_folder
from idrm.evaluation.reading import load_tokenizer, load_whole
from idrm.models import DROPOUT_FIELDS, RESERVED_PAD_TOKENS


def load_policy_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, which pads with a token that its vocabulary has; no date in its template.

    The pad token may be EOS, unlike a reward model's: a policy is told by its masks where a response ends.

    Raises:
        InputError: nothing loadable there, a slow tokenizer, or one without an EOS token.
    """
    require_folder(f"--model_name_or_path {name_or_path}", name_or_path)
    with refusals(f"--model_name_or_path {name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(f"--model_name_or_path {name_or_path}: has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token is None:
        raise InputError(f"--model_name_or_path {name_or_path}: its tokenizer has no EOS token, which ends a response")
    if isinstance(tokenizer.chat_template, str):
        # As of a reward model's: what is learnt today is what is rendered tomorrow.
        tokenizer.chat_template = frozen_chat_template(tokenizer.chat_template)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        reserved = (token for token in RESERVED_PAD_TOKENS if token in vocabulary)
        tokenizer.pad_token = next(reserved, tokenizer.eos_token)
    return tokenizer


def load_policy(
    name_or_path: str,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model, from safetensors only; partitioned where ZeRO-3 is set up.

    Raises:
        InputError: no language model there, or weights that cannot be loaded or that the checkpoint lacks.
    """
    what = f"--model_name_or_path {name_or_path}"
    with refusals(what):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if any("ForSequenceClassification" in architecture for architecture in config.architectures or ()):
        raise InputError(f"{what}: is a sequence classifier; expected a language model")
    return load_whole(
        AutoModelForCausalLM,
        name_or_path,
        what=what,
        dtype=dtype,
        config=config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def require_shared_tokenizer(
    policy: str, tokenizer: PreTrainedTokenizerBase, reward_model: str, trust_remote_code: bool
) -> None:
    """Refuses a reward model that reads other ids than the policy writes.

    Raises:
        InputError: their vocabularies, pad, EOS or chat templates differ, or their pad token is their EOS.
    """
    theirs = load_tokenizer(reward_model, trust_remote_code)
    for what, ours_is, theirs_is in (
        ("vocabulary", tokenizer.get_vocab(), theirs.get_vocab()),
        ("pad token", tokenizer.pad_token, theirs.pad_token),
        ("EOS token", tokenizer.eos_token, theirs.eos_token),
        ("chat template", tokenizer.chat_template, _template(theirs)),
    ):
        if ours_is != theirs_is:
            raise InputError(
                f"--reward_model_name_or_path {reward_model}: has another {what} than {policy}, whose ids ppo has it "
                "read; rloo takes any reward model"
            )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(f"--model_name_or_path {policy}: pads with its EOS token, by which ppo finds a response's end")


def require_ending_template(tokenizer: PreTrainedTokenizerBase, name: str, *, with_nothing_behind: bool) -> None:
    """Refuses a chat template from which a policy would not learn to end its responses.

    Args:
        name: of the model, for the error.
        with_nothing_behind: whether EOS also has to be the last thing that it writes, as where a reward model reads a
            response up to EOS and has learnt to judge at the end.

    Raises:
        InputError: what it writes behind a response has no EOS in it, or more than that.
    """
    if not tokenizer.chat_template:
        return
    question, response = "a question", "a response"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    with refusals(f"--model_name_or_path {name}: its chat template"):
        ending = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(response)[2]
    eos = tokenizer.eos_token
    if eos not in ending:
        raise InputError(
            f"--model_name_or_path {name}: its chat template ends a response with {ending!r} and without its EOS token "
            f"{eos!r}, so that no policy would learn to end; sft takes another one by --eos_token"
        )
    if with_nothing_behind and not ending.endswith(eos):
        raise InputError(
            f"--model_name_or_path {name}: its chat template ends a response with {ending!r}; ppo has the reward model "
            f"read up to {eos!r}, which is not where it has learnt to judge; rloo reads what it was trained on"
        )


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with no dropout in training either, where its modules keep the probability as a number too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in DROPOUT_FIELDS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return frozen_chat_template(template) if isinstance(template, str) else template
