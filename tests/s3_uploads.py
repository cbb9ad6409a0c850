"""Uploads in parts on S3, as writers leave them that are killed before they have written all."""

from coca.s3 import s3_client
from coca.storage import Store


def begin_upload(store: Store, path: str) -> None:
    bucket, _, key = store.path(path).partition("/")
    upload = s3_client().create_multipart_upload(Bucket=bucket, Key=key)
    part = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"], "PartNumber": 1}
    s3_client().upload_part(Body=b"x", **part)


def begun_uploads(store: Store) -> list[str]:
    """Paths in the store, sorted."""
    bucket, _, prefix = store.root.partition("/")
    uploads = s3_client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return sorted(upload["Key"].removeprefix(f"{prefix}/") for upload in uploads)
