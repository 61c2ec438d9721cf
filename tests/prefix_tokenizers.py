"""Tokenizers that put something before every text, as those of Llama 2, Mistral, T5 and others."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_tiny_tokenizer

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+=?.,:()<>/[]#*'|_\"{}"
SPACE = "\u2581"


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _sentencepiece_bpe() -> Tokenizer:
    """With merges that begin with a space, and bytes for what it has no letter for."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *_LETTERS]
    merges = [(SPACE, "4"), (SPACE, "y"), ("n", "y"), ("e", "s"), (SPACE + "y", "es"), ("y", "es")]
    pieces += dict.fromkeys(a + b for a, b in merges)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def llama_2() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    return _wrap(tokenizer)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    return _wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """Without a token for a line break."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (SPACE, -2.0)]
    pieces += [(letter, -5.0) for letter in _LETTERS] + [(f"{SPACE}4", -3.0), ("es", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Replace(SPACE, " ")
    return _wrap(tokenizer)


def byte_level_with_prefix() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )


PREFIX_TOKENIZERS = {
    "llama 2": llama_2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "unigram": unigram,
    "byte level": byte_level_with_prefix,
}
