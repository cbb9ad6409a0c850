"""Caption tokens: a byte-level BPE trained on the captions (Hugging Face `tokenizers`)."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from coca.errors import BadInput

PAD, BEGIN, END = "<pad>", "<begin>", "<end>"
_SPECIAL = [PAD, BEGIN, END]


class Tokenizer:
    """Captions to token ids and back; ids 0, 1, 2 are pad, begin and end.

    Two tokenizers with the same ``fingerprint`` give the same tokens for every caption.
    """

    def __init__(self, inner: HuggingFaceTokenizer) -> None:
        ids = [inner.token_to_id(token) for token in _SPECIAL]
        if any(token_id is None for token_id in ids):
            missing = [token for token, token_id in zip(_SPECIAL, ids, strict=True) if token_id is None]
            raise BadInput(f"the tokenizer has no {', '.join(missing)}", "Train one with `coca tokenizer train`")
        # `<end>` written in a caption is text: else a stranger could end or pad a caption from within.
        inner.encode_special_tokens = True
        self._inner = inner
        self.pad_id, self.begin_id, self.end_id = (i for i in ids if i is not None)
        self.vocab_size: int = inner.get_vocab_size()

    @classmethod
    def from_json(cls, text: str, source: str = "the tokenizer") -> "Tokenizer":
        try:
            inner = HuggingFaceTokenizer.from_str(text)
        except Exception as error:  # the Rust library raises bare Exception
            raise BadInput(
                f"{source} is not a tokenizer file: {error}", "Train one with `coca tokenizer train`"
            ) from None
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"cannot read the tokenizer {path}: {error}", "Train one with `coca tokenizer train`"
            ) from None
        return cls.from_json(text, source=str(path))

    def to_json(self) -> str:
        return self._inner.to_str()

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Tokenizer.from_json, (self.to_json(),)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON with sorted keys, first 16 hex digits."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, begin and end included, unpadded and untruncated."""
        encodings = self._inner.encode_batch(list(captions), add_special_tokens=False)
        return [[self.begin_id, *encoding.ids, self.end_id] for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """The caption of token ids: up to the first end, without pad and begin."""
        ids = list(tokens)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return self._inner.decode([i for i in ids if i not in (self.pad_id, self.begin_id)]).strip()


def train_bpe(captions: Iterable[str], vocab_size: int = 64_000) -> Tokenizer:
    """A byte-level BPE (no unknown token: every byte has an id) of at most ``vocab_size`` entries.

    64,000 is the paper's size (Yu et al. 2022, section 4.1). Captions are streamed, not held.
    """
    smallest = 256 + len(_SPECIAL)
    if vocab_size < smallest:
        raise BadInput(
            f"--vocab-size {vocab_size} is below {smallest}", "Bytes and special tokens alone need that many"
        )
    inner = HuggingFaceTokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(captions, trainer=trainer)
    return Tokenizer(inner)
