import json
from pathlib import Path

from click.testing import CliRunner, Result

from coca.tokenizer import Tokenizer
from jobs.cli import cli


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


def test_wrong_use_is_exit_2_with_one_line_and_writes_nothing(tmp_path: Path):
    links, out = tmp_path / "links.csv", tmp_path / "tokenizer.json"
    links.write_text("caption\n")
    for words, message in [
        (["--from", f"{tmp_path}/nope.csv"], "there is nothing at"),
        (["--from", str(links)], "holds no captions. Give a table with at least one."),
        (["--from", str(links), "--column", "text"], "has no column 'text'. Give --column, one of: caption."),
        (["--from", str(links), "--vocab-size", "10"], "--vocab-size 10 is below 259"),
    ]:
        result = train(*words, "--out", str(out))
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not out.exists()
