"""Ownership of KV blocks: free, owned, shared, or cached for a prompt that begins alike."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Identity of a full block's content and of all before it, 128 bits.

    A cryptographic hash: two prompts that share a digest by accident would read each other's
    context.
    """
    return hashlib.blake2b(
        parent + array("I", token_ids).tobytes(), digest_size=16, usedforsecurity=True
    ).digest()


class KVBlocks:
    """The pool of `num_blocks` block ids.

    A block is free (nobody's, content meaningless), owned by one or more sequences, or cached:
    nobody's, but its content is kept under its digest until the room is needed, least recently
    used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._owners = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that are nobody's but keep their content."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Blocks for one owner, lowest ids first so that a lone sequence's lie in a row.

        The caller has checked `num_available`.
        """
        blocks = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block, _none = self._cached.popitem(last=False)
                self._forget(block)
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None and self._by_digest.get(digest) == block:
            del self._by_digest[digest]
        self._digest[block] = None

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known beginning of `digests`; not yet owned."""
        blocks = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_cached_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody owns: taking them lowers `num_available` by as much."""
        return sum(1 for block in blocks if self._owners[block] == 0)

    def take(self, blocks: Sequence[int]) -> None:
        """Become one more owner of each of these matched blocks."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Say that an owned block now holds this content on every stage."""
        if digest not in self._by_digest and self._digest[block] is None:
            self._digest[block] = digest
            self._by_digest[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up ownership; later blocks of a prompt are forgotten before earlier ones."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self._digest[block] is None:
                    heapq.heappush(self._free, block)
                else:
                    self._cached[block] = None

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Assert that ownership is exactly what these block tables say, and nothing is lost."""
        owners = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            for block in table:
                owners[block] += 1
        assert owners == self._owners, "owners do not match the block tables"
        idle = sorted([*self._free, *self._cached])
        assert idle == [b for b in range(self.num_blocks) if owners[b] == 0], "a block is lost"
        for digest, block in self._by_digest.items():
            assert self._digest[block] == digest, "a digest leads to another block"
