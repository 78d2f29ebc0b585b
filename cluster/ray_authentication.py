"""Whether a Ray cluster asks its clients for a token. Imports no Ray."""

from __future__ import annotations

import grpc

LIMIT_S = 10.0
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Any method would do: the token is looked at before the method."""
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
"""UNAVAILABLE: the port speaks only TLS, in which Ray asks both sides for a certificate."""


def answers_anyone(gcs_address: str) -> bool:
    """Whether a caller without a token is answered: then whoever reaches the cluster's ports can
    run code on all its nodes.

    Args:
        gcs_address: host:port of its control store.
    """
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(gcs_address, options=options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CHECK_ALIVE)
        try:
            ask(b"", timeout=LIMIT_S)
        except grpc.RpcError as error:
            return error.code() not in REFUSALS
        return True
