"""What crosses the boundary between the control plane and a stage. Standard library only.

Every message is self-contained: a stage keeps weights and KV cache, nothing else, so a step can be
replayed on a fresh stage from its message and the steps before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How the last stage draws one token of one sequence."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Most probable tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens below this share of the most probable one are dropped, in [0, 1]."""
    seed: int = 0
    """64-bit key of the sequence; with the drawn token's position it decides the draw."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) logits of tokens seen in prompt or output (CTRL,
    1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens present in the output."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from logits of tokens present in the output."""
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    """(token id, value added to its logit)."""
    banned_token_ids: list[int] = field(default_factory=list)
    """Tokens that cannot be drawn now (end tokens before `min_tokens`)."""
    num_logprobs: int | None = None
    """None: none wanted; 0: of the drawn token; k: and of the k most probable tokens."""
    history_token_ids: list[int] = field(default_factory=list)
    """Prompt and output tokens so far; filled only when a penalty is set."""
    num_prompt_tokens: int = 0
    """How many of `history_token_ids` belong to the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """One sequence's share of a micro-batch: some consecutive tokens of it."""

    sequence_id: int
    """Identity of the sequence, unique in a deployment's life."""
    start_position: int
    """Position of the first token here = tokens of this sequence already in the KV cache."""
    token_ids: list[int]
    """Tokens to compute, at least one."""
    block_table: list[int]
    """KV block ids that cover positions 0 .. start_position + len(token_ids) - 1, in order."""
    sampling: SamplingSpec | None = None
    """Set when the last token's logits are to be sampled."""
    score_targets: list[int] = field(default_factory=list)
    """When not empty, one token id per entry of a prefix of `token_ids`: its log-probability as the
    next token is returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The tokens that travel through the pipeline together."""

    epoch: int
    """Generation of the replica; a stage refuses any other than its own."""
    step: int
    """Number of the micro-batch in its epoch, from 0, without gaps."""
    slices: list[SequenceSlice]

    @property
    def num_tokens(self) -> int:
        """Rows of hidden state that travel."""
        return sum(len(s.token_ids) for s in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A drawn token. Log-probabilities are natural, of the model's unmodified logits."""

    sequence_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    """(token id, log-probability), most probable first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScores:
    """Log-probabilities of `score_targets` of one slice, in order."""

    sequence_id: int
    start_position: int
    logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the last stage returns for one micro-batch."""

    epoch: int
    step: int
    tokens: list[SampledToken] = field(default_factory=list)
    scores: list[SequenceScores] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    """Seconds each stage spent computing, first stage first."""
    started_unix_s: list[float] = field(default_factory=list)
    """When each of them began to, by its own host's clock."""
    error: str | None = None
    """Why the step failed; then there are no tokens and the replica is no longer usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What one stage is to hold and how."""

    model_path: str
    """Checkpoint directory, or one GGUF file."""
    stage_index: int
    num_stages: int
    first_layer: int
    """First layer held."""
    end_layer: int
    """One past the last layer held."""
    format: str
    """Of the linear layers: a `kernels.formats.Format`, or "auto": as a quantised checkpoint has
    them, else int8."""
    layer_formats: list[str] = field(default_factory=list)
    """The same for each layer of the model, where they differ; empty: all as `format`."""
    head_format: str = "auto"
    """Of the LM head: the same, or "auto": as the layers, int8 where they have fewer bits."""
    kv_format: str = "auto"
    """Of keys and values: "int8", or "auto": the activations' dtype."""
    embedding_place: str = "device"
    """Where the embedding's table is: "device", in the stage's memory, or "host": in the
    checkpoint's file, mapped, of which a step reads the rows that it needs; widened into host
    memory if the file has it quantised."""
    llm_int8_threshold: float | None = None
    """|activation| from which `llm_int8` keeps a feature's column in 16 bits; None: 6.0 in layers
    as wide as those of a 6.7B model, and all activations in 16 bits in smaller ones."""
    device: str = "cpu"
    """torch device name."""
    planned_device: str = ""
    """Id of the device in the plan, node:number; empty: Ray chooses."""
    memory_budget_bytes: int | None = None
    """Most bytes for weights, KV cache and workspace together; None: no limit."""
    block_size: int = 16
    """Tokens in a KV block."""
    num_kv_blocks: int | None = None
    """KV blocks to allocate; None: as many as the budget leaves, at most `max_kv_blocks`."""
    max_kv_blocks: int = 4096
    """Upper bound when `num_kv_blocks` is None."""
    max_batch_tokens: int = 512
    """Most tokens in a micro-batch; sizes the workspace."""
    max_context: int | None = None
    """Most tokens of a sequence, likewise; None: the model's limit."""
    max_sequences: int | None = None
    """Most sequences in a micro-batch, likewise; None: `max_batch_tokens`."""
    num_threads: int | None = None
    """CPU threads for arithmetic; None: torch's default."""

    @property
    def is_first(self) -> bool:
        """Holds the embedding."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Holds the final norm, the LM head and the sampler."""
        return self.stage_index == self.num_stages - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a stage's load has come."""

    phase: str
    """"waiting", "loading", "calibrating", "ready" or "failed"."""
    bytes_done: int = 0
    """Checkpoint bytes read so far."""
    bytes_total: int = 0
    """Checkpoint bytes this stage reads in all."""
    elapsed_s: float = 0.0
    message: str = ""
    """What is being read, or why it failed."""

    @property
    def bytes_per_s(self) -> float:
        """Mean rate so far."""
        return self.bytes_done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the mean rate so far; None before anything was read."""
        rate = self.bytes_per_s
        return (self.bytes_total - self.bytes_done) / rate if rate > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage: predicted from shapes before anything was read, measured from its
    tensors, and from outside: by the kernel on a CPU, by torch's allocator on a GPU."""

    predicted_weight_bytes: int
    """Weights with scales and biases, embedding and LM head included where the stage has them."""
    weight_bytes: int
    predicted_embedding_bytes: int = 0
    """Of the weights, what only the first stage has."""
    embedding_bytes: int = 0
    predicted_head_bytes: int = 0
    """Of the weights, what only the last stage has."""
    head_bytes: int = 0
    predicted_kv_cache_bytes: int = 0
    kv_cache_bytes: int
    workspace_bytes: int
    """Predicted, an upper estimate: what the largest step needs besides."""
    measured_workspace_bytes: int | None = None
    """By how much memory rose in the largest step, which was rehearsed at load; None: this kernel
    does not say."""
    predicted_host_bytes: int = 0
    """Of an embedding that is to be on the host and could not stay in its file. On a CPU device it
    counts against the budget, though not as a weight."""
    host_bytes: int = 0
    rss_anon_bytes: int
    """Anonymous resident memory of the process now, less what it had before the load."""
    loaded_rss_bytes: int = 0
    """The same when the load had ended: what it took."""
    baseline_bytes: int = 0
    """Anonymous memory that the process had before: Python, torch, Ray. Of no budget."""
    gpu_bytes: int = 0
    """What the GPU's allocator has given out to the stage, now."""
    loaded_gpu_bytes: int = 0
    """The same when the load had ended; 0 on a CPU device."""
    context_bytes: int = 0
    """What of the GPU neither the allocator has nor anyone could take when the load had ended: the
    context with its kernels, and other processes."""
    budget_bytes: int | None
    num_kv_blocks: int
    block_size: int = 16
    """Tokens in a KV block."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether the stage computes on a GPU."""
        return self.loaded_gpu_bytes > 0

    @property
    def predicted_held_bytes(self) -> int:
        """What the stage keeps on its device, predicted."""
        host = 0 if self.is_on_gpu else self.predicted_host_bytes
        return self.predicted_weight_bytes + self.predicted_kv_cache_bytes + host

    @property
    def held_bytes(self) -> int:
        """The same, measured from its tensors."""
        host = 0 if self.is_on_gpu else self.host_bytes
        return self.weight_bytes + self.kv_cache_bytes + host

    @property
    def resident_bytes(self) -> int:
        """The same, measured from outside when the load had ended."""
        return self.loaded_gpu_bytes if self.is_on_gpu else self.loaded_rss_bytes

    @property
    def total_bytes(self) -> int:
        """What the stage takes of its budget, the largest step included."""
        return self.held_bytes + self.workspace_bytes

    @property
    def headroom_bytes(self) -> int | None:
        """What is left of the budget then; None: there is none."""
        return None if self.budget_bytes is None else self.budget_bytes - self.total_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit the cache."""
        return self.num_kv_blocks * self.block_size

    @property
    def differences(self) -> tuple[str, ...]:
        """Where prediction and measurement differ by more than they may; empty: nowhere."""
        found = []
        # A GPU's graphs and cuBLAS keep some of what is counted as workspace.
        runtime = self.workspace_bytes if self.is_on_gpu else RUNTIME_BYTES
        for name, predicted, measured, allowed in (
            ("tensors", self.predicted_held_bytes, self.held_bytes, 0),
            ("device memory", self.predicted_held_bytes, self.resident_bytes, runtime),
        ):
            limit = max(ALLOWED_DIFFERENCE * predicted, allowed)
            if abs(measured - predicted) > limit:
                found.append(f"{name}: {measured:,} bytes, {predicted:,} predicted")
        measured_workspace = self.measured_workspace_bytes or 0
        if measured_workspace > self.workspace_bytes:
            found.append(
                f"workspace: {measured_workspace:,} bytes, {self.workspace_bytes:,} predicted"
            )
        return tuple(found)


ALLOWED_DIFFERENCE = 0.02
"""Between predicted and measured bytes, as a share."""
RUNTIME_BYTES = 64 * 2**20
"""What a process takes for threads, compiled kernels and the allocator, whatever the model: beside
a small one it is more than that share (measured for SmolLM2-135M in every format: 8 to 52 MB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A running stage, as it reports itself."""

    stage_index: int
    first_layer: int
    end_layer: int
    format: str
    """As `shard_bytes.format_label` says."""
    kv_format: str
    device: str
    node_id: str
    pid: int
    epoch: int
    steps: int
    """Micro-batches computed in this epoch."""
    busy_s: float
    """Seconds spent computing since the stage started."""
    uptime_s: float
    memory: StageMemory
    planned_device: str = ""
    """As `StageSpec.planned_device`."""
    crossover_tokens: dict[str, int] = field(default_factory=dict)
    """Per operation: tokens from which on the many-token kernel is used."""
