"""The way to any S3 API: a boto3 client that tries again, and its errors in words.

No command runs this module; `selectmoe.storage` does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selectmoe.download import ATTEMPTS, PARALLEL
from selectmoe.errors import Unavailable, UserError

REFUSED = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
FORBIDDEN = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden"}
BUSY = {"RequestLimitExceeded", "SlowDown", "ThrottlingException", "TooManyRequests"}
PATIENCE = 30.0
"""Seconds that a server may be silent before the next attempt."""


def s3_client(attempts: int = ATTEMPTS, patience: float = PATIENCE) -> Any:
    """A boto3 S3 client that backs off and tries again on 429, 5xx and broken connections.

    A new session each time, so that changed credentials are read. boto's debug lines are switched off: they show
    signatures and session tokens.

    Args:
        attempts: how often a request is tried.
        patience: seconds that a server may be silent before the next attempt.

    Raises:
        UserError: the endpoint in the environment is not an address, or holds a password.
    """
    import boto3
    from botocore.config import Config

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if "@" in endpoint:
        raise UserError("AWS_ENDPOINT_URL_S3 must not hold credentials: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")
    for name in ("boto3", "botocore", "s3transfer"):
        logging.getLogger(name).setLevel(logging.INFO)
    config = Config(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=5,
        read_timeout=patience,
        signature_version="s3v4",
        max_pool_connections=2 * PARALLEL,
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError:
        raise UserError(f"AWS_ENDPOINT_URL_S3={endpoint} is not an address like https://host:port") from None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn boto3's errors into one line without anything secret: the user's mistake, or the world's failure.

    Raises:
        UserError: wrong or missing credentials, no right, no such bucket, a wrong request.
        Unavailable: no answer, a broken connection or the server's own error, after retries.
    """
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except S3UploadFailedError as error:  # wraps what happened in a text
        cause = error.__context__
        raise (_of_answer(uri, cause) if isinstance(cause, ClientError) else _of_boto(uri, error)) from None
    except ClientError as error:
        raise _of_answer(uri, error) from None
    except (BotoCoreError, HTTPError) as error:  # the latter: a break in the body of an error's answer
        raise _of_boto(uri, error) from None


def _of_answer(uri: str, error: Any) -> Exception:
    """What an answer of the server means."""
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in REFUSED:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of this server"
        return UserError(f"{uri}: the S3 server refuses the credentials ({code}): {hint}")
    if code in FORBIDDEN:
        doing = "write" if error.operation_name.startswith(("Put", "Create", "Upload", "Delete")) else "read"
        return UserError(
            f"{uri}: these credentials may not {doing} there ({code}): give them the right, or name another"
        )
    if code == "NoSuchBucket":
        return UserError(f"{uri}: there is no bucket {split_s3(uri)[0]} (NoSuchBucket): create it, or name another")
    if status >= 500 or status == 429 or code in BUSY:
        return Unavailable(f"{uri}: the S3 server answered {status} ({code}) at every attempt")
    return UserError(f"{uri}: the S3 server refuses {error.operation_name} ({status}, {code})")


def _of_boto(uri: str, error: Exception) -> Exception:
    """What a failure without an answer means."""
    from botocore import exceptions as boto

    kind = type(error).__name__
    missing = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.ProfileNotFound,
    )
    if isinstance(error, missing):
        return UserError(f"{uri}: no credentials ({kind}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ParamValidationError):
        return UserError(f"{uri} cannot be a place on S3: expected s3://bucket/prefix with a valid bucket name")
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "its default endpoint"
    return Unavailable(f"{uri}: the S3 server at {where} does not answer ({kind}): is AWS_ENDPOINT_URL_S3 right?")


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` URI.

    Raises:
        UserError: no bucket, or a user name or password in the URI.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")  # a key may hold ? and #: this is no URL
    if "@" in bucket:
        raise UserError("an s3:// URI must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if scheme != "s3" or not bucket:
        raise UserError(f"{uri!r} is not of the form s3://bucket/prefix")
    return bucket, key
