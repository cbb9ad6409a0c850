import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from coca.checkpoint import load_checkpoint, save_checkpoint
from coca.config import ModelConfig, Preprocessing
from coca.model import CoCa
from coca.open_clip import to_open_clip
from coca.open_clip_config import read_config
from coca.storage import Store, open_file
from coca.tokenizer import Tokenizer
from coca.variants import VARIANTS
from jobs.cli import cli

DATA = Path(__file__).parents[2] / "data"
PARITY = DATA / "open_clip_parity"
VOCABULARY = DATA / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
Json = dict[str, Any]


def weights(*words: object) -> Result:
    return CliRunner().invoke(cli, ["weights", *map(str, words)])


def succeeded(*words: object) -> Json:
    result = weights(*words, "--json")
    assert result.exit_code == 0, result.output
    found: Json = json.loads(result.stdout.splitlines()[-1])
    return found


def case() -> Json:
    loaded: Json = json.loads((PARITY / "case.json").read_text())
    return loaded


def parity() -> dict[str, Tensor]:
    return safetensors.torch.load_file(PARITY / "weights.safetensors")


def identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    same = (ours[key].dtype == value.dtype and torch.equal(ours[key], value) for key, value in theirs.items())
    return ours.keys() == theirs.keys() and all(same)


class Folder:
    """Where the user stands: a model of open_clip, its JSON, and room for what is made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.config, self.out = path / "weights.safetensors", path / "config.json", path / "new" / "model"
        self.put(parity())
        self.describe(case())

    def put(self, tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file(tensors, self.file)

    def describe(self, values: Any) -> None:
        self.config.write_text(json.dumps(values))

    def imports(self, *words: object) -> Json:
        return succeeded("import", "open_clip", self.file, "--config", self.config, "--out", self.out, *words)

    def refused(self, *words: object) -> str:
        """What is said to an import that must fail, and leave nothing behind."""
        result = weights("import", "open_clip", self.file, "--config", self.config, "--out", self.out, *words)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
        assert not self.out.exists()
        return result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_an_imported_model_gives_open_clips_numbers(folder: Folder) -> None:
    result = folder.imports()
    assert result["parameters"] == 400_129
    assert result["variant"] is None
    loaded = load_checkpoint(str(folder.out))
    expected = safetensors.torch.load_file(PARITY / "io.safetensors")
    output = loaded.model(expected["image"], expected["text"])
    for name in ("image_features", "text_features", "logits"):
        torch.testing.assert_close(getattr(output, name), expected[name], rtol=0, atol=2e-5)
    assert loaded.step == 0
    assert loaded.provenance["imported_from"] == "open_clip"
    assert loaded.provenance["file"] == "weights.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_export_gives_back_what_was_imported(folder: Folder, dtype: torch.dtype, scale_shape: tuple[int, ...]) -> None:
    tensors = {key: value.to(dtype) for key, value in parity().items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(scale_shape)
    folder.put(tensors)
    folder.imports()
    back = folder.path / "back" / "coca.safetensors"
    result = succeeded("export", "open_clip", folder.out, "--out", back)
    assert identical(safetensors.torch.load_file(back), tensors)
    assert result["tensors"] == 155
    assert json.loads((folder.path / "back" / "coca.json").read_text()) == case()["config"]


def test_a_torch_file_is_imported_as_safetensors_are(folder: Folder) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in parity().items()}}, folder.file)
    folder.imports()
    back = folder.path / "coca.safetensors"
    succeeded("export", "open_clip", folder.out, "--out", back)
    assert identical(safetensors.torch.load_file(back), parity())


def test_all_of_it_may_lie_on_s3(folder: Folder, s3: str) -> None:
    for path in (folder.file, folder.config):
        store, name = open_file(f"{s3}/{path.name}")
        store.write(name, path.read_bytes())
    uris = [f"{s3}/{path.name}" for path in (folder.file, folder.config)]
    succeeded("import", "open_clip", uris[0], "--config", uris[1], "--out", f"{s3}/models/coca")
    succeeded("export", "open_clip", f"{s3}/models/coca", "--out", f"{s3}/back.safetensors")
    assert identical(safetensors.torch.load(Store(s3).read("back.safetensors")), parity())
    again = weights("import", "open_clip", uris[0], "--config", uris[1], "--out", f"{s3}/models/coca")
    assert again.exit_code == 2
    assert "models/coca is not empty" in again.stderr
    missing = weights("import", "open_clip", f"{s3}/none.pt", "--config", uris[1], "--out", f"{s3}/new")
    assert missing.exit_code == 2
    assert f"there is no {s3}/none.pt" in missing.stderr


@pytest.mark.parametrize(
    ("said", "words", "expected"),
    [
        ({}, [], (0, 1, 2)),
        ({"pad_id": 5, "sot_id": 6, "eot_id": 7}, [], (5, 6, 7)),
        ({"pad_id": 5, "sot_id": 6, "eot_id": 7}, ["--begin-id", 8, "--pad-id", 0], (0, 8, 7)),
        ({"eot_id": 319}, ["--begin-id", 318], (0, 318, 319)),
    ],
)
def test_flags_go_before_the_json_and_the_json_before_defaults(
    folder: Folder, said: Json, words: list[object], expected: tuple[int, int, int]
) -> None:
    folder.describe({"config": case()["config"], **said})
    text = folder.imports(*words)["model"]["text"]
    assert (text["pad_id"], text["begin_id"], text["end_id"]) == expected


@pytest.mark.parametrize("key", ["config", "model_cfg", None])
def test_the_models_json_may_stand_alone_or_inside(folder: Folder, key: str | None) -> None:
    model = case()["config"]
    folder.describe(model if key is None else {key: model})
    assert folder.imports()["model"]["text"]["vocab_size"] == 320


def test_preprocessing_is_the_jsons_or_clips(folder: Folder) -> None:
    assert folder.imports()["preprocessing"] == {
        "image_size": 32,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    published = {"mean": [0.5, 0.4, 0.3], "size": 32, "interpolation": "bicubic", "fill_color": 0, "mode": "RGB"}
    folder.describe({"model_cfg": case()["config"], "preprocess_cfg": published})
    folder.out = folder.path / "other"
    folder.imports()
    preprocessing = load_checkpoint(str(folder.out)).preprocessing
    assert preprocessing.mean == (0.5, 0.4, 0.3)
    assert preprocessing.std == (0.26862954, 0.26130258, 0.27577711)


def test_without_a_tokenizer_the_command_says_what_is_missing(folder: Folder) -> None:
    result = weights("import", "open_clip", folder.file, "--config", folder.config, "--out", folder.out)
    assert "No tokenizer: the checkpoint cannot caption or embed text" in result.stdout
    assert load_checkpoint(str(folder.out)).own_tokenizer is None


def test_a_tokenizer_travels_with_the_weights(folder: Folder, tokenizer: Tokenizer) -> None:
    path = folder.path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    assert folder.imports("--tokenizer", path)["tokenizer"] == tokenizer.fingerprint
    assert load_checkpoint(str(folder.out)).tokenizer.fingerprint == tokenizer.fingerprint


def test_clips_vocabulary_is_known_by_its_bytes(folder: Folder) -> None:
    config = case()["config"]
    config["text_cfg"]["vocab_size"] = config["multimodal_cfg"]["vocab_size"] = 49_408
    ours = read_config(config)
    folder.describe(config)
    folder.put(to_open_clip(CoCa(ours).state_dict(), ours))
    renamed = folder.path / "vocabulary"
    renamed.write_bytes(VOCABULARY.read_bytes())
    result = folder.imports("--tokenizer", renamed)
    assert (result["model"]["text"]["begin_id"], result["model"]["text"]["end_id"]) == (49_406, 49_407)
    loaded = load_checkpoint(str(folder.out)).tokenizer
    assert loaded.encode(["a cat"]) == [[49_406, 320, 2368, 49_407]]


@pytest.mark.parametrize(
    ("name", "width", "layers", "patch", "text_width", "heads"),
    [("coca_ViT-B-32", 768, 12, 32, 512, 8), ("coca_ViT-L-14", 1024, 24, 14, 768, 12)],
)
def test_the_published_models_are_variants(
    name: str, width: int, layers: int, patch: int, text_width: int, heads: int
) -> None:
    """Their JSON in open_clip, and the names and shapes of their weights."""
    text = {"context_length": 76, "vocab_size": 49408, "width": text_width, "heads": heads, "layers": 12}
    pooler = {"attentional_pool": True, "attn_pooler_heads": 8, "output_tokens": True}
    config = read_config(
        {
            "embed_dim": text_width,
            "vision_cfg": {"image_size": 224, "layers": layers, "width": width, "patch_size": patch, **pooler},
            "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**text, "attn_pooler_heads": heads},
            "custom_text": True,
        }
    )
    assert config == VARIANTS[name]()
    with torch.device("meta"):
        exported = to_open_clip(CoCa(config).state_dict(), config)
    shapes = json.loads((PARITY / f"keys_{name}.json").read_text())
    assert {key: list(value.shape) for key, value in exported.items()} == shapes


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", 2, 4])
def test_code_in_a_pickle_is_not_run(folder: Folder, protocol: str | int) -> None:
    trap = folder.path / "trap"
    values = {"logit_scale": Evil(trap)}
    if protocol == "torch":
        torch.save(values, folder.file)
    else:
        folder.file.write_bytes(pickle.dumps(values, protocol=int(protocol)))
    assert folder.file.name in folder.refused()
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists(), "the trap works"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "weights: there is no .*weights.safetensors. Give a file"),
        (b"", "is neither safetensors nor a torch file"),
        (b"not weights at all", "is neither safetensors nor a torch file"),
        (b"PK\x03\x04 cut short", "or is damaged"),
        (b"a folder", "weights: cannot read .*weights.safetensors"),
    ],
)
def test_files_that_are_no_weights_are_refused(folder: Folder, content: bytes | None, expected: str) -> None:
    folder.file.unlink()
    if content == b"a folder":
        folder.file.mkdir()
    elif content is not None:
        folder.file.write_bytes(content)
    assert_matches(folder.refused(), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--config: there is no .*config.json"),
        ("{", "config.json is not JSON"),
        ("\udcff", "config.json is not JSON"),
        ("[1]", "config.json holds no JSON object. Give --config open_clip's JSON"),
        ("{}", "the config has no vision_cfg"),
        ('{"model_cfg": 3}', "holds no JSON object for the model"),
    ],
)
def test_configs_that_are_none_are_refused(folder: Folder, content: str | None, expected: str) -> None:
    folder.config.unlink()
    if content is not None:
        folder.config.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_matches(folder.refused(), expected)


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("multimodal_cfg", None, None, "the config has no multimodal_cfg. Give .* of a CoCa"),
        ("vision_cfg", "timm_model_name", "vit_base", "vision_cfg.timm_model_name = 'vit_base' is not known"),
        ("text_cfg", "hf_model_name", "roberta", "text_cfg.hf_model_name = 'roberta' is not known"),
        (
            "text_cfg",
            "vocab_size",
            321,
            r"token_embedding.weight has shape \(320, 48\), the config asks for \(321, 48\)",
        ),
        ("vision_cfg", "layers", 3, r"visual.transformer.resblocks.2.ln_1.weight \(64,\) is missing"),
        ("multimodal_cfg", "layers", 2, r"text_decoder\.\w+\.2\.\S+ \(\d+.*\) is unknown"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    folder: Folder, section: str, key: str | None, value: Any, expected: str
) -> None:
    config = case()["config"]
    if key is None:
        del config[section]
    else:
        config[section][key] = value
    folder.describe(config)
    assert_matches(folder.refused(), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": 64}, "preprocess_cfg.size = 64, the model takes 32"),
        ({"resize_mode": "squash"}, "preprocess_cfg.resize_mode = 'squash', known is shortest"),
        ({"interpolation": "nearest"}, "preprocess_cfg.interpolation = 'nearest', known is bicubic"),
        ({"crop": 3}, "preprocess_cfg.crop = 3, known is nothing"),
        ({"mean": [0.5]}, "preprocess_cfg: config key 'mean.1'"),
        ({"std": [0, 1, 1]}, "preprocess_cfg: config key 'std.0' = 0"),
        ([1], "preprocess_cfg holds no JSON object"),
    ],
)
def test_pictures_prepared_in_another_way_are_refused(folder: Folder, given: Any, expected: str) -> None:
    folder.describe({"model_cfg": case()["config"], "preprocess_cfg": given})
    assert_matches(folder.refused(), expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--begin-id", "320"], "begin_id = 320 is outside the 320 entries. Give --begin-id"),
        (["--pad-id", "-1"], "'text.pad_id' = -1"),
        (["--tokenizer", "none.json"], "cannot read the tokenizer none.json: No such file"),
        (["--tokenizer", str(VOCABULARY)], "the tokenizer has 49408 entries, the model 320. Give the model's own"),
        (["--tokenizer", "{folder}/t.json", "--end-id", "9"], "end_id is 2 in the tokenizer, 9 in the model"),
        (["--tokenizer", "{folder}/config.json"], "config.json is not a tokenizer file"),
    ],
)
def test_ids_and_tokenizers_of_other_models_are_refused(
    folder: Folder, tokenizer: Tokenizer, words: list[str], expected: str
) -> None:
    (folder.path / "t.json").write_text(tokenizer.to_json())
    assert_matches(folder.refused(*(word.format(folder=folder.path) for word in words)), expected)


def test_a_folder_with_something_in_it_is_left_alone(folder: Folder) -> None:
    folder.out.mkdir(parents=True)
    (folder.out / "mine").write_text("kept")
    words = ("import", "open_clip", folder.file, "--config", folder.config, "--out", folder.out)
    assert_refused(".*is not empty. Name a new folder, or remove what is there", *words)
    assert [path.name for path in folder.out.iterdir()] == ["mine"]


def test_export_refuses_what_open_clip_lacks_and_what_is_in_the_way(folder: Folder, tiny_model: ModelConfig) -> None:
    folder.imports()
    back = folder.path / "coca.safetensors"
    back.write_text("mine")
    assert_refused("coca.safetensors exists. Name a new file", "export", "open_clip", folder.out, "--out", back)
    assert back.read_text() == "mine"
    back.unlink()
    (folder.path / "coca.json").write_text("mine")
    assert_refused("coca.json exists. Name a new file", "export", "open_clip", folder.out, "--out", back)
    assert not back.exists()
    other = folder.path / "other.pt"
    assert_refused("does not end with .safetensors", "export", "open_clip", folder.out, "--out", other)
    assert_refused("is not a checkpoint", "export", "open_clip", folder.path / "none", "--out", f"{other}.safetensors")
    assert_refused("Invalid value for 'open_clip'", "export", "flax", folder.out, "--out", f"{other}.safetensors")
    ours = make_checkpoint(folder.path, tiny_model)
    assert_refused(
        "open_clip's CoCa has no .* Export a model that came from open_clip",
        *("export", "open_clip", ours, "--out", f"{other}.safetensors"),
    )
    assert not Path(f"{other}.safetensors").exists()


def make_checkpoint(path: Path, config: ModelConfig) -> Path:
    preprocessing = Preprocessing(image_size=config.vision.image_size)
    parts: Json = {"model": CoCa(config), "tokenizer": None, "preprocessing": preprocessing}
    save_checkpoint(Store(path), "ours", **parts, step=3, provenance={})
    return path / "ours"


def assert_refused(expected: str, *words: object) -> None:
    result = weights(*words)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert_matches(result.stderr, expected)


def assert_matches(line: str, expected: str) -> None:
    assert re.match(f"error: .*{expected}", line), line
