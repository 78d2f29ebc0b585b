"""Public Python client of a Tightfit service.

>>> from tightfit.client import Client
>>> with Client("localhost:50051") as client:              # doctest: +SKIP
...     print(client.generate("The quick brown fox", max_tokens=16).text)
"""

from tightfit.client._async import AsyncClient
from tightfit.client._security import ConnectOptions, read_token, tls_credentials
from tightfit.client._sync import Client
from tightfit.client._types import (
    Chunk,
    Generation,
    Message,
    Model,
    Position,
    Scores,
    TightfitRpcError,
    Usage,
)

__all__ = [
    "AsyncClient",
    "Chunk",
    "Client",
    "ConnectOptions",
    "Generation",
    "Message",
    "Model",
    "Position",
    "Scores",
    "TightfitRpcError",
    "Usage",
    "read_token",
    "tls_credentials",
]
