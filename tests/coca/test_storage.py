"""One store, two homes: the same behaviour on local disk and S3."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from botocore.exceptions import ClientError
from werkzeug.serving import WSGIRequestHandler

from coca.errors import BadInput
from coca.s3 import StoreFailed
from coca.storage import Store, _stage, open_file
from tests.pipelines.faulty_s3 import Faults, faulty_s3
from tests.s3_uploads import begin_upload, begun_uploads


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "root")
    return Store(f"{request.getfixturevalue('s3')}/prefix")


def test_write_read_list_delete(store: Store) -> None:
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"second")
    store.write("a/c/d.txt", b"")
    assert store.read("a/b.txt") == b"second"
    assert (store.size("a/b.txt"), store.exists("a/b.txt"), store.exists("a/x")) == (6, True, False)
    assert store.list("a") == ["b.txt", "c"]
    assert store.list("nowhere") == []
    store.delete("a/c")
    store.delete("a/b.txt")
    store.delete("a/b.txt")
    assert not store.exists("a/b.txt")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.txt")
    with pytest.raises(FileNotFoundError):
        store.size("a/b.txt")


def test_folders_are_told_from_files(store: Store) -> None:
    store.write("a/b", b"x")
    assert [store.is_folder(path) for path in ("a", "a/b", "none")] == [True, False, False]


def test_a_file_where_a_folder_goes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Store(tmp_path / "new/deeper").check_folder("--out")
    for below in ("file", "file/deeper/still"):
        with pytest.raises(BadInput, match=r"--out .*: .*/file is a file. Give a folder"):
            Store(tmp_path / below).check_folder("--out")


def test_write_once_has_one_winner(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.write_once("versions/1.json", f"{n}".encode()), range(8)))
    assert sum(won) == 1
    assert store.read("versions/1.json") == f"{won.index(True)}".encode()


def test_it_travels_as_its_uri(store: Store) -> None:
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"
    assert store.child("deeper").uri == f"{store.uri}/deeper"


def test_local_writes_leave_no_part_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", b"1")
    store.write_once("a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(BadInput):
        Store(uri)


def test_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("x.txt", f"{tmp_path}/x.txt", "./x.txt"):
        store, name = open_file(uri)
        assert (store.root, name) == (str(tmp_path), "x.txt")
    store, name = open_file("s3://bucket/folder/x.txt")
    assert (store.uri, name) == ("s3://bucket/folder", "x.txt")


def test_a_conditional_write_that_collides_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, answers = Store(s3), [409, 409]
    client, put = store._s3.client, store._s3.client.put_object

    def collide(**arguments: object) -> object:
        if answers:
            raise ClientError({"ResponseMetadata": {"HTTPStatusCode": answers.pop()}}, "PutObject")
        return put(**arguments)

    monkeypatch.setattr(client, "put_object", collide)
    assert store.write_once("a", b"1") is True
    assert answers == []
    assert store.write_once("a", b"2") is False
    assert store.read("a") == b"1"


def test_what_is_named_gz_is_read_and_written_as_it_is(tmp_path: Path, s3: str) -> None:
    for store in (Store(tmp_path), Store(s3)):
        store.write("words.txt.gz", b"not compressed")
        assert store.read("words.txt.gz") == b"not compressed"


def test_what_killed_writers_left_is_swept(store: Store) -> None:
    store.write("mine/whole", b"x")
    begin_writing(store, "mine/deep/cut-off")
    begin_writing(store, "mine-too/under-way")
    store.sweep_unfinished("mine")
    assert begun(store) == ["mine-too/under-way"]
    store.sweep_unfinished("")
    assert begun(store) == []
    assert store.read("mine/whole") == b"x"


def test_a_store_that_lists_no_uploads_is_left_as_it_is(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{s3}/prefix")
    begin_writing(store, "cut-off")
    with monkeypatch.context() as patch:
        patch.setattr(store._s3.client, "get_paginator", Mock(side_effect=refusal(403)))
        store.sweep_unfinished("")
    assert begun(store) == ["cut-off"]


def test_an_upload_that_ended_meanwhile_keeps_no_other(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{s3}/prefix")
    for name in "abc":
        begin_writing(store, name)
    abort = store._s3.client.abort_multipart_upload

    def all_but_a(**where: str) -> None:
        if where["Key"] == "prefix/a":
            raise refusal(404)
        abort(**where)

    with monkeypatch.context() as patch:
        patch.setattr(store._s3.client, "abort_multipart_upload", all_but_a)
        store.sweep_unfinished("")
    assert begun(store) == ["a"]


def refusal(status: int) -> ClientError:
    return ClientError({"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Operation")


@pytest.mark.parametrize("failing", [r"^POST .*\?uploads", r"partNumber=2", r"^POST .*\?uploadId"])
def test_an_upload_that_fails_leaves_what_was_there(
    failing: str, s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3).write("a", b"as it was")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with faulty_s3(s3_server, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.set(Faults(slow_down=1.0, in_a_row=10**9), only=failing)
        with pytest.raises(StoreFailed):
            Store(s3).write("a", b"x" * 21 * 2**20)
        assert Store(s3).read("a") == b"as it was"
        proxy.set(Faults(slow_down=1.0, in_a_row=10**9))
        Store(s3).sweep_unfinished("")  # what cannot be swept now is no reason to stop


def test_a_store_that_knows_no_such_object_deletes_the_folder(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Google's answers: 404 where Amazon's says 204."""
    store = Store(f"{s3}/prefix")
    store.write("a/b", b"x")
    monkeypatch.setattr(store._s3.client, "delete_object", Mock(side_effect=refusal(404)))
    store.delete("a")
    assert not store.exists("a")


def test_few_requests(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = Store(f"{s3}/prefix"), list[str]()
    monkeypatch.setattr(WSGIRequestHandler, "log_request", lambda self, *_: asked.append(self.command))
    store.write("a/small", b"x" * 2**20)
    assert asked == ["PUT"]
    assert store.read("a/small") == b"x" * 2**20
    asked.clear()
    store.delete("a/small")
    assert asked == ["DELETE", "GET"]
    asked.clear()
    for number in range(5):
        store.write(f"a/b/{number}", b"x")
    store.delete("a")
    assert asked == ["PUT"] * 5 + ["DELETE", "GET", "POST"]


def test_a_deleted_folder_leaves_nothing(s3: str) -> None:
    store = Store(f"{s3}/prefix")
    store.write("a/b/c", b"x")
    store.write("ab", b"x")
    store.delete("a")
    objects = store._s3.client.list_objects_v2(Bucket=s3.removeprefix("s3://"))["Contents"]
    assert [each["Key"] for each in objects] == ["prefix/ab"]
    Store("s3://no-such-bucket/d").delete("a")


def test_what_s3_does_not_delete_is_told(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3)
    store.write("a/b", b"x")
    refused = {"Errors": [{"Key": "a/b", "Code": "AccessDenied", "Message": "Access Denied"}]}
    failed = {"Errors": [{"Key": "a/b", "Code": "InternalError", "Message": "We encountered an error"}]}
    monkeypatch.setattr(store._s3.client, "delete_objects", Mock(side_effect=[failed, refused, {}]))
    with pytest.raises(PermissionError, match=r"/a/b was not deleted: Access Denied"):
        store.delete("a")  # the second try
    store.delete("a")


def begin_writing(store: Store, path: str) -> None:
    """As far as a writer comes that is killed before it has written all."""
    if store.is_s3:
        begin_upload(store, path)
    else:
        _stage(Path(store.path(path)), b"x")


def begun(store: Store) -> list[str]:
    if store.is_s3:
        return begun_uploads(store)
    staged = [path.relative_to(store.root) for path in Path(store.root).rglob("*.tmp")]
    return sorted(str(path.with_name(path.name.split(".")[1])) for path in staged)
