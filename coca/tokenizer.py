"""Caption tokens: a byte-level BPE trained on the captions, or CLIP's (Hugging Face `tokenizers`)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from coca.clip_tokenizer import CLIP_BEGIN, CLIP_END, CLIP_PAD, clean_caption, clip_bpe
from coca.errors import BadInput

PAD, BEGIN, END = "<pad>", "<begin>", "<end>"
_SPECIAL = [PAD, BEGIN, END]


@dataclass(frozen=True)
class _Dialect:
    """What a `tokenizers` file does not say. A file's dialect is known by its tokens."""

    pad: str
    begin: str
    end: str
    pad_is_text: bool = False
    """Whether the token that pads also occurs in captions."""
    clean: Callable[[str], str] | None = None
    """Applied to a caption before the file's own normalizer."""

    def ids(self, inner: HuggingFaceTokenizer) -> list[int | None]:
        return [inner.token_to_id(token) for token in (self.pad, self.begin, self.end)]


_OWN = _Dialect(PAD, BEGIN, END)
_CLIP = _Dialect(CLIP_PAD, CLIP_BEGIN, CLIP_END, pad_is_text=True, clean=clean_caption)


class Tokenizer:
    """Captions to token ids and back.

    Pad, begin and end have ids 0, 1 and 2 in our own, 0, 49406 and 49407 in CLIP's, whose id 0 is "!" as well.
    Two tokenizers with the same ``fingerprint`` give the same tokens for every caption.
    """

    def __init__(self, inner: HuggingFaceTokenizer) -> None:
        self._dialect = _CLIP if None in _OWN.ids(inner) and None not in _CLIP.ids(inner) else _OWN
        ids = self._dialect.ids(inner)
        if None in ids:
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
        clean = self._dialect.clean
        texts = list(captions) if clean is None else [clean(caption) for caption in captions]
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        return [[self.begin_id, *encoding.ids, self.end_id] for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """The caption of token ids: up to the first end, without padding and begin."""
        ids = list(tokens)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        else:
            while ids and ids[-1] == self.pad_id:
                ids.pop()
        silent = {self.begin_id} if self._dialect.pad_is_text else {self.begin_id, self.pad_id}
        return self._inner.decode([i for i in ids if i not in silent]).strip()


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


def clip_tokenizer(path: str | Path) -> Tokenizer:
    """CLIP's tokenizer from OpenAI's vocabulary file, ``bpe_simple_vocab_16e6.txt.gz``."""
    return Tokenizer(clip_bpe(path))
