"""Caption tokens: a byte-level BPE or unigram model trained on the captions, or CLIP's (`tokenizers`)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from coca.clip_tokenizer import CLIP_BEGIN, CLIP_END, CLIP_PAD, clean_caption, clip_bpe
from coca.errors import BadInput
from coca.storage import open_file

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
    def load(cls, uri: str | Path) -> "Tokenizer":
        """A tokenizer file on disk or s3://.

        Raises:
            BadInput: it cannot be read or is none.
        """
        store, name = open_file(uri)
        try:
            text = store.read(name).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"cannot read the tokenizer {uri}: {error}", "Make one with `coca tokenizer train`"
            ) from None
        return cls.from_json(text, source=str(uri))

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
    """A byte-level BPE of at most ``vocab_size`` entries.

    64,000 is the paper's size (Yu et al. 2022, section 4.1). Captions are streamed, not held: memory grows with the
    number of different words alone.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=_checked_size(vocab_size, len(_BYTES) + len(_SPECIAL)),
        special_tokens=_SPECIAL,
        initial_alphabet=_BYTES,
        show_progress=False,
    )
    return Tokenizer(_train(models.BPE(), captions, trainer))


def train_unigram(captions: Iterable[str], vocab_size: int = 64_000) -> Tokenizer:
    """A byte-level unigram model (Kudo 2018) of at most ``vocab_size`` entries; likewise streamed.

    Takes about twice the time of ``train_bpe``.

    Raises:
        BadInput: the captions hold no word.
    """
    trainer = trainers.UnigramTrainer(
        # One more than the bytes: asked for these alone, the library never stops adding.
        vocab_size=_checked_size(vocab_size, len(_BYTES) + len(_SPECIAL) + 1),
        special_tokens=_SPECIAL,
        initial_alphabet=_BYTES,
        show_progress=False,
    )
    return Tokenizer(_settle(_train(models.Unigram(), captions, trainer)))


# Every byte is an entry: what no longer entry covers falls back to its bytes, and no text is unknown.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _checked_size(vocab_size: int, smallest: int) -> int:
    if vocab_size < smallest:
        raise BadInput(
            f"--vocab-size {vocab_size} is below {smallest}", "Bytes and special tokens alone need that many"
        )
    return vocab_size


def _train(model: models.Model, captions: Iterable[str], trainer: trainers.Trainer) -> HuggingFaceTokenizer:
    inner = HuggingFaceTokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(captions, trainer=trainer)
    return inner


def _settle(inner: HuggingFaceTokenizer) -> HuggingFaceTokenizer:
    """The same captions, the same tokenizer: what the library leaves to the order of a hash map is put in order.

    That is the last digits of scores, and which of the bytes that no caption has is how unlikely.
    """
    values = json.loads(inner.to_str())
    pieces = [tuple(entry) for entry in values["model"]["vocab"][len(_SPECIAL) :]]
    if any(score is None for _, score in pieces):
        raise BadInput("the captions hold no word", "Give some that do")
    lowest = min(score for _, score in pieces)
    step = 1e-4  # the library's own between such bytes
    unseen = sorted(piece for piece, score in pieces if len(piece) == 1 and score < lowest + step * len(_BYTES))
    scores = {**dict(pieces), **{piece: lowest + step * place for place, piece in enumerate(unseen)}}
    settled = sorted(((round(score, 4), piece) for piece, score in scores.items()), key=lambda s: (-s[0], s[1]))
    values["model"]["vocab"][len(_SPECIAL) :] = [[piece, score] for score, piece in settled]
    return HuggingFaceTokenizer.from_str(json.dumps(values))


def clip_tokenizer(path: str | Path) -> Tokenizer:
    """CLIP's tokenizer from OpenAI's vocabulary file, ``bpe_simple_vocab_16e6.txt.gz``."""
    return Tokenizer(clip_bpe(path))
