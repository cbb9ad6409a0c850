import json
from pathlib import Path

from click.testing import CliRunner, Result

from coca.tokenizer import Tokenizer
from jobs.cli import cli

VOCABULARY = Path(__file__).parents[2] / "data/clip_bpe/bpe_simple_vocab_16e6.txt.gz"


def train(*words: str) -> Result:
    return CliRunner().invoke(cli, ["tokenizer", "train", *words, "--json"])


def test_trains_the_same_tokenizer_twice(tmp_path: Path):
    (tmp_path / "links.csv").write_text("url,text\n" + "".join(f"u{n},a red cat number {n}\n" for n in range(50)))
    out = tmp_path / "new" / "tokenizer.json"
    words = ["--from", str(tmp_path / "links.csv"), "--column", "text", "--vocab-size", "300", "--out", str(out)]
    result = train(*words)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    tokenizer = Tokenizer.load(out)
    assert facts["captions"] == 50
    assert facts["vocab_size"] == tokenizer.vocab_size <= 300
    assert facts["fingerprint"] == tokenizer.fingerprint
    assert tokenizer.decode(tokenizer.encode(["A red cat"])[0]) == "a red cat"
    train(*words)
    assert Tokenizer.load(out).fingerprint == tokenizer.fingerprint


def test_published_tables_by_name(tmp_path: Path):
    (tmp_path / "laion.csv").write_text("URL,TEXT\nu,a red cat\n")
    (tmp_path / "cc3m.tsv").write_text("a red cat\thttp://a\na dog\thttp://b\n")
    for name, captions in (("laion.csv", 1), ("cc3m.tsv", 2)):
        words = ["--columns", name[:-4], "--vocab-size", "270", "--out", str(tmp_path / "t.json")]
        result = train("--from", str(tmp_path / name), *words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["captions"] == captions


def test_unigram_and_a_sample(tmp_path: Path):
    (tmp_path / "links.csv").write_text("caption\n" + "".join(f"a red cat number {n}\n" for n in range(400)))
    out = tmp_path / "tokenizer.json"
    words = ["--from", str(tmp_path / "links.csv"), "--vocab-size", "290", "--model", "unigram", "--out", str(out)]
    facts = json.loads(train(*words, "--sample", "0.25").stdout.splitlines()[-1])
    assert facts["model"] == "unigram"
    assert 60 < facts["captions"] < 140
    assert json.loads(out.read_text())["model"]["type"] == "Unigram"
    fingerprint = Tokenizer.load(out).fingerprint
    (tmp_path / "links.csv").write_text("caption\n" + "".join(f"a red cat number {n}\n" for n in reversed(range(400))))
    again = json.loads(train(*words, "--sample", "0.25").stdout.splitlines()[-1])
    assert again == {**facts, "fingerprint": fingerprint}


def test_clip_from_its_vocabulary_file(tmp_path: Path):
    vocabulary, out = tmp_path / "vocab.txt.gz", tmp_path / "clip.json"
    result = CliRunner().invoke(cli, ["tokenizer", "clip", str(vocabulary), "--out", str(out), "--json"])
    assert (result.exit_code, out.exists()) == (2, False)
    assert "Give OpenAI's bpe_simple_vocab_16e6.txt.gz" in result.stderr
    result = CliRunner().invoke(cli, ["tokenizer", "clip", str(VOCABULARY), "--out", str(out), "--json"])
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["vocab_size"], facts["fingerprint"]) == (49_408, Tokenizer.load(out).fingerprint)


def test_wrong_use_is_exit_2_with_one_line_and_writes_nothing(tmp_path: Path):
    links, out = tmp_path / "links.csv", tmp_path / "tokenizer.json"
    links.write_text("caption\n")
    for words, message in [
        (["--from", f"{tmp_path}/nope.csv"], "nope.csv does not exist. Give a Parquet, CSV"),
        (["--from", str(links)], "holds no captions. Give a table with at least one."),
        (
            ["--from", str(links), "--column", "text"],
            "has no column 'text'. Did you mean 'caption'? It has caption; name yours with --column.",
        ),
        (["--from", str(links), "--vocab-size", "10"], "--vocab-size 10 is below 259"),
    ]:
        result = train(*words, "--out", str(out))
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not out.exists()
