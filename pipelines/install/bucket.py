"""Create the bucket where it is missing.

    AWS_ENDPOINT_URL_S3=http://seaweedfs:8333 python -m pipelines.install bucket name=select-moe

Credentials, endpoint and region are those of the environment (`AWS_*`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pipelines.install.options import WAIT, option
from pipelines.install.patience import patiently
from selectmoe.errors import UserError
from selectmoe.s3 import explained, s3_client

TAKEN = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
MISSING = {"404", "NoSuchBucket", "NotFound"}


@dataclass(frozen=True)
class Options:
    """The keys of the command."""

    name: str = option("the bucket")
    wait: int = option(WAIT, 300)


def run(options: Options) -> None:
    """Create the bucket unless it is there.

    Raises:
        UserError: it is somebody else's, the credentials are wrong, or it is no name of a bucket.
        Unavailable: the S3 server does not answer.
    """
    print(f"bucket {options.name}: {patiently(options.wait, lambda: ensure(options.name))}", flush=True)


def ensure(name: str) -> str:
    """Create a bucket unless it is there.

    Returns:
        What was done.
    """
    uri = f"s3://{name}"
    with explained(uri):
        client = s3_client(attempts=2, patience=10)
        if _there(client, name):
            return "there already"
        region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            client.create_bucket(Bucket=name, **where)
        except client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") not in TAKEN:
                raise
        else:
            return "made"
        if not _there(client, name):  # somebody made it in between, or it belongs to an account that hides it
            raise UserError(f"{uri} belongs to somebody else: choose another name")
        return "there already"


def _there(client: Any, name: str) -> bool:
    try:
        client.head_bucket(Bucket=name)
    except client.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in MISSING:
            return False
        if code in ("403", "Forbidden", "AccessDenied"):
            raise UserError(
                f"s3://{name}: it belongs to somebody else, or these credentials may not see it ({code}): choose another "
                "name, or check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        raise
    return True
