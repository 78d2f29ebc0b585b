"""What the scheduler is told, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and limits."""

    num_blocks: int
    """KV blocks on the stage that has fewest."""
    block_size: int = 16
    """Tokens in a block."""
    max_batch_tokens: int = 512
    """Most tokens in a micro-batch."""
    max_batch_sequences: int = 64
    """Most sequences in a micro-batch."""
    max_running_sequences: int = 256
    """Most sequences that own blocks."""
    max_queued_requests: int = 1024
    """Sequences that may wait for their first step."""
    max_queued_tokens: int = 1_000_000
    """Their prompt tokens together."""
    max_context_tokens: int
    """The model's limit on prompt and output together."""
    num_stages: int = 1
    """Stages to keep busy."""
    eos_token_ids: frozenset[int] = frozenset()
    vocab_size: int | None = None
    """Token ids from this on are refused; None: whoever adds requests has checked them."""
    enable_prefix_cache: bool = True

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence: the model's limit, or what the whole KV cache holds."""
        return min(self.max_context_tokens, self.num_blocks * self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCounts:
    """A snapshot."""

    num_running: int
    """Sequences that own blocks."""
    num_waiting: int
    """Sequences that do not."""
    num_queued_tokens: int
    """Prompt tokens of sequences that never ran."""
    num_blocks: int
    num_blocks_used: int
    """Owned blocks."""
    num_blocks_cached: int
    """Nobody's, kept for a prompt that begins alike."""
    num_preemptions: int
    """For want of blocks, since the start."""
    num_replayed_tokens: int = 0
    """Whose KV was lost with a stage after it had been computed, since the start."""
    num_prompt_tokens: int
    """Computed or taken from the cache, since the start."""
    num_generated_tokens: int
    """Since the start."""
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache, since the start."""
