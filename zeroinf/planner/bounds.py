"""Bounds the tokens/s of a way to run from above, so that a search can leave out ways that cannot win.

Input: the facts of a search and constraints with a share of rows in host memory, embeddings and parts of experts.
Output: tokens/s that no numbers of rows and resident layers exceed. What does not fit the GPU crosses the link in every
pass, what does not fit the host is read from disks, and more rows leave less room to both.
"""

from __future__ import annotations

from math import inf

from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.descriptor import descriptor_of
from zeroinf.planner.facts import Facts
from zeroinf.planner.kv import fetched_bytes
from zeroinf.planner.memory import READ_BUFFERS, SLOTS, piece_bytes, reserved, table_pieces, units, with_layers
from zeroinf.planner.pass_shapes import MOST_ROWS
from zeroinf.planner.routing import few_tokens, routed_share
from zeroinf.planner.search_space import fetches_of

# A job is timed by a few of its waves, which may come out a little faster than the passes that they are made of.
_SLACK = 1.02
_HALVINGS = 40


def most_tokens_per_second(facts: Facts, constraints: Constraints) -> float:
    """Tokens/s of all ranks together that cannot be exceeded; infinite where nothing is known, 0 where no row fits."""
    engine = descriptor_of(constraints.engine)
    if facts.device != "cuda" or facts.anatomy.encoder is not None or not engine.mixes_tiers:
        return inf
    return _Limits(facts, constraints).tokens_per_second


class _Limits:
    """Straight lines in the rows of a rank: bytes that must leave the GPU, and those that must leave the host."""

    def __init__(self, facts: Facts, constraints: Constraints) -> None:
        assert constraints.host_share != "auto"
        assert constraints.embeddings != "auto"
        self._facts, self._constraints, self._share = facts, constraints, constraints.host_share
        anatomy, lengths = facts.anatomy, facts.lengths
        layers = with_layers(anatomy, constraints.embeddings)
        every = units(layers, constraints.wire, constraints.expert_parts or 1)
        self._weights, self._experts = sum(map(sum, every)), sum(sum(own[1:]) for own in every)
        kinds = [[own[0] for own in every], [size for own in every for size in own[1:]]]
        smallest = sum(min(sizes) for sizes in kinds if sizes)
        self._gpu = facts.gpu_bytes - piece_bytes(layers.outside)
        self._beside = self._gpu - SLOTS["replicated"] * smallest
        pools = [
            anatomy.pool_bytes(lengths.pool(anatomy, rows, round(self._share * rows), packed=True))
            for rows in (MOST_ROWS // 2, MOST_ROWS)
        ]
        self._gpu_row = (pools[1] - pools[0]) / (MOST_ROWS // 2)
        prompt = lengths.mean_prompt_tokens or lengths.prompt_tokens
        new = lengths.mean_new_tokens or lengths.new_tokens
        held = self._share * (lengths.mean_tokens or prompt + new) * anatomy.host_token_bytes(constraints.kv_dtype)
        self._host_row = constraints.world_size * held
        self._host = facts.host_bytes - reserved(facts.engine_terms.elsewhere(_nothing(constraints), None))
        self._host -= sum(table_pieces(anatomy, constraints.embeddings))
        if self._streamed(0) > self._host:  # then some are read from disks, into buffers
            self._host -= READ_BUFFERS * smallest
        self._read_row = self._share * fetched_bytes(anatomy, constraints.kv_dtype, prompt + new / 2)
        fetches = (fetches_of(constraints, offload, has_encoder=False) for offload in ("cpu", "nvme"))
        self._ranks_apart = 1 if any("partitioned" in found for found in fetches) else constraints.world_size

    @property
    def tokens_per_second(self) -> float:
        if self._gpu >= self._weights:  # few rows may leave all layers on the GPU
            return inf
        most = self._most_rows
        if most < 1:
            return 0.0
        # The link's line begins above 0, so that rows are worth the more the more there are; the disk's may not.
        found = [self._rate(most)]
        if self._disk_s(most) > self._link_s(most):
            low, high = 0.0, float(most)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if self._disk_s(middle) <= self._link_s(middle) else (low, middle)
            found.append(self._rate(high))
        return self._constraints.streams * _SLACK * max(*found, self._routed_rate)

    @property
    def _most_rows(self) -> int:
        """Rows of a rank at the most, as far as memory and requests say."""
        constraints, most = self._constraints, float(MOST_ROWS)
        if constraints.requests is not None:
            most = min(most, -(-constraints.requests // constraints.streams))
        if constraints.batch_size is not None:
            most = constraints.batch_size
        if self._gpu_row:
            most = min(most, self._beside / self._gpu_row)
        if self._host_row:
            most = min(most, self._host / self._host_row)
        if constraints.offload == "cpu" or constraints.nvme_space_bytes is None:
            room, a_row = self._beside + self._host - self._weights, self._gpu_row + self._host_row
            most = min(most, room / a_row) if a_row else most if room >= 0 else 0.0
        return int(most)

    def _streamed(self, rows: float) -> float:
        return max(0.0, self._weights - self._beside + self._gpu_row * rows)

    def _link_s(self, rows: float) -> float:
        speeds, constraints = self._facts.speeds, self._constraints
        weights = self._streamed(rows) * self._ranks_apart / constraints.world_size
        if constraints.kv_attention == "cpu":
            return max(weights / speeds.link_gbps, self._read_row * rows / speeds.host_read_gbps) / 1e9
        return (weights + self._read_row * rows) / speeds.link_gbps / 1e9

    def _disk_s(self, rows: float) -> float:
        on_disk = self._streamed(rows) - max(0.0, self._host - self._host_row * rows)
        return max(0.0, on_disk) * self._ranks_apart / self._facts.speeds.disk_gbps / 1e9

    def _rate(self, rows: float) -> float:
        seconds = max(self._link_s(rows), self._disk_s(rows))
        return rows / seconds if seconds else inf

    @property
    def _routed_rate(self) -> float:
        """The same of passes of so few tokens that only experts come that these are routed to."""
        constraints, anatomy = self._constraints, self._facts.anatomy
        asked = constraints.routed_tokens
        tokens = few_tokens(anatomy, constraints.wire) if asked is None else asked
        if not tokens or not self._experts:
            return 0.0
        experts = max(0.0, self._streamed(0) - (self._weights - self._experts))
        seconds = routed_share(anatomy, tokens) * experts / self._facts.speeds.link_gbps / 1e9
        return tokens / seconds if seconds else inf


def _nothing(constraints: Constraints) -> Choice:
    """A choice of which the host holds no layer, which tells what else it holds."""
    return Choice(
        engine=constraints.engine, offload="none", fetch="replicated", batch_size=1, micro_batch_rows=1,
        prefill_tokens=1, resident_blocks=0, nvme_blocks=0,
    )  # fmt: skip
