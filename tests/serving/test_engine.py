"""serving/engine.py: items stand alone, answers follow the model, checkpoints are refused when broken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coca.checkpoint import load_checkpoint
from coca.errors import BadInput, RunFailed
from coca.feed import normalize
from coca.images import ImageLimits, decode_rgb, model_pixels
from serving.engine import Engine
from serving.results import Caption, Embedding, Refusal


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Engine:
    return Engine(checkpoint)


def test_captions_depend_on_the_image_and_not_on_the_batch(engine: Engine, images: list[bytes]) -> None:
    together = engine.caption(images)
    alone = [engine.caption([image])[0] for image in images]
    texts = [caption.text for caption in together if isinstance(caption, Caption)]
    assert texts == [caption.text for caption in alone if isinstance(caption, Caption)]
    assert len(set(texts)) > len(images) // 2
    assert {c.batch_size for c in together if isinstance(c, Caption)} == {len(images)}


def test_image_embeddings_are_the_models(engine: Engine, images: list[bytes], checkpoint: str) -> None:
    loaded = load_checkpoint(checkpoint)
    pixels = np.stack([model_pixels(decode_rgb(image, ImageLimits()), 16) for image in images])
    with torch.inference_mode():
        expected, _ = loaded.model.encode_image(normalize(torch.from_numpy(pixels), loaded.preprocessing))
    got = np.stack([e.vector for e in engine.embed_images(images) if isinstance(e, Embedding)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_text_embeddings_do_not_depend_on_the_batch(engine: Engine) -> None:
    texts = ["a", "a red circle", "star star star"]
    together = engine.embed_texts(texts)
    for text, embedding in zip(texts, together, strict=True):
        (alone,) = engine.embed_texts([text])
        assert isinstance(embedding, Embedding)
        assert isinstance(alone, Embedding)
        np.testing.assert_allclose(embedding.vector, alone.vector, atol=1e-5)
    sizes = [e.tokens for e in together if isinstance(e, Embedding)]
    assert sizes == [len(engine.tokens(text)) for text in texts]  # type: ignore[arg-type]


def test_a_bad_image_costs_only_itself(engine: Engine, images: list[bytes]) -> None:
    mixed = [images[0], b"no image", images[1], images[2][:60], images[3]]
    results = engine.caption(mixed)
    assert [isinstance(result, Refusal) for result in results] == [False, True, False, True, False]
    assert results[1] == Refusal("not_an_image", "the bytes are no JPEG, PNG, WebP or GIF")
    good = engine.caption([images[0], images[1], images[3]])
    assert [r.text for r in results if isinstance(r, Caption)] == [g.text for g in good if isinstance(g, Caption)]
    assert all(isinstance(result, Refusal) for result in engine.embed_images([b"", b"GIF89a"]))


def test_texts_are_refused_by_length_and_emptiness(engine: Engine) -> None:
    empty, long, fine = engine.embed_texts([" \n", "circle " * 40, "circle"])
    assert isinstance(empty, Refusal)
    assert empty.reason == "empty_text"
    assert isinstance(long, Refusal)
    assert long.reason == "text_too_long"
    assert f"at most {engine.info.context_length}" in long.detail
    assert isinstance(fine, Embedding)


def test_caption_length_is_capped(checkpoint: str, images: list[bytes]) -> None:
    engine = Engine(checkpoint, max_caption_tokens=3)
    captions = [caption for caption in engine.caption(images) if isinstance(caption, Caption)]
    assert not all(caption.complete for caption in captions)
    longer = Engine(checkpoint).caption(images)
    for short, long in zip(captions, longer, strict=True):
        assert isinstance(long, Caption)
        assert short.complete or len(short.text) <= len(long.text)


def test_the_check_notices_broken_weights(checkpoint: str) -> None:
    engine = Engine(checkpoint)
    engine.check()
    with torch.no_grad():
        for parameter in engine._model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not 1"):
        engine.check()


def test_info_names_the_checkpoint(engine: Engine, checkpoint: str) -> None:
    assert engine.info.step == 7
    assert engine.info.version == f"step_7-{load_checkpoint(checkpoint).digest}"


def test_a_changed_checkpoint_is_refused(checkpoint: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(checkpoint).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "step": 8}))
    with pytest.raises(BadInput, match=r"config\.json does not match"):
        Engine(str(copy))
