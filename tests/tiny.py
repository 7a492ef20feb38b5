"""A language model small enough to teach in a test: a Llama of two layers over 48 characters, built on the spot and saved."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?+="
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character (upper case becomes lower case), 48 tokens in all; `<pad>` is 0 and `<end>` is 1."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def build_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    context: int = 512,
    head_scale: float = 1.0,
    template: str | None = TEMPLATE,
) -> Path:
    """A Hugging Face folder with a float32 LlamaForCausalLM (grouped-query attention, tied embeddings) and its tokenizer.

    The same `seed` gives the same weights. `head_scale` multiplies the logits: 1 leaves the distribution nearly uniform
    (3.8 nats), 10 gives 2 to 3 nats, 20 gives 1 to 2 nats.
    """
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _spread(model, hidden, head_scale)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    build_tiny_tokenizer(template).save_pretrained(folder)
    return folder


def _spread(model: LlamaForCausalLM, hidden: int, head_scale: float) -> None:
    """Layers strong enough to outweigh the embedding of the last token, which a tied head would otherwise repeat for ever."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    torch.nn.init.constant_(model.model.norm.weight, head_scale)


def build_tiny_reward_model(folder: Path, *, seed: int = 0, labels: tuple[str, ...] = ("reward",)) -> Path:
    """A Hugging Face folder with a float32 LlamaForSequenceClassification over the same tokenizer."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder
