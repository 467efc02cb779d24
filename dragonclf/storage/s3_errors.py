"""What a failed S3 request means: whose fault it is, in our errors, and whether it is worth another try."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import botocore.exceptions

from dragonclf.storage.errors import (
    AccessDeniedError,
    CredentialsError,
    PreconditionError,
    StorageError,
    UnconditionalStoreError,
    first_line,
    missing,
)

RETRY_S = 20  # an operation is begun again for so long, so that it ends within RETRY_S + the timeout of one try
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0

_Result = TypeVar("_Result")

_CREDENTIAL_CODES = {
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "RequestExpired", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch", "TokenRefreshRequired", "UnrecognizedClientException",
}  # fmt: skip
_PASSING = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
)
_PASSING_CODES = {
    "InternalError", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "TooManyRequestsException", "ConditionalRequestConflict",
}  # fmt: skip
_PASSING_STATUSES = {429, 500, 502, 503, 504}


def call(operation: str, uri: str, action: Callable[[], _Result]) -> _Result:
    """Run a request, and again while its failure may pass and the time is not over. What a write did before it failed, it may do twice."""
    deadline, wait_s = time.monotonic() + RETRY_S, FIRST_WAIT_S
    while True:
        with _errors(operation, uri):
            try:
                return action()
            except (*_PASSING, botocore.exceptions.ClientError) as error:
                if not _may_pass(error) or time.monotonic() + wait_s > deadline:
                    raise
        time.sleep(wait_s * random.uniform(0.5, 1.0))
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _may_pass(error: Exception) -> bool:
    if not isinstance(error, botocore.exceptions.ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status in _PASSING_STATUSES or error.response.get("Error", {}).get("Code") in _PASSING_CODES


@contextlib.contextmanager
def _errors(operation: str, uri: str) -> Iterator[None]:
    """Turn botocore's errors into ours."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "PreconditionFailed" or status == 412:
            raise PreconditionError from error
        if code == "NotImplemented" or status == 501:
            raise UnconditionalStoreError(
                f"cannot {operation} {uri}: the store cannot do this: {first_line(error)}"
            ) from error
        if code == "NoSuchBucket" or (code == "404" and not uri.removeprefix("s3://").partition("/")[2]):
            raise no_bucket(operation, uri) from error
        if code in ("NoSuchKey", "404"):
            raise missing(operation, uri) from error
        if code in _CREDENTIAL_CODES or status in (401, 403):
            raise denied(operation, uri, code) from error
        if code in ("KeyTooLongError", "InvalidURI"):
            raise missing(operation, uri) from error
        raise StorageError(f"cannot {operation} {uri}: {first_line(error)}") from error
    except botocore.exceptions.ParamValidationError as error:
        raise StorageError(
            f"cannot {operation} {uri}: no such name is possible: {' '.join(str(error).split())}"
        ) from error
    except botocore.exceptions.NoCredentialsError as error:
        raise CredentialsError(
            f"cannot {operation} {uri}: no AWS credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or run where a role is attached"
        ) from error
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"cannot {operation} {uri}: {first_line(error)}") from error


def denied(operation: str, uri: str, code: str) -> StorageError:
    """Of credentials that are no longer good, or of a right that they do not give."""
    if code == "RequestTimeTooSkewed":
        return CredentialsError(f"cannot {operation} {uri}: this machine's clock is wrong ({code}): set it")
    if code in _CREDENTIAL_CODES:
        return CredentialsError(
            f"cannot {operation} {uri}: the store refuses the credentials ({code}): "
            "check AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or sign in again"
        )
    return AccessDeniedError(
        f"cannot {operation} {uri}: access denied ({code}): give this identity the right to {operation} it"
    )


def no_bucket(operation: str, uri: str) -> StorageError:
    return StorageError(
        f"cannot {operation} {uri}: there is no bucket {uri.split('/')[2]!r}: check its name, AWS_REGION and AWS_ENDPOINT_URL"
    )
