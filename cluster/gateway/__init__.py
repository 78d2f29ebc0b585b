"""The gRPC edge of the service."""
