"""Settings of `tightfit serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tightfit.cluster.config.addresses import (
    DEFAULT_LISTEN,
    check_collector,
    is_loopback,
    split_address,
)
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.hub import parse_hub_name
from tightfit.cluster.settings import Option
from tightfit.kernels.formats import SUPPORTED_FORMATS, KVFormat
from tightfit.workers.logs import DEFAULT_FORMAT, DEFAULT_LEVEL, FORMATS, LEVELS
from tightfit.workers.model_formats import AUTO

PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that `tightfit serve` can be told."""

    model: Annotated[str, Option("Checkpoint directory, GGUF file, or hub name (org/name).")]
    served_model_name: Annotated[
        str | None,
        Option("Name that requests may carry; default: the last part of the model's path."),
    ] = None
    format: Annotated[
        str,
        Option(
            "How linear layers are held; auto: as a quantised checkpoint has them, else int8.",
            choices=(AUTO, *map(str, SUPPORTED_FORMATS)),
        ),
    ] = AUTO
    head_format: Annotated[
        str,
        Option(
            "How the LM head is stored; auto: as the layers, int8 where they have fewer bits.",
            choices=(AUTO, *map(str, SUPPORTED_FORMATS)),
        ),
    ] = AUTO
    llm_int8_threshold: Annotated[
        float | None,
        Option(
            "Size of an activation from which llm_int8 keeps its feature in 16 bits; lower is more "
            "exact and slower. By default 6 in layers at least 4096 wide, and all features of "
            "smaller ones.",
            at_least=0,
        ),
    ] = None
    kv_format: Annotated[
        str,
        Option(
            "How keys and values are cached; auto: in the 16 or 32 bits that the layers compute "
            "in; int8: in half of 16, so that twice the tokens fit.",
            choices=(AUTO, str(KVFormat.INT8)),
        ),
    ] = AUTO
    embedding_place: Annotated[
        str,
        Option(
            "Where the embedding's table is: device (in the first stage's memory), host (in the "
            "checkpoint's file, of which a step reads the rows that it needs), or auto: as the "
            "plan says, else device.",
            choices=(AUTO, "device", "host"),
        ),
    ] = AUTO
    plan: Annotated[
        str | None,
        Option(
            "File that `tightfit plan --yaml` wrote, which says what each device holds; default: "
            "stages, or a plan for the devices that are measured at the start, with the settings "
            "of the configuration file's section plan."
        ),
    ] = None
    stages: Annotated[
        int | None,
        Option("Pipeline stages, on devices that Ray chooses, instead of a plan.", at_least=1),
    ] = None
    balance: Annotated[
        str,
        Option(
            "What the layers are split by: memory held on each stage, or speed (weights read per "
            "step).",
            choices=("memory", "speed"),
        ),
    ] = "memory"
    device: Annotated[
        str,
        Option(
            "Kind of device of every stage; cuda: one GPU each; auto: cuda where there are GPUs.",
            choices=(AUTO, "cpu", "cuda"),
        ),
    ] = AUTO
    listen: Annotated[
        str,
        Option("host:port of the gRPC gateway; port 0 takes a free one.", check=split_address),
    ] = DEFAULT_LISTEN
    metrics_listen: Annotated[
        str | None,
        Option("host:port for Prometheus to scrape; default: none.", check=split_address),
    ] = None
    live_listen: Annotated[
        str | None,
        Option(
            "host:port of a page for browsers that draws the service as it is now; default: none.",
            check=split_address,
        ),
    ] = None
    trace_endpoint: Annotated[
        str | None,
        Option(
            "OTLP collector (gRPC) that gets a trace of each request, such as "
            "http://127.0.0.1:4317, or https:// for TLS; default: none.",
            check=check_collector,
        ),
    ] = None
    trace_share: Annotated[
        float,
        Option(
            "Share of the requests that are traced; a caller that sends a traceparent decides "
            "for its own.",
            at_least=0,
            at_most=1,
        ),
    ] = 1.0
    trace_steps: Annotated[
        int,
        Option(
            "Steps of each traced request that get spans of their own, one for each stage.",
            at_least=0,
            at_most=4096,
        ),
    ] = 0
    replan_interval_s: Annotated[
        float,
        Option(
            "Seconds from one look for a better plan, as when a node has joined, to the next; it "
            "is only told, not taken. 0: never.",
            at_least=0,
        ),
    ] = 300.0
    health_listen: Annotated[
        str | None,
        Option(
            "host:port that answers gRPC health checks and nothing else, without TLS or token, for "
            "probes that can do neither, such as the kubelet's; default: none.",
            check=split_address,
        ),
    ] = None
    tls_cert: Annotated[
        str | None,
        Option("PEM file of the gateway's certificate chain; read again when it changes."),
    ] = None
    tls_key: Annotated[
        str | None, Option("PEM file of that certificate's private key, not encrypted.")
    ] = None
    tls_client_ca: Annotated[
        str | None,
        Option(
            "PEM file of authorities: only clients with a certificate of one of them are answered "
            "(mTLS)."
        ),
    ] = None
    tokens_file: Annotated[
        str | None,
        Option(
            "File of `tightfit token`: only callers with one of its tokens are answered; read "
            "again when it changes."
        ),
    ] = None
    audit_log: Annotated[
        str | None,
        Option(
            'File that a line of JSON is added to for each GetStatus, GetPlan and Drain; "-": '
            "standard error; default: that if callers are authenticated, else none."
        ),
    ] = None
    insecure_listen: Annotated[
        bool,
        Option(
            "Listen beyond this machine even without TLS or without authentication, as behind a "
            "proxy that does both."
        ),
    ] = False
    insecure_ray: Annotated[
        bool,
        Option(
            "Join a Ray cluster even without its token authentication: whoever reaches its ports "
            "can run code on it."
        ),
    ] = False
    ray_address: Annotated[
        str | None,
        Option('Ray cluster to join: "auto" or host:port; default: a private one, here.'),
    ] = None
    ray_join: Annotated[
        bool,
        Option(
            "Make this machine a node of the cluster at ray_address first, one without room for "
            "stages; it leaves again at the end."
        ),
    ] = False
    ray_strategy: Annotated[
        str, Option("How Ray places stages on nodes.", choices=PLACEMENT_STRATEGIES)
    ] = "PACK"
    placement_timeout_s: Annotated[
        float, Option("Seconds to wait for room in the Ray cluster.", at_least=0)
    ] = 60.0
    load_timeout_s: Annotated[float, Option("Seconds that loading may take.", at_least=1)] = 1800.0
    threads_per_stage: Annotated[
        int | None,
        Option(
            "CPU threads of each stage; default: the cores of a node divided among its stages, and "
            "with stages on a cluster one.",
            at_least=1,
        ),
    ] = None
    memory_budget_bytes: Annotated[
        int | None,
        Option(
            "Most memory of each stage for weights, KV cache and workspace, such as 4GiB; where "
            "it is planned, of each host. Default: no limit, or what is free.",
            key="memory_budget",
            at_least=1,
            is_size=True,
        ),
    ] = None
    block_size: Annotated[int, Option("Tokens in a KV block.", at_least=1)] = 16
    kv_blocks: Annotated[
        int | None,
        Option(
            "KV blocks on every stage; default: as many as the budget leaves, up to max_kv_blocks.",
            at_least=1,
        ),
    ] = None
    max_kv_blocks: Annotated[
        int, Option("Most KV blocks when kv_blocks is not given.", at_least=1)
    ] = 4096
    max_batch_tokens: Annotated[int, Option("Most tokens in one micro-batch.", at_least=1)] = 512
    max_running_sequences: Annotated[
        int, Option("Most sequences that hold KV blocks.", at_least=1)
    ] = 256
    max_queued_requests: Annotated[
        int, Option("Requests that may wait; more are refused.", at_least=0)
    ] = 1024
    max_queued_tokens: Annotated[
        int, Option("Prompt tokens that may wait; more are refused.", at_least=0)
    ] = 1_000_000
    max_context: Annotated[
        int | None,
        Option(
            "Most tokens of prompt and output together; default: the model's limit.", at_least=2
        ),
    ] = None
    prefix_cache: Annotated[bool, Option("Reuse the KV cache of prompts that begin alike.")] = True
    drain_grace_s: Annotated[
        float, Option("Seconds that running streams get to finish on SIGTERM.", at_least=0)
    ] = 30.0
    log_level: Annotated[
        str,
        Option(
            "Least grave lines that the gateway and its stages log; info has one for each finished "
            "request.",
            choices=LEVELS,
        ),
    ] = DEFAULT_LEVEL
    log_format: Annotated[
        str,
        Option("How they are written: text, or one JSON object a line.", choices=FORMATS),
    ] = DEFAULT_FORMAT

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        if self.plan is not None and self.stages is not None:
            raise ConfigError("serve.plan and serve.stages exclude each other: give one of them")
        if self.ray_join and ":" not in (self.ray_address or ""):
            raise ConfigError(
                "serve.ray_join needs the head's address, serve.ray_address as host:port: a node "
                "of the cluster does not have to join it"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("serve.tls_cert and serve.tls_key go together: give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("serve.tls_client_ca needs serve.tls_cert and serve.tls_key as well")
        self._check_exposed("listen", self.listen)
        if self.live_listen is not None:
            self._check_exposed("live_listen", self.live_listen)

    def _check_exposed(self, name: str, address: str) -> None:
        """Raises ConfigError where other machines reach a port that is not guarded."""
        if is_loopback(split_address(address)[0]) or self.insecure_listen:
            return
        missing = []
        if self.tls_cert is None:
            missing.append("TLS (serve.tls_cert, serve.tls_key)")
        if not self.has_authentication:
            missing.append("authentication (serve.tokens_file or serve.tls_client_ca)")
        if missing:
            raise ConfigError(
                f"serve.{name}: {address} can be reached from other machines, without "
                f"{' and without '.join(missing)}. Give what is missing, listen on 127.0.0.1, or "
                "say serve.insecure_listen"
            )

    @property
    def has_authentication(self) -> bool:
        """Callers have to show a token or a certificate."""
        return self.tokens_file is not None or self.tls_client_ca is not None

    @property
    def model_name(self) -> str:
        """Name under which the model is served."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model)
        if not path.exists() and (hub_name := parse_hub_name(self.model)):
            return hub_name.served_name
        return path.name.removesuffix(".gguf") or path.resolve().name
